"""Toy models and subjects whose right answers are known by hand."""

import numpy as np
import torch
from torch import Tensor, nn

from timm_coda.evaluate import Explainer, Subject


class Linear(nn.Module):
    """logits = sum over pixels of weight * x, and a bias; weight (classes, C, H, W). No encoding."""

    def __init__(self, weight: Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,kchw->bk", x, self.weight) + self.bias


def make_subject(model: nn.Module, images: Tensor, labels: list[int], **settings) -> Subject:
    """A subject of images in memory; its logits are the model's."""
    with torch.no_grad():
        logits = model(images).numpy()
    settings = {"count": len(images), "batch_size": 2} | settings
    return Subject(model, lambda numbers: images[list(numbers)], np.array(labels), logits, **settings)


def fixed(maps: Tensor, name: str = "fixed") -> Explainer:
    """An explainer that gives these maps (N, H, W), whatever it is asked; images carry their number in their corner."""

    def method(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([maps[int(image[0, 0, 0].round())] for image in images])[:, None].expand(
            -1, targets.shape[1], -1, -1
        )

    return Explainer(name, "Fixed", "For tests.", method)
