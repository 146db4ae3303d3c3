"""Find image files, and read them as RGB: the one way in which images enter the package."""

from .folders import HEIC_ENDINGS, FolderEntry, image_endings, is_image, walk_folder
from .reading import FORMATS, MAX_PIXELS, MAX_RATIO, ImageError, read_image, to_rgb

__all__ = [
    "FORMATS",
    "HEIC_ENDINGS",
    "MAX_PIXELS",
    "MAX_RATIO",
    "FolderEntry",
    "ImageError",
    "image_endings",
    "is_image",
    "read_image",
    "to_rgb",
    "walk_folder",
]
