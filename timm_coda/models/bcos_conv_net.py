"""The nine-layer B-cos v1 network for CIFAR-10.

Paper: `B-cos Networks: Alignment is All We Need for Interpretability` - https://arxiv.org/abs/2205.10268

A stack of B-cos convolutions with two candidates per unit (MaxOut) and nothing between them: CoDA-Net S with another
kind of layer. The authors published weights for seven values of B, starting with a piecewise linear network (B = 1).
From B = 1.5 on, accuracy falls slowly while explanations become sharp. Written from the paper's formulas. The published
weights are for non-commercial research only.
"""

# The type annotations of torch (module attributes) and timm (arguments) are too narrow:
# pyright: reportArgumentType=false

import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import log
from typing import Any

from timm.models import generate_default_cfgs
from torch import Tensor

from ..hub import ConvertError, check_fit, register_model, unwrap
from ..layers import BcosConv2d, adapt_colours
from ._builder import build_model
from .conv_stack import STAGE_FEATURES, ConvStack

__all__ = ["BcosConvNet"]

# B: temperature, CIFAR-10 top-1 in %, token in the download URL
_PUBLISHED = {
    1.0: (0.001, 93.53, "q8cRRojXZ2WNWbS"),
    1.25: (0.001, 93.81, "oX6H7jQiSN2dfWJ"),
    1.5: (0.01, 93.69, "3LxnBCarS8Lpq5b"),
    1.75: (10.0, 93.69, "XLwEnaKr9bYQJaN"),
    2.0: (100.0, 93.19, "mksX2CJMCDQbMYb"),
    2.25: (100.0, 92.6, "qFsqLPdHLQyNHwH"),
    2.5: (1000.0, 92.37, "XwEAFrPSEYJ2C79"),
}


class BcosConvNet(ConvStack):
    """Plain B-cos network.

    Maps RGB images in [0, 1] (B, 3, H, W), or encoded images (B, 6, H, W), to logits (B, num_classes).

    Args:
        depths: number of layers in each stage
        channels, strides: output channels and stride of each layer before the head
        b: exponent B of all layers; a larger B requires more alignment between weights and input
        max_out: number of candidates per unit, of which the largest is its output
        scale: s, divides the output of all layers; None for the published 10^(-2 + 1.5 (2.5 - B))
        logit_temperature: T, divides the votes; None for the published value of this B
        logit_bias: b0, the logit of a class without evidence
        num_classes: number of classes; 0 returns pooled features
        in_chans: colour channels of an image; the encoding doubles them
        global_pool: 'avg' (as in the paper), 'sum', or '' to return a logit map
        drop_rate: must be 0 (no dropout); it exists because timm's training script passes it to every model

    Raises:
        ValueError: the numbers of layers do not match, or B has no published temperature and none is given.
    """

    def __init__(
        self,
        depths: Sequence[int],
        channels: Sequence[int],
        strides: Sequence[int],
        b: float = 2.0,
        max_out: int = 2,
        scale: float | None = None,
        logit_temperature: float | None = None,
        logit_bias: float = log(0.1 / 0.9),
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        if not len(strides) == len(channels) == sum(depths):
            raise ValueError(
                f"{sum(depths)} layers (depths={tuple(depths)}) need as many channels and strides: "
                f"got {len(channels)} and {len(strides)}"
            )
        if logit_temperature is None:
            if b not in _PUBLISHED:
                known = ", ".join(f"{known:g}" for known in _PUBLISHED)
                raise ValueError(f"b={b} has no published temperature (only {known} have): give logit_temperature")
            logit_temperature = _PUBLISHED[b][0]
        dd = {"device": device, "dtype": dtype}
        unit = {"b": b, "max_out": max_out, "scale": 10 ** (-2 + 1.5 * (2.5 - b)) if scale is None else scale}
        pairs = zip(pairwise([2 * in_chans, *channels]), strides, strict=True)
        super().__init__(
            [BcosConv2d(*pair, 3, stride=stride, padding=1, **unit, **dd) for pair, stride in pairs],
            depths,
            partial(BcosConv2d, **unit),
            logit_temperature=logit_temperature,
            logit_bias=logit_bias,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: BcosConvNet) -> dict[str, Tensor]:
    """Convert the authors' state dict, or one of ours, for `model`, also for another number of colour channels.

    Raises:
        ConvertError: the weights belong to another network; the message names the first differences.
    """
    state_dict = unwrap(state_dict)
    if any(".linear." in name for name in state_dict):
        state_dict = _from_authors(state_dict, model)
    stem = "stages.0.0.weight"
    if stem in state_dict:
        state_dict[stem] = adapt_colours(state_dict[stem], model.in_chans)
    check_fit(state_dict, model)
    return state_dict


def _from_authors(state_dict: Mapping[str, Tensor], model: BcosConvNet) -> dict[str, Tensor]:
    """Convert the authors' numbered layers to our names."""
    names = [f"stages.{s}.{i}" for s, stage in enumerate(model.stages) for i in range(len(stage))] + ["head"]
    converted = {}
    for key, value in state_dict.items():
        match = re.fullmatch(r"(\d+)\.linear\.weight", key)
        if not match or int(match[1]) >= len(names):
            raise ConvertError(f"{key} is not one of the {len(names)} layers of this network, in the authors' format")
        converted[f"{names[int(match[1])]}.weight"] = value
    return converted


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "label_names": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "stages.0.0",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2205.10268",
        "paper_name": "B-cos Networks: Alignment is All We Need for Interpretability",
        **kwargs,
    }


def _mpi_cfg(name: str, token: str, top1: float) -> dict[str, Any]:
    """Create the config of weights that the paper's authors published, downloaded from their file share."""
    return _cfg(
        url=(f"https://nextcloud.mpi-klsb.mpg.de/index.php/s/{token}/download", f"{name}.pt"),
        license="non-commercial-research",
        description="Weights published by the authors of the paper, for non-commercial research only. CIFAR-10 top-1 "
        f"{top1} % as they report.",
        origin_url="https://github.com/moboehle/B-cos",
    )


_MPI_TAGS = {f"mpi_b{b:g}_cifar10".replace(".", "_"): b for b in _PUBLISHED}

# "*" marks the default tag. Otherwise timm would choose the first tag with weights: the authors', with another licence.
default_cfgs = generate_default_cfgs(
    {
        **{
            f"bcos_v1_conv9.{tag}": _mpi_cfg(f"bcos_v1_conv9.{tag}", _PUBLISHED[b][2], _PUBLISHED[b][1])
            for tag, b in _MPI_TAGS.items()
        },
        "bcos_v1_conv9.b2_cifar10*": _cfg(),
    }
)
# Arguments that a tag's weights were trained with, if they differ from the entrypoint's defaults.
_TAG_ARGS = {tag: {"b": b} for tag, b in _MPI_TAGS.items()}


def _create_bcos_conv_net(variant: str, pretrained: bool = False, **kwargs: Any) -> BcosConvNet:
    return build_model(
        BcosConvNet, variant, pretrained, checkpoint_filter_fn, tag_args=_TAG_ARGS, feature_cfg=STAGE_FEATURES, **kwargs
    )


@register_model
def bcos_v1_conv9(pretrained: bool = False, **kwargs: Any) -> BcosConvNet:
    """The published layout for CIFAR-10. Values of `b` that were not published need `logit_temperature`."""
    model_args = {
        "depths": (2, 3, 3),
        "channels": (64, 64, 128, 128, 128, 256, 256, 256),
        "strides": (1, 1, 2, 1, 1, 2, 1, 1),
    }
    return _create_bcos_conv_net("bcos_v1_conv9", pretrained, **dict(model_args, **kwargs))
