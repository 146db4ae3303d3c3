"""Non-linear parts of converted architectures, as gates that explanations treat as constants."""

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from .base import DynamicLinear

__all__ = ["FrozenActivation", "FrozenGate"]


class FrozenGate(DynamicLinear):
    """Compute x * gate(x), such as squeeze-and-excitation, for x of any shape and a gate that broadcasts against it.

    While `frozen_dynamics` is active, the gate is a constant in backward, so its layers need no B-cos counterparts.
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
    """Compute an activation f with f(0) = 0 as x * (f(x) / x), any shape; while frozen, f(x) / x is a constant."""

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
        y = self.activation(seen.clone()).detach()  # some activations work in place
        gate = torch.where(seen == 0, torch.zeros_like(seen), y / seen)
        return y + (x - seen) * gate  # equals y bit for bit, because x - seen is 0


for layer in (FrozenActivation, FrozenGate):
    register_notrace_module(layer)  # as a decorator it would hide the classes' types
