"""Interfaces of an evaluation: explainers compute maps, and metrics score them on a subject.

A subject is a model with the labelled images on which it is evaluated. An explainer computes a map for a class, by any
method. A metric requests maps and returns one or more numbers for each sample. Explainers and metrics do not depend on
each other: each metric works with each explainer, and a new one is a single function.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..hub import ALONE, Processes, replacing

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
    """The requested evaluation is not possible; the message gives the reason and the remedy."""


class ExplainerError(ValueError):
    """A method does not apply to a model, or its maps are not usable; the evaluation continues with the others."""


class Method(Protocol):
    """Compute maps (B, T, H, W) for images (B, C, H, W) and targets (B, T), with the model in eval mode."""

    def __call__(self, model: Any, images: Tensor, targets: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Explainer:
    """Explain a class by a signed map: positive values are evidence for the class, negative values against it.

    The same image, target and seed give the same map, whatever the batch. The model is not modified.
    """

    name: str
    """Name on the command line and in the names of saved files."""
    label: str
    """Name in figures."""
    about: str
    """One or two sentences: the method, its settings, its source."""
    method: Method
    batch_size: int = 64
    """Images per call of `method`."""

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Compute a map of each target class.

        Args:
            model: returns logits (N, classes)
            images: colours in [0, 1], (N, C, H, W)
            targets: class indices, (N,), or T of them per image, (N, T)

        Returns:
            float32 maps on the CPU, (N, H, W), or (N, T, H, W)

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
                    raise ExplainerError(f"{self.name} returned maps {list(made.shape)} for images {list(part.shape)}")
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
    """A model and the labelled images on which it is evaluated, loaded `batch_size` at a time.

    Metrics for single images use the first `count` images and explain their true classes: see `batches`,
    `for_batches` and `maps`. Processes that share the work have equal subjects, and score by the same metric and
    explainer at the same time; batches are the same for any number of them, so that scores are as well.
    """

    model: Any
    """In eval mode, on the device to run on."""
    load: Callable[[Sequence[int]], Tensor]
    """Loads images by index, preprocessed for the model: colours in [0, 1], (n, C, H, W) on the CPU."""
    labels: np.ndarray
    """True classes, (N,)."""
    logits: np.ndarray
    """The model's logits, (N, classes)."""
    count: int
    """Number of images that metrics for single images use, starting with the first; at most N."""
    label_names: tuple[str, ...] = ()
    batch_size: int = 64
    seed: int = 42
    folder: Path | None = None
    """Cache of finished maps, `maps_NAME.npy`, for other metrics and for a resumed evaluation."""
    processes: Processes = ALONE
    """The processes that share the work."""
    _maps: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def batches(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (slice, images (B, C, H, W), true classes (B,)) of the first `count` images, all in this process."""
        return map(self._batch, range(0, self.count, self.batch_size))

    def for_batches(self, work: Callable[[slice, Tensor, Tensor], Any], title: str, **how: Any) -> Any:
        """Call `work` for each of the `batches`, and return the list of its values; see `share`."""
        return self.share(range(0, self.count, self.batch_size), lambda start: work(*self._batch(start)), title, **how)

    def share(self, items: Sequence[Any], work: Callable[[Any], Any], title: str, **how: Any) -> Any:
        """Call `work` for each item in one of the processes, and show a progress bar: see `Processes.share`."""
        return self.processes.share(items, work, bar=partial(progress_bar, title=title), **how)

    def _batch(self, start: int) -> tuple[slice, Tensor, Tensor]:
        place = slice(start, min(start + self.batch_size, self.count))
        return place, self.load(range(place.start, place.stop)), torch.from_numpy(self.labels[place])

    def maps(self, explainer: Explainer) -> np.ndarray:
        """Return maps of the first `count` images for their true classes, (count, H, W) float32; computed only once."""
        if explainer.name not in self._maps:
            title = f"{explainer.label}: maps"

            def explain(place: slice, images: Tensor, labels: Tensor) -> np.ndarray:
                return explainer(self.model, images, labels).numpy()

            if self.folder is None:
                self._maps[explainer.name] = self.for_batches(explain, title, join=np.concatenate)
            else:
                path = self.folder / f"maps_{explainer.name}.npy"
                if not self.processes.first(path.exists):
                    self.for_batches(explain, title, join=lambda maps: _save(path, np.concatenate(maps)))
                self._maps[explainer.name] = np.load(path, mmap_mode="r")
        return self._maps[explainer.name]


@dataclass(frozen=True)
class Curve:
    """A quantity measured for each sample while its image or the model is changed step by step."""

    x: np.ndarray
    """(K,)"""
    y: np.ndarray
    """(S, K)"""
    x_label: str
    y_label: str


@dataclass(frozen=True)
class Scores:
    """Scores of one explainer by one metric.

    `values` has shape (S,) for independent samples, or (S, M) if M values belong together, such as those of one grid.
    Confidence intervals resample the S rows; the statistic is taken over all values.
    """

    values: np.ndarray
    curve: Curve | None = None


@dataclass(frozen=True)
class Baseline:
    """Score of an uninformed map."""

    value: float
    label: str
    """Such as "uniform map"."""


class Metric(Protocol):
    """Score explainers. The samples and their number must not depend on the explainer."""

    @property
    def name(self) -> str:
        """Name on the command line and in results.json."""
        ...

    @property
    def label(self) -> str:
        """Name in tables and figures."""
        ...

    @property
    def about(self) -> str:
        """One or two sentences: the protocol, its source, and any deviation from it."""
        ...

    @property
    def unit(self) -> str:
        """Unit of the values."""
        ...

    @property
    def higher_is_better(self) -> bool: ...

    @property
    def statistic(self) -> str:
        """Statistic that summarises all values: 'median' or 'mean'."""
        ...

    def baseline(self, subject: Subject) -> Baseline | None:
        """Return the score of an uninformed map; None if it must be measured, by the explainer `random`."""
        ...

    def __call__(self, subject: Subject, explainer: Explainer) -> Scores:
        """Score an explainer.

        Raises:
            EvaluationError: the subject does not allow this metric, whatever the explainer.
            ExplainerError: this explainer does not apply to the model.
        """
        ...


def _save(path: Path, array: np.ndarray) -> None:
    with replacing(path) as stream:
        np.save(stream, array)


def progress_bar(items: Any, title: str) -> Any:
    """Show a tqdm bar on stderr, removed when done, and only on a terminal."""
    return tqdm(items, desc=f"{title:28.28}", leave=False, disable=None, ncols=80)
