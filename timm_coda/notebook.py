"""How a notebook shows an explanation: the figure, and a table of its numbers."""

from base64 import b64encode
from html import escape
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .explanation import Explanation

__all__ = ["html"]

_ROWS = 8  # as in the figure
_HEADINGS = ("image", "prediction", "explained", "value", "bias", "for", "against", "residual")


def html(explanation: "Explanation") -> str:
    """A self-contained piece of HTML: the figure as PNG where matplotlib is there, and a table for the first images.

    It sets no colours, so that it can be read on a light and on a dark page.
    """
    picture = explanation._repr_png_()
    shown = ""
    if picture is not None:
        text = "Each image, its most probable classes, and maps of the evidence for and against a class"
        source = f"data:image/png;base64,{b64encode(picture).decode()}"
        shown = f'<img alt="{text}" src="{source}" style="max-width: 100%">\n'
    heading = "".join(f"<th>{word}</th>" for word in _HEADINGS)
    rows = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in _rows(explanation))
    more = f"\n<p>first {_ROWS} of {len(explanation)} images</p>" if len(explanation) > _ROWS else ""
    return f"{shown}<table>\n<thead><tr>{heading}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>{more}"


def _rows(explanation: "Explanation") -> list[list[str]]:
    count = min(len(explanation), _ROWS)
    part = explanation[:count]
    names = part.label_names or [f"class {i}" for i in range(part.logits.shape[1])]
    titles = part._titles(part.label_names)
    probabilities = torch.sigmoid(part.logits.float())
    maps = part.contributions.double().reshape(count, -1, *part.contributions.shape[-2:])
    sums = maps.clamp(min=0).sum((-2, -1)), maps.clamp(max=0).sum((-2, -1))
    values, residuals = part.value.reshape(count, -1), part.residual.reshape(count, -1)
    rows = []
    for i, best in enumerate(part.prediction.tolist()):
        for t, title in enumerate(titles[i]):
            numbers = [values[i, t].item(), part.bias, sums[0][i, t].item(), sums[1][i, t].item()]
            written = [f"{number:+.2f}" for number in numbers]
            prediction = f"{names[best]} ({probabilities[i, best].item():.2f})"
            rows.append([str(i), prediction, title, *written, f"{residuals[i, t].item():.1g}"])
    return rows
