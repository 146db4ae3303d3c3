"""`timm-coda demo`: serve or export the web page."""

import argparse
from pathlib import Path
from typing import Any

from ._command import new_command

_DESCRIPTION = """\
Serve a web page that answers "why this class and not that one?": drop an image,
and see the model's decision and the contribution of each pixel to it.

  timm-coda demo                      # opens with the model of digits, in the
                                      # package, and ten digits to choose from
  timm-coda demo --model bcos_resnet50.v2_in1k vit_tiny_patch16_bcos_224.v2_in1k
  timm-coda demo --model runs/my_model --examples photos
  timm-coda demo --model hf-hub:me/my-model --export space   # for the Hub

The page can be opened only on this machine, unless --host allows others. Then
visitors can choose only the models given by --model, unless --any-model is set.
Uploads are limited to 10 MB and 50 million pixels.

--export writes a folder for Hugging Face Spaces: app.py, requirements.txt,
README.md, this package, and the models and examples that are local folders.
"""


def add(subcommands: Any) -> None:
    parser = new_command(subcommands, "demo", "serve a web page that explains images", _DESCRIPTION, _run)
    add = parser.add_argument
    hint = "models to choose from: names in timm's registry, folders, or hf-hub:ID (default: ours with weights)"
    add("--model", nargs="+", default=[], metavar="NAME", help=hint)
    add("--examples", type=Path, metavar="DIR", help="folder of example images (default: digits, for models of digits)")
    add("--host", help="address to listen on (default: 127.0.0.1, this machine only; 0.0.0.0: any machine)")
    add("--port", type=int, metavar="N", help="port to listen on (default: the first free one from 7860)")
    hint = "let visitors load any folder of this machine and any Hub model (default: only if --host is this machine)"
    add("--any-model", action=argparse.BooleanOptionalAction, help=hint)
    add("--export", type=Path, metavar="DIR", help="write a folder for Hugging Face Spaces instead of serving")


def _run(args: argparse.Namespace) -> int:
    if args.export is not None and (args.host or args.port or args.any_model is not None):
        raise ValueError("--export cannot be combined with --host, --port or --any-model: a Space sets its own")
    if args.export is not None:
        from ..demo import export_space

        export_space(args.export, args.model, examples=args.examples)
        print(f"{args.export}: a Space. Try it: python {args.export / 'app.py'}")
        print(f"Publish it: hf upload USER/NAME {args.export} . --repo-type space")
        return 0
    from ..demo import serve

    serve(args.model, examples=args.examples, host=args.host or "127.0.0.1", port=args.port, any_model=args.any_model)
    return 0
