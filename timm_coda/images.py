"""Find image files, and read them as RGB, or raise an error that says what is wrong with the file.

The size in the file's header is checked before its pixels are decoded. Only raster formats are opened, so that no
external program is started for a file (Pillow starts one for PostScript).
"""

import heapq
import importlib.util
import math
import os
import warnings
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps

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

FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO")
HEIC_ENDINGS = frozenset({".heic", ".heics", ".heif", ".heifs", ".hif"})
"""Endings of photos that need the package pillow-heif."""
MAX_PIXELS = 50_000_000
"""Default limit on pixels: a large phone photo, 8160x6120. Decoding one takes up to 500 MB of memory."""
MAX_RATIO = 50
"""Limit on longer / shorter side. Models resize the shorter side to a fixed size, so a very thin image becomes huge."""


class ImageError(ValueError):
    """A file cannot be read as an image. The message names the file, the problem and the remedy."""


def read_image(
    source: str | os.PathLike[str] | BinaryIO, *, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> PIL.Image.Image:
    """Read an image file as RGB, rotated upright according to its EXIF data, with all metadata removed.

    Transparent areas become white and 16-bit values are scaled to 8 bits, see `to_rgb`. From a file with several frames
    or pages, the first is read. A JPEG with too many pixels is decoded at a half, quarter or eighth of its size (a
    progressive JPEG is not). In these last two cases `image.info["note"]` holds a short note.

    Args:
        source: path, or open binary file
        name: name for error messages (default: the path, or "the image" for an open file)
        max_pixels: largest number of pixels to decode

    Raises:
        ImageError: the file is missing, damaged or not an image, or has too many pixels or too long a side.
    """
    name = str(source if isinstance(source, (str, os.PathLike)) else "the image") if name is None else name
    try:
        # Pillow warns above 90 million pixels; this module checks its own limit. `catch_warnings` is not thread-safe:
        # at worst, concurrent calls leave this one filter installed.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            PIL.Image.init()
            known = [kind for kind in FORMATS if kind in PIL.Image.OPEN]
            file = Path(source) if isinstance(source, (str, os.PathLike)) else source
            opened = PIL.Image.open(file, formats=known)
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(f"{name}: far more than {max_pixels:,} pixels, the limit: make it smaller") from error
    except PIL.UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: not an image in a supported format: use PNG, JPEG, GIF, WebP, AVIF or TIFF"
        ) from error
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
        except Exception as error:  # decoders raise almost any exception for corrupt data
            raise _damaged(name, error) from error
    rgb.info = {"note": note} if note else {}
    rgb.getexif().clear()  # it may say where a photo was taken
    return rgb


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert an image of any mode to RGB, with transparent areas over white.

    16-bit grey values are divided by 257 instead of clipped; float values that are all at most 1 are multiplied by 255.
    White is what a web page shows behind transparency; the colours stored in transparent pixels are arbitrary.

    Raises:
        ImageError: the image has NaN or infinite values.
    """
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ImageError("it has NaN or infinite pixel values")
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
    """Set a large JPEG to be decoded smaller and return a note about it; raise `ImageError` for other large images."""
    width, height = image.size
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ImageError(f"{name}: {width}x{height} pixels, one side more than {MAX_RATIO} times the other: crop it")
    # A progressive JPEG is held in memory at full size even if it is decoded smaller.
    if width * height > max_pixels and not image.info.get("progressive"):
        scale = 2 ** max(1, math.ceil(math.log2(width * height / max_pixels) / 2))
        image.draft(None, (width // scale, height // scale))  # has no effect on other formats
    if math.prod(image.size) > max_pixels:
        raise ImageError(
            f"{name}: {width}x{height} pixels are {width * height:,}, the limit is {max_pixels:,}: make it smaller"
        )
    return "" if image.size == (width, height) else f"read at {image.width}x{image.height} of {width}x{height} pixels"


def _damaged(name: str, error: Exception) -> ImageError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return ImageError(f"{name}: damaged or incomplete ({reason}): copy or download it again")


def image_endings() -> frozenset[str]:
    """Return the endings of files in the formats that `read_image` reads, in lower case and with the dot."""
    known = PIL.Image.registered_extensions().items()
    endings = frozenset(ending for ending, kind in known if kind in FORMATS and kind in PIL.Image.OPEN)
    return endings | HEIC_ENDINGS if importlib.util.find_spec("pillow_heif") else endings


def is_image(path: str | os.PathLike[str]) -> bool:
    """Return whether a file begins like an image that `read_image` reads, whatever its name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            PIL.Image.init()
            PIL.Image.open(path, formats=[kind for kind in FORMATS if kind in PIL.Image.OPEN]).close()
        return True
    except PIL.Image.DecompressionBombError:
        return True
    except Exception:  # decoders raise almost any exception for other data
        return False


class FolderEntry(NamedTuple):
    """Something in a folder, see `walk_folder`."""

    path: str
    """Relative to the folder."""
    kind: str
    """ "file", "folder", or why it is neither: "hidden", "broken link", ..."""
    link: bool
    """Whether it is a link itself."""


def walk_folder(folder: str | os.PathLike[str], *, deep: bool = True) -> list[FolderEntry]:
    """List everything in a folder and, if `deep`, in its subfolders, sorted by path. Links are followed.

    Each folder is visited once, under its own path if it lies inside, else under that of the first link to it. A link
    to a folder that contains the link is not followed.
    """
    root = os.fspath(folder)
    found: list[FolderEntry] = []
    todo, links = [""], []  # folders to visit; linked folders, for afterwards, as a heap
    seen: set[tuple[int, int]] = set()
    while todo or links:
        if todo:
            inside = todo.pop()
        else:
            inside = heapq.heappop(links).replace("\0", os.sep)
            target, reason = _identity(os.path.join(root, inside)), ""
            if target in _around(os.path.join(root, inside)):
                reason = "link to a folder that contains it"
            elif target in seen:
                reason = "link to a folder that is included already"
            found.append(FolderEntry(inside, reason or "folder", True))
            if reason or not deep:
                continue
        try:
            seen.add(_identity(os.path.join(root, inside)))
            prefix = os.path.join(inside, "")
            with os.scandir(os.path.join(root, inside)) as children:
                for child in children:
                    path, kind, link = prefix + child.name, _kind(child), child.is_symlink()
                    if kind == "folder" and link:
                        heapq.heappush(links, _by_parts(path))
                        continue
                    if kind == "folder" and deep:
                        todo.append(path)
                    found.append(FolderEntry(path, kind, link))
        except OSError as error:
            found.append(FolderEntry(inside, f"cannot be opened ({error.strerror})", False))
    return sorted(found, key=lambda entry: _by_parts(entry.path))


def _kind(child: os.DirEntry) -> str:
    # Besides names with a dot: folders that macOS, Python and Synology devices put beside the user's files.
    if child.name.startswith(".") or child.name in ("__MACOSX", "__pycache__", "@eaDir"):
        return "hidden"
    try:
        if child.is_dir():
            return "folder"
        if child.is_file():
            return "file"
    except OSError:  # a link to itself
        pass
    return "broken link" if child.is_symlink() else "neither a file nor a folder"


def _by_parts(path: str) -> str:
    return path.replace(os.sep, "\0")  # a folder's files come together: "a/1" before "a-b/1"


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _around(path: str) -> set[tuple[int, int]]:
    """Return the folders that contain a path, as it is written and as it is after links are resolved."""
    found: set[tuple[int, int]] = set()
    for place in (Path(os.path.abspath(path)), Path(os.path.realpath(os.path.dirname(path))) / "x"):
        found |= {_identity(str(parent)) for parent in place.parents}
    return found
