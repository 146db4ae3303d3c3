"""Locate the part of an image that a model sees, and draw its evidence there.

A model's eval transform resizes an image and crops its centre, so a contribution map covers only that part.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from ..explanation import overlay

__all__ = ["eval_transform", "overlay_whole", "seen_box"]


def eval_transform(model: Any) -> Callable[[Image.Image], Tensor]:
    """Create the transform from an RGB image to the model's input, (C, H, W) in [0, 1]."""
    transform: Any = create_transform(**resolve_model_data_config(model), is_training=False)
    if model.in_chans == 1:
        return lambda image: transform(image.convert("L").convert("RGB"))[:1]
    return transform


def seen_box(config: dict[str, Any], width: int, height: int) -> tuple[float, float, float, float]:
    """Compute the part of an image that timm's eval transform keeps: (left, top, right, bottom), in image pixels.

    It extends beyond the image where the transform adds borders.

    Args:
        config: timm's data configuration (`timm.data.resolve_model_data_config`).
        width: image width in pixels.
        height: image height in pixels.
    """
    size = config["input_size"][-2:]
    resized_height, resized_width = (math.floor(side / config["crop_pct"]) for side in size)
    if config["crop_mode"] != "squash":
        choose = max if config["crop_mode"] == "border" else min
        ratio = choose(height / resized_height, width / resized_width)
        resized_height, resized_width = height / ratio, width / ratio
    part_height, part_width = size[0] / resized_height * height, size[1] / resized_width * width
    left, top = (width - part_width) / 2, (height - part_height) / 2
    return left, top, left + part_width, top + part_height


def overlay_whole(
    picture: np.ndarray, contributions: ArrayLike, *, box: tuple[float, float, float, float], limit: float
) -> np.ndarray:
    """Draw evidence over a whole image, uint8 (H, W, 3), as `overlay` does; parts the model does not see are dark.

    Args:
        picture: uint8 (H, W, 3).
        contributions: (h, w), signed, in logits.
        box: position of the contributions in the image, see `seen_box`.
        limit: the contribution with the strongest colour, in logits.
    """
    maps = np.asarray(contributions)
    left, top, right, bottom = box
    height, width = picture.shape[:2]
    row = np.floor((np.arange(height) + 0.5 - top) / (bottom - top) * maps.shape[0]).astype(int)
    column = np.floor((np.arange(width) + 0.5 - left) / (right - left) * maps.shape[1]).astype(int)
    rows, columns = (row >= 0) & (row < maps.shape[0]), (column >= 0) & (column < maps.shape[1])
    placed = np.zeros((height, width), maps.dtype)
    placed[np.ix_(rows, columns)] = maps[np.ix_(row[rows], column[columns])]
    drawn = overlay(np.moveaxis(picture, -1, 0) / np.float32(255), placed, limit=limit)
    seen = rows[:, None] & columns
    drawn[~seen] //= 3
    return drawn
