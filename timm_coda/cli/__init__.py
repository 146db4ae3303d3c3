"""The `timm-coda` command: parse arguments, run a command, print its results.

Each command is a module here with a function `add(subcommands)`, which defines its options and the function that runs
it. That function imports what it needs itself, so that `--help` is fast, and returns the exit code.
"""

import argparse
import os
import shlex
import sys

from ..hub import __version__
from . import benchmark, convert, demo, evaluate, explain, export, push

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
    subcommands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(subcommands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: 2 for errors that the user can fix, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = make_parser().parse_args(argv)
        args.command_line = shlex.join(["timm-coda", *argv])
        return args.run(args)
    except BrokenPipeError:  # as in `timm-coda ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:  # our own errors name the problem and the remedy
        print(f"timm-coda: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
