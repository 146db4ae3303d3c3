"""B-cos v1 networks for ImageNet, built from timm's ResNet, DenseNet, VGG and Inception-v3.

Paper: `B-cos Networks: Alignment is All We Need for Interpretability` - https://arxiv.org/abs/2205.10268

timm's architectures without normalisation and activations. Every convolution is a B-cos convolution with two candidates
per unit (MaxOut) and a fixed scale. All pooling is average pooling. The classifier is a 1x1 B-cos convolution before
the global pooling. logits = W(x) x + bias, and W(x) * x is the exact contribution of each pixel. Written from the
paper's formulas. The authors' weights are for non-commercial research only.
"""

# torch annotates torch.jit.ignore only for calls with a flag:
# pyright: reportArgumentType=false

import re
from collections.abc import Mapping
from functools import partial
from math import log, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct
from timm.models import generate_default_cfgs
from timm.models._features import feature_take_indices
from timm.models.densenet import DenseNet
from timm.models.inception_v3 import InceptionB, InceptionD, InceptionV3
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vgg import VGG, cfgs
from torch import Tensor, nn

from ..explanation import ExplainMixin, forget_names
from ..hub import HubMixin, check_fit, register_model, unwrap
from ..layers import BcosConv2d, EncodedBcosConv2d, GlobalPool, Logits, adapt_colours, placement
from ._builder import build_model

__all__ = ["BcosV1DenseNet", "BcosV1InceptionV3", "BcosV1ResNet", "BcosV1VGG"]


class _BcosV1(ExplainMixin, HubMixin, nn.Module):
    """Maps RGB images in [0, 1] (B, 3, H, W), or encoded images (B, 6, H, W), to logits (B, num_classes)."""

    def _become_bcos(
        self,
        first_conv: str,
        *,
        b: float = 2.0,
        max_out: int = 2,
        scale_divisor: float = 100.0,
        logit_temperature: float = 1.0,
        logit_bias: float = log(0.01 / 0.99),
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        """Replace the modules of timm's network, which is on the meta device, with B-cos modules and a new head.

        The model classes pass their `options` to this method.

        Args:
            first_conv: name of the first convolution, which takes the encoded image's channels and does the encoding
            b: exponent B of all layers
            max_out: number of candidates per unit, of which the largest is its output
            scale_divisor: outputs are divided by s = sqrt(inputs of a unit) / scale_divisor, which keeps signals from
                vanishing without norms
            logit_temperature: T, divides the votes; a larger T gives sharper explanations and slower initial training
            logit_bias: b0, the logit of a class without evidence
            num_classes: number of classes; 0 returns pooled features
            global_pool: 'avg', 'sum', or '' to return a logit map
            drop_rate: dropout rate before the classifier

        Raises:
            ValueError: `scale_divisor` is not positive.
        """
        if not scale_divisor > 0:
            raise ValueError(f"scale_divisor={scale_divisor}: must be above 0")
        self._units = {"b": b, "max_out": max_out}
        self._scale_divisor = scale_divisor
        self._first_conv = first_conv
        self._replace_children(self, "", device, dtype)
        stem: Any = self.get_submodule(first_conv)
        self.encoding = stem.encoding
        self.in_chans = stem.encoding.in_chans
        self.num_classes = num_classes
        self.global_pool = GlobalPool(global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self.fc = self._make_classifier(device, dtype)
        self.logits = Logits(logit_temperature, logit_bias)
        # timm cannot adapt both halves of the encoding to other colour channels: checkpoint_filter_fn does it.
        self._traits = {"first_conv": None}

    def _replace_children(self, parent: nn.Module, prefix: str, device, dtype) -> None:
        for child, module in list(parent.named_children()):
            name = prefix + child
            if isinstance(module, nn.Conv2d):
                rows, columns = module.kernel_size
                options = {
                    "stride": module.stride,
                    "padding": module.padding,
                    "scale": sqrt(module.in_channels * rows * columns) / self._scale_divisor,
                    **self._units,
                    "device": device,
                    "dtype": dtype,
                }
                if name == self._first_conv:
                    new = EncodedBcosConv2d(module.in_channels // 2, module.out_channels, (rows, columns), **options)
                else:
                    new = BcosConv2d(module.in_channels, module.out_channels, (rows, columns), **options)
            elif isinstance(module, nn.MaxPool2d):
                new = nn.AvgPool2d(module.kernel_size, module.stride, module.padding)
            elif isinstance(module, (nn.BatchNorm2d, nn.ReLU)):
                new = nn.Identity()
            else:
                self._replace_children(module, f"{name}.", device, dtype)
                continue
            setattr(parent, child, new)

    def _make_classifier(self, device, dtype) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        inputs: Any = self.head_hidden_size
        scale = sqrt(inputs) / self._scale_divisor
        return BcosConv2d(inputs, self.num_classes, scale=scale, **self._units, device=device, dtype=dtype)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        forget_names(self)
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = GlobalPool(global_pool).train(self.training)
        self.fc = self._make_classifier(**placement(self)).train(self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self._vote(x, pre_logits)

    def _vote(self, x: Tensor, pre_logits: bool) -> Tensor:
        if pre_logits or self.num_classes == 0:
            return self.global_pool(x)
        x = self.head_drop(x)
        x = self.fc(x)
        x = self.global_pool(x)
        return self.logits(x)


class BcosV1ResNet(_BcosV1, ResNet):
    """B-cos v1 ResNet.

    Maps RGB images in [0, 1] (B, 3, H, W), or encoded images (B, 6, H, W), to logits (B, num_classes).

    Args:
        block, layers: as in timm's `ResNet`
        in_chans: colour channels of an image; the encoding doubles them
        options: as in `_BcosV1._become_bcos`
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, ...],
        in_chans: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(block, layers, num_classes=0, in_chans=2 * in_chans, global_pool="", device="meta")
        self._become_bcos("conv1", **options)


class BcosV1DenseNet(_BcosV1, DenseNet):
    """B-cos v1 DenseNet. Arguments as in timm's `DenseNet`; other arguments and shapes as in `BcosV1ResNet`."""

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: tuple[int, ...] = (6, 12, 24, 16),
        in_chans: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(growth_rate, block_config, num_classes=0, in_chans=2 * in_chans, global_pool="", device="meta")
        del self.classifier
        self._become_bcos("features.conv0", **options)


class BcosV1VGG(_BcosV1, VGG):
    """B-cos v1 VGG, fully convolutional: its 7x7 layer is padded.

    Args:
        cfg: channels of the layers, with 'M' for a pooling layer
        in_chans, options: as in `BcosV1ResNet`, like the shapes
    """

    def __init__(self, cfg: list[int | str], in_chans: int = 3, **options: Any) -> None:
        super().__init__(cfg, num_classes=0, in_chans=2 * in_chans, global_pool="", device="meta")
        del self.head
        dense: Any = self.pre_logits
        dense.fc1.padding = (3, 3)
        dense.input_kernel_size = 1  # so that timm does not enlarge small maps
        self._become_bcos("features.0", **options)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.pre_logits(x)
        return self._vote(x, pre_logits)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers after the last of `indices`; return the selected feature indices."""
        take_indices, max_index = feature_take_indices(len(self.feature_ends), indices)
        prune_end = max_index < len(self.feature_ends) - 1
        self.features = self.features[: self.feature_ends[max_index] + 1]
        if prune_end:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.pre_logits = nn.Identity()
            self.head_hidden_size = self.num_features
            self.reset_classifier(0, "")
        return take_indices


class _InceptionB(InceptionB):
    """timm's `InceptionB` with average pooling. timm calls max pooling as a function, so no module can be replaced."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        wide = self.branch3x3(x)
        deep = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [wide, deep, F.avg_pool2d(x, kernel_size=3, stride=2)]


class _InceptionD(InceptionD):
    """timm's `InceptionD` with average pooling, for the same reason."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        wide = self.branch3x3_2(self.branch3x3_1(x))
        deep = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return [wide, deep, F.avg_pool2d(x, kernel_size=3, stride=2)]


class BcosV1InceptionV3(_BcosV1, InceptionV3):
    """B-cos v1 Inception-v3, without the auxiliary classifier used in training. Arguments as in `BcosV1ResNet`."""

    # So that TorchScript skips it. timm's annotation is not seen, because other bases have annotations too.
    aux_logits: torch.jit.Final[bool]

    def __init__(self, in_chans: int = 3, **options: Any) -> None:
        super().__init__(num_classes=0, in_chans=2 * in_chans, global_pool="", device="meta")
        unpadded = partial(ConvNormAct, padding=0)
        self.Mixed_6a = _InceptionB(288, unpadded, device="meta")
        self.Mixed_7a = _InceptionD(768, unpadded, device="meta")
        self._become_bcos("Conv2d_1a_3x3.conv", **options)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: _BcosV1) -> dict[str, Tensor]:
    """Convert the authors' state dict, or one of ours, for `model`, also for another number of colour channels.

    Raises:
        ConvertError: the weights belong to another network; the message names the first differences.
    """
    state_dict = unwrap(state_dict)
    if any(".linear." in name for name in state_dict):
        state_dict = _from_authors(state_dict, model)
    stem = f"{model._first_conv}.weight"
    if stem in state_dict:
        state_dict[stem] = adapt_colours(state_dict[stem], model.in_chans)
    check_fit(state_dict, model)
    return state_dict


def _from_authors(state_dict: Mapping[str, Tensor], model: _BcosV1) -> dict[str, Tensor]:
    """Convert the authors' names: torchvision's, in a Sequential, with `.linear.` in each layer; VGG numbers differ.

    The auxiliary classifier of Inception-v3 is dropped, because it is used only in training.
    """
    layers = {}
    for key, value in state_dict.items():
        layer, _, part = key.removeprefix("0.").rpartition(".")
        layers[layer.removesuffix(".linear"), part] = value
    names = {}
    if isinstance(model, BcosV1VGG):
        theirs = sorted(int(layer[9:]) for layer, _ in layers if re.fullmatch(r"features\.\d+", layer))
        ours = [i for i, layer in enumerate(model.features) if isinstance(layer, BcosConv2d)]
        names = {f"features.{t}": f"features.{o}" for t, o in zip(theirs, ours, strict=False)}
        names |= {"classifier.0": "pre_logits.fc1", "classifier.1": "pre_logits.fc2", "classifier.2": "fc"}
    elif isinstance(model, BcosV1DenseNet):
        names = {"classifier": "fc"}
    return {
        f"{names.get(layer, layer)}.{part}": value
        for (layer, part), value in layers.items()
        if not layer.startswith("AuxLogits.")
    }


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 224 / 256,
        "interpolation": "bilinear",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2205.10268",
        "paper_name": "B-cos Networks: Alignment is All We Need for Interpretability",
        **kwargs,
    }


def _mpi_cfg(name: str, token: str, **kwargs: Any) -> dict[str, Any]:
    """Create the config of weights that the paper's authors published, downloaded from their file share."""
    return _cfg(
        url=(f"https://nextcloud.mpi-klsb.mpg.de/index.php/s/{token}/download", f"{name}.pt"),
        license="non-commercial-research",
        description="Weights published by the authors of the paper, for non-commercial research only",
        origin_url="https://github.com/moboehle/B-cos",
        **kwargs,
    )


_NETWORKS = {
    "bcos_v1_resnet34": {},
    "bcos_v1_densenet121": {"first_conv": "features.conv0"},
    "bcos_v1_vgg11": {"first_conv": "features.0"},
    "bcos_v1_inception_v3": {
        "first_conv": "Conv2d_1a_3x3.conv",
        "input_size": (3, 299, 299),
        "min_input_size": (3, 107, 107),  # with a smaller image, the last map is a single position
        "pool_size": (8, 8),
        "crop_pct": 0.875,
    },
}
_MPI_TAGS = {  # tag: token in the download URL
    "bcos_v1_resnet34.mpi_in1k": "mYe6TggQsDymZbk",
    "bcos_v1_densenet121.mpi_in1k": "LW2HsNDzAzaaaDH",
    "bcos_v1_densenet121.mpi_cosine_in1k": "G8kdm73qWn4L8Lg",
    "bcos_v1_vgg11.mpi_in1k": "kEHgFSSKMEdeA5N",
    "bcos_v1_inception_v3.mpi_in1k": "QSEo6QSNgPZqNfi",
}

# "*" marks the default tag. Otherwise timm would choose the first tag with weights: the authors', with another licence.
default_cfgs = generate_default_cfgs(
    {
        **{name: _mpi_cfg(name, token, **_NETWORKS[name.split(".")[0]]) for name, token in _MPI_TAGS.items()},
        **{f"{name}.in1k*": _cfg(**network) for name, network in _NETWORKS.items()},
    }
)


def _create_bcos_v1(model_cls: type[_BcosV1], variant: str, pretrained: bool = False, **kwargs: Any) -> Any:
    return build_model(model_cls, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def bcos_v1_resnet34(pretrained: bool = False, **kwargs: Any) -> BcosV1ResNet:
    model_args = {"block": BasicBlock, "layers": (3, 4, 6, 3), "logit_temperature": 10.0}
    return _create_bcos_v1(BcosV1ResNet, "bcos_v1_resnet34", pretrained, **dict(model_args, **kwargs))


@register_model
def bcos_v1_densenet121(pretrained: bool = False, **kwargs: Any) -> BcosV1DenseNet:
    model_args = {"growth_rate": 32, "block_config": (6, 12, 24, 16), "logit_temperature": 0.001}
    model_args["feature_cfg"] = {"flatten_sequential": True}
    return _create_bcos_v1(BcosV1DenseNet, "bcos_v1_densenet121", pretrained, **dict(model_args, **kwargs))


@register_model
def bcos_v1_vgg11(pretrained: bool = False, **kwargs: Any) -> BcosV1VGG:
    model_args = {"cfg": cfgs["vgg11"], "scale_divisor": 1000.0, "logit_temperature": 0.1}
    model_args["feature_cfg"] = {"flatten_sequential": True, "out_indices": (0, 1, 2, 3, 4, 5)}
    return _create_bcos_v1(BcosV1VGG, "bcos_v1_vgg11", pretrained, **dict(model_args, **kwargs))


@register_model
def bcos_v1_inception_v3(pretrained: bool = False, **kwargs: Any) -> BcosV1InceptionV3:
    model_args = {"scale_divisor": 200.0, "logit_temperature": 1.0}
    return _create_bcos_v1(BcosV1InceptionV3, "bcos_v1_inception_v3", pretrained, **dict(model_args, **kwargs))
