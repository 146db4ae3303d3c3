"""Arrays to pictures: signed heat maps, overlays, coloured (RGBA) explanations and figures.

Knows arrays, not models: everything here takes NumPy arrays or tensors of any float type on any device. Only
`figure` and `save_figure` need matplotlib, and neither touches its global state, so both work without a display
and in several threads at once.
"""

import io
import math
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Evidence against (blue) to evidence for (red), with an odd number of anchors so that zero is exactly the middle one.
# ColorBrewer's RdBu, which colour-blind readers can tell apart.
EVIDENCE_COLORS = np.array(
    [
        (5, 48, 97),
        (33, 102, 172),
        (67, 147, 195),
        (146, 197, 222),
        (209, 229, 240),
        (247, 247, 247),
        (253, 219, 199),
        (244, 165, 130),
        (214, 96, 77),
        (178, 24, 43),
        (103, 0, 31),
    ],
    dtype=np.float32,
)
_TINY = float(np.finfo(np.float32).tiny)


def color_limit(contributions: ArrayLike, *, percentile: float = 99.5) -> float:
    """The end of a symmetric colour scale that a few extreme pixels cannot stretch.

    Args:
        contributions: signed contributions in logits, any shape; one limit for everything given.
        percentile: of the absolute contributions, in (0, 100]; 100 is the maximum.

    Returns:
        A positive number in logits: the percentile, or the maximum where the percentile is 0, or a tiny number
        where every contribution is 0.

    Raises:
        ValueError: a percentile outside (0, 100], an empty array, NaN or infinite contributions.
    """
    return _limit(np.abs(_finite(contributions, "contributions", 1)), percentile, axis=None).item()


def heatmap(contributions: ArrayLike, *, limit: float | None = None, percentile: float = 99.5) -> np.ndarray:
    """Signed heat map: red is evidence for, blue is evidence against, the light neutral middle is exactly zero.

    Args:
        contributions: (..., H, W), signed, in logits.
        limit: contribution shown in the strongest colour, in logits; None takes `color_limit` of each map alone.
            Give one limit to maps that are to be compared.
        percentile: see `color_limit`; unused where `limit` is given.

    Returns:
        uint8 RGB (..., H, W, 3).

    Raises:
        ValueError: as `color_limit`, and for a limit that is not positive.
    """
    return _to_uint8(_evidence_colors(_scaled(_finite(contributions, "contributions", 2), limit, percentile)))


def overlay(
    images: ArrayLike, contributions: ArrayLike, *, limit: float | None = None, percentile: float = 99.5
) -> np.ndarray:
    """Heat map over the greyed image: the stronger the evidence, the more opaque; no evidence leaves the grey image.

    A map of another resolution (an inner layer's) is brought to the image's by nearest neighbour, so each square
    stays visible as one position of that layer.

    Args:
        images: (..., 3 or 1, H, W) in [0, 1].
        contributions: (..., h, w), signed, in logits; the leading dimensions are those of `images`, and may be
            followed by more, such as T targets an image.
        limit: see `heatmap`.
        percentile: see `color_limit`.

    Returns:
        uint8 RGB (..., H, W, 3), the leading dimensions those of `contributions`.

    Raises:
        ValueError: as `heatmap`, and for images of the wrong shape or range.
    """
    pictures = _pictures(images)  # (..., H, W, 3)
    maps = _finite(contributions, "contributions", 2)
    lead = pictures.shape[:-3]
    if maps.shape[: len(lead)] != lead or maps.ndim < len(lead) + 2:
        raise ValueError(
            f"contributions of shape {maps.shape} do not belong to images of shape {np.shape(images)}: "
            "the leading dimensions must be the same, and may be followed by one for targets"
        )
    rows, columns = (
        (np.arange(new) * old) // new for new, old in zip(pictures.shape[-3:-1], maps.shape[-2:], strict=True)
    )
    strength = _scaled(maps, limit, percentile)[..., rows[:, None], columns]  # (..., H, W)
    extra = (1,) * (maps.ndim - 2 - len(lead))
    grey = pictures.reshape(lead + extra + pictures.shape[-3:]) @ np.array([[0.299], [0.587], [0.114]], np.float32)
    background = 0.25 + 0.7 * grey
    opacity = np.abs(strength)[..., None]
    # Colours start half way along the scale: faint opacity already says "little", a faint colour would say it twice.
    color = _evidence_colors(np.sign(strength) * (0.5 + 0.5 * np.abs(strength))) / 255
    opacity = opacity**0.7
    return _to_uint8(255 * (opacity * color + (1 - opacity) * background))


def rgba(
    weights: ArrayLike, *, contributions: ArrayLike, smooth: int | None = None, percentile: float = 99.5
) -> np.ndarray:
    """The colours a class looks for, opaque where they are found.

    Colour: each pair of weights for (c, 1 - c), negative ones clamped to 0, gives w_c / (w_c + w_{1-c}), so it depends
    on the direction of the weights and not on their length; 0.5 where neither is positive. Opacity: the length of the
    weight vector where the contribution is positive, averaged over a window, divided by its percentile, clipped at 1.
    Source: Böhle, Fritz, Schiele, CVPR 2022 (arXiv 2205.10268), the explanations' colour encoding.

    Args:
        weights: (..., 6, H, W) for the channels (r, g, b, 1-r, 1-g, 1-b), or (..., 2, H, W) for a grey image's.
        contributions: (..., H, W), signed, in logits.
        smooth: side of the averaging window in pixels, 1 for none; None scales 15 pixels at 224 to the height.
        percentile: opacity that is shown as 1, see `color_limit`; one for each map.

    Returns:
        float32 RGBA (..., H, W, 4) in [0, 1]; fully transparent where nothing speaks for the class.

    Raises:
        ValueError: as `color_limit`, for shapes that do not fit and for a window below 1.
    """
    w = _finite(weights, "weights", 3)
    maps = _finite(contributions, "contributions", 2)
    if w.shape[-3] not in (2, 6) or w.shape[:-3] + w.shape[-2:] != maps.shape:
        raise ValueError(
            "weights must be (..., 6, H, W) or (..., 2, H, W) and contributions (..., H, W) with the same "
            f"leading and image dimensions, got {w.shape} and {maps.shape}"
        )
    if smooth is None:
        smooth = max(1, round(15 * maps.shape[-2] / 224)) | 1
    if smooth < 1:
        raise ValueError(f"smooth must be a window of at least 1 pixel (1 is no smoothing), got {smooth}")
    alpha = np.where(maps > 0, np.linalg.norm(w, axis=-3), 0)
    for axis in (-2, -1):
        alpha = _box_average(alpha, smooth, axis)
    alpha = np.minimum(alpha / _limit(alpha, percentile, axis=(-2, -1)), 1)

    color, inverse = np.split(np.maximum(w, 0), 2, axis=-3)
    total = color + inverse
    color = np.divide(color, total, out=np.full_like(total, 0.5), where=total > 0)
    color = np.broadcast_to(np.moveaxis(color, -3, -1), (*maps.shape, 3))
    return np.concatenate([color, alpha[..., None]], axis=-1).astype(np.float32)


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
    """One row an image: the image, the most probable classes, and one signed heat map for each explained target.

    The maps of a row share one colour scale, so they can be compared. Under each map stands its arithmetic,
    logit = bias + sum of the map, and a residual where the sum misses the logit by more than 1 %. Probabilities are
    sigmoids, since the networks are trained with binary cross-entropy.

    For units that are no classes (an inner layer's) leave out `logits` and give `values` and `titles`.

    Args:
        images: (B, 3 or 1, H, W) in [0, 1].
        contributions: (B, T, h, w) or (B, h, w), signed, in logits.
        logits: (B, classes).
        targets: the explained classes (B, T) or (B,); needed with `logits`.
        bias: the part of every logit that no pixel contributes.
        label_names: a name for each class; None writes "class 3".
        true_labels: (B,); marks each image as predicted correctly or wrongly.
        values: (B, T) or (B,), the explained outputs where there are no logits.
        titles: (B, T) headings of the maps, in place of class names.
        max_rows: images shown at most, the first ones.

    Returns:
        A `matplotlib.figure.Figure` with a canvas, unknown to pyplot.

    Raises:
        ValueError: arrays that do not fit together, as `color_limit` and `overlay`.
        ImportError: matplotlib is missing.
    """
    pictures = _pictures(images)
    maps = _finite(contributions, "contributions", 3)
    maps = maps[:, None] if maps.ndim == 3 else maps  # (B, T, h, w)
    if pictures.ndim != 4 or maps.ndim != 4 or len(pictures) != len(maps):
        raise ValueError(
            "figure needs images (B, 3 or 1, H, W) and contributions (B, T, h, w) or (B, h, w), "
            f"got {np.shape(images)} and {np.shape(contributions)}"
        )
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    batch, per_image = maps.shape[:2]
    outputs = explained = truth = None
    if logits is not None and targets is not None and values is None:
        outputs = _finite(logits, "logits", 2)
        outputs = _shaped(outputs, "logits", (batch, outputs.shape[-1]))
        classes = outputs.shape[1]
        if label_names is not None and len(label_names) < classes:
            raise ValueError(f"label_names has {len(label_names)} names for {classes} classes: give one for each")
        explained = _labels(targets, "targets", (batch, per_image), classes)
        truth = None if true_labels is None else _labels(true_labels, "true_labels", (batch,), classes)
        scores = np.take_along_axis(outputs, explained, 1)
    elif values is not None and logits is None:
        scores = _shaped(_finite(values, "values", 1), "values", (batch, per_image))
    else:
        raise ValueError("figure needs logits with targets, or values alone for units that are no classes")

    def name(index: int) -> str:
        return f"class {index}" if label_names is None else str(label_names[index])

    rows = min(batch, max_rows)
    scale = _PANEL / max(pictures.shape[1:3])
    height, width = (scale * side for side in pictures.shape[1:3])  # of a picture on the page
    row_height = max(height, 0.75 * _PANEL)
    columns = 1 + (outputs is not None) + per_image
    page = _Page(columns * (_PANEL + _GAP) + 0.75, rows * (row_height + 0.62) + 0.24 + 0.2 * (rows < batch))
    for row in range(rows):
        top = 0.5 + row * (row_height + 0.62)
        head, foot = top - 0.07, top + row_height + 0.14
        left, inset = _GAP, (_PANEL - width) / 2
        if row == 0:
            page.text(left, 0.2, "input", color=_GREY)
        page.picture(_to_uint8(255 * pictures[row]), left + inset, top, width, height)
        if truth is not None and outputs is not None:
            right = truth[row] == outputs[row].argmax()
            page.text(left, head, f"true: {name(truth[row])}", size=8)
            verdict = ("✓ predicted correctly", "#1a7a3a") if right else ("✗ predicted wrongly", "#b3480a")
            page.text(left, foot, verdict[0], color=verdict[1])
        if outputs is not None and explained is not None:
            left += _PANEL + _GAP
            if row == 0:
                page.text(left, 0.2, "probability (sigmoid)", color=_GREY)
            _draw_probabilities(page, left, top, row_height / 5, outputs[row], set(explained[row].tolist()), name)
        limit = color_limit(maps[row])
        for t, contribution in enumerate(maps[row]):
            left += _PANEL + _GAP
            if row == 0 and t == 0:
                page.text(left, 0.2, "evidence for and against", color=_GREY)
            title = titles[row][t] if titles is not None else name(explained[row, t]) if explained is not None else ""
            page.text(left, head, title, size=8, weight="bold")
            page.picture(heatmap(contribution, limit=limit), left + inset, top, width, height)
            lines = _arithmetic("value" if outputs is None else "logit", scores[row, t], bias, contribution)
            for i, line in enumerate(lines):
                page.text(left, foot + 0.12 * i, line, shrink=True)
        _draw_scale(page, left + _PANEL - inset + 0.12, top, height, limit)
    if rows < batch:
        page.text(_GAP, page.height - 0.1, f"first {rows} of {batch} images", color=_GREY)
    return page.figure


def save_image(array: ArrayLike, path: str | os.PathLike[str]) -> None:
    """Write pictures to a PNG file; an existing file is replaced only when the new one is complete.

    Args:
        array: RGB or RGBA, uint8 or float in [0, 1]: (H, W, C), or (B, H, W, C) put below each other,
            or (B, T, H, W, C) put together as B rows and T columns.
        path: ends in .png; missing folders are created.

    Raises:
        ValueError: another suffix or shape, NaN.
    """
    from PIL import Image

    target = _checked_path(path, (".png",))
    pixels = np.asarray(array) if getattr(array, "dtype", None) == np.uint8 else _finite(array, "array", 3)
    if pixels.ndim not in (3, 4, 5) or pixels.shape[-1] not in (3, 4):
        raise ValueError(f"save_image needs (H, W, C), (B, H, W, C) or (B, T, H, W, C), C 3 or 4, got {pixels.shape}")
    if pixels.dtype != np.uint8:
        pixels = _to_uint8(255 * np.clip(pixels, 0, 1))
    pixels = pixels[:, None] if pixels.ndim == 4 else pixels[(None,) * (5 - pixels.ndim)]
    b, t, h, w, c = pixels.shape
    grid = np.ascontiguousarray(pixels.transpose(0, 2, 1, 3, 4).reshape(b * h, t * w, c))
    with _replacing(target) as stream:
        Image.fromarray(grid).save(stream, format="PNG")


def save_figure(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, SVG or PDF; an existing file is replaced only when the new one is complete.

    The same figure gives the same bytes: no dates, no random names.

    Args:
        figure: from `figure`, or any matplotlib figure.
        path: ends in .png, .svg or .pdf; missing folders are created.

    Raises:
        ValueError: another suffix.
    """
    target = _checked_path(path, (".png", ".svg", ".pdf"))
    suffix = target.suffix.lower()
    unset = {".png": ["Software"], ".svg": ["Date", "Creator"], ".pdf": ["CreationDate", "Creator", "Producer"]}
    buffer = io.BytesIO()
    figure.savefig(
        buffer, format=suffix[1:], facecolor=figure.get_facecolor(), metadata=dict.fromkeys(unset[suffix]), dpi="figure"
    )
    content = buffer.getvalue()
    if suffix == ".svg":  # matplotlib salts the names of elements at random, unless a global setting forbids it
        names = dict.fromkeys(re.findall(rb'\bid="([a-z]+[0-9a-f]{10})"', content))
        order = {old: b"id%d" % i for i, old in enumerate(names)}
        content = re.sub(rb"\b[a-z]+[0-9a-f]{10}\b", lambda match: order.get(match[0], match[0]), content)
    with _replacing(target) as stream:
        stream.write(content)


_PANEL, _GAP = 1.6, 0.2  # inches: the side of a picture, the space between two
_INK, _GREY = "#222222", "#767676"


class _Page:
    """A white figure measured in inches from its upper left corner, independent of the user's matplotlib settings."""

    def __init__(self, width: float, height: float) -> None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("figures need matplotlib: pip install 'timm_coda[viz]'") from error
        self.height = height
        self.figure = Figure(figsize=(width, height), dpi=200, facecolor="white", layout="none")
        self._renderer = FigureCanvasAgg(self.figure).get_renderer()
        self._axes = self.figure.add_axes((0, 0, 1, 1))
        self._axes.set(xlim=(0, width), ylim=(height, 0))
        self._axes.set_axis_off()

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        width: float = _PANEL,
        size: float = 6.5,
        color: str = _INK,
        weight: str = "normal",
        align: str = "left",
        shrink: bool = False,
        rotation: float = 0,
    ) -> None:
        """One line on the baseline `y`, made to fit `width` by a smaller size or by an ellipsis."""
        artist = self._axes.text(
            x, y, " ".join(text.split()), fontsize=size, color=color, weight=weight, ha=align, va="baseline",
            rotation=rotation, family="DejaVu Sans", parse_math=False, usetex=False,
        )  # fmt: skip

        def measured() -> float:
            extent = artist.get_window_extent(self._renderer)
            return max(extent.width, extent.height) / self.figure.dpi

        if shrink:
            artist.set_fontsize(size * min(1, width / measured()))
        while measured() > width and len(artist.get_text()) > 1:
            artist.set_text(artist.get_text().rstrip("…")[:-1].rstrip() + "…")

    def picture(self, pixels: np.ndarray, x: float, y: float, width: float, height: float) -> None:
        """RGB pixels in a thin frame: small pictures keep crisp pixels, large ones are resampled without aliasing."""
        interpolation = "nearest" if max(pixels.shape) <= 128 else "antialiased"
        self._axes.imshow(pixels, extent=(x, x + width, y + height, y), aspect="auto", interpolation=interpolation)
        self.box(x, y, width, height, edgecolor="#9a9a9a", facecolor="none", linewidth=0.5)

    def box(self, x: float, y: float, width: float, height: float, **style: str | float) -> None:
        from matplotlib.patches import Rectangle

        self._axes.add_patch(Rectangle((x, y), width, height, **style))


def _draw_probabilities(
    page: _Page, x: float, y: float, step: float, logits: np.ndarray, explained: set[int], name: Callable[[int], str]
) -> None:
    """Bars of the five most probable classes, the explained ones dark."""
    for i, index in enumerate(np.argsort(-logits, kind="stable")[:5].tolist()):
        probability = 0.5 + 0.5 * math.tanh(float(logits[index]) / 2)  # the sigmoid, without overflow
        ink = _INK if index in explained else _GREY
        line, bar = y + i * step + 0.1, y + i * step + 0.15
        page.text(x, line, name(index), width=_PANEL - 0.35, size=7, color=ink)
        page.text(x + _PANEL, line, f"{probability:.2f}", size=7, color=ink, align="right")
        page.box(x, bar, _PANEL, 0.06, facecolor="#ececec", linewidth=0)
        page.box(
            x, bar, _PANEL * probability, 0.06, facecolor="#444444" if index in explained else "#b0b0b0", linewidth=0
        )


def _draw_scale(page: _Page, x: float, y: float, height: float, limit: float) -> None:
    """The colour bar of a row."""
    page.picture(heatmap(np.linspace(1, -1, 201)[:, None], limit=1), x, y, 0.1, height)
    page.text(x, y - 0.07, "for")
    page.text(x, y + height + 0.14, "against", width=0.5)
    for position, label in ((0.07, f"+{limit:.2g}"), (height / 2 + 0.03, "0"), (height, f"−{limit:.2g}")):
        page.text(x + 0.14, y + position, label, width=0.36, shrink=True)
    page.text(x + 0.5, y + height / 2, "contribution (logit)", rotation=90, width=height)


def _arithmetic(word: str, score: float, bias: float, contribution: np.ndarray) -> list[str]:
    """The lines under a map: score = bias + sum, then the residual where it is over 1 % of the score."""
    total = float(contribution.sum(dtype=np.float64))
    residual = float(score) - float(bias) - total
    sign = "−" if round(total, 2) < 0 else "+"
    lines = [f"{word} {_number(score)} = bias {_number(bias)} {sign} {_number(abs(total))}"]
    if abs(residual) > 0.01 * max(1, abs(score)):
        lines.append(f"residual {_number(residual)}")
    return lines


def _number(value: float) -> str:
    """Two decimals, a real minus sign, no negative zero."""
    return f"{round(float(value), 2) + 0.0:.2f}".replace("-", "−")


def _array(value: ArrayLike, dtype: type = np.float32) -> np.ndarray:
    """An array from anything array-like, including tensors that NumPy cannot read (bfloat16, CUDA, with gradient)."""
    if hasattr(value, "detach"):
        tensor = value.detach().cpu()  # pyright: ignore
        value = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return np.asarray(value, dtype=dtype)


def _finite(value: ArrayLike, name: str, least_dimensions: int) -> np.ndarray:
    array = _array(value)
    if array.ndim < least_dimensions or array.size == 0:
        raise ValueError(f"{name} must be a non-empty array of {least_dimensions}+ dimensions, got shape {array.shape}")
    wrong = array.size - np.count_nonzero(np.isfinite(array))
    if wrong:
        raise ValueError(f"{name} has {wrong} NaN or infinite entries of {array.size}: check the model that made them")
    return array


def _shaped(array: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if array.shape != shape and (*array.shape, 1) != shape:
        raise ValueError(f"{name} must have shape {shape} to fit the contributions, got {array.shape}")
    return array.reshape(shape)


def _labels(value: ArrayLike, name: str, shape: tuple[int, ...], classes: int) -> np.ndarray:
    labels = _shaped(_array(value, np.int64), name, shape)
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"{name} must lie in 0..{classes - 1}, got {labels.min()}..{labels.max()}")
    return labels


def _pictures(images: ArrayLike) -> np.ndarray:
    """Channel-first images, checked, as (..., H, W, 3)."""
    pictures = _finite(images, "images", 3)
    if pictures.shape[-3] not in (1, 3):
        raise ValueError(
            f"images must be (..., 3 or 1, H, W), got shape {pictures.shape}; of encoded ones, give [:, :3]"
        )
    if pictures.min() < -1e-3 or pictures.max() > 1 + 1e-3:
        raise ValueError(
            f"images must lie in [0, 1], got {pictures.min():.3g}..{pictures.max():.3g}: undo any normalisation"
        )
    pictures = np.moveaxis(np.clip(pictures, 0, 1), -3, -1)
    return np.broadcast_to(pictures, (*pictures.shape[:-1], 3))


def _limit(magnitudes: np.ndarray, percentile: float, axis: tuple[int, ...] | None) -> np.ndarray:
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must lie in (0, 100], got {percentile}")
    limit = np.percentile(magnitudes, percentile, axis=axis, keepdims=True)
    limit = np.where(limit > 0, limit, magnitudes.max(axis=axis, keepdims=True))
    return np.maximum(limit, _TINY)


def _scaled(maps: np.ndarray, limit: float | None, percentile: float) -> np.ndarray:
    """Signed maps divided by the limit and clipped, in [-1, 1]."""
    if limit is not None and not 0 < limit < np.inf:
        raise ValueError(f"limit must be a positive number of logits, or None to choose it, got {limit}")
    end = _limit(np.abs(maps), percentile, axis=(-2, -1)) if limit is None else limit
    return np.clip(maps, -end, end) / end


def _evidence_colors(strength: np.ndarray) -> np.ndarray:
    """Strengths in [-1, 1] to RGB in [0, 255], (..., 3)."""
    anchors = np.linspace(-1, 1, len(EVIDENCE_COLORS))
    return np.stack([np.interp(strength, anchors, channel) for channel in EVIDENCE_COLORS.T], axis=-1)


def _box_average(values: np.ndarray, window: int, axis: int) -> np.ndarray:
    """Mean over a centred window, counting only what lies inside the picture, so that edges are not darkened."""
    size = values.shape[axis]
    first = np.maximum(np.arange(size) - (window - 1) // 2, 0)
    end = np.minimum(np.arange(size) + window // 2 + 1, size)
    total = np.insert(np.cumsum(values, axis=axis, dtype=np.float64), 0, 0, axis=axis)
    total = np.take(total, end, axis=axis) - np.take(total, first, axis=axis)
    return total / np.expand_dims(end - first, tuple(range(axis + 1, 0)))


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.rint(values).astype(np.uint8)


def _checked_path(path: str | os.PathLike[str], suffixes: tuple[str, ...]) -> Path:
    target = Path(path)
    if target.suffix.lower() not in suffixes:
        raise ValueError(f"cannot write {target.name!r}: the file name must end in {' or '.join(suffixes)}")
    return target


@contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """A new file that takes the target's place at the end, or vanishes after an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as stream:
            yield stream
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
