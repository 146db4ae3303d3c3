"""The bookkeeping of training runs: options and recipes, how far a run has come, states to go on from, pictures, facts.

A run that is killed at any moment leaves its newest complete state behind; a run that goes on from it ends as if it had
never stopped.
"""

import argparse
import contextlib
import difflib
import glob
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from .hub import HubError, SaveError, blame, push_folder, temporary_folder

# What train.py writes into a run's folder; --overwrite removes these and nothing else.
OUTPUTS = ("checkpoints", "explanations", "summary.json", "explanation.png", "config.json", "model.safetensors")
COMMAND_OPTIONS = {
    "config",
    "output",
    "overwrite",
    "resume",
    "push_to_hub",
}  # they belong to a command, not to the run it starts
# They may differ when a run goes on: none of them changes a weight.
FREE_OPTIONS = {"workers", "save_every", "explain_every", "explain_images", "eval_explanations", "report_to"}


class RunError(ValueError):
    """Options that do not go together, or with what they name; the message says how to mend it."""


class Diverged(RunError):
    """The loss is no longer a number."""


class Stopped(Exception):
    """There is nothing to do, or someone asked the run to stop and its state is saved; the message says which."""

    def __init__(self, message: str, *, code: int):
        super().__init__(message)
        self.code = code  # exit code


def watch_signals() -> list[int]:
    """Let Ctrl-C add to the list that is returned, so that a run can finish its update; a second one interrupts."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        print("\nstopping after this update; again to stop at once", flush=True)

    signal.signal(signal.SIGINT, note)
    return seen


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines, and adds its default to the help of each option that does not say it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = not action.help or "(default" in action.help or action.default in (None, argparse.SUPPRESS)
        return action.help if said else f"{action.help} (default: %(default)s)"


def natural(text: str, *, least: int = 0) -> int:
    """The type of an option that is a whole number, 0 or more."""
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
    return number


def positive(text: str) -> int:
    """The type of an option that is a whole number, 1 or more."""
    return natural(text, least=1)


def parse_options(parser: argparse.ArgumentParser, argv: list[str], default_recipe: Path) -> argparse.Namespace:
    """Read options: defaults, then the recipe, then the command line; and settle the output folder.

    The parser has at least `config`, `output`, `overwrite`, `resume`, `data` and `model`. A run that is resumed by its
    folder has its own recipe there; without a recipe, data set or model, the default recipe it is.

    Raises:
        RunError: No such recipe or run, an unknown option in it, or an output folder that is in use.
    """
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        raise RunError("--resume goes on with a run and --overwrite replaces it: give one of them")
    if args.resume not in (None, "auto"):
        args.output, args.config = args.resume, str(Path(args.resume) / "recipe.yaml")
        if not Path(args.config).is_file():
            raise RunError(f"--resume {args.resume}: no run is there, it would have a recipe.yaml")
    elif not args.config and not {word.split("=")[0] for word in argv} & {"--data", "--model"}:
        args.config = str(default_recipe)
    config, output = args.config, args.output
    if config:
        known = sorted(name.replace("_", "-") for name in vars(args).keys() - COMMAND_OPTIONS)
        args = parser.parse_args(read_recipe(config, known) + argv)
    if output is None:
        output = Path("runs") / (Path(config).resolve().parent.name if config else re.sub(r"\W", "_", args.model))
        if not args.resume:
            output = free_folder(output)
    used = os.path.exists(output) and (not os.path.isdir(output) or os.listdir(output))
    if used and not args.overwrite and not (args.resume and (Path(output) / "recipe.yaml").is_file()):
        raise RunError(f"--output {output} is in use: give another, --resume {output} to go on, or --overwrite")
    args.config, args.output = config, str(output)
    return args


def read_recipe(path: str | os.PathLike, known: Collection[str]) -> list[str]:
    """Read a recipe, a YAML mapping from option names to values, as the command line that says the same.

    Args:
        path: The recipe.
        known: The names of the options there are, with dashes.

    Raises:
        RunError: The file is missing or not such a mapping, or names an unknown option.
    """
    with blame(f"--config {os.fspath(path)}", RunError):
        try:
            recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise RunError(f"not YAML: {error}") from error
        if not isinstance(recipe, dict):
            raise RunError(f"expected lines such as 'lr: 0.001', got {recipe!r:.60}")
        words = []
        for key, value in recipe.items():
            name = str(key).replace("_", "-")
            if name not in known:
                near = difflib.get_close_matches(name, known)
                hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
                raise RunError(f"there is no option {key!r}: {hint}")
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            elif isinstance(value, dict):
                words += [f"--{name}", *(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in value.items())]
            elif value is not None and value != []:
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return words


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that make a run what it is, without those of the command that started it."""
    return {name: value for name, value in vars(args).items() if name not in COMMAND_OPTIONS}


def free_folder(folder: str | os.PathLike) -> Path:
    """The folder itself if nothing is there, else the first of FOLDER-2, FOLDER-3, ... where nothing is."""
    free, number = Path(folder), 1
    while free.exists():
        number += 1
        free = Path(f"{os.fspath(folder)}-{number}")
    return free


def start_folder(folder: Path, options: dict[str, Any]) -> None:
    """Make the folder of a new run, without an old run's files, and write its recipe."""
    for path in (folder / name for name in OUTPUTS):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "recipe.yaml", yaml.safe_dump(options, sort_keys=False, allow_unicode=True))


@dataclass
class Progress:
    """How far a run has come: with the states of model and optimiser, all it takes to go on exactly."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    update: int = 0
    seconds: float = 0.0
    window: list[float] = field(default_factory=lambda: [0.0] * 3)  # loss, correct, images since the last curve point
    totals: list[float] = field(default_factory=lambda: [0.0] * 3)  # the same of this epoch, up to that point
    best: dict[str, Any] = field(default_factory=dict)  # the epoch whose weights are published
    history: list[dict[str, Any]] = field(default_factory=list)
    curve: list[list[float]] = field(default_factory=list)  # update, mean loss since the point before
    skipped: dict[str, str] = field(default_factory=dict)  # image, reason

    def check(self, loss: float) -> None:
        """Raise `Diverged` if a loss is NaN or infinite."""
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss is {loss} at update {self.update} (epoch {self.epoch + 1}): try a lower --lr, a longer "
                "--warmup-epochs, --clip-grad 1, or --mixed-precision no; what was saved before is there"
            )

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
    progress.check(progress.window[0])
    main, temporary = accelerator.is_main_process, folder / ".saving"
    target = folder / f"epoch-{progress.epoch:05}-batch-{progress.batch:07}"
    progress.skipped.update(gather_object([*progress.skipped.items()]))
    record = {"options": options | {"processes": accelerator.num_processes}, "progress": asdict(progress)}
    with blame(f"the training state {target} could not be saved, but the one before is there", SaveError):
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
    with blame(f"the training state {states[-1]} cannot be read", RunError):
        record = json.loads((states[-1] / "record.json").read_text(encoding="utf-8"))
        before = {name: record["options"].get(name) for name in now.keys() - FREE_OPTIONS}
    changed = [f"{name} was {was}, is {now[name]}" for name, was in sorted(before.items()) if now[name] != was]
    if changed:
        raise RunError(f"a run goes on only with the options it had: {'; '.join(changed)}")
    with blame(f"the training state {states[-1]} cannot be read", RunError):
        accelerator.load_state(str(states[-1]))
    return Progress(**record["progress"])


def save_summary(folder: Path, progress: Progress, facts: dict[str, Any]) -> None:
    """Write `summary.json`: the best epoch's numbers, facts about the run, where it ran, and how it went."""
    summary = {"command": shlex.join(sys.argv), **progress.best, "seconds": progress.seconds, **facts}
    summary["hub_data_set"] = _hub_data_set(facts["options"]["data"])
    summary |= {"environment": environment()}
    summary |= {name: value for name, value in asdict(progress).items() if name in ("history", "curve", "skipped")}
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")


def closing_words(folder: Path, progress: Progress, *, pictures: bool) -> str:
    """What a finished run says: how good, how long, where the pictures are, how to load the model."""
    best, note = progress.best, f"; {len(progress.skipped)} images could not be read" if progress.skipped else ""
    return (
        f"\naccuracy {best['accuracy']:.4f} in epoch {best['epoch']}, {progress.seconds:.0f} s in all{note}\n"
        + (f"explanations: {folder / 'explanation.png'}\n" if pictures else "")
        + f'\nimport timm, timm_coda\nmodel = timm.create_model("local-dir:{folder}", pretrained=True).eval()'
    )


def publish(folder: Path, repo_id: str | None) -> None:
    """Push a finished run to the Hub, if it is to go there, and say where it is.

    Raises:
        HubError: It is not there; the message says how to push it later.
    """
    if repo_id:
        with blame(f"the model is in {folder}, but not on the Hub; later: timm-coda push {folder} {repo_id}", HubError):
            print(f"published: {push_folder(folder, repo_id).commit_url}")


def find_states(folder: str | os.PathLike) -> list[Path]:
    """The complete training states in a folder, the newest last."""
    return sorted(path.parent for path in Path(folder).glob("epoch-*/record.json"))


def no_pictures(model: Any) -> str:
    """Why no explanation of a model can be drawn; empty if one can."""
    if not hasattr(model, "explain"):
        return f"{type(model).__name__} cannot explain itself, unlike the models of timm_coda: no pictures"
    missing = importlib.util.find_spec("matplotlib") is None
    return "no pictures, for want of matplotlib: pip install timm_coda[viz]" if missing else ""


def start_trackers(accelerator: Accelerator, wanted: str, options: dict[str, Any]) -> None:
    """Start the tracker that the accelerator was made with, and give it the run's options.

    Raises:
        RunError: Its package is missing, which Accelerate passes over in silence, or it does not start.
    """
    if wanted != "none":
        if not accelerator.log_with:
            raise RunError(f"--report-to {wanted}: its package is not installed")
        with blame(f"--report-to {wanted}", RunError):
            accelerator.init_trackers("timm_coda", {name: str(value) for name, value in options.items()})


def log_picture(accelerator: Accelerator, path: Path, *, step: int) -> None:
    """Give a picture to the trackers that take pictures."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images(
                {"explanation": np.asarray(PIL.Image.open(path).convert("RGB"))[None]}, step=step, **layout
            )


def _hub_data_set(sources: list[str]) -> str | None:
    """The id of a data set that came from the Hugging Face Hub; None for one that did not."""
    here = sources == ["digits"] or any(os.path.exists(source) or glob.glob(source) for source in sources)
    return None if here or len(sources) > 1 else sources[0]


def environment() -> dict[str, str]:
    """Versions and hardware, for the record of a run."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("timm_coda", "torchvision", "timm", "accelerate", "datasets", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # timm_coda may run without installation
            versions[name] = importlib.metadata.version(name)
    root = Path(__file__).parents[1]
    if (root / ".git").exists():  # a clone, and not what pip installed
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            ask = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
            versions["commit"] = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    threads = torch.get_num_threads()
    hardware = {"cpu": f"{cpu}, {threads} thread{'s' if threads > 1 else ''}", "gpus": ", ".join(gpus) or "none"}
    return {**versions, "platform": platform.platform(), **hardware}


def write_text(path: Path, text: str) -> None:
    """Replace a file by a new text, all or nothing.

    Raises:
        SaveError: It could not be written, such as on a full disk; the old one is still there.
    """
    temporary = path.with_name(f".saving-{path.name}")
    with blame(f"{path} could not be written", SaveError):
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
