"""Explain many images and videos: resolve inputs, write figures, tables and contact sheets to a folder."""

from .gallery import Gallery, Row, reason_of
from .inputs import InputError, Source, fetched, find_sources
from .record import digest_of
from .units import Strongest, find_strongest, unit_sheet
from .video import VIDEO_SUFFIXES, VideoError, explain_video

__all__ = [
    "VIDEO_SUFFIXES",
    "Gallery",
    "InputError",
    "Row",
    "Source",
    "Strongest",
    "VideoError",
    "digest_of",
    "explain_video",
    "fetched",
    "find_sources",
    "find_strongest",
    "reason_of",
    "unit_sheet",
]
