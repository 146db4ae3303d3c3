"""Folders of models: `timm.create_model("local-dir:FOLDER", pretrained=True)` turns them back into the same model.

Nothing in such a folder is ever half written: a file is complete before it takes its name.
"""

import contextlib
import difflib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.models import save_for_hf


class HubError(ValueError):
    """A folder or a file of it that cannot be used; the message says which and how to mend it."""


def save_model(
    model: torch.nn.Module,
    folder: str | os.PathLike,
    *,
    label_names: Sequence[str] | None = None,
    data_config: dict[str, Any] | None = None,
    model_args: dict[str, Any] | None = None,
) -> Path:
    """Write `config.json` and `model.safetensors`, timm's format for the Hub, into a folder.

    A file that is already there is replaced only when the new ones are complete, so a full disk or a kill leaves a
    loadable model behind.

    Args:
        model: A model that `timm.create_model` made; timm remembers the arguments it was made with.
        folder: Where to; made if missing.
        label_names: What the classes are called, in the order of the logits.
        data_config: The image size, crop and interpolation the model was trained with
            (`timm.data.resolve_model_data_config`); by default the model's own.
        model_args: Arguments of the constructor to record beside, or in place of, those that timm remembers.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder / f".saving-{os.getpid()}") as temporary:
        save_for_hf(
            model,
            str(temporary),
            model_config={"label_names": list(label_names)} if label_names is not None else None,
            model_args=model_args,
            data_config=data_config,
            safe_serialization=True,
        )
        config = json.loads((temporary / "config.json").read_text())
        # transformers' TimmWrapper passes num_classes itself and fails when it finds it here a second time; timm
        # takes it from the top level.
        config.get("model_args", {}).pop("num_classes", None)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in ("model.safetensors", "config.json"):
            os.replace(temporary / name, folder / name)
    return folder


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """A new, empty folder that is gone at the end, unless what is inside gave it another name."""
    shutil.rmtree(folder, ignore_errors=True)  # what a killed process left
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replace a file by a new text, all or nothing."""
    path = Path(path)
    temporary = path.with_name(f".saving-{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_recipe(path: str | os.PathLike, known: Sequence[str]) -> list[str]:
    """Read a recipe, a YAML mapping from option names to values, as the command line that says the same.

    Args:
        path: The recipe.
        known: The names of the options there are, with dashes.

    Raises:
        HubError: The file is missing or not such a mapping, or names an unknown option.
    """
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise HubError(f"cannot read the recipe {os.fspath(path)}: {error}") from error
    if not isinstance(recipe, dict):
        raise HubError(f"{os.fspath(path)} is no recipe: expected lines such as 'lr: 0.001', got {recipe!r:.60}")
    words = []
    for key, value in recipe.items():
        name = str(key).replace("_", "-")
        if name not in known:
            near = difflib.get_close_matches(name, known)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
            raise HubError(f"{os.fspath(path)}: there is no option {key!r}: {hint}")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, dict):
            words += [f"--{name}", *(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in value.items())]
        elif value is not None and value != []:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words
