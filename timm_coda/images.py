"""Image files in, whatever a person has on disk or uploads, as RGB pictures; or an error that says what is wrong.

What a file claims of its size is checked before its pixels are decoded, and only formats of pixels are opened: no
program is started for a file, as Pillow does for PostScript.
"""

import math
import os
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageOps

__all__ = ["FORMATS", "MAX_PIXELS", "MAX_RATIO", "ImageError", "read_image", "to_rgb"]

FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO")
MAX_PIXELS = 50_000_000
"""A telephone's largest ordinary picture, 8160x6120; up to 500 MB while it is decoded."""
MAX_RATIO = 50
"""Longer over shorter side. Models resize the shorter side to theirs, so that a hair's breadth makes a huge picture."""


class ImageError(ValueError):
    """A file that cannot be read as an image; the message names it, what was seen and how to mend it."""


def read_image(
    source: str | os.PathLike[str] | BinaryIO, *, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> PIL.Image.Image:
    """Read an image file as RGB, upright as its EXIF data say, without any of its metadata.

    Transparent parts become white and 16 bits are scaled, see `to_rgb`. Of a file of several frames or pages the first
    is read. A JPEG with too many pixels is decoded at a half, quarter or eighth of its size. Where one of the last two
    happened, `image.info["note"]` says so in a few words.

    Args:
        source: a file, or an open one.
        name: what messages call it; by default the file's name.
        max_pixels: more are not decoded.

    Raises:
        ImageError: no such file, no image, a damaged one, or one with too many pixels or sides too different.
    """
    name = str(source if isinstance(source, (str, os.PathLike)) else "the image") if name is None else name
    try:
        # Pillow warns from 90 million pixels on; the limit here is our own. Threads that meet in `catch_warnings` leave
        # at worst this one filter behind.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            PIL.Image.init()
            known = [kind for kind in FORMATS if kind in PIL.Image.OPEN]
            file = Path(source) if isinstance(source, (str, os.PathLike)) else source
            opened = PIL.Image.open(file, formats=known)
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(f"{name}: far more than {max_pixels:,} pixels, the limit: make it smaller") from error
    except PIL.UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image of a known kind: give a PNG, JPEG, GIF, WebP, AVIF or TIFF") from error
    except OSError as error:
        raise ImageError(f"{name}: cannot be opened: {error.strerror or error}") from error
    except Exception as error:
        raise _damaged(name, error) from error
    with opened as image:
        note = _check_size(image, name, max_pixels)
        try:
            if getattr(image, "is_animated", False):
                note = ", ".join(part for part in ("first of several frames", note) if part)
            image.load()
            PIL.ImageOps.exif_transpose(image, in_place=True)
            rgb = to_rgb(image)
        except Exception as error:  # a decoder meets broken bytes with nearly any exception
            raise _damaged(name, error) from error
    rgb.info = {"note": note} if note else {}
    rgb.getexif().clear()  # such as where a photograph was taken
    return rgb


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert an image of any mode to RGB: 16-bit grey by its scale instead of clipped, transparency over white.

    White is what a page shows there; the colours of transparent pixels are whatever a program left in them.
    """
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ImageError("it has NaN or infinite values, which are no colours")
        if image.mode.startswith("I;16") or values.max(initial=0) > 255:
            values = values / 257  # 65535 becomes 255
        elif image.mode == "F" and values.max(initial=0) <= 1:
            values = values * 255
        image = PIL.Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8))
    elif image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        page = PIL.Image.new("RGB", image.size, "white")
        page.paste(image, mask=image.getchannel("A"))
        return page
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_size(image: PIL.Image.Image, name: str, max_pixels: int) -> str:
    """Have a large JPEG decoded smaller, and say so; refuse what else is too large."""
    width, height = image.size
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ImageError(f"{name}: {width}x{height} pixels: crop it to sides that differ at most {MAX_RATIO} times")
    # A progressive JPEG is held in memory whole, whatever the size it is decoded at.
    if width * height > max_pixels and not image.info.get("progressive"):
        scale = 2 ** max(1, math.ceil(math.log2(width * height / max_pixels) / 2))
        image.draft(None, (width // scale, height // scale))  # does nothing to other formats
    if math.prod(image.size) > max_pixels:
        raise ImageError(
            f"{name}: {width}x{height} pixels are {width * height:,}, the limit is {max_pixels:,}: make it smaller"
        )
    return "" if image.size == (width, height) else f"read at {image.width}x{image.height} of {width}x{height} pixels"


def _damaged(name: str, error: Exception) -> ImageError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return ImageError(f"{name}: damaged or incomplete ({reason}): copy or download it again")
