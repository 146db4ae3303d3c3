"""B-cos ResNets and ResNeXts, built from timm's ResNet.

Papers:
    `B-cos Networks: Alignment is All We Need for Interpretability` - https://arxiv.org/abs/2205.10268
    `B-cos Alignment for Inherently Interpretable CNNs and Vision Transformers` - https://arxiv.org/abs/2306.10898

The networks of the second paper (B-cos v2) with the authors' ImageNet weights: timm's ResNet with its modules replaced
(see `_bcosify.py`) and B = 2. The classifier is a 1x1 B-cos convolution before the pooling. logits = W(x) x + bias.

The two networks for CIFAR-10 have three stages of 16, 32 and 64 channels (He et al., CVPR 2016, section 4.2). The
convolutions in their shortcuts are our own choice.
"""

# torch annotates torch.jit.ignore only for calls with a flag:
# pyright: reportArgumentType=false

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from timm.models import generate_default_cfgs
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from ..hub import register_model
from ..layers import GlobalPool
from ._bcos_v2 import LONG, BcosHead, v2_cfg, v2_weights
from ._bcosify import bcos_classifier, bcos_logits, replace_modules
from ._builder import build_model

__all__ = ["BcosResNet"]


class BcosResNet(BcosHead, ResNet):
    """B-cos ResNet.

    Maps RGB images in [0, 1] (B, 3, H, W), or encoded images (B, 6, H, W), to logits (B, num_classes).

    Args:
        block, layers, cardinality, base_width, drop_rate, drop_path_rate, zero_init_last: as in timm's `ResNet`
        channels: output channels of three or four stages, before the block's expansion
        small_stem: use a 3x3 convolution at full resolution instead of a 7x7 one and pooling, for 32-pixel images
        b: exponent B of all B-cos layers
        logit_temperature: T, divides the votes; a larger T gives sharper explanations and slower initial training
        logit_bias: b0, the logit of a class without evidence; None for -log(num_classes - 1)
        num_classes: number of classes; 0 returns pooled features
        in_chans: colour channels of an image; the encoding doubles them
        output_stride: 32, 16 or 8, counted as if the stem were the large one
        global_pool: 'avg', 'sum', or '' to return a logit map
    """

    classifier_name = "fc"

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, ...],
        cardinality: int = 1,
        base_width: int = 64,
        channels: tuple[int, ...] = (64, 128, 256, 512),
        small_stem: bool = False,
        b: float = 2.0,
        logit_temperature: float = 1.0,
        logit_bias: float | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        # timm's plain stem always has 64 channels. Its deep stem, replaced below, has as many as the first stage.
        stem = {"stem_type": "deep", "stem_width": channels[0] // 2} if small_stem else {}
        super().__init__(
            block,  # pyright: ignore[reportArgumentType]
            layers,
            channels=channels,
            num_classes=0,
            in_chans=2 * in_chans,
            output_stride=output_stride,
            global_pool="",
            cardinality=cardinality,
            base_width=base_width,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            zero_init_last=zero_init_last,
            **stem,
            **dd,
        )
        if small_stem:
            self.conv1 = nn.Conv2d(2 * in_chans, channels[0], 3, padding=1, bias=False, **dd)
            self.maxpool = nn.Identity()
            stages: Any = self.feature_info
            for index, info in enumerate(stages):
                info["reduction"] //= 4 if index else 2
        if len(channels) == 3:  # timm calls a fourth stage; it must come before the head, which is created again below
            del self.global_pool, self.fc
            self.layer4 = nn.Sequential()
            self.feature_info.append({**self.feature_info[-1], "module": "layer4"})
        replace_modules(self, "conv1", b=b)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self._head_args = {"b": b}
        self._logit_args = (logit_temperature, logit_bias)
        self.global_pool = GlobalPool(global_pool)
        self.fc = bcos_classifier(self.num_features, num_classes, b=b, **dd)
        self.logits = bcos_logits(num_classes, logit_temperature, logit_bias)
        self.encoding = self.conv1.encoding

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits or self.num_classes == 0:
            return self.global_pool(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        x = self.fc(x)
        x = self.global_pool(x)
        return self.logits(x)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: BcosResNet) -> dict[str, Tensor]:
    return v2_weights(state_dict, model, "conv1")


def _cfg(file: str, top1: float, **kwargs: Any) -> dict[str, Any]:
    return v2_cfg(file, top1, "conv1", "fc", **kwargs)


def _cifar_cfg(**kwargs: Any) -> dict[str, Any]:
    """Create the config of a CIFAR-10 model, which has no published weights."""
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    ours = {"url": "", "num_classes": 10, "label_names": names, "input_size": (3, 32, 32), "pool_size": (8, 8)}
    ours |= {"crop_pct": 1.0, "interpolation": "bicubic", "description": None, "origin_url": None}
    return {**_cfg("", 0), **ours, **kwargs}


default_cfgs = generate_default_cfgs(
    {
        "bcos_resnet18.v2_in1k": _cfg("resnet_18-68b4160fff.pth", 68.74),
        "bcos_resnet34.v2_in1k": _cfg("resnet_34-a63425a03e.pth", 72.28),
        "bcos_resnet50.v2_in1k": _cfg("resnet_50-ead259efe4.pth", 75.88),
        "bcos_resnet50.v2_long_in1k": _cfg("resnet_50_long-ef38a88533.pth", 79.47, **LONG),
        "bcos_resnet101.v2_in1k": _cfg("resnet_101-84c3658278.pth", 76.53),
        "bcos_resnet152.v2_in1k": _cfg("resnet_152-42051a77c1.pth", 76.48),
        "bcos_resnet152.v2_long_in1k": _cfg("resnet_152_long-0b4b434939.pth", 80.14, **LONG),
        "bcos_resnext50_32x4d.v2_in1k": _cfg("resnext_50_32x4d-57af241ab9.pth", 75.82),
        "bcos_resnet20.cifar10": _cifar_cfg(),
        "bcos_resnet56.cifar10": _cifar_cfg(),
    }
)


def _create_bcos_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> BcosResNet:
    return build_model(BcosResNet, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def bcos_resnet18(pretrained: bool = False, **kwargs: Any) -> BcosResNet:
    model_args = {"block": BasicBlock, "layers": (2, 2, 2, 2)}
    return _create_bcos_resnet("bcos_resnet18", pretrained, **dict(model_args, **kwargs))


@register_model
def bcos_resnet34(pretrained: bool = False, **kwargs: Any) -> BcosResNet:
    model_args = {"block": BasicBlock, "layers": (3, 4, 6, 3)}
    return _create_bcos_resnet("bcos_resnet34", pretrained, **dict(model_args, **kwargs))


@register_model
def bcos_resnet50(pretrained: bool = False, **kwargs: Any) -> BcosResNet:
    model_args = {"block": Bottleneck, "layers": (3, 4, 6, 3)}
    return _create_bcos_resnet("bcos_resnet50", pretrained, **dict(model_args, **kwargs))


@register_model
def bcos_resnet101(pretrained: bool = False, **kwargs: Any) -> BcosResNet:
    model_args = {"block": Bottleneck, "layers": (3, 4, 23, 3)}
    return _create_bcos_resnet("bcos_resnet101", pretrained, **dict(model_args, **kwargs))


@register_model
def bcos_resnet152(pretrained: bool = False, **kwargs: Any) -> BcosResNet:
    model_args = {"block": Bottleneck, "layers": (3, 8, 36, 3)}
    return _create_bcos_resnet("bcos_resnet152", pretrained, **dict(model_args, **kwargs))


@register_model
def bcos_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> BcosResNet:
    model_args = {"block": Bottleneck, "layers": (3, 4, 6, 3), "cardinality": 32, "base_width": 4}
    return _create_bcos_resnet("bcos_resnext50_32x4d", pretrained, **dict(model_args, **kwargs))


_SMALL = {"block": BasicBlock, "channels": (16, 32, 64), "small_stem": True}


@register_model
def bcos_resnet20(pretrained: bool = False, **kwargs: Any) -> BcosResNet:
    """ResNet-20 for 32-pixel images."""
    model_args = dict(_SMALL, layers=(3, 3, 3))
    return _create_bcos_resnet("bcos_resnet20", pretrained, **dict(model_args, **kwargs))


@register_model
def bcos_resnet56(pretrained: bool = False, **kwargs: Any) -> BcosResNet:
    """ResNet-56 for 32-pixel images."""
    model_args = dict(_SMALL, layers=(9, 9, 9))
    return _create_bcos_resnet("bcos_resnet56", pretrained, **dict(model_args, **kwargs))
