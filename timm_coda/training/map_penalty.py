"""Differentiable linear maps W(x) of CoDA-Nets, to penalise their size during training.

An explanation treats the dynamic weights as constants, so it provides no gradient for training. This module computes
the same matrix product W(x) from the inputs that each layer had in the forward pass. The result is differentiable with
respect to everything that W(x) depends on: the layers' parameters and, through the inputs, all earlier layers.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import DAUConv2d, rescaling, squared_norm, widened
from ..models import CodaNet

__all__ = ["MapPenalty", "linear_map"]


class MapPenalty:
    """Strength times mean |W_c(x)| for the images of the last training step: the true class and a random other class.

    W_c(x) is the linear map from the encoded image to the pooled output of class c, before the logit temperature.
    Penalising it makes contribution maps sparser: fewer pixels matter. Source: Böhle et al., CVPR 2021 (arXiv
    2104.00032), the second term of the loss.

    Args:
        model: the model; unless strength is 0, its training steps are recorded from now on
        strength: the factor, lambda in the paper
        mixed: whether training images are mixtures (Mixup, CutMix)

    Raises:
        ValueError: the model is not a CoDA-Net with pooled classes, or images are mixed.
    """

    def __init__(self, model: nn.Module, strength: float, *, mixed: bool = False) -> None:
        self.strength = strength
        if strength == 0:
            return
        if mixed:
            raise ValueError("it needs one class per image: remove --mixup and --cutmix")
        if not isinstance(model, CodaNet) or not model.num_classes or model.global_pool.pool_type == "":
            raise ValueError(f"a {type(model).__name__} is not supported: choose a CoDA-Net with pooled classes")
        self.model = model
        self._inputs: list[tuple[Any, Tensor]] = []  # each layer with its input
        self._autocast: Any = nullcontext()
        model.register_forward_pre_hook(lambda *_: self._inputs.clear())
        for layer in model.modules():
            if isinstance(layer, DAUConv2d):
                layer.register_forward_pre_hook(self._keep)

    def _keep(self, layer: Any, inputs: tuple[Tensor]) -> None:
        if layer.training:
            kind = inputs[0].device.type
            low = torch.get_autocast_dtype(kind)
            # W(x) has numbers below the range of float16.
            enabled = torch.is_autocast_enabled(kind) and low != torch.float16
            self._autocast = torch.autocast(kind, low, enabled)
            self._inputs.append((layer, widened(inputs[0])))

    def __call__(self, labels: Tensor) -> Tensor | float:
        """Return the penalty for images with the true classes `labels` (B,)."""
        if self.strength == 0:
            return 0.0
        classes = self.model.num_classes
        chosen = labels[:, None]
        if classes > 1:
            other = torch.randint(1, classes, labels.shape).to(labels.device)  # drawn on the CPU: the same everywhere
            chosen = torch.stack([labels, (labels + other) % classes], 1)
        inputs, self._inputs = self._inputs[: self._layers()], []
        average = self.model.global_pool.pool_type == "avg"
        with self._autocast:  # as in the forward pass, but float32 for float16
            weights = linear_map(inputs, chosen, average=average)
        return self.strength * weights.to(torch.promote_types(weights.dtype, torch.float32)).abs().mean()

    def _layers(self) -> int:
        return sum(isinstance(layer, DAUConv2d) for layer in self.model.modules())


def linear_map(inputs: list[tuple[Any, Tensor]], classes: Tensor, *, average: bool) -> Tensor:
    """Return the linear map W (B, T, C, H, W) from the first layer's input to the last layer's pooled outputs.

    Args:
        inputs: each layer, a `DAUConv2d`, with its input (B, C, H, W), in the order of the forward pass
        classes: units of the last layer to compute W for, (B, T)
        average: whether the output is pooled over positions by mean instead of sum
    """
    images, count = classes.shape
    rows: Tensor | None = None  # of W, at a layer's output: (B, T, D, H', W')
    for layer, x in reversed(inputs):
        z = F.conv2d(x, layer.down.weight, None, layer.stride, layer.padding, layer.dilation)  # (B, r, H', W')
        if rows is None:
            share = 1 / z[0, 0].numel() if average else 1.0
            units = F.one_hot(classes, len(layer.up.bias)).to(z.dtype) * share
            rows = units[..., None, None].expand(*units.shape, *z.shape[2:])
        with torch.autocast(x.device.type, enabled=False):
            factor = rescaling(squared_norm(z, layer.up.weight, layer.up.bias), layer.activation)  # (B, D, H', W')
        scaled = rows * factor.to(rows.dtype).unsqueeze(1)
        turned = scaled.unsqueeze(3) * z[:, None, None]  # (B, T, D, r, H', W')
        sizes = zip(
            x.shape[2:], z.shape[2:], layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True
        )
        beyond = [size - ((out - 1) * s - 2 * p + d * (k - 1) + 1) for size, out, k, s, p, d in sizes]
        moves: Any = (layer.stride, layer.padding, beyond, 1, layer.dilation)
        rows = F.conv_transpose2d(turned.flatten(2, 3).flatten(0, 1), layer.up.weight, None, *moves)
        rows = rows + F.conv_transpose2d(scaled.flatten(0, 1), layer.up.bias, None, *moves)
        rows = rows.unflatten(0, (images, count))
    assert rows is not None, "no layer inputs were recorded"
    return rows
