"""Training progress and checkpoints for resuming.

A run that is killed at any moment leaves its newest complete checkpoint. A run resumed from it gives the same weights
as a run that was never interrupted.
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
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from ..data import data_changes
from ..errors import wrap_errors
from ..hub import SaveError, temporary_folder

# Options that may change when a run is resumed, because they do not affect the weights.
FREE_OPTIONS = {
    "workers",
    "cuda_graph",
    "keep",
    "save_every",
    "explain_every",
    "explain_images",
    "eval_explanations",
    "report_to",
}
MOST_SKIPPED = 10  # consecutive updates: a rare image may cost one, but diverged weights cost all


class RunError(ValueError):
    """Options are wrong, or contradict each other or the data; the message gives the remedy."""


class Diverged(RunError):
    """The loss or the gradient is no longer finite."""


@dataclass
class Progress:
    """Progress of a run. Together with model and optimiser states, this is all that resuming needs."""

    epoch: int = 0
    batch: int = 0  # completed batches of this epoch
    update: int = 0
    seconds: float = 0.0
    # Per process: sums of loss, correct predictions and images since the last point of the curve.
    window: list[list[float]] = field(default_factory=list)
    totals: list[float] = field(default_factory=lambda: [0.0] * 3)  # of all processes, from epoch start to that point
    best: dict[str, Any] = field(default_factory=dict)  # metrics of the epoch whose weights are published
    history: list[dict[str, Any]] = field(default_factory=list)
    curve: list[list[float]] = field(default_factory=list)  # update, mean loss since the previous point
    skipped: dict[str, str] = field(default_factory=dict)  # image, reason
    skipped_updates: int = 0  # updates skipped because their gradient was not finite
    skipped_in_a_row: int = 0  # how many of the latest updates were skipped
    dataset: dict[str, Any] = field(default_factory=dict)  # what is trained on, see `data.describe_data`

    def check(self, loss: float) -> None:
        """Raise `Diverged` if a loss is NaN or infinite."""
        if not math.isfinite(loss):
            self._diverged(f"the loss is {loss}")

    def _diverged(self, what: str) -> None:
        raise Diverged(
            f"{what} at update {self.update} (epoch {self.epoch + 1}): try a lower --lr, a longer --warmup-epochs, "
            "--clip-grad 1, or --mixed-precision no; earlier checkpoints and models are intact"
        )

    def add_update(self, made: bool) -> None:
        """Count an update, made or skipped. Raise `Diverged` after `MOST_SKIPPED` skipped in a row."""
        self.update += 1
        self.skipped_in_a_row = 0 if made else self.skipped_in_a_row + 1
        self.skipped_updates += not made
        if not made:
            tqdm.write(f"skipped update {self.update}: its gradient is not finite")
        if self.skipped_in_a_row == MOST_SKIPPED:
            self._diverged(f"the gradient was not finite {MOST_SKIPPED} times in a row")

    def add_point(self, loss: float, correct: float, images: float) -> dict[str, float]:
        """Add a point to the loss curve from sums over images; return the means of the epoch so far."""
        self.check(loss)
        if images:
            self.curve.append([self.update, loss / images])
        self.totals = [a + b for a, b in zip(self.totals, (loss, correct, images), strict=True)]
        count = max(self.totals[2], 1)
        return {"train_loss": self.totals[0] / count, "train_accuracy": self.totals[1] / count}

    def add_epoch(self, entry: dict[str, Any]) -> bool:
        """Finish an epoch; return True if it is the best so far, by accuracy, then by loss."""
        self.check(entry["loss"])
        entry = {"epoch": self.epoch + 1, **entry}
        self.history.append(entry)
        better = not self.best or (entry["accuracy"], -entry["loss"]) > (self.best["accuracy"], -self.best["loss"])
        self.best = entry if better else self.best
        self.epoch, self.batch, self.totals = self.epoch + 1, 0, [0.0] * 3
        return better

    def skip(self, unread: Iterable[tuple[str, str]]) -> None:
        """Record images that could not be read, with the reason; print a message for each new one."""
        for name, reason in unread:
            if name not in self.skipped:
                tqdm.write(f"skipped {name}: {reason}")
            self.skipped[name] = reason


def save_state(accelerator: Accelerator, folder: Path, options: dict[str, Any], progress: Progress) -> None:
    """Write a checkpoint atomically, then delete older ones. Every process must call this.

    Raises:
        SaveError: Writing failed, for example on a full disk; the previous checkpoint is intact.
    """
    main = accelerator.is_main_process
    target = folder / f"epoch-{progress.epoch:05}-batch-{progress.batch:07}"
    progress.skipped.update(gather_object([*progress.skipped.items()]))
    record = {"options": options | {"processes": accelerator.num_processes}, "progress": asdict(progress)}
    with wrap_errors(f"the checkpoint {target} could not be saved; the previous one is intact", SaveError):
        with temporary_folder(folder) if main else contextlib.nullcontext(folder) as made:
            temporary = Path(broadcast_object_list([str(made)])[0])
            accelerator.save_state(str(temporary))
            accelerator.wait_for_everyone()
            if main and not target.exists():
                (temporary / "record.json").write_text(json.dumps(record), encoding="utf-8")
                os.rename(temporary, target)
        for old in find_states(folder) if main else ():
            if old != target:
                shutil.rmtree(old)


def load_state(accelerator: Accelerator, folder: Path, options: dict[str, Any], dataset: dict[str, Any]) -> Progress:
    """Load the newest checkpoint in a folder and return its progress; without a checkpoint, return a new `Progress`.

    Raises:
        RunError: The checkpoint cannot be read, or options that affect the weights or the data have changed.
    """
    states = find_states(folder)
    if not states:
        return Progress(dataset=dataset)
    now = options | {"processes": accelerator.num_processes}
    with wrap_errors(f"the checkpoint {states[-1]} cannot be read", RunError):
        record = json.loads((states[-1] / "record.json").read_text(encoding="utf-8"))
        # An option that is newer than the run has kept, by its default, what the run did.
        before = {name: record["options"].get(name, now[name]) for name in now.keys() - FREE_OPTIONS}
    changed = [f"{name} was {was}, is {now[name]}" for name, was in sorted(before.items()) if now[name] != was]
    if changed:
        raise RunError(f"cannot resume with changed options, restore them: {'; '.join(changed)}")
    changed = data_changes(known, dataset) if (known := record["progress"].get("dataset")) else []
    if changed:
        raise RunError(
            f"cannot resume with changed data: {'; '.join(changed)}; restore them, or start a new run from the weights "
            f"so far: --model local-dir:{folder.parent} --pretrained"
        )
    with wrap_errors(f"the checkpoint {states[-1]} cannot be read", RunError):
        accelerator.load_state(str(states[-1]))
    return Progress(**record["progress"] | {"dataset": dataset})


def find_states(folder: str | os.PathLike) -> list[Path]:
    """Return the folders of the complete checkpoints in a folder, newest last."""
    return sorted(path.parent for path in Path(folder).glob("epoch-*/record.json"))


def keep_best(folder: Path, history: list[dict[str, Any]], count: int, save_model: Callable[[Path], Any]) -> None:
    """Save the latest epoch's model if it is among the `count` best, then delete models that no longer are."""
    ranked = sorted(history, key=lambda epoch: (-epoch["accuracy"], epoch["loss"]))[:count]
    best = [folder / f"epoch-{epoch['epoch']:04}" for epoch in ranked]
    if history[-1] in ranked:
        save_model(folder / f"epoch-{history[-1]['epoch']:04}")
    for old in set(folder.glob("epoch-*")) - set(best):
        shutil.rmtree(old)
