"""What the parts of an evaluation are to each other: explainers make maps, metrics score them on a subject.

A subject is a model with the labelled images it is tried on. An explainer gives a map for a class, whatever it does
for it; a metric asks for maps and returns one number or more for each sample. Neither knows the other's inside, so
that each metric works with each explainer, and a new one of either is one function.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

__all__ = [
    "Baseline",
    "Curve",
    "EvaluationError",
    "Explainer",
    "ExplainerError",
    "Metric",
    "Scores",
    "Subject",
    "progress_bar",
]


class EvaluationError(ValueError):
    """An evaluation that cannot be made as asked; the message says why and how to mend it."""


class ExplainerError(ValueError):
    """A method that does not apply to a model, or whose maps are not usable; the others go on without it."""


class Method(Protocol):
    """How an explainer makes maps, of images (B, C, H, W) in eval mode and targets (B, T): (B, T, H, W)."""

    def __call__(self, model: Any, images: Tensor, targets: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Explainer:
    """A way to explain a decision of a model by a signed map: above 0 speaks for the class, below 0 against it.

    The same image, target and seed give the same map, in whatever batch. The model is left as it is.
    """

    name: str
    """As on the command line; what is kept of an explainer is kept under it."""
    label: str
    """As in a figure."""
    about: str
    """A sentence or two: what it does, with which settings, whose it is."""
    method: Method
    batch_size: int = 64
    """Images at a time."""

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Explain classes by the pixels.

        Args:
            model: gives logits (N, classes)
            images: colours in [0, 1], (N, C, H, W)
            targets: class numbers, (N,), or T of them an image, (N, T)

        Returns:
            float32 on the CPU, (N, H, W), or (N, T, H, W)

        Raises:
            ExplainerError: the method does not apply to this model, or a map has NaN or infinite values.
        """
        parameter = next(model.parameters())
        several = targets.reshape(len(images), -1)
        training = [module for module in model.modules() if module.training]
        maps = []
        try:
            model.eval()
            for part, goal in zip(images.split(self.batch_size), several.split(self.batch_size), strict=True):
                made = self.method(model, part.to(parameter.device, parameter.dtype), goal.to(parameter.device))
                made = made.detach().to("cpu", torch.float32)
                if made.shape != (*goal.shape, *images.shape[2:]):
                    raise ExplainerError(f"{self.name} made maps {list(made.shape)} of images {list(part.shape)}")
                bad = int((~torch.isfinite(made)).flatten(2).any(2).sum())
                if bad:
                    raise ExplainerError(f"{self.name}: {bad} of {goal.numel()} maps have NaN or infinite values")
                maps.append(made)
        finally:
            for module in training:
                module.training = True
        return torch.cat(maps).reshape(*targets.shape, *images.shape[2:])


@dataclass(frozen=True)
class Subject:
    """A model and the labelled images that it is tried on, of which no more than `batch_size` are in memory at a time.

    Metrics for single images use the first `count` images and explain their true class: `batches` and `maps`.
    """

    model: Any
    """In eval mode, on the device it is to run on."""
    load: Callable[[Sequence[int]], Tensor]
    """Images of these numbers as the model takes them, colours in [0, 1], (n, C, H, W) on the CPU."""
    labels: np.ndarray
    """True classes, (N,)."""
    logits: np.ndarray
    """What the model says, (N, classes)."""
    count: int
    """How many images, from the first on, metrics for single images use; at most N."""
    label_names: tuple[str, ...] = ()
    batch_size: int = 64
    seed: int = 42
    folder: Path | None = None
    """Keeps finished maps there, `maps_NAME.npy`, for other metrics and for the next process."""
    _maps: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def batches(self, title: str = "") -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The first `count` images with a progress bar: where they stand, images (B, C, H, W), true classes (B,)."""
        starts = range(0, self.count, self.batch_size)
        for start in progress_bar(starts, title) if title else starts:
            place = slice(start, min(start + self.batch_size, self.count))
            labels = torch.from_numpy(self.labels[place])
            yield place, self.load(range(place.start, place.stop)), labels

    def maps(self, explainer: Explainer) -> np.ndarray:
        """An explainer's maps of the first `count` images, for their true classes, (count, H, W) float32; made once."""
        if explainer.name not in self._maps:
            path = self.folder / f"maps_{explainer.name}.npy" if self.folder else None
            if path is None or not path.exists():
                made = [explainer(self.model, *batch) for _, *batch in self.batches(f"{explainer.label}: maps")]
                maps = torch.cat(made).numpy()
                if path is None:
                    self._maps[explainer.name] = maps
                    return maps
                temporary = path.with_name(f".saving-{path.name}")
                with temporary.open("wb") as stream:
                    np.save(stream, maps)
                temporary.replace(path)
            self._maps[explainer.name] = np.load(path, mmap_mode="r")
        return self._maps[explainer.name]


@dataclass(frozen=True)
class Curve:
    """What a measured quantity does while something is done to an image, for each sample."""

    x: np.ndarray
    """(K,)"""
    y: np.ndarray
    """(S, K)"""
    x_label: str
    y_label: str


@dataclass(frozen=True)
class Scores:
    """What a metric found of an explainer.

    `values` (S,) are of independent samples; or (S, M) where M belong together, as those of one grid: confidence
    intervals draw S samples anew, and the statistic is taken over all numbers.
    """

    values: np.ndarray
    curve: Curve | None = None


@dataclass(frozen=True)
class Baseline:
    """What a map scores that knows nothing."""

    value: float
    label: str
    """As "uniform map"."""


class Metric(Protocol):
    """A score of explainers. The number of samples, and which they are, must not depend on the explainer."""

    @property
    def name(self) -> str:
        """As on the command line and in results.json."""
        ...

    @property
    def label(self) -> str:
        """As in a table or figure."""
        ...

    @property
    def about(self) -> str:
        """A sentence or two: the protocol, its source, and where it differs from it."""
        ...

    @property
    def unit(self) -> str:
        """Of the values."""
        ...

    @property
    def higher_is_better(self) -> bool: ...

    @property
    def statistic(self) -> str:
        """What stands for all values: 'median' or 'mean'."""
        ...

    def baseline(self, subject: Subject) -> Baseline | None:
        """What an uninformed map scores; None if that is not known without measuring: then see the explainer random."""
        ...

    def __call__(self, subject: Subject, explainer: Explainer) -> Scores:
        """Score an explainer.

        Raises:
            EvaluationError: the subject does not allow it, with any explainer.
            ExplainerError: this explainer does not apply to the model.
        """
        ...


def progress_bar(items: Any, title: str) -> Any:
    """tqdm on stderr, gone when done, silent where no one watches."""
    return tqdm(items, desc=f"{title:28.28}", leave=False, disable=None, ncols=80)
