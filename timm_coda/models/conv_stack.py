"""Plain stack of dynamic-linear convolutions, the common base of CoDA-Nets and the nine-layer B-cos network."""

# torch annotates torch.jit.ignore only for calls with a flag:
# pyright: reportArgumentType=false

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod
from typing import Any

import torch
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..explanation import ExplainMixin, forget_names
from ..hub import HubMixin
from ..layers import DynamicLinear, GlobalPool, InverseEncoding, Logits, placement

__all__ = ["STAGE_FEATURES", "ConvStack"]

# timm's default for features_only, FeatureListNet, drops calls outside the stages, such as the encoding.
STAGE_FEATURES = {"out_indices": (0, 1, 2), "feature_cls": "getter"}


class ConvStage(nn.Sequential):
    """Layers of one stage, optionally recomputed in the backward pass to save memory."""

    def __init__(self, *layers: DynamicLinear) -> None:
        super().__init__(*layers)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        # Recomputation in the backward pass may run in another thread, where explanation mode is off.
        if not torch.jit.is_scripting():
            frozen: Any = self[0].frozen_dynamics
            if self.grad_checkpointing and not frozen.held():
                return checkpoint_seq(self, x)
        for layer in self:
            x = layer(x)
        return x


class ConvStack(ExplainMixin, HubMixin, nn.Module):
    """Stack of convolutions with a classifier for each position.

    Maps RGB images in [0, 1] (B, 3, H, W), or encoded images (B, 6, H, W), to logits (B, num_classes).

    Args:
        layers: convolutions before the head; the first takes encoded images
        depths: number of these layers in each stage
        make_head: creates the classifier, a convolution, from input channels, output channels, `device` and `dtype`
        logit_temperature, logit_bias: as in `Logits`
        num_classes: number of classes; 0 returns pooled features
        in_chans: colour channels of an image
        global_pool: as in `GlobalPool`
        drop_rate: must be 0; it exists because timm's training script passes it to every model

    Raises:
        ValueError: `drop_rate` is not 0.
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
        # Pooling follows the classifier: each position votes for the classes, and the votes are pooled.
        self.global_pool = GlobalPool(global_pool)
        self.logits = Logits(logit_temperature, logit_bias)
        # timm cannot adapt both halves of the encoding to other colour channels: checkpoint_filter_fn does it.
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
        forget_names(self)
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = GlobalPool(global_pool).train(self.training)
        self.head = self._make_head(**placement(self)).train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the final features and a list with the features of the selected stages.

        Args:
            x: images, as in `forward`
            indices: stages to select: the last n if an int, all if None, else their indices
            norm: no effect, because there is no norm layer
            stop_early: stop after the last selected stage
            output_fmt: must be 'NCHW'
            intermediates_only: return only the list

        Raises:
            ValueError: another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: only 'NCHW' is supported")
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
        """Remove the stages after the last of `indices`; return the selected stage indices."""
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
