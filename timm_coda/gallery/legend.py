"""Draw a legend into the pixels of an image: the class, its probability, and the colour scale in logits."""

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..explanation import INK, letters, overlay

__all__ = ["draw_legend"]

_SMALLEST, _LARGEST = 11, 40  # font size in pixels; smaller text is illegible


def draw_legend(picture: np.ndarray, caption: str, probability: float, limit: float) -> np.ndarray:
    """Draw a legend into the lower left corner; an image that is too small for it is returned unchanged.

    For the same image size, caption and limit, the legend always has the same position and size.

    Args:
        picture: uint8 (H, W, 3).
        caption: name of what is explained, truncated to fit.
        probability: probability of the explained class.
        limit: the end of the colour scale, in logits.

    Raises:
        ImportError: matplotlib, which ships the font, is missing.
    """
    height, width = picture.shape[:2]
    size = min(max(round(height / 26), _SMALLEST), _LARGEST)
    pad, scale = size // 2, 14 * size
    if scale + 4 * pad > width or 8 * size > height:
        return picture
    font = letters(size)
    shown = f"p = {probability:.2f}"
    room = width - 4 * pad - round(font.length(shown)) - size  # all digits have the same width
    if font.length(caption) > room:
        while caption and font.length(caption + "…") > room:
            caption = caption[:-1].rstrip()
        caption += "…"
    inner = max(scale, round(font.length(caption) + size + font.length(shown)))
    panel_width, panel_height = inner + 2 * pad, int(3.6 * size) + 2 * pad
    left, top = pad, height - pad - panel_height
    page = Image.fromarray(picture)
    draw: Any = ImageDraw.Draw(page)
    draw.rectangle((left, top, left + panel_width, top + panel_height), fill="#ffffff")
    font.draw(draw, left + pad, top + pad, caption, fill=INK)
    font.draw(draw, left + pad + inner, top + pad, shown, fill=INK, align=1)
    # The scale shows evidence as it looks over middle grey.
    colors = overlay(np.full((3, size // 2, inner), 0.5), np.linspace(-1, 1, inner)[None], limit=1)
    page.paste(Image.fromarray(colors), (left + pad, top + pad + round(1.6 * size)))
    line = top + pad + round(2.5 * size)
    for align, text in ((0, f"\N{MINUS SIGN}{limit:.2g}"), (0.5, "0"), (1, f"+{limit:.2g} logit")):
        font.draw(draw, left + pad + align * inner, line, text, fill=INK, align=align)
    return np.asarray(page)
