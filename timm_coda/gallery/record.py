"""Record of what an output folder already has, so that the same command goes on where it stopped."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..hub import ALONE, RUNNING, Processes, replacing
from .inputs import InputError, Source

__all__ = ["Record", "digest_of"]

_FILE = ".explain.jsonl"  # the settings, then a line per explained input, written when its files are complete
_OTHERS = ".explain.*.jsonl"  # the lines of other processes, until the first one has them


class Record:
    """The explained inputs of an output folder.

    Args:
        folder: the output folder, which exists and is claimed by this process.
        settings: what the results depend on besides the inputs, as JSON values.
        overwrite: forget what was explained before.
        processes: the processes that write into the folder. Each but the first has a file of its own, for the case that
            the first one is killed before it knows what the others did.

    Raises:
        InputError: the folder has results with other settings, or other files.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], *, overwrite: bool = False, processes: Processes = ALONE
    ) -> None:
        self._folder, self._file = folder, folder / _FILE
        self._entries = processes.first(lambda: self._open(settings, overwrite))
        if processes.rank:
            self._file = folder / _OTHERS.replace("*", str(processes.rank))

    def _open(self, settings: dict[str, Any], overwrite: bool) -> dict[str, dict[str, Any]]:
        """Check the folder, start its file anew, and return what was explained before."""
        folder, explained = self._folder, {}
        settings = json.loads(json.dumps(settings))
        if not overwrite:
            before, entries = _read(self._file)
            entries += [entry for file in sorted(folder.glob(_OTHERS)) for entry in _lines(file) if entry]
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
            explained = {entry["stem"]: entry for entry in entries}
        with replacing(self._file) as stream:
            for line in (settings, *explained.values()):
                stream.write(_line(line))
        self.close()
        return explained

    def close(self) -> None:
        """Delete the files of other processes, whose entries this one has."""
        for file in self._folder.glob(_OTHERS):
            file.unlink()

    def find(self, source: Source, digest: str) -> dict[str, Any] | None:
        """Return what `add` recorded for an input; None if its content, name or result files are not the same."""
        entry = self._entries.get(source.stem)
        if entry is None or (entry["name"], entry["digest"]) != (source.name, digest):
            return None
        return entry if all((self._folder / name).exists() for name in entry["files"]) else None

    def add(self, source: Source, digest: str, files: list[Path], **facts: Any) -> dict[str, Any]:
        """Record that an input is explained: its files are complete. `facts` are JSON values for the next `find`."""
        names = [os.path.relpath(file, self._folder) for file in files]
        entry = {"stem": source.stem, "name": source.name, "digest": digest, "files": names, **facts}
        self.take(entry)
        return entry

    def take(self, entry: dict[str, Any]) -> None:
        """Record an entry that another process has added; nothing happens if it is recorded already."""
        if self._entries.get(entry["stem"]) != entry:
            with open(self._file, "ab") as stream:
                stream.write(_line(entry))
            self._entries[entry["stem"]] = entry


def digest_of(path: Path) -> str:
    """Return a hash of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _read(file: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Return the settings, None if there are none, and the entries. A line that a kill cut off is left out."""
    found = _lines(file) if file.exists() else []
    return (found or [None])[0], [entry for entry in found[1:] if entry]


def _lines(file: Path) -> list[dict[str, Any] | None]:
    found: list[dict[str, Any] | None] = []
    for line in file.read_bytes().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            found.append(None)
    return found
