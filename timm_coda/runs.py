"""The bookkeeping of training runs: options and recipes, signals, folders, facts."""

import argparse
import contextlib
import difflib
import glob
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DataLoaderConfiguration
from tqdm import tqdm

from .hub import HubError, SaveError, blame, push_folder
from .states import Progress, RunError

# What train.py writes into a run's folder; --overwrite removes these and nothing else.
OUTPUTS = ("checkpoints", "best", "explanations", "summary.json", "explanation.png", "config.json", "model.safetensors")
# They belong to a command, not to the run it starts.
COMMAND_OPTIONS = {"config", "output", "overwrite", "resume", "push_to_hub"}


class Stopped(Exception):
    """There is nothing to do, or someone asked the run to stop and its state is saved; the message says which."""

    def __init__(self, message: str, *, code: int):
        super().__init__(message)
        self.code = code  # exit code


def make_accelerator(folder: Path, *, mixed_precision: str | None, grad_accum: int, report_to: str) -> Accelerator:
    """Accelerate's view of the machine: device, processes, precision.

    Raises:
        RunError: The precision is not the machine's, there is no such tracker, or parameters are to be divided.
    """
    with blame(f"--mixed-precision {mixed_precision} or --report-to {report_to}", RunError):
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else several processes without a GPU would not find each other
            mixed_precision=mixed_precision,
            gradient_accumulation_steps=grad_accum,
            log_with=None if report_to == "none" else report_to,
            project_dir=folder,
            dataloader_config=DataLoaderConfiguration(even_batches=False),  # so that no test image counts twice
        )
    if accelerator.distributed_type in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        kind = accelerator.distributed_type.value
        raise RunError(f"{kind} divides the parameters, and train.py saves whole models: launch with --multi_gpu")
    return accelerator


def stopped(folder: Path, signals: list[int]) -> Stopped:
    """That a run was stopped by these signals, of which SIGTERM is no failure: a scheduler wants its machine back."""
    code = 130 if signal.SIGINT in signals else 0
    return Stopped(f"stopped and saved; resume with: python train.py --resume {folder}", code=code)


def watch_signals() -> list[int]:
    """Let SIGINT (Ctrl-C) and SIGTERM add to the list that is returned, so that a run can finish its update and save.

    A second Ctrl-C interrupts at once. Within a second it does not count: a launcher passes on to its processes what
    the terminal has sent them already.
    """
    seen: list[int] = []
    first = 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal first
        if not seen:
            first = time.monotonic()
            print("\nstopping after this update; Ctrl-C again to stop at once", flush=True)
        elif number == signal.SIGINT and time.monotonic() - first > 1:
            raise KeyboardInterrupt
        seen.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
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


def save_picture(explanation: Any, path: Path, *, label_names: Sequence[str], true_labels: Any) -> bool:
    """Save an explanation's picture. False if it cannot be written: a full disk may have room again for what counts."""
    try:
        explanation.save(path, label_names=label_names, true_labels=true_labels)
    except OSError as error:
        tqdm.write(f"there is no picture {path}: {error}")
        return False
    return True


def progress_bar(batches: Iterable[Any], name: str, *, total: int, initial: int, shown: bool) -> tqdm:
    """A bar for an epoch's batches, where someone watches."""
    look = {"ncols": 80, "bar_format": "{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}, {remaining} left"}
    look |= {"leave": False, "file": sys.stdout, "disable": not (shown and sys.stdout.isatty())}
    return tqdm(batches, name, total, initial=initial, **look)


def save_summary(folder: Path, progress: Progress, facts: dict[str, Any]) -> None:
    """Write `summary.json`: the best epoch's numbers, facts about the run and where it ran, and how it went."""
    summary = {"command": shlex.join(sys.argv), **progress.best, "seconds": progress.seconds, **facts}
    summary["hub_data_set"] = _hub_data_set(facts["options"]["data"])
    how = ("history", "curve", "skipped", "skipped_updates")
    summary |= {name: value for name, value in asdict(progress).items() if name in how}
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")


def closing_words(folder: Path, progress: Progress, *, pictures: bool) -> str:
    """What a finished run says: how good, how long, where the pictures are, how to load the model."""
    best, note = progress.best, f"; {len(progress.skipped)} images could not be read" if progress.skipped else ""
    note += f"; {progress.skipped_updates} updates were skipped" if progress.skipped_updates else ""
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


def no_pictures(model: Any) -> str:
    """Why no explanation of a model can be drawn; empty if one can."""
    if not hasattr(model, "explain"):
        return f"{type(model).__name__} cannot explain itself, unlike the models of timm_coda: no pictures"
    missing = importlib.util.find_spec("matplotlib") is None
    return "no pictures, for want of matplotlib: pip install timm_coda[viz]" if missing else ""


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
