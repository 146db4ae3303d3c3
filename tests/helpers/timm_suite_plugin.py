"""A pytest plugin: timm's tests see the models of this package that match TIMM_SUITE_MODELS, and no others.

timm's tests choose models by `timm.list_models`, some of them by the names of timm's own files; so what that function
lists is restricted to our models before the tests are collected.
"""

import fnmatch
import os
from typing import Any

import timm
import timm.models
from timm.models import _registry

import timm_coda  # noqa: F401  # registers the models

_list_models, _list_pretrained = _registry.list_models, _registry.list_pretrained
SELECTED = {
    name
    for name, entrypoint in _registry._model_entrypoints.items()
    if entrypoint.__module__.split(".")[0] == "timm_coda" and fnmatch.fnmatch(name, os.environ["TIMM_SUITE_MODELS"])
}


def _selected(names: list[str]) -> list[str]:
    return [name for name in names if name.split(".", 1)[0] in SELECTED]


def list_models(filter: Any = "", module: str = "", *args: Any, **kwargs: Any) -> list[str]:
    """Ours; as if they were in each of timm's own files that a test names as `module`."""
    return _selected(_list_models(filter, "", *args, **kwargs))


def list_pretrained(filter: str = "", exclude_filters: str = "") -> list[str]:
    return _selected(_list_pretrained(filter, exclude_filters))


timm.list_models = timm.models.list_models = list_models
timm.list_pretrained = timm.models.list_pretrained = list_pretrained


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out tests of models that timm's tests name themselves."""

    def ours(item: Any) -> bool:
        name = getattr(getattr(item, "callspec", None), "params", {}).get("model_name", "")
        return isinstance(name, str) and name.split(".", 1)[0] in SELECTED

    config.hook.pytest_deselected(items=[item for item in items if not ours(item)])
    items[:] = [item for item in items if ours(item)]


def pytest_sessionfinish(session: Any) -> None:
    if not SELECTED:
        session.exitstatus = 4  # a pattern without a model must not pass
