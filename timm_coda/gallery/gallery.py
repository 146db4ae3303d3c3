"""Explain many images into a folder: a figure, an overlay and arrays per image, contact sheets and one table."""

import contextlib
import csv
import errno
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_model_data_config

from ..explanation import GAP, GREY, Explanation, Page, color_limit, save_figure, save_image
from ..hub import __version__, replacing, weights_fingerprint
from ..images import to_rgb
from .inputs import Source
from .placement import eval_transform, overlay_whole, seen_box
from .record import Record

__all__ = ["Gallery", "Row", "contact_sheet", "is_fatal"]

COLUMNS = (
    *("image", "prediction", "probability", "target", "target_probability", "versus", "value", "bias"),
    *("evidence_for", "evidence_against", "residual", "note", "skipped"),
)
# Errors that the next file would meet as well: a full or broken disk, and output that nobody reads (`| head`).
_FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EPIPE}
_SMALLEST, _LARGEST = 256, 1024  # pixels of the longer side of an overlay
_TILE = 256  # pixels of the longer side of an image on a contact sheet
_TILES = 48  # images per contact sheet
_SIDE = 1.1  # inches of the longer side of an image on a contact sheet


class Row(NamedTuple):
    """Result of one image, to be printed."""

    name: str
    top: list[tuple[str, float]]
    """The most probable classes and their probabilities (sigmoid), at most five."""
    note: str


class Tile(NamedTuple):
    """An image on a contact sheet, without (`picture`) and with evidence (`drawn`): uint8 (H, W, 3)."""

    name: str
    caption: str
    picture: np.ndarray
    drawn: np.ndarray


@dataclass(frozen=True)
class _Waiting:
    source: Source
    digest: str
    entry: dict[str, Any] | None  # what the record has of it, if it was explained before
    place: int  # position in the order of the inputs
    seen: torch.Tensor  # model input (C, H, W)
    shown: Image.Image
    note: str


class Gallery:
    """Explain images in batches and write files named after them to a folder.

    For each image: NAME.figure.png (or .svg, .pdf), NAME.overlay.png (NAME.overlay-1.png, ... with several classes per
    image) and NAME.npz, see `Explanation.arrays`. At the end: table.csv with a row per image and class, and for more
    than one image contact_sheet.png, contact_sheet-2.png, ... with 48 images each. What is finished is recorded in the
    folder; a gallery with the same settings does not explain it again.

    An image whose files cannot be written is skipped, with the reason in the table.

    Args:
        model: a timm_coda model in eval mode.
        output: output folder, which exists and is claimed by this process.
        names: a name for each class.
        targets: classes to explain; None for the `top` most probable classes.
        versus: classes to contrast with, one or as many as `targets`.
        top: number of classes per image if `targets` is None.
        batch_size: images per forward pass.
        suffix: file type of the figures: .png, .svg or .pdf.
        overwrite: explain everything again, also in a folder with other files.

    Raises:
        InputError: the folder has results with other settings, or other files.
    """

    def __init__(
        self,
        model: Any,
        output: Path,
        *,
        names: Sequence[str],
        targets: Sequence[int] | None = None,
        versus: Sequence[int] | None = None,
        top: int = 1,
        batch_size: int = 16,
        suffix: str = ".png",
        overwrite: bool = False,
    ) -> None:
        self.model, self.output, self.names = model, output, tuple(names)
        self.targets, self.versus, self.top = targets, versus, top
        self.batch_size, self.suffix = batch_size, suffix
        self.explained = self.reused = 0  # inputs; those that were explained before are in both
        self.skipped: list[str] = []  # "NAME: REASON"
        self._count = 0
        self._config = resolve_model_data_config(model)
        settings = {"timm_coda": __version__, "weights": weights_fingerprint(model), "label_names": self.names}
        settings |= {"target": targets, "versus": versus, "top": top, "figure": suffix, "preprocessing": self._config}
        self.record = Record(output, settings, overwrite=overwrite)
        self._transform = eval_transform(model)
        self._waiting: list[_Waiting] = []
        self._table: dict[int, list[dict[str, str]]] = {}
        self._tiles: list[Tile] = []
        self._sheets = 0

    def add(self, source: Source, image: Image.Image, digest: str) -> list[Row]:
        """Queue the image of a file with this digest. Explain the queue once it fills a batch; return its rows."""
        self._count += 1
        image = to_rgb(image)
        note, entry = image.info.get("note", ""), self.record.find(source, digest)
        seen, shown = self._transform(image), _resized(image)
        self._waiting.append(_Waiting(source, digest, entry, self._count, seen, shown, note))
        return self._explain() if len(self._waiting) == self.batch_size else []

    def skip(self, source: Source, reason: str, *, place: int | None = None) -> None:
        """Record in the table that an input was skipped, and why; by default, it is the next input."""
        if place is None:
            self._count += 1
        self._table[place or self._count] = [{"image": source.name, "skipped": reason}]
        self.skipped.append(f"{source.name}: {reason}")

    def finish(self) -> list[Row]:
        """Explain the queued images, write the table and the last contact sheet, and return the images' rows."""
        rows = self._explain()
        self._write_table()
        if self._tiles and (self._sheets or len(self._tiles) > 1):
            self._write_sheet()
        return rows

    def stop(self) -> None:
        """After an error or Ctrl-C: write the table and the contact sheet of what is explained, as far as possible."""
        self._waiting = [one for one in self._waiting if one.entry]
        with contextlib.suppress(OSError):  # the error before is the one to show
            self.finish()

    def _write_table(self) -> None:
        if not self._table:  # all inputs were videos
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for place in sorted(self._table):
            writer.writerows(self._table[place])
        with replacing(self.output / "table.csv") as stream:
            stream.write(text.getvalue().encode())

    def _explain(self) -> list[Row]:
        waiting, self._waiting = self._waiting, []
        new = [one for one in waiting if not one.entry]
        explanations = iter(self._explanations(torch.stack([one.seen for one in new])) if new else ())
        rows = []
        for one in waiting:
            found = None if one.entry else next(explanations)
            try:
                if found is None:
                    self._reuse(one)
                else:
                    rows.append(self._write(one, found))
            except OSError as error:
                if is_fatal(error):
                    raise
                self.skip(one.source, _reason(error), place=one.place)
        return rows

    def _explanations(self, images: torch.Tensor) -> Explanation:
        targets = None if self.targets is None else torch.tensor(self.targets).expand(len(images), -1)
        versus = None
        if self.versus is not None:
            versus = torch.tensor(self.versus).expand(len(images), self.top if targets is None else targets.shape[1])
        top = self.top if targets is None else None
        found = self.model.explain(images, targets, top=top, versus=versus)
        return replace(found, label_names=self.names)

    def _reuse(self, one: _Waiting) -> None:
        """Take an image that was explained before into the table and onto the contact sheet."""
        assert one.entry
        with Image.open(self.output / one.entry["overlay"]) as overlay:
            drawn = np.asarray(overlay.convert("RGB"))
        self._finish_image(one, one.entry["rows"], one.entry["caption"], drawn)
        self.reused += 1

    def _write(self, one: _Waiting, found: Explanation) -> Row:
        stem = self.output / one.source.stem
        files = [_with_ending(stem, ".npz"), _with_ending(stem, f".figure{self.suffix}")]
        found.save(files[0])
        save_figure(found.plot(), files[1])
        maps = found.contributions[0].cpu().numpy()  # (T, H, W)
        box, limit = seen_box(self._config, *one.shown.size), color_limit(maps)
        picture = np.asarray(one.shown)
        drawn = [overlay_whole(picture, part, box=box, limit=limit) for part in maps]
        for number, overlaid in enumerate(drawn, 1):
            ending = f".overlay-{number}.png" if len(drawn) > 1 else ".overlay.png"
            files.append(_with_ending(stem, ending))
            save_image(overlaid, files[-1])
        probabilities = torch.sigmoid(found.logits[0].float())
        best = probabilities.topk(min(5, len(self.names))).indices.tolist()
        row = Row(one.source.name, [(self.names[i], probabilities[i].item()) for i in best], one.note)
        explained = self.names[int(found.target[0, 0])]
        caption = f"{row.top[0][0]} {row.top[0][1]:.2f}"
        if explained != row.top[0][0] or found.versus is not None:
            other = "" if found.versus is None else f", not {self.names[int(found.versus[0, 0])]}"
            caption += f"; shown: {explained}{other}"
        rows, overlay = self._table_rows(row, found, probabilities), os.path.relpath(files[2], self.output)
        self.record.add(one.source, one.digest, files, rows=rows, caption=caption, overlay=overlay)
        self._finish_image(one, rows, caption, drawn[0])
        return row

    def _finish_image(self, one: _Waiting, rows: list[dict[str, str]], caption: str, drawn: np.ndarray) -> None:
        self._table[one.place] = rows
        tile = [np.asarray(_shrunk(Image.fromarray(pixels))) for pixels in (np.asarray(one.shown), drawn)]
        self._tiles.append(Tile("/".join(Path(one.source.name).parts[-2:]), caption, *tile))
        self.explained += 1
        if len(self._tiles) == _TILES:
            self._write_sheet()

    def _table_rows(self, row: Row, found: Explanation, probabilities: torch.Tensor) -> list[dict[str, str]]:
        (prediction, probability), numbers = row.top[0], found.arrays()
        table = []
        for t, target in enumerate(numbers["target"][0]):
            maps = numbers["contributions"][0, t].astype(np.float64)
            values = {
                "probability": probability,
                "target_probability": probabilities[int(target)].item(),
                "value": numbers["value"][0, t],
                "bias": found.bias,
                "evidence_for": maps.clip(min=0).sum(),
                "evidence_against": maps.clip(max=0).sum(),
                "residual": numbers["residual"][0, t],
            }
            words = {"image": row.name, "prediction": prediction, "target": self.names[target], "note": row.note}
            if found.versus is not None:
                words["versus"] = self.names[numbers["versus"][0, t]]
            table.append(words | {name: f"{value:.6g}" for name, value in values.items()})
        return table

    def _write_sheet(self) -> None:
        self._sheets += 1
        name = f"contact_sheet-{self._sheets}.png" if self._sheets > 1 else "contact_sheet.png"
        tiles, self._tiles = self._tiles, []
        try:
            save_figure(contact_sheet(tiles), self.output / name)
        except OSError as error:
            if is_fatal(error):
                raise
            self.skipped.append(f"{name}: {_reason(error)}")


def is_fatal(error: OSError) -> bool:
    """Return True if an error with one file will happen with the others as well, such as on a full disk."""
    return error.errno in _FATAL


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def contact_sheet(tiles: Sequence[Tile]) -> Any:
    """Draw a matplotlib figure of images, each beside its evidence, with the name above and the caption below.

    Raises:
        ImportError: matplotlib is missing.
    """
    columns = min(4, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    width, height = 2 * _SIDE + 0.05, _SIDE + 0.42
    page = Page(columns * (width + GAP) + GAP, rows * height + 0.4)
    heading = "red: evidence for the class, blue: against it; each image has a colour scale of its own"
    page.text(GAP, 0.2, heading, width=columns * (width + GAP) - GAP, color=GREY)
    for index, tile in enumerate(tiles):
        left, top = GAP + index % columns * (width + GAP), 0.5 + index // columns * height
        page.text(left, top - 0.06, tile.name, width=width, color=GREY)
        h, w = (_SIDE * side / max(tile.picture.shape) for side in tile.picture.shape[:2])
        page.picture(tile.picture, left, top, w, h)
        page.picture(tile.drawn, left + w + 0.05, top, w, h)
        page.text(left, top + h + 0.12, tile.caption, width=width)
    return page.figure


def _with_ending(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)  # with_suffix would drop the end of "photo.2021"


def _resized(image: Image.Image) -> Image.Image:
    """Resize an image for an overlay: large enough to see details, small enough to hold many in memory."""
    side = max(image.size)
    if side < _SMALLEST:
        times = math.ceil(_SMALLEST / side)
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    return _shrunk(image, _LARGEST)


def _shrunk(image: Image.Image, side: int = _TILE) -> Image.Image:
    scale = side / max(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)
