"""The page that figures are drawn on: sizes, colours and text. Only this module and `fonts` import matplotlib."""

from functools import lru_cache
from typing import Any

import numpy as np

from .fonts import drawable, font_families, font_runs

__all__ = ["GAP", "GREY", "INK", "PANEL", "PITCH", "Page", "letters"]

PANEL, GAP = 1.6, 0.2  # inches: the side of an image in a figure, the space between two
PITCH = PANEL + GAP
INK, GREY = "#222222", "#707070"


class Page:
    """A white figure with coordinates in inches from its upper left corner.

    The user's matplotlib settings are ignored, but for the fonts of characters that DejaVu Sans lacks.
    """

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
        text = text.replace("-", "\N{MINUS SIGN}") if shrink else drawable(" ".join(str(text).split()))
        fixed = {"family": font_families(text), "parse_math": False, "usetex": False, "va": "baseline"}
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


class Letters:
    """Text for Pillow, `size` pixels high, in the fonts of `Page`."""

    def __init__(self, size: int) -> None:
        from PIL import ImageFont

        self._font = lru_cache(lambda file, index: ImageFont.truetype(file, size, index=index))

    def length(self, text: str) -> float:
        """Return the width of a text in pixels."""
        return sum(font.getlength(part) for part, font in self._runs(text))

    def draw(self, draw: Any, x: float, y: float, text: str, *, fill: str, align: float = 0.0) -> None:
        """Draw a text below y, with the share `align` of its width to the left of x; `draw` is Pillow's `ImageDraw`."""
        x -= align * self.length(text)
        ascent, _ = self._font(*font_runs("x")[0][1:]).getmetrics()  # one baseline for all fonts
        for part, font in self._runs(text):
            draw.text((x, y + ascent), part, fill=fill, font=font, anchor="ls")
            x += font.getlength(part)

    def _runs(self, text: str) -> list[tuple[str, Any]]:
        return [(part, self._font(file, index)) for part, file, index in font_runs(drawable(text))]


@lru_cache
def letters(size: int) -> Letters:
    """Load the fonts of `Page` for Pillow, `size` pixels high.

    Raises:
        ImportError: matplotlib, which ships the main font, is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("legends need matplotlib's font: pip install 'timm_coda[viz]'") from error
    return Letters(size)
