"""Read image files as RGB, or raise an error that says what is wrong with the file.

The size in the file's header is checked before its pixels are decoded. Only raster formats are opened, so that no
external program is started for a file (Pillow starts one for PostScript).
"""

import math
import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageFile

__all__ = ["FORMATS", "MAX_PIXELS", "MAX_RATIO", "ImageError", "open_image", "read_image", "to_rgb"]

FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO")
MAX_PIXELS = 50_000_000
"""Default limit on pixels: a large phone photo, 8160x6120. Decoding one takes up to 500 MB of memory."""
MAX_RATIO = 50
"""Limit on longer / shorter side. Models resize the shorter side to a fixed size, so a very thin image becomes huge."""

_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # of an ISO media file
_FLIPS = PIL.Image.Transpose
_TURNS = {  # to make upright, by EXIF orientation
    2: _FLIPS.FLIP_LEFT_RIGHT,
    3: _FLIPS.ROTATE_180,
    4: _FLIPS.FLIP_TOP_BOTTOM,
    5: _FLIPS.TRANSPOSE,
    6: _FLIPS.ROTATE_270,
    7: _FLIPS.TRANSVERSE,
    8: _FLIPS.ROTATE_90,
}
_SCALES = {"F": ((0, 1), (16, 255), (4096, 65535)), "I": ((0, 255), (4096, 65535))}
"""Scales of float and 32-bit values, by Pillow's mode: the least maximum, and the value that is white."""


class ImageError(ValueError):
    """A file cannot be read as an image. The message names the file, the problem and the remedy."""


def read_image(
    source: str | os.PathLike[str] | BinaryIO, *, name: str | None = None, max_pixels: int | None = MAX_PIXELS
) -> PIL.Image.Image:
    """Read an image file as RGB, upright, with all metadata removed: what `to_rgb` makes of it.

    From a file with several frames or pages, the first is read. A JPEG with more than `max_pixels` is decoded at a
    half, quarter or eighth of its size (a progressive JPEG is not). In these cases, and where `to_rgb` guessed a scale,
    `image.info["note"]` holds a short note. HEIC photos need the package pillow-heif.

    Every file comes in through this function, so the command line, the demo, training and evaluation see the same
    pixels. `explain` sees them, too, if it is given `PIL.Image.open(file)`; only a JPEG of more than `MAX_PIXELS` is
    then used at its full size.

    Args:
        source: path, or open binary file
        name: name at the start of error messages (default: the path, or "the image" for an open file; "" for none)
        max_pixels: largest number of pixels to decode; None, for files that are trusted, refuses no size or shape (a
            JPEG of more than `MAX_PIXELS` is still decoded smaller)

    Raises:
        ImageError: the file is missing, damaged or not an image, has too many pixels or too long a side, or `to_rgb`
            cannot tell the scale of its values.
    """
    name = str(source if isinstance(source, (str, os.PathLike)) else "the image") if name is None else name
    prefix = f"{name}: " if name else ""
    try:
        # Pillow warns above 90 million pixels; this module checks its own limit. `catch_warnings` is not thread-safe:
        # at worst, concurrent calls leave this one filter installed.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            opened = open_image(Path(source) if isinstance(source, (str, os.PathLike)) else source)
    except ImageError as error:
        raise ImageError(f"{prefix}{error}") from error
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(
            f"{prefix}far more than {max_pixels or MAX_PIXELS:,} pixels, the limit: make it smaller"
        ) from error
    except PIL.UnidentifiedImageError as error:
        raise ImageError(
            f"{prefix}not an image in a supported format: use PNG, JPEG, GIF, WebP, AVIF, HEIC or TIFF"
        ) from error
    except OSError as error:
        raise ImageError(f"{prefix}cannot be opened: {error.strerror or error}") from error
    except Exception as error:
        raise _damaged(prefix, error) from error
    with opened as image:
        notes = [_check_size(image, prefix, max_pixels)]
        try:
            if getattr(image, "is_animated", False):
                notes.insert(0, "first of several frames")
            rgb = to_rgb(image)
        except ImageError as error:
            raise ImageError(f"{prefix}{error}") from error
        except Exception as error:  # decoders raise almost any exception for corrupt data
            raise _damaged(prefix, error) from error
    if rgb is not image:
        notes.append(rgb.info.get("note", ""))
    note = ", ".join(part for part in notes if part)
    rgb.info = {"note": note} if note else {}
    rgb.getexif().clear()  # it may say where a photo was taken
    return rgb


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert a PIL image of any mode to RGB: upright, with transparent areas over white, in 8 bits.

    Upright: turned as its EXIF orientation says. `PIL.ImageOps.exif_transpose` removes that entry, so an image that it
    turned is not turned again. Neither is one that was turned by hand, if its EXIF data hold its size before that.

    White is what a web page shows behind transparency; the colours stored in transparent pixels are arbitrary.

    Scale: 16-bit grey values are divided by 257, however dark the image is (12-bit TIFFs by 4095 / 255). The type of
    other values does not tell what is white, so their maximum decides:

    - float: up to 1.1: white is 1; 16 to 280: white is 255; 4096 to 72088: white is 65535
    - integers of 32 bits: up to 280: white is 255; 4096 to 72088: white is 65535

    Up to a tenth of white may lie beyond black and white, and is clipped. Between two scales lies a gap in which an
    image is refused: no small change of one value turns an image black. The scale is found for each image alone: in a
    float dataset from 0 to 255, a black image with a maximum of 1 would be stretched. Save such data as 8- or 16-bit
    PNG. `info["note"]` of the result says which scale was assumed.

    Returns:
        A new image, or the same if there is nothing to convert.

    Raises:
        ImageError: values are NaN or infinite, or fit none of the scales.
    """
    image.load()  # Pillow turns TIFFs while it loads them
    turn = _TURNS.get(_orientation(image))
    note = ""
    if image.mode == "F" or image.mode.startswith("I"):
        rgb, note = _eight_bit(image)
    elif image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        solid = image.convert("LA") if image.mode == "La" else image  # Pillow converts La to nothing else
        solid = solid if solid.mode == "RGBA" else solid.convert("RGBA")
        rgb = PIL.Image.new("RGB", image.size, "white")
        rgb.paste(solid, mask=solid.getchannel("A"))
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    rgb = rgb if turn is None else rgb.transpose(turn)
    if rgb is not image:
        rgb.info = {"note": note} if note else {}  # without EXIF, so that it is not turned again
    return rgb


def open_image(file: Path | BinaryIO) -> PIL.Image.Image:
    """Open an image file in one of `FORMATS`, or a HEIC photo; only its header is read. Raises Pillow's errors."""
    PIL.Image.init()
    try:
        return PIL.Image.open(file, formats=[kind for kind in FORMATS if kind in PIL.Image.OPEN])
    except PIL.UnidentifiedImageError:
        if not _is_heic(file):
            raise
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports]  # optional
    except ImportError as error:
        raise ImageError("reading a HEIC photo needs pillow-heif: pip install pillow-heif") from error
    pillow_heif.register_heif_opener()
    return PIL.Image.open(file, formats=["HEIF"])


def _is_heic(file: Path | BinaryIO) -> bool:
    if isinstance(file, Path):
        with file.open("rb") as stream:
            start = stream.read(12)
    else:
        file.seek(0)
        start = file.read(12)
    return start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS


def _orientation(image: PIL.Image.Image) -> Any:
    """EXIF orientation still to be applied. 1, upright, if there is none, or if the EXIF data are damaged."""
    try:
        exif = image.getexif()
        orientation = exif.get(PIL.ExifTags.Base.Orientation, 1)
        if orientation in (5, 6, 7, 8) and not isinstance(image, PIL.ImageFile.ImageFile):
            # `image.rotate` keeps the EXIF data. They hold the size of the pixels before it.
            camera = exif.get_ifd(PIL.ExifTags.IFD.Exif)
            width, height = (
                camera.get(tag) for tag in (PIL.ExifTags.Base.ExifImageWidth, PIL.ExifTags.Base.ExifImageHeight)
            )
            if width != height and image.size == (height, width):
                return 1
        return orientation
    except Exception:  # Pillow raises almost any exception for corrupt EXIF data; the pixels are still good
        return 1


def _eight_bit(image: PIL.Image.Image) -> tuple[PIL.Image.Image, str]:
    """Scale 16-bit, 32-bit or float values, see `to_rgb`; return the image, and the scale if it was guessed."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ImageError("it has NaN or infinite pixel values")
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    note = ""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # PPM is read as 16 bit
        white = 2.0 ** tags.get(258, (16,))[0] - 1  # 258: bits per sample, 12 or 16
    else:
        low, high = values.min(), values.max()
        scales = _SCALES[image.mode]
        fits = (white for least, white in scales if least <= high <= 1.1 * white and low >= -0.1 * white)
        white = next(fits, None)
        if white is None:
            ranges = " or ".join(f"0 to {white:g}" for _, white in scales)
            raise ImageError(
                f"its pixel values from {low:.6g} to {high:.6g} fit none of the scales {ranges}: scale them to one, or "
                "save the image with 8 or 16 bits"
            )
        note = f"values from {low:.6g} to {high:.6g} read as 0 to {white:g}"
    levels = np.rint(values * (255 / white)).clip(0, 255).astype(np.uint8)
    if tags.get(262) == 0:  # a TIFF whose 0 is white; Pillow inverts only 8 bits
        levels = 255 - levels
    if "transparency" in image.info:
        levels[values == image.info["transparency"]] = 255
    return PIL.Image.fromarray(levels).convert("RGB"), note


def _check_size(image: PIL.Image.Image, prefix: str, max_pixels: int | None) -> str:
    """Set a large JPEG to be decoded smaller and return a note about it; raise `ImageError` for other large images."""
    width, height = image.size
    if max_pixels is not None and max(width, height) > MAX_RATIO * min(width, height):
        raise ImageError(f"{prefix}{width}x{height} pixels, one side more than {MAX_RATIO} times the other: crop it")
    # A progressive JPEG is held in memory at full size even if it is decoded smaller.
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    if width * height > limit and not image.info.get("progressive"):
        scale = 2 ** max(1, math.ceil(math.log2(width * height / limit) / 2))
        image.draft(None, (width // scale, height // scale))  # has no effect on other formats
    if max_pixels is not None and math.prod(image.size) > max_pixels:
        raise ImageError(
            f"{prefix}{width}x{height} pixels are {width * height:,}, the limit is {max_pixels:,}: make it smaller"
        )
    return "" if image.size == (width, height) else f"read at {image.width}x{image.height} of {width}x{height} pixels"


def _damaged(prefix: str, error: Exception) -> ImageError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return ImageError(f"{prefix}damaged or incomplete ({reason}): copy or download it again")
