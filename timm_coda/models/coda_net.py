"""CoDA-Net: Convolutional Dynamic Alignment Network.

Paper: `Convolutional Dynamic Alignment Networks for Interpretable Classifications` - https://arxiv.org/abs/2104.00032

A stack of convolutions of dynamic alignment units, without non-linearity, normalisation or residual connections between
them: the units' input-dependent weights are the non-linearity. So logits = W(x) x + bias, and W(x) * x is the exact
contribution of each pixel. Written from the paper's formulas. S and L have the published layouts (CIFAR-10,
ImageNet-100). M is our own layout for 64x64 images, because the published one was not released.
"""

# The type annotations of torch (module attributes) and timm (arguments) are too narrow:
# pyright: reportArgumentType=false

import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo
from timm.models import generate_default_cfgs
from torch import Tensor

from ..errors import wrap_errors
from ..hub import ConvertError, check_fit, register_model, unwrap
from ..layers import DAUConv2d, adapt_colours
from ._builder import build_model
from .conv_stack import STAGE_FEATURES, ConvStack

__all__ = ["CodaNet"]


class CodaNet(ConvStack):
    """CoDA-Net.

    Maps RGB images in [0, 1] (B, 3, H, W), or encoded images (B, 6, H, W), to logits (B, num_classes).

    Args:
        depths: number of layers in each stage
        channels, strides: output channels and stride of each layer before the head
        rank: rank of each layer, that of the head last; an int for all layers
        stem_kernel, head_kernel: kernel size of the first layer and of the head; other layers have 3
        activation: rescaling of the dynamic weights, 'squash' or 'l2'
        logit_temperature: T, divides the votes; a larger T gives sharper explanations and slower initial training
        logit_bias: b0, the logit of a class without evidence
        num_classes: number of classes; 0 returns pooled features
        in_chans: colour channels of an image; the encoding doubles them
        global_pool: 'sum' (as in the papers), 'avg', or '' to return a logit map
        drop_rate: must be 0 (no dropout); it exists because timm's training script passes it to every model

    Raises:
        ValueError: the numbers of layers do not match, or an argument is not supported.
    """

    def __init__(
        self,
        depths: Sequence[int],
        channels: Sequence[int],
        strides: Sequence[int],
        rank: int | Sequence[int],
        stem_kernel: int = 3,
        head_kernel: int = 1,
        activation: str = "squash",
        logit_temperature: float = 1000.0,
        logit_bias: float = log(0.1 / 0.9),
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "sum",
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        ranks = [rank] * (len(channels) + 1) if isinstance(rank, int) else list(rank)
        if not len(strides) == len(channels) == len(ranks) - 1 == sum(depths):
            raise ValueError(
                f"{sum(depths)} layers (depths={tuple(depths)}) need as many channels and strides, and one more rank "
                f"(for the head): got {len(channels)}, {len(strides)} and {len(ranks)}"
            )
        dd = {"device": device, "dtype": dtype}
        layers = []
        for layer, (in_channels, out_channels) in enumerate(pairwise([2 * in_chans, *channels])):
            kernel = stem_kernel if layer == 0 else 3
            layers.append(
                DAUConv2d(
                    in_channels,
                    out_channels,
                    kernel,
                    stride=strides[layer],
                    padding=kernel // 2,
                    rank=ranks[layer],
                    activation=activation,
                    **dd,
                )
            )
        head = {"kernel_size": head_kernel, "padding": head_kernel // 2, "rank": ranks[-1], "activation": activation}
        super().__init__(
            layers,
            depths,
            partial(DAUConv2d, **head),
            logit_temperature=logit_temperature,
            logit_bias=logit_bias,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: CodaNet) -> dict[str, Tensor]:
    """Convert the authors' state dict, or one of ours, for `model`, also for another number of colour channels.

    Raises:
        ConvertError: the weights belong to another network; the message names the first differences.
    """
    state_dict = unwrap(state_dict)
    if any(".weighting_f." in name for name in state_dict):
        state_dict = _from_authors(state_dict, model)
    for name in ("stages.0.0.down.weight", "stages.0.0.up.weight", "stages.0.0.up.bias"):
        if name in state_dict:
            state_dict[name] = adapt_colours(state_dict[name], model.in_chans)
    check_fit(state_dict, model)
    return state_dict


def _from_authors(state_dict: Mapping[str, Tensor], model: CodaNet) -> dict[str, Tensor]:
    """Convert the authors' numbered layers to our names and shapes.

    In each layer, `0.weight` is B (r, C, k, k), `1.weight` is A (K D, r, 1, 1) and `1.bias` is b (K D), K before D.
    """
    names = [f"stages.{s}.{i}" for s, stage in enumerate(model.stages) for i in range(len(stage))] + ["head"]
    converted = {}
    for key, value in state_dict.items():
        match = re.fullmatch(r"(\d+)\.weight_mod\.weighting_f\.(0\.weight|1\.weight|1\.bias)", key)
        if not match or int(match[1]) >= len(names):
            raise ConvertError(f"{key} is not one of the {len(names)} layers of this network, in the authors' format")
        name, part = names[int(match[1])], match[2]
        with wrap_errors(f"{key}, {list(value.shape)}, does not fit the rest of its layer", ConvertError):
            down = state_dict[f"{match[1]}.weight_mod.weighting_f.0.weight"]
            seen = down.shape[1:]
            if part == "0.weight":
                converted[f"{name}.down.weight"] = value
            elif part == "1.weight":
                up = value.reshape(seen.numel(), -1, len(down)).permute(1, 2, 0)  # (D, r, K)
                converted[f"{name}.up.weight"] = up.reshape(-1, *seen).contiguous()
            else:
                converted[f"{name}.up.bias"] = value.reshape(seen.numel(), -1).T.reshape(-1, *seen).contiguous()
    return converted


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "stages.0.0.down",
        "classifier": ("head.down", "head.up"),
        "paper_ids": "arXiv:2104.00032",
        "paper_name": "Convolutional Dynamic Alignment Networks for Interpretable Classifications",
        "license": "apache-2.0",
        **kwargs,
    }


_WEIGHTS = Path(__file__).parent / "weights"
_IMAGENET = ImageNetInfo("imagenet-1k")
_DIGITS = {"input_size": (3, 16, 16), "pool_size": (4, 4), "label_names": tuple("0123456789")}
_CIFAR = {"label_names": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")}
_IMAGENET100 = {
    "num_classes": 100,
    "input_size": (3, 240, 240),
    "pool_size": (20, 20),
    "crop_pct": 240 / 256,
    "label_names": tuple(_IMAGENET.label_names()[:100]),  # the papers use the first 100 classes
    "label_descriptions": dict(zip(_IMAGENET.label_names()[:100], _IMAGENET.label_descriptions()[:100], strict=True)),
}


def _mpi_cfg(name: str, token: str, **kwargs: Any) -> dict[str, Any]:
    """Create the config of weights that the papers' authors published, downloaded from their file share."""
    return _cfg(
        url=(f"https://nextcloud.mpi-klsb.mpg.de/index.php/s/{token}/download", f"{name}.pt"),
        license="non-commercial-research",
        description="Weights published by the authors of the paper, for non-commercial research only",
        origin_url="https://github.com/moboehle/CoDA-Nets",
        **kwargs,
    )


_MPI_CIFAR = {  # temperature: token in the download URL
    1000: "8ykMc8XLQMtCxHo",
    10: "H8FgwMHJTTTYDJw",
    50: "SqPBioqmxEWbH9g",
    100: "yk7LajwLwpXXzf5",
    500: "zfeYMASLtKNGgsQ",
    5000: "6iY992FYEsfHkeA",
}

# "*" marks the default tag. Otherwise timm would choose the first tag with weights: the authors', with another licence.
default_cfgs = generate_default_cfgs(
    {
        "coda_net_xs.digits": _cfg(
            file=str(_WEIGHTS / "coda_net_xs.digits.safetensors"),
            hf_hub_id="timm-coda/coda_net_xs.digits",
            **_DIGITS,
        ),
        "coda_net_xs.cifar10": _cfg(
            file=str(_WEIGHTS / "coda_net_xs.cifar10.safetensors"),
            hf_hub_id="timm-coda/coda_net_xs.cifar10",
            **_CIFAR,
        ),
        **{
            f"coda_net_s.mpi_t{t}_cifar10": _mpi_cfg(f"coda_net_s.mpi_t{t}_cifar10", token, **_CIFAR)
            for t, token in _MPI_CIFAR.items()
        },
        "coda_net_s.cifar10*": _cfg(**_CIFAR),
        "coda_net_m.tiny_imagenet": _cfg(num_classes=200, input_size=(3, 64, 64)),
        "coda_net_l.mpi_t100000_imagenet100": _mpi_cfg(
            "coda_net_l.mpi_t100000_imagenet100", "pArrgmncXAAiH5R", **_IMAGENET100
        ),
        "coda_net_l.imagenet100*": _cfg(**_IMAGENET100),
    }
)
# Arguments that a tag's weights were trained with, if they differ from the entrypoint's defaults.
_TAG_ARGS = {f"mpi_t{t}_cifar10": {"logit_temperature": float(t)} for t in _MPI_CIFAR}


def _create_coda_net(variant: str, pretrained: bool = False, **kwargs: Any) -> CodaNet:
    return build_model(
        CodaNet, variant, pretrained, checkpoint_filter_fn, tag_args=_TAG_ARGS, feature_cfg=STAGE_FEATURES, **kwargs
    )


_CIFAR_LAYOUT = {
    "depths": (2, 3, 3),
    "channels": (16, 16, 32, 32, 32, 64, 64, 64),
    "strides": (1, 1, 2, 1, 1, 2, 1, 1),
}


@register_model
def coda_net_xs(pretrained: bool = False, **kwargs: Any) -> CodaNet:
    """The S layout with a quarter of its ranks, for CPUs."""
    model_args = dict(_CIFAR_LAYOUT, rank=(8,) * 2 + (16,) * 7)
    return _create_coda_net("coda_net_xs", pretrained, **dict(model_args, **kwargs))


@register_model
def coda_net_s(pretrained: bool = False, **kwargs: Any) -> CodaNet:
    """The published layout for CIFAR-10."""
    model_args = dict(_CIFAR_LAYOUT, rank=(32,) * 2 + (64,) * 7)
    return _create_coda_net("coda_net_s", pretrained, **dict(model_args, **kwargs))


@register_model
def coda_net_m(pretrained: bool = False, **kwargs: Any) -> CodaNet:
    """Our own layout for 64x64 images, between S and L: the published one was not released."""
    model_args = {
        "depths": (3, 3, 2),
        "channels": (16, 32, 32, 64, 64, 64, 64, 64),
        "strides": (1, 2, 1, 2, 1, 1, 2, 1),
        "rank": (64,) * 3 + (128,) * 6,
    }
    return _create_coda_net("coda_net_m", pretrained, **dict(model_args, **kwargs))


@register_model
def coda_net_l(pretrained: bool = False, **kwargs: Any) -> CodaNet:
    """The published layout for 240x240 images of 100 ImageNet classes."""
    model_args = {
        "depths": (3, 3, 2),
        "channels": (16, 32, 32, 64, 64, 64, 64, 64),
        "strides": (3, 1, 1, 2, 1, 1, 2, 1),
        "rank": (64,) * 3 + (128,) * 3 + (256,) * 3,
        "stem_kernel": 7,
        "head_kernel": 3,
        "logit_temperature": 100000.0,
    }
    return _create_coda_net("coda_net_l", pretrained, **dict(model_args, **kwargs))
