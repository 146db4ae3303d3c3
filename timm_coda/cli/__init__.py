"""The `timm-coda` command: parse arguments, run a command, print its results.

Each command is a module here with a function `add(subcommands)`, which defines its options and the function that runs
it. That function imports what it needs itself, so that `--help` is fast and a missing library stops only the commands
that need it, and returns the exit code.

A launcher such as `accelerate launch` starts the command in several processes, which share its work (`args.processes`).
Only the first of them prints, except what the others do not know.
"""

import argparse
import contextlib
import os
import shlex
import signal
import sys
import time
from typing import Any

from ..hub import ALONE, Processes, __version__, join_launch
from . import benchmark, convert, demo, evaluate, explain, export, push
from ._command import CommandParser

__all__ = ["main", "make_parser"]

_COMMANDS = (explain, demo, evaluate, benchmark, convert, push, export)  # in the order shown by --help


def make_parser() -> argparse.ArgumentParser:
    """Create the parser of all commands; parsed arguments have the function of the command as `run`."""
    parser = argparse.ArgumentParser(
        "timm-coda",
        description="Image classifiers with exact explanations. See timm-coda COMMAND --help for details.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"timm_coda {__version__}")
    subcommands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=CommandParser)
    for command in _COMMANDS:
        command.add(subcommands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: 2 for errors that the user can fix, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        processes = join_launch()
    except OSError as error:
        print(f"timm-coda: error: {error}", file=sys.stderr)
        return 2
    if processes.count == 1:
        if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ:  # it was asked for several
            print("note: Accelerate started one process: for several, add --multi_gpu, also on a CPU", file=sys.stderr)
        return _run(argv, ALONE)
    signal.signal(signal.SIGINT, _interrupt_once())
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        if processes.rank:
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            code = _run(argv, processes)
        except SystemExit as done:  # --help, or a wrong option
            code = int(done.code or 0)
        code = processes.end(code)
        return 0 if processes.rank else code  # a launcher reports the first code that it sees as that of a failure


def _run(argv: list[str], processes: Processes) -> int:
    try:
        args = processes.in_turn(lambda: make_parser().parse_args(argv))
        args.command_line, args.processes = shlex.join(["timm-coda", *argv]), processes
        if processes.rank and not args.shared:
            processes.say("this command is not shared: process 0 does it")
            args.run = lambda _: 0
        return processes.together(lambda: args.run(args))
    except BrokenPipeError:  # as in `timm-coda ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:  # our own errors name the problem and the remedy
        if processes.rank == 0:
            print(f"timm-coda: error: {error}", file=sys.stderr)
        elif not processes.told(error):
            processes.say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130


def _interrupt_once() -> Any:
    """Return a handler of Ctrl-C that ignores a second one within a second: a launcher repeats the terminal's."""
    last = -1.0

    def interrupt(number: int, frame: Any) -> None:
        nonlocal last
        if time.monotonic() - last > 1:
            last = time.monotonic()
            raise KeyboardInterrupt

    return interrupt
