"""Grid localisation of a model's own maps during training, on a few grids."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data import ImageDataset, Skipped, collate
from ..explanation import check_finite
from ..hub import ALONE, Processes
from .base import EvaluationError, Subject
from .explainers import make_explainer
from .localisation import GridLocalisation

_GRIDS, _IMAGES, _BATCH = 50, 1000, 50  # takes seconds for small images; the median's interval is a few per cent


class TrainingLocalisation:
    """Measure grid localisation of a model's own maps every few epochs, always on the same test images.

    A failed measurement does not stop training: its result is None, and each new reason is printed once. Global random
    states are not changed.

    Args:
        dataset: Test images, preprocessed for the model; up to 1000, evenly spaced, are used.
        classes: Number of classes. Grids have 3 x 3 images for 9 or more classes, else 2 x 2.
        every: Epochs between measurements; 0 disables them.
        processes: The processes that share a measurement, with equal models. All make the same calls.
    """

    def __init__(self, dataset: ImageDataset, classes: int, *, every: int, processes: Processes = ALONE):
        self._processes = processes
        self._dataset, self._classes, self._every, self._said = dataset, classes, every, set()
        self._metric = GridLocalisation(grids=_GRIDS, size=3 if classes >= 9 else 2)

    def after_epoch(self, model: Any, epoch: int) -> dict[str, float | None]:
        """Return an epoch's entry `localisation`; empty if no measurement is due after this epoch (the first is 1)."""
        return {"localisation": self._measure(model)} if self._every and epoch % self._every == 0 else {}

    def at_end(self, model: Any, dataset: ImageDataset | None = None) -> dict[str, dict[str, float] | None]:
        """Return the summary's entry `localisation`: the scores of the published model and of a uniform map.

        Args:
            model: the published model
            dataset: test images, if not those of the measurements after epochs
        """
        if not self._every:
            return {}
        self._dataset = dataset or self._dataset
        size, score = self._metric.size, self._measure(model)
        named = {f"{size} x {size} grids": score, "uniform map": 1 / size**2}
        return {"localisation": None if score is None else named}

    def _measure(self, model: Any) -> float | None:
        try:
            scores = self._metric(self._subject(model), make_explainer("inherent", batch_size=_BATCH)).values
            return float(np.median(scores))
        except Exception as error:  # such as out of memory: must not stop hours of training
            words = str(error) if isinstance(error, EvaluationError) else f"{type(error).__name__}: {error}"
            if words not in self._said and self._processes.rank == 0:
                tqdm.write(f"note: no localisation: {words}")
            self._said.add(words)
            return None

    def _subject(self, model: Any) -> Subject:
        """Create a subject from the model, the readable images and their logits.

        Raises:
            EvaluationError: The model cannot explain itself, or is confident of fewer classes than a grid has cells.
        """
        need = self._metric.size**2
        if not hasattr(model, "explain"):
            raise EvaluationError(f"{type(model).__name__} cannot explain itself")
        if self._classes < need:
            raise EvaluationError(f"there are {self._classes} classes, but grids need {need}")
        count = len(self._dataset)
        places = np.linspace(0, count - 1, min(count, _IMAGES)).round().astype(int).tolist()

        def predict(start: int) -> tuple[list[int], np.ndarray, np.ndarray | None]:
            part = places[start : start + _BATCH]
            samples = [self._dataset[place] for place in part]
            readable = [place for place, one in zip(part, samples, strict=True) if not isinstance(one, Skipped)]
            batch = collate(samples)
            return readable, batch.labels.numpy(), _logits(model, batch.images) if readable else None

        parts = self._processes.share(range(0, len(places), _BATCH), predict)
        known = [place for readable, _, _ in parts for place in readable]

        def load(numbers: Any) -> Tensor:
            return collate([self._dataset[known[number]] for number in numbers]).images

        labels, logits = (np.concatenate([part[k] for part in parts if part[0]]) for k in (1, 2))
        subject = Subject(model, load, labels, logits, count=len(known), batch_size=_BATCH, processes=self._processes)
        try:
            self._metric.choose(subject)
        except EvaluationError as error:
            raise EvaluationError(f"the model is not yet confident of {need} classes, which a grid needs") from error
        return subject


@torch.no_grad()
def _logits(model: Any, images: Tensor) -> np.ndarray:
    parameter, training = next(model.parameters()), [module for module in model.modules() if module.training]
    try:
        images = images.to(parameter.device, parameter.dtype)
        logits = model.eval()(images).float()
        check_finite(model, images, logits, error=EvaluationError)
        return logits.cpu().numpy()
    finally:
        for module in training:
            module.training = True
