"""Create the subject of an evaluation from a model and a dataset: predict all readable images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import ImageDataset, Skipped, check_images, collate
from ..explanation import check_finite
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


def predict(model: Any, dataset: ImageDataset, batch_size: int) -> tuple[np.ndarray, np.ndarray, list[Skipped]]:
    """Predict a dataset.

    Returns:
        Indices of the readable images (N,), their logits (N, classes), and the skipped images.

    Raises:
        DataError: no image is readable, or the model does not accept the images.
        EvaluationError: a logit is NaN or infinite; the message gives the cause.
    """
    parameter = next(model.parameters())
    readable, logits, unread = [], [], []
    for start in progress_bar(range(0, len(dataset), batch_size), "predictions"):
        places = range(start, min(start + batch_size, len(dataset)))
        samples = [dataset[place] for place in places]
        numbers = [place for place, sample in zip(places, samples, strict=True) if not isinstance(sample, Skipped)]
        readable += numbers
        batch = collate(samples)
        unread += batch.skipped
        if len(batch.labels) == 0:
            continue
        images = batch.images.to(parameter.device, parameter.dtype)
        if not logits:
            check_images(model, images)
        with torch.no_grad():
            found = model(images).float()
        check_finite(model, images, found, numbers=numbers, error=EvaluationError)
        logits.append(found.cpu())
    if not logits:
        check_images(model, torch.empty(0))
    return np.array(readable), torch.cat(logits).numpy(), unread


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
    return Subject(model, images, labels, logits, count, tuple(label_names), batch_size, seed)
