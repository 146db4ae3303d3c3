"""Trackers of Accelerate's, such as TensorBoard. A run goes on without one that fails."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from accelerate import Accelerator
from tqdm import tqdm

from ..errors import wrap_errors
from .states import RunError

__all__ = ["finish", "log", "log_picture", "start"]


def start(accelerator: Accelerator, wanted: str, options: dict[str, Any]) -> None:
    """Start the tracker that the accelerator was made with, and give it the run's options.

    Raises:
        RunError: Its package is missing, which Accelerate passes over in silence, or it does not start.
    """
    if wanted != "none":
        if not accelerator.log_with:
            raise RunError(f"--report-to {wanted}: its package is not installed")
        with wrap_errors(f"--report-to {wanted}", RunError):
            accelerator.init_trackers("timm_coda", {name: str(value) for name, value in options.items()})


def log(accelerator: Accelerator, values: Mapping[str, float | None], *, step: int) -> None:
    """Give the trackers the numbers that there are."""
    known = {name: value for name, value in values.items() if value is not None}
    _each(accelerator, lambda tracker: tracker.log(known, step=step))


def log_picture(accelerator: Accelerator, path: Path, *, step: int) -> None:
    """Give a picture to the trackers that take pictures."""

    def give(tracker: Any) -> None:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            pixels = np.asarray(PIL.Image.open(path).convert("RGB"))[None]
            tracker.log_images({"explanation": pixels}, step=step, **layout)

    _each(accelerator, give)


def finish(accelerator: Accelerator) -> None:
    """Let the trackers finish, and end Accelerate's part of the run."""
    _each(accelerator, lambda tracker: tracker.finish())
    accelerator.trackers = []  # they are finished
    accelerator.end_training()


def _each(accelerator: Accelerator, act: Callable[[Any], None]) -> None:
    for tracker in list(accelerator.trackers):
        try:
            act(tracker)
        except Exception as error:  # a server that is gone, a full disk, ...: what trackers raise has no common base
            tqdm.write(f"the tracker {tracker.name} failed, the run goes on without it: {error or repr(error)}")
            accelerator.trackers.remove(tracker)
