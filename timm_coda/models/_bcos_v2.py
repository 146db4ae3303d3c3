"""Shared parts of the B-cos v2 families: a classifier before the pooling, and loading of the published weights."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..explanation import ExplainMixin, forget_names
from ..hub import HubMixin, check_fit, from_bcos_v2, unwrap
from ..layers import GlobalPool, placement
from ._bcosify import bcos_classifier, bcos_logits

__all__ = ["LONG", "BcosHead", "v2_cfg", "v2_weights"]


class BcosHead(ExplainMixin, HubMixin):
    """Head that classifies each position and pools the votes. List this base class before timm's architecture.

    The classifier is a 1x1 B-cos convolution, under timm's own name for it; `global_pool` and `logits` follow it.
    `reset_classifier` creates new ones with the arguments in `_head_args` and `_logit_args`.
    """

    classifier_name = "classifier"

    def get_classifier(self) -> nn.Module:
        return getattr(self, self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        model: Any = self
        forget_names(model)
        model.num_classes = num_classes
        if global_pool is not None:
            model.global_pool = GlobalPool(global_pool).train(model.training)
        options: dict[str, Any] = model._head_args | placement(model)
        head = bcos_classifier(model.head_hidden_size, num_classes, **options)
        setattr(model, self.classifier_name, head.train(model.training))
        model.logits = bcos_logits(num_classes, *model._logit_args).train(model.training)


_RELEASE = "https://github.com/B-cos/B-cos-v2/releases/download/v0.0.1-weights/"

LONG = {"crop_pct": 224 / 232}  # models of the longer training resize images to 232 pixels


def v2_cfg(file: str, top1: float, first_conv: str, classifier: str, **kwargs: Any) -> dict[str, Any]:
    """Create timm's config of a published file.

    Args:
        file: name of the file
        top1: ImageNet top-1 accuracy in percent
        first_conv, classifier: names of the first and the last layer
        kwargs: entries that replace the defaults
    """
    return {
        "url": _RELEASE + file,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 224 / 256,
        "interpolation": "bilinear",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": first_conv,
        "classifier": classifier,
        "license": "apache-2.0",
        "description": f"ImageNet-1k top-1 {top1:.2f} % as its authors report.",
        "origin_url": "https://github.com/B-cos/B-cos-v2",
        "paper_ids": "arXiv:2306.10898",
        "paper_name": "B-cos Alignment for Inherently Interpretable CNNs and Vision Transformers",
        **kwargs,
    }


def v2_weights(
    state_dict: Mapping[str, Any], model: Any, first_conv: str, our_name: Callable[[str], str] | None = None
) -> dict[str, Tensor]:
    """Convert a published state dict, or one of ours, for `model`, also for another number of colour channels.

    Args:
        state_dict: as published, or ours
        model: model to load the weights into
        first_conv: our name of its first layer
        our_name: converts a published parameter name to ours; None if they differ only by `.linear.`

    Raises:
        ConvertError: the weights belong to another network; the message names the first differences.
    """
    state_dict = unwrap(state_dict)
    if our_name is not None and any(".linear." in name for name in state_dict):
        state_dict = {our_name(name): value for name, value in state_dict.items()}
    weights = from_bcos_v2(state_dict, model.in_chans, first_conv)
    check_fit(weights, model)
    return weights
