"""How a family is built whose weights its authors keep on a file share: timm's builder, and what a tag brings."""

from collections.abc import Callable, Mapping
from typing import Any

from timm.models import build_model_with_cfg
from torch import nn

from ..hub import resolve_weights

__all__ = ["build_model"]


def build_model(
    model_cls: type[nn.Module],
    variant: str,
    pretrained: bool,
    checkpoint_filter_fn: Callable,
    *,
    tag_args: Mapping[str, Mapping[str, Any]] | None = None,
    feature_cfg: Mapping[str, Any] | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    **kwargs: Any,
) -> Any:
    """Make a model as timm's `build_model_with_cfg` does, with the links that `resolve_weights` understands.

    Args:
        model_cls, variant, pretrained: as timm's
        checkpoint_filter_fn: of the family
        tag_args: of a tag, the constructor's arguments that are not the entrypoint's; the caller's win, all are saved
        feature_cfg: what timm makes of the model under `features_only=True`
        pretrained_cfg, pretrained_cfg_overlay, cache_dir: as timm hands them to an entrypoint
        kwargs: of timm's builder and the constructor
    """
    config = resolve_weights(
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        cache_dir=cache_dir,
    )
    brought = (tag_args or {}).get(config.tag or "", {})
    kwargs = {**brought, **kwargs}
    model: Any = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=config,  # type: ignore[arg-type]  # timm passes one on, too
        pretrained_filter_fn=checkpoint_filter_fn,
        cache_dir=cache_dir,
        feature_cfg=dict(feature_cfg or {}),  # a copy, because timm takes keys out of what it is given
        **kwargs,
    )
    if brought:
        model._model_args = {name: kwargs[name] for name in brought}  # timm adds the caller's, and saves them
    return model
