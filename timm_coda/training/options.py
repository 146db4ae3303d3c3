"""Options of a training run, from the command line and a YAML recipe."""

import argparse
import difflib
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from ..errors import wrap_errors
from .states import RunError

# Options of a single command: not part of the run, so not saved in its recipe.
COMMAND_OPTIONS = {"config", "output", "overwrite", "resume", "push_to_hub"}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keep line breaks of the description, and append the default to each help text that does not mention it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = not action.help or "(default" in action.help or action.default in (None, argparse.SUPPRESS)
        return action.help if said else f"{action.help} (default: %(default)s)"


def natural(text: str, *, least: int = 0) -> int:
    """Parse a whole number, 0 or more (an argparse type)."""
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
    return number


def positive(text: str) -> int:
    """Parse a whole number, 1 or more (an argparse type)."""
    return natural(text, least=1)


def parse_options(parser: argparse.ArgumentParser, argv: list[str], default_recipe: Path) -> argparse.Namespace:
    """Parse options. The command line overrides the recipe, which overrides defaults. `output` may be None.

    `--resume FOLDER` reads the recipe in that folder. Without `--config`, `--data` and `--model`, the default recipe is
    used. The parser must define at least `config`, `output`, `overwrite`, `resume`, `data` and `model`.

    Raises:
        RunError: The recipe or the run is missing, or the recipe has an unknown option.
    """
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        raise RunError("--resume continues a run, but --overwrite deletes it: give only one of them")
    if args.resume not in (None, "auto"):
        args.output, args.config = args.resume, str(Path(args.resume) / "recipe.yaml")
        if not Path(args.config).is_file():
            raise RunError(f"--resume {args.resume}: no run found, recipe.yaml is missing; give a run's output folder")
    elif not args.config and not {word.split("=")[0] for word in argv} & {"--data", "--model"}:
        args.config = str(default_recipe)
    config, output = args.config, args.output
    if config:
        known = sorted(name.replace("_", "-") for name in vars(args).keys() - COMMAND_OPTIONS)
        args = parser.parse_args(read_recipe(config, known) + argv)
    args.config, args.output = config, output
    return args


def read_recipe(path: str | os.PathLike, known: Collection[str]) -> list[str]:
    """Convert a recipe, a YAML mapping from option names to values, to command-line arguments.

    Args:
        path: The YAML file.
        known: The names of all options, with dashes.

    Raises:
        RunError: The file is missing, is not such a mapping, or contains an unknown option.
    """
    with wrap_errors(f"--config {os.fspath(path)}", RunError):
        try:
            recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise RunError(f"not YAML: {error}") from error
        if not isinstance(recipe, dict):
            raise RunError(f"expected lines such as 'lr: 0.001', got {recipe!r:.60}")
        words = []
        for key, value in recipe.items():
            name = str(key).replace("_", "-")
            if name not in known:
                near = difflib.get_close_matches(name, known)
                hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"
                raise RunError(f"unknown option {key!r}: {hint}")
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            elif isinstance(value, dict):
                words += [f"--{name}", *(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in value.items())]
            elif value is not None and value != []:
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return words


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that define a run, without those of a single command."""
    return {name: value for name, value in vars(args).items() if name not in COMMAND_OPTIONS}


def default_output(args: argparse.Namespace) -> Path:
    """Return the output folder of a run that is given none; if it is taken, the run gets the next number."""
    return Path("runs") / (Path(args.config).resolve().parent.name if args.config else re.sub(r"\W", "_", args.model))
