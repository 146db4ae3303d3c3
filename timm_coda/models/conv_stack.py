"""A plain stack of dynamic-linear convolutions: what CoDA-Nets and the nine-layer B-cos network share."""

# torch.jit.ignore is declared for a flag only:
# pyright: reportArgumentType=false

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod
from typing import Any

import torch
from timm.layers import get_device_dtype
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..explanation import ExplainMixin
from ..hub import HubMixin
from ..layers import DynamicLinear, GlobalPool, InverseEncoding, Logits

__all__ = ["STAGE_FEATURES", "ConvStack"]

# The default list-net of features_only drops functional calls between the stages, such as the encoding.
STAGE_FEATURES = {"out_indices": (0, 1, 2), "feature_cls": "getter"}


class ConvStage(nn.Sequential):
    """Layers of one stage, optionally recomputed in backward to save memory."""

    def __init__(self, *layers: DynamicLinear) -> None:
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


class ConvStack(ExplainMixin, HubMixin, nn.Module):
    """RGB images in [0, 1] (B, 3, H, W), or encoded ones (B, 6, H, W), to logits (B, num_classes).

    Args:
        layers: convolutions in front of the head, the first of which sees encoded images
        depths: how many of them are in each stage
        make_head: makes the classifier, a convolution, of its input and output channels, `device` and `dtype`
        logit_temperature, logit_bias: of `Logits`
        num_classes: 0 for pooled features
        in_chans: colours of an image
        global_pool: of `GlobalPool`
        drop_rate: 0

    Raises:
        ValueError: another drop_rate: it is there because timm's train script passes it to every model.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        depths: Sequence[int],
        make_head: Callable[..., nn.Module],
        *,
        logit_temperature: float,
        logit_bias: float,
        num_classes: int,
        in_chans: int,
        global_pool: str,
        drop_rate: float,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if drop_rate != 0:
            raise ValueError(f"drop_rate={drop_rate}: a {type(self).__name__} has no dropout; leave it at 0")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False
        self.encoding = InverseEncoding(in_chans, min_size=prod(layer.stride[0] for layer in layers))
        self.stages = nn.Sequential()
        self.feature_info = []
        for index, end in enumerate(accumulate(depths)):
            reduction = prod(layer.stride[0] for layer in layers[:end])
            info = {"num_chs": layers[end - 1].out_channels, "reduction": reduction, "module": f"stages.{index}"}
            self.feature_info.append(info)
            self.stages.append(ConvStage(*layers[end - depths[index] : end]))

        self.num_features = self.head_hidden_size = layers[-1].out_channels
        self._head = make_head
        self.head = self._make_head(device, dtype)
        # Pooling stands behind the classifier: each position votes for the classes, and the votes are pooled.
        self.global_pool = GlobalPool(global_pool)
        self.logits = Logits(logit_temperature, logit_bias)
        # timm would not adapt both halves of the encoding to other colours: checkpoint_filter_fn does it.
        self._traits = {"first_conv": None}

    def _make_head(self, device=None, dtype=None) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        return self._head(self.num_features, self.num_classes, device=device, dtype=dtype)

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
