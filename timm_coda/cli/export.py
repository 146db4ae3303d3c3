"""`timm-coda export`: a model as one file for a service."""

import argparse
from pathlib import Path
from typing import Any

from ._command import new_command

_DESCRIPTION = """\
A model as one file for a service that has neither this package nor autograd,
checked against the model on random images before the command ends.

  timm-coda export local-dir:runs/coda_net_xs.digits --output digits.onnx --explain
  timm-coda export hf-hub:org/name --output model.pt2 --explain
  timm-coda export coda_net_s --no-pretrained --output untrained.onnx

The file takes any number of images of one size, in float32:

  image          (batch, 3, height, width), colours in [0, 1]: resize and divide
                 by 255, no mean and std
  target         (batch,) int64, with --explain: the class to explain, -1 for the
                 prediction; what is no class gives NaN
  logits         (batch, classes)
  contributions  (batch, height, width), with --explain: the share of each
                 position in the target's logit; they sum to it, less the bias
  weights        (batch, 6, height, width), with --explain: the dynamic linear
                 map, for (colours, 1 - colours)

The file says itself what its classes are called, how images are resized, what
the bias is and under which license it is: metadata of ONNX, or the extra file
metadata.json of a .pt2. ONNX is in opset 18; ask ONNX Runtime only for outputs
you use. A .pt2 is for torch.export.load(FILE).module()(image, target).
"""


def add(subcommands: Any) -> None:
    parser = new_command(
        subcommands, "export", "a model, with its explanation, as one ONNX or torch.export file", _DESCRIPTION, _run
    )
    add = parser.add_argument
    add("model", help="a name in timm's registry, a folder, or hf-hub:ID")
    add("--output", type=Path, metavar="FILE", required=True, help="ends in .onnx or .pt2 (replaced if it is there)")
    add("--format", choices=["onnx", "torch"], help="(default: what the ending of --output says)")
    add("--explain", action="store_true", help="with the explanation")
    add("--img-size", type=int, metavar="N", help="pixels a side (default: the model's)")
    hint = "its weights (default: load them); --no-pretrained: random ones, to try a service"
    add("--pretrained", action=argparse.BooleanOptionalAction, default=True, help=hint)


def _run(args: argparse.Namespace) -> int:
    from .. import export, hub

    if args.format and args.output.suffix != export.FORMATS[args.format]:
        raise ValueError(
            f"--format {args.format}: name --output {args.output.with_suffix(export.FORMATS[args.format])}"
        )
    model = hub.load_model(args.model, pretrained=args.pretrained)
    try:
        export.export_model(model, args.output, explain=args.explain, img_size=args.img_size)
        found = export.largest_differences(args.output, model)
    except ImportError as error:
        raise ValueError(error) from error
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
    for name, difference in found.items():
        print(f"{name:14} largest relative difference to the model on random images {difference:.1e}")
    if max(found.values()) >= 1e-4:  # float32 rounds by about 1e-6, and by 1e-5 in deep networks of large images
        raise ValueError(f"{args.output} differs from the model by 1e-4 or more: do not use it")
    return 0
