"""Explain many images into a folder: a figure, an overlay and arrays per image, contact sheets and one table."""

import contextlib
import csv
import errno
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_model_data_config

from ..explanation import GAP, GREY, Explanation, Page, color_limit, save_figure, save_image
from ..hub import ALONE, Processes, __version__, replacing, weights_fingerprint
from ..images import ImageError, read_image, to_rgb
from .inputs import InputError, Source, fetched
from .placement import eval_transform, overlay_whole, seen_box
from .record import Record, digest_of
from .video import VIDEO_SUFFIXES

__all__ = ["Gallery", "Row", "contact_sheet", "reason_of"]

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
class _Read:
    source: Source
    digest: str
    entry: dict[str, Any] | None  # what the record has of it, if it was explained before
    seen: torch.Tensor  # model input (C, H, W)
    shown: Image.Image
    note: str


@dataclass(frozen=True)
class _Done:
    """What became of an input; the first process collects it."""

    source: Source
    reason: str = ""  # why it was skipped
    entry: dict[str, Any] | None = None
    tile: Tile | None = None
    row: Row | None = None  # None if it was explained before
    video: bool = False


class Gallery:
    """Explain images in batches and write files named after them to a folder.

    For each image: NAME.figure.png (or .svg, .pdf), NAME.overlay.png (NAME.overlay-1.png, ... with several classes per
    image) and NAME.npz, see `Explanation.arrays`. At the end: table.csv with a row per image and class, and for more
    than one image contact_sheet.png, contact_sheet-2.png, ... with 48 images each. What is finished is recorded in the
    folder; a gallery with the same settings does not explain it again.

    An image that cannot be read, or whose files cannot be written, is skipped, with the reason in the table.

    If several processes share the work, each has a gallery with the same arguments. A batch is explained by one of
    them, and is the same for any number of them, so that contributions are as well; the first process writes the table
    and the contact sheets.

    Args:
        model: a timm_coda model in eval mode.
        output: output folder, which exists and is claimed by the first process.
        sources: all inputs, in the order of the table.
        names: a name for each class.
        targets: classes to explain; None for the `top` most probable classes.
        versus: classes to contrast with, one or as many as `targets`.
        top: number of classes per image if `targets` is None.
        batch_size: images per forward pass.
        suffix: file type of the figures: .png, .svg or .pdf.
        overwrite: explain everything again, also in a folder with other files.
        processes: the processes that share the work.
        show: called in the first process with the row of each image that is explained.

    Raises:
        InputError: the folder has results with other settings, or other files.
    """

    def __init__(
        self,
        model: Any,
        output: Path,
        sources: Sequence[Source],
        *,
        names: Sequence[str],
        targets: Sequence[int] | None = None,
        versus: Sequence[int] | None = None,
        top: int = 1,
        batch_size: int = 16,
        suffix: str = ".png",
        overwrite: bool = False,
        processes: Processes = ALONE,
        show: Callable[[Row], None] = lambda row: None,
    ) -> None:
        self.model, self.output, self.names = model, output, tuple(names)
        self.processes, self._show = processes, show
        self.targets, self.versus, self.top = targets, versus, top
        self.batch_size, self.suffix = batch_size, suffix
        self.explained = self.reused = 0  # inputs; those that were explained before are in both
        self.skipped: list[str] = []  # "NAME: REASON"
        self.videos: list[Source] = []  # URLs given as images that turned out to be videos
        self._config = resolve_model_data_config(model)
        settings = {"timm_coda": __version__, "weights": weights_fingerprint(model), "label_names": self.names}
        settings |= {"target": targets, "versus": versus, "top": top, "figure": suffix, "preprocessing": self._config}
        self.record = Record(output, settings, overwrite=overwrite, processes=processes)
        self._transform = eval_transform(model)
        self._places = {source.stem: place for place, source in enumerate(sources)}
        self._table: dict[int, list[dict[str, str]]] = {}
        self._tiles: list[Tile] = []
        self._sheets = 0

    def explain(self, batches: Sequence[Sequence[Source]]) -> None:
        """Explain batches of images, one in each process."""
        if self.processes.count == 1:
            for batch in batches:
                for done in self._explain(batch):
                    self._take(done)
            return

        def take(batches: list[list[_Done]]) -> None:
            for done in (done for batch in batches for done in batch):
                self._take(done)

        self.processes.share(batches, lambda batch: list(self._explain(batch)), join=take)

    def skip(self, source: Source, reason: str) -> None:
        """Record in the table that an input was skipped, and why."""
        self._table[self._places[source.stem]] = [{"image": source.name, "skipped": reason}]
        self.skipped.append(f"{source.name}: {reason}")

    def finish(self) -> None:
        """Write the table and the last contact sheet, in the first process."""

        def finish() -> None:
            self._finish()
            self.record.close()

        self.processes.first(finish)

    def stop(self) -> None:
        """After an error or Ctrl-C: write the table and the contact sheet of what is explained, as far as possible."""
        if self.processes.rank == 0:
            with contextlib.suppress(OSError):  # the error before is the one to show
                self._finish()

    def _finish(self) -> None:
        self._write_table()
        if self._tiles and (self._sheets or len(self._tiles) > 1):
            self._write_sheet()

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

    def _explain(self, batch: Sequence[Source]) -> Iterator[_Done]:
        """Explain a batch of images and write their files; yield what became of each.

        Those that were explained before are explained with the others, if there are any, but not written: the numbers
        of an image depend, in their last digits, on the number of images in its batch.
        """
        ready: list[_Read] = []
        for source in batch:
            path = Path(source.place)
            try:
                with fetched(source) as path:
                    if path.suffix.lower() in VIDEO_SUFFIXES:
                        yield _Done(source, video=True)
                        continue
                    ready.append(self._read(source, path))
            except (ImageError, InputError) as error:
                yield _Done(source, str(error).removeprefix(f"{source.name}: ").removeprefix(f"{path}: "))
            except OSError as error:
                yield _Done(source, reason_of(error))
        explanations = None
        if not all(one.entry for one in ready):
            explanations = self._explanations(torch.stack([one.seen for one in ready]))
        for number, one in enumerate(ready):
            try:
                if one.entry:
                    yield self._reuse(one, one.entry)
                else:
                    assert explanations is not None
                    yield self._write(one, explanations[number])
            except OSError as error:
                yield _Done(one.source, reason_of(error))

    def _read(self, source: Source, path: Path) -> _Read:
        digest = digest_of(path)
        image = to_rgb(read_image(path, name=source.name))
        entry, note = self.record.find(source, digest), image.info.get("note", "")
        return _Read(source, digest, entry, self._transform(image), _resized(image), note)

    def _take(self, done: _Done) -> None:
        """Add what became of an image to the table, the record and the contact sheet."""
        if done.video:
            self.videos.append(done.source)
            return
        if done.entry is None or done.tile is None:
            self.skip(done.source, done.reason)
            return
        self.record.take(done.entry)
        self._table[self._places[done.source.stem]] = done.entry["rows"]
        self._tiles.append(done.tile)
        self.explained += 1
        self.reused += done.row is None
        if len(self._tiles) == _TILES:
            self._write_sheet()
        if done.row is not None:
            self._show(done.row)

    def _explanations(self, images: torch.Tensor) -> Explanation:
        targets = None if self.targets is None else torch.tensor(self.targets).expand(len(images), -1)
        versus = None
        if self.versus is not None:
            versus = torch.tensor(self.versus).expand(len(images), self.top if targets is None else targets.shape[1])
        top = self.top if targets is None else None
        found = self.model.explain(images, targets, top=top, versus=versus)
        return replace(found, label_names=self.names)

    def _reuse(self, one: _Read, entry: dict[str, Any]) -> _Done:
        """Take an image that was explained before into the table and onto the contact sheet."""
        with Image.open(self.output / entry["overlay"]) as overlay:
            drawn = np.asarray(overlay.convert("RGB"))
        return _Done(one.source, entry=entry, tile=_tile(one, entry["caption"], drawn))

    def _write(self, one: _Read, found: Explanation) -> _Done:
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
        entry = self.record.add(one.source, one.digest, files, rows=rows, caption=caption, overlay=overlay)
        return _Done(one.source, entry=entry, tile=_tile(one, caption, drawn[0]), row=row)

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
            self.skipped.append(f"{name}: {reason_of(error)}")


def reason_of(error: OSError) -> str:
    """Return why one file is skipped; raise the error if the others will meet it as well, such as on a full disk."""
    if error.errno in _FATAL:
        raise error
    return error.strerror or str(error)


def _tile(one: _Read, caption: str, drawn: np.ndarray) -> Tile:
    pictures = [np.asarray(_shrunk(Image.fromarray(pixels))) for pixels in (np.asarray(one.shown), drawn)]
    return Tile("/".join(Path(one.source.name).parts[-2:]), caption, *pictures)


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
