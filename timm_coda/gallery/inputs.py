"""What a person names to be explained, files, folders and links: each as a file here, with a name for its results."""

import http.client
import os
import re
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from mimetypes import guess_extension
from pathlib import Path, PurePosixPath

__all__ = ["MAX_DOWNLOAD", "InputError", "Source", "fetched", "find_sources"]

MAX_DOWNLOAD = 500_000_000
"""Bytes behind one link."""
MAX_WAIT = 20.0
"""Seconds without an answer."""
MAX_SECONDS = 600.0
"""Seconds that a whole download may take."""


class InputError(ValueError):
    """Nothing there to be explained, or it cannot be had; the message names it."""


@dataclass(frozen=True)
class Source:
    """One file to explain."""

    place: str
    """The file, or a link to it."""
    name: str
    """What it is called on screen and in tables: without a part that cannot be printed."""
    stem: str
    """Path, below the folder of results and without an ending, that its results alone have."""


def find_sources(words: Sequence[str], output: Path) -> list[Source]:
    """Find the files that files, folders and links name, in order.

    Of a folder all files are taken, also those in folders below, but for hidden ones (.name) and those in `output`.
    Results are called as the files without their endings; of equal names the second gets "-2" at its end.

    Raises:
        InputError: there is no such file, a folder has none, or one is the folder of results.
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
            raise InputError(f"{word!r}: there is no such file or folder")
        if not place.is_dir():
            sources.append(_source(str(place), str(place), place.stem, taken))
            continue
        if output.resolve() == place.resolve():
            raise InputError(f"{word!r} is also the folder of results: name another with --output")
        inside = [path for path in sorted(place.rglob("*")) if path.is_file() and not _hidden(path.relative_to(place))]
        inside = [path for path in inside if not path.resolve().is_relative_to(output.resolve())]
        if not inside:
            raise InputError(f"{word!r}: the folder has no files")
        for path in inside:
            stem = path.relative_to(place).with_suffix("")
            sources.append(_source(str(path), str(path), str(stem), taken))
    return sources


@contextmanager
def fetched(source: Source) -> Iterator[Path]:
    """The source as a file; one behind a link is downloaded, and gone at the end.

    Raises:
        InputError: No connection, no answer in time, an error as answer, or too many bytes.
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
                raise InputError(f"{int(length):,} bytes, the limit is {MAX_DOWNLOAD:,}")
            size = 0
            with file.open("wb") as target:
                while chunk := answer.read1(1 << 16):
                    size += target.write(chunk)
                    if size > MAX_DOWNLOAD:
                        raise InputError(f"more than {MAX_DOWNLOAD:,} bytes, the limit")
                    if time.monotonic() > end:
                        raise InputError(f"{size:,} bytes in {MAX_SECONDS:.0f} s: too slow")
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # the connection
        raise InputError(f"cannot be downloaded: {error}") from error
    if length is not None and size != int(length):
        raise InputError(f"cannot be downloaded: the connection broke after {size:,} of {int(length):,} bytes")
    return file


def _is_link(word: str) -> bool:
    return word.lower().startswith(("https://", "http://"))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _source(place: str, name: str, stem: str, taken: set[str]) -> Source:
    parts = [re.sub(r"[^\w .()+,=@-]", "_", part)[:100] for part in Path(stem).parts]  # what any file system takes
    stem = os.path.join(*parts) if any(part.strip(" .") for part in parts) else "image"
    unique, count = stem, 1
    while unique.casefold() in taken:
        count += 1
        unique = f"{stem}-{count}"
    taken.add(unique.casefold())
    return Source(place, "".join(letter if letter.isprintable() else "?" for letter in name), unique)
