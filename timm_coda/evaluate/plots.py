"""Plots of an evaluation for papers: box plots, curves with bands, maps of all explainers side by side.

Plots have the printed width of a column or a page, and are saved as PNG, SVG and PDF. An explainer has the same colour
and line style in every plot. matplotlib's global state is not changed.
"""

import re
import textwrap
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..explanation import color_limit, drawable, font_families, heatmap, save_figure
from .findings import Findings, Ranking, number, read_findings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN, PAGE, PAGE_HEIGHT = 3.4, 7.0, 8.6  # inches: a column, a page, its height less a caption
TEXT, LINE = 7.0, 0.12  # font size in points, as in `explanation.figure`, and line height in inches
MAX_EXAMPLES = 8  # more would be too small on a page
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))


@dataclass(frozen=True)
class Theme:
    """Colours of a plot. Explainers have those of Okabe and Ito, which colour-blind readers can distinguish."""

    paper: str
    ink: str
    grey: str
    inherent: str
    others: tuple[str, ...]


LIGHT = Theme("#ffffff", "#222222", "#707070", "#b2182b", ("#0072b2", "#009e73", "#d08700", "#b5578c", "#3fa3d8"))
DARK = Theme("#17191c", "#e8e8e8", "#a3a3a3", "#ff8a73", ("#5ab4f0", "#2cc79a", "#f0b030", "#e29ac4", "#a9d6f2"))


def write_plots(folder: Path) -> list[Path]:
    """Draw an evaluation's plots into `plots/` in its output folder, each as PNG, SVG and PDF.

    Args:
        folder: The output folder of `timm-coda evaluate`.

    Returns:
        The files: `NAME.*` for each metric, `NAME-curve.*` if it has curves, and `examples.*` and `grid.*` if there are
        maps.

    Raises:
        EvaluationError: The folder has no results.
        ImportError: matplotlib is missing.
    """
    findings, written = read_findings(folder), []
    for name, figure in draw_plots(findings, LIGHT).items():
        for suffix in ("png", "svg", "pdf"):
            written.append(Path(folder) / "plots" / f"{name}.{suffix}")
            save_figure(figure, written[-1])
    return written


def draw_plots(findings: Findings, theme: Theme) -> dict[str, "Figure"]:
    """Draw all plots of an evaluation; return them by file name without suffix."""
    plots = {}
    for ranking in findings.rankings:
        name = re.sub(r"\W", "_", ranking.name)
        if ranking.entries:
            plots[name] = draw_boxes(ranking, findings, theme)
        if any(entry.curve for entry in ranking.entries):
            plots[f"{name}-curve"] = draw_curves(ranking, findings, theme)
    if findings.maps(findings.examples):
        plots["examples"] = draw_examples(findings, theme)
    if findings.maps(findings.grid):
        plots["grid"] = draw_grid(findings, theme)
    return plots


def draw_boxes(ranking: Ranking, findings: Findings, theme: Theme) -> "Figure":
    """Draw a row for each explainer, best on top.

    Box: the middle half of the samples; line in the box: median; whiskers: 5 % to 95 % of the samples; dot and bar: the
    metric's statistic with its 95 % interval; dashed line: baseline.
    """
    rows = [entry.explainer for entry in ranking.entries] + list(ranking.failed)
    names = [_wrap(findings.label(name), 1.2, TEXT) for name in rows]
    better = "more is better" if ranking.higher_is_better else "less is better"
    note = f"{ranking.unit} ({better})"
    if ranking.baseline:
        note += f"; dashed: {ranking.baseline['label']}, {number(ranking.baseline['value'])}"
    notes = _wrap(note, COLUMN, TEXT)
    figure, axes = _column(0.4 + LINE * len(notes) + (LINE * max(map(len, names)) + 0.08) * len(rows), theme)
    if ranking.baseline:
        axes.axvline(ranking.baseline["value"], color=theme.grey, linewidth=0.8, linestyle=_DASHES[1], zorder=0)
    for row, entry in enumerate(ranking.entries):
        color, _ = _look(entry.explainer, findings, theme)
        low, first, median, third, high = np.percentile(entry.values, (5, 25, 50, 75, 95))
        axes.plot([low, high], [row, row], color=color, linewidth=0.8, solid_capstyle="butt")
        axes.barh(row, third - first, left=first, height=0.56, facecolor=theme.paper)
        axes.barh(row, third - first, left=first, height=0.56, facecolor=(color, 0.22), edgecolor=color, linewidth=0.8)
        axes.plot([median, median], [row - 0.28, row + 0.28], color=color, linewidth=1.4, solid_capstyle="butt")
        axes.plot(entry.interval, [row, row], color=theme.ink, linewidth=1.6, solid_capstyle="butt")
        axes.plot(entry.value, row, "o", color=theme.ink, markersize=3, markeredgewidth=0)
    side = {"transform": axes.get_yaxis_transform(), "va": "center_baseline", "fontsize": TEXT}
    for row in range(len(rows)):
        entry = ranking.entries[row] if row < len(ranking.entries) else None
        text, color = (number(entry.value), theme.ink) if entry else ("failed", theme.grey)
        axes.text(1.02, row, text, color=color, **side)
    axes.set_yticks(range(len(rows)), ["\n".join(lines) for lines in names])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    figure.supxlabel("\n".join(notes), fontsize=TEXT, color=theme.grey)
    return _finish(figure)


def draw_curves(ranking: Ranking, findings: Findings, theme: Theme) -> "Figure":
    """Draw the mean curve of each explainer that has one, within the band of its interval."""
    shown = [(entry, entry.curve) for entry in ranking.entries if entry.curve]
    names = ["\n".join(_wrap(findings.label(entry.explainer), 1.3, TEXT)) for entry, _ in shown]
    lines = max(name.count("\n") + 1 for name in names)
    figure, axes = _column(2.4 + (LINE * lines + 0.03) * ((len(shown) + 1) // 2), theme)
    for entry, curve in reversed(shown):  # the best on top
        color, _ = _look(entry.explainer, findings, theme)
        axes.fill_between(curve["x"], curve["low"], curve["high"], color=color, alpha=0.15, linewidth=0)
    for order, (entry, curve) in enumerate(shown):
        color, dashes = _look(entry.explainer, findings, theme)
        style = {"linestyle": dashes, "linewidth": 1.2, "zorder": 4 - order / len(shown)}
        axes.plot(curve["x"], curve["mean"], color=color, label=names[order], **style)
    curve = shown[0][1]
    axes.set_xlim(min(curve["x"]), max(curve["x"]))
    axes.locator_params(axis="both", nbins=5)
    axes.set_xlabel("\n".join(_wrap(curve["x_label"], 0.8 * COLUMN, TEXT)), fontsize=TEXT, color=theme.ink)
    axes.set_ylabel("\n".join(_wrap(curve["y_label"], 1.8, TEXT)), fontsize=TEXT, color=theme.ink)
    axes.grid(color=theme.grey, alpha=0.25, linewidth=0.5)
    layout = {"loc": "outside lower center", "ncols": 2, "handlelength": 2.4, "columnspacing": 1.2}
    look = {"prop": {"family": font_families("".join(names)), "size": TEXT}, "labelcolor": theme.ink, "frameon": False}
    legend = figure.legend(**look, **layout)
    legend.set_zorder(5)
    return _finish(figure)


def draw_examples(findings: Findings, theme: Theme) -> "Figure":
    """Draw a column for each example image and a row for each explainer; each map has its own colour scale."""
    examples = {name: array[:MAX_EXAMPLES] for name, array in findings.examples.items()}
    facts = zip(examples["labels"], examples["predictions"], examples["probabilities"], strict=True)
    heads = [
        f"true: {findings.class_name(label)}\npredicted: {findings.class_name(prediction)} ({probability:.2f})"
        for label, prediction, probability in facts
    ]
    pictures = np.moveaxis(np.clip(examples["images"], 0, 1), 1, -1)
    rows = {"Image": list(pictures)}
    for name, maps in findings.maps(examples).items():
        rows[findings.label(name)] = list(heatmap(maps))
    return _draw_rows(rows, heads, theme)


def draw_grid(findings: Findings, theme: Theme) -> "Figure":
    """Draw a column for each class of the example grid, its cell framed; an explainer's maps share a colour scale."""
    labels = findings.grid["labels"]
    picture = np.moveaxis(np.clip(findings.grid["image"], 0, 1), 0, -1)
    rows = {"Image": [picture] * len(labels)}
    for name, maps in findings.maps(findings.grid).items():
        rows[findings.label(name)] = list(heatmap(maps, limit=color_limit(maps)))
    return _draw_rows(rows, [findings.class_name(label) for label in labels], theme, side=round(len(labels) ** 0.5))


def _draw_rows(rows: dict[str, list[np.ndarray]], heads: list[str], theme: Theme, side: int = 0) -> "Figure":
    """Draw rows of images, with names and headings; if there are `side` cells per side, frame cell i in column i."""
    columns, gap, names_width = len(heads), 0.06, 1.15
    aspect = rows["Image"][0].shape[0] / rows["Image"][0].shape[1]
    width = min(1.0, (PAGE - names_width) / columns - gap, (PAGE_HEIGHT / len(rows) - gap) / aspect)
    height = aspect * width
    lines = [[line for part in head.split("\n") for line in _wrap(part, width, 6)] for head in heads]
    top = 0.08 + 0.115 * max(map(len, lines))
    total = names_width + columns * (width + gap), top + len(rows) * (height + gap) + 0.2
    figure = _figure(*total, theme)
    for row, (name, pictures) in enumerate(rows.items()):
        y = top + row * (height + gap)
        text = "\n".join(_wrap(name, names_width - 0.1, TEXT))
        figure.text(0.05 / total[0], 1 - (y + height / 2) / total[1], text, va="center", fontsize=TEXT, color=theme.ink)
        for column, pixels in enumerate(pictures):
            x = names_width + column * (width + gap)
            box = (x / total[0], 1 - (y + height) / total[1], width / total[0], height / total[1])
            axes = figure.add_axes(box, xticks=[], yticks=[])
            axes.imshow(pixels, aspect="auto", interpolation="nearest" if max(pixels.shape) <= 128 else "antialiased")
            for spine in axes.spines.values():
                spine.set(color="#9a9a9a", linewidth=0.5)
            if side:
                _frame_cell(axes, pixels, column, side)
            if row == 0:
                axes.set_title("\n".join(lines[column]), fontsize=6, color=theme.ink, pad=3, linespacing=1.1)
    key = names_width / total[0], 0.07 / total[1]
    figure.text(*key, "red: for the class · blue: against", fontsize=6, color=theme.grey)
    return _finish(figure)


def _frame_cell(axes: "Axes", pixels: np.ndarray, cell: int, side: int) -> None:
    from matplotlib.patches import Rectangle

    height, width = pixels.shape[0] / side, pixels.shape[1] / side
    corner = (cell % side * width - 0.5, cell // side * height - 0.5)
    for color, line in (("white", 1.8), ("#222222", 0.9)):  # visible on any image
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=color, linewidth=line, clip_on=False))


def _figure(width: float, height: float, theme: Theme) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'timm_coda[viz]'") from error
    figure = Figure(figsize=(width, height), dpi=300, facecolor=theme.paper)
    figure.set_layout_engine("none")
    return figure


def _column(height: float, theme: Theme) -> tuple["Figure", "Axes"]:
    figure = _figure(COLUMN, height, theme)
    figure.set_layout_engine("constrained", w_pad=0.04, h_pad=0.04)
    axes = figure.add_subplot(facecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=theme.grey, linewidth=0.6)
    ticks = {"labelsize": TEXT, "labelfontfamily": font_families(""), "labelcolor": theme.ink, "color": theme.grey}
    axes.tick_params(width=0.6, length=2.5, **ticks)
    return figure, axes


def _look(explainer: str, findings: Findings, theme: Theme) -> tuple[str, object]:
    """Return an explainer's colour and dashes: the model's own stands out, the others follow the evaluation's order."""
    if explainer == "inherent":
        return theme.inherent, _DASHES[0]
    place = [name for name in findings.results["explainers"] if name != "inherent"].index(explainer)
    dashes, color = divmod(place, len(theme.others))
    return theme.others[color], _DASHES[dashes % len(_DASHES)]


def _wrap(text: str, inches: float, points: float) -> list[str]:
    """Wrap a text to a width; long words are broken, and characters that no font has replaced.

    A character is about 0.6 of the font size wide, a Chinese one 1.1.
    """
    wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    size = (1.1 if wide else 0.6) * points
    return textwrap.wrap(drawable(" ".join(text.split())), max(4, int(inches * 72 / size))) or [""]


def _finish(figure: "Figure") -> "Figure":
    """Set the fonts of all texts, and print $ literally."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set(fontfamily=font_families(text.get_text()), parse_math=False, usetex=False)
    return figure
