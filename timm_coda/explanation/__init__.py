"""Exact explanations: computing them, the `Explanation` result, and figures drawn from it."""

from .compute import ExplainMixin, explain, explanation_mode, output_of
from .figures import (
    EVIDENCE_COLORS,
    as_pictures,
    color_limit,
    draw_scale,
    figure,
    heatmap,
    overlay,
    rgba,
    save_arrays,
    save_figure,
    save_image,
)
from .result import Explanation
from .sheet import GAP, GREY, INK, PANEL, PITCH, Page, letters
from .writing import remove_leftovers, replacing, temporary_path

__all__ = [
    "EVIDENCE_COLORS",
    "GAP",
    "GREY",
    "INK",
    "PANEL",
    "PITCH",
    "ExplainMixin",
    "Explanation",
    "Page",
    "as_pictures",
    "color_limit",
    "draw_scale",
    "explain",
    "explanation_mode",
    "figure",
    "heatmap",
    "letters",
    "output_of",
    "overlay",
    "remove_leftovers",
    "replacing",
    "rgba",
    "save_arrays",
    "save_figure",
    "save_image",
    "temporary_path",
]
