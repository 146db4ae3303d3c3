"""The models that visitors may use."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm

from ..hub import HubError, load_model

_KEPT = 3  # models in memory; a visitor who goes through all of them must not fill it


class Shelf:
    """Models by name, loaded when first asked for; the ones used last stay in memory.

    Args:
        names: what visitors may choose, as `hub.load_model` takes it, the first one at the start
        any_model: visitors may also type any other name, a folder of this machine or `hf-hub:ID`

    Raises:
        ValueError: no names.
    """

    def __init__(self, names: Sequence[str], *, any_model: bool = False) -> None:
        if not names:
            raise ValueError("no model to show: name one, such as coda_net_xs.digits")
        self.names = tuple(dict.fromkeys(names))
        self.any_model = any_model
        self._loaded: OrderedDict[str, Any] = OrderedDict()
        self._loading, self._changing = threading.Lock(), threading.Lock()

    def __getitem__(self, name: str) -> Any:
        """The model, in eval mode.

        Raises:
            HubError: visitors may not use it, there is none of that name, or it cannot explain itself.
        """
        if name not in self.names and not self.any_model:
            raise HubError(f"{name!r} is not shown here; there is {', '.join(self.names)}")
        if (model := self._kept(name)) is not None:
            return model
        with self._loading:  # one at a time; who uses a loaded one does not wait
            if (model := self._kept(name)) is not None:  # somebody else's wish, meanwhile
                return model
            model = load_model(name)
            if not hasattr(model, "explain"):
                raise HubError(f"{name} is a {type(model).__name__}, which cannot explain itself: take one of ours")
            with self._changing:
                self._loaded[name] = model
                while len(self._loaded) > _KEPT:
                    self._loaded.popitem(last=False)
        return model

    def _kept(self, name: str) -> Any:
        with self._changing:
            if name in self._loaded:
                self._loaded.move_to_end(name)
            return self._loaded.get(name)


def our_pretrained() -> list[str]:
    """Names of this package's models whose weights are here or can be downloaded."""
    home = __name__.split(".")[0] + "."
    names = timm.list_models(pretrained=True)
    return [name for name in names if timm.models.model_entrypoint(name).__module__.startswith(home)]


def is_shipped(name: str) -> bool:
    """Whether the weights of that name come with the package."""
    config = timm.models.get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None
    return bool(config and config.file and Path(config.file).is_file())


def layer_names(model: Any) -> list[str]:
    """Layers worth a look, first to last: the ends of its stages."""
    return [info["module"] for info in model.feature_info]
