"""Save and check model folders in timm's format for the Hub: `config.json` and `model.safetensors`.

The two files belong together, so a save that a kill interrupts must not leave one model's weights under another's
config: see `_finish`.
"""

import contextlib
import difflib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models._hub import load_model_config_from_path

from ..errors import wrap_errors
from ..explanation import Classes, read_names
from .record import save_config_for_hf
from .writing import HubError, SaveError, locked, temporary_folder

CONFIG, WEIGHTS = "config.json", "model.safetensors"
SAVED = ".saved"
"""A folder of both files, complete, that are not yet moved to their places."""
_T = TypeVar("_T")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.pth.tar")


def save_model(
    model: torch.nn.Module,
    folder: str | os.PathLike,
    *,
    label_names: Sequence[str] | None = None,
    data_config: dict[str, Any] | None = None,
    model_args: dict[str, Any] | None = None,
) -> Path:
    """Write `config.json` and `model.safetensors`, timm's format for the Hub, to a folder; return the folder.

    Existing files are replaced only when both new files are complete. A full disk or a killed process leaves the old
    model or the new one, and of two processes that save into the same folder, the second waits for the first.

    Args:
        model: A model created by `timm.create_model`, which records its arguments.
        folder: Destination; created if missing.
        label_names: Class names in the order of the logits, or by their number; by default those of the model's
            weights, if its classifier has not been replaced.
        data_config: Image size, crop and interpolation used in training (`timm.data.resolve_model_data_config`); by
            default the model's own.
        model_args: Constructor arguments to record; they extend or override those recorded by timm.

    Raises:
        HubError: The model was not created by timm, there is not one label name per class, or weights are tied.
        SaveError: Writing failed, such as on a full disk; a model that was in the folder before is unchanged.
    """
    folder = Path(folder)
    config = model_config(model, label_names=label_names, data_config=data_config, model_args=model_args)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    _check_tied(weights)
    failure = wrap_errors(f"the model could not be saved in {folder}; files already there are unchanged", SaveError)
    with failure, _saving(folder):
        with temporary_folder(folder) as temporary:
            save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
            (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            shutil.copymode(temporary / CONFIG, temporary / WEIGHTS)  # otherwise only the owner could read the weights
            os.rename(temporary, folder / SAVED)
        _finish(folder)
    return folder


def _check_tied(weights: Mapping[str, torch.Tensor]) -> None:
    """Raise `HubError` if two weights are the same tensor, which safetensors cannot store."""
    first: dict[Any, str] = {}
    for name, tensor in weights.items():
        known = first.setdefault((tensor.device, tensor.data_ptr(), tensor.shape), name)
        if known != name and tensor.numel():
            raise HubError(
                f"{known} and {name} are one tensor, which a model folder cannot store: give one of them a copy of its "
                "own, torch.nn.Parameter(weight.detach().clone())"
            )


@contextlib.contextmanager
def _saving(folder: Path) -> Iterator[None]:
    """Let no other process save into a folder, and finish a save that a kill interrupted."""
    with locked(folder / ".saving.lock"):
        _finish(folder)
        yield


def _finish(folder: Path) -> None:
    """Move the two files in `SAVED` to their places.

    A kill at any step leaves a folder that the next call finishes. Until then, timm finds the old model, the new one,
    or no config. If the configs are the same, as in every epoch of a run, timm always finds a model.
    """
    saved = folder / SAVED
    if not saved.is_dir():
        return
    if (saved / WEIGHTS).exists():
        if (folder / CONFIG).exists() and (folder / CONFIG).read_bytes() != (saved / CONFIG).read_bytes():
            (folder / CONFIG).unlink()
        os.replace(saved / WEIGHTS, folder / WEIGHTS)
    if (saved / CONFIG).exists():
        os.replace(saved / CONFIG, folder / CONFIG)
    saved.rmdir()


def between_saves(folder: str | os.PathLike, read: Callable[[], _T]) -> _T:
    """Return `read()`, which reads files of a folder, such that no save changed the model meanwhile.

    A save that a kill interrupted is finished first.

    Raises:
        SaveError: An interrupted save cannot be finished.
    """
    folder = Path(folder)
    if (folder / SAVED).is_dir():  # by a process that is at it, or was killed
        with wrap_errors(f"{folder}: a save was interrupted, and cannot be finished", SaveError), _saving(folder):
            pass
    before = _versions(folder)
    try:
        found = read()
    except Exception:
        if before is not None and _versions(folder) == before:
            raise
    else:
        if before is not None and _versions(folder) == before:
            return found
    with _saving(folder) if os.access(folder, os.W_OK) else contextlib.nullcontext():
        return read()


def _versions(folder: Path) -> list[tuple[int, int] | None] | None:
    """Return values that a save changes; None while a save moves its files."""
    found: list[tuple[int, int] | None] = []
    for name in (CONFIG, WEIGHTS):
        try:
            about = os.stat(folder / name)
            found.append((about.st_ino, about.st_mtime_ns))
        except OSError:
            found.append(None)
    return None if (folder / SAVED).is_dir() else found


@contextlib.contextmanager
def unchanging(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """Yield a temporary folder of these files, those that exist, as they are between two saves.

    They are hard links where possible: saving replaces files, and never writes into them.
    """
    with contextlib.ExitStack() as stack:
        try:
            still = stack.enter_context(temporary_folder(folder))
        except OSError:  # a folder that is only for reading
            still = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with _saving(folder) if os.access(folder, os.W_OK) else contextlib.nullcontext():
            for name in names:
                if (folder / name).is_file():
                    try:
                        os.link(folder / name, still / name)
                    except OSError:
                        shutil.copy2(folder / name, still / name)
        yield still


def model_config(
    model: torch.nn.Module,
    *,
    label_names: Sequence[str] | None = None,
    data_config: dict[str, Any] | None = None,
    model_args: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of `config.json` for a model. Arguments and errors as for `save_model`."""
    shown = type(model).__name__
    known: Any = getattr(model, "pretrained_cfg", None)
    if known is None:
        raise HubError(f"this {shown} cannot be saved: create it with timm.create_model, which records its arguments")
    with wrap_errors(f"this {shown} cannot be saved", HubError):
        classes = Classes.of(model)
        if label_names is not None:
            classes = Classes.named(read_names(label_names, len(classes)))
    by_tag = label_names is None and not known.get("label_names")  # ImageNet's names, or none
    named = {} if by_tag else {key: value for key, value in classes.as_config().items() if value}
    with wrap_errors(f"timm cannot describe this {shown}", HubError), tempfile.TemporaryDirectory() as temporary:
        save_config_for_hf(
            model,
            f"{temporary}/{CONFIG}",
            model_config=named,
            model_args=model_args,
            data_config=data_config,
        )
        config = json.loads(Path(temporary, CONFIG).read_text(encoding="utf-8"))
    # transformers' TimmWrapper passes num_classes itself and fails if model_args has it as well. timm reads num_classes
    # and the class names from the top level. The tag of ImageNet weights stands for ImageNet's class names.
    config.get("model_args", {}).pop("num_classes", None)
    unknown = not classes.labels and "in1k" in str(config["pretrained_cfg"].get("tag"))
    for key in ("label_names", "label_descriptions", *(["tag"] if unknown else [])):
        config["pretrained_cfg"].pop(key, None)
    return config


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """Read and check a folder's `config.json`.

    Raises:
        HubError: The file is missing, is not JSON, names no architecture registered in timm, or has a wrong entry, such
            as too few or too many label names.
    """
    return between_saves(folder, lambda: _read_config(Path(folder)))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise HubError(f"{folder} is not a model folder: it has no {CONFIG}; model.save_pretrained(FOLDER) makes one")
    with wrap_errors(f"{path} is not JSON", HubError):
        config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise HubError(f"{path} names no architecture: expected timm's format, as model.save_pretrained writes it")
    name = config["architecture"].split(".")[0]
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models()) or timm.list_models("coda*")
        raise HubError(
            f"{path} names the architecture {name!r}, which is not registered in timm: import the package that "
            f"registers it, or correct the name; did you mean {', '.join(near)}?"
        )
    inner = config.get("pretrained_cfg", {})
    for key, part in (("pretrained_cfg", inner), ("model_args", config.get("model_args", {}))):
        if not isinstance(part, dict):
            raise HubError(f"{path} has {key} {part!r:.60}: expected a JSON object")
    classes = config.get("num_classes", inner.get("num_classes"))
    if classes is None:
        raise HubError(f"{path} has no num_classes: expected an integer")
    check_entries({**inner, "num_classes": classes}, str(path))
    names = config.get("label_names", inner.get("label_names"))
    if names is not None:
        with wrap_errors(f"{path}", HubError):
            read_names(names, classes)
    return config


def check_entries(config: Mapping[str, Any], source: str) -> None:
    """Check a pretrained configuration, whose wrong entries timm would find late or not at all.

    Entries that are missing or None have timm's defaults.

    Raises:
        HubError: An entry is wrong; the message names `source`, the entry, its value and what is expected.
    """
    for name, (is_right, expected) in _ENTRIES.items():
        value = config.get(name)
        if value is not None and not is_right(value):
            shown = list(value) if isinstance(value, tuple) else value
            raise HubError(f"{source} has {name} {shown!r:.60}: expected {expected}")


def _numbers(value: Any, low: float, *counts: int, kind: Any = (int, float)) -> bool:
    """Whether the value is a list of as many numbers above `low` as one of the counts."""
    right = isinstance(value, (list, tuple)) and len(value) in counts
    return right and all(isinstance(v, kind) and not isinstance(v, bool) and v > low for v in value)


_INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")
_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "input_size": (lambda v: _numbers(v, 0, 3, kind=int), "three positive integers: channels, height and width"),
    "mean": (lambda v: _numbers(v, -math.inf, 1, 3), "numbers, one per colour channel"),
    "std": (lambda v: _numbers(v, 0, 1, 3), "positive numbers, one per colour channel"),
    "crop_pct": (lambda v: _numbers([v], 0, 1) and v <= 1, "a number above 0 and at most 1"),
    "interpolation": (lambda v: v in _INTERPOLATIONS, f"one of {', '.join(_INTERPOLATIONS)}"),
    "num_classes": (lambda v: _numbers([v], -1, 1, kind=int), "an integer, at least 0"),
}


def check_folder(folder: str | os.PathLike) -> dict[str, Any]:
    """Check that a folder holds a complete model, without loading weights or running its code; return its config.

    Raises:
        HubError: As for `read_config`; or the safetensors file is missing, truncated, or does not fit the architecture
            (the message names the first mismatches).
    """
    return between_saves(folder, lambda: _check_folder(Path(folder)))


def _check_folder(folder: Path) -> dict[str, Any]:
    config, path = _read_config(folder), folder / WEIGHTS
    if not path.is_file():
        pickles = sorted(found.name for pattern in _PICKLES for found in folder.glob(pattern))
        hint = f", and {pickles[0]} is a pickle, which can run code and is not loaded" if pickles else ""
        raise HubError(f"{folder} has no {WEIGHTS}{hint}: save the model again with model.save_pretrained(FOLDER)")
    damaged = wrap_errors(f"{path} is not a safetensors file, or is cut off: copy, save or download it again", HubError)
    with damaged, safe_open(path, "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    with wrap_errors(f"cannot create {config['architecture']} from {folder / CONFIG}", HubError), torch.device("meta"):
        pretrained_cfg, name, model_args = load_model_config_from_path(folder)
        model = timm.create_model(name, pretrained=False, pretrained_cfg=pretrained_cfg, **model_args)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    faults = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "with another shape": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    said = [f"{len(names)} {fault} ({', '.join(names[:3])})" for fault, names in faults.items() if names]
    if said:
        raise HubError(
            f"{path} does not fit the {config['architecture']} that {CONFIG} describes: {'; '.join(said)}; use "
            "two files that were saved together"
        )
    return config
