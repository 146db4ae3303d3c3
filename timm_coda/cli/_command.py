"""Helpers shared by the commands."""

import argparse
from collections.abc import Callable
from typing import Any

__all__ = ["choose_device", "new_command"]


def new_command(
    subcommands: Any, name: str, help: str, description: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """Create a command's parser: `help` is its line in the list, `description` is not re-wrapped, `run` executes it."""
    parser = subcommands.add_parser(
        name,
        help=help,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def choose_device(name: str | None) -> str:
    """Return the device named by --device; by default cuda if available, else cpu.

    Raises:
        ValueError: the name is neither cpu nor cuda, or no CUDA device is available.
    """
    import torch

    if name not in (None, "cpu", "cuda"):
        raise ValueError(f"--device {name}: choose cpu or cuda (CUDA_VISIBLE_DEVICES selects the GPU)")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: PyTorch {torch.__version__} finds no CUDA device; choose cpu")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")
