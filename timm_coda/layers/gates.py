"""Non-linear parts that a converted architecture keeps, as gates that an explanation holds constant."""

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from .base import DynamicLinear

__all__ = ["FrozenActivation", "FrozenGate"]


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


for layer in (FrozenActivation, FrozenGate):
    register_notrace_module(layer)  # as a decorator it would hide their types
