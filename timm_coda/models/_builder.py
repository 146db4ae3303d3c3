"""Build models with timm's builder, plus downloads from the authors' share, arguments per tag, and class names."""

from collections.abc import Callable, Mapping
from typing import Any

from timm.models import build_model_with_cfg
from torch import nn

from ..explanation import forget_names
from ..hub import download_errors, loadable, resolve_weights

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
    """Build a model as timm's `build_model_with_cfg` does, with the downloads of `resolve_weights`.

    Only a model whose classifier has the config's weights has the config's class names.

    Args:
        model_cls, variant, pretrained: as in timm
        checkpoint_filter_fn: converts state dicts of this model family
        tag_args: for each tag, constructor arguments that differ from the entrypoint's; the caller's arguments take
            precedence, and all are saved with the model
        feature_cfg: timm's options for `features_only=True`
        pretrained_cfg, pretrained_cfg_overlay, cache_dir: as timm passes them to an entrypoint
        kwargs: arguments of timm's builder and of the constructor
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
    with download_errors(config.hf_hub_id or ""):
        model: Any = build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            pretrained_cfg=loadable(config, pretrained),  # type: ignore[arg-type]  # timm passes a PretrainedCfg, too
            pretrained_filter_fn=checkpoint_filter_fn,
            cache_dir=cache_dir,
            feature_cfg=dict(feature_cfg or {}),  # a copy, because timm removes keys from it
            **kwargs,
        )
    model.pretrained_cfg["first_conv"] = config.first_conv
    if brought:
        model._model_args = {name: kwargs[name] for name in brought}  # timm adds the caller's arguments and saves all
    if not (pretrained and getattr(model, "num_classes", None) == config.num_classes):
        forget_names(model)
    return model
