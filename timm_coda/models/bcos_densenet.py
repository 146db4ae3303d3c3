"""B-cos DenseNets, built from timm's DenseNet.

Papers:
    `B-cos Alignment for Inherently Interpretable CNNs and Vision Transformers` - https://arxiv.org/abs/2306.10898
    `Densely Connected Convolutional Networks` - https://arxiv.org/abs/1608.06993

B-cos v2 with the authors' ImageNet weights: timm's DenseNet with its modules replaced (see `_bcosify.py`) and B = 2.
The classifier is a 1x1 B-cos convolution before the pooling. logits = W(x) x + bias.
"""

from collections.abc import Mapping
from typing import Any

from timm.models import generate_default_cfgs
from timm.models.densenet import DenseNet
from torch import Tensor

from ..hub import register_model
from ..layers import GlobalPool
from ._bcos_v2 import LONG, BcosHead, v2_cfg, v2_weights
from ._bcosify import bcos_classifier, bcos_logits, replace_modules
from ._builder import build_model

__all__ = ["BcosDenseNet"]


class BcosDenseNet(BcosHead, DenseNet):
    """B-cos DenseNet.

    Maps RGB images in [0, 1] (B, 3, H, W), or encoded images (B, 6, H, W), to logits (B, num_classes).

    Args:
        growth_rate, block_config, bn_size, drop_rate, proj_drop_rate, memory_efficient: as in timm's `DenseNet`
        b: exponent B of all B-cos layers
        logit_temperature: T, divides the votes; a larger T gives sharper explanations and slower initial training
        logit_bias: b0, the logit of a class without evidence; None for -log(num_classes - 1)
        num_classes: number of classes; 0 returns pooled features
        in_chans: colour channels of an image; the encoding doubles them
        global_pool: 'avg', 'sum', or '' to return a logit map
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: tuple[int, ...] = (6, 12, 24, 16),
        bn_size: int = 4,
        b: float = 2.0,
        logit_temperature: float = 1.0,
        logit_bias: float | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        memory_efficient: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            growth_rate,
            block_config,
            num_classes=0,
            in_chans=2 * in_chans,
            global_pool="",
            bn_size=bn_size,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            memory_efficient=memory_efficient,
            **dd,
        )
        replace_modules(self, "features.conv0", b=b)
        first: Any = self.features.conv0
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.encoding = first.encoding
        self._head_args = {"b": b}
        self._logit_args = (logit_temperature, logit_bias)
        self.global_pool = GlobalPool(global_pool)
        self.classifier = bcos_classifier(int(self.num_features), num_classes, b=b, **dd)
        self.logits = bcos_logits(num_classes, logit_temperature, logit_bias)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits or self.num_classes == 0:
            return self.global_pool(x)
        x = self.head_drop(x)
        x = self.classifier(x)
        x = self.global_pool(x)
        return self.logits(x)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: BcosDenseNet) -> dict[str, Tensor]:
    return v2_weights(state_dict, model, "features.conv0")


def _cfg(file: str, top1: float, **kwargs: Any) -> dict[str, Any]:
    return v2_cfg(file, top1, "features.conv0", "classifier", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "bcos_densenet121.v2_in1k": _cfg("densenet_121-b8daf96afb.pth", 73.61),
        "bcos_densenet121.v2_long_in1k": _cfg("densenet_121_long-5175461597.pth", 77.30, **LONG),
        "bcos_densenet161.v2_in1k": _cfg("densenet_161-9e9ea51353.pth", 76.62),
        "bcos_densenet169.v2_in1k": _cfg("densenet_169-7037ee0604.pth", 75.19),
        "bcos_densenet201.v2_in1k": _cfg("densenet_201-00ac87066f.pth", 75.48),
    }
)


def _create_bcos_densenet(variant: str, pretrained: bool = False, **kwargs: Any) -> BcosDenseNet:
    return build_model(
        BcosDenseNet,
        variant,
        pretrained,
        checkpoint_filter_fn,
        feature_cfg={"flatten_sequential": True},
        **kwargs,
    )


@register_model
def bcos_densenet121(pretrained: bool = False, **kwargs: Any) -> BcosDenseNet:
    model_args = {"growth_rate": 32, "block_config": (6, 12, 24, 16)}
    return _create_bcos_densenet("bcos_densenet121", pretrained, **dict(model_args, **kwargs))


@register_model
def bcos_densenet161(pretrained: bool = False, **kwargs: Any) -> BcosDenseNet:
    model_args = {"growth_rate": 48, "block_config": (6, 12, 36, 24)}
    return _create_bcos_densenet("bcos_densenet161", pretrained, **dict(model_args, **kwargs))


@register_model
def bcos_densenet169(pretrained: bool = False, **kwargs: Any) -> BcosDenseNet:
    model_args = {"growth_rate": 32, "block_config": (6, 12, 32, 32)}
    return _create_bcos_densenet("bcos_densenet169", pretrained, **dict(model_args, **kwargs))


@register_model
def bcos_densenet201(pretrained: bool = False, **kwargs: Any) -> BcosDenseNet:
    model_args = {"growth_rate": 32, "block_config": (6, 12, 48, 32)}
    return _create_bcos_densenet("bcos_densenet201", pretrained, **dict(model_args, **kwargs))
