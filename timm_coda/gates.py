"""Non-linear parts that a converted architecture keeps, as a gate or a statistic that an explanation holds constant."""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from .layers import DynamicLinear

__all__ = ["FrozenActivation", "FrozenGate", "GroupNormDetachable", "LayerNormDetachable"]


class FrozenGate(DynamicLinear):
    """x * gate(x), such as squeeze-excitation: any shape, with a gate that broadcasts against it.

    While `frozen_dynamics` is held, the gate is a constant, so that nothing inside it needs a B-cos counterpart.
    """

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        frozen = False
        if not torch.jit.is_scripting():
            frozen = self.frozen_dynamics.held()
        return x * (self.gate(x.detach()).detach() if frozen else self.gate(x))


class FrozenActivation(DynamicLinear):
    """An activation f with f(0) = 0 as x * (f(x) / x), any shape; the quotient is a constant while frozen."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        frozen = False
        if not torch.jit.is_scripting():
            frozen = self.frozen_dynamics.held()
        if not frozen:
            return self.activation(x)
        seen = x.detach()
        y = self.activation(seen.clone()).detach()  # some work in place
        gate = torch.where(seen == 0, torch.zeros_like(seen), y / seen)
        return y + (x - seen) * gate  # the sum is y to the last bit


class LayerNormDetachable(DynamicLinear):
    """Layer normalisation of the last axis without bias: (..., C), (x - mean) / sqrt(var + eps) * weight.

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
        if not frozen:
            return F.layer_norm(x, (self.num_features,), self.weight, None, self.eps)
        var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        return ((x - mean) * ((var.detach() + self.eps).rsqrt() * self.weight.detach())).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


class GroupNormDetachable(DynamicLinear):
    """Group normalisation without bias: (B, C, H, W), (x - mean) / sqrt(var + eps) * weight within groups of channels.

    Subtracting the mean is linear; the variance is a constant while `frozen_dynamics` is held.
    """

    def __init__(self, num_groups: int, num_features: int, eps: float = 1e-5, *, device=None, dtype=None) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.num_features = num_features
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        frozen = False
        if not torch.jit.is_scripting():
            frozen = self.frozen_dynamics.held()
        if not frozen:
            return F.group_norm(x, self.num_groups, self.weight, None, self.eps)
        grouped = x.unflatten(1, (self.num_groups, self.num_features // self.num_groups))
        var, mean = torch.var_mean(grouped, dim=(2, 3, 4), correction=0, keepdim=True)
        scaled = ((grouped - mean) * (var.detach() + self.eps).rsqrt()).flatten(1, 2)
        return (scaled * self.weight.detach()[:, None, None]).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_features}, eps={self.eps}"


for layer in (FrozenActivation, FrozenGate, GroupNormDetachable, LayerNormDetachable):
    register_notrace_module(layer)  # as a decorator it would hide their types
