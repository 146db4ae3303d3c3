"""Helpers shared by the commands."""

import argparse
import os
from collections.abc import Callable
from typing import Any

from ..hub import ALONE, Processes

__all__ = ["CommandParser", "add_dataset_options", "choose_device", "new_command"]


class CommandParser(argparse.ArgumentParser):
    """The parser of one command. It calls `define(parser)` when it is used: until then, options cost no slow import."""

    define: Callable[["CommandParser"], None] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        define, self.define = self.define, None
        if define is not None:
            define(self)
        return super().parse_known_args(args, namespace)


def new_command(
    subcommands: Any,
    name: str,
    help: str,
    description: str,
    run: Callable[[argparse.Namespace], int],
    *,
    shared: bool = False,
) -> CommandParser:
    """Create a command's parser: `help` is its line in the list, `description` is not re-wrapped, `run` executes it.

    If it is not `shared`, only the first of several processes runs it.
    """
    parser = subcommands.add_parser(
        name,
        help=help,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, shared=shared)
    return parser


def add_dataset_options(group: Any, *, otherwise: str) -> None:
    """Add the options that say which images of a dataset to use; `otherwise` are those without a split to test on."""
    add = group.add_argument
    add("--subset", help="configuration of a Hub dataset with several")
    add("--test-split", metavar="NAME", help=f"split to use (default: validation, else test, else {otherwise})")
    add("--image-column", metavar="NAME", help="column of images (default: the only one)")
    add("--label-column", metavar="NAME", help="column of classes (default: by its type, or named label)")


def choose_device(name: str | None, processes: Processes = ALONE) -> str:
    """Return the device named by --device; by default cuda if available, else cpu. "cuda" is one for each process.

    Raises:
        ValueError: the name is neither cpu nor cuda, or no CUDA device is available.
    """
    import torch

    if name not in (None, "cpu", "cuda"):
        raise ValueError(f"--device {name}: choose cpu or cuda (CUDA_VISIBLE_DEVICES selects the GPU)")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: PyTorch {torch.__version__} finds no CUDA device; choose cpu")
    wanted = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("true", "1")
    name = name or ("cuda" if wanted else "cpu")
    if name == "cuda" and processes.count > 1:
        torch.cuda.set_device(processes.local_rank % torch.cuda.device_count())
    return name
