"""Folders of models: `timm.create_model("local-dir:FOLDER", pretrained=True)` turns them back into the same model.

Nothing in such a folder is ever half written: a file is complete before it takes its name.
"""

import contextlib
import difflib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from accelerate import Accelerator
from safetensors import SafetensorError
from timm.models import save_for_hf


class HubError(ValueError):
    """A model, a folder or a file that cannot be used; the message says which and how to mend it."""


class SaveError(HubError):
    """Something could not be written; what was there before still is."""


@contextlib.contextmanager
def blame(what: str, error_class: type[ValueError] = HubError) -> Iterator[None]:
    """Turn the errors that libraries raise for wrong input into one that says what it comes from."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, KeyError, AssertionError, OSError, SafetensorError) as error:
        raise error_class(f"{what}: {error}") from error


def create_model(
    name: str, *, num_classes: int, pretrained: bool = False, model_args: Sequence[str] = ()
) -> torch.nn.Module:
    """Make a model as `timm.create_model` does, from what a person types.

    Args:
        name: In timm's registry, or `local-dir:FOLDER`, or `hf-hub:ID`.
        num_classes: Number of classes.
        pretrained: Load its published weights.
        model_args: Further arguments, each `NAME=VALUE` with the value in JSON, such as `logit_temperature=100`.

    Raises:
        HubError: There is no such model, or it cannot be made with these arguments.
    """
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models()) or timm.list_models("coda*")
        raise HubError(f"timm has no model {name!r}; there is {', '.join(near)}")
    arguments = {}
    for word in model_args:
        key, equals, value = word.partition("=")
        if not equals:
            raise HubError(f"model argument {word!r}: expected NAME=VALUE, such as logit_temperature=100")
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
        arguments[key] = value
    if "num_classes" in arguments:
        raise HubError(f"model argument num_classes={arguments['num_classes']}: the data set says it, {num_classes}")
    said = "".join(f", {key}={value!r}" for key, value in arguments.items())
    with blame(f"cannot make the model {name} with num_classes={num_classes}{said}"):
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **arguments)


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

    Raises:
        SaveError: It could not be written, such as on a full disk; the model that was there before still is.
    """
    folder = Path(folder)
    failure = blame(f"the model could not be saved in {folder}, but what was there before is", SaveError)
    with failure, _temporary_folder(folder / ".saving") as temporary:
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


def save_state(accelerator: Accelerator, folder: str | os.PathLike, name: str, record: dict[str, Any]) -> None:
    """Write a complete training state; the one before it is deleted only when this one is complete.

    Args:
        accelerator: What holds the model, the optimiser and whatever else was registered with it. Every process calls.
        folder: Of the training states.
        name: Of this state; a later one sorts behind it.
        record: Anything else to keep, as `record.json`.

    Raises:
        SaveError: It could not be written, such as on a full disk; the state before it is still there.
    """
    folder, main = Path(folder), accelerator.is_main_process
    temporary = folder / ".saving"
    with blame(f"the training state {folder / name} could not be saved, but what was there before is", SaveError):
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary_folder(temporary) if main else contextlib.nullcontext():
            accelerator.wait_for_everyone()
            accelerator.save_state(str(temporary))
            accelerator.wait_for_everyone()
            if main and not (folder / name).exists():
                (temporary / "record.json").write_text(json.dumps(record))
                os.rename(temporary, folder / name)
    for old in find_states(folder) if main else ():
        if old.name != name:
            shutil.rmtree(old)


def find_states(folder: str | os.PathLike) -> list[Path]:
    """The complete training states in a folder, the newest last."""
    return sorted(path.parent for path in Path(folder).glob("[!.]*/record.json"))


@contextlib.contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """A new, empty folder that is gone at the end, unless what is inside gave it another name."""
    shutil.rmtree(folder, ignore_errors=True)  # what a killed process left
    folder.mkdir(parents=True)
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


def free_folder(folder: str | os.PathLike) -> Path:
    """The folder itself if nothing is there, else the first of FOLDER-2, FOLDER-3, ... where nothing is."""
    folder, number = Path(folder), 1
    while (free := folder if number == 1 else folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return free


def environment() -> dict[str, str]:
    """Versions and hardware, for the record of a run."""
    packages = ("timm_coda", "torch", "torchvision", "timm", "accelerate", "datasets", "safetensors")
    versions = {name: importlib.metadata.version(name) for name in packages}
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        info = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    hardware = {"cpu": f"{cpu}, {torch.get_num_threads()} of {os.cpu_count()} threads", "gpus": ", ".join(gpus) or "none"}
    return {"python": platform.python_version(), **versions, "platform": platform.platform(), **hardware}
