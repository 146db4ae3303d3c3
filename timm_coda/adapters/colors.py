"""Perturbed images as valid colours, and the one call of `explain` that all adapters share."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..explanation import Explanation, explain


class ValidColors(nn.Module):
    """The model behind a clamp to [0, 1], for libraries that add noise or fill images with values of their own.

    A model encodes colours as (c, 1 - c), which means nothing outside [0, 1]: without the clamp a metric measures how
    the model does on impossible colours. Inside [0, 1] it changes neither values nor gradients. The adapters explain
    it as what it is: the model at the clamped images.

    Args:
        model: one of ours, also inside DDP or torch.compile; takes colours (N, C, H, W).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model
        self.train(model.training)

    def forward(self, images: Tensor) -> Tensor:
        return self.module(_clamped(images))


def explain_colors(model: nn.Module, images: Tensor, target: int | Sequence[int] | Tensor | None) -> Explanation:
    """`explain(model, images, target)`, where the model may be `ValidColors`."""
    return explain(model, _clamped(images) if isinstance(model, ValidColors) else images, target)


def _clamped(images: Tensor) -> Tensor:
    # Not Tensor.clamp: at exactly 0 and 1, that is in black and white pixels, its gradient is 0 in some releases.
    return torch.where(images < 0, 0, torch.where(images > 1, 1, images))
