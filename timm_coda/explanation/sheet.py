"""The page that figures are drawn on: sizes, colours and font. The only module here that imports matplotlib."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["GAP", "GREY", "INK", "PANEL", "PITCH", "Page", "letters"]

PANEL, GAP = 1.6, 0.2  # inches: the side of an image in a figure, the space between two
PITCH = PANEL + GAP
INK, GREY = "#222222", "#707070"


class Page:
    """A white figure with coordinates in inches from its upper left corner; ignores the user's matplotlib settings."""

    def __init__(self, width: float, height: float) -> None:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("figures need matplotlib: pip install 'timm_coda[viz]'") from error
        self.height = height
        self.figure = Figure(figsize=(width, height), dpi=200, facecolor="white")
        self.figure.set_layout_engine("none")
        self._renderer = FigureCanvasAgg(self.figure).get_renderer()
        self._axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0), frame_on=False)
        self._axes.set_axis_off()

    def text(self, x: float, y: float, text: str, *, width=PANEL, size=7.0, color=INK, shrink=False, **style) -> None:
        """Draw one line of text on baseline y. Text wider than `width` is truncated, or with `shrink` made smaller."""
        text = text.replace("-", "\N{MINUS SIGN}") if shrink else " ".join(str(text).split())
        fixed = {"family": "DejaVu Sans", "parse_math": False, "usetex": False, "va": "baseline"}
        artist = self._axes.text(x, y, text, fontsize=size, color=color, **fixed | style)
        while (excess := max(artist.get_window_extent(self._renderer).size) / (width * self.figure.dpi)) > 1:
            if shrink:
                size *= 0.98 / excess
                artist.set_fontsize(size)
            else:
                text = text[:-1].rstrip()
                artist.set_text(text + "…")

    def picture(self, pixels: np.ndarray, x: float, y: float, width: float, height: float) -> None:
        """Draw RGB pixels with a frame. Pixels of small images stay crisp squares; large images are resampled."""
        interpolation = "nearest" if max(pixels.shape) <= 128 else "antialiased"
        self._axes.imshow(pixels, extent=(x, x + width, y + height, y), aspect="auto", interpolation=interpolation)
        self.box(x, y, width, height, facecolor="none", edgecolor="#9a9a9a", linewidth=0.5)

    def box(self, x: float, y: float, width: float, height: float, **style) -> None:
        """Draw a rectangle."""
        self._axes.fill([x, x + width, x + width, x], [y, y, y + height, y + height], **style)


@lru_cache
def letters(size: int) -> Any:
    """Load the font of `Page` for Pillow, `size` pixels high.

    Raises:
        ImportError: matplotlib, which ships the font, is missing.
    """
    from PIL import ImageFont

    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("legends need matplotlib's font: pip install 'timm_coda[viz]'") from error
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)
