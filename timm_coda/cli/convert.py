"""`timm-coda convert`: convert a checkpoint to a folder in timm's format."""

import argparse
import os
from pathlib import Path
from typing import Any

from ._command import new_command

_DESCRIPTION = """\
Convert a checkpoint, the authors' or your own, to a folder in timm's format:
config.json and model.safetensors. Load the model with

  import timm, timm_coda
  timm.create_model("local-dir:FOLDER", pretrained=True)

Examples:

  timm-coda convert cifar.pt --model coda_net_s.mpi_t1000_cifar10 \\
      --output FOLDER
  timm-coda convert https://... --model coda_net_l.mpi_t100000_imagenet100 \\
      --output FOLDER
  timm-coda convert mine.pt --model coda_net_s --num-classes 3 \\
      --label-names cat dog eel --model-args rank=16 --output FOLDER
  timm-coda convert runs/mine/model.safetensors --model coda_net_xs --half \\
      --output mine.safetensors                       # weights only, half size

A checkpoint is a PyTorch or safetensors file of weights, bare or inside
{'state_dict': ...} or {'model': ...}, with or without 'module.' before keys.
Code in a file is never run: a pickle with anything but weights is rejected.
"""


def add(subcommands: Any) -> None:
    parser = new_command(
        subcommands,
        "convert",
        "convert a checkpoint to a folder in timm's format",
        _DESCRIPTION,
        _run,
    )
    add = parser.add_argument
    add("source", metavar="FILE_OR_URL", help="checkpoint file or its URL")
    hint = "name in timm's registry; the tag sets licence, class names and temperature: see timm.list_models('coda*', "
    add("--model", required=True, metavar="NAME", help=hint + "include_tags=True)")
    add(
        "--output",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="new or empty folder, or FILE.safetensors for weights only",
    )
    add("--num-classes", type=int, metavar="N", help="classes of the checkpoint (default: the tag's)")
    hint = "class names in the order of the logits, or a text file with one per line (default: the tag's)"
    add("--label-names", nargs="+", metavar="NAME", help=hint)
    add("--model-args", nargs="+", default=[], metavar="NAME=JSON", help="model arguments, such as rank=16")
    add("--half", action="store_true", help="save in half precision")
    hint = "replace the model in FOLDER (other files stay), or FILE.safetensors"
    add("--overwrite", action="store_true", help=hint)


def _run(args: argparse.Namespace) -> int:
    from ..hub import convert_checkpoint

    names = args.label_names
    if names and len(names) == 1 and os.path.isfile(names[0]):
        names = Path(names[0]).read_text(encoding="utf-8").split("\n")
        names = [name.strip() for name in names if name.strip()]
    model = convert_checkpoint(
        args.source,
        args.model,
        args.output,
        num_classes=args.num_classes,
        label_names=names,
        model_args=args.model_args,
        half=args.half,
        overwrite=args.overwrite,
    )
    weights = model.state_dict()
    config: Any = model.pretrained_cfg
    count = f"{len(weights)} tensors, {sum(value.numel() for value in weights.values()):,} parameters"
    print(f"{args.model}: {count}, {model.num_classes} classes; licence: {config.get('license', 'unknown')}")
    if "description" in config:
        print(config["description"].rstrip(".") + ".")
    if args.output.is_file():
        print(f"wrote {args.output}, {args.output.stat().st_size / 1e6:.1f} MB")
        return 0
    size = (args.output / "model.safetensors").stat().st_size / 1e6
    print(f"wrote config.json and model.safetensors, {size:.1f} MB, into {args.output}\n")
    print(f'import timm, timm_coda\nmodel = timm.create_model("local-dir:{args.output}", pretrained=True).eval()')
    return 0
