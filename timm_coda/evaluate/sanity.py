"""Sanity checks of explanations: whether maps depend on the model, the class and noise, and how sparse they are.

They do not show that a map is right: a map that is the same for all images is not sensitive to noise. Read them
together with the metrics of localisation and pixel removal.
"""

import copy
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import derive_seed
from .base import Baseline, Curve, EvaluationError, Explainer, Scores, Subject
from .localisation import GridLocalisation, check_size
from .statistics import spearman

__all__ = ["ContrastiveLocalisation", "NoiseSensitivity", "Randomisation", "Sparseness"]


class NoiseSensitivity:
    """Largest relative change of a map under small uniform noise (Yeh et al., NeurIPS 2019: max-sensitivity).

    Args:
        radius: noise is uniform in [-radius, radius] per colour value; noisy images are clamped to [0, 1]
        draws: noisy copies per image
        images: maximum number of images, starting with the first
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
            f"{radius:g} per colour value, first {images} images (Yeh et al., NeurIPS 2019). A map that is the same "
            "for all images scores 0."
        )

    def baseline(self, subject: Subject) -> Baseline:
        return Baseline(2**0.5, "random map")

    def __call__(self, subject: Subject, explainer: Explainer) -> Scores:
        few = replace(subject, count=min(self.images, subject.count))

        def largest_change(place: slice, images: Tensor, labels: Tensor) -> Tensor:
            maps = explainer(subject.model, images, labels)
            noise = torch.stack(
                [self._noise(image, subject.seed, place.start + i) for i, image in enumerate(images)], 1
            )
            changes = []
            for one in noise:
                changed = explainer(subject.model, (images + one).clamp(0, 1), labels)
                changes.append(_norm(changed - maps) / _norm(maps).where(_norm(maps) > 0, 1))
            return torch.stack(changes).amax(0)

        return Scores(torch.cat(few.for_batches(largest_change, f"{explainer.label}: noise")).numpy())

    def _noise(self, image: Tensor, seed: int, number: int) -> Tensor:
        """Draw noise (draws, C, H, W), the same for an image in any batch and for any explainer."""
        generator = torch.Generator().manual_seed(derive_seed(seed, number))
        return self.radius * (2 * torch.rand(self.draws, *image.shape, generator=generator) - 1)


class Randomisation:
    """Similarity of maps to those of the same network with reinitialised layers (Adebayo et al., NeurIPS 2018).

    The network is copied; the subject's network is not modified. Similarities are absolute, because a map with the
    opposite sign still shows the same.

    Args:
        order: 'cascading' reinitialises parts from the classifier down, until nothing learned is left; 'independent'
            reinitialises one part at a time and leaves the others as learned
        similarity: 'spearman' of the signed maps, or 'ssim' of the maps as images in which zero is grey
        steps: maximum number of parts; in deeper networks, several layers form a part
        images: maximum number of images, starting with the first
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
        similarities = {"spearman": (rank_similarity, "rank correlation"), "ssim": (ssim, "SSIM")}
        self.similarity, measure = similarities[similarity]
        self.name = f"randomisation_{order}" + ("" if similarity == "spearman" else f"_{similarity}")
        self.label = f"Randomisation, {order}" + ("" if similarity == "spearman" else f", {measure}")
        parts = "from the classifier down" if order == "cascading" else "one part at a time"
        self.about = (
            f"Layers are reinitialised {parts}, in at most {steps} steps; mean absolute {measure} of the signed maps "
            f"with those of the trained network, first {images} images (Adebayo et al., NeurIPS 2018). Maps that do "
            "not depend on what was learned score 1."
        )

    def baseline(self, subject: Subject) -> Baseline:
        return Baseline(0.0, "unrelated map")

    def __call__(self, subject: Subject, explainer: Explainer) -> Scores:
        few = replace(subject, count=min(self.images, subject.count))
        batches = [(images, labels) for _, images, labels in few.batches()]
        parts = layer_groups(subject.model, self.steps)
        model, original = copy.deepcopy(subject.model), subject.model.state_dict()
        explained: list[Tensor] = []  # by the trained network, in each process
        reset = 0  # parts of `model` that this process has reinitialised, or passed

        def similarity(step: int) -> Tensor:
            nonlocal reset
            if not explained:
                explained.append(torch.cat([explainer(subject.model, *batch) for batch in batches]))
            if self.order == "independent":
                model.load_state_dict(original)
                reset = step
            for number in range(reset, step + 1):
                reset_layers(model, parts[number], derive_seed(subject.seed, number))
            reset = step + 1
            changed = torch.cat([explainer(model, *batch) for batch in batches])
            return self.similarity(explained[0], changed).abs()

        scores = few.share(range(len(parts)), similarity, f"{explainer.label}: {self.order}")
        curve = torch.stack([torch.ones(few.count), *scores], 1).numpy()
        label = "parts initialised anew" if self.order == "cascading" else "part initialised anew"
        return Scores(curve[:, 1:].mean(1), Curve(np.arange(len(parts) + 1), curve, label, self.unit))


class Sparseness:
    """Gini index of the absolute map: 0 for a uniform map, near 1 for a single pixel (Chalasani et al., ICML 2020)."""

    name = "sparseness"
    label = "Sparseness"
    about = (
        "Gini index of the map's absolute values (Chalasani et al., ICML 2020): 0 if all pixels are equal, near 1 if "
        "only one is not zero. A sparse map is easy to read, but not necessarily right."
    )
    unit = "Gini index"
    higher_is_better = True
    statistic = "median"

    def baseline(self, subject: Subject) -> Baseline:
        return Baseline(2**0.5 - 1, "random map")  # Gini index of the absolute values of normally distributed numbers

    def __call__(self, subject: Subject, explainer: Explainer) -> Scores:
        maps, step = subject.maps(explainer), subject.batch_size  # maps may be memory-mapped, so read a part at a time
        scores = [gini(torch.from_numpy(np.array(maps[start : start + step]))) for start in range(0, len(maps), step)]
        return Scores(torch.cat(scores).numpy())


class ContrastiveLocalisation:
    """Share of the difference of two classes' maps in these classes' cells, on grids of images of different classes.

    The difference of two logits is explained by the difference of their maps: evidence for one class should lie in its
    cell, and evidence for the other class in the other cell. Each class of a grid is contrasted with the next. A map
    that does not depend on the class scores 0, however well it finds objects.

    Args:
        grids: maximum number of grids, chosen as in grid localisation
        size: cells per side
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
            "localisation: the share of it that is positive in the first class's cell or negative in the second's. "
            "Maps that are the same for both classes score 0."
        )

    def baseline(self, subject: Subject) -> Baseline:
        return Baseline(1 / self.grids.size**2, "random map")

    def __call__(self, subject: Subject, explainer: Explainer) -> Scores:
        grids, size = self.grids.choose(subject), self.grids.size
        step = max(1, subject.batch_size // size**2)

        def score(start: int) -> Tensor:
            images, targets = self.grids.make(subject, grids[start : start + step])
            if start == 0:
                check_size(subject, images)
            return contrast_in_cells(explainer(subject.model, images, targets), size)

        scores = subject.share(range(0, len(grids), step), score, f"{explainer.label}: contrasts")
        return Scores(torch.cat(scores).numpy())


def contrast_in_cells(maps: Tensor, size: int) -> Tensor:
    """Compute the share of the difference of each class's map and the next that has the right sign in the right cell.

    Args:
        maps: (G, size^2, size * H, size * W), cells row by row; the last class is contrasted with the first

    Returns:
        Shares, (G, size^2); 0 where the two maps are equal.
    """
    difference = maps.double() - maps.double().roll(-1, 1)
    cells = difference.unflatten(3, (size, -1)).unflatten(2, (size, -1))  # (G, class, row, H, column, W)
    signs = (cells.clamp(min=0), cells.clamp(max=0).neg())
    first, second = (sign.sum((3, 5)).flatten(2) for sign in signs)  # (G, class, cell)
    right = first.diagonal(dim1=1, dim2=2) + second.roll(1, 1).diagonal(dim1=1, dim2=2).roll(-1, 1)
    return right / (first + second).sum(2).clamp(min=torch.finfo(torch.float64).tiny)


def layer_groups(model: nn.Module, steps: int) -> list[list[str]]:
    """Divide the names of all layers that can be reinitialised into at most `steps` parts, the classifier's first.

    A layer without randomly initialised weights (a norm) is in the same part as the layer before it.

    Raises:
        EvaluationError: the model has no layer with reset_parameters().
    """
    layers: list[list[str]] = []
    for name, module in model.named_modules():
        if callable(getattr(module, "reset_parameters", None)):
            if not layers or any(p.dim() > 1 for p in module.parameters()):
                layers.append([])
            layers[-1].append(name)
    if not layers:
        raise EvaluationError(f"{type(model).__name__} has no layer with reset_parameters() to reinitialise")
    groups = np.array_split(np.arange(len(layers))[::-1], min(steps, len(layers)))
    return [[name for layer in group for name in layers[layer]] for group in groups]


def reset_layers(model: nn.Module, names: list[str], seed: int) -> None:
    """Reinitialise these layers with a seed; torch's random state is restored."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        torch.manual_seed(seed)
        for name in names:
            model.get_submodule(name).reset_parameters()  # pyright: ignore[reportCallIssue]


def rank_similarity(maps: Tensor, others: Tensor) -> Tensor:
    """Compute the rank correlation of pairs of maps (N, H, W): (N,) in [-1, 1]; 1 if equal, 0 if one is constant."""
    correlation = torch.from_numpy(spearman(*(m.flatten(1).double().numpy() for m in (maps, others))))
    equal = (maps == others).flatten(1).all(1)
    return correlation.masked_fill(equal, 1).float()


def ssim(maps: Tensor, others: Tensor) -> Tensor:
    """Compute the structural similarity of pairs of maps (N, H, W): (N,) in [-1, 1].

    Each map is scaled to an image in [0, 1]: zero becomes 0.5 (grey), the largest absolute value 0 or 1. Uniform
    windows of 7 pixels, sample covariance (Wang et al., IEEE TIP 2004).
    """
    peaks = [m.abs().amax((1, 2), keepdim=True) for m in (maps, others)]
    # Zero becomes grey, not 0: around 0, the formula rates maps of opposite sign as similar.
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
    """Compute the Gini index of the absolute values of each map (N, H, W): (N,) in [0, 1); 0 for a map of zeros."""
    values = maps.flatten(1).abs().double().sort(1).values
    n, total = values.shape[1], values.sum(1)
    rank = torch.arange(1, n + 1, dtype=values.dtype)
    return (((2 * rank - n - 1) * values).sum(1) / (n * total.where(total > 0, 1))).float()


def _norm(maps: Tensor) -> Tensor:
    return maps.flatten(1).norm(dim=1)
