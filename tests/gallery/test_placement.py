"""Location of the part of an image that a model sees, compared with timm's own transform."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from timm_coda.gallery.placement import overlay_whole, seen_box

BASE = {"interpolation": "bilinear", "mean": (0, 0, 0), "std": (1, 1, 1), "crop_pct": 1.0, "crop_mode": "center"}


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (400, 400), (301, 950)])
@pytest.mark.parametrize(
    "config",
    [
        {"input_size": (3, 224, 224)},
        {"input_size": (3, 224, 224), "crop_pct": 224 / 256},
        {"input_size": (3, 64, 96), "crop_pct": 0.9},
        {"input_size": (3, 224, 224), "crop_mode": "squash", "crop_pct": 0.95},
        {"input_size": (3, 224, 224), "crop_mode": "border"},
    ],
    ids=["whole", "crop", "oblong", "squash", "border"],
)
def test_seen_box_is_what_the_transform_keeps(config, size):
    config = BASE | config
    width, height = size
    # Red encodes the column of a pixel and green its row. Blue is 255 inside the image and 0 in borders.
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    picture = np.stack([across, down, np.full_like(across, 255)], -1).round().astype(np.uint8)
    seen = create_transform(**config, is_training=False)(Image.fromarray(picture))
    assert isinstance(seen, torch.Tensor)
    left, top, right, bottom = seen_box(config, width, height)
    rows, columns = seen.shape[1:]
    x = left + (np.arange(columns) + 0.5) / columns * (right - left)
    y = top + (np.arange(rows) + 0.5) / rows * (bottom - top)
    inside = (x > 3) & (x < width - 3), (y > 3) & (y < height - 3)
    assert inside[0].sum() > 10 and inside[1].sum() > 10
    middle = rows // 2, columns // 2
    shown = seen.numpy()
    step = max(x[1] - x[0], y[1] - y[0])  # one pixel of the model's input, in pixels of the original image
    assert np.abs(shown[0, middle[0]][inside[0]] * width - x[inside[0]]).max() < 1.5 * step + 3
    assert np.abs(shown[1, :, middle[1]][inside[1]] * height - y[inside[1]]).max() < 1.5 * step + 3
    beyond = (x < -3) | (x > width + 3)
    assert (shown[2, middle[0]][beyond] == 0).all(), "borders"


def test_overlay_of_a_whole_picture():
    picture = np.full((4, 8, 3), 128, np.uint8)
    maps = np.array([[1.0, 0.0], [-1.0, 0.0]])
    drawn = overlay_whole(picture, maps, box=(2, 0, 6, 4), limit=1).astype(int)
    assert drawn.shape == (4, 8, 3)
    assert len(np.unique(drawn[:2, 2:4].reshape(-1, 3), axis=0)) == 1
    assert drawn[0, 2, 0] > drawn[0, 2, 2] + 100, "red, for"
    assert drawn[2, 2, 2] > drawn[2, 2, 0] + 100, "blue, against"
    assert np.ptp(drawn[:, 4:6], axis=-1).max() == 0, "grey, no evidence"
    assert drawn[:, [0, 1, 6, 7]].max() < drawn[:, 4:6].min() / 2, "dark, not seen"
    beyond = overlay_whole(picture, maps, box=(-4, -2, 12, 6), limit=1).astype(int)
    assert beyond[0, 0, 0] > beyond[0, 0, 2] + 100 and beyond[3, 0, 2] > beyond[3, 0, 0] + 100
