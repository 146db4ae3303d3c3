"""Weight updates: clip gradients, and skip updates whose gradient is not finite."""

from typing import Any

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import nn

__all__ = ["Updates", "limit_gradients"]


def limit_gradients(accelerator: Any, model: nn.Module, norm: float, adaptive: float) -> None:
    """Clip gradients in place, unless they are still being accumulated.

    Args:
        accelerator: Accelerate's, which knows whether gradients are being accumulated
        model: the model whose gradients are clipped
        norm: largest norm of the whole gradient; 0: no limit
        adaptive: largest norm of a unit's gradient, relative to the norm of its weights; 0: no limit. Source: Brock et
            al., ICML 2021 (arXiv 2102.06171), as in timm
    """
    if not accelerator.sync_gradients:
        return
    if norm:
        accelerator.clip_grad_norm_(model.parameters(), norm)
    if adaptive:
        accelerator.unscale_gradients()
        with torch.no_grad():
            adaptive_clip_grad([weight for weight in model.parameters() if weight.grad is not None], adaptive)


class Updates:
    """Update a network's weights, but skip updates whose gradient is not finite: they would ruin the weights.

    All processes skip the same updates, because gradients are averaged over processes first. A skipped update also
    restores the buffers (running variances) to their values after the last update that was made.

    Args:
        accelerator: Accelerate's, which knows whether gradients are being accumulated
        model, optimizer: as returned by `accelerator.prepare`
        norm, adaptive: as in `limit_gradients`
    """

    def __init__(self, accelerator: Any, model: nn.Module, optimizer: Any, *, norm: float, adaptive: float) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.norm, self.adaptive = norm, adaptive
        self._buffers = [buffer.clone() for buffer in model.buffers()]

    @torch.no_grad()
    def step(self) -> bool:
        """Update the weights, unless gradients are still being accumulated; return False if the update was skipped."""
        if not self.accelerator.sync_gradients:
            return True
        limit_gradients(self.accelerator, self.model, self.norm, self.adaptive)
        if self.accelerator.scaler is None:
            gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
            made = bool(nn.utils.get_total_norm(gradients).isfinite())
            if made:
                self.optimizer.step()
        else:  # float16: the scaler checks gradients, and also skips updates while it adjusts its scale
            self.optimizer.step()
            made = not self.optimizer.step_was_skipped
        self.optimizer.zero_grad()
        for buffer, good in zip(self.model.buffers(), self._buffers, strict=True):
            good.copy_(buffer) if made else buffer.copy_(good)
        return made
