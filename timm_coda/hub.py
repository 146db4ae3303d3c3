"""Models in and out: folders that `timm.create_model("local-dir:FOLDER", pretrained=True)` makes into a model again.

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

import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf


class HubError(ValueError):
    """A model or a folder that cannot be used as it is; the message says which and how to mend it."""


class SaveError(HubError):
    """Something could not be written; what was there before still is."""


def create_model(
    name: str,
    *,
    num_classes: int,
    pretrained: bool = False,
    model_args: Sequence[str] = (),
    head_only: bool = False,
) -> torch.nn.Module:
    """Make a model as `timm.create_model` does, from what a person types.

    Args:
        name: In timm's registry, or `local-dir:FOLDER`, or `hf-hub:ID`.
        num_classes: Number of classes.
        pretrained: Load its published weights.
        model_args: Further arguments, each `NAME=VALUE` with the value in JSON, such as `logit_temperature=100`.
        head_only: Freeze everything but the classifier.

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
    with blame(f"cannot make the model {name} with num_classes={num_classes}{said}", HubError):
        model: Any = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **arguments)
    if head_only:
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    return model


def save_model(
    model: torch.nn.Module,
    folder: str | os.PathLike,
    *,
    label_names: Sequence[str] | None = None,
    data_config: dict[str, Any] | None = None,
    model_args: dict[str, Any] | None = None,
) -> Path:
    """Write `config.json` and `model.safetensors`, timm's format for the Hub, into a folder.

    A file that is already there is replaced only when both new ones are complete, so that a full disk or a kill leaves
    a loadable model behind.

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
    with failure, temporary_folder(folder / ".saving") as temporary:
        save_for_hf(
            model,
            str(temporary),
            model_config={} if label_names is None else {"label_names": list(label_names)},
            model_args=model_args,
            data_config=data_config,
            safe_serialization=True,
        )
        config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
        # transformers' TimmWrapper passes num_classes itself and fails when it finds it here a second time; timm
        # takes it from the top level.
        config.get("model_args", {}).pop("num_classes", None)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(temporary / "config.json", temporary / "model.safetensors")  # else only the owner can read it
        for name in ("model.safetensors", "config.json"):
            os.replace(temporary / name, folder / name)
    return folder


@contextlib.contextmanager
def blame(what: str, error_class: type[ValueError]) -> Iterator[None]:
    """Turn the errors that libraries raise for wrong input into one that says what it comes from."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, KeyError, AssertionError, OSError, SafetensorError) as error:
        raise error_class(f"{what}: {error}") from error


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """A new, empty folder that is gone at the end, unless what is inside gave it another name."""
    shutil.rmtree(folder, ignore_errors=True)  # what a killed process left
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
