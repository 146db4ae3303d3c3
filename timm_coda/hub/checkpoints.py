"""Convert published checkpoints: download, read without running code in them, check, and save in timm's format.

`checkpoint_filter_fn` in each family's model file converts the published keys; timm calls it on every load.
"""

import functools
import http.client
import logging
import os
import pickle
import re
import shutil
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import PretrainedCfg, clean_state_dict, load_state_dict, resolve_pretrained_cfg
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import wrap_errors
from ..explanation import Classes, read_names
from ..layers import adapt_colours
from .factory import create_model
from .folder import check_entries, save_model
from .writing import HubError, SaveError, replacing, temporary_folder

_logger = logging.getLogger(__name__)
TIMEOUT = 30.0  # seconds without a response after which a download fails


class ConvertError(HubError):
    """A checkpoint that cannot be obtained or does not fit the model; the message names it and says how to fix it."""


def resolve_weights(
    variant: str,
    pretrained: bool,
    *,
    pretrained_cfg: PretrainedCfg | dict[str, Any] | str | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> PretrainedCfg:
    """Return the configuration of a model to create; with `pretrained`, one whose weights timm can load.

    Downloads from a `url` happen here and not in timm, so that a failure names the file and what to do without a
    network. A `url` may be a pair (link, file name): timm names its copy after the end of a link, and the authors'
    links all have the same end. Each licence other than this package's is logged once.

    Args:
        variant: The model's name without tag.
        pretrained: Whether to load weights.
        pretrained_cfg: The tag, or the whole configuration, as timm passes it to an entrypoint.
        pretrained_cfg_overlay: Entries that override it; a `url` or `hf_hub_id` also overrides weights in the package.
        cache_dir: Download cache; by default that of torch and timm.

    Raises:
        HubError: The weights do not exist yet, or the configuration has a wrong entry.
        ConvertError: The weights cannot be downloaded.
    """
    overlay = pretrained_cfg_overlay or {}
    if overlay.keys() & {"url", "hf_hub_id"}:
        overlay = {"file": None, "hf_hub_id": None, **overlay}  # otherwise timm would prefer the tag's own
    config = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)  # type: ignore[arg-type]  # timm: str or dict
    name = f"{config.architecture}.{config.tag}" if config.tag else str(config.architecture)
    check_entries(config.to_dict(), f"the configuration of {name}")
    if not pretrained or config.source or config.state_dict or config.file or config.hf_hub_id:
        return config
    if not config.url:
        known = ", ".join(timm.list_pretrained(f"{variant}.*")) or "none for this model"
        raise HubError(
            f"{name} has no weights yet (available: {known}): train them with python train.py --config "
            f"hub_configs/{name}/recipe.yaml, or create the model with pretrained=False"
        )
    url, filename = _link(config)
    try:
        file = fetch(url, filename, cache_dir)
    except ConvertError as error:
        hint = f"if you have the file, convert it: timm-coda convert FILE --model {name} --output FOLDER"
        overlay_hint = "load it with pretrained_cfg_overlay={'file': FILE}"
        raise ConvertError(f"{name}: {error}; {hint}, or {overlay_hint}") from error
    if config.license and config.license != "apache-2.0":
        _note_licence(name, config.license, config.description or "")
    return replace(config, file=str(file))


def is_cached(name: str) -> bool:
    """Return whether the weights that `timm.create_model(name, pretrained=True)` downloads from a link are here."""
    config = timm.models.get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None
    return config is not None and bool(config.url) and (_cache(None) / _link(config)[1]).is_file()


def _link(config: PretrainedCfg) -> tuple[str, str]:
    """Return the link to a model's weights and the name of the copy in the cache, which is timm's for a plain link."""
    url: Any = config.url
    return (url, urllib.parse.urlparse(url).path.rsplit("/", 1)[-1]) if isinstance(url, str) else url


def _cache(cache_dir: str | os.PathLike | None) -> Path:
    return Path(cache_dir or Path(torch.hub.get_dir()) / "checkpoints")


@functools.cache
def _note_licence(name: str, licence: str, description: str) -> None:
    _logger.warning("%s: %s. Licence: %s", name, description.rstrip("."), licence)


def fetch(url: str, filename: str, cache_dir: str | os.PathLike | None = None) -> Path:
    """Return the checkpoint at a URL, from the cache or downloaded to it. Only complete, readable files are cached.

    Raises:
        ConvertError: The download failed, or the response is not a checkpoint.
    """
    folder = _cache(cache_dir)
    file = folder / filename
    if file.exists():
        try:
            read_checkpoint(file)
            return file
        except ConvertError as error:
            _logger.warning("%s; downloading it again", error)
    with temporary_folder(folder) as temporary:
        new = temporary / filename
        download(url, new)
        os.replace(new, file)
    return file


def download(url: str, file: Path) -> None:
    """Download a checkpoint and check that it can be read.

    Raises:
        ConvertError: There is no connection, the download is incomplete, or the response is not a checkpoint.
    """
    if not url.startswith(("https://", "http://")):
        raise ConvertError(f"cannot download {url}: only https:// and http://")
    _logger.info("downloading %s", url)
    request = urllib.request.Request(url, headers={"User-Agent": "timm_coda"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, file.open("wb") as target:
            length = answer.headers.get("Content-Length")
            total = int(length) if length is not None else None
            shown = {"desc": file.name, "total": total, "unit": "B", "unit_scale": True, "leave": False}
            with tqdm.wrapattr(target, "write", disable=None, **shown) as watched:
                shutil.copyfileobj(answer, watched)  # pyright: ignore[reportArgumentType]  # a file that counts
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # the connection
        reason = error.reason if type(error) is urllib.error.URLError else error
        raise ConvertError(f"cannot download {url}: {reason or type(error).__name__}") from error
    size = file.stat().st_size
    if length is not None and size != int(length):
        raise ConvertError(f"cannot download {url}: the connection broke after {size:,} of {int(length):,} bytes")
    try:
        read_checkpoint(file)
    except ConvertError as error:
        raise ConvertError(f"the response of {url} is not a checkpoint: {error}".replace(str(file), "it")) from error


def read_checkpoint(file: str | os.PathLike) -> dict[str, Tensor]:
    """Read the weights in a safetensors or PyTorch file, without the wrapping and prefixes of training scripts.

    A pickle can contain code: such a file raises an error and its code is never run.

    Raises:
        ConvertError: The file is missing, damaged, not a checkpoint, or holds more than weights.
    """
    file = Path(file)
    try:
        with file.open("rb") as opened:
            start = opened.read(64).lstrip()
        if not start:
            raise ConvertError(f"{file} is empty")
        if start.startswith(b"<"):
            raise ConvertError(f"{file} is a web page, not a checkpoint: open it in a browser to see why")
        state_dict: Any = load_state_dict(str(file), weights_only=True)
    except ConvertError:
        raise
    except Exception as error:  # readers raise almost any exception for damaged files
        # timm before 1.0.31 raises it as it is.
        refused = error if isinstance(error, pickle.UnpicklingError) else error.__cause__
        if isinstance(refused, pickle.UnpicklingError):
            found = re.search(r"GLOBAL ([\w.]+)", str(refused))
            raise ConvertError(
                f"{file} holds more than weights ({found[1] if found else 'or is damaged'}), and loading these "
                "would run code in it: it was not loaded. Ask its authors for the weights alone, as safetensors"
            ) from error
        said = str(error.__cause__ or error).split("\n")[0] or type(error).__name__
        raise ConvertError(f"{file} cannot be read as a checkpoint: {said}") from error
    if not isinstance(state_dict, dict) or not state_dict:
        raise ConvertError(f"{file} holds no weights but a {type(state_dict).__name__}: {state_dict!r:.60}")
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise ConvertError(f"{file} holds more than weights: {name} is {value!r:.60}; save only the state_dict")
    return state_dict


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Remove a training script's wrapping ({'state_dict': ...}) and prefixes ('module.') from weights."""
    for key in ("state_dict", "model"):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    return clean_state_dict(dict(state_dict))


def check_fit(state_dict: Mapping[str, Tensor], model: nn.Module) -> None:
    """Check that a checkpoint has all of a model's weights and no others.

    The classifier may differ if the model has another number of classes than the checkpoint: timm then drops the
    checkpoint's classifier.

    Raises:
        ConvertError: The checkpoint does not fit; the message names the first differences.
    """
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    there = {name: list(value.shape) for name, value in state_dict.items()}
    wanted = {name: list(value.shape) for name, value in model.state_dict().items()}
    if config.get("num_classes", model.num_classes) != model.num_classes:
        classifier = config.get("classifier") or ()
        skip = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
        for shapes in (there, wanted):
            for name in [name for name in shapes if name.startswith(skip)]:
                del shapes[name]
    shared = [name for name in wanted if name in there]
    differences = {
        "missing": [name for name in wanted if name not in there],
        "only in the checkpoint": [name for name in there if name not in wanted],
        "size mismatch": [
            f"{name} {there[name]} in the checkpoint, {wanted[name]} in the model"
            for name in shared
            if there[name] != wanted[name]
        ],
    }
    said = [
        f"{what}: {', '.join(names[:2])}" + (f" and {len(names) - 2} more" if len(names) > 2 else "")
        for what, names in differences.items()
        if names
    ]
    if said:
        raise ConvertError(
            f"the checkpoint does not fit this {type(model).__name__}: {'; '.join(said)}. Was it trained with other "
            "arguments (rank, ...) or another number of classes?"
        )


def from_bcos_v2(state_dict: dict[str, Tensor], in_chans: int = 3, first_conv: str = "conv1") -> dict[str, Tensor]:
    """Convert weights of B-cos v2 (torchvision's names with `.linear.` in each B-cos layer) to torchvision's names.

    Entries that the networks never read are dropped: the running mean of normalisations that subtract no mean, and the
    number of batches. The names of a state dict that is already in our format do not change.

    Args:
        state_dict: published weights, or ours
        in_chans: colour channels of the target model; the weights of both halves of the encoding are adapted to them by
            timm's rule
        first_conv: name of the first layer, whose input is (rgb, 1 - rgb)
    """
    unread = ("running_mean", "num_batches_tracked")
    converted = {k.replace(".linear.", "."): v for k, v in state_dict.items() if not k.endswith(unread)}
    name = f"{first_conv}.weight"
    weight = converted.get(name)
    if weight is not None and weight.dim() > 1:  # otherwise it is another network's: `check_fit` raises
        converted[name] = adapt_colours(weight, in_chans)
    return converted


def convert_checkpoint(
    source: str | os.PathLike,
    name: str,
    output: str | os.PathLike,
    *,
    num_classes: int | None = None,
    label_names: Sequence[str] | None = None,
    model_args: Sequence[str] = (),
    half: bool = False,
    overwrite: bool = False,
) -> nn.Module:
    """Convert a checkpoint, in the authors' format or ours, to a folder in timm's format; return the model.

    Args:
        source: A file, or an http(s) link to one.
        name: A model in timm's registry, preferably with tag, such as coda_net_s.mpi_t1000_cifar10.
        output: The folder; or FILE.safetensors, for the weights alone.
        num_classes: Number of classes of the checkpoint; by default the tag's.
        label_names: Class names; by default the tag's.
        model_args: Extra model arguments, as for `hub.create_model`.
        half: Save in half precision.
        overwrite: Replace the file, or config.json and model.safetensors in the folder; other files there stay.

    Raises:
        ConvertError: The source cannot be obtained or read, or does not fit the model; or the output is in use.
        HubError: The model is unknown.
        SaveError: The output could not be written.
    """
    output = Path(output)
    weights_only = output.suffix == ".safetensors"
    used = output.exists() if weights_only or not output.is_dir() else any(output.iterdir())
    if used and not (overwrite and output.is_file() == weights_only):
        raise ConvertError(f"{output} is in use: choose another folder (or FILE.safetensors), or add --overwrite")
    with wrap_errors(f"cannot create the model {name}", HubError):
        known = timm.get_pretrained_cfg(name)
    if num_classes is None:
        num_classes = known.num_classes if known else 0  # 0: create_model raises for the unknown model
    model: Any = create_model(name, num_classes=num_classes, model_args=model_args)
    with wrap_errors("--label-names", ConvertError):  # of the tag's weights, unless given
        classes = Classes.of_config(known.to_dict() if known else {}, model.num_classes)
        if label_names is not None:
            classes = Classes.named(read_names(label_names, model.num_classes))
    model.pretrained_cfg |= {"num_classes": model.num_classes, **classes.as_config()}

    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        raise ConvertError(f"{name} is not a timm_coda model: there is no conversion for a {type(model).__name__}")
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(source)
        if "://" in str(source):
            safe = str(source).split("?")[0].endswith(".safetensors")
            file = Path(temporary) / ("checkpoint.safetensors" if safe else "checkpoint.pt")
            download(str(source), file)
        model.load_state_dict(convert(read_checkpoint(file), model))
    model = model.half() if half else model
    if weights_only:
        with wrap_errors(f"{output} could not be written", SaveError), replacing(output) as stream:
            stream.write(safetensors.torch.save(model.state_dict()))
    else:
        save_model(model, output)
    return model
