"""HTML of an explanation for notebooks: the figure, and a table of its numbers."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape

__all__ = ["HEADINGS", "MAX_IMAGES", "html"]

MAX_IMAGES = 8  # as many as the figure shows
HEADINGS = ("image", "prediction", "explained", "value", "bias", "for", "against", "residual")


def html(picture: bytes | None, table: Sequence[Sequence[str]], *, total: int) -> str:
    """Build self-contained HTML. It sets no colours, so it is legible on light and dark pages.

    Args:
        picture: the figure as PNG; None if matplotlib is missing
        table: rows for the first `MAX_IMAGES` images, with one cell per heading in `HEADINGS`
        total: number of images in the explanation
    """
    shown = ""
    if picture is not None:
        text = "Each image, its most probable classes, and maps of the evidence for and against a class"
        source = f"data:image/png;base64,{b64encode(picture).decode()}"
        shown = f'<img alt="{text}" src="{source}" style="max-width: 100%">\n'
    heading = "".join(f"<th>{word}</th>" for word in HEADINGS)
    rows = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table)
    more = f"\n<p>first {MAX_IMAGES} of {total} images</p>" if total > MAX_IMAGES else ""
    return f"{shown}<table>\n<thead><tr>{heading}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>{more}"
