"""`timm-coda export`: export a model to one file for a service."""

import argparse
from pathlib import Path
from typing import Any

from ._command import new_command

_DESCRIPTION = """\
Export a model to one file for a service that has neither this package nor
autograd. The file is compared with the model on random images.

  timm-coda export local-dir:runs/coda_net_xs.digits --output digits.onnx \\
      --explain
  timm-coda export hf-hub:org/name --output model.pt2 --explain
  timm-coda export coda_net_s --no-pretrained --output untrained.onnx

Inputs and outputs, for any number of images of one size, in float32:

  image          (batch, 3, height, width), colours in [0, 1]: resize and divide
                 by 255, do not subtract a mean or divide by a std
  target         (batch,) int64, with --explain: class to explain, or -1 for the
                 prediction; a target that is not a class gives NaN
  logits         (batch, classes)
  contributions  (batch, height, width), with --explain: contribution of each
                 position to the target's logit; their sum is logit - bias
  weights        (batch, 6, height, width), with --explain: the dynamic linear
                 map, for (colours, 1 - colours)

The file has metadata: class names, resizing of images, bias and license, in the
ONNX metadata or in the extra file metadata.json of a .pt2. ONNX files use opset
18; request only the outputs that you use from ONNX Runtime. Run a .pt2 file by
torch.export.load(FILE).module()(image, target).
"""


def add(subcommands: Any) -> None:
    parser = new_command(
        subcommands, "export", "export a model with its explanation to ONNX or torch.export", _DESCRIPTION, _run
    )
    add = parser.add_argument
    add("model", help="name in timm's registry, folder, or hf-hub:ID")
    add(
        "--output", type=Path, metavar="FILE", required=True, help=".onnx or .pt2 file to write (replaced if it exists)"
    )
    add("--format", choices=["onnx", "torch"], help="file format (default: by the suffix of --output)")
    add("--explain", action="store_true", help="include the explanation")
    add("--img-size", type=int, metavar="N", help="pixels per side of images (default: the model's)")
    hint = "load pretrained weights (default), or use random ones, to test a service"
    add("--pretrained", action=argparse.BooleanOptionalAction, default=True, help=hint)


def _run(args: argparse.Namespace) -> int:
    from .. import export, hub

    if args.format and args.output.suffix != export.FORMATS[args.format]:
        raise ValueError(f"--format {args.format}: use --output {args.output.with_suffix(export.FORMATS[args.format])}")
    model = hub.load_model(args.model, pretrained=args.pretrained)
    export.export_model(model, args.output, explain=args.explain, img_size=args.img_size)
    found = export.largest_differences(args.output, model)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
    for name, difference in found.items():
        print(f"{name:14} largest relative difference to the model on random images {difference:.1e}")
    if max(found.values()) >= 1e-4:  # rounding of float32 is about 1e-6, and 1e-5 in deep networks with large images
        raise ValueError(f"{args.output} differs from the model by 1e-4 or more: do not use it")
    return 0
