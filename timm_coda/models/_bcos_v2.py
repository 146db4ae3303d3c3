"""What all families of B-cos v2 share: a classifier in front of the pooling, the published files and their loading."""

from collections.abc import Callable, Mapping
from typing import Any

from timm.layers import get_device_dtype
from torch import Tensor, nn

from ..explanation import ExplainMixin
from ..hub import HubMixin, check_fit, from_bcos_v2, unwrap
from ..layers import GlobalPool
from ._bcosify import bcos_classifier, bcos_logits

__all__ = ["LONG", "BcosHead", "v2_cfg", "v2_weights"]


class BcosHead(ExplainMixin, HubMixin):
    """Each position votes for the classes, the votes are pooled. A base in front of timm's architecture.

    The model's `global_pool` and `logits` come after its classifier, a 1x1 B-cos convolution in the place timm has its
    own at. `_head_args` and `_logit_args` keep what `reset_classifier` makes new ones with.
    """

    classifier_name = "classifier"

    def get_classifier(self) -> nn.Module:
        return getattr(self, self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        model: Any = self
        model.num_classes = num_classes
        if global_pool is not None:
            model.global_pool = GlobalPool(global_pool).train(model.training)
        options: dict[str, Any] = model._head_args | get_device_dtype(model)
        head = bcos_classifier(model.head_hidden_size, num_classes, **options)
        setattr(model, self.classifier_name, head.train(model.training))
        model.logits = bcos_logits(num_classes, *model._logit_args).train(model.training)


_RELEASE = "https://github.com/B-cos/B-cos-v2/releases/download/v0.0.1-weights/"

LONG = {"crop_pct": 224 / 232}  # the longer training's evaluation resizes to 232 pixels


def v2_cfg(file: str, top1: float, first_conv: str, classifier: str, **kwargs: Any) -> dict[str, Any]:
    """timm's config of a published file: its name, accuracy in percent, names of the first and the last layer."""
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
    """Weights of a published checkpoint or ours, as `model` wants them, also with another number of colours.

    Args:
        state_dict: as published, or ours
        model: what they are for
        first_conv: our name of its first layer
        our_name: from a published parameter's name; None if only the `.linear.` in it differs

    Raises:
        ConvertError: they are another network's; the message names the first differences.
    """
    state_dict = unwrap(state_dict)
    if our_name is not None and any(".linear." in name for name in state_dict):
        state_dict = {our_name(name): value for name, value in state_dict.items()}
    weights = from_bcos_v2(state_dict, model.in_chans, first_conv)
    check_fit(weights, model)
    return weights
