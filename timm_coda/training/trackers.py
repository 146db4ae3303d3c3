"""Logging to Accelerate's trackers, such as TensorBoard. A tracker that fails is removed, and training continues."""

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
    """Start the accelerator's tracker and log the run's options.

    Raises:
        RunError: The tracker's package is missing (Accelerate ignores this silently), or the tracker does not start.
    """
    if wanted != "none":
        if not accelerator.log_with:
            raise RunError(f"--report-to {wanted}: its package is not installed; install it or choose another tracker")
        with wrap_errors(f"--report-to {wanted}", RunError):
            accelerator.init_trackers("timm_coda", {name: str(value) for name, value in options.items()})


def log(accelerator: Accelerator, values: Mapping[str, float | None], *, step: int) -> None:
    """Log values to the trackers, except those that are None."""
    known = {name: value for name, value in values.items() if value is not None}
    _each(accelerator, lambda tracker: tracker.log(known, step=step))


def log_picture(accelerator: Accelerator, path: Path, *, step: int) -> None:
    """Log an image file to the trackers that support images."""

    def give(tracker: Any) -> None:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            pixels = np.asarray(PIL.Image.open(path).convert("RGB"))[None]
            tracker.log_images({"explanation": pixels}, step=step, **layout)

    _each(accelerator, give)


def finish(accelerator: Accelerator) -> None:
    """Finish the trackers and end Accelerate's training."""
    _each(accelerator, lambda tracker: tracker.finish())
    accelerator.trackers = []  # so that end_training does not finish them again
    accelerator.end_training()


def _each(accelerator: Accelerator, act: Callable[[Any], None]) -> None:
    for tracker in list(accelerator.trackers):
        try:
            act(tracker)
        except Exception as error:  # server unreachable, full disk, ...: trackers' errors have no common base class
            tqdm.write(f"the tracker {tracker.name} failed, training continues without it: {error or repr(error)}")
            accelerator.trackers.remove(tracker)
