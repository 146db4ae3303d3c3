"""B-cos ConvNeXts, built from timm's ConvNeXt.

Papers:
    `B-cos Alignment for Inherently Interpretable CNNs and Vision Transformers` - https://arxiv.org/abs/2306.10898
    `A ConvNet for the 2020s` - https://arxiv.org/abs/2201.03545

B-cos v2 with the authors' ImageNet weights: timm's ConvNeXt with its modules replaced (see `_bcosify.py`) and B = 2.
Models named `_bnu` have uncentred batch normalisation, the others position norm. The last norm and the classifier, a
1x1 B-cos convolution, come before the pooling. logits = W(x) x + bias.
"""

import re
from collections.abc import Mapping
from typing import Any

from timm.models import generate_default_cfgs
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from ..hub import register_model, unwrap
from ..layers import BatchNormUncentered2d, GlobalPool, PositionNorm2d
from ._bcos_v2 import LONG, BcosHead, v2_cfg, v2_weights
from ._bcosify import bcos_classifier, bcos_logits, replace_modules
from ._builder import build_model

__all__ = ["BcosConvNeXt"]

_NORMS = {"pn": PositionNorm2d, "bnu": BatchNormUncentered2d}


class BcosConvNeXt(BcosHead, ConvNeXt):
    """B-cos ConvNeXt.

    Maps RGB images in [0, 1] (B, 3, H, W), or encoded images (B, 6, H, W), to logits (B, num_classes).

    Args:
        depths, dims, ls_init_value, drop_rate, drop_path_rate: as in timm's `ConvNeXt`
        norm: 'pn' to normalise each position over its channels, or 'bnu' for uncentred batch normalisation
        b: exponent B of all B-cos layers
        logit_temperature: T, divides the votes; a larger T gives sharper explanations and slower initial training
        logit_bias: b0, the logit of a class without evidence; None for -log(num_classes - 1)
        num_classes: number of classes; 0 returns pooled features
        in_chans: colour channels of an image; the encoding doubles them
        global_pool: 'avg', 'sum', or '' to return a logit map

    Raises:
        ValueError: an unknown norm.
    """

    classifier_name = "head"

    def __init__(
        self,
        depths: tuple[int, ...] = (3, 3, 9, 3),
        dims: tuple[int, ...] = (96, 192, 384, 768),
        norm: str = "pn",
        ls_init_value: float | None = 1e-6,
        b: float = 2.0,
        logit_temperature: float = 1.0,
        logit_bias: float | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        if norm not in _NORMS:
            raise ValueError(f"norm={norm!r}: choose one of {', '.join(map(repr, _NORMS))}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            in_chans=2 * in_chans,
            num_classes=0,
            global_pool="",
            depths=depths,
            dims=dims,
            ls_init_value=ls_init_value,
            head_norm_first=True,
            conv_mlp=True,
            conv_bias=False,
            act_layer=nn.Identity,
            norm_layer=_NORMS[norm],
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            **dd,
        )
        replace_modules(self, "stem.0", b=b)
        first: Any = self.stem[0]
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.encoding = first.encoding
        self._head_args = {"b": b}
        self._logit_args = (logit_temperature, logit_bias)
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool = GlobalPool(global_pool)
        self.head = bcos_classifier(self.num_features, num_classes, b=b, **dd)
        self.logits = bcos_logits(num_classes, logit_temperature, logit_bias)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """Replace the classifier. `reset_other` has no effect: in timm it resets further layers of the head."""
        super().reset_classifier(num_classes, global_pool)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits or self.num_classes == 0:
            return self.global_pool(x)
        x = self.head_drop(x)
        x = self.head(x)
        x = self.global_pool(x)
        return self.logits(x)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: BcosConvNeXt) -> dict[str, Tensor]:
    weights = {name: v.flatten() if name.endswith("layer_scale") else v for name, v in unwrap(state_dict).items()}
    return v2_weights(weights, model, "stem.0", _our_name)


_PARTS = {"0": "conv_dw", "1": "norm", "2": "mlp.fc1", "3": "mlp.fc2"}


def _our_name(name: str) -> str:
    """Convert a published name, which numbers the stem, the stages and the layers between them in one list."""
    name = re.sub(r"^features\.([01])\.", r"stem.\1.", name)
    name = re.sub(r"^features\.([357])\.", lambda m: f"stages.{int(m[1]) // 2}.downsample.", name)
    name = re.sub(r"^features\.([2468])\.", lambda m: f"stages.{int(m[1]) // 2 - 1}.blocks.", name)
    name = re.sub(r"\.block\.([0-3])\.", lambda m: f".{_PARTS[m[1]]}.", name)
    name = name.replace("layer_scale", "gamma")
    return name.replace("classifier.0.", "norm_pre.").replace("classifier.1.", "head.")


def _cfg(file: str, top1: float) -> dict[str, Any]:
    return v2_cfg(file, top1, "stem.0", "head", **LONG)


default_cfgs = generate_default_cfgs(
    {
        "bcos_convnext_tiny.v2_long_in1k": _cfg("convnext_tiny_pn-539b1bfb37.pth", 77.49),
        "bcos_convnext_tiny_bnu.v2_long_in1k": _cfg("convnext_tiny_bnu-dbd7f5ef9d.pth", 76.83),
        "bcos_convnext_base.v2_long_in1k": _cfg("convnext_base_pn-b0495852c6.pth", 79.65),
        "bcos_convnext_base_bnu.v2_long_in1k": _cfg("convnext_base_bnu-7c32a704b3.pth", 80.14),
    }
)


def _create_bcos_convnext(variant: str, pretrained: bool = False, **kwargs: Any) -> BcosConvNeXt:
    return build_model(
        BcosConvNeXt,
        variant,
        pretrained,
        checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **kwargs,
    )


_TINY = {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)}
_BASE = {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)}


@register_model
def bcos_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> BcosConvNeXt:
    return _create_bcos_convnext("bcos_convnext_tiny", pretrained, **dict(_TINY, **kwargs))


@register_model
def bcos_convnext_tiny_bnu(pretrained: bool = False, **kwargs: Any) -> BcosConvNeXt:
    return _create_bcos_convnext("bcos_convnext_tiny_bnu", pretrained, **dict(_TINY, norm="bnu", **kwargs))


@register_model
def bcos_convnext_base(pretrained: bool = False, **kwargs: Any) -> BcosConvNeXt:
    return _create_bcos_convnext("bcos_convnext_base", pretrained, **dict(_BASE, **kwargs))


@register_model
def bcos_convnext_base_bnu(pretrained: bool = False, **kwargs: Any) -> BcosConvNeXt:
    return _create_bcos_convnext("bcos_convnext_base_bnu", pretrained, **dict(_BASE, norm="bnu", **kwargs))
