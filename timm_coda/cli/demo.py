"""`timm-coda demo`: the web page."""

import argparse
from pathlib import Path
from typing import Any

from ._command import new_command

_DESCRIPTION = """\
A web page that answers "why this class and not that one?": drop an image, see
what the model decides and, pixel by pixel, where that comes from.

  timm-coda demo                      # digits: the model ships with the package
  timm-coda demo --model bcos_resnet50.v2_in1k vit_tiny_patch16_bcos_224.v2_in1k
  timm-coda demo --model runs/my_model --examples photos
  timm-coda demo --model hf-hub:me/my-model --export space   # for the Hub

Only this machine sees the page, unless --host lets others in. Who sees it from
another machine can choose among the models named here, unless --any-model.
Uploads may have 10 MB and 25 million pixels.

--export writes a folder for Hugging Face Spaces: app.py, requirements.txt,
README.md, this package, and the models and examples that are folders here.
"""


def add(subcommands: Any) -> None:
    parser = new_command(
        subcommands, "demo", "a web page: choose an image, see why the model decides so", _DESCRIPTION, _run
    )
    add = parser.add_argument
    hint = "names in timm's registry, folders, or hf-hub:ID, to choose among (default: ours that have weights)"
    add("--model", nargs="+", default=[], metavar="NAME", help=hint)
    add("--examples", type=Path, metavar="DIR", help="a folder of example images (default: handwritten digits)")
    add("--host", help="address to listen at (default: 127.0.0.1, this machine; 0.0.0.0 lets others in)")
    add("--port", type=int, metavar="N", help="(default: the first free one from 7860)")
    hint = "visitors may load any folder of this machine and any model of the Hub (default: on this machine)"
    add("--any-model", action=argparse.BooleanOptionalAction, help=hint)
    add("--export", type=Path, metavar="DIR", help="write a folder for Hugging Face Spaces, and show nothing")


def _run(args: argparse.Namespace) -> int:
    if args.export is not None and (args.host or args.port or args.any_model is not None):
        raise ValueError("--export goes without --host, --port and --any-model: a Space has its own")
    try:
        if args.export is not None:
            from ..demo import export_space

            export_space(args.export, args.model, examples=args.examples)
            print(f"{args.export}: a Space. Try it: python {args.export / 'app.py'}")
            print(f"Publish it: hf upload USER/NAME {args.export} . --repo-type space")
            return 0
        from ..demo import serve

        serve(
            args.model, examples=args.examples, host=args.host or "127.0.0.1", port=args.port, any_model=args.any_model
        )
    except ImportError as error:
        raise ValueError(error) from error
    return 0
