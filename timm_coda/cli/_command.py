"""What every command's parser has."""

import argparse
from collections.abc import Callable
from typing import Any

__all__ = ["new_command"]


def new_command(
    subcommands: Any, name: str, help: str, description: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """A command's parser: `help` is its line in the list, `description` is printed as it stands, `run` does it."""
    parser = subcommands.add_parser(
        name,
        help=help,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser
