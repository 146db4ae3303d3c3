"""Render arrays as images: signed heat maps, overlays, coloured explanations (RGBA) and figures.

Inputs are NumPy arrays, or tensors of any float dtype on any device. Only `figure` needs matplotlib. Nothing touches
matplotlib's global state, so everything works without a display and in several threads at once.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from .sheet import GAP, GREY, INK, PANEL, PITCH, Page
from .writing import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# From evidence against (blue) to evidence for (red). The number of colours is odd, so that zero is exactly the middle
# one. ColorBrewer's RdBu: readers with any kind of colour vision can tell its ends apart.
EVIDENCE_COLORS = np.frombuffer(
    bytes.fromhex("053061 2166ac 4393c3 92c5de d1e5f0 f7f7f7 fddbc7 f4a582 d6604d b2182b 67001f"), np.uint8
).reshape(-1, 3)


def color_limit(contributions: ArrayLike, *, percentile: float = 99.5) -> float:
    """Compute the end of a symmetric colour scale, in logits, robust to a few extreme pixels.

    It is always positive: the maximum if the percentile is 0, and a tiny number if every contribution is 0.

    Args:
        contributions: any shape, in logits; one limit is computed for all of them.
        percentile: of the absolute contributions, in (0, 100]; 100 is the maximum.

    Raises:
        ValueError: the percentile is out of range, the array is empty, or a contribution is NaN or infinite.
    """
    return _limit(np.abs(_finite(contributions, "contributions", 1)), percentile, axis=None).item()


def heatmap(contributions: ArrayLike, *, limit: float | None = None, percentile: float = 99.5) -> np.ndarray:
    """Draw a signed heat map, uint8 (..., H, W, 3): red is evidence for, blue against, light grey exactly zero.

    Args:
        contributions: (..., H, W), signed, in logits.
        limit: the contribution with the strongest colour, in logits; None uses `color_limit` of each map separately.
            Pass a common limit to compare maps.
        percentile: see `color_limit`.

    Raises:
        ValueError: as `color_limit`, or the limit is not positive.
    """
    strength = _strength(_finite(contributions, "contributions", 2), limit, percentile)
    return np.rint(_evidence_colors(strength)).astype(np.uint8)


def overlay(
    images: ArrayLike, contributions: ArrayLike, *, limit: float | None = None, percentile: float = 99.5
) -> np.ndarray:
    """Draw a heat map over the greyscale image, uint8 (..., H, W, 3): stronger evidence is more opaque.

    A map with another resolution (of an inner layer) is resized to the image by nearest neighbour, so that every
    position of that layer stays visible as one block.

    Args:
        images: (..., 3 or 1, H, W) in [0, 1].
        contributions: (..., h, w), signed, in logits; with several targets per image, their dimension comes directly
            before (h, w).
        limit: see `heatmap`.
        percentile: see `color_limit`.

    Raises:
        ValueError: as `heatmap`, or shapes do not match, or images are outside [0, 1].
    """
    pictures = as_pictures(images)  # (..., H, W, 3)
    maps = _finite(contributions, "contributions", 2)
    lead = pictures.ndim - 3
    if maps.ndim < lead + 2 or maps.shape[:lead] != pictures.shape[:lead]:
        expected = (*pictures.shape[:lead], "(T)", "h", "w")
        raise ValueError(f"contributions must have the shape {expected} to fit the images, got {maps.shape}")
    (height, width), (h, w) = pictures.shape[-3:-1], maps.shape[-2:]
    row, column = np.arange(height)[:, None] * h // height, np.arange(width) * w // width
    strength = _strength(maps, limit, percentile)[..., row, column, None]  # (..., H, W, 1)
    grey = pictures @ np.array([[0.299], [0.587], [0.114]])
    grey = 0.35 + 0.6 * np.expand_dims(grey, tuple(range(lead, maps.ndim - 2)))
    # Use only the vivid middle of each half of the scale: opacity already shows the strength of the evidence, and dark
    # colours would hide the image.
    color = _evidence_colors((0.6 + 0.2 * np.abs(strength[..., 0])) * np.sign(strength[..., 0])) / 255
    return np.rint(255 * (grey + np.abs(strength) * (color - grey))).astype(np.uint8)


def rgba(
    weights: ArrayLike, *, contributions: ArrayLike, smooth: int | None = None, percentile: float = 99.5
) -> np.ndarray:
    """Render the colours that a class responds to, opaque where they occur: float32 RGBA (..., H, W, 4) in [0, 1].

    Colour: w_c / (w_c + w_{1-c}) for each pair of weights for (c, 1 - c), with negative weights set to 0; 0.5 if
    neither is positive. It shows the direction of the weights, not their length. Opacity: the length of the weights
    where the contribution is positive, averaged over a window, divided by its percentile and clipped at 1; 0 everywhere
    if there is no evidence for the class. After Böhle, Fritz, Schiele, CVPR 2022 (arXiv 2205.10268).

    Args:
        weights: (..., 6, H, W) for the channels (r, g, b, 1-r, 1-g, 1-b), or (..., 2, H, W) for (grey, 1-grey).
        contributions: (..., H, W), signed, in logits.
        smooth: side of the window in pixels, 1 for no smoothing; None scales 15 pixels at height 224 to this height.
        percentile: of the opacities of a map, see `color_limit`.

    Raises:
        ValueError: as `color_limit`, or shapes do not match, or the window is below 1.
    """
    w, maps = _finite(weights, "weights", 3), _finite(contributions, "contributions", 2)
    if w.shape[-3] not in (2, 6) or (*w.shape[:-3], *w.shape[-2:]) != maps.shape:
        expected = "weights must be (..., 6 or 2, H, W), and contributions the same without the channels"
        raise ValueError(f"{expected}, got {w.shape} and {maps.shape}")
    smooth = max(1, round(15 * maps.shape[-2] / 224)) | 1 if smooth is None else smooth
    if smooth < 1:
        raise ValueError(f"smooth must be at least 1 pixel (no smoothing), got {smooth}")
    alpha = np.where(maps > 0, np.linalg.norm(w, axis=-3), 0)
    alpha = _box_average(_box_average(alpha, smooth, -1), smooth, -2)
    alpha = np.minimum(alpha / _limit(alpha, percentile, axis=(-2, -1)), 1)
    color, inverse = np.split(np.maximum(w, 0), 2, axis=-3)
    total = color + inverse
    color = np.divide(color, total, out=np.full_like(total, 0.5), where=total > 0)
    color = np.broadcast_to(np.moveaxis(color, -3, -1), (*maps.shape, 3))
    return np.concatenate([color, alpha[..., None]], axis=-1, dtype=np.float32)


def figure(
    images: ArrayLike,
    *,
    contributions: ArrayLike,
    logits: ArrayLike | None = None,
    targets: ArrayLike | None = None,
    bias: float = 0.0,
    label_names: Sequence[str] | None = None,
    true_labels: ArrayLike | None = None,
    values: ArrayLike | None = None,
    titles: Sequence[Sequence[str]] | None = None,
    max_rows: int = 8,
) -> "Figure":
    """Draw a matplotlib figure: one row per image, with its most probable classes and a signed heat map per target.

    The maps of a row share one colour scale, so they can be compared. Below each map is its sum, logit = bias + sum of
    the map, and the residual if it exceeds 1 % of the logit (at least 0.01). Probabilities are sigmoids because the
    networks are trained with binary cross-entropy. For units that are not classes, pass `values` instead of `logits`.

    Args:
        images: (B, 3 or 1, H, W) in [0, 1].
        contributions: (B, T, h, w), or (B, h, w) for T = 1; signed, in logits.
        logits: (B, classes).
        targets: (B, T), or (B,) for T = 1: the explained classes; required with `logits`.
        bias: the part of each logit or value that no pixel contributes.
        label_names: a name for each class; None shows "class 3".
        true_labels: (B,), marks the predictions as correct or wrong; unused without `logits`.
        values: (B, T), or (B,) for T = 1: the explained outputs.
        titles: (B, T) headings of the maps; None shows the names of the targets.
        max_rows: maximum number of images shown, starting with the first.

    Raises:
        ValueError: as `color_limit`, or arguments do not match each other.
        ImportError: matplotlib is missing.
    """
    pictures, maps = as_pictures(images), _finite(contributions, "contributions", 3)
    maps = maps[:, None] if maps.ndim == 3 else maps  # (B, T, h, w)
    if pictures.ndim != 4 or maps.ndim != 4 or len(pictures) != len(maps):
        expected = "figure needs images (B, 3 or 1, H, W) and contributions (B, T, h, w) or (B, h, w)"
        raise ValueError(f"{expected}, got {np.shape(images)} and {np.shape(contributions)}")
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    batch, per_image = maps.shape[:2]
    outputs, explained, truth, names = None, [], None, []
    if logits is not None and targets is not None and values is None:
        word, outputs = "logit", _finite(logits, "logits", 2)
        classes = outputs.shape[-1]
        outputs = _shaped(outputs, "logits", (batch, classes))
        explained = _labels(targets, "targets", (batch, per_image), classes)
        truth = None if true_labels is None else _labels(true_labels, "true_labels", (batch,), classes)
        scores = np.take_along_axis(outputs, np.array(explained), 1)
        names = [f"class {i}" for i in range(classes)] if label_names is None else list(label_names)
        if len(names) < classes:
            raise ValueError(f"label_names has {len(names)} names for {classes} classes: give one for each class")
        headings = [[names[i] for i in row] for row in explained] if titles is None else titles
    elif values is not None and logits is None:
        word, scores = "value", _shaped(_finite(values, "values", 1), "values", (batch, per_image))
        headings = [[""] * per_image] * batch if titles is None else titles
    else:
        raise ValueError("figure needs logits and targets, or values without logits for units that are not classes")
    if np.shape(headings) != (batch, per_image):
        raise ValueError(f"titles must have shape {(batch, per_image)}, one for each map, got {np.shape(headings)}")

    rows = min(batch, max_rows)
    height, width = (PANEL * side / max(pictures.shape[1:3]) for side in pictures.shape[1:3])  # inches
    row_height = max(height, 0.75 * PANEL)
    captions = ["input", *["probability (sigmoid)"] * (outputs is not None), "evidence for and against"]
    width_inches = (len(captions) - 1 + per_image) * PITCH + 0.85
    page = Page(width_inches, 0.25 + rows * (row_height + 0.62) + 0.2 * (rows < batch))
    for i, caption in enumerate(captions):
        page.text(GAP + i * PITCH, 0.2, caption, color=GREY)
    for row in range(rows):
        left, top = GAP, 0.54 + row * (row_height + 0.62)
        head, foot = top - 0.07, top + height + 0.15
        page.picture(pictures[row], left, top, width, height)
        if outputs is not None:
            if truth is not None:
                right = truth[row] == outputs[row].argmax()
                page.text(left, head, f"true: {names[truth[row]]}", size=9)
                page.text(left, foot, "✓ correct" if right else "✗ wrong", color="#1a7a3a" if right else "#b3480a")
            left += PITCH
            _draw_probabilities(page, left, top, row_height / 5, outputs[row], explained[row], names)
            if outputs[row].max() < 0:
                page.text(
                    left, top + row_height + 0.15, "nothing recognised: all below 50 %", color="#b3480a", shrink=True
                )
        limit = color_limit(maps[row])
        for title, score, contribution in zip(headings[row], scores[row].tolist(), maps[row], strict=True):
            left += PITCH
            page.text(left, head, title, size=9, weight="bold")
            page.picture(heatmap(contribution, limit=limit), left, top, width, height)
            total = contribution.sum(dtype=np.float64).item()
            residual = score - float(bias) - total
            # Adding 0 turns a negative zero into zero.
            shown = [f"{round(number, 2) + 0.0:.2f}" for number in (score, float(bias), abs(total), residual)]
            sign = "-" if round(total, 2) < 0 else "+"
            page.text(left, foot, f"{word} {shown[0]} = bias {shown[1]} {sign} {shown[2]}", shrink=True)
            if abs(residual) > 0.01 * max(1, abs(score)):
                page.text(left, foot + 0.13, f"residual {shown[3]}", shrink=True)
        draw_scale(page, left + PANEL + 0.14, top, max(height, 0.8), limit, f"contribution ({word})")
    if rows < batch:
        page.text(GAP, page.height - 0.1, f"first {rows} of {batch} images", color=GREY)
    return page.figure


def save_image(array: ArrayLike, path: str | os.PathLike[str]) -> None:
    """Write RGB or RGBA images to a PNG file atomically.

    Args:
        array: uint8, or float in [0, 1]: (H, W, C), or (B, H, W, C) drawn side by side, or (B, T, H, W, C) drawn in B
            rows and T columns; C is 3 or 4.
        path: ends in .png; missing folders are created.

    Raises:
        ValueError: another suffix or shape, or values that are NaN or out of range.
    """
    from PIL import Image

    _check_suffix(path, (".png",))
    integers = str(getattr(array, "dtype", None)).endswith("uint8")
    pixels = _array(array, np.uint8) if integers else 255 * _finite(array, "array", 3)
    if pixels.ndim not in (3, 4, 5) or pixels.shape[-1] not in (3, 4):
        raise ValueError(f"save_image needs (H, W, C), (B, H, W, C) or (B, T, H, W, C), C = 3 or 4, got {pixels.shape}")
    if pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(f"images that are not uint8 must lie in [0, 1], got up to {pixels.max() / 255:.3g}")
    pixels = pixels[(None,) * (5 - pixels.ndim)]
    b, t, h, w, c = pixels.shape
    grid = Image.fromarray(np.rint(pixels).astype(np.uint8).swapaxes(1, 2).reshape(b * h, t * w, c))
    with replacing(path) as stream:
        grid.save(stream, format="PNG")


def save_figure(figure: "Figure", path: str | os.PathLike[str], *, text: Mapping[str, str] | None = None) -> None:
    """Write a figure to a PNG, SVG or PDF file atomically.

    Dates and versions are omitted, so the same figure gives the same PNG or PDF bytes. SVG bytes differ, because
    matplotlib names the parts of an SVG at random.

    Args:
        figure: any matplotlib figure.
        path: ends in .png, .svg or .pdf; missing folders are created.
        text: text to store in a PNG file, by keyword, such as the fingerprint of the weights.

    Raises:
        ValueError: another suffix.
    """
    unset = {".png": ["Software"], ".svg": ["Date", "Creator"], ".pdf": ["CreationDate", "Creator", "Producer"]}
    suffix = _check_suffix(path, unset)
    with replacing(path) as stream:
        metadata = {**dict.fromkeys(unset[suffix]), **(text or {} if suffix == ".png" else {})}
        figure.savefig(stream, format=suffix[1:], facecolor="white", metadata=metadata)


def save_arrays(arrays: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> None:
    """Write arrays to an .npz file atomically; `numpy.load` reads it.

    Raises:
        ValueError: another suffix.
    """
    _check_suffix(path, (".npz",))
    with replacing(path) as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def _check_suffix(path: str | os.PathLike[str], suffixes: Iterable[str]) -> str:
    """Return the path's suffix in lower case. Raise `ValueError` if it is none of `suffixes`."""
    suffix = Path(path).suffix.lower()
    if suffix not in suffixes:
        raise ValueError(f"cannot write {Path(path).name!r}: the name must end in {' or '.join(suffixes)}")
    return suffix


def _draw_probabilities(
    page: Page, x: float, y: float, step: float, logits: np.ndarray, explained: list[int], names: list[str]
) -> None:
    """Draw bars of the five most probable classes, with dark bars for explained classes."""
    for i, index in enumerate(np.argsort(-logits, kind="stable")[:5].tolist()):
        probability = (1 + math.tanh(logits[index] / 2)) / 2  # the sigmoid, without overflow
        ink, bar = (INK, "#444444") if index in explained else (GREY, "#b4b4b4")
        line = y + i * step + 0.4 * step
        page.text(x, line, names[index], width=PANEL - 0.35, color=ink)
        page.text(x + PANEL, line, f"{probability:.2f}", color=ink, ha="right")
        page.box(x, line + 0.17 * step, PANEL, 0.25 * step, facecolor="#ececec", linewidth=0)
        page.box(x, line + 0.17 * step, PANEL * probability, 0.25 * step, facecolor=bar, linewidth=0)


def draw_scale(page: Page, x: float, y: float, height: float, limit: float, label: str) -> None:
    """Draw the colour scale from +limit (top) to -limit (bottom)."""
    page.picture(heatmap(np.linspace(1, -1, 201)[:, None], limit=1), x, y, 0.1, height)
    page.text(x, y - 0.07, "for", color="#b2182b")
    page.text(x, y + height + 0.15, "against", color="#2166ac")
    end = f"{limit:.2g}" if limit > np.finfo(np.float32).tiny else "0"
    for position, number in ((0.08, f"+{end}"), (height / 2 + 0.04, "0"), (height, f"-{end}")):
        page.text(x + 0.14, y + position, number, width=0.34, shrink=True)
    page.text(x + 0.5, y + height / 2, label, width=height, shrink=True, rotation=90, va="center")


def _array(value: ArrayLike, dtype: type = np.float32) -> np.ndarray:
    """Convert to a NumPy array, including tensors that NumPy cannot read: bfloat16, not on the CPU, with a gradient."""
    if hasattr(value, "detach"):
        tensor = value.detach().cpu()  # pyright: ignore[reportAttributeAccessIssue]
        value = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return np.asarray(value, dtype=dtype)


def _finite(value: ArrayLike, name: str, dimensions: int) -> np.ndarray:
    array = _array(value)
    if array.ndim < dimensions or array.size == 0:
        raise ValueError(f"{name} must have at least {dimensions} dimensions and one entry, got shape {array.shape}")
    wrong = array.size - np.count_nonzero(np.isfinite(array))
    if wrong:
        raise ValueError(f"{name} has {wrong} NaN or infinite entries of {array.size}: check the model's weights")
    return array


def _shaped(array: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if array.shape != shape and (*array.shape, 1) != shape:
        raise ValueError(f"{name} must have shape {shape} to fit the contributions, got {array.shape}")
    return array.reshape(shape)


def _labels(value: ArrayLike, name: str, shape: tuple[int, ...], classes: int) -> list:
    labels = _shaped(_array(value, np.int64), name, shape)
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"{name} must lie in 0..{classes - 1}, got {labels.min()}..{labels.max()}")
    return labels.tolist()


def as_pictures(images: ArrayLike) -> np.ndarray:
    """Convert images (..., 3 or 1, H, W) to channels-last RGB, (..., H, W, 3), in [0, 1].

    Raises:
        ValueError: another shape, or values that are not finite or outside [0, 1].
    """
    pictures = _finite(images, "images", 3)
    low, high = pictures.min(), pictures.max()
    if pictures.shape[-3] not in (1, 3):
        raise ValueError(f"images must be (..., 3 or 1, H, W), RGB or grey and not encoded, got shape {pictures.shape}")
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"images must lie in [0, 1], got {low:.3g}..{high:.3g}: undo the normalisation first")
    pictures = np.moveaxis(np.clip(pictures, 0, 1), -3, -1)
    return np.broadcast_to(pictures, (*pictures.shape[:-1], 3))


def _limit(magnitudes: np.ndarray, percentile: float, axis: tuple[int, ...] | None) -> np.ndarray:
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must lie in (0, 100], got {percentile}")
    limit = np.percentile(magnitudes, percentile, axis=axis, keepdims=True)
    limit = np.where(limit > 0, limit, magnitudes.max(axis=axis, keepdims=True))
    return np.maximum(limit, np.finfo(np.float32).tiny)


def _strength(maps: np.ndarray, limit: float | None, percentile: float) -> np.ndarray:
    """Divide maps by their limit and clip them to [-1, 1]."""
    if limit is not None and not 0 < limit < math.inf:
        raise ValueError(f"limit must be a positive number of logits, or None for the default, got {limit}")
    end = _limit(np.abs(maps), percentile, axis=(-2, -1)) if limit is None else limit
    return np.clip(maps, -end, end) / end


def _evidence_colors(strength: np.ndarray) -> np.ndarray:
    """Map strengths (...) in [-1, 1] to RGB (..., 3) in [0, 255]."""
    anchors = np.linspace(-1, 1, len(EVIDENCE_COLORS))
    return np.stack([np.interp(strength, anchors, channel) for channel in EVIDENCE_COLORS.T], axis=-1)


def _box_average(values: np.ndarray, window: int, axis: int) -> np.ndarray:
    """Average over a centred window. Only positions inside the image count, so edges are not darkened."""
    index = np.arange(values.shape[axis])
    first, end = np.maximum(index - (window - 1) // 2, 0), np.minimum(index + window // 2 + 1, len(index))
    total = np.insert(np.cumsum(values, axis=axis, dtype=np.float64), 0, 0, axis=axis)
    total = np.take(total, end, axis=axis) - np.take(total, first, axis=axis)
    return total / np.expand_dims(end - first, tuple(range(axis + 1, 0)))
