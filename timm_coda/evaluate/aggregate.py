"""Mean explanations of classes over a dataset: by pixel, and by position and channel of an inner layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..explanation import (
    GAP,
    GREY,
    INK,
    PANEL,
    PITCH,
    Explanation,
    Page,
    as_pictures,
    color_limit,
    draw_scale,
    explain,
    heatmap,
    output_of,
)
from .base import EvaluationError, Subject, progress_bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Aggregate", "aggregate", "figure"]


@dataclass(frozen=True)
class Aggregate:
    """Exact contributions to a class's logit, averaged over the images of that class, for K classes.

    `values = bias + contributions.sum((1, 2))` up to the model's residual, and likewise with `channels.sum(1)`: means
    of exact sums are exact.
    """

    classes: np.ndarray
    """Class indices, (K,)."""
    counts: np.ndarray
    """Number of images of each class, (K,)."""
    values: np.ndarray
    """Mean logit of the class on its images, (K,)."""
    bias: float
    """Part of each logit to which no input contributes."""
    images: np.ndarray
    """Mean image, colours in [0, 1], (K, C, H, W)."""
    contributions: np.ndarray
    """Mean contribution of each pixel, signed, in logits, (K, H, W)."""
    colors: np.ndarray
    """Mean colour of each pixel, weighted by its positive contributions (evidence for the class), (K, C, H, W)."""
    evidence: np.ndarray
    """Mean positive contribution of each pixel, in logits, (K, H, W)."""
    layer: str | None = None
    """Inner layer of `positions` and `channels`."""
    positions: np.ndarray | None = None
    """Mean contribution of each position of the layer, signed, in logits, (K, h, w)."""
    channels: np.ndarray | None = None
    """Mean contribution of each channel of the layer, summed over positions, signed, in logits, (K, D)."""
    label_names: tuple[str, ...] = ()

    def strongest(self, row: int, count: int = 8) -> np.ndarray:
        """Return the channels with the largest absolute mean contributions to a row's class, largest first."""
        if self.channels is None:
            raise ValueError("there are no channels without a layer: pass layer= to aggregate()")
        return np.argsort(-np.abs(self.channels[row]), kind="stable")[:count]


def aggregate(subject: Subject, *, classes: Sequence[int] | None = None, layer: str | None = None) -> Aggregate:
    """Average explanations of the true classes of a subject's first `count` images, whatever the model predicts.

    Images are explained in batches of `batch_size`, and only sums are stored: 64 bytes per pixel of each class.

    Args:
        subject: one of our models with labelled images of one size
        classes: class indices; None for all classes that have an image
        layer: name of an inner layer, as in `explain`; None for pixels only

    Raises:
        EvaluationError: a class has no image.
        ValueError: the layer is unknown, or another argument that `explain` rejects.
        TypeError: the model cannot explain itself.
    """
    labels = subject.labels[: subject.count]
    wanted = np.unique(labels) if classes is None else np.array(classes)
    missing = sorted(set(wanted.tolist()) - set(labels.tolist()))
    if missing or len(wanted) == 0:
        raise EvaluationError(
            f"no image of class {missing} among {len(labels)} images: leave out the class, or use more images"
        )
    numbers = np.flatnonzero(np.isin(labels, wanted))
    counts = np.array([(labels == c).sum() for c in wanted])
    row = {c: k for k, c in enumerate(wanted.tolist())}
    sums: dict[str, np.ndarray] = {}
    bias = 0.0
    for start in progress_bar(range(0, len(numbers), subject.batch_size), "mean explanations"):
        now = numbers[start : start + subject.batch_size]
        targets = torch.from_numpy(labels[now])
        images = subject.load(now.tolist())
        explanation = explain(subject.model, images, targets)
        bias = explanation.bias
        positive = explanation.contributions.clamp(min=0)
        parts = {
            "values": explanation.value,
            "images": explanation.images,
            "contributions": explanation.contributions,
            "evidence": positive,
            "colors": positive[:, None] * explanation.images,
        }
        if layer is not None:
            inner, shares = _by_channel(subject.model, images, targets, layer)
            parts |= {"positions": inner.contributions, "channels": shares}
        rows = np.array([row[c] for c in labels[now].tolist()])
        for name, values in parts.items():
            values = values.double().cpu().numpy()
            total = sums.setdefault(name, np.zeros((len(wanted), *values.shape[1:])))
            np.add.at(total, rows, values)
    evidence = sums["evidence"][:, None]
    # Without positive evidence the weighted colour is undefined: use the mean image's, with zero evidence.
    scale = counts[:, None, None, None]
    colors = np.divide(sums.pop("colors"), evidence, out=sums["images"] / scale, where=evidence > 0)
    means = {name: total / counts.reshape(-1, *[1] * (total.ndim - 1)) for name, total in sums.items()}
    return Aggregate(wanted, counts, bias=bias, colors=colors, layer=layer, label_names=subject.label_names, **means)


def _by_channel(model: Any, images: Tensor, targets: Tensor, layer: str) -> tuple[Explanation, Tensor]:
    """Return the explanation by a layer's output, and the contribution of each of its channels (B, D)."""
    with output_of(model, layer) as outputs:
        explanation = explain(model, images, targets, layer=layer)
    weights, output = explanation.weights, outputs[0].detach()
    if output.dim() == 3:  # tokens (B, H * W, D)
        output = output.transpose(1, 2).reshape(weights.shape)
    return explanation, (weights * output.to(weights.dtype)).sum((2, 3))


def figure(result: Aggregate, *, max_rows: int = 10, max_channels: int = 8) -> "Figure":
    """Draw a row per class: mean image, mean contributions, colours of the evidence, and the layer's contributions.

    The rows of a column share one scale, so that classes can be compared. Evidence is opaque at the end of the scale.

    Args:
        result: from `aggregate`
        max_rows: maximum number of classes, starting with the first
        max_channels: maximum number of channels per class: those with the largest absolute contributions

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is missing.
    """
    rows = min(len(result.classes), max_rows)
    height, width = (PANEL * side / max(result.contributions.shape[1:]) for side in result.contributions.shape[1:])
    tall = max(height, 0.8)  # minimum height of a scale
    pitch, scale = PITCH, 0.75  # inches per image, and per scale beside it
    # Left edges of: mean image, contributions, their colours, the layer's positions, its channels.
    left = np.cumsum([GAP, pitch, pitch + scale, pitch, pitch + scale])
    page_width = left[3] if result.layer is None else left[4] + pitch
    page = Page(page_width, 0.35 + rows * (tall + 0.55) + 0.2 * (rows < len(result.classes)))
    captions = ["mean image", "mean contributions", "colours of the evidence"]
    if result.layer is not None:
        captions += [f"positions of {result.layer}", f"channels of {result.layer}"]
    for x, caption in zip(left, captions, strict=False):
        page.text(x, 0.2, caption, color=GREY)
    limit = color_limit(result.contributions[:rows])
    inner_limit = 1.0 if result.positions is None else color_limit(result.positions[:rows])
    for k in range(rows):
        top = 0.5 + k * (tall + 0.55)
        number = int(result.classes[k])
        name = result.label_names[number] if number < len(result.label_names) else f"class {number}"
        page.text(left[0], top - 0.07, name, size=9, weight="bold")
        page.picture(as_pictures(result.images[k]), left[0], top, width, height)
        page.text(left[0], top + height + 0.15, f"{result.counts[k]} images")
        page.picture(heatmap(result.contributions[k], limit=limit), left[1], top, width, height)
        total = result.contributions[k].sum()
        shown = f"logit {result.values[k]:.2f} = bias {result.bias:.2f} {'-' if total < 0 else '+'} {abs(total):.2f}"
        page.text(left[1], top + height + 0.15, shown, shrink=True)
        draw_scale(page, left[1] + width + 0.14, top, tall, limit, "contribution (logit)")
        colors = as_pictures(result.colors[k])
        page.picture(_on_grey(colors, result.evidence[k] / limit), left[2], top, width, height)
        if result.positions is not None:
            page.picture(heatmap(result.positions[k], limit=inner_limit), left[3], top, width, height)
            draw_scale(page, left[3] + width + 0.14, top, tall, inner_limit, "contribution (logit)")
            _draw_channels(page, left[4], top, tall, result, k, max_channels)
    if rows < len(result.classes):
        page.text(GAP, page.height - 0.1, f"first {rows} of {len(result.classes)} classes", color=GREY)
    return page.figure


def _on_grey(colors: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Blend colours (H, W, 3) by an opacity (H, W) over grey, on which black and white evidence are both visible."""
    return (0.6 + opacity.clip(0, 1)[..., None] * (colors - 0.6)).clip(0, 1)


def _draw_channels(page: Page, x: float, y: float, height: float, result: Aggregate, row: int, count: int) -> None:
    """Draw bars from zero, to the right for the class, to the left against it; ticks mark the mean of all classes."""
    numbers = result.strongest(row, count)
    assert result.channels is not None
    values, usual = result.channels[row, numbers], result.channels[:, numbers].mean(0)
    ends = min(result.channels.min(), 0), max(result.channels.max(), np.finfo(np.float32).tiny)
    step = height / count
    places = x + 0.25 + 1.05 * (np.stack([values, usual, 0 * values]) - ends[0]) / (ends[1] - ends[0])  # (3, count)
    for i, (number, value, place) in enumerate(zip(numbers, values, places.T.tolist(), strict=True)):
        line, (end, tick, zero) = y + (i + 0.65) * step, place
        color = "#b2182b" if value > 0 else "#2166ac"
        page.text(x, line, f"{number}", width=0.22)
        page.box(min(end, zero), line - 0.4 * step, abs(end - zero), 0.5 * step, facecolor=color, linewidth=0)
        page.text(x + PANEL, line, f"{value:.2g}", width=0.28, ha="right", shrink=True)
        if len(result.classes) > 1:
            page.box(tick, line - 0.5 * step, 0, 0.7 * step, edgecolor=INK, linewidth=0.8)
    page.box(places[2, 0].item(), y, 0, height, edgecolor=GREY, linewidth=0.5)
    if len(result.classes) > 1:
        page.text(x, y + height + 0.15, "ticks: mean of the classes")
