"""Toy models and subjects whose correct results are computed by hand."""

import numpy as np
import torch
from torch import Tensor, nn

from timm_coda.evaluate import Explainer, Subject


class Linear(nn.Module):
    """Linear model without encoding: logits = bias + sum over pixels of weight * x, weight (classes, C, H, W)."""

    def __init__(self, weight: Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,kchw->bk", x, self.weight) + self.bias


def make_subject(model: nn.Module, images: Tensor, labels: list[int], **settings) -> Subject:
    """Create a subject of in-memory images, with the model's logits."""
    with torch.no_grad():
        logits = model(images).numpy()
    settings = {"count": len(images), "batch_size": 2} | settings
    return Subject(model, lambda numbers: images[list(numbers)], np.array(labels), logits, **settings)


def fixed(maps: Tensor, name: str = "fixed") -> Explainer:
    """Create an explainer that returns these maps (N, H, W); an image's index is the value of its top left pixel."""

    def method(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([maps[int(image[0, 0, 0].round())] for image in images])[:, None].expand(
            -1, targets.shape[1], -1, -1
        )

    return Explainer(name, "Fixed", "For tests.", method)
