"""What train.py's networks learn with, beyond timm's: losses by name, and limits for gradients."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn

__all__ = ["LOSSES", "SCHEDULES", "limit_gradients", "make_loss"]

LOSSES = ("bce", "bce-uniform", "ce")
SCHEDULES = ("cosine", "step", "poly", "tanh", "wsd", "constant")


class UniformBCE(nn.Module):
    """Binary cross entropy whose wrong classes are each wanted with probability 1 / classes, and the right one with 1.

    With the logit bias -log(classes - 1) nothing is lost where nothing is seen. Source: Böhle et al., TPAMI 2024 (arXiv
    2306.10898), section 4.
    """

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean over images and classes; `target` are classes (B,), or probabilities (B, classes)."""
        classes = logits.shape[-1]
        if target.shape != logits.shape:
            target = F.one_hot(target, classes).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, target.clamp(min=1 / classes))


def make_loss(name: str, smoothing: float) -> nn.Module:
    """One of `LOSSES`, with smoothed labels; those of bce-uniform are what they are."""
    if name == "bce":
        return BinaryCrossEntropy(smoothing)
    return UniformBCE() if name == "bce-uniform" else nn.CrossEntropyLoss(label_smoothing=smoothing)


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
