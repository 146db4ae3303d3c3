"""timm's optimisers; Muon computes in float32 on CPUs without bfloat16 instructions."""

import functools
from typing import Any

import torch
from timm.optim import create_optimizer_v2, muon
from torch import nn

from ..layers import is_emulated

__all__ = ["Float32Muon", "create_optimizer"]


class Float32Muon(muon.Muon):
    """timm's Muon, which orthogonalises updates in float32 instead of bfloat16.

    timm's function has an argument for the dtype, but its optimiser has no option that sets it.
    """

    def step(self, closure: Any = None) -> Any:
        original = muon.zeropower_via_newtonschulz
        muon.zeropower_via_newtonschulz = functools.partial(original, dtype=torch.float32)
        try:
            return super().step(closure)
        finally:
            muon.zeropower_via_newtonschulz = original


def create_optimizer(model: nn.Module, device: torch.device, **options: Any) -> torch.optim.Optimizer:
    """Return `timm.optim.create_optimizer_v2(model, **options)`, fit for a model that is trained on `device`."""
    optimizer = create_optimizer_v2(model, **options)
    inner = getattr(optimizer, "_base_optimizer", optimizer)  # of timm's Lookahead
    if isinstance(inner, muon.Muon) and device.type == "cpu" and is_emulated(torch.bfloat16):
        inner.__class__ = Float32Muon
    return optimizer
