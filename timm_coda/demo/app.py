"""The page as a Gradio app: its components, and a handler for each action of a visitor.

Gradio stores one `Shown` per session; no other state of a visitor is kept between requests.
"""

import base64
import logging
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

try:
    import gradio as gr
except ImportError as error:
    raise ImportError("the page needs gradio: pip install 'timm_coda[demo]'") from error

from ..explanation import Classes, Unit, receptive_fields, training_data
from ..images import read_image
from .examples import Examples
from .shelf import Shelf, described, layer_names
from .views import Shown, arrays_file, examples_html, figure_file, result_html, unit_html

_HOUR = 3600  # seconds
_HERE = Path(__file__).parent
_IMAGE = ""  # value of the layer field for the pixels
_NOBODY = -1  # value of the contrast field for no class
_SEARCHED, _STRONGEST = 48, 6  # examples that are searched for a unit's strongest images, and how many are shown
_EMPTY = '<div class="coda-empty">Drop an image: its explanation appears here.</div>'
_FOREIGN = _EMPTY.replace("Drop an image", "This image is an example for another model. Drop one of your own")
_HEAD = (
    "<h1>Why did the model decide that?</h1><p>These image classifiers explain themselves exactly: the score of a "
    "class is a sum over the pixels, and the map shows each pixel's share in it.</p>"
)
# Downloads come from a hidden text field of the page: other visitors could request a file on the server.
_SAVE = """(file) => {
  const [name, data] = file.split(",");
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([bytes]));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}"""
_log = logging.getLogger(__name__)


def make_app(shelf: Shelf, examples: Examples) -> gr.Blocks:
    """Create the page as a Gradio app; `serve` launches it, with its style and limits.

    Args:
        shelf: the models
        examples: image files to choose from, offered with the models that they fit; the first one of those of the
            first model is explained when the page opens
    """
    with gr.Blocks(title="timm_coda: exact explanations", analytics_enabled=False, delete_cache=(_HOUR, _HOUR)) as app:
        page = _Page(shelf, examples)
        if page.first is not None:
            page.on(app.load, page.new_image)
    return app


class _Page:
    """The components of the page, and a handler for each action of a visitor.

    Handlers return new values of components; components that are not in the result do not change.
    """

    def __init__(self, shelf: Shelf, examples: Examples) -> None:
        self.shelf, self.offer = shelf, examples
        model = shelf[shelf.names[0]]
        names = Classes.of(model).names
        self.first = next(iter(examples.fitting(names)), None)
        self.shown = gr.State(None, time_to_live=_HOUR)
        gr.HTML(_HEAD, elem_id="coda-head", js_on_load=None)
        with gr.Row(elem_id="coda-page"):
            with gr.Column(elem_id="coda-input"):
                self.image = gr.Image(
                    None if self.first is None else str(self.first),
                    label="Image",
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=220,
                )
                script = "element.onclick = (e) => e.target.dataset.example && trigger('choose', e.target.dataset)"
                # Pass the uploaded file itself: `read_image` opens it, with our limits and error messages. Not for an
                # output of an event with other outputs, for which gradio makes a new component.
                setattr(self.image, "preprocess", lambda file: file and file.path)  # noqa: B010
                shown = self._examples(model)
                self.examples = gr.HTML(shown, elem_id="coda-examples", js_on_load=script)
                self.model = gr.Dropdown(
                    [(described(name), name) for name in shelf.names],
                    value=shelf.names[0],
                    label="Model",
                    info="Choose one, or type a name, a folder or hf-hub:USER/NAME" if shelf.any_model else None,
                    allow_custom_value=shelf.any_model,
                )
            with gr.Column(elem_id="coda-pictures"):
                self.message = gr.HTML("", elem_id="coda-message", js_on_load=None)
                self.result = gr.HTML(_EMPTY, js_on_load=(_HERE / "page.js").read_text(encoding="utf-8"))
                self.seen = gr.HTML("", js_on_load=None)
            with gr.Column(elem_id="coda-settings"):
                self.target = gr.Dropdown(_numbered(names), value=None, label="Why this class")
                self.versus = gr.Dropdown(_others(names), value=_NOBODY, label="and not this one")
                self.layer = gr.Dropdown(_layers(model), value=_IMAGE, label="As a sum over")
                self.channel = gr.Dropdown([], visible=False, label="What does this channel of the layer see?")
                hint = "Percentile of the evidence that gets the strongest colour: lower shows weak evidence"
                self.percentile = gr.Slider(80, 100, 99.5, step=0.1, label="Colour scale", info=hint, buttons=[])
                widest, window = _windows(model)
                hint = "Pixels a side, in the picture of colours: the maps stay exact"
                self.smooth = gr.Slider(1, widest, window, step=2, label="Smoothing", info=hint, buttons=[])
                with gr.Row():
                    save_figure = gr.Button("Save figure (PNG)", size="sm")
                    save_arrays = gr.Button("Save arrays (NPZ)", size="sm")
                self.file = gr.Textbox(visible=False)

        def take(event: gr.EventData) -> str:  # changes the image, which triggers its explanation
            return str(examples.paths[int(event.example)])

        self.examples.choose(take, None, self.image, api_visibility="private")
        self.on(self.image.change, self.new_image)
        self.on(self.model.change, self.new_image)
        self.on(self.result.choose, self.choose)
        for part in (self.target, self.versus, self.layer):  # not `input`, which a dropdown triggers twice
            self.on(part.select, self.explain)
        self.on(self.channel.select, self.see)
        for part in (self.percentile, self.smooth):
            self.on(part.input, self.draw)
        for button, run in ((save_figure, self.save_figure), (save_arrays, self.save_arrays)):
            self.on(button.click, run).success(None, self.file, js=_SAVE, api_visibility="private")

    def on(self, event: Callable[..., Any], run: Callable[["_Wish"], dict]) -> Any:
        """Register `run` for an event; errors are shown on the page as text."""

        def answer(
            image, model, target, versus, layer, channel, smooth, percentile, shown, event: gr.EventData
        ) -> dict:
            try:
                wish = _Wish(image, model, target, versus, layer, channel, smooth, percentile, shown, event)
                return {self.message: "", **run(wish)}
            except (ValueError, OSError, ImportError) as error:  # our own errors name the problem and the remedy
                said = str(error)
            except Exception:
                _log.exception("the page could not answer")
                said = "Something went wrong on the server: its log has the details."
            # The result shown belongs to the previous image or model.
            old = self._nothing("") if run == self.new_image else {}
            return {**old, self.message: f'<p class="coda-error" role="alert">{escape(said)}</p>'}

        return event(
            answer,
            [
                *(self.image, self.model, self.target, self.versus, self.layer, self.channel, self.smooth),
                *(self.percentile, self.shown),
            ],
            [
                *(self.message, self.shown, self.result, self.target, self.versus, self.layer, self.smooth, self.file),
                *(self.examples, self.channel, self.seen),
            ],
            trigger_mode="always_last",
            concurrency_id="explain",
            concurrency_limit=2,
            show_progress="minimal",
            show_progress_on=self.result,
            api_visibility="private",
        )

    def new_image(self, wish: "_Wish") -> dict:
        """Explain the prediction for a new image, or that of a new model."""
        model = self.shelf[wish.model]
        names, (widest, window) = Classes.of(model).names, _windows(model)
        offered = {self.examples: self._examples(model)}
        if wish.image is None:
            return self._nothing(_EMPTY) | offered
        if not self.offer.fitting(names) and self._is_example(wish.image):  # of the model that was chosen before
            return self._nothing(_FOREIGN) | offered
        picture = read_image(wish.image, name="The image")
        if wish.shown is not None and wish.shown.model == wish.model:
            return self._explain(wish, picture, None, _NOBODY)
        changes = offered | self._explain(wish._replace(layer=_IMAGE, smooth=window), picture, None, _NOBODY)
        return changes | {
            self.target: gr.Dropdown(_numbered(names), value=changes[self.target]),
            self.versus: gr.Dropdown(_others(names), value=_NOBODY),
            self.layer: gr.Dropdown(_layers(model), value=_IMAGE),
            self.smooth: gr.Slider(maximum=widest, value=window, interactive=True),
        }

    def explain(self, wish: "_Wish") -> dict:
        """Explain the class and the layer that are chosen in the fields."""
        return self._again(wish, wish.target, wish.versus)

    def choose(self, wish: "_Wish") -> dict:
        """Explain the class, or contrast the classes, of a button pressed in the result."""
        return self._again(wish, wish.event.target_class, wish.event.versus_class)

    def see(self, wish: "_Wish") -> dict:
        """Show what a unit sees in those of the examples and the visitor's image that activate it most."""
        if wish.shown is None or wish.channel is None or not wish.layer:
            return {}
        model, unit = self.shelf[wish.model], Unit(wish.layer, wish.channel)
        files = list(self.offer.fitting(Classes.of(model).names)[:_SEARCHED])
        names = [path.stem for path in files]
        if wish.image is not None and not self._is_example(wish.image):
            files, names = [*files, wish.image], [*names, "this image"]
        pictures = [read_image(file, name="The image") for file in files]
        found = model.explain(pictures, layer=unit.layer, unit=(unit.channel, "max"), batch_size=16)
        best = found.value.argsort(descending=True, stable=True)[:_STRONGEST]
        found, names = found[best], [names[index] for index in best.tolist()]
        boxes = receptive_fields(model, unit.layer, found.position, tuple(found.images.shape[2:]))
        return {self.seen: unit_html(unit, found, boxes, names, searched=len(files))}

    def draw(self, wish: "_Wish") -> dict:
        """Redraw the current explanation with other settings."""
        if wish.shown is None:
            return {}
        return {self.result: result_html(wish.shown, smooth=wish.smooth, percentile=wish.percentile)}

    def save_figure(self, wish: "_Wish") -> dict:
        return {self.file: _as_text("explanation.png", figure_file(_there(wish.shown)))}

    def save_arrays(self, wish: "_Wish") -> dict:
        return {self.file: _as_text("explanation.npz", arrays_file(_there(wish.shown)))}

    def _again(self, wish: "_Wish", target: int | None, versus: int) -> dict:
        return {} if wish.shown is None else self._explain(wish, wish.shown.explanation.images, target, versus)

    def _explain(self, wish: "_Wish", picture: Any, target: int | None, versus: int) -> dict:
        model = self.shelf[wish.model]
        versus = _NOBODY if versus == target else versus
        other = None if versus == _NOBODY else versus
        explanation = model.explain(picture, target, versus=other, layer=wish.layer or None)
        shown = Shown(wish.model, explanation, Classes.of(model).names, training_data(model))
        inner = wish.layer != _IMAGE
        channels = range(explanation.weights.shape[1]) if inner else ()
        return {
            self.channel: gr.Dropdown([(str(number), number) for number in channels], value=None, visible=inner),
            self.seen: "",
            self.shown: shown,
            self.result: result_html(shown, smooth=wish.smooth, percentile=wish.percentile),
            self.target: shown.target,
            self.versus: versus,
            self.smooth: gr.Slider(interactive=not inner),
        }

    def _examples(self, model: Any) -> str:
        return examples_html(self.offer.fitting(Classes.of(model).names), trained_on=training_data(model))

    def _is_example(self, file: str) -> bool:
        content = Path(file).read_bytes()
        return any(path.read_bytes() == content for path in self.offer.paths)

    def _nothing(self, result: str) -> dict:
        return {self.shown: None, self.result: result, self.seen: "", self.target: None, self.versus: _NOBODY}


class _Wish(NamedTuple):
    """Values of the fields when an event occurs."""

    image: str | None
    model: str
    target: int | None
    versus: int
    layer: str
    channel: int | None
    smooth: int
    percentile: float
    shown: Shown | None
    event: gr.EventData


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    """Return the choices of a field, by index because classes may share a name."""
    return [(name, index) for index, name in enumerate(names)]


def _others(names: Sequence[str]) -> list[tuple[str, int]]:
    return [("(no other class)", _NOBODY), *_numbered(names)]


def _layers(model: Any) -> list[tuple[str, str]]:
    return [("the pixels", _IMAGE), *((f"layer {name}", name) for name in layer_names(model))]


def _windows(model: Any) -> tuple[int, int]:
    """Return the maximum smoothing in pixels that leaves details visible, and the default of `explanation.rgba`."""
    height = model.pretrained_cfg["input_size"][-2]
    return max(3, height // 8 | 1), max(1, round(15 * height / 224)) | 1


def _there(shown: Shown | None) -> Shown:
    if shown is None:
        raise ValueError("There is nothing to save yet: choose an image first.")
    return shown


def _as_text(name: str, content: bytes) -> str:
    return f"{name},{base64.b64encode(content).decode()}"
