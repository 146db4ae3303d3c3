"""How a model was created and which images it takes, to save it and to load it again: timm's record, from 1.0.31 on.

With older timm, this module records both for this package's models, and reads the safetensors in a folder, which timm
1.0.24 and older take for a pickle. When timm 1.0.31 is the oldest supported, this module goes: it is then timm's.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false
# It compares the two versions' signatures.

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import timm
from timm.data import resolve_data_config
from timm.models import PretrainedCfg
from timm.models._hub import load_model_config_from_path
from timm.models._hub import save_config_for_hf as save_config

from .writing import HubError

__all__ = [
    "create_from_folder",
    "create_recorded",
    "get_model_args",
    "get_model_input_config",
    "loadable",
    "register_model",
    "resolve_input_data_config",
    "save_config_for_hf",
]

_F = TypeVar("_F", bound=Callable)
_OF_CREATION = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "device", "dtype")

try:
    from timm.data import resolve_input_data_config
    from timm.models import get_model_args, get_model_input_config, register_model

    save_config_for_hf = save_config
    create_from_folder = create_recorded = timm.create_model

    def loadable(config: PretrainedCfg, pretrained: bool) -> PretrainedCfg:
        """Return a config with which timm loads weights of the model's shape as they are."""
        return config

except ImportError:

    def register_model(entrypoint: _F) -> _F:
        """Register a model in timm, and record the arguments and image shape that it is created with."""

        @functools.wraps(entrypoint)
        def create(pretrained: bool = False, **kwargs: Any) -> Any:
            model = entrypoint(pretrained, **kwargs)
            given = {name: value for name, value in kwargs.items() if name not in _OF_CREATION}
            model._model_args = {**getattr(model, "_model_args", {}), **given}
            return model

        return timm.models.register_model(create)  # pyright: ignore[reportReturnType]

    def get_model_args(model: Any) -> dict[str, Any]:
        """Return the arguments that create a model like this one."""
        drops = ("drop_rate", "drop_path_rate", "drop_block_rate")
        found = {name: value for name, value in _recorded(model).items() if not name.endswith(drops)}
        found |= {name: getattr(model, name) for name in ("in_chans", "num_classes") if hasattr(model, name)}
        pools = [getattr(getattr(model, "head", None), "global_pool", None), getattr(model, "global_pool", None)]
        names = (getattr(pool, "pool_type", pool) for pool in pools)
        found["global_pool"] = next((name for name in names if isinstance(name, str)), None)
        found["img_size"] = _image_size(model)
        found = {name: value for name, value in found.items() if value is not None}
        if not hasattr(model, "_model_args"):  # one of timm's own models
            _check_default(model, found)
        return found

    def get_model_input_config(model: Any) -> dict[str, Any]:
        """Return the shape of a model's images, whether it is fixed, and the layer that they go into."""
        config = model.pretrained_cfg
        channels = getattr(model, "in_chans", config["input_size"][0])
        patches = getattr(model, "patch_embed", None)
        fixed = getattr(patches, "strict_img_size", config.get("fixed_input_size", False))
        return {
            "input_size": (channels, *(_image_size(model) or config["input_size"][1:])),
            "fixed_input_size": bool(fixed and not getattr(model, "dynamic_img_size", False)),
            "first_conv": getattr(model, "_traits", config).get("first_conv"),
        }

    def resolve_input_data_config(model: Any, args: dict[str, Any]) -> dict[str, Any]:
        """Return the preprocessing for a model, changed by `args`."""
        shape = get_model_input_config(model)
        channels, *size = shape["input_size"]
        wanted = args.get("input_size") or (channels, *_pair(args.get("img_size") or size))
        if shape["fixed_input_size"] and tuple(wanted[1:]) != tuple(size):
            raise ValueError(f"Requested image size {tuple(wanted[1:])}, but the model requires {tuple(size)}.")
        known = model.pretrained_cfg
        for name in ("mean", "std"):
            if len(known.get(name) or ()) not in (0, 1, channels):  # the mean over another number of colours
                known = {**known, name: (sum(known[name]) / len(known[name]),)}
        return resolve_data_config({**args, "input_size": wanted}, known)

    def save_config_for_hf(
        model: Any, path: str, *, model_config: dict, model_args: dict | None, data_config: dict | None
    ) -> None:
        """Write the `config.json` of a model."""
        arguments = {**get_model_args(model), **(model_args or {})}
        for name, value in arguments.items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise ValueError(f"Model argument {name!r} is not serializable: {error}") from error
        pool = {"global_pool": arguments.get("global_pool")}
        save_config(model, Path(path), model_config={**pool, **model_config}, model_args=arguments)
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        known, shape = config["pretrained_cfg"], get_model_input_config(model)
        before = known.get("input_size")
        known |= resolve_input_data_config(model, data_config or {})
        known |= {"fixed_input_size": shape["fixed_input_size"], "first_conv": shape["first_conv"]}
        known |= {"custom_load": False, "num_classes": model.num_classes}
        if before and tuple(before[1:]) != tuple(known["input_size"][1:]):
            known["pool_size"] = None
        Path(path).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def loadable(config: PretrainedCfg, pretrained: bool) -> PretrainedCfg:
        """Return a config with which timm loads weights of the model's shape as they are."""
        config = dataclasses.replace(config, first_conv=None)  # else it takes all weights for those of 3 channels
        if config.source == "local-dir":
            weights = Path(config.file or "", "model.safetensors")
            if pretrained and not weights.is_file():
                raise HubError(f"{config.file} has no {weights.name}; pickles can run code and are not loaded")
            config = dataclasses.replace(config, source="file", file=str(weights))
        return config

    def create_from_folder(name: str, **arguments: Any) -> Any:
        """Create a model, which may be timm's own, as `timm.create_model` does from `local-dir:FOLDER`."""
        config, name, saved = load_model_config_from_path(name.removeprefix("local-dir:"))
        config = loadable(PretrainedCfg(**config), arguments.get("pretrained", False))
        return timm.create_model(name, pretrained_cfg=config, **{**saved, **arguments})

    def create_recorded(name: str, *, pretrained: bool = False, **arguments: Any) -> Any:
        """Create a model, which may be timm's own, as `timm.create_model` does, and record its arguments."""
        model = timm.create_model(name, pretrained=pretrained, **arguments)
        model._model_args = {**_recorded(model), **arguments}
        return model

    def _recorded(model: Any) -> dict[str, Any]:
        return getattr(model, "_model_args", {})

    def _check_default(model: Any, arguments: dict[str, Any]) -> None:
        """Raise ValueError if these arguments do not give a model with the same layers and weights, up to dropout."""
        plain = timm.create_model(model.pretrained_cfg["architecture"], **arguments)
        shapes = [{name: value.shape for name, value in net.state_dict().items()} for net in (plain, model)]
        layers = [re.sub(r"Drop\w+\(.*\)|Identity\(\)", "", repr(net)) for net in (plain, model)]
        if shapes[0] != shapes[1] or layers[0] != layers[1]:
            raise ValueError(
                f"timm {timm.__version__} does not record the arguments of its own models, and this one has others "
                "than the default: install timm 1.0.31 or newer"
            )

    def _pair(size: Any) -> tuple[int, int]:
        return (size, size) if isinstance(size, int) else tuple(size)

    def _image_size(model: Any) -> tuple[int, int] | None:
        """Return the image size that the model was created with, or changed to; None if nobody chose one."""
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        if size is None or tuple(size) == tuple(model.pretrained_cfg["input_size"][1:]):
            size = _recorded(model).get("img_size")
        return None if size is None else _pair(size)
