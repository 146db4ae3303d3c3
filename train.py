"""Train an image classifier that explains itself.

    python train.py                                      # handwritten digits, on a laptop in two minutes, offline
    python train.py --data uoft-cs/cifar10               # CoDA-Net S with the paper's settings: wants a GPU
    python train.py --data path/to/images --model coda_net_xs --img-size 64 --epochs 50       # train/cat/1.png, ...
    python train.py --config recipe.yaml --lr 1e-3       # a recipe, with one thing changed
    python train.py --resume runs/my-run                 # go on exactly where a run was stopped or killed
    accelerate launch --num_processes 2 train.py         # with any of these options

The output folder is a model: after `import timm_coda`, timm.create_model("local-dir:FOLDER", pretrained=True) is the
network of the best epoch. Beside it are explanation.png, summary.json (options, versions, each epoch's numbers, images
that could not be read), recipe.yaml (for --config) and checkpoints/ (for --resume).
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import PIL.Image
import timm
import torch
import yaml
from accelerate.utils import gather_object, set_seed
from timm.data import Mixup, resolve_input_data_config
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader
from tqdm import tqdm

import timm_coda
from timm_coda import data, hub

DEFAULT_RECIPE = Path(__file__).parent / "hub_configs/coda_net_xs.digits/recipe.yaml"
RUN_ONLY = {"config", "output", "overwrite", "resume"}  # options of a command, not of the run it starts
FREE_ON_RESUME = {"workers", "save_every", "explain_every", "explain_images", "report_to"}  # they change no weight


class RunError(ValueError):
    """Options that do not go together or with what they name; the message says how to mend it."""


def make_parser() -> argparse.ArgumentParser:
    """The options. Defaults are the paper's settings for CIFAR-10 (CVPR 2021) where the help gives no other reason."""

    class Format(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    parser = argparse.ArgumentParser("train.py", description=__doc__, formatter_class=Format, allow_abbrev=False)
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("run").add_argument
    add("--config", help="YAML file of options; the command line wins. Default with no --data or --model: the digits")
    add("--output", help="output folder (default: a fresh one, runs/NAME, runs/NAME-2, ...)")
    add("--overwrite", action=switch, default=False, help="replace the run that is in the output folder")
    add("--resume", nargs="?", const="auto", help="folder of a run to go on with; auto: --output's, if there is one")
    add("--seed", type=int, default=0, help="the same seed gives the same weights, whatever the number of workers")
    add("--mixed-precision", choices=["no", "bf16", "fp16"], help="(default: what accelerate launch says, else no)")
    add("--save-every", type=int, default=0, help="updates between training states; one is saved each epoch anyway")
    add("--log-every", type=int, default=10, help="updates between points of the loss curve")
    add("--explain-every", type=int, default=5, help="epochs between explanation pictures; 0: only one at the end")
    add("--explain-images", type=int, default=8, help="test images in such a picture; 8 fit a page")
    add("--report-to", default="none", help="a tracker of Accelerate's: tensorboard, wandb, ...; none: files do")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=["digits"], help="digits, a Hub id, parquet files, a folder of these or of images")
    add("--subset", help="configuration of a Hub data set that has several")
    add("--train-split", help="(default: train)")
    add("--test-split", help="(default: validation, or test, whichever there is: Hub tests often have no labels)")
    add("--val-fraction", type=float, default=0.1, help="share to hold out for tests where there is no such split")
    add("--image-column", help="(default: the only one with images)")
    add("--label-column", help="(default: the only one with classes, or the one named label)")
    add("--num-classes", type=int, help="(default: the data set's)")
    add("--workers", type=int, default=2, help="processes that decode images meanwhile; 0 is best for tiny images")
    add = parser.add_argument_group("images").add_argument
    add("--img-size", type=int, help="height and width in pixels (default: the model's)")
    add("--interpolation", help="nearest, bilinear or bicubic (default: the model's)")
    add("--crop-pct", type=float, help="share of its width that a test image keeps (default: the model's)")
    add("--crop-padding", type=int, default=4, help="shift training images by up to so many pixels")
    add("--scale", type=float, nargs=2, default=[1.0, 1.0], help="area of a random crop; the paper crops by padding")
    add("--ratio", type=float, nargs=2, default=[1.0, 1.0], help="aspect ratio of a random crop; 1 1: as it is")
    add("--hflip", type=float, default=0.5, help="probability of a left-right flip; 0 for letters and digits")
    add("--vflip", type=float, default=0.0, help="probability of an upside-down flip; photographs have an up")
    add("--color-jitter", type=float, default=0.0, help="strength of changed colours; the paper has none")
    add("--auto-augment", help="timm's policy, such as rand-m10-n2, the paper's for ImageNet (default: none)")
    add("--erase", type=float, default=0.0, help="probability of a black rectangle; the paper has none")
    add("--mixup", type=float, default=0.0, help="alpha; 0: off, for a mixed image has no one class to explain")
    add("--cutmix", type=float, default=0.0, help="alpha; 0: off, likewise")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="coda_net_s", help="a name in timm's registry, local-dir:FOLDER or hf-hub:ID")
    add("--model-args", nargs="+", action="extend", default=[], metavar="NAME=JSON", help="as logit_temperature=100")
    add("--pretrained", action=switch, default=False, help="start from the model's published weights")
    add("--ema", type=float, default=0.0, help="decay of averaged weights, which are then tested and saved; 0: none")
    add = parser.add_argument_group("learning").add_argument
    add("--epochs", type=int, default=200, help="times that each training image is seen")
    add("--batch-size", type=int, default=16, help="images in a step of a process; a GPU wants more, and a higher --lr")
    add("--grad-accum", type=int, default=1, help="steps in an update: a larger batch with the same memory")
    add("--loss", choices=["bce", "ce"], default="bce", help="bce: a yes or no for each class on its own")
    add("--smoothing", type=float, default=0.0, help="of labels; 0 lets evidence grow without limit")
    add("--opt", default="adam", help="an optimiser of timm's")
    add("--lr", type=float, default=2.5e-4, help="highest learning rate; for batches of 16")
    add("--weight-decay", type=float, default=0.0, help="dynamic weights are bounded without it")
    schedules = ["cosine", "step", "poly", "tanh", "wsd", "constant", "none"]
    add("--sched", choices=schedules, default="step", help="learning rate schedule of timm's, stepped each update")
    add("--decay-epochs", type=float, default=30, help="epochs between two decays; step only")
    add("--decay-rate", type=float, default=0.667, help="factor of a decay; step only")
    add("--warmup-epochs", type=float, default=0.0, help="of linear warm-up; small batches need none")
    add("--min-lr", type=float, default=0.0, help="learning rate at the end; not for step")
    add("--clip-grad", type=float, default=0.0, help="largest norm of the gradient; 0: none")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the options: defaults, then the recipe, then the command line. Settles `output`."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        raise RunError("--resume goes on with a run and --overwrite replaces it: give one of them")
    if args.resume not in (None, "auto"):
        args.output, args.config = args.resume, str(Path(args.resume) / "recipe.yaml")
        if not Path(args.config).is_file():
            raise RunError(f"--resume {args.resume}: no run is there, it would have a recipe.yaml")
    elif not args.config and not {word.split("=")[0] for word in argv} & {"--data", "--model"}:
        args.config = str(DEFAULT_RECIPE)
    config, output, resume = args.config, args.output, args.resume
    if config:
        known = sorted(name.replace("_", "-") for name in vars(args).keys() - RUN_ONLY)
        args = parser.parse_args(hub.read_recipe(config, known) + argv)
    for name, least in (("epochs", 1), ("batch_size", 1), ("grad_accum", 1), ("log_every", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise RunError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    if output is None:
        name = Path(config).resolve().parent.name if config else re.sub(r"\W", "_", args.model)
        output = hub.free_folder(Path("runs") / name)
    elif not resume and not args.overwrite and os.path.exists(output) and (os.path.isfile(output) or os.listdir(output)):
        raise RunError(f"--output {output} is taken: give another, --resume {output} to go on with it, or --overwrite")
    args.config, args.output, args.resume = config, str(output), resume
    return args


@torch.no_grad()
def evaluate(accelerator: accelerate.Accelerator, model: torch.nn.Module, loader: Any, loss_function: Callable):
    """Mean loss and accuracy over the images that can be read, and the others with the reason."""
    totals, skipped = torch.zeros(3, device=accelerator.device), {}
    model.eval()
    for images, labels, unread in loader:
        skipped.update(unread)
        if len(labels):
            with accelerator.autocast():
                logits = model(images).float()
            count, correct = labels.new_tensor(len(labels)), (logits.argmax(1) == labels).sum()
            totals += torch.stack([loss_function(logits, labels) * count, correct, count])
    loss, correct, count = accelerator.reduce(totals).tolist()  # type: ignore[union-attr]
    return loss / max(count, 1), correct / max(count, 1), skipped


def check_images(model: torch.nn.Module, images: torch.Tensor, num_classes: int) -> None:
    """See that the model takes the images, before anything is written."""
    if len(images) == 0:
        raise RunError("--data: none of the test images can be read")
    low, high = images.min().item(), images.max().item()
    if hasattr(model, "explain") and (low < -0.001 or high > 1.001):
        raise RunError(f"images reach from {low:.2f} to {high:.2f}, but {type(model).__name__} wants [0, 1]: are they "
                       "normalised? mean and std in the config of --model must be 0 and 1")  # fmt: skip
    with hub.blame(f"--model does not take images of shape {tuple(images.shape[1:])}"), torch.no_grad():
        shape = tuple(model.eval()(images).shape)
    if shape != (len(images), num_classes):
        raise RunError(f"--model gives an output of shape {shape}, not {(len(images), num_classes)}")


def train(args: argparse.Namespace, stop: list[int]) -> int:
    """One run, from top to bottom, or until a signal is in `stop`. Returns the exit code."""
    output, options = Path(args.output), {name: value for name, value in vars(args).items() if name not in RUN_ONLY}
    if args.resume and (output / "summary.json").exists():
        print(f"{output} is finished: there is nothing to go on with")
        return 0

    def select(names: str) -> dict[str, Any]:
        return {name: options[name] for name in names.split()}

    with hub.blame(f"--mixed-precision {args.mixed_precision} or --report-to {args.report_to}"):
        accelerator = accelerate.Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.grad_accum,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=output,
            dataloader_config=accelerate.DataLoaderConfiguration(even_batches=False),  # no test image counts twice
        )
    if args.report_to != "none" and not accelerator.log_with:
        raise RunError(f"--report-to {args.report_to}: its package is not installed")
    main, say, processes = accelerator.is_main_process, accelerator.print, accelerator.num_processes
    set_seed(args.seed)

    # Data and model
    names = "subset image_column label_column train_split test_split val_fraction num_classes"
    source = data.load_data(args.data[0] if len(args.data) == 1 else args.data, **select(names))
    classes = source.label_names
    network = hub.create_model(args.model, num_classes=len(classes), **select("pretrained model_args"))
    with hub.blame("--img-size, --interpolation, --crop-pct or the random changes of images"):
        config = resolve_input_data_config(network, select("img_size interpolation crop_pct"))
        names = "crop_padding scale ratio hflip vflip color_jitter auto_augment erase"
        transform, test_transform = data.create_transforms(config, **select(names))
    train_set = data.ImageDataset(source.train, transform, seed=args.seed)
    test_set = data.ImageDataset(source.test, test_transform)
    examples = test_set.examples(max(args.explain_images, 1))
    check_images(network, examples.images, len(classes))
    sampler = data.EpochSampler(len(train_set), seed=args.seed)
    loader = data.create_loader(train_set, sampler=sampler, **select("batch_size workers"))
    test_loader = data.create_loader(test_set, **select("batch_size workers"))

    # Learning
    batches = len(train_set) // (args.batch_size * processes)
    if batches == 0:
        raise RunError(f"--batch-size {args.batch_size} in {processes} processes: there are {len(train_set)} images")
    with hub.blame("--opt, --lr, --sched or a number that belongs to them"):
        optimizer = create_optimizer_v2(network, **select("opt lr weight_decay"))
        schedule = select("sched decay_epochs decay_rate warmup_epochs min_lr")
        schedule |= {"num_epochs": args.epochs, "updates_per_epoch": math.ceil(batches / args.grad_accum)}
        scheduler, _ = create_scheduler_v2(optimizer, step_on_epochs=False, **schedule)
    mixes = {"mixup_alpha": args.mixup, "cutmix_alpha": args.cutmix, "label_smoothing": args.smoothing}
    mixup = Mixup(**mixes, num_classes=len(classes)) if args.mixup or args.cutmix else None
    smoothing = 0.0 if mixup else args.smoothing  # mixed labels are smooth already
    bce = args.loss == "bce"
    loss_function = BinaryCrossEntropy(smoothing) if bce else torch.nn.CrossEntropyLoss(label_smoothing=smoothing)
    test_loss = BinaryCrossEntropy(0.0) if bce else torch.nn.CrossEntropyLoss()
    network.to(accelerator.device)
    ema = ModelEmaV3(network, args.ema, use_warmup=True) if args.ema else None
    model, optimizer, loader, test_loader = accelerator.prepare(network, optimizer, loader, test_loader)
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    published = network if ema is None else ema.module

    # How far the run has come: with the states of model and optimiser, all it takes to go on exactly
    progress = {"epoch": 0, "batch": 0, "update": 0, "seconds": 0.0, "best": None, "history": [], "curve": [], "skipped": {}}
    progress |= {"window": [0.0] * 3, "totals": [0.0] * 4}  # loss, correct, images (, seconds): since the last point of the curve, in this epoch
    states = hub.find_states(output / "checkpoints") if args.resume else []
    if states:
        record = json.loads((states[-1] / "record.json").read_text())
        now = options | {"processes": processes}
        changed = [f"{name} was {value}, is {now.get(name)}" for name, value in record["options"].items() if name not in FREE_ON_RESUME and now.get(name) != value]
        if changed:
            raise RunError(f"--resume {output} goes on with the same options: {'; '.join(changed)}")
        with hub.blame(f"--resume: {states[-1]} cannot be read"):
            accelerator.load_state(str(states[-1]))
        progress = record["progress"]
        say(f"going on with {output} after update {progress['update']}")
