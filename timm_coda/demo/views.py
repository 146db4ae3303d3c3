"""What one visitor looks at, as HTML and as files to take along.

The pictures are inside the HTML, so that no file of one visitor can be read by another.
"""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from ..explain import Explanation
from ..visualize import EVIDENCE_COLORS, color_limit, heatmap

_BARS = 5
_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Shown:
    """An explanation of one image, and what its classes are called."""

    model: str
    explanation: Explanation
    names: tuple[str, ...]

    @property
    def target(self) -> int:
        return self.explanation.target.item()  # pyright: ignore[reportReturnType]

    @property
    def versus(self) -> int | None:
        versus = self.explanation.versus
        return None if versus is None else versus.item()  # pyright: ignore[reportReturnType]

    @property
    def contributions(self) -> np.ndarray:
        """(h, w), float32, in logits."""
        return self.explanation.contributions[0].float().cpu().numpy()

    @property
    def title(self) -> str:
        """What is explained, in words: a class, or one class in place of another."""
        name = self.names[self.target]
        return name if self.versus is None else f"{name}, not {self.names[self.versus]}"


def result_html(shown: Shown, *, smooth: int, percentile: float) -> str:
    """The most probable classes, the explanation in words, its pictures and the place to read a region of it."""
    return (
        f'<div class="coda-result">{_bars(shown)}<p class="coda-words">{_words(shown)}</p>'
        f"{_viewer(shown, smooth, percentile)}</div>"
    )


def examples_html(paths: Sequence[Path]) -> str:
    """A strip of small pictures to choose from."""
    buttons = []
    for number, path in enumerate(paths):
        with Image.open(path) as image:
            image.thumbnail((96, 96))
            source = _data_url(image)
        name = escape(path.stem)
        buttons.append(
            f'<button type="button" data-example="{number}" title="{name}" aria-label="Example: {name}" '
            f'style="background-image:url({source})"></button>'
        )
    return f'<h2>Or choose an example</h2><div class="coda-examples">{"".join(buttons)}</div>'


def _bars(shown: Shown) -> str:
    logits = shown.explanation.logits[0].float()
    order = logits.argsort(descending=True, stable=True)[:_BARS].tolist()
    order += [i for i in (shown.target, shown.versus) if i is not None and i not in order]
    rows = []
    for index in order:
        name = escape(shown.names[index])
        logit = logits[index].item()
        share = 50 * (1 + math.tanh(logit / 2))  # the sigmoid, without overflow
        chosen = index == shown.target
        against = index == shown.versus
        if chosen:
            ask = '<span class="coda-ask">explained</span>'
        else:
            ask = (
                f'<button type="button" class="coda-ask" data-key="not-{index}" data-target="{shown.target}" '
                f'data-versus="{-1 if against else index}" aria-pressed="{str(against).lower()}" '
                f'aria-label="Why {escape(shown.names[shown.target])} and not {name}?">why not?</button>'
            )
        rows.append(
            f'<li><button type="button" class="coda-class" data-key="class-{index}" data-target="{index}" '
            f'data-versus="-1" aria-pressed="{str(chosen).lower()}" aria-label="Explain {name}, probability '
            f'{share:.1f} %, logit {_signed(logit)}"><span class="coda-name">{name}</span>'
            f'<span class="coda-logit">{_signed(logit)}</span><span class="coda-share">{share:.1f} %</span>'
            f'<span class="coda-bar"><span style="width:{share:.2f}%"></span></span></button>{ask}</li>'
        )
    return (
        f'<h2>What the model sees</h2><ol class="coda-bars">{"".join(rows)}</ol><p class="coda-note">Logit and '
        "probability. Each class is judged alone (sigmoid), so they need not add up to 100 %. Choose a class to explain "
        "it, or “why not?” to contrast it with the explained one.</p>"
    )


def _words(shown: Shown) -> str:
    explanation = shown.explanation
    value, total = explanation.value.item(), explanation.contributions.sum(dtype=explanation.value.dtype).item()
    residual = explanation.residual.item()
    place = "the image" if explanation.layer is None else f"layer {escape(explanation.layer)}"
    rest = f" {_signed(residual, apart=True)} (not explained)" if abs(residual) > 0.01 * max(1, abs(value)) else ""
    target = f"<strong>{escape(shown.names[shown.target])}</strong>"
    if shown.versus is None:
        bias = _signed(explanation.bias)
        return f"Why {target}? Its logit {_signed(value)} = {bias} (bias) {_signed(total, apart=True)} (sum over {place}){rest}."
    other = f"<strong>{escape(shown.names[shown.versus])}</strong>"
    more = "above" if value >= 0 else "below"
    return (
        f"Why {target} and not {other}? Its logit is {abs(value):.2f} {more} that of {other}: {_signed(value)} = "
        f"{_signed(total)} (sum over {place}){rest}."
    )


def _viewer(shown: Shown, smooth: int, percentile: float) -> str:
    explanation, maps = shown.explanation, shown.contributions
    limit = color_limit(maps, percentile=percentile)
    rows, columns = maps.shape
    title = escape(shown.title)
    colors = explanation.images[0].float().cpu().numpy()
    height, width = colors.shape[-2:]
    seen = np.rint(255 * np.broadcast_to(np.moveaxis(colors, 0, -1).clip(0, 1), (height, width, 3)))
    pictures = [("Image", f"The image as the model sees it, {width} x {height} pixels", seen)]
    if explanation.layer is None:
        coloured = 255 * explanation.rgba(smooth=smooth, percentile=percentile)[0]
        pictures.append(("Colours for it", f"The colours that speak for {title}", coloured))
    signed = f"Signed map: red speaks for {title}, blue against"
    pictures.append(("For and against", signed, heatmap(maps, limit=limit)))
    over = explanation.overlay(limit=limit)[0]
    pictures.append(("On the image", f"{signed}; drawn over the image", over))
    stops = ", ".join("#" + bytes(color).hex() for color in EVIDENCE_COLORS)
    side = max(1, round(max(rows, columns) / 14))
    return (
        f'<div class="coda-viewer" data-map="{base64.b64encode(maps.astype("<f4").tobytes()).decode()}" '
        f'data-rows="{rows}" data-columns="{columns}" data-title="{title}">'
        f'<div class="coda-pictures">{"".join(_picture(*parts) for parts in pictures)}</div>'
        f'<div class="coda-scale"><span>{_signed(-limit, digits=2)}</span><span class="coda-ramp" '
        f'style="background:linear-gradient(to right, {stops})"></span><span>{_signed(limit, digits=2)}</span>'
        f'<span class="coda-ends"><span>against</span><span>logits a {"pixel" if explanation.layer is None else "position"}'
        f"</span><span>for {title}</span></span></div>"
        '<fieldset class="coda-region"><legend>Read a region</legend><output aria-live="polite">Point at a picture; click '
        "to keep the place. Or type it below.</output>"
        f"{_number('row', rows - 1)}{_number('column', columns - 1)}{_number('side', min(rows, columns), side)}"
        '<p class="coda-note">Rows and columns count from 0, as in the arrays.</p></fieldset></div>'
    )


def _picture(caption: str, description: str, pixels: np.ndarray) -> str:
    """Pixels (H, W, 3 or 4) in [0, 255], with a link that saves them."""
    source = _data_url(Image.fromarray(np.rint(pixels).astype(np.uint8)))
    crisp = " coda-crisp" if max(pixels.shape) <= 128 else ""
    file = caption.lower().replace(" ", "-") + ".png"
    return (
        f'<figure aria-label="{caption}"><div class="coda-picture{crisp}"><img src="{source}" alt="{description}" draggable="false">'
        f'<span class="coda-marker" hidden></span></div><figcaption>{caption} '
        f'<a href="{source}" download="{file}" aria-label="Save the picture: {caption}">PNG</a></figcaption></figure>'
    )


def _data_url(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _number(name: str, largest: int, value: int | str = "") -> str:
    least = 1 if name == "side" else 0
    return (
        f'<label>{name.capitalize()} <input type="number" name="{name}" min="{least}" max="{largest}" step="1" '
        f'value="{value}"></label>'
    )


def _signed(number: float, *, apart: bool = False, digits: int | None = None) -> str:
    """`+1.20`, with a real minus sign; `apart` as in a sum, `+ 1.20`."""
    shown = f"{abs(number):.2f}" if digits is None else f"{abs(number):.{digits}g}"
    sign = _MINUS if number < 0 else "+" if apart or digits else ""
    return f"{sign} {shown}" if apart else f"{sign}{shown}"


def figure_file(shown: Shown) -> bytes:
    """The figure of the explanation, a PNG.

    Raises:
        ImportError: matplotlib is missing.
    """
    stream = io.BytesIO()
    shown.explanation.plot(label_names=shown.names).savefig(stream, format="png")
    return stream.getvalue()


def arrays_file(shown: Shown) -> bytes:
    """The numbers of the explanation, an NPZ: names and shapes as those of `Explanation`."""
    explanation = shown.explanation
    arrays = {
        "image": explanation.images[0],
        "logits": explanation.logits[0],
        "target": explanation.target[0],
        "value": explanation.value[0],
        "contributions": explanation.contributions[0],
        "weights": explanation.weights[0],
    }
    if explanation.versus is not None:
        arrays["versus"] = explanation.versus[0]
    stream = io.BytesIO()
    words = {"label_names": np.array(shown.names), "layer": np.array(explanation.layer or "")}
    np.savez_compressed(stream, **{k: v.cpu().numpy() for k, v in arrays.items()}, bias=explanation.bias, **words)
    return stream.getvalue()
