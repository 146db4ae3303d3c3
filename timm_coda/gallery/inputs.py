"""Resolve command-line inputs (files, folders, URLs) to local files and output names."""

import http.client
import os
import re
import tempfile
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from mimetypes import guess_extension
from pathlib import Path, PurePosixPath

from ..images import walk_folder

__all__ = ["MAX_DOWNLOAD", "InputError", "Source", "fetched", "find_sources"]

MAX_DOWNLOAD = 500_000_000
"""Maximum bytes of one download."""
MAX_WAIT = 20.0
"""Timeout in seconds while a server sends nothing."""
MAX_SECONDS = 600.0
"""Maximum seconds of one download."""
_MAX_BYTES = 255 - 55  # of a name; file systems allow 255 with its ending


class InputError(ValueError):
    """An input is missing, cannot be used or cannot be downloaded."""


@dataclass(frozen=True)
class Source:
    """One file to explain."""

    place: str
    """Path or URL of the file."""
    name: str
    """Name on screen and in tables, with "?" for characters that cannot be printed."""
    stem: str
    """Unique path of its results, relative to the output folder and without suffix."""

    @property
    def suffix(self) -> str:
        """Suffix of the file or of the URL's path, in lower case; "" for a URL without one."""
        path = urllib.parse.urlsplit(self.place).path if _is_link(self.place) else self.place
        return PurePosixPath(path).suffix.lower()


def find_sources(words: Sequence[str], output: Path) -> list[Source]:
    """Resolve files, folders and URLs to sources, in order.

    A folder stands for all files in it and its subfolders, linked ones included, except hidden files (.name) and files
    in `output`. Results are named after the files, without suffix; the second of two equal names ends in "-2".

    Args:
        words: paths and URLs.
        output: output folder.

    Raises:
        InputError: a path does not exist, a folder has no files, or a folder is the output folder.
    """
    sources: list[Source] = []
    taken: set[str] = set()
    for word in words:
        if _is_link(word):
            path = urllib.parse.unquote(urllib.parse.urlsplit(word).path)
            sources.append(_source(word, word, PurePosixPath(path).stem, taken))
            continue
        place = Path(word)
        if not place.exists():
            raise InputError(f"{word!r}: no such file or folder")
        if not place.is_dir():
            sources.append(_source(str(place), str(place), place.stem, taken))
            continue
        if output.resolve() == place.resolve():
            raise InputError(f"{word!r} is also the output folder: choose another with --output")
        inside = [place / entry.path for entry in walk_folder(place) if entry.kind == "file"]
        inside = [path for path in inside if not path.resolve().is_relative_to(output.resolve())]
        if not inside:
            raise InputError(f"{word!r}: the folder has no files")
        for path in inside:
            stem = path.relative_to(place).with_suffix("")
            sources.append(_source(str(path), str(path), str(stem), taken))
    return sources


@contextmanager
def fetched(source: Source) -> Iterator[Path]:
    """Context manager that gives the source as a local file. A URL is downloaded, and its file deleted on exit.

    Raises:
        InputError: the connection fails, the server does not answer in time or answers with an error, or the file is
            too large.
    """
    if not _is_link(source.place):
        yield Path(source.place)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield _download(source.place, Path(folder))


def _download(url: str, folder: Path) -> Path:
    request = urllib.request.Request(url, headers={"User-Agent": "timm_coda"})
    end = time.monotonic() + MAX_SECONDS
    try:
        with urllib.request.urlopen(request, timeout=MAX_WAIT) as answer:
            ending = PurePosixPath(urllib.parse.urlsplit(url).path).suffix
            if not re.fullmatch(r"\.\w{1,8}", ending):
                ending = guess_extension(answer.headers.get_content_type()) or ""
            file = folder / f"download{ending.lower()}"
            length = answer.headers.get("Content-Length")
            if length is not None and int(length) > MAX_DOWNLOAD:
                raise InputError(f"the file has {int(length):,} bytes, the limit is {MAX_DOWNLOAD:,}")
            size = 0
            with file.open("wb") as target:
                while chunk := answer.read1(1 << 16):
                    size += target.write(chunk)
                    if size > MAX_DOWNLOAD:
                        raise InputError(f"the file has more than {MAX_DOWNLOAD:,} bytes, the limit")
                    if time.monotonic() > end:
                        raise InputError(f"too slow: {size:,} bytes in {MAX_SECONDS:.0f} s")
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # closes the connection
        raise InputError(f"cannot be downloaded: {error}") from error
    if length is not None and size != int(length):
        raise InputError(f"cannot be downloaded: the connection broke after {size:,} of {int(length):,} bytes")
    return file


def _is_link(word: str) -> bool:
    return word.lower().startswith(("https://", "http://"))


def _source(place: str, name: str, stem: str, taken: set[str]) -> Source:
    parts = [_cut(re.sub(r"[^\w .()+,=@-]", "_", part)) for part in Path(stem).parts]  # valid on any file system
    stem = os.path.join(*parts) if any(part.strip(" .") for part in parts) else "image"
    unique, count = stem, 1
    while _same_file(unique) in taken:
        count += 1
        unique = f"{stem}-{count}"
    taken.add(_same_file(unique))
    return Source(place, "".join(letter if letter.isprintable() else "?" for letter in name), unique)


def _cut(part: str) -> str:
    """Cut a name to bytes that leave room for a number and for the longest ending, such as -12.overlay-1000.png."""
    return part.encode()[:_MAX_BYTES].decode(errors="ignore")


def _same_file(stem: str) -> str:
    """Return the same text for names that some file system takes for one: é has two spellings, E may be e."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", stem).casefold())
