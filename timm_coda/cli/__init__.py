"""The `timm-coda` command: parses, calls, prints.

A command is a file here with `add(subcommands)`, which names its options and the function that does it; that one
imports what it needs itself, so that `--help` is quick, and returns the exit code.
"""

import argparse
import os
import shlex
import sys

from ..hub import __version__
from . import benchmark, convert, demo, evaluate, explain, export, push

__all__ = ["main", "make_parser"]

_COMMANDS = (explain, demo, evaluate, benchmark, convert, push, export)  # in the order of --help


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "timm-coda",
        description="Image classifiers that explain themselves, exactly. timm-coda COMMAND --help says more.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"timm_coda {__version__}")
    subcommands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(subcommands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 2 for what the user can mend, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = make_parser().parse_args(argv)
        args.command_line = shlex.join(["timm-coda", *argv])
        return args.run(args)
    except BrokenPipeError:  # as in `timm-coda ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:  # our own errors say what is wrong and how to mend it
        print(f"timm-coda: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
