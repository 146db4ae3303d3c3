"""The images of a dataset that activate units of inner layers most, on one contact sheet."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..data import ImageDataset, Skipped, check_images, collate
from ..explanation import (
    GAP,
    GREY,
    Explanation,
    Page,
    Unit,
    UnitPicture,
    check_finite,
    draw_scale,
    from_no_pixel,
    peaks,
    receptive_fields,
    unit_pictures,
)
from ..hub import ALONE, Processes

__all__ = ["Strongest", "find_strongest", "unit_sheet"]

_SIDE = 1.0  # inches of the longer side of a picture
_STEP = _SIDE + GAP
_HEAD = 0.5  # inches


@dataclass(frozen=True)
class Strongest:
    """The images that activate a unit most, the strongest first, and what the unit sees in them."""

    unit: Unit
    searched: int
    """Number of images that were searched."""
    largest: float
    """Largest activation in these images."""
    indices: tuple[int, ...]
    """Numbers of the images in the dataset; none if no activation is positive."""
    names: tuple[str, ...]
    """Where each image is: its split, row and, where known, file."""
    classes: tuple[str, ...]
    """True class of each image."""
    found: Explanation | None
    """Explanation of the unit at its strongest position of each image; None if it never fires."""
    pictures: tuple[UnitPicture, ...] = ()
    limit: float = 0.0
    """Contribution with the strongest colour."""


def find_strongest(
    model: Any,
    dataset: ImageDataset,
    units: Sequence[Unit],
    *,
    label_names: Sequence[str],
    count: int = 8,
    batch_size: int = 16,
    processes: Processes = ALONE,
) -> tuple[list[Strongest], list[Skipped]]:
    """Find the images that activate units most, one position an image: one forward pass over the dataset.

    The batches are dealt out to the processes.

    Args:
        model: a timm_coda model in eval mode
        dataset: images, preprocessed for the model
        units: the units
        label_names: names of the dataset's classes
        count: maximum number of images for a unit
        batch_size: images per forward pass
        processes: the processes that share the work

    Returns:
        The images of each unit, and those that could not be read.

    Raises:
        ValueError: the model has no such layer or channel, or the layer outputs no map; or an activation is not finite.
        DataError: no image is readable, or the model does not accept the images.
    """
    parameter = next(model.parameters())
    checked = False

    def search(start: int) -> tuple[list[int], list[Skipped], np.ndarray]:
        nonlocal checked
        places = range(start, min(start + batch_size, len(dataset)))
        samples = [dataset[place] for place in places]
        numbers = [place for place, sample in zip(places, samples, strict=True) if not isinstance(sample, Skipped)]
        batch = collate(samples)
        if not numbers:
            return numbers, batch.skipped, np.empty((0, len(units)))
        images = batch.images.to(parameter.device, parameter.dtype)
        if not checked:
            check_images(model, images)
        checked = True
        values, _ = peaks(model, images, units)
        check_finite(model, images, values, numbers=numbers)
        return numbers, batch.skipped, values.double().cpu().numpy()

    bar = partial(tqdm, desc="searching", unit="batch", leave=False, disable=None)
    batches = processes.share(range(0, len(dataset), batch_size), search, bar=bar)
    numbers = np.array([number for part, _, _ in batches for number in part], int)
    skipped = [one for _, part, _ in batches for one in part]
    if not len(numbers):
        check_images(model, torch.empty(0))
    values = np.concatenate([part for _, _, part in batches])  # (N, U)
    strongest = []
    for unit, column in zip(units, values.T, strict=True):
        best = np.argsort(-column, kind="stable")[:count]
        best = best[column[best] > 0]
        indices = tuple(numbers[best].tolist())
        names = tuple(dataset.split.describe(index) for index in indices)
        classes = tuple(str(label_names[dataset.split.labels[index]]) for index in indices)
        about = (unit, len(numbers), float(column.max()), indices, names, classes)
        if not indices:
            strongest.append(Strongest(*about, None))
            continue
        images = collate([dataset[index] for index in indices]).images
        found = model.explain(images, layer=unit.layer, unit=(unit.channel, "max"), batch_size=batch_size)
        size = tuple(found.images.shape[2:])
        pictures, limit = unit_pictures(found, receptive_fields(model, unit.layer, found.position, size))
        strongest.append(Strongest(*about, found, tuple(pictures), limit))
    return strongest, skipped


def unit_sheet(strongest: Sequence[Strongest]) -> Any:
    """Draw a matplotlib figure with a row for each unit: what it sees in the images that activate it most.

    Raises:
        ImportError: matplotlib is missing.
    """
    columns = max(len(row.indices) for row in strongest)
    height = 3 * _SIDE + 0.95
    page = Page(max(columns, 3) * _STEP + GAP + 0.6, _HEAD + sum(height if row.indices else 0.5 for row in strongest))
    width = max(columns, 3) * _STEP
    heading = (
        "What a unit sees (grey: outside of the image), the colours",
        "it responds to, and each pixel's contribution",
    )
    for number, line in enumerate(heading):
        page.text(GAP, 0.22 + 0.13 * number, line, width=width, color=GREY)
    top = _HEAD
    for row in strongest:
        page.text(GAP, top + 0.2, f"{row.unit}", width=width, size=9, weight="bold")
        if row.found is None:
            words = f"never fires: its largest activation in {row.searched:,} images is {row.largest:.3g}"
            page.text(GAP, top + 0.36, words, width=width, color=GREY)
            top += 0.5
            continue
        values, residuals = row.found.value.tolist(), from_no_pixel(row.found)
        for number, (value, name, label) in enumerate(zip(values, row.names, row.classes, strict=True)):
            left = GAP + number * _STEP
            page.text(left, top + 0.38, _short_name(name), width=_SIDE, color=GREY, size=6)
            shape = row.pictures[number].seen.shape
            h, w = (_SIDE * side / max(shape) for side in shape[:2])
            for line, pixels in enumerate(row.pictures[number]):
                page.picture(pixels, left, top + 0.44 + line * (h + 0.05), w, h)
            foot = top + 0.44 + 3 * (h + 0.05)
            page.text(left, foot + 0.09, f"{value:.4g}", width=_SIDE)
            page.text(left + _SIDE, foot + 0.09, label, width=0.6 * _SIDE, color=GREY, ha="right")
            if residuals[number]:
                page.text(left, foot + 0.2, f"from no pixel: {residuals[number]}", width=_SIDE)
        middle = top + 0.44 + 2 * (_SIDE + 0.05)
        draw_scale(page, GAP + len(row.indices) * _STEP - GAP + 0.08, middle, _SIDE, row.limit, "contribution")
        top += height
    return page.figure


def _short_name(name: str) -> str:
    """The file of an image, where it is known, else its row."""
    file = re.search(r" \((.*)\)$", name)
    return PurePath(file[1]).name if file else name
