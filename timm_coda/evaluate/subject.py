"""From a model and a data set to the subject of an evaluation: what the model says of each image that can be read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import ImageDataset, Skipped, check_images, collate
from .base import EvaluationError, Subject, progress_bar

__all__ = ["make_subject", "predict"]

_CACHE = 1 << 30  # bytes of images that are decoded once and kept


@dataclass
class _Images:
    """Images of a data set by their place among those that can be read; as many as fit are kept in memory."""

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
            raise EvaluationError(f"{sample.name} could be read before, and no more: {sample.reason}")
        image = sample[0]
        if len(self.kept) * image.numel() * image.element_size() < _CACHE:
            self.kept[number] = image
        return image


def predict(model: Any, dataset: ImageDataset, batch_size: int) -> tuple[np.ndarray, np.ndarray, list[Skipped]]:
    """What a model says of a data set: places of the images that can be read (N,), logits (N, classes), and the others.

    Raises:
        DataError: none can be read, or the model does not take them.
    """
    parameter = next(model.parameters())
    readable, logits, unread = [], [], []
    for start in progress_bar(range(0, len(dataset), batch_size), "predictions"):
        places = range(start, min(start + batch_size, len(dataset)))
        samples = [dataset[place] for place in places]
        readable += [place for place, sample in zip(places, samples, strict=True) if not isinstance(sample, Skipped)]
        batch = collate(samples)
        unread += batch.skipped
        if len(batch.labels) == 0:
            continue
        images = batch.images.to(parameter.device, parameter.dtype)
        if not logits:
            check_images(model, images)
        with torch.no_grad():
            logits.append(model(images).float().cpu())
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
    """A subject of a data set.

    Args:
        model: in eval mode
        dataset: images as the model takes them
        readable, logits: what `predict` found
        count: images for metrics of single images; all if there are fewer
        label_names: of the classes
        batch_size: images at a time
        seed: of the evaluation

    Raises:
        EvaluationError: the model's classes are not the data set's, or its logits are no numbers.
    """
    labels = dataset.split.labels[readable]
    if labels.max() >= logits.shape[1]:
        raise EvaluationError(
            f"the model has {logits.shape[1]} classes, and the data set a label {labels.max()}: it was not made for it"
        )
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).any(1).sum())
        raise EvaluationError(f"the model gives NaN or infinite logits for {bad} of {len(logits)} images")
    images = _Images(dataset, readable)
    count = min(count, len(labels))
    return Subject(model, images, labels, logits, count, tuple(label_names), batch_size, seed)
