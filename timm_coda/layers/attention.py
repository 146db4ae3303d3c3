"""What B-cos transformers need beside `bcos.py`: normalisations, an attention that can be frozen, positions."""

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models import register_notrace_module
from torch import Tensor, nn

from .base import DynamicLinear

__all__ = ["DynamicGroupNorm2d", "DynamicLayerNorm", "FrozenFactor", "SinCosPositions", "freezable"]


def _rescale(x: Tensor, dim: list[int], eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the axes `dim`, float32 or better; the variance a constant to backward."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(x, dim, correction=0, keepdim=True)
    return (x - mean) * (var.detach() + eps).rsqrt()


class DynamicLayerNorm(DynamicLinear):
    """Layer normalisation without bias, (..., C): (x - mean) / sqrt(var + eps) * weight, over the last axis.

    Subtracting the mean is linear; the variance is a constant while `frozen_dynamics` is held.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, *, device=None, dtype=None) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        frozen = False
        if not torch.jit.is_scripting():
            frozen = self.frozen_dynamics.held()
        if frozen:
            return (_rescale(x, [-1], self.eps) * self.weight.detach()).to(x.dtype)
        return F.layer_norm(x, (self.num_features,), self.weight, None, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


class DynamicGroupNorm2d(DynamicLinear):
    """Group normalisation without bias, (B, C, H, W): as `DynamicLayerNorm`, over a group's channels and positions.

    Args:
        num_features: C
        num_groups: divides C; with 1, all channels and positions of an image share their statistics

    Raises:
        ValueError: groups that do not divide the channels.
    """

    def __init__(self, num_features: int, num_groups: int = 1, eps: float = 1e-5, *, device=None, dtype=None) -> None:
        super().__init__()
        if num_groups < 1 or num_features % num_groups:
            raise ValueError(f"num_groups={num_groups} does not divide {num_features} channels")
        self.num_features = num_features
        self.num_groups = num_groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        frozen = False
        if not torch.jit.is_scripting():
            frozen = self.frozen_dynamics.held()
        if frozen:
            groups = x.unflatten(1, (self.num_groups, self.num_features // self.num_groups))
            y = _rescale(groups, [2, 3, 4], self.eps).flatten(1, 2)
            return (y * self.weight.detach()[:, None, None]).to(x.dtype)
        return F.group_norm(x, self.num_groups, self.weight, None, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, num_groups={self.num_groups}, eps={self.eps}"


class FrozenFactor(DynamicLinear):
    """Passes its input on, any shape; a constant to backward while `frozen_dynamics` is held."""

    def forward(self, x: Tensor) -> Tensor:
        frozen = False
        if not torch.jit.is_scripting():
            frozen = self.frozen_dynamics.held()
        return x.detach() if frozen else x


def freezable(attention: Attention) -> Attention:
    """timm's attention whose matrix softmax(q k^T) is a constant to backward while `frozen_dynamics` is held; in place.

    Detached queries and keys are enough: values go through the same fused operation, and no matrix is kept for them.
    """
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name)
        frozen = FrozenFactor().train(norm.training)
        setattr(attention, name, frozen if isinstance(norm, nn.Identity) else nn.Sequential(norm, frozen))
    return attention


class SinCosPositions(nn.Module):
    """Adds sines and cosines of each position to a map of any size, (B, C, H, W) to the same.

    C / 4 frequencies from 1 to 1 / temperature; first those of the column, then of the row.

    Source: Beyer, Zhai, Kolesnikov, `Better plain ViT baselines for ImageNet-1k`, arXiv 2205.01580.

    Raises:
        ValueError: a number of channels that is no multiple of 4 from 8 up.
    """

    def __init__(self, num_features: int, temperature: float = 10000.0) -> None:
        super().__init__()
        if num_features % 4 or num_features < 8:
            raise ValueError(f"num_features={num_features}: two sines and two cosines need a multiple of 4, at least 8")
        self.num_features = num_features
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        # In float32 even for float64: the published embedding, with its rounding.
        bands = self.num_features // 4
        exponents = torch.arange(bands, device=x.device, dtype=torch.float32) / (bands - 1)
        frequencies = (1 / self.temperature**exponents)[:, None]
        columns = frequencies * torch.arange(x.shape[3], device=x.device, dtype=torch.float32)  # (C / 4, W)
        rows = frequencies * torch.arange(x.shape[2], device=x.device, dtype=torch.float32)  # (C / 4, H)
        across = torch.cat([columns.sin(), columns.cos()])[:, None, :].expand(-1, x.shape[2], -1)
        down = torch.cat([rows.sin(), rows.cos()])[:, :, None].expand(-1, -1, x.shape[3])
        return x + torch.cat([across, down]).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, temperature={self.temperature:g}"


for layer in (DynamicGroupNorm2d, DynamicLayerNorm, FrozenFactor, SinCosPositions):
    register_notrace_module(layer)  # as a decorator it would hide their types
