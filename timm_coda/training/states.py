"""How far a training run has come, and the states it goes on from.

A run that is killed at any moment leaves its newest complete state behind; a run that goes on from it ends as if it had
never stopped.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from ..errors import wrap_errors
from ..hub import SaveError, temporary_folder

# They may differ when a run goes on: none of them changes a weight.
FREE_OPTIONS = {"workers", "keep", "save_every", "explain_every", "explain_images", "eval_explanations", "report_to"}
MOST_SKIPPED = 10  # updates in a row: a rare image may cost one, weights that have exploded cost all


class RunError(ValueError):
    """Options that do not go together, or with what they name; the message says how to mend it."""


class Diverged(RunError):
    """The loss is no longer a number."""


@dataclass
class Progress:
    """How far a run has come: with the states of model and optimiser, all it takes to go on exactly."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    update: int = 0
    seconds: float = 0.0
    # Of each process, since the last point of the curve: loss, correct, images.
    window: list[list[float]] = field(default_factory=list)
    totals: list[float] = field(default_factory=lambda: [0.0] * 3)  # the same of all in this epoch, up to that point
    best: dict[str, Any] = field(default_factory=dict)  # the epoch whose weights are published
    history: list[dict[str, Any]] = field(default_factory=list)
    curve: list[list[float]] = field(default_factory=list)  # update, mean loss since the point before
    skipped: dict[str, str] = field(default_factory=dict)  # image, reason
    skipped_updates: int = 0  # because of a gradient that was not finite
    skipped_in_a_row: int = 0  # of these, the latest

    def check(self, loss: float) -> None:
        """Raise `Diverged` if a loss is NaN or infinite."""
        if not math.isfinite(loss):
            self._diverged(f"the loss is {loss}")

    def _diverged(self, what: str) -> None:
        raise Diverged(
            f"{what} at update {self.update} (epoch {self.epoch + 1}): try a lower --lr, a longer --warmup-epochs, "
            "--clip-grad 1, or --mixed-precision no; what was saved before is there"
        )

    def add_update(self, made: bool) -> None:
        """Count an update, made or skipped. Raise `Diverged` after `MOST_SKIPPED` in a row."""
        self.update += 1
        self.skipped_in_a_row = 0 if made else self.skipped_in_a_row + 1
        self.skipped_updates += not made
        if not made:
            tqdm.write(f"skipped update {self.update}: its gradient is not finite")
        if self.skipped_in_a_row == MOST_SKIPPED:
            self._diverged(f"the gradient is not finite, the {MOST_SKIPPED}th time in a row,")

    def add_point(self, loss: float, correct: float, images: float) -> dict[str, float]:
        """Add a point to the loss curve, from sums over images; returns the means of the epoch so far."""
        self.check(loss)
        if images:
            self.curve.append([self.update, loss / images])
        self.totals = [a + b for a, b in zip(self.totals, (loss, correct, images), strict=True)]
        count = max(self.totals[2], 1)
        return {"train_loss": self.totals[0] / count, "train_accuracy": self.totals[1] / count}

    def add_epoch(self, entry: dict[str, Any]) -> bool:
        """Close an epoch. True if it is the best so far: by accuracy, between equals by loss."""
        self.check(entry["loss"])
        entry = {"epoch": self.epoch + 1, **entry}
        self.history.append(entry)
        better = not self.best or (entry["accuracy"], -entry["loss"]) > (self.best["accuracy"], -self.best["loss"])
        self.best = entry if better else self.best
        self.epoch, self.batch, self.totals = self.epoch + 1, 0, [0.0] * 3
        return better

    def skip(self, unread: Iterable[tuple[str, str]]) -> None:
        """Take note of images that could not be read, with the reason, and say so of each that is new."""
        for name, reason in unread:
            if name not in self.skipped:
                tqdm.write(f"skipped {name}: {reason}")
            self.skipped[name] = reason


def save_state(accelerator: Accelerator, folder: Path, progress: Progress, options: dict[str, Any]) -> None:
    """Write a complete training state; the one before is deleted only when it is complete. Every process calls.

    Raises:
        SaveError: It could not be written, such as on a full disk; the state before is still there.
    """
    main, temporary = accelerator.is_main_process, folder / ".saving"
    target = folder / f"epoch-{progress.epoch:05}-batch-{progress.batch:07}"
    progress.skipped.update(gather_object([*progress.skipped.items()]))
    record = {"options": options | {"processes": accelerator.num_processes}, "progress": asdict(progress)}
    with wrap_errors(f"the training state {target} could not be saved, but the one before is there", SaveError):
        with temporary_folder(temporary) if main else contextlib.nullcontext():
            accelerator.wait_for_everyone()
            accelerator.save_state(str(temporary))
            accelerator.wait_for_everyone()
            if main and not target.exists():
                (temporary / "record.json").write_text(json.dumps(record), encoding="utf-8")
                os.rename(temporary, target)
        for old in find_states(folder) if main else ():
            if old != target:
                shutil.rmtree(old)


def load_state(accelerator: Accelerator, folder: Path, options: dict[str, Any]) -> Progress:
    """Go back to the newest training state in a folder; to the beginning if there is none.

    Raises:
        RunError: The state cannot be read, or the options are not those of the run: it would be another run.
    """
    states = find_states(folder)
    if not states:
        return Progress()
    now = options | {"processes": accelerator.num_processes}
    with wrap_errors(f"the training state {states[-1]} cannot be read", RunError):
        record = json.loads((states[-1] / "record.json").read_text(encoding="utf-8"))
        before = {name: record["options"].get(name) for name in now.keys() - FREE_OPTIONS}
    changed = [f"{name} was {was}, is {now[name]}" for name, was in sorted(before.items()) if now[name] != was]
    if changed:
        raise RunError(f"a run goes on only with the options it had: {'; '.join(changed)}")
    with wrap_errors(f"the training state {states[-1]} cannot be read", RunError):
        accelerator.load_state(str(states[-1]))
    return Progress(**record["progress"])


def find_states(folder: str | os.PathLike) -> list[Path]:
    """The complete training states in a folder, the newest last."""
    return sorted(path.parent for path in Path(folder).glob("epoch-*/record.json"))


def keep_best(folder: Path, history: list[dict[str, Any]], count: int, save_model: Callable[[Path], Any]) -> None:
    """Save the model of the latest epoch if it is one of the `count` best, and then delete those that no longer are."""
    ranked = sorted(history, key=lambda epoch: (-epoch["accuracy"], epoch["loss"]))[:count]
    best = [folder / f"epoch-{epoch['epoch']:04}" for epoch in ranked]
    if history[-1] in ranked:
        save_model(folder / f"epoch-{history[-1]['epoch']:04}")
    for old in set(folder.glob("epoch-*")) - set(best):
        shutil.rmtree(old)
