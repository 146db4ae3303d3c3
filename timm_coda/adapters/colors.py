"""Clamp perturbed images to valid colours, and call `explain` for all adapters."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..explanation import Explanation, explain


class ValidColors(nn.Module):
    """Clamp images to [0, 1] before the model, for libraries that add noise or fill images with their own values.

    Models encode colours as (c, 1 - c), which is meaningless outside [0, 1]: without the clamp, a metric measures the
    model on impossible colours. Inside [0, 1] the clamp changes neither values nor gradients. The adapters explain the
    model at the clamped images.

    Args:
        model: a timm_coda model, also inside DDP or torch.compile; takes colours (N, C, H, W)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model
        self.train(model.training)

    def forward(self, images: Tensor) -> Tensor:
        return self.module(_clamped(images))


def explain_colors(
    model: nn.Module, images: Tensor, target: int | Sequence[int] | Tensor | None, *, layer: str | None = None
) -> Explanation:
    """Return `explain(model, images, target, layer=layer)`, at the clamped images if the model is `ValidColors`."""
    return explain(model, _clamped(images) if isinstance(model, ValidColors) else images, target, layer=layer)


def _clamped(images: Tensor) -> Tensor:
    # Not Tensor.clamp: in some releases its gradient is 0 at exactly 0 and 1, that is, for black and white pixels.
    return torch.where(images < 0, 0, torch.where(images > 1, 1, images))
