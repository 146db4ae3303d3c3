"""B-cos layers and the normalisations of B-cos networks: y = W(x) x, where backward can hold W(x) constant."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from .base import DynamicLinear, InverseEncoding
from .functional import bcos_conv2d, bcos_linear
from .kernels.batch_norm import channel_variance, rescale_channels, uncentered_batch_norm
from .kernels.bcos_alignment import NORM_EPS
from .kernels.half import widened

__all__ = ["BatchNormUncentered2d", "BcosConv2d", "BcosLinear", "EncodedBcosConv2d", "PositionNorm2d"]


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class _Bcos(DynamicLinear):
    """Weights of `units` B-cos units for inputs of shape `seen`; each unit is the largest of `max_out` candidates."""

    def __init__(
        self,
        units: int,
        seen: tuple[int, ...],
        b: float,
        max_out: int,
        scale: float,
        unit_norm: bool,
        norm_eps: float,
        device,
        dtype,
    ) -> None:
        super().__init__()
        for name, value in (("units", units), ("inputs", seen[0]), ("max_out", max_out), ("b", b)):
            if not value >= 1:
                raise ValueError(f"{name}={value}: a B-cos layer needs at least 1")
        if not scale > 0:
            raise ValueError(f"scale={scale}: must be above 0, it divides the output")
        self.b = float(b)
        self.max_out = max_out
        self.scale = float(scale)
        self.unit_norm = unit_norm
        self.norm_eps = norm_eps
        self.weight = nn.Parameter(torch.empty(units * max_out, *seen, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise with He's normal distribution. With `unit_norm`, the output depends only on the directions."""
        nn.init.kaiming_normal_(self.weight)

    def extra_repr(self) -> str:
        options = f"b={self.b:g}, max_out={self.max_out}, scale={self.scale:g}"
        return options if self.unit_norm else f"{options}, unit_norm=False"


class BcosConv2d(_Bcos):
    """B-cos convolution without bias, (B, C, H, W) to (B, D, H', W'): y = w^T p |cos(w, p)|^(b-1) / s for patches p.

    Source: Böhle et al., CVPR 2022 (arXiv 2205.10268), section 3.

    Args:
        in_channels: C
        out_channels: D
        kernel_size, stride, padding, dilation, groups: as in `torch.nn.Conv2d`, an int or (rows, columns)
        b: exponent, B in the papers, at least 1; 2 in most published models; 1 gives a linear layer
        max_out: number of candidates per unit, of which the largest is the output; 2 in B-cos v1
        scale: s, divides the output; 1 in B-cos v2
        unit_norm: scale each w to norm 1; False (free weights) in B-cosification
        norm_eps: added to |p|^2; 1e-6 in published convolutions, 1e-24 in published linear layers

    Raises:
        ValueError: a size or `b` is below 1, `scale` is not above 0, or `groups` does not divide the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        b: float = 2.0,
        max_out: int = 1,
        scale: float = 1.0,
        unit_norm: bool = True,
        norm_eps: float = NORM_EPS,
        device=None,
        dtype=None,
    ) -> None:
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} does not divide {in_channels} input and {out_channels} output channels")
        seen = (in_channels // groups, *_pair(kernel_size))
        super().__init__(out_channels, seen, b, max_out, scale, unit_norm, norm_eps, device, dtype)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size: tuple[int, int] = _pair(kernel_size)
        self.stride: tuple[int, int] = _pair(stride)
        self.padding: tuple[int, int] = _pair(padding)
        self.dilation: tuple[int, int] = _pair(dilation)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x)

    def _convolve(self, x: Tensor) -> Tensor:
        frozen = False
        if not torch.jit.is_scripting():
            frozen = self.frozen_dynamics.held()
        return bcos_conv2d(
            x,
            self.weight,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.b,
            self.max_out,
            self.scale,
            self.unit_norm,
            frozen,
            self.norm_eps,
        )

    def extra_repr(self) -> str:
        conv = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding != (0, 0):
            conv += f", padding={self.padding}"
        if self.dilation != (1, 1):
            conv += f", dilation={self.dilation}"
        if self.groups != 1:
            conv += f", groups={self.groups}"
        return f"{conv}, {super().extra_repr()}"


class EncodedBcosConv2d(BcosConv2d):
    """First layer of a network: encode images (B, C, H, W) as (B, 2C, H, W), then apply `BcosConv2d`.

    Because this layer includes the encoding, the rest of the network needs no change.

    Args:
        in_chans: C, number of colour channels; `in_channels` is 2C
        out_channels, kernel_size, options: as in `BcosConv2d`

    Raises:
        ValueError: as in `BcosConv2d`; in the forward pass, as in `InverseEncoding`.
    """

    def __init__(
        self, in_chans: int, out_channels: int, kernel_size: int | tuple[int, int] = 1, **options: Any
    ) -> None:
        super().__init__(2 * in_chans, out_channels, kernel_size, **options)
        self.encoding = InverseEncoding(in_chans)

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(self.encoding(x))


class BcosLinear(_Bcos):
    """B-cos units on the last axis, (..., K) to (..., D), without bias. Arguments and errors as in `BcosConv2d`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        b: float = 2.0,
        max_out: int = 1,
        scale: float = 1.0,
        unit_norm: bool = True,
        norm_eps: float = NORM_EPS,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(out_features, (in_features,), b, max_out, scale, unit_norm, norm_eps, device, dtype)
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        frozen = False
        if not torch.jit.is_scripting():
            frozen = self.frozen_dynamics.held()
        return bcos_linear(x, self.weight, self.b, self.max_out, self.scale, self.unit_norm, frozen, self.norm_eps)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {super().extra_repr()}"


class BatchNormUncentered2d(DynamicLinear):
    """Batch normalisation that only rescales, (B, C, H, W): x * weight / sqrt(var + eps).

    var is the usual variance about the batch's mean, but nothing is subtracted from x or added to it. So the layer is
    linear when var is constant: always in evaluation, and in training while `frozen_dynamics` is active. The running
    variance is updated only in training that is not frozen, with the batch's biased variance, as in the published
    models.

    Source: Böhle et al., TPAMI 2024 (arXiv 2306.10898), section 3.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, *, device=None, dtype=None) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.running_var: Tensor
        self.register_buffer("running_var", torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.ones_(self.running_var)

    def forward(self, x: Tensor) -> Tensor:
        frozen = False
        if not torch.jit.is_scripting():
            frozen = self.frozen_dynamics.held()
        if not self.training:
            return rescale_channels(x, self.weight.detach() if frozen else self.weight, self.running_var, self.eps)
        if frozen:
            return rescale_channels(x, self.weight.detach(), channel_variance(x.detach()), self.eps)
        y, var = uncentered_batch_norm(x, self.weight, self.eps)
        self.running_var.copy_(torch.lerp(self.running_var, var.detach().to(self.running_var.dtype), self.momentum))
        return y

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


class PositionNorm2d(DynamicLinear):
    """Layer normalisation over the channels of each position, (B, C, H, W): (x - mean) / sqrt(var + eps) * weight.

    Subtracting the mean is linear. While `frozen_dynamics` is active, the variance is a constant in backward.
    """

    def __init__(self, num_features: int, eps: float = 1e-6, *, device=None, dtype=None) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        frozen = False
        if not torch.jit.is_scripting():
            frozen = self.frozen_dynamics.held()
        if not frozen:
            channels_last = x.permute(0, 2, 3, 1)
            return F.layer_norm(channels_last, (self.num_features,), self.weight, None, self.eps).permute(0, 3, 1, 2)
        var, mean = torch.var_mean(widened(x), dim=1, unbiased=False, keepdim=True)
        factor = (var.detach() + self.eps).rsqrt() * self.weight.detach()[:, None, None]
        return ((x - mean) * factor).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


for layer in (BcosConv2d, EncodedBcosConv2d, BcosLinear, BatchNormUncentered2d, PositionNorm2d):
    register_notrace_module(layer)  # as a decorator it would hide the classes' types
