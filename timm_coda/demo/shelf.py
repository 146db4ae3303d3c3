"""Cache of the models that visitors may use."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm

from ..hub import HubError, is_cached, load_model

_KEPT = 3  # models in memory, so that a visitor who tries all of them does not fill it


class Shelf:
    """Models by name, loaded on first use; the most recently used ones stay in memory.

    Args:
        names: models to choose from, as in `hub.load_model`, the first one selected
        any_model: visitors may also enter another name, a folder of this machine or `hf-hub:ID`

    Raises:
        ValueError: there are no names.
    """

    def __init__(self, names: Sequence[str], *, any_model: bool = False) -> None:
        if not names:
            raise ValueError("no model to show: name one, such as coda_net_xs.digits")
        self.names = tuple(dict.fromkeys(names))
        self.any_model = any_model
        self._loaded: OrderedDict[str, Any] = OrderedDict()
        self._loading, self._changing = threading.Lock(), threading.Lock()

    def __getitem__(self, name: str) -> Any:
        """Return the model, in eval mode.

        Raises:
            HubError: visitors may not use the model, it does not exist, or it cannot explain itself.
        """
        if name not in self.names and not self.any_model:
            raise HubError(f"{name!r} is not available here: choose {', '.join(self.names)}")
        if (model := self._kept(name)) is not None:
            return model
        with self._loading:  # load one at a time; users of loaded models do not wait
            if (model := self._kept(name)) is not None:  # another visitor loaded it meanwhile
                return model
            model = load_model(name)
            if not hasattr(model, "explain"):
                raise HubError(
                    f"{name} is a {type(model).__name__}, which cannot explain itself: use a timm_coda model"
                )
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
    """Return the names of this package's models with weights: shipped ones (first digits), downloaded ones, others."""
    home = __name__.split(".")[0] + "."
    names = timm.list_models(pretrained=True)
    ours = [name for name in names if timm.models.model_entrypoint(name).__module__.startswith(home)]
    return sorted(ours, key=lambda name: (not is_shipped(name), not name.endswith(".digits"), not is_cached(name)))


def described(name: str) -> str:
    """Return the name of a model, and where its weights are if they are not in a folder or on the Hub."""
    config = timm.models.get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None
    if config is None or not (config.file or config.url):
        return name
    return f"{name} ({'included' if is_shipped(name) else 'downloaded' if is_cached(name) else 'to download'})"


def is_shipped(name: str) -> bool:
    """Return whether the weights of a model ship with the package."""
    config = timm.models.get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None
    return bool(config and config.file and Path(config.file).is_file())


def layer_names(model: Any) -> list[str]:
    """Return the layers to offer, first to last: the ends of the model's stages."""
    return [info["module"] for info in model.feature_info]
