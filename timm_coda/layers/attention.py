"""Further layers of B-cos transformers: normalisations, attention that can be frozen, position embeddings."""

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models import register_notrace_module
from torch import Tensor, nn

from .base import DynamicLinear
from .kernels.transforms import is_transformed

__all__ = ["DynamicGroupNorm2d", "DynamicLayerNorm", "FrozenFactor", "SinCosPositions", "freezable"]


def _rescale(x: Tensor, dim: list[int], eps: float) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) over the axes `dim`, in float32 or better; var is a constant in backward."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(x, dim, correction=0, keepdim=True)
    return (x - mean) * (var.detach() + eps).rsqrt()


class DynamicLayerNorm(DynamicLinear):
    """Layer normalisation without bias over the last axis, (..., C): (x - mean) / sqrt(var + eps) * weight.

    Subtracting the mean is linear. While `frozen_dynamics` is active, the variance is a constant in backward.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, *, device=None, dtype=None) -> None:
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
        if frozen:
            return (_rescale(x, [-1], self.eps) * self.weight.detach()).to(x.dtype)
        return F.layer_norm(x, (self.num_features,), self.weight, None, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


class DynamicGroupNorm2d(DynamicLinear):
    """Group normalisation without bias, (B, C, H, W): `DynamicLayerNorm` over each group's channels and positions.

    Args:
        num_features: C
        num_groups: must divide C; with 1, all channels and positions of an image share one mean and variance
        eps: added to the variance

    Raises:
        ValueError: `num_groups` does not divide `num_features`.
    """

    def __init__(self, num_features: int, num_groups: int = 1, eps: float = 1e-5, *, device=None, dtype=None) -> None:
        super().__init__()
        if num_groups < 1 or num_features % num_groups:
            raise ValueError(f"num_groups={num_groups} does not divide {num_features} channels")
        self.num_features = num_features
        self.num_groups = num_groups
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

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
    """Identity for queries or keys (..., N, C), a constant in backward while `frozen_dynamics` is active."""

    def forward(self, x: Tensor) -> Tensor:
        frozen = False
        if not torch.jit.is_scripting():
            frozen = self.frozen_dynamics.held()
            if is_transformed():
                # Fused attention needs adjacent numbers, and has first derivatives in reverse mode only.
                x = x.mT.contiguous().mT
        return x.detach() if frozen else x


def freezable(attention: Attention) -> Attention:
    """Make softmax(q k^T) of timm's attention a constant in backward while `frozen_dynamics` is active.

    Modifies `attention` in place and returns it. Detaching queries and keys is enough: the values still go through the
    fused operation, so the attention matrix is never stored.
    """
    for name in ("q_norm", "k_norm"):
        norm = getattr(attention, name)
        frozen = FrozenFactor().train(norm.training)
        setattr(attention, name, frozen if isinstance(norm, nn.Identity) else nn.Sequential(norm, frozen))
    return attention


class SinCosPositions(nn.Module):
    """Add a sine-cosine position embedding to a feature map of any size, (B, C, H, W) to (B, C, H, W).

    The C / 4 frequencies go from 1 to 1 / temperature. The first C / 2 channels encode the column, the rest the row.

    Source: Beyer, Zhai, Kolesnikov, `Better plain ViT baselines for ImageNet-1k`, arXiv 2205.01580.

    Raises:
        ValueError: `num_features` is not a multiple of 4, or below 8.
    """

    def __init__(self, num_features: int, temperature: float = 10000.0) -> None:
        super().__init__()
        if num_features % 4 or num_features < 8:
            raise ValueError(f"num_features={num_features}: use a multiple of 4, at least 8, for 2 sines and 2 cosines")
        self.num_features = num_features
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        # In float32 even for float64 inputs, to reproduce the rounding of the published embedding.
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
    register_notrace_module(layer)  # as a decorator it would hide the classes' types
