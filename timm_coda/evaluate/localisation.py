"""Localisation metrics: how much evidence for a class lies in its grid cell, or in its object's box."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .base import Baseline, EvaluationError, Explainer, Scores, Subject

__all__ = ["BoxEnergy", "GridLocalisation", "PointingGame", "arrange", "check_size", "choose_grids", "share_in_cells"]


@dataclass(frozen=True)
class GridLocalisation:
    """Share of the evidence for a class in its cell, on grids of confidently recognised images of different classes.

    Source: Böhle et al., CVPR 2021 (arXiv 2104.00032), with confidence .5; Rao et al., CVPR 2022 (arXiv 2205.10435),
    with .99.
    """

    grids: int = 500
    size: int = 3
    """Cells per side."""
    confidence: float = 0.5
    """Probability of an image's class, the sigmoid of its logit, that an image must exceed."""

    unit = "share of positive evidence in the right cell"
    higher_is_better = True
    statistic = "median"

    @property
    def name(self) -> str:
        return "grid_localisation" if self.confidence == 0.5 else f"grid_localisation_{self.confidence:g}"

    @property
    def label(self) -> str:
        return "Grid localisation" if self.confidence == 0.5 else f"Grid localisation, p > {self.confidence:g}"

    @property
    def about(self) -> str:
        n = self.size
        return (
            f"Grids of {n} x {n} images of different classes that the model predicts correctly with p > "
            f"{self.confidence:g}, the most confident first; the share of a class's positive evidence that lies in its "
            "own cell (CoDA-Nets, CVPR 2021). No positive evidence counts as 0."
        )

    def baseline(self, subject: Subject) -> Baseline:
        return Baseline(1 / self.size**2, "uniform map")

    def __call__(self, subject: Subject, explainer: Explainer) -> Scores:
        grids = self.choose(subject)
        step = max(1, subject.batch_size // self.size**2)

        def score(start: int) -> Tensor:
            images, targets = self.make(subject, grids[start : start + step])
            if start == 0:
                check_size(subject, images)
            return share_in_cells(explainer(subject.model, images, targets), self.size)

        scores = subject.share(range(0, len(grids), step), score, f"{explainer.label}: grids")
        return Scores(torch.cat(scores).double().numpy())

    def choose(self, subject: Subject) -> np.ndarray:
        """Return the image indices of each grid, (grids, size^2), as in `choose_grids`."""
        return choose_grids(
            subject.labels,
            subject.logits,
            self.grids,
            self.size,
            confidence=self.confidence,
            seed=subject.seed,
        )

    def make(self, subject: Subject, grids: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the images (G, C, size * H, size * W) of some grids, and their classes, (G, size^2)."""
        cells = subject.load(grids.reshape(-1).tolist())
        return arrange(cells.unflatten(0, grids.shape), self.size), torch.from_numpy(subject.labels[grids])


def choose_grids(
    labels: np.ndarray, logits: np.ndarray, grids: int, size: int, *, confidence: float, seed: int
) -> np.ndarray:
    """Choose the images of each grid: random distinct classes, and for each class its most confident unused image.

    Only images that are predicted correctly, with the sigmoid of their logit above `confidence`, are used. No image is
    in two grids, so there are fewer grids than requested if images run out.

    Args:
        labels: true classes, (N,)
        logits: (N, classes)
        grids: maximum number of grids
        size: cells per side
        confidence: probability that an image must exceed
        seed: seed of the random classes

    Returns:
        Image indices, (grids, size^2), row by row.

    Raises:
        EvaluationError: too few classes have an image that can be used.
    """
    logit = logits[np.arange(len(labels)), labels]
    right = logits.argmax(1) == labels
    sure = right & (logit > math.log(confidence / (1 - confidence)))
    order = np.argsort(-logit, kind="stable")
    free = {c: order[(labels[order] == c) & sure[order]].tolist()[::-1] for c in np.unique(labels[sure]).tolist()}
    if len(free) < size**2:
        what = (
            f"predicts none of {len(labels)} images correctly"
            if not right.any()
            else f"recognises images of {len(free)} classes"
        )
        raise EvaluationError(
            f"the model {what} with p > {confidence:g}, but a grid of {size} x {size} needs {size**2} classes: use a "
            "smaller --grid-size, or another model or dataset"
        )
    random, chosen = np.random.default_rng(seed), []
    while len(chosen) < grids:
        classes = [c for c, images in free.items() if images]
        if len(classes) < size**2:
            break
        chosen.append([free[c].pop() for c in random.choice(classes, size**2, replace=False).tolist()])
    return np.array(chosen)


def arrange(cells: Tensor, size: int) -> Tensor:
    """Arrange images in grids, row by row: (G, size^2, C, H, W) to (G, C, size * H, size * W)."""
    rows = cells.unflatten(1, (size, size))  # (G, row, column, C, H, W)
    return rows.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def share_in_cells(maps: Tensor, size: int) -> Tensor:
    """Compute the share of each class's positive evidence that lies in its own cell.

    Args:
        maps: (G, size^2, size * H, size * W), classes in the order of their cells, row by row

    Returns:
        Shares, (G, size^2); 0 for a map without positive values.
    """
    positive = maps.double().clamp(min=0)
    cells = positive.unflatten(3, (size, -1)).unflatten(2, (size, -1)).sum((3, 5)).flatten(2)  # (G, class, cell)
    inside = cells.diagonal(dim1=1, dim2=2)
    return inside / cells.sum(2).clamp(min=torch.finfo(torch.float64).tiny)


@torch.no_grad()
def check_size(subject: Subject, images: Tensor) -> None:
    """Raise `EvaluationError` if the model does not accept grid images (G, C, H, W)."""
    parameter = next(subject.model.parameters())
    try:
        subject.model(images[:1].to(parameter.device, parameter.dtype))
    except (ValueError, RuntimeError, AssertionError) as error:
        size = " x ".join(map(str, images.shape[2:]))
        raise EvaluationError(
            f"the model does not accept grids, images of {size} pixels: {error}; leave out grid localisation, or "
            "create the model for that size (img_size=) or any size (dynamic_img_size=)"
        ) from error


class _Boxes:
    """Boxes (N, 4) of a subject's first images: left, top, right, bottom in pixels, the last two exclusive."""

    def __init__(self, boxes: Sequence[Sequence[int]] | np.ndarray) -> None:
        self.boxes = np.asarray(boxes)
        whole = self.boxes.ndim == 2 and self.boxes.shape[1] == 4 and np.issubdtype(self.boxes.dtype, np.integer)
        if not whole:
            raise EvaluationError(
                f"boxes are {self.boxes.dtype} {list(self.boxes.shape)}: pass four integers per image: left, top, "
                "right, bottom"
            )

    def inside(self, maps: np.ndarray) -> np.ndarray:
        """Return a mask, True inside each image's box, in the shape of maps (N, H, W)."""
        if len(self.boxes) < len(maps):
            raise EvaluationError(f"{len(self.boxes)} boxes for {len(maps)} images: pass one per image")
        height, width = maps.shape[1:]
        left, top, right, bottom = self.boxes[: len(maps)].T[:, :, None]
        wrong = ((left < 0) | (top < 0) | (right > width) | (bottom > height) | (left >= right) | (top >= bottom))[:, 0]
        if wrong.any():
            number = int(wrong.argmax())
            raise EvaluationError(
                f"box {self.boxes[number].tolist()} of image {number} is empty or not inside {width} x {height} pixels"
            )
        x, y = np.arange(width), np.arange(height)
        return ((x >= left) & (x < right))[:, None, :] & ((y >= top) & (y < bottom))[:, :, None]


class BoxEnergy(_Boxes):
    """Share of positive evidence that lies inside a box around the object.

    Source: the energy-based pointing game of Wang et al., Score-CAM, CVPR workshops 2020 (arXiv 1910.01279).

    Args:
        boxes: pixels in the subject's first images, (N, 4): left, top, right, bottom, the last two exclusive
    """

    name = "box_energy"
    label = "Energy in the box"
    about = "Share of positive evidence for the image's class in its object's box. No positive evidence counts as 0."
    unit = "share of positive evidence in the box"
    higher_is_better = True
    statistic = "mean"

    def baseline(self, subject: Subject) -> Baseline:
        return _box_area(self, subject)

    def __call__(self, subject: Subject, explainer: Explainer) -> Scores:
        maps = subject.maps(explainer)
        inside, total = self.inside(maps), np.zeros(len(maps))
        shares = total.copy()
        for number, one in enumerate(maps):
            positive = one.clip(min=0).astype(np.float64)
            shares[number], total[number] = positive[inside[number]].sum(), positive.sum()
        return Scores(np.divide(shares, total, out=np.zeros_like(total), where=total > 0))


class PointingGame(_Boxes):
    """Whether the maximum of the map lies inside a box around the object.

    Source: Zhang et al., ECCV 2016 (arXiv 1608.00507), without their tolerance of 15 pixels.

    Args:
        boxes: as in `BoxEnergy`
    """

    name = "pointing_game"
    label = "Pointing game"
    about = "Whether the maximum of the map lies inside the object's box; for equal maxima, the share of them inside."
    unit = "hits"
    higher_is_better = True
    statistic = "mean"

    def baseline(self, subject: Subject) -> Baseline:
        return _box_area(self, subject)

    def __call__(self, subject: Subject, explainer: Explainer) -> Scores:
        maps = subject.maps(explainer)
        inside = self.inside(maps)
        return Scores(np.array([area[one == one.max()].mean() for one, area in zip(maps, inside, strict=True)]))


def _box_area(metric: _Boxes, subject: Subject) -> Baseline:
    height, width = subject.load([0]).shape[2:]
    area = metric.inside(np.empty((subject.count, height, width))).mean()
    return Baseline(float(area), "uniform map")
