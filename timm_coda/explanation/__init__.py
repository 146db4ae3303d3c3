"""Exact explanations: computing them, the `Explanation` result, and figures drawn from it."""

from .checks import check_finite
from .classes import Classes, ClassesError, forget_names, listed, read_names, training_data
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
from .fonts import drawable, font_families
from .result import Explanation
from .sheet import GAP, GREY, INK, PANEL, PITCH, Page, letters
from .units import Unit, UnitPicture, from_no_pixel, peaks, receptive_fields, unit_pictures
from .writing import remove_leftovers, replacing, temporary_path

__all__ = [
    "EVIDENCE_COLORS",
    "GAP",
    "GREY",
    "INK",
    "PANEL",
    "PITCH",
    "Classes",
    "ClassesError",
    "ExplainMixin",
    "Explanation",
    "Page",
    "Unit",
    "UnitPicture",
    "as_pictures",
    "check_finite",
    "color_limit",
    "draw_scale",
    "drawable",
    "explain",
    "explanation_mode",
    "figure",
    "font_families",
    "forget_names",
    "from_no_pixel",
    "heatmap",
    "letters",
    "listed",
    "output_of",
    "overlay",
    "peaks",
    "read_names",
    "receptive_fields",
    "remove_leftovers",
    "replacing",
    "rgba",
    "save_arrays",
    "save_figure",
    "save_image",
    "temporary_path",
    "training_data",
    "unit_pictures",
]
