"""Signals, output folders, progress bars and summaries of training runs."""

import argparse
import contextlib
import glob
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import broadcast_object_list
from torch import nn
from tqdm import tqdm

from ..errors import wrap_errors
from ..explanation import save_figure
from ..hub import PICTURE_KEY, RUNNING, SAVED, HubError, claimed, push_folder, write_text
from ..layers import cpu_slowdown, is_emulated
from .options import default_output
from .states import Progress, RunError

# What train.py writes into a run's folder; --overwrite removes these and nothing else.
OUTPUTS = ("checkpoints", "best", "explanations", "summary.json", "explanation.png", "config.json", "model.safetensors")
OUTPUTS += (SAVED,)


class Stopped(Exception):
    """End a run without a failure: it was already finished, or a signal stopped it after saving a checkpoint."""

    def __init__(self, message: str, *, code: int):
        super().__init__(message)
        self.code = code  # exit code


def make_accelerator(*, mixed_precision: str | None, grad_accum: int, report_to: str) -> Accelerator:
    """Create the accelerator: device, processes, precision, tracker.

    On a CPU without bfloat16 instructions, bf16 is replaced by float32, and a line says so.

    Raises:
        RunError: The precision is not supported here, the tracker is unknown, or parameters would be sharded.
    """
    on_cpu = not torch.accelerator.is_available()
    asked = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    emulated = on_cpu and asked == "bf16" and is_emulated(torch.bfloat16)
    with wrap_errors(f"--mixed-precision {mixed_precision} or --report-to {report_to}", RunError):
        accelerator = Accelerator(
            cpu=on_cpu,  # otherwise processes without a GPU would not connect
            mixed_precision="no" if emulated else mixed_precision,
            gradient_accumulation_steps=grad_accum,
            log_with=None if report_to == "none" else report_to,
            dataloader_config=DataLoaderConfiguration(even_batches=False),  # so that no test image counts twice
        )
    if accelerator.distributed_type in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        kind = accelerator.distributed_type.value
        raise RunError(f"{kind} shards parameters, but train.py saves whole models: launch with --multi_gpu")
    if accelerator.mixed_precision != "no" and not accelerator.native_amp:  # Accelerate would train in float32
        asked, kind = accelerator.mixed_precision, accelerator.device.type
        raise RunError(f"--mixed-precision {asked} is not supported on a {kind}: use bf16 or no")
    if emulated:
        factor = f"products take {cpu_slowdown(torch.bfloat16):.0f} times as long as in float32"
        accelerator.print(f"this CPU has no bfloat16 instructions ({factor}): training in float32 instead of bf16")
    return accelerator


@contextlib.contextmanager
def started(args: argparse.Namespace) -> Iterator[Accelerator]:
    """Create the accelerator and claim the output folder as long as the `with` block lasts; set `args.output` to it.

    Without --output, it is a new folder, runs/NAME, runs/NAME-2, ...

    Raises:
        RunError: The folder is in use, or an error of `make_accelerator`; raised in every process.
        HubError: Another run writes into the folder; raised in every process.
    """
    how = {"mixed_precision": args.mixed_precision, "grad_accum": args.grad_accum, "report_to": args.report_to}
    accelerator = make_accelerator(**how)
    with contextlib.ExitStack() as stack:
        answer: list[Any] = [None]
        if accelerator.is_main_process:  # only it: the others would find the folder taken
            try:
                answer = [stack.enter_context(_claimed(args))]
            except (RunError, HubError) as error:
                answer = [error]
        broadcast_object_list(answer)
        if isinstance(answer[0], Exception):
            raise answer[0]
        args.output = str(answer[0])
        accelerator.project_configuration.set_directories(args.output)
        yield accelerator


@contextlib.contextmanager
def _claimed(args: argparse.Namespace) -> Iterator[Path]:
    output, new = Path(args.output or default_output(args)), args.output is None and not args.resume
    remedy = f"choose another folder, --resume {output} or --overwrite"
    if output.exists() and not output.is_dir() and not new:
        raise RunError(f"--output {output} is in use: {remedy}")
    with claimed(output, new=new) as folder:
        used = any(name != RUNNING for name in os.listdir(folder))
        if used and not args.overwrite and not (args.resume and (folder / "recipe.yaml").is_file()):
            raise RunError(f"--output {folder} is in use: {remedy}")
        yield folder


def stopped(folder: Path, signals: list[int]) -> Stopped:
    """Return the exception for a run stopped by signals: exit code 130 for SIGINT, 0 for a scheduler's SIGTERM."""
    code = 130 if signal.SIGINT in signals else 0
    return Stopped(f"stopped and saved; resume with: python train.py --resume {folder}", code=code)


def watch_signals() -> list[int]:
    """Append SIGINT (Ctrl-C) and SIGTERM to the returned list, so that a run can finish its update and save.

    A second Ctrl-C raises KeyboardInterrupt at once, except in the first second: a launcher forwards to its processes
    the signal that they have already received from the terminal.
    """
    seen: list[int] = []
    first = 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal first
        if not seen:
            first = time.monotonic()
            print("\nstopping after this update; press Ctrl-C again to stop at once", flush=True)
        elif number == signal.SIGINT and time.monotonic() - first > 1:
            raise KeyboardInterrupt
        seen.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return seen


def start_folder(folder: Path, options: dict[str, Any]) -> None:
    """Create the folder of a new run, delete the files of an old run in it, and write the recipe."""
    for path in (folder / name for name in OUTPUTS):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "recipe.yaml", yaml.safe_dump(options, sort_keys=False, allow_unicode=True))


def save_picture(explanation: Any, path: Path, *, weights: str, label_names: Sequence[str], true_labels: Any) -> bool:
    """Save a figure of an explanation, with the fingerprint of the model's weights.

    Return False if writing fails, so that a full disk does not stop training.
    """
    try:
        figure = explanation.plot(label_names=label_names, true_labels=true_labels)
        save_figure(figure, path, text={PICTURE_KEY: weights})
    except OSError as error:
        tqdm.write(f"could not write the figure {path}: {error}")
        return False
    return True


def progress_bar(batches: Iterable[Any], name: str, *, total: int, initial: int, shown: bool) -> tqdm:
    """Wrap an epoch's batches in a progress bar, which is drawn only if `shown` and only in a terminal."""
    look = {"ncols": 80, "bar_format": "{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}, {remaining} left"}
    look |= {"leave": False, "file": sys.stdout, "disable": not (shown and sys.stdout.isatty())}
    return tqdm(batches, name, total, initial=initial, **look)


def compiled(model: nn.Module, device: torch.device) -> Any:
    """Return `torch.compile(model)`.

    Raises:
        RunError: Nothing can be compiled for the device, for example because there is no C++ compiler.
    """
    with wrap_errors("--compile", RunError):
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    return torch.compile(model)


def tested(progress: Progress, loss: float, accuracy: float, *, held_out: int) -> dict[str, Any]:
    """Return the summary's entries of a run whose best epoch was chosen on `held_out` training images."""
    chosen = {name: progress.best[name] for name in ("loss", "accuracy")}
    return {"loss": loss, "accuracy": accuracy, "validation": {**chosen, "images": held_out}}


def save_summary(folder: Path, progress: Progress, facts: dict[str, Any]) -> None:
    """Write `summary.json`: metrics of the best epoch, facts about the run, its history, and skipped images."""
    summary = {"command": shlex.join(sys.argv), **progress.best, "seconds": progress.seconds, **facts}
    summary["hub_data_set"] = _hub_data_set(facts["options"]["data"])
    how = ("dataset", "history", "curve", "skipped", "skipped_updates")
    summary |= {name: value for name, value in asdict(progress).items() if name in how}
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")


def closing_words(folder: Path, progress: Progress, facts: dict[str, Any], *, pictures: bool) -> str:
    """Return the last message of a run: accuracy, time, path of the figure, code that loads the model.

    Args:
        folder, progress: the run's
        facts: those of `tested`, if there are any
        pictures: whether there is a figure
    """
    best, note = progress.best, f"; {len(progress.skipped)} images could not be read" if progress.skipped else ""
    note += f"; {progress.skipped_updates} updates were skipped" if progress.skipped_updates else ""
    accuracy = f"{best['accuracy']:.4f}"
    if "validation" in facts:
        accuracy = f"{facts['accuracy']:.4f} of the test images, {accuracy} of those held out,"
    return (
        f"\naccuracy {accuracy} in epoch {best['epoch']}, {progress.seconds:.0f} s in total{note}\n"
        + (f"explanations: {folder / 'explanation.png'}\n" if pictures else "")
        + f'\nimport timm, timm_coda\nmodel = timm.create_model("local-dir:{folder}", pretrained=True).eval()'
    )


def publish(folder: Path, repo_id: str | None) -> None:
    """Upload a finished run to the Hub if `repo_id` is given, and print its URL.

    Raises:
        HubError: The upload failed; the message gives a command that retries it.
    """
    if repo_id:
        failure = f"the model was saved in {folder}, but not uploaded; retry with: timm-coda push {folder} {repo_id}"
        with wrap_errors(failure, HubError):
            print(f"published: {push_folder(folder, repo_id).commit_url}")


def no_pictures(model: Any) -> str:
    """Return the reason why explanations of a model cannot be drawn; empty if they can."""
    if not hasattr(model, "explain"):
        return f"{type(model).__name__} cannot explain itself: no figures (choose a model of timm_coda)"
    missing = importlib.util.find_spec("matplotlib") is None
    return "no figures, because matplotlib is missing: pip install timm_coda[viz]" if missing else ""


def _hub_data_set(sources: list[str]) -> str | None:
    """Return the id of a dataset from the Hugging Face Hub; None for other sources."""
    here = sources == ["digits"] or any(os.path.exists(source) or glob.glob(source) for source in sources)
    return None if here or len(sources) > 1 else sources[0]
