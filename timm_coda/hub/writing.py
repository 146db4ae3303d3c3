"""Write files and folders so that neither a kill, a full disk nor a second process leaves a mixture.

Files and folders are complete before they get their name; until then, they have a temporary name that no other process
uses. Where several files belong together, or a run lasts, the folder is locked. The operating system removes a lock
when its process ends, however it ends. Without POSIX file locks (Windows, some network file systems) nothing is locked.
"""

import contextlib
import errno
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from ..errors import wrap_errors
from ..explanation import remove_leftovers, replacing, temporary_path

__all__ = ["RUNNING", "HubError", "SaveError", "claimed", "locked", "replacing", "temporary_folder", "write_text"]

RUNNING = ".running.lock"
"""Exists in a folder as long as a process has claimed it; one that is left after a kill means nothing."""
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_held: set[int] = set()  # file descriptors of the locks of this process


class HubError(ValueError):
    """A model, folder or repository that cannot be used; the message names it and says how to fix the problem."""


class SaveError(HubError):
    """Writing failed; files that existed before are unchanged."""


def write_text(path: Path, text: str) -> None:
    """Write text to a file atomically.

    Raises:
        SaveError: Writing failed, such as on a full disk; an existing file is unchanged.
    """
    with wrap_errors(f"{path} could not be written", SaveError), replacing(path) as stream:
        stream.write(text.encode())


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Create an empty folder in `parent` and delete it at the end, unless it was renamed inside the `with` block."""
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(parent)
    folder = temporary_path(parent)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def claimed(folder: Path, *, new: bool = False) -> Iterator[Path]:
    """Claim an output folder for a run, and remove what killed processes left in it.

    Inside the `with` block, no other process can claim it. A folder created here that is empty at the end is deleted.

    Args:
        folder: created if missing
        new: create a new folder, which no other process gets: FOLDER, FOLDER-2, FOLDER-3, ...

    Returns:
        The folder.

    Raises:
        HubError: Another process has claimed the folder.
        SaveError: The folder cannot be created or written.
    """
    with wrap_errors(f"{folder} cannot be created", SaveError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        free, number, created = folder, 1, False
        while not created:
            try:
                free.mkdir()
                created = True
            except FileExistsError:
                if not new and free.is_dir():
                    break
                if not new:
                    raise
                number += 1
                free = folder.with_name(f"{folder.name}-{number}")
    try:
        with locked(free / RUNNING, busy=f"another run writes into {free} (%s): choose another folder, or wait for it"):
            remove_leftovers(free)
            yield free
    finally:
        if created:
            with contextlib.suppress(OSError):  # it is not empty
                free.rmdir()


@contextlib.contextmanager
def locked(path: Path, *, busy: str | None = None) -> Iterator[None]:
    """Hold the lock `path`, a file that exists as long as the lock is held. Its folder is created if missing.

    Args:
        path: The file.
        busy: If another process holds the lock, raise `HubError` with this message, in which %s becomes the name of
            the process; by default, wait for it.

    Raises:
        SaveError: The file cannot be created.
    """
    try:
        file = _lock(path, busy)
    except OSError as error:
        raise SaveError(f"{path.parent} cannot be written: {error}") from error
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):  # the folder is gone
                path.unlink()  # before the lock is released: another process may hold the next file of this name
            _held.discard(file)
            os.close(file)


def _lock(path: Path, busy: str | None) -> int | None:
    """Create and lock a file; return its descriptor, or None where files cannot be locked."""
    if fcntl is None:
        return None
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the folder was just deleted
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
            if os.path.samestat(os.fstat(file), os.stat(path)):
                _held.add(file)
                with contextlib.suppress(OSError):  # on a full disk the lock is still good
                    os.ftruncate(file, 0)
                    os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
                return file
        except FileNotFoundError:  # another process released the lock while we waited for it
            pass
        except BlockingIOError:
            holder = os.pread(file, 200, 0).decode(errors="replace")
            raise HubError(str(busy).replace("%s", holder or "its name is not known yet")) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            path.unlink(missing_ok=True)
            return None
        finally:
            if file not in _held:
                os.close(file)


def _release_in_child() -> None:
    """Close the locks' files in a forked process, such as a worker: they would stay locked as long as it lives."""
    for file in _held:
        os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)
