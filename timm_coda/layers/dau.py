"""Layers of dynamic alignment units (DAUs), the building block of CoDA-Nets."""

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from .base import DynamicLinear
from .functional import ACTIVATIONS, dau_conv2d, dau_linear

__all__ = [
    "DAUConv2d",
    "DAULinear",
]


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class _Down(nn.Module):
    """Hold B as `weight`, the name that timm expects in a layer."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class _Up(nn.Module):
    """Hold A and b as `weight` and `bias`, the names that timm expects in a layer."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)


class _DAU(DynamicLinear):
    """Parameters of `units` dynamic alignment units for inputs of shape `seen`."""

    def __init__(self, units: int, seen: tuple[int, ...], rank: int, activation: str, device, dtype) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: choose one of {', '.join(map(repr, ACTIVATIONS))}")
        for name, value in (("units", units), ("inputs", seen[0]), ("rank", rank)):
            if value < 1:
                raise ValueError(f"{name}={value}: a dynamic alignment layer needs at least 1")
        dd = {"device": device, "dtype": dtype}
        self.rank = rank
        self.activation = activation
        self.down = _Down(torch.empty(rank, *seen, **dd))
        self.up = _Up(torch.empty(units * rank, *seen, **dd), torch.empty(units, *seen, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the papers' two linear maps with PyTorch's default: uniform, bound 1 / sqrt(inputs of the map)."""
        bound = self.down.weight[0].numel() ** -0.5
        nn.init.uniform_(self.down.weight, -bound, bound)
        bound = self.rank**-0.5
        nn.init.uniform_(self.up.weight, -bound, bound)
        nn.init.uniform_(self.up.bias, -bound, bound)

    def extra_repr(self) -> str:
        return f"{self.down.weight.shape[1]}, {self.up.bias.shape[0]}, rank={self.rank}, activation={self.activation!r}"


@register_notrace_module
class DAUConv2d(_DAU):
    """Convolution of dynamic alignment units, (B, C, H, W) to (B, D, H', W').

    Unit d computes y_d = w_d(p)^T p for each patch p, with dynamic weights w(p) = g(A B p + b), so that |y_d| <= |p|.

    Source: Böhle et al., CVPR 2021 (arXiv 2104.00032), section 3.

    Args:
        in_channels: C
        out_channels: D, the number of units
        kernel_size, stride, padding, dilation: as in `torch.nn.Conv2d`, an int or (rows, columns)
        rank: rows of B, which all units share; a higher rank is more expressive and proportionally slower
        activation: g, 'squash' (the papers' default) or 'l2'

    Raises:
        ValueError: `activation` is unknown, or a size is below 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        rank: int = 64,
        activation: str = "squash",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(out_channels, (in_channels, *_pair(kernel_size)), rank, activation, device, dtype)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size: tuple[int, int] = _pair(kernel_size)
        self.stride: tuple[int, int] = _pair(stride)
        self.padding: tuple[int, int] = _pair(padding)
        self.dilation: tuple[int, int] = _pair(dilation)

    def forward(self, x: Tensor) -> Tensor:
        frozen = False
        if not torch.jit.is_scripting():
            frozen = self.frozen_dynamics.held()
        return dau_conv2d(
            x,
            self.down.weight,
            self.up.weight,
            self.up.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.activation,
            frozen,
        )

    def extra_repr(self) -> str:
        conv = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        return f"{super().extra_repr()}, {conv}" + (f", dilation={self.dilation}" if self.dilation != (1, 1) else "")


@register_notrace_module
class DAULinear(_DAU):
    """Dynamic alignment units on the last axis, (..., K) to (..., D). Arguments and errors as in `DAUConv2d`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 64,
        activation: str = "squash",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(out_features, (in_features,), rank, activation, device, dtype)
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        frozen = False
        if not torch.jit.is_scripting():
            frozen = self.frozen_dynamics.held()
        return dau_linear(x, self.down.weight, self.up.weight, self.up.bias, self.activation, frozen)
