"""Create the subject of an evaluation from a model and a dataset: predict all readable images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import ImageDataset, Skipped, check_images, collate
from ..explanation import check_finite
from ..hub import ALONE, Processes
from .base import EvaluationError, Subject, progress_bar

__all__ = ["make_subject", "predict"]

_CACHE = 1 << 30  # bytes of decoded images to cache in memory


@dataclass
class _Images:
    """Load images by their index among the readable ones of a dataset; cache as many as fit into `_CACHE` bytes."""

    dataset: ImageDataset
    readable: np.ndarray
    kept: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        return torch.stack([self._image(int(number)) for number in numbers])

    def _image(self, number: int) -> Tensor:
        if number in self.kept:
            return self.kept[number]
        sample = self.dataset[int(self.readable[number])]
        if isinstance(sample, Skipped):
            raise EvaluationError(f"{sample.name} was readable before, but not any more: {sample.reason}")
        image = sample[0]
        if len(self.kept) * image.numel() * image.element_size() < _CACHE:
            self.kept[number] = image
        return image


def predict(
    model: Any, dataset: ImageDataset, batch_size: int, processes: Processes = ALONE
) -> tuple[np.ndarray, np.ndarray, list[Skipped]]:
    """Predict a dataset, whose batches are dealt out to the processes.

    Returns:
        Indices of the readable images (N,), their logits (N, classes), and the skipped images.

    Raises:
        DataError: no image is readable, or the model does not accept the images.
        EvaluationError: a logit is NaN or infinite; the message gives the cause.
    """
    parameter = next(model.parameters())
    checked = False

    def one_batch(start: int) -> tuple[list[int], list[Skipped], np.ndarray | None]:
        nonlocal checked
        places = range(start, min(start + batch_size, len(dataset)))
        samples = [dataset[place] for place in places]
        numbers = [place for place, sample in zip(places, samples, strict=True) if not isinstance(sample, Skipped)]
        batch = collate(samples)
        if len(batch.labels) == 0:
            return numbers, batch.skipped, None
        images = batch.images.to(parameter.device, parameter.dtype)
        if not checked:
            check_images(model, images)
        checked = True
        with torch.no_grad():
            found = model(images).float()
        check_finite(model, images, found, numbers=numbers, error=EvaluationError)
        return numbers, batch.skipped, found.cpu().numpy()

    starts, bar = range(0, len(dataset), batch_size), partial(progress_bar, title="predictions")
    batches = processes.share(starts, one_batch, bar=bar)
    logits = [found for _, _, found in batches if found is not None]
    if not logits:
        check_images(model, torch.empty(0))
    readable = [number for numbers, _, _ in batches for number in numbers]
    unread = [skipped for _, skips, _ in batches for skipped in skips]
    return np.array(readable), np.concatenate(logits), unread


def make_subject(
    model: Any,
    dataset: ImageDataset,
    readable: np.ndarray,
    logits: np.ndarray,
    *,
    count: int,
    label_names: Sequence[str] = (),
    batch_size: int = 64,
    seed: int = 42,
    processes: Processes = ALONE,
) -> Subject:
    """Create a subject from a dataset and its predictions.

    Args:
        model: in eval mode
        dataset: images, preprocessed for the model
        readable, logits: from `predict`
        count: number of images for metrics of single images; all if there are fewer
        label_names: class names
        batch_size: images per batch
        seed: seed of the evaluation
        processes: the processes that share the work

    Raises:
        EvaluationError: the dataset has more classes than the model, or logits are NaN or infinite.
    """
    labels = dataset.split.labels[readable]
    if labels.max() >= logits.shape[1]:
        raise EvaluationError(
            f"the model has {logits.shape[1]} classes, but the dataset has label {labels.max()}: use another "
            "model or dataset"
        )
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).any(1).sum())
        raise EvaluationError(f"the model gives NaN or infinite logits for {bad} of {len(logits)} images")
    images = _Images(dataset, readable)
    count = min(count, len(labels))
    return Subject(model, images, labels, logits, count, tuple(label_names), batch_size, seed, processes=processes)
