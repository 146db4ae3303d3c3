"""Perturbation metrics: remove or insert pixels in the order of a map, and measure the model's output."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .base import Baseline, Curve, Explainer, Scores, Subject
from .explainers import encode
from .statistics import spearman

__all__ = ["IDSDS", "Removal", "removal_ranks", "remove"]

_PROBABILITY = "probability of the true class"


@dataclass(frozen=True)
class Removal:
    """Remove or insert pixels step by step, and record the class's probability, the sigmoid of its logit.

    The score of an image is the mean over the curve. Pixels with equal map values are in one fixed random order.
    """

    name: str
    label: str
    about: str
    most_first: bool
    fill: str
    """'zeros' in all encoded channels, which encodes no colour, or the image's 'mean' colour."""
    last: float
    """Share of pixels removed at the end."""
    steps: int
    insert: bool = False
    """Start with an empty image and insert pixels."""

    unit = "mean probability of the true class"
    statistic = "mean"

    @property
    def higher_is_better(self) -> bool:
        return self.insert or not self.most_first

    def baseline(self, subject: Subject) -> Baseline | None:
        return None

    def __call__(self, subject: Subject, explainer: Explainer) -> Scores:
        model, parameter = subject.model, next(subject.model.parameters())
        maps, x = subject.maps(explainer), np.linspace(0, self.last, self.steps + 1)

        @torch.no_grad()
        def curves(place: slice, images: Tensor, labels: Tensor) -> Tensor:
            encoded = encode(model, images.to(parameter.device, parameter.dtype))
            now = torch.from_numpy(np.array(maps[place]))
            # Inserting the most important pixels first is removing the least important first, in reverse.
            ranks = removal_ranks(now, self.most_first != self.insert, subject.seed).to(encoded.device)
            labels = labels.to(encoded.device)[:, None]
            curve = []
            for share in 1 - x if self.insert else x:
                seen = remove(encoded, ranks, round(float(share) * ranks[0].numel()), self.fill)
                curve.append(model(seen).gather(1, labels).float().sigmoid())
            return torch.cat(curve, 1).double().cpu()

        y = torch.cat(subject.for_batches(curves, f"{explainer.label}: {self.label}")).numpy()
        done = "inserted" if self.insert else "removed"
        return Scores(y.mean(1), Curve(x, y, f"share of pixels {done}", _PROBABILITY))


def removal_ranks(maps: Tensor, most_first: bool, seed: int) -> Tensor:
    """Rank pixels by the order of their removal, 0 first, (N, H, W); equal map values are in random order."""
    flat = maps.flatten(1)
    drawn = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(seed))
    order = drawn[torch.sort(flat[:, drawn], dim=1, descending=most_first, stable=True).indices]
    return order.argsort(1).reshape(maps.shape)


def remove(encoded: Tensor, ranks: Tensor, count: int, fill: str) -> Tensor:
    """Replace the first `count` pixels by rank in images (N, C, H, W)."""
    empty = encoded.new_zeros(()) if fill == "zeros" else encoded.mean((2, 3), keepdim=True)
    return torch.where((ranks < count)[:, None], empty, encoded)


@dataclass(frozen=True)
class IDSDS:
    """In-domain single deletion score: rank correlation of a map's patch sums and the logit's drop without each patch.

    Source: Hesse et al., NeurIPS 2024. They fine-tune the model on images without a patch, so that such images are in
    its domain; we measure the model without this fine-tuning.
    """

    patches: int = 4
    """Patches per side."""

    name = "idsds"
    label = "Single deletion (IDSDS)"
    unit = "rank correlation with the logit's fall"
    higher_is_better = True
    statistic = "mean"

    @property
    def about(self) -> str:
        n = self.patches
        return (
            f"Rank correlation between the map's sum over each of {n} x {n} patches and the drop in the true class's "
            "logit when the patch is zero in all encoded channels (IDSDS, Hesse et al. 2024, but the model was not "
            "fine-tuned on such images). A constant map counts as 0."
        )

    def baseline(self, subject: Subject) -> Baseline:
        return Baseline(0.0, "random order")

    def __call__(self, subject: Subject, explainer: Explainer) -> Scores:
        model, parameter = subject.model, next(subject.model.parameters())
        maps, n = subject.maps(explainer), self.patches
        rows, columns = (torch.arange(size) * n // size for size in maps.shape[1:])
        patch = rows[:, None] * n + columns  # of each pixel, (H, W)
        masks = torch.stack([patch == k for k in range(n * n)])

        @torch.no_grad()
        def correlations(place: slice, images: Tensor, labels: Tensor) -> np.ndarray:
            encoded = encode(model, images.to(parameter.device, parameter.dtype))
            labels = labels.to(encoded.device)[:, None]
            gone = [model(encoded * ~mask.to(encoded.device)).gather(1, labels) for mask in masks]
            falls = model(encoded).gather(1, labels) - torch.cat(gone, 1)
            sums = np.einsum("nhw,khw->nk", np.array(maps[place], np.float64), masks.numpy().astype(np.float64))
            return spearman(sums, falls.double().cpu().numpy())

        return Scores(np.concatenate(subject.for_batches(correlations, f"{explainer.label}: {self.label}")))
