"""List the files in a folder, and tell which are images."""

import heapq
import importlib.util
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import PIL.Image

from .reading import FORMATS, open_image

__all__ = ["HEIC_ENDINGS", "FolderEntry", "image_endings", "is_image", "walk_folder"]

HEIC_ENDINGS = frozenset({".heic", ".heics", ".heif", ".heifs", ".hif"})
"""Endings of photos that need the package pillow-heif."""


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
            open_image(Path(path)).close()
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
