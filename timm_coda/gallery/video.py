"""Videos with evidence drawn over every frame, on the same colour scale in all frames. Needs PyAV.

A video is read twice. The first pass explains 64 evenly spaced frames to choose the class and the end of the colour
scale. The second pass explains every frame and draws it on that scale. Frames are processed in batches, so memory does
not grow with the length of the video.
"""

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor
from tqdm import tqdm

from ..explanation import Classes, color_limit, temporary_path
from ..images import MAX_PIXELS, MAX_RATIO
from .legend import draw_legend
from .placement import eval_transform, overlay_whole, seen_box

__all__ = ["VIDEO_SUFFIXES", "VideoError", "VideoSummary", "explain_video"]

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv")
# FFmpeg's names of container formats. Other formats (playlists, image lists) could open further files and URLs.
_FORMATS = "mov,mp4,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg"
_SAMPLES = 64  # frames that set the colour scale
_CLOCK = 90_000  # ticks per second: at every usual frame rate, a frame lasts a whole number of ticks


class VideoError(ValueError):
    """A video cannot be read; the message names the file, the problem and the remedy."""


@dataclass(frozen=True)
class VideoSummary:
    """Summary of an explained video."""

    frames: int
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    rate: float
    """Average frames per second."""
    target: int
    """Explained class."""
    versus: int | None
    """Class that the target is contrasted with."""
    predicted: int
    """Number of frames whose most probable class is the target."""
    limit: float
    """The contribution with the strongest colour, in logits, in every frame."""
    note: str
    """A warning for the user, or empty."""


def explain_video(
    model: Any,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    target: int | None = None,
    versus: int | None = None,
    label_names: Sequence[str] | None = None,
    batch_size: int = 16,
) -> VideoSummary:
    """Explain one class in every frame of a video.

    Writes an .mp4 (H.264) of the same size and frame rate, and a table of its frames. The colour scale ends at the
    99.5th percentile of the contributions in 64 evenly spaced frames. Audio is dropped. Odd widths and heights grow by
    one pixel, because H.264 needs even ones.

    Args:
        model: a timm_coda model in eval mode.
        source: the video.
        output: ends in .mp4. The table is written beside it with the suffix .csv: one row per frame with its number,
            time in seconds, prediction, target, their probabilities (sigmoid), and the explained value (the target's
            logit, minus that of `versus` if given).
        target: class to explain; None for the class with the largest average logit.
        versus: class to contrast with.
        label_names: a name for each class; None for the model's names.
        batch_size: frames per forward pass.

    Raises:
        VideoError: the file is not a video, is damaged or has no frames; nothing is written.
        ValueError: a class is out of range, or `output` does not end in .mp4.
        ImportError: PyAV is missing.
    """
    source, output = Path(source), Path(output)
    if output.suffix.lower() != ".mp4":
        raise ValueError(f"{output}: the output name must end in .mp4")
    for name, value in (("target", target), ("versus", versus)):
        if value is not None and not 0 <= value < model.num_classes:
            raise ValueError(f"{name}={value}: the model's classes are 0 to {model.num_classes - 1}")
    names = Classes.of(model).names if label_names is None else label_names
    header = _read_header(source)
    config = resolve_model_data_config(model)
    transform = eval_transform(model)
    target, limit = _choose_scale(model, _sample(source, header.count, transform), target, versus, batch_size)
    caption = names[target] if versus is None else f"{names[target]}, not {names[versus]}"

    count = predicted = height = width = 0
    seconds = 0.0
    frames = _read_frames(source)
    with _writing(output, header) as (add_frame, add_row):
        progress = tqdm(total=header.count, desc=source.name, unit="frame", disable=None)
        with progress:
            while batch := list(islice(frames, batch_size)):
                height, width = batch[0][0].shape[:2]
                box = seen_box(config, width, height)
                images = torch.stack([transform(Image.fromarray(picture)) for picture, _ in batch])
                explained = model.explain(images, target=target, versus=versus)
                for (picture, seconds), found in zip(batch, explained, strict=True):
                    best, probabilities = int(found.prediction), torch.sigmoid(found.logits[0].float())
                    drawn = overlay_whole(picture, found.contributions[0].cpu(), box=box, limit=limit)
                    add_frame(draw_legend(drawn, caption, probabilities[target].item(), limit), seconds)
                    pair = [names[best], f"{probabilities[best]:.4f}", names[target], f"{probabilities[target]:.4f}"]
                    add_row([count, f"{seconds:.3f}", *pair, f"{found.value.item():.4f}"])
                    count += 1
                    predicted += best == target
                progress.update(len(batch))
    note = ""
    if header.seconds is not None and seconds < header.seconds - max(1, 0.1 * header.seconds):
        note = f"the last frame is at {seconds:.1f} s of {header.seconds:.1f} s: the video is cut off or damaged"
    return VideoSummary(count, width, height, float(header.rate), target, versus, predicted, limit, note)


@dataclass(frozen=True)
class _Header:
    count: int
    """Number of frames, counted without decoding them."""
    rate: Fraction
    """Average frames per second."""
    seconds: float | None
    """Duration that the file states."""
    aspect: Fraction
    """Width of a pixel divided by its height."""


def _read_header(path: Path) -> _Header:
    with _opened(path) as (container, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS or max(width, height) > MAX_RATIO * min(width, height):
            raise VideoError(f"{path}: frames of {width}x{height} pixels are too large or narrow: resize or crop them")
        rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        seconds = container.duration and container.duration / 1e6
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        count = sum(packet.size > 0 for packet in container.demux(stream))
    if count == 0:
        raise VideoError(f"{path}: the video has no frames")
    return _Header(count, rate, seconds, aspect)


def _read_frames(path: Path, wanted: set[int] | None = None) -> Iterator[tuple[np.ndarray, float]]:
    """Yield upright frames, uint8 (H, W, 3), all of the first one's size, with their time in seconds.

    Args:
        path: the video.
        wanted: frame numbers to yield; None for all.
    """
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        rate = float(stream.average_rate or 25)
        first, seconds, size = None, -1 / rate, {}
        for number, frame in enumerate(container.decode(stream)):
            first = frame.time if first is None else first
            seconds = seconds + 1 / rate if frame.time is None or first is None else frame.time - first
            even = round(seconds * rate) / rate
            seconds = even if abs(even - seconds) < 1e-3 else seconds  # Matroska rounds to milliseconds
            size = size or {"width": frame.width, "height": frame.height}
            if wanted is None or number in wanted:
                # Phones store frames in the sensor's orientation, plus a counterclockwise rotation to apply.
                yield np.rot90(frame.to_ndarray(format="rgb24", **size), round(frame.rotation / 90)), seconds


def _sample(path: Path, count: int, transform: Any) -> Tensor:
    """Model inputs, (N, C, H, W), of the frames that set the colour scale."""
    wanted = {int(number) for number in np.linspace(0, count - 1, min(_SAMPLES, count)).round()}
    images = [transform(Image.fromarray(picture)) for picture, _ in _read_frames(path, wanted)]
    if not images:
        raise VideoError(f"{path}: no frame of the video can be decoded")
    return torch.stack(images)


def _choose_scale(
    model: Any, images: Tensor, target: int | None, versus: int | None, batch_size: int
) -> tuple[int, float]:
    """Choose the class to explain and the end of the colour scale in logits."""
    parts = images.split(batch_size)
    if target is None:
        means = torch.cat([model.explain(part).logits for part in parts]).float().mean(0)
        target = int(means.argmax())
    maps = torch.cat([model.explain(part, target=target, versus=versus).contributions for part in parts])
    return target, color_limit(maps)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open FFmpeg's container and video stream; its errors become `VideoError`."""
    av = _import_av()
    try:
        with av.open(str(path.resolve()), options={"format_whitelist": _FORMATS}) as container:
            if not container.streams.video:
                raise VideoError(f"{path}: the file has no video stream, or is damaged: copy or convert it again")
            yield container, container.streams.video[0]
    except (av.FFmpegError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if not path.is_file():
            raise VideoError(f"{path}: cannot be opened: {reason}") from error
        raise VideoError(f"{path}: not a video, or damaged ({reason}): copy or convert it again") from error


@contextmanager
def _writing(output: Path, header: _Header) -> Iterator[Any]:
    """Yield functions that add a frame (pixels, seconds) and a table row. Both files are written atomically."""
    av = _import_av()
    output.parent.mkdir(parents=True, exist_ok=True)
    finals = [output, output.with_suffix(".csv")]
    temporary = [temporary_path(final.parent, final.suffix) for final in finals]
    stream: Any = None
    last = -1
    try:
        with ExitStack() as stack:
            container = stack.enter_context(av.open(str(temporary[0].resolve()), "w", format="mp4"))
            table = stack.enter_context(open(temporary[1], "x", newline="", encoding="utf-8"))
            rows = csv.writer(table)
            rows.writerow(["frame", "seconds", "prediction", "probability", "target", "target_probability", "value"])

            def add_frame(picture: np.ndarray, seconds: float) -> None:
                nonlocal stream, last
                height, width = picture.shape[:2]
                picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), "edge")
                if stream is None:
                    stream = container.add_stream("h264", rate=header.rate, options={"crf": "18"})
                    stream.height, stream.width = picture.shape[:2]
                    stream.pix_fmt = "yuv420p"
                    stream.codec_context.time_base = Fraction(1, _CLOCK)
                    stream.codec_context.sample_aspect_ratio = header.aspect
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                last = frame.pts = max(last + 1, round(seconds * _CLOCK))
                frame.time_base = Fraction(1, _CLOCK)
                container.mux(stream.encode(frame))

            yield add_frame, rows.writerow
            container.mux(stream.encode(None))
        for new, final in zip(temporary, finals, strict=True):
            os.replace(new, final)
    finally:
        for new in temporary:
            new.unlink(missing_ok=True)


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError("videos need PyAV: pip install 'timm_coda[video]'") from error
    return av
