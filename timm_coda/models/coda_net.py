"""CoDA-Net: Convolutional Dynamic Alignment Network.

Paper: `Convolutional Dynamic Alignment Networks for Interpretable Classifications` - https://arxiv.org/abs/2104.00032

A stack of convolutions of dynamic alignment units, with no non-linearity, normalisation or residual between them: the
units' own input-dependent weights are the non-linearity. So logits = W(x) x + bias, and W(x) * x is the decision, pixel
by pixel. Written from the paper's formulas; S and L have the published layouts (CIFAR-10, ImageNet-100), M is our own
for 64x64 images because the published one was not released.
"""

# torch.jit.ignore is declared for a flag only:
# pyright: reportArgumentType=false

import re
from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo
from timm.layers import get_device_dtype
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..convert import ConvertError, check_fit, resolve_weights, unwrap
from ..explain import ExplainMixin
from ..hub import HubMixin, blame
from ..layers import DAUConv2d, GlobalPool, InverseEncoding, Logits

__all__ = ["CodaNet"]


class CodaStage(nn.Sequential):
    """Layers of one stage, optionally recomputed in backward to save memory."""

    def __init__(self, *layers: DAUConv2d) -> None:
        super().__init__(*layers)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        # Recomputation in backward may run in another thread, where no explanation mode is on.
        if not torch.jit.is_scripting():
            frozen: Any = self[0].frozen_dynamics
            if self.grad_checkpointing and not frozen.held():
                return checkpoint_seq(self, x)
        for layer in self:
            x = layer(x)
        return x


class CodaNet(ExplainMixin, HubMixin, nn.Module):
    """CoDA-Net. RGB images in [0, 1] (B, 3, H, W), or encoded ones (B, 6, H, W), to logits (B, num_classes).

    Args:
        depths: layers of each stage
        channels, strides: of each layer before the head
        rank: of each layer, the head last; an int for all of them
        stem_kernel, head_kernel: kernel size of the first layer and of the head; all others have 3
        activation: of the dynamic weights, 'squash' or 'l2'
        logit_temperature: T; high ones give sharper explanations and start slower
        logit_bias: b0, the logit of every class where there is no evidence
        num_classes: 0 for pooled features
        in_chans: colours of an image, encoded as twice as many channels inside
        global_pool: 'sum' (the papers'), 'avg' or '' (a logit map)
        drop_rate: 0, for there is no dropout; timm's train script passes it to every model
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
        super().__init__()
        if drop_rate != 0:
            raise ValueError(f"drop_rate={drop_rate}: a CoDA-Net has no dropout; leave it at 0")
        ranks = [rank] * (len(channels) + 1) if isinstance(rank, int) else list(rank)
        if not len(strides) == len(channels) == len(ranks) - 1 == sum(depths):
            raise ValueError(
                f"{sum(depths)} layers (depths={tuple(depths)}) need as many channels and strides and one more rank "
                f"(the head's): got {len(channels)}, {len(strides)} and {len(ranks)}"
            )
        dd = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False
        self.feature_info = []

        stages = []
        layer = 0
        prev_chs = 2 * in_chans
        reduction = 1
        for stage, depth in enumerate(depths):
            layers = []
            for _ in range(depth):
                kernel = stem_kernel if layer == 0 else 3
                layers.append(
                    DAUConv2d(
                        prev_chs,
                        channels[layer],
                        kernel,
                        stride=strides[layer],
                        padding=kernel // 2,
                        rank=ranks[layer],
                        activation=activation,
                        **dd,
                    )
                )
                prev_chs = channels[layer]
                reduction *= strides[layer]
                layer += 1
            stages.append(CodaStage(*layers))
            self.feature_info.append({"num_chs": prev_chs, "reduction": reduction, "module": f"stages.{stage}"})
        self.encoding = InverseEncoding(in_chans, min_size=reduction)
        self.stages = nn.Sequential(*stages)

        self.num_features = self.head_hidden_size = prev_chs
        self._head_args = {"kernel_size": head_kernel, "rank": ranks[-1], "activation": activation}
        self.head = self._make_head(**dd)
        # Pooling stands behind the classifier: each position votes for the classes, and the votes are pooled.
        self.global_pool = GlobalPool(global_pool)
        self.logits = Logits(logit_temperature, logit_bias)
        # timm adapts one weight of a stem to other colours, but a unit has three: checkpoint_filter_fn does it.
        self._traits = {"first_conv": None}

    def _make_head(self, device=None, dtype=None) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        padding = self._head_args["kernel_size"] // 2
        return DAUConv2d(
            self.num_features, self.num_classes, padding=padding, **self._head_args, device=device, dtype=dtype
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^stages\.0\.0", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = GlobalPool(global_pool).train(self.training)
        self.head = self._make_head(**get_device_dtype(self)).train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features and those of the stages in between.

        Args:
            x: images, as `forward`
            indices: the last n stages if int, all if None, else which
            norm: without effect, there is no norm layer
            stop_early: stop behind the last stage asked for
            output_fmt: 'NCHW'
            intermediates_only: return only the list
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: only 'NCHW'")
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        x = self.encoding(x)
        stages = self.stages if torch.jit.is_scripting() or not stop_early else self.stages[: max_index + 1]
        for index, stage in enumerate(stages):
            x = stage(x)
            if index in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove stages behind the last of `indices`; returns which stages these are."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.encoding(x)
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits or self.num_classes == 0:
            return self.global_pool(x)
        x = self.head(x)
        x = self.global_pool(x)
        return self.logits(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: CodaNet) -> dict[str, Tensor]:
    """Weights of the authors' checkpoints or ours, as `model` wants them, also with another number of colours.

    Raises:
        ConvertError: They are another network's; the message names the first differences.
    """
    state_dict = unwrap(state_dict)
    if any(".weighting_f." in name for name in state_dict):
        state_dict = _from_authors(state_dict, model)
    for name in ("stages.0.0.down.weight", "stages.0.0.up.weight", "stages.0.0.up.bias"):
        if name in state_dict:
            state_dict[name] = _adapt_colours(state_dict[name], model.in_chans)
    check_fit(state_dict, model)
    return state_dict


def _from_authors(state_dict: Mapping[str, Tensor], model: CodaNet) -> dict[str, Tensor]:
    """A numbered layer's `0.weight` is B (r, C, k, k), `1.weight` A (K D, r, 1, 1), `1.bias` b (K D), K before D."""
    names = [f"stages.{s}.{i}" for s, stage in enumerate(model.stages) for i in range(len(stage))] + ["head"]
    converted = {}
    for key, value in state_dict.items():
        match = re.fullmatch(r"(\d+)\.weight_mod\.weighting_f\.(0\.weight|1\.weight|1\.bias)", key)
        if not match or int(match[1]) >= len(names):
            raise ConvertError(f"{key} is not one of the {len(names)} layers of this network, in the authors' format")
        name, part = names[int(match[1])], match[2]
        with blame(f"{key}, {list(value.shape)}, does not go with the rest of its layer", ConvertError):
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


def _adapt_colours(weight: Tensor, in_chans: int) -> Tensor:
    """(N, 2 C, k, k) to (N, 2 in_chans, k, k): colours are summed to one, or repeated and scaled, as timm does."""
    source = weight.shape[1] // 2
    if source == in_chans or weight.shape[1] % 2:
        return weight
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))  # sums want more than half precision
    halves = weight.unflatten(1, (2, source))  # colours, and inverse colours
    if in_chans == 1:
        return halves.sum(2)
    repeated = halves[:, :, torch.arange(in_chans) % source]
    return (repeated * (source / in_chans)).flatten(1, 2)


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


_WEIGHTS = Path(__file__).parents[1] / "weights"
_IMAGENET = ImageNetInfo("imagenet-1k")
_DIGITS = {"input_size": (3, 16, 16), "pool_size": (4, 4), "label_names": tuple("0123456789")}
_CIFAR = {"label_names": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")}
_IMAGENET100 = {
    "num_classes": 100,
    "input_size": (3, 240, 240),
    "pool_size": (20, 20),
    "crop_pct": 240 / 256,
    "label_names": tuple(_IMAGENET.label_names()[:100]),  # the papers take the first 100 classes
    "label_descriptions": dict(zip(_IMAGENET.label_names()[:100], _IMAGENET.label_descriptions()[:100], strict=True)),
}


def _mpi_cfg(name: str, token: str, **kwargs: Any) -> dict[str, Any]:
    """Weights that the papers' authors published, downloaded from their file share."""
    return _cfg(
        url=(f"https://nextcloud.mpi-klsb.mpg.de/index.php/s/{token}/download", f"{name}.pt"),
        license="non-commercial-research",
        description="Weights published by the authors of the paper, for non-commercial research only",
        origin_url="https://github.com/moboehle/CoDA-Nets",
        **kwargs,
    )


_MPI_CIFAR = {  # temperature: link
    1000: "8ykMc8XLQMtCxHo",
    10: "H8FgwMHJTTTYDJw",
    50: "SqPBioqmxEWbH9g",
    100: "yk7LajwLwpXXzf5",
    500: "zfeYMASLtKNGgsQ",
    5000: "6iY992FYEsfHkeA",
}

# The last * is the default. Without it, the first with weights would be, and the authors' have another licence.
default_cfgs = generate_default_cfgs(
    {
        "coda_net_xs.digits": _cfg(
            file=str(_WEIGHTS / "coda_net_xs.digits.safetensors"),
            hf_hub_id="timm-coda/coda_net_xs.digits",
            **_DIGITS,
        ),
        "coda_net_xs.cifar10": _cfg(**_CIFAR),
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
# What a tag's weights were trained with, where that is not the entrypoint's default.
_TAG_ARGS = {f"mpi_t{t}_cifar10": {"logit_temperature": float(t)} for t in _MPI_CIFAR}


def _create_coda_net(
    variant: str,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    **kwargs: Any,
) -> CodaNet:
    config = resolve_weights(
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        cache_dir=cache_dir,
    )
    tag_args = _TAG_ARGS.get(config.tag or "", {})
    kwargs = tag_args | kwargs
    model = build_model_with_cfg(
        CodaNet,
        variant,
        pretrained,
        pretrained_cfg=config,  # type: ignore[arg-type]  # timm passes one on, too
        pretrained_filter_fn=checkpoint_filter_fn,
        cache_dir=cache_dir,
        # The default list-net of features_only drops functional calls between the stages, such as the encoding.
        feature_cfg={"out_indices": (0, 1, 2), "feature_cls": "getter"},
        **kwargs,
    )
    model._model_args = {name: kwargs[name] for name in tag_args}  # timm adds the caller's, and saves them
    return model


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
