"""Explain many images and videos: resolve inputs, write figures, tables and contact sheets to a folder."""

from .gallery import Gallery
from .inputs import InputError, Source, fetched, find_sources
from .video import VIDEO_SUFFIXES, VideoError, explain_video

__all__ = [
    "VIDEO_SUFFIXES",
    "Gallery",
    "InputError",
    "Source",
    "VideoError",
    "explain_video",
    "fetched",
    "find_sources",
]
