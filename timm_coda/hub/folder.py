"""Model folders in timm's format for the Hub, `config.json` and `model.safetensors`: written whole, checked when read.

Nothing in such a folder is ever half written: a file is complete before it takes its name.
"""

import contextlib
import difflib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models._hub import load_model_config_from_path, save_config_for_hf

from ..errors import wrap_errors

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.pth.tar")


class HubError(ValueError):
    """A model, a folder or a repository that cannot be used as it is; the message says which and how to mend it."""


class SaveError(HubError):
    """Something could not be written; what was there before still is."""


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
        label_names: What the classes are called, in the order of the logits; by default what the model was loaded with.
        data_config: The image size, crop and interpolation the model was trained with
            (`timm.data.resolve_model_data_config`); by default the model's own.
        model_args: Arguments of the constructor to record beside, or in place of, those that timm remembers.

    Raises:
        HubError: timm did not make the model, or there are not as many names as classes.
        SaveError: It could not be written, such as on a full disk; the model that was there before still is.
    """
    folder = Path(folder)
    config = model_config(model, label_names=label_names, data_config=data_config, model_args=model_args)
    failure = wrap_errors(f"the model could not be saved in {folder}, but what was there before is", SaveError)
    with failure, temporary_folder(folder / ".saving") as temporary:
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(temporary / CONFIG, temporary / WEIGHTS)  # else only the owner can read it
        for name in (WEIGHTS, CONFIG):
            os.replace(temporary / name, folder / name)
    return folder


def model_config(
    model: torch.nn.Module,
    *,
    label_names: Sequence[str] | None = None,
    data_config: dict[str, Any] | None = None,
    model_args: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What `config.json` says of a model; arguments and errors as `save_model`."""
    shown = type(model).__name__
    known: Any = getattr(model, "pretrained_cfg", None)
    if known is None:
        raise HubError(f"this {shown} cannot be saved: make it with timm.create_model, which remembers its arguments")
    classes: Any = model.num_classes
    if label_names is None and known.get("num_classes") == classes:
        label_names = known.get("label_names")
    if label_names is not None and len(label_names) != classes:
        raise HubError(f"{len(label_names)} label names for the {classes} classes of this {shown}: give one a class")
    with wrap_errors(f"timm cannot describe this {shown}", HubError), tempfile.TemporaryDirectory() as temporary:
        save_config_for_hf(
            model,
            f"{temporary}/{CONFIG}",
            model_config={} if label_names is None else {"label_names": list(label_names)},
            model_args=model_args,
            data_config=data_config,
        )
        config = json.loads(Path(temporary, CONFIG).read_text(encoding="utf-8"))
    # transformers' TimmWrapper passes num_classes itself and fails when it finds it here a second time; timm takes it
    # from the top level, and the names, too.
    config.get("model_args", {}).pop("num_classes", None)
    config["pretrained_cfg"].pop("label_names", None)
    return config


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """Read a folder's `config.json` and check what it says.

    Raises:
        HubError: It is missing, is not JSON, names no architecture of timm's, or has too few or too many label names.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise HubError(f"{folder} is no model: it has no {CONFIG}; model.save_pretrained(FOLDER) makes such a folder")
    with wrap_errors(f"{path} is not JSON", HubError):
        config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise HubError(f"{path} names no architecture: expected timm's format, as model.save_pretrained writes it")
    name = config["architecture"].split(".")[0]
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models()) or timm.list_models("coda*")
        raise HubError(
            f"{path} names the architecture {name!r}, which is not registered in timm: import the package that has it, "
            f"or mend the name; there is {', '.join(near)}"
        )
    inner = config.get("pretrained_cfg", {})
    for key, part in (("pretrained_cfg", inner), ("model_args", config.get("model_args", {}))):
        if not isinstance(part, dict):
            raise HubError(f"{path} has {key} {part!r:.60}: expected names and values")
    classes = config.get("num_classes", inner.get("num_classes"))
    if not isinstance(classes, int):
        raise HubError(f"{path} has num_classes {classes!r}: expected a whole number")
    names = config.get("label_names", inner.get("label_names"))
    if names is not None and (not isinstance(names, (list, dict)) or len(names) != classes):
        count = len(names) if isinstance(names, (list, dict)) else f"{names!r:.60} as"
        raise HubError(f"{path} has {count} label names for {classes} classes: give one a class, or none")
    return config


def check_folder(folder: str | os.PathLike) -> dict[str, Any]:
    """Check that a folder is a whole model, without making one or running anything that is in it; returns its config.

    Raises:
        HubError: As `read_config`; or there are no safetensors, they are truncated, or are not this architecture's
            (names the first that are not).
    """
    folder = Path(folder)
    config, path = read_config(folder), folder / WEIGHTS
    if not path.is_file():
        pickles = sorted(found.name for pattern in _PICKLES for found in folder.glob(pattern))
        hint = f", and {pickles[0]} is a pickle, which can run code and is not read" if pickles else ""
        raise HubError(f"{folder} has no {WEIGHTS}{hint}: save the model again with model.save_pretrained(FOLDER)")
    damaged = wrap_errors(f"{path} is no safetensors file, or a part of one: copy, save or download it again", HubError)
    with damaged, safe_open(path, "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    with wrap_errors(f"{folder / CONFIG} makes no {config['architecture']}", HubError), torch.device("meta"):
        pretrained_cfg, name, model_args = load_model_config_from_path(folder)
        model = timm.create_model(name, pretrained=False, pretrained_cfg=pretrained_cfg, **model_args)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    faults = {
        "missing": [name for name in expected if name not in found],
        "not of this model": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {list(found[name])} and not {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    said = [f"{len(names)} {fault} ({', '.join(names[:3])})" for fault, names in faults.items() if names]
    if said:
        raise HubError(
            f"{path} are not the weights of the {config['architecture']} that {CONFIG} describes: {'; '.join(said)}; "
            "put together what was saved together"
        )
    return config


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """A new, empty folder that is gone at the end, unless what is inside gave it another name."""
    shutil.rmtree(folder, ignore_errors=True)  # what a killed process left
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file by a new text, all or nothing.

    Raises:
        SaveError: It could not be written, such as on a full disk; the old one is still there.
    """
    temporary = path.with_name(f".saving-{path.name}")
    with wrap_errors(f"{path} could not be written", SaveError):
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
