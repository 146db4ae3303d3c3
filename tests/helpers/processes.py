"""Start Python programs as processes of their own, without importing PyTorch and timm anew in each of them.

A fork server (`multiprocessing`) has imported the package; each program is a fork of it, with its own process id,
session, working directory, environment and output, and can be signalled and killed like any other. What a library
reads from the environment when it is imported (HF_HUB_OFFLINE, HF_HOME, OMP_NUM_THREADS) is that of the tests.
"""

import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from pathlib import Path
from subprocess import TimeoutExpired

import pytest

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["helpers.preloaded"])


class Program:
    """A running program; attributes and methods as those of `subprocess.Popen`."""

    def __init__(self, arguments: list[str], *, cwd: Path, environment: dict[str, str]) -> None:
        """Start `python *arguments` in a session of its own; arguments are a path and its options, or "-c" and code."""
        self.args = arguments
        output = tempfile.mkdtemp()
        self._paths = [Path(output, name) for name in ("out", "err")]
        _ensure_server()
        self._process = _CONTEXT.Process(target=_run, args=(arguments, str(cwd), environment, self._paths))
        self._process.start()
        self.pid = self._process.pid
        weakref.finalize(self, _clean_up, self._process, output)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        self._process.join(0)
        return self.returncode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait until the program ends; its standard output and its errors."""
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutExpired(self.args, timeout, *(path.read_bytes() for path in self._paths))
        out, err = (path.read_text(encoding="utf-8") for path in self._paths)
        return out, err


@contextmanager
def not_forked() -> Iterator[None]:
    """Context manager in which new processes, such as a loader's workers, have only what is sent to them by pickle."""
    before = multiprocessing.get_start_method(allow_none=True)
    _ensure_server()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(before, force=True)


def _clean_up(process: multiprocessing.Process, output: str) -> None:
    if process.is_alive():  # a test failed: nothing of it may stay
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    shutil.rmtree(output, ignore_errors=True)


def _ensure_server() -> None:
    """Start the fork server with our sys.path, which Python 3.11 does not tell it: nothing would be imported there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()


def _run(arguments: list[str], cwd: str, environment: dict[str, str], paths: list[Path]) -> None:
    assert "helpers.preloaded" in sys.modules, "the fork server could not import it"
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    multiprocessing.set_start_method(None, force=True)  # for the program's own processes: the default, as when started
    for stream, path in zip((sys.stdout, sys.stderr), paths, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream.fileno())
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


def start_together(count: int, arguments: list[str], *, cwd: Path) -> list[Program]:
    """Start a program in several processes with the variables by which Accelerate connects those of a launch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    variables = [{name: str(value) for name, value in (shared | rank).items()} for rank in ranks]
    return [Program(arguments, cwd=cwd, environment=os.environ | more) for more in variables]
