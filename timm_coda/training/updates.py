"""Updates of the weights: gradients limited, and skipped where they are not finite."""

from typing import Any

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import nn

__all__ = ["Updates", "limit_gradients"]


def limit_gradients(accelerator: Any, model: nn.Module, norm: float, adaptive: float) -> None:
    """Shorten gradients, all together to `norm`, and each unit's to the share `adaptive` of its weights; 0: leave them.

    While gradients are accumulated nothing is done.

    Source of the second: Brock et al., ICML 2021 (arXiv 2102.06171), as in timm.
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
    """Updates of a network's weights, without those whose gradient is not finite, which would spoil them for good.

    After all processes' gradients are averaged all see the same, so all skip the same. With a skipped update, buffers
    (running variances) go back to what they were after the update before.

    Args:
        accelerator: Accelerate's, which knows when gradients are accumulated
        model, optimizer: as `accelerator.prepare` gave them
        norm, adaptive: of `limit_gradients`
    """

    def __init__(self, accelerator: Any, model: nn.Module, optimizer: Any, *, norm: float, adaptive: float) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.norm, self.adaptive = norm, adaptive
        self._buffers = [buffer.clone() for buffer in model.buffers()]

    @torch.no_grad()
    def step(self) -> bool:
        """The update that the gradients ask for, or nothing while they are accumulated. False if it was skipped."""
        if not self.accelerator.sync_gradients:
            return True
        limit_gradients(self.accelerator, self.model, self.norm, self.adaptive)
        if self.accelerator.scaler is None:
            gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
            made = bool(nn.utils.get_total_norm(gradients).isfinite())
            if made:
                self.optimizer.step()
        else:  # float16: the scaler looks, and skips updates also while it looks for its scale
            self.optimizer.step()
            made = not self.optimizer.step_was_skipped
        self.optimizer.zero_grad()
        for buffer, good in zip(self.model.buffers(), self._buffers, strict=True):
            good.copy_(buffer) if made else buffer.copy_(good)
        return made
