"""Train an image classifier that explains itself.

    python train.py                                      # handwritten digits, two minutes on a laptop, offline
    python train.py --data uoft-cs/cifar10               # CoDA-Net S with the paper's settings; needs a GPU
    python train.py --data path/to/images --model coda_net_xs --img-size 64 --epochs 50     # train/cat/1.png ...
    python train.py --config recipe.yaml --lr 1e-3       # a recipe, with one thing changed
    python train.py --resume runs/my-run                 # go on exactly where a run was stopped or killed
    accelerate launch --num_processes 2 train.py ...     # several processes; mixed precision with --mixed-precision

The output folder is a model: timm.create_model("local-dir:FOLDER", pretrained=True), after `import timm_coda`, loads
the weights of the best epoch. Beside them are summary.json (options, versions, every epoch's numbers, images that could
not be read), explanation.png, recipe.yaml (for --config), and the training state in checkpoints/.
"""

import argparse
import contextlib
import difflib
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import accelerate
import datasets
import numpy as np
import PIL.Image
import timm
import torch
import yaml
from accelerate.utils import DataLoaderConfiguration, gather_object, set_seed
from safetensors import SafetensorError
from timm.data import Mixup, resolve_input_data_config
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader
from tqdm import tqdm

import timm_coda
from timm_coda import data as tcdata
from timm_coda import hub

DEFAULT_RECIPE = Path(__file__).parent / "hub_configs/coda_net_xs.digits/recipe.yaml"
# What a resumed run may do otherwise than the run it continues: nothing of this changes the weights.
FREE_ON_RESUME = {"workers", "save_every", "explain_every", "explain_images", "report_to", "resume", "output", "config"}
FREE_ON_RESUME |= {"overwrite"}


class RunError(Exception):
    """Something a person can mend: printed without a traceback. `code` is the exit code, 2 for wrong input."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def make_parser() -> argparse.ArgumentParser:
    class Format(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    parser = argparse.ArgumentParser("train.py", description=__doc__, formatter_class=Format, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction
    # The defaults are the paper's settings for CIFAR-10 (CVPR 2021), where the help does not give another reason.
    add = parser.add_argument_group("run").add_argument
    add("--config", help="YAML file of these options, without the dashes; the command line wins. With neither --config "
        "nor --data nor --model: hub_configs/coda_net_xs.digits/recipe.yaml")  # fmt: skip
    add("--output", help="output folder; by default a fresh one, runs/NAME, runs/NAME-2, ...")
    add("--overwrite", action=flag, default=False, help="replace the run that is in the output folder")
    add("--resume", nargs="?", const="auto", help="FOLDER of the run to go on with, or auto: the output folder's, if any")
    add("--seed", type=int, default=0, help="with the same seed, the same command gives the same weights")
    add("--mixed-precision", choices=["no", "bf16", "fp16"], help="default: what accelerate launch says, or no")
    add("--save-every", type=int, default=0, help="updates between training states; 0: one at the end of each epoch")
    add("--explain-every", type=int, default=5, help="epochs between explanation pictures; 0: only one at the end")
    add("--explain-images", type=int, default=8, help="how many test images to explain: fits a page")
    add("--report-to", default="none", help="tensorboard, wandb, ...: any tracker of Accelerate's; none: only files")
    add("--log-every", type=int, default=10, help="updates between points of the loss curve")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=["digits"], help="digits; or a Hub data set's id; or parquet files, a pattern or "
        "folder of them; or a folder of images, train/CLASS/*.png")  # fmt: skip
    add("--subset", help="configuration of a Hub data set, where it has several")
    add("--train-split", help="default: the split named train")
    add("--test-split", help="default: validation, or test, where there is one")
    add("--val-fraction", type=float, default=0.1, help="held out from training if there is no split to test on")
    add("--image-column", help="default: the only column of images")
    add("--label-column", help="default: the only column of classes, or the one named label")
    add("--num-classes", type=int, help="default: as many as the data set has")
    add("--workers", type=int, default=2, help="processes that decode images while the model learns; changes no result")
    add = parser.add_argument_group("images").add_argument
    add("--img-size", type=int, help="default: the model's")
    add("--interpolation", help="bicubic, bilinear or nearest; default: the model's")
    add("--crop-pct", type=float, help="share of the image that a test crop shows; default: the model's")
    add("--crop-padding", type=int, default=4, help="shift training images by up to so many pixels")
    add("--scale", type=float, nargs=2, default=[1, 1], help="area of random training crops; 1 1: the whole image")
    add("--ratio", type=float, nargs=2, default=[1, 1], help="aspect ratio of random training crops; 1 1: none changed")
    add("--hflip", type=float, default=0.5, help="probability of a left-right flip")
    add("--vflip", type=float, default=0.0, help="probability of an upside-down flip: photographs have an up")
    add("--color-jitter", type=float, default=0.0, help="change of brightness, contrast, saturation; the paper has none")
    add("--auto-augment", help="timm's policy, such as rand-m10-n2 (the paper's for ImageNet); default: none")
    add("--erase", type=float, default=0.0, help="probability of a black rectangle; the paper has none")
    add("--mixup", type=float, default=0.0, help="mixup alpha; 0, off: mixed images have no one class to explain")
    add("--cutmix", type=float, default=0.0, help="cutmix alpha; 0, off: as mixup")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="coda_net_s", help="any model of timm's registry, or local-dir:FOLDER, hf-hub:ID")
    add("--model-args", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="arguments of the model's, "
        "such as logit_temperature=100 (JSON values)")  # fmt: skip
    add("--pretrained", action=flag, default=False, help="start from the model's published weights")
    add("--ema", type=float, default=0.0, help="decay of an average of the weights, such as 0.999; it is then what is "
        "tested and saved; 0: off")  # fmt: skip
    add = parser.add_argument_group("learning").add_argument
    add("--epochs", type=int, default=200, help="passes over the training images")
    add("--batch-size", type=int, default=16, help="images a process and step; larger ones need a larger --lr")
    add("--grad-accum", type=int, default=1, help="steps an update; multiplies the batch size without its memory")
    add("--loss", choices=["bce", "ce"], default="bce", help="bce: each class has its own yes or no, as the paper has it")
    add("--smoothing", type=float, default=0.0, help="label smoothing; 0: pushes logits, and so evidence, up")
    add("--opt", default="adam", help="any optimiser of timm's")
    add("--lr", type=float, default=2.5e-4, help="learning rate after warm-up, for the paper's batch of 16")
    add("--weight-decay", type=float, default=0.0, help="0: the dynamic weights are bounded as they are")
    add("--sched", choices=["step", "cosine", "poly", "tanh", "wsd", "constant", "none"], default="step",
        help="learning rate schedule of timm's, stepped by update")  # fmt: skip
    add("--decay-epochs", type=float, default=30, help="step: epochs between decays")
    add("--decay-rate", type=float, default=0.667, help="step: factor of a decay")
    add("--warmup-epochs", type=float, default=0, help="epochs of linear warm-up; small batches need none")
    add("--min-lr", type=float, default=0.0, help="where the schedule ends")
    add("--clip-grad", type=float, default=0.0, help="largest norm of the gradient; 0: no clipping")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Options from defaults, then the recipe (of the resumed run, or --config), then the command line."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        raise RunError("--resume goes on with a run, --overwrite replaces it: give one of them")
    if args.resume not in (None, "auto"):
        args.config, args.output = str(Path(args.resume) / "recipe.yaml"), args.resume
        if not Path(args.config).is_file():
            raise RunError(f"--resume {args.resume}: no run of train.py is there (it would have a recipe.yaml)")
    elif not args.config and not {option.split("=")[0] for option in argv} & {"--data", "--model"}:
        args.config = str(DEFAULT_RECIPE)
    config, output = args.config, args.output
    if config:
        try:
            recipe = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RunError(f"--config {config}: {error}") from error
        if not isinstance(recipe, dict):
            raise RunError(f"--config {config}: expected lines such as 'lr: 0.001', got {type(recipe).__name__}")
        known = {name.replace("_", "-") for name in vars(args)} - {"config", "resume", "output", "overwrite"}
        words = []
        for key, value in recipe.items():
            name = str(key).replace("_", "-")
            if name not in known:
                near = difflib.get_close_matches(name, known)
                hint = f": did you mean {' or '.join(near)}?" if near else ": see train.py --help"
                raise RunError(f"--config {config}: there is no option {key!r}{hint}")
            if isinstance(value, dict):
                words += [f"--{name}", *(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in value.items())]
            elif isinstance(value, bool):
                words += [f"--{name}" if value else f"--no-{name}"]
            elif value is not None and value != []:
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        args = parser.parse_args(words + argv)
    args.config, args.output = config, output
    for name in ("epochs", "batch_size", "grad_accum", "log_every"):
        if getattr(args, name) < 1:
            raise RunError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.seed < 0:
        raise RunError(f"--seed {args.seed}: must not be negative")
    return args


def choose_output(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """The output folder, and the training state in it to go on from, if any."""
    name = Path(args.config).resolve().parent.name if args.config else timm.models.safe_model_name(args.model)
    if args.output is None:
        series = (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
        *taken, fresh = itertools.chain(itertools.takewhile(Path.exists, series), [None])
        fresh = Path("runs") / (name if not taken else f"{name}-{len(taken) + 1}")
        output = taken[-1] if args.resume and taken and not (taken[-1] / "summary.json").exists() else fresh
    else:
        output = Path(args.output)
    states = sorted((output / "checkpoints").glob("epoch-*"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    if args.resume:
        if args.resume != "auto" and not states and not (output / "summary.json").exists():
            raise RunError(f"--resume {output}: the run there was stopped before it saved anything; use --overwrite")
        return output, states[-1] if states else None
    if output.exists() and not output.is_dir():
        raise RunError(f"--output {output}: a file of that name is in the way")
    if output.exists() and any(output.iterdir()) and not args.overwrite:
        raise RunError(f"--output {output}: there is something in it; choose another folder, --resume {output} to go on "
                       "with the run in it, or --overwrite to replace it")  # fmt: skip
    return output, None
