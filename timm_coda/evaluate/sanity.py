"""Sanity checks of explanations: whether maps depend on the model, on the class, and on noise, and how sparse they are.

They say what a map does, not that it is right: a map that is the same for all images is not sensitive to noise. Read
them beside the metrics of localisation and of pixel removal.
"""

import copy
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import derive_seed
from . import statistics
from .base import Baseline, Curve, EvaluationError, Explainer, Scores, Subject, progress_bar
from .localisation import GridLocalisation, check_size

__all__ = ["ContrastiveLocalisation", "NoiseSensitivity", "Randomisation", "Sparseness"]


class NoiseSensitivity:
    """Largest relative change of a map under small uniform noise (Yeh et al., NeurIPS 2019: max-sensitivity).

    Args:
        radius: noise is uniform in [-radius, radius] a colour; noisy images are clamped to [0, 1]
        draws: noisy copies an image
        images: at most so many, the first ones
    """

    name = "noise_sensitivity"
    label = "Sensitivity to noise"
    unit = "relative change of the map"
    higher_is_better = False
    statistic = "median"

    def __init__(self, *, radius: float = 0.02, draws: int = 5, images: int = 100) -> None:
        self.radius, self.draws, self.images = radius, draws, images
        self.about = (
            f"|map of the noisy image - map| / |map|, the largest of {draws} draws of uniform noise of at most "
            f"{radius:g} a colour, first {images} images (Yeh et al., NeurIPS 2019). A map that is the same for all "
            "images scores 0."
        )

    def baseline(self, subject: Subject) -> Baseline:
        return Baseline(2**0.5, "random map")

    def __call__(self, subject: Subject, explainer: Explainer) -> Scores:
        few = replace(subject, count=min(self.images, subject.count))
        scores = []
        for place, images, labels in few.batches(f"{explainer.label}: noise"):
            maps = explainer(subject.model, images, labels)
            noise = torch.stack(
                [self._noise(image, subject.seed, place.start + i) for i, image in enumerate(images)], 1
            )
            changes = []
            for one in noise:
                changed = explainer(subject.model, (images + one).clamp(0, 1), labels)
                changes.append(_norm(changed - maps) / _norm(maps).where(_norm(maps) > 0, 1))
            scores.append(torch.stack(changes).amax(0))
        return Scores(torch.cat(scores).numpy())

    def _noise(self, image: Tensor, seed: int, number: int) -> Tensor:
        """(draws, C, H, W), the same for an image whatever the batch and the explainer."""
        generator = torch.Generator().manual_seed(derive_seed(seed, number))
        return self.radius * (2 * torch.rand(self.draws, *image.shape, generator=generator) - 1)


class Randomisation:
    """How alike maps are to those of the same network with layers initialised anew (Adebayo et al., NeurIPS 2018).

    The network is copied; the subject's is not touched. Absolute similarities: a map that only turns its sign around
    still shows the same.

    Args:
        order: 'cascading' starts at the classifier and goes on down, until nothing learned is left; 'independent'
            initialises one part at a time, the rest as learned
        similarity: 'spearman' of the signed maps, or 'ssim' of them as pictures, zero grey
        steps: at most so many; layers of deeper networks are taken together
        images: at most so many, the first ones
    """

    unit = "absolute similarity to the trained network's map"
    higher_is_better = False
    statistic = "mean"

    def __init__(
        self,
        *,
        order: Literal["cascading", "independent"],
        similarity: Literal["spearman", "ssim"] = "spearman",
        steps: int = 10,
        images: int = 32,
    ) -> None:
        self.order, self.steps, self.images = order, steps, images
        self.similarity, measure = {"spearman": (spearman, "rank correlation"), "ssim": (ssim, "SSIM")}[similarity]
        self.name = f"randomisation_{order}" + ("" if similarity == "spearman" else f"_{similarity}")
        self.label = f"Randomisation, {order}" + ("" if similarity == "spearman" else f", {measure}")
        parts = "from the classifier down" if order == "cascading" else "one part at a time"
        self.about = (
            f"Layers are initialised anew, {parts}, in at most {steps} steps; mean absolute {measure} of the signed "
            f"maps with those of the trained network, first {images} images (Adebayo et al., NeurIPS 2018). Maps that "
            "do not depend on what was learned score 1."
        )

    def baseline(self, subject: Subject) -> Baseline:
        return Baseline(0.0, "unrelated map")

    def __call__(self, subject: Subject, explainer: Explainer) -> Scores:
        few = replace(subject, count=min(self.images, subject.count))
        batches = [(images, labels) for _, images, labels in few.batches()]
        maps = torch.cat([explainer(subject.model, *batch) for batch in batches])
        parts = layer_groups(subject.model, self.steps)
        model, original = copy.deepcopy(subject.model), subject.model.state_dict()
        scores = [torch.ones(len(maps))]
        for step, part in enumerate(progress_bar(parts, f"{explainer.label}: {self.order}")):
            if self.order == "independent":
                model.load_state_dict(original)
            reset_layers(model, part, derive_seed(subject.seed, step))
            changed = torch.cat([explainer(model, *batch) for batch in batches])
            scores.append(self.similarity(maps, changed).abs())
        curve = torch.stack(scores, 1).numpy()
        label = "parts initialised anew" if self.order == "cascading" else "part initialised anew"
        return Scores(curve[:, 1:].mean(1), Curve(np.arange(len(scores)), curve, label, self.unit))


class Sparseness:
    """Gini index of the absolute map: 0 for a uniform one, near 1 for a single pixel (Chalasani et al., ICML 2020)."""

    name = "sparseness"
    label = "Sparseness"
    about = (
        "Gini index of the map's absolute values (Chalasani et al., ICML 2020): 0 where all pixels count the same, "
        "near 1 where one alone does. Sparse is easy to read, which is not the same as right."
    )
    unit = "Gini index"
    higher_is_better = True
    statistic = "median"

    def baseline(self, subject: Subject) -> Baseline:
        return Baseline(2**0.5 - 1, "random map")  # the Gini index of absolute values of normally distributed numbers

    def __call__(self, subject: Subject, explainer: Explainer) -> Scores:
        maps, step = subject.maps(explainer), subject.batch_size  # may lie in a file, so a part at a time
        scores = [gini(torch.from_numpy(np.array(maps[start : start + step]))) for start in range(0, len(maps), step)]
        return Scores(torch.cat(scores).numpy())


class ContrastiveLocalisation:
    """On grids of images of different classes: does the difference of two classes' maps point at their two cells?

    The difference of two logits is explained by the difference of their maps: what speaks for one class should lie in
    its cell, and what speaks for the other in the other's. Each class of a grid is set against the next. A map that
    does not depend on the class scores 0, however well it finds objects.

    Args:
        grids: how many grids, at most, chosen as those of grid localisation
        size: cells a side
    """

    name = "contrastive_localisation"
    label = "Contrastive localisation"
    unit = "share of the difference in the right two cells"
    higher_is_better = True
    statistic = "median"

    def __init__(self, *, grids: int = 500, size: int = 3) -> None:
        self.grids = GridLocalisation(grids, size)
        self.about = (
            f"Difference of the maps of two classes on grids of {size} x {size} images, chosen as for grid "
            "localisation: the share of it that is positive in the first one's cell or negative in the second's. Maps "
            "that are the same for both score 0."
        )

    def baseline(self, subject: Subject) -> Baseline:
        return Baseline(1 / self.grids.size**2, "random map")

    def __call__(self, subject: Subject, explainer: Explainer) -> Scores:
        grids, size = self.grids.choose(subject), self.grids.size
        step = max(1, subject.batch_size // size**2)
        scores = []
        for start in progress_bar(range(0, len(grids), step), f"{explainer.label}: contrasts"):
            images, targets = self.grids.make(subject, grids[start : start + step])
            if start == 0:
                check_size(subject, images)
            scores.append(contrast_in_cells(explainer(subject.model, images, targets), size))
        return Scores(torch.cat(scores).numpy())


def contrast_in_cells(maps: Tensor, size: int) -> Tensor:
    """Of the difference of each class's map and the next one's, the share with the right sign in the right cell.

    Args:
        maps: (G, size^2, size * H, size * W), cells row by row; the last class is set against the first

    Returns:
        (G, size^2); 0 where the two maps are equal
    """
    difference = maps.double() - maps.double().roll(-1, 1)
    cells = difference.unflatten(3, (size, -1)).unflatten(2, (size, -1))  # (G, class, row, H, column, W)
    signs = (cells.clamp(min=0), cells.clamp(max=0).neg())
    first, second = (sign.sum((3, 5)).flatten(2) for sign in signs)  # (G, class, cell)
    right = first.diagonal(dim1=1, dim2=2) + second.roll(1, 1).diagonal(dim1=1, dim2=2).roll(-1, 1)
    return right / (first + second).sum(2).clamp(min=torch.finfo(torch.float64).tiny)


def layer_groups(model: nn.Module, steps: int) -> list[list[str]]:
    """Names of the layers that can be initialised anew, the classifier's first, in at most `steps` parts.

    A layer without weights of its own to draw (a norm) goes with the one in front of it.

    Raises:
        EvaluationError: the model has no such layer.
    """
    layers: list[list[str]] = []
    for name, module in model.named_modules():
        if callable(getattr(module, "reset_parameters", None)):
            if not layers or any(p.dim() > 1 for p in module.parameters()):
                layers.append([])
            layers[-1].append(name)
    if not layers:
        raise EvaluationError(f"{type(model).__name__} has no layer with reset_parameters() to initialise anew")
    groups = np.array_split(np.arange(len(layers))[::-1], min(steps, len(layers)))
    return [[name for layer in group for name in layers[layer]] for group in groups]


def reset_layers(model: nn.Module, names: list[str], seed: int) -> None:
    """Initialise these layers anew, torch's random state as before."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        torch.manual_seed(seed)
        for name in names:
            model.get_submodule(name).reset_parameters()  # pyright: ignore[reportCallIssue]


def spearman(maps: Tensor, others: Tensor) -> Tensor:
    """Rank correlation of each pair of maps (N, H, W): (N,) in [-1, 1]; 1 for equal ones, 0 where one is constant."""
    correlation = torch.from_numpy(statistics.spearman(*(m.flatten(1).double().numpy() for m in (maps, others))))
    equal = (maps == others).flatten(1).all(1)
    return correlation.masked_fill(equal, 1).float()


def ssim(maps: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each pair of maps (N, H, W), scaled as a picture, zero to grey: (N,) in [-1, 1].

    The largest absolute value of each is brought to the ends of [0, 1]. Uniform windows of 7 pixels, sample covariance
    (Wang et al., IEEE TIP 2004).
    """
    peaks = [m.abs().amax((1, 2), keepdim=True) for m in (maps, others)]
    # Grey, not 0, in the middle: the formula takes two maps of opposite sign around 0 for alike.
    a, b = (0.5 + 0.5 * m.double() / p.where(p > 0, 1) for m, p in zip((maps, others), peaks, strict=True))
    window = min(7, *(side - (side + 1) % 2 for side in maps.shape[1:]))

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x[:, None], window, stride=1)[:, 0]

    def covariance(x: Tensor, y: Tensor) -> Tensor:
        return window**2 / max(window**2 - 1, 1) * (mean(x * y) - mean(x) * mean(y))

    luminance = (2 * mean(a) * mean(b) + 0.01**2) / (mean(a) ** 2 + mean(b) ** 2 + 0.01**2)
    structure = (2 * covariance(a, b) + 0.03**2) / (covariance(a, a) + covariance(b, b) + 0.03**2)
    return (luminance * structure).mean((1, 2)).float()


def gini(maps: Tensor) -> Tensor:
    """Gini index of the absolute values of each map (N, H, W): (N,) in [0, 1); 0 for a map of zeros."""
    values = maps.flatten(1).abs().double().sort(1).values
    n, total = values.shape[1], values.sum(1)
    rank = torch.arange(1, n + 1, dtype=values.dtype)
    return (((2 * rank - n - 1) * values).sum(1) / (n * total.where(total > 0, 1))).float()


def _norm(maps: Tensor) -> Tensor:
    return maps.flatten(1).norm(dim=1)
