"""Write files atomically: a file is complete before it gets its name, and temporary names are never shared."""

import contextlib
import functools
import os
import platform
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_DAY = 24 * 3600  # seconds; no write takes this long without touching its file


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Context manager that opens a new file, `stream.name`. It replaces `path` on success, else it is deleted.

    Args:
        path: final path; missing folders are created.

    Raises:
        OSError: Writing failed, such as on a full disk; the message names `path`, which is unchanged.
    """
    target = Path(path)
    temporary = temporary_path(target.parent, target.suffix)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as stream:
                yield stream
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.errno is None or error.filename == str(target):
            raise
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(target)) from error


def temporary_path(folder: Path, suffix: str = "") -> Path:
    """Return a hidden path in a folder that no other process uses. It tells `remove_leftovers` whose it is."""
    return folder / f".saving-{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{suffix}"


def remove_leftovers(folder: Path) -> None:
    """Delete files and folders with temporary names that killed processes left in a folder.

    The process must have run on this machine and be gone; what another machine left is deleted after a day, because
    its process may still be writing.
    """
    for path in folder.glob(".saving-*"):
        parts = re.fullmatch(r"\.saving-(\w+)-(\d+)-\w+(\..*)?", path.name)
        with contextlib.suppress(OSError):  # already deleted by another process, or not ours to delete
            if parts and (_age(path) > _DAY or (parts[1] == _machine() and _is_gone(int(parts[2])))):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _age(path: Path) -> float:
    inside = path.iterdir() if path.is_dir() else ()
    return time.time() - max(entry.stat().st_mtime for entry in (path, *inside))


@functools.cache
def _machine() -> str:
    """Return a short name of this machine since it was started, and of the container: process ids are unique there."""
    known = [platform.node()]
    with contextlib.suppress(OSError):
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        known.append(os.readlink("/proc/self/ns/pid"))
    return f"{zlib.crc32(''.join(known).encode(errors='replace')):08x}"


def _is_gone(pid: int) -> bool:
    if os.name != "posix":  # elsewhere, signal 0 is not a question
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        pass
    return False
