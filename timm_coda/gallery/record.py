"""Record of what an output folder already has, so that the same command goes on where it stopped."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..hub import RUNNING, replacing
from .inputs import InputError, Source

__all__ = ["Record", "digest_of"]

_FILE = ".explain.jsonl"  # the settings, then a line per explained input, written when its files are complete


class Record:
    """The explained inputs of an output folder.

    Args:
        folder: the output folder, which exists and is claimed by this process.
        settings: what the results depend on besides the inputs, as JSON values.
        overwrite: forget what was explained before.

    Raises:
        InputError: the folder has results with other settings, or other files.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
        self._folder, self._file = folder, folder / _FILE
        self._entries: dict[str, dict[str, Any]] = {}
        settings = json.loads(json.dumps(settings))
        if not overwrite:
            before, entries = _read(self._file)
            if before is None and any(path.name != RUNNING for path in folder.iterdir()):
                raise InputError(f"{folder}: not a new or empty folder; name another, or add --overwrite")
            changed = [
                f"{key} was {before[key]!r:.60}, is {now!r:.60}"
                for key, now in settings.items()
                if before is not None and before.get(key, now) != now
            ]
            if changed:
                raise InputError(
                    f"{folder} has results with other settings ({'; '.join(changed)}): name another --output, or add "
                    "--overwrite"
                )
            self._entries = {entry["stem"]: entry for entry in entries}
        with replacing(self._file) as stream:
            for line in (settings, *self._entries.values()):
                stream.write(_line(line))

    def find(self, source: Source, digest: str) -> dict[str, Any] | None:
        """Return what `add` recorded for an input; None if its content, name or result files are not the same."""
        entry = self._entries.get(source.stem)
        if entry is None or (entry["name"], entry["digest"]) != (source.name, digest):
            return None
        return entry if all((self._folder / name).exists() for name in entry["files"]) else None

    def add(self, source: Source, digest: str, files: list[Path], **facts: Any) -> None:
        """Record that an input is explained: its files are complete. `facts` are JSON values for the next `find`."""
        names = [os.path.relpath(file, self._folder) for file in files]
        entry = {"stem": source.stem, "name": source.name, "digest": digest, "files": names, **facts}
        with open(self._file, "ab") as stream:
            stream.write(_line(entry))
        self._entries[source.stem] = entry


def digest_of(path: Path) -> str:
    """Return a hash of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _read(file: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Return the settings, None if there are none, and the entries. A line that a kill cut off is left out."""
    if not file.exists():
        return None, []
    found: list[dict[str, Any] | None] = []
    for line in file.read_bytes().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            found.append(None)
    return (found or [None])[0], [entry for entry in found[1:] if entry]
