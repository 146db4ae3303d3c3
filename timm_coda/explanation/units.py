"""Where the units of inner layers are active, and which pixels they see there."""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .compute import explanation_mode, output_map, output_of, unit_output
from .figures import as_pictures, color_limit, heatmap, rgba
from .result import Explanation

__all__ = ["Box", "Unit", "UnitPicture", "from_no_pixel", "peaks", "receptive_fields", "unit_pictures"]

_PROBES = 2  # images of noise; a maximum or a gate may hide a pixel in one of them
_PADDING = 200  # grey level, neither a map's zero nor white


class Unit(NamedTuple):
    """A channel of a layer."""

    layer: str
    channel: int

    @classmethod
    def parse(cls, text: str) -> "Unit":
        """Return the unit that is written as LAYER:CHANNEL, such as `stages.1:5`.

        Raises:
            ValueError: the text is not written so.
        """
        layer, colon, channel = text.rpartition(":")
        if not (layer and colon and channel.isdecimal()):
            raise ValueError(f"unit {text!r}: write LAYER:CHANNEL with a channel from 0, such as stages.1:5")
        return cls(layer, int(channel))

    def __str__(self) -> str:
        return f"{self.layer}:{self.channel}"


class Box(NamedTuple):
    """A rectangle of an image in pixels; `bottom` and `right` are outside of it."""

    top: int
    left: int
    bottom: int
    right: int


@torch.no_grad()
def peaks(model: Any, images: Tensor, units: Sequence[Unit]) -> tuple[Tensor, Tensor]:
    """Find the largest activation of units in each image, with one forward pass and no backward pass.

    Args:
        model: a timm_coda model in eval mode
        images: as the model takes them, on its device, (B, C, H, W)
        units: the units, U of them

    Returns:
        The activations (B, U), float32 or better, and their rows and columns (B, U, 2).

    Raises:
        ValueError: the model has no such layer or channel, or the layer does not output a map.
    """
    with ExitStack() as stack:
        layers = dict.fromkeys(unit.layer for unit in units)
        outputs = {layer: stack.enter_context(output_of(model, layer)) for layer in layers}
        model(images)
    maps = {layer: output_map(model, images, found, layer) for layer, found in outputs.items()}
    values, positions = [], []
    for layer, channel in units:
        value, position = unit_output(maps[layer], (channel, "max"), layer)
        values.append(value[:, 0])
        positions.append(position)
    return torch.stack(values, 1), torch.stack(positions, 1)


def receptive_fields(model: Any, layer: str, positions: Any, size: tuple[int, int]) -> list[Box]:
    """Find the pixels that the units of a layer see: no other pixel contributes to them, in any image.

    They are the support of the map W(x) of all channels, computed for images of noise by a float64 copy of the model
    on the CPU: fast convolutions in float32 leave rounding errors where a sum is exactly 0.

    Args:
        model: a timm_coda model
        layer: name of an inner layer that outputs a map or tokens
        positions: rows and columns in that output, (N, 2)
        size: height and width of the images in pixels

    Returns:
        The box of each position. All have the same size: they extend beyond the image where padding is seen.

    Raises:
        ValueError: the model has no such layer, or it does not output a map.
    """
    wanted = [tuple(place) for place in torch.as_tensor(positions).tolist()]
    found = {}
    with ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False)):
            stack.enter_context(context)
        twin, random = copy.deepcopy(model).cpu().double().eval(), torch.Generator().manual_seed(0)
        stack.enter_context(explanation_mode(twin))
        noise = torch.rand(_PROBES, model.in_chans, *size, dtype=torch.float64, generator=random)
        encoded = twin.encoding(noise).detach().requires_grad_()
        with output_of(twin, layer) as outputs:
            twin(encoded)
        inner = output_map(twin, encoded, outputs, layer)
        middle = (inner.shape[2] // 2, inner.shape[3] // 2)
        for row, column in {*wanted, middle}:
            weights = torch.autograd.grad(inner[:, :, row, column].sum(), encoded, retain_graph=True)[0]
            seen = (weights != 0).flatten(0, 1).any(0)
            found[row, column] = _ends(seen.any(1)), _ends(seen.any(0))
    sides = [max(end - start for start, end in axis) for axis in zip(*found.values(), strict=True)]
    boxes = []
    for place in wanted:
        (top, bottom), (left, right) = (_whole(span, side) for span, side in zip(found[place], sides, strict=True))
        boxes.append(Box(top, left, bottom, right))
    return boxes


def _ends(seen: Tensor) -> tuple[int, int]:
    """The first and the last True and 1; all if there is none, as in a network without weights."""
    places = seen.nonzero().flatten().tolist() or [0, len(seen) - 1]
    return places[0], places[-1] + 1


def _whole(span: tuple[int, int], side: int) -> tuple[int, int]:
    """Extend a span by what the image's border cuts off."""
    start, end = span
    return (end - side, end) if start == 0 else (start, start + side)


def from_no_pixel(found: Explanation) -> list[str]:
    """For each image, the part of an activation that no pixel contributes, if it is above 1 %, else "".

    It is the share of a vision transformer's position embedding.
    """
    parts = zip(found.residual.tolist(), found.value.tolist(), strict=True)
    return [f"{residual:.4g}" if abs(residual) > 0.01 * abs(value) else "" for residual, value in parts]


class UnitPicture(NamedTuple):
    """What a unit sees in an image: pictures of its receptive field, uint8 (height, width, 3)."""

    seen: np.ndarray
    """The image."""
    colours: np.ndarray
    """The colours that the unit responds to, see `figures.rgba`, on white."""
    signed: np.ndarray
    """The contributions to its activation, see `figures.heatmap`."""


def unit_pictures(found: Explanation, boxes: Sequence[Box]) -> tuple[list[UnitPicture], float]:
    """Draw what a unit sees in each image. All maps share one colour scale. Padding outside of an image is grey.

    Args:
        found: explanation of a unit at one position of each image
        boxes: its receptive field in each image, see `receptive_fields`

    Returns:
        The pictures, and the contribution with the strongest colour.
    """
    images, arrays = as_pictures(found.images), found.arrays()  # (B, H, W, 3)
    smooth = max(1, round(15 * images.shape[1] / 224)) | 1  # as in figures.rgba
    inside = [(slice(max(box.top, 0), box.bottom), slice(max(box.left, 0), box.right)) for box in boxes]
    maps = [whole[part] for whole, part in zip(arrays["contributions"], inside, strict=True)]
    limit = color_limit(np.concatenate([part.ravel() for part in maps]))
    pictures = []
    for image, weights, part, signed, box in zip(images, arrays["weights"], inside, maps, boxes, strict=True):
        colours = rgba(weights[:, *part], contributions=signed, smooth=smooth)
        colours = 1 - colours[..., 3:] * (1 - colours[..., :3])
        drawn = [np.rint(255 * image[part]), np.rint(255 * colours), heatmap(signed, limit=limit)]
        pictures.append(UnitPicture(*(_padded(pixels.astype(np.uint8), box, image.shape) for pixels in drawn)))
    return pictures, limit


def _padded(pixels: np.ndarray, box: Box, shape: tuple[int, ...]) -> np.ndarray:
    rows = max(-box.top, 0), max(box.bottom - shape[0], 0)
    columns = max(-box.left, 0), max(box.right - shape[1], 0)
    return np.pad(pixels, (rows, columns, (0, 0)), constant_values=_PADDING)
