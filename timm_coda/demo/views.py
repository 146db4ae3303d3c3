"""Render a visitor's explanation as HTML and as files to download.

Images are embedded in the HTML, so that no visitor can read another visitor's files.
"""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from ..explanation import (
    EVIDENCE_COLORS,
    Explanation,
    Unit,
    UnitPicture,
    color_limit,
    from_no_pixel,
    heatmap,
    unit_pictures,
)

_BARS = 5
_SMALL = 128  # pixels per side; up to this size, images are shown with sharp pixels
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
)


@dataclass(frozen=True)
class Shown:
    """An explanation of one image, and the class names."""

    model: str
    explanation: Explanation
    names: tuple[str, ...]
    trained_on: str = ""

    @property
    def target(self) -> int:
        return int(self.explanation.target)

    @property
    def versus(self) -> int | None:
        return None if self.explanation.versus is None else int(self.explanation.versus)


def examples_html(paths: Sequence[Path], *, trained_on: str = "") -> str:
    """Render a strip of thumbnails to choose from, and what the model was trained on, where it is known."""
    examples = []
    for path in paths:
        with Image.open(path) as image:
            image.thumbnail((96, 96))
            examples.append({"name": path.stem, "source": _data_url(image)})
    return _TEMPLATES.get_template("examples.html").render(examples=examples, trained_on=trained_on)


def result_html(shown: Shown, *, smooth: int, percentile: float) -> str:
    """Render the most probable classes, the explanation in words, its images, and a readout of regions.

    Args:
        shown: the explanation
        smooth: smoothing of the colours in pixels, see `explanation.rgba`
        percentile: percentile for the scale of colours and maps, see `explanation.rgba` and `explanation.color_limit`
    """
    explanation, target, versus = shown.explanation, shown.target, shown.versus
    maps = explanation.contributions[0].float().cpu().numpy()  # (h, w)
    limit = color_limit(maps, percentile=percentile)
    value, total, residual = (
        float(number) for number in (explanation.value, explanation.contributions.sum(), explanation.residual)
    )
    names = {"target_name": shown.names[target], "versus_name": "" if versus is None else shown.names[versus]}
    return _TEMPLATES.get_template("result.html").render(
        rows=_rows(shown),
        recognized=bool(explanation.logits.max() >= 0),  # a probability of at least 50 %
        trained_on=shown.trained_on,
        target=target,
        versus=versus,
        title=names["target_name"] if versus is None else f"{names['target_name']}, not {names['versus_name']}",
        place="the image" if explanation.layer is None else f"layer {explanation.layer}",
        position="pixel" if explanation.layer is None else "position",
        value=_number(value),
        bias=_number(explanation.bias),
        total=_number(total),
        added=_term(total),
        residual=_term(residual) if abs(residual) > 0.01 * max(1, abs(value)) else "",
        difference=_number(abs(value)),
        side="above" if value >= 0 else "below",
        pictures=_pictures(shown, maps, limit, smooth, percentile),
        map=base64.b64encode(maps.astype("<f4").tobytes()).decode(),
        height=maps.shape[0],
        width=maps.shape[1],
        window=max(1, round(min(maps.shape) / 14)),
        window_limit=min(maps.shape),
        limit=f"{limit:.2g}",
        colors=", ".join(f"#{bytes(color).hex()}" for color in EVIDENCE_COLORS),
        **names,
    )


def unit_html(unit: Unit, found: Explanation, boxes: Sequence, names: Sequence[str], *, searched: int) -> str:
    """Render what a unit sees in the images that activate it most.

    Args:
        unit: the unit
        found: its explanation at one position of each image, the strongest image first
        boxes: its receptive fields there, see `explanation.receptive_fields`
        names: names of the images
        searched: number of images that were searched
    """
    values = found.value.tolist()
    pictures, limit = unit_pictures(found, boxes)
    rows = []
    for value, name, picture, rest in zip(values, names, pictures, from_no_pixel(found), strict=True):
        if value > 0:
            parts = zip(UnitPicture._fields, picture, strict=True)
            sources = {part: _data_url(Image.fromarray(pixels)) for part, pixels in parts}
            crisp = max(picture.seen.shape) <= _SMALL
            rows.append({"name": name, "value": f"{value:.4g}", "rest": rest, "crisp": crisp, **sources})
    return _TEMPLATES.get_template("unit.html").render(
        unit=unit, rows=rows, searched=searched, largest=f"{values[0]:.3g}", limit=f"{limit:.2g}"
    )


def _rows(shown: Shown) -> list[dict]:
    """Return rows of the most probable classes and of the explained classes."""
    logits = shown.explanation.logits[0].float()
    order = logits.argsort(descending=True, stable=True)[:_BARS].tolist()
    order += [i for i in (shown.target, shown.versus) if i is not None and i not in order]
    rows = []
    for index in order:
        logit = float(logits[index])
        probability = (1 + math.tanh(logit / 2)) / 2  # the sigmoid, without overflow
        percent = f"{100 * probability:.1f}"
        rows.append({"index": index, "name": shown.names[index], "logit": _number(logit), "percent": percent})
    return rows


def _pictures(shown: Shown, maps: np.ndarray, limit: float, smooth: int, percentile: float) -> list[dict]:
    explanation = shown.explanation
    seen = np.moveaxis(explanation.images[0].float().cpu().numpy(), 0, -1).clip(0, 1)
    height, width = seen.shape[:2]
    what = "red speaks for it, blue against it"
    parts = [("Image", f"The image as the model sees it, {width} x {height} pixels", 255 * seen)]
    if explanation.layer is None:
        colors = 255 * explanation.rgba(smooth=smooth, percentile=percentile)[0]
        parts.append(("Colours for it", "The colours that speak for the class, opaque where they are found", colors))
    parts.append(("For and against", f"Signed map of the explained class: {what}", heatmap(maps, limit=limit)))
    parts.append(("On the image", f"The signed map over the grey image: {what}", explanation.overlay(limit=limit)[0]))
    pictures = []
    for caption, description, pixels in parts:
        pixels = np.rint(pixels).astype(np.uint8)
        source = _data_url(Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels))
        crisp = max(pixels.shape) <= _SMALL
        pictures.append({"caption": caption, "description": description, "source": source, "crisp": crisp})
    return pictures


def _data_url(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _number(number: float) -> str:
    return f"{round(number, 2) + 0.0:.2f}".replace("-", "\N{MINUS SIGN}")  # adding 0 turns a negative zero into zero


def _term(number: float) -> str:
    """Format a number as a term of a sum: `+ 1.20` or `- 1.20`."""
    return f"{'+' if round(number, 2) >= 0 else chr(0x2212)} {abs(number):.2f}"


def figure_file(shown: Shown) -> bytes:
    """Return the figure of the explanation as PNG.

    Raises:
        ImportError: matplotlib is missing.
    """
    stream = io.BytesIO()
    shown.explanation.plot(label_names=shown.names).savefig(stream, format="png")
    return stream.getvalue()


def arrays_file(shown: Shown) -> bytes:
    """Return the arrays of the explanation as NPZ, see `Explanation.arrays`."""
    stream = io.BytesIO()
    np.savez_compressed(
        stream, allow_pickle=False, **shown.explanation.arrays() | {"label_names": np.array(shown.names)}
    )
    return stream.getvalue()
