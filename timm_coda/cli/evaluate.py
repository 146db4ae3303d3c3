"""`timm-coda evaluate`: how far explanations can be trusted, in numbers."""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._command import choose_device, new_command

_DESCRIPTION = """\
Score a model's own explanations, and those of common methods, on labelled
images: do they point at what they are about, and does the model change its
mind when what they point at is gone?

  timm-coda evaluate --model coda_net_xs.digits --data digits --grids 40 \\
      --images 100 --output digits
  timm-coda evaluate --model runs/mine --data uoft-cs/cifar10 --output cifar \\
      --explainers inherent gradient grad_cam occlusion_9 --device cuda
  timm-coda evaluate --model hf-hub:org/name --data path/to/images \\
      --metrics grid_localisation grid_localisation_0.99 --grid-size 2 \\
      --output grids

FOLDER gets report.html, a page with the maps side by side, plots and tables;
results.json, with each value; and arrays/, the example images and maps. What is
done is kept in FOLDER/parts: after a kill or Ctrl-C the same command goes on,
and so does one with more explainers or metrics. A method that fails on the
model is reported with its reason, and the others go on.

"""


def add(subcommands: Any) -> None:
    from ..evaluate import DEFAULT_METRICS, EXPLAINERS, METRICS

    about = f"{_DESCRIPTION}{_list('Explainers', EXPLAINERS)}, or occlusion_N\n\n{_list('Metrics', METRICS)}\n"
    parser = new_command(subcommands, "evaluate", "explanations in numbers, beside those of other methods", about, _run)
    add = parser.add_argument_group("what").add_argument
    add("--model", required=True, metavar="NAME", help="in timm's registry, a folder, or hf-hub:ID")
    hint = "digits, a Hub id, parquet files, a folder of these or of images"
    add("--data", nargs="+", required=True, metavar="SOURCE", help=hint)
    add("--explainers", nargs="+", default=list(EXPLAINERS), metavar="NAME", help="(default: all)")
    hint = f"(default: {', '.join(DEFAULT_METRICS)})"
    add("--metrics", nargs="+", default=list(DEFAULT_METRICS), metavar="NAME", help=hint)
    hint = "where to, new, empty, or of an evaluation to go on with"
    add("--output", type=Path, required=True, metavar="FOLDER", help=hint)
    add("--overwrite", action="store_true", help="begin anew, in place of the evaluation in FOLDER")
    add = parser.add_argument_group("data").add_argument
    add("--subset", help="configuration of a Hub data set that has several")
    hint = "(default: validation, or test, whichever there is, or a tenth of the training images)"
    add("--test-split", metavar="NAME", help=hint)
    add("--image-column", metavar="NAME", help="(default: the only one with images)")
    add("--label-column", metavar="NAME", help="(default: the only one with classes, or the one named label)")
    add = parser.add_argument_group("how").add_argument
    add("--grids", type=_positive, default=500, metavar="N", help="of grid localisation (default: 500, the papers')")
    add("--grid-size", type=_positive, default=3, metavar="N", help="cells a side (default: 3)")
    hint = "the first so many, for metrics of single images (default: 1024, as in the papers)"
    add("--images", type=_positive, default=1024, metavar="N", help=hint)
    add("--seed", type=int, default=42, metavar="N", help="of grids and of everything random (default: 42)")
    add("--batch-size", type=_positive, default=64, metavar="N", help="images at a time (default: 64)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")


def _list(title: str, names: Sequence[str]) -> str:
    return textwrap.fill(f"{title}: {', '.join(names)}", 80, subsequent_indent="  ", break_on_hyphens=False)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _run(args: argparse.Namespace) -> int:
    from ..evaluate import Setup, make_explainer, make_metric, results_table, run, write_report

    explainers = [make_explainer(name, batch_size=args.batch_size, seed=args.seed) for name in args.explainers]
    metrics = [make_metric(name, grids=args.grids, grid_size=args.grid_size) for name in args.metrics]
    setup = Setup(
        model=args.model,
        data=tuple(args.data),
        subset=args.subset,
        test_split=args.test_split,
        image_column=args.image_column,
        label_column=args.label_column,
        grids=args.grids,
        grid_size=args.grid_size,
        images=args.images,
        seed=args.seed,
        batch_size=args.batch_size,
        device=choose_device(args.device),
    )
    try:
        results = run(
            setup, explainers, metrics, args.output, command=args.command_line, overwrite=args.overwrite, say=print
        )
    except KeyboardInterrupt:
        print(f"\nstopped; what is done is in {args.output}: run the same command to go on", file=sys.stderr)
        return 130
    print(results_table(results))
    print(f"\n{args.output / 'results.json'}: every number")
    try:
        print(f"{write_report(args.output)}: maps, plots and tables on a page")
    except ImportError as error:
        print(f"no report: {error}")
    done = any(
        "error" not in entry for metric in results["metrics"].values() for entry in metric["explainers"].values()
    )
    return 0 if done else 1
