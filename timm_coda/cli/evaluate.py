"""`timm-coda evaluate`: score explanations by metrics, and compare with other methods."""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._command import CommandParser, add_dataset_options, choose_device, new_command

_DESCRIPTION = """\
Score a model's own explanations, and those of common methods, on labelled
images: does the evidence for a class lie in the right place, and does the
prediction change when the pixels with this evidence are removed?

Examples:

  timm-coda evaluate --model coda_net_xs.digits --data digits --grids 40 \\
      --images 100 --output digits
  timm-coda evaluate --model runs/mine --data uoft-cs/cifar10 --output cifar \\
      --explainers inherent gradient grad_cam occlusion_9 --device cuda
  timm-coda evaluate --model hf-hub:org/name --data path/to/images \\
      --metrics grid_localisation grid_localisation_0.99 --grid-size 2 \\
      --output grids

FOLDER gets report.html, a page with tables, plots, and maps side by side;
results.json, with every value; and arrays/, with example images and maps.
Finished work is saved in FOLDER/parts: after a kill or Ctrl-C, the same command
resumes, as does one with more explainers or metrics. If a method fails on the
model, its error is reported and the others continue.

Several processes share the work, on GPUs or CPUs, with the same results; any
number of them resumes it:

  accelerate launch --multi_gpu --num_processes 2 -m timm_coda evaluate ...

"""


def add(subcommands: Any) -> None:
    hint = "score explanations, and compare with other methods"
    new_command(subcommands, "evaluate", hint, _DESCRIPTION, _run, shared=True).define = _define


def _define(parser: CommandParser) -> None:
    from ..evaluate import DEFAULT_METRICS, EXPLAINERS, METRICS

    names = f"{_list('Explainers', EXPLAINERS)}, or occlusion_N\n\n{_list('Metrics', METRICS)}\n"
    parser.description = _DESCRIPTION + names
    add = parser.add_argument_group("input and output").add_argument
    add("--model", required=True, metavar="NAME", help="name in timm's registry, folder, or hf-hub:ID")
    hint = "digits, Hub dataset id, parquet files, or folder of these or of images"
    add("--data", nargs="+", required=True, metavar="SOURCE", help=hint)
    add("--explainers", nargs="+", default=list(EXPLAINERS), metavar="NAME", help="explainers to score (default: all)")
    hint = f"metrics to compute (default: {', '.join(DEFAULT_METRICS)})"
    add("--metrics", nargs="+", default=list(DEFAULT_METRICS), metavar="NAME", help=hint)
    hint = "new or empty folder, or folder of an evaluation to resume"
    add("--output", type=Path, required=True, metavar="FOLDER", help=hint)
    add("--overwrite", action="store_true", help="delete the evaluation in FOLDER and start again")
    add_dataset_options(parser.add_argument_group("dataset"), otherwise="a tenth of the training images")
    add = parser.add_argument_group("settings").add_argument
    add("--grids", type=_positive, default=500, metavar="N", help="maximum number of grids (default: 500, the papers')")
    add("--grid-size", type=_positive, default=3, metavar="N", help="cells per side of a grid (default: 3)")
    hint = "use the first N images in metrics of single images (default: 1024, as in the papers)"
    add("--images", type=_positive, default=1024, metavar="N", help=hint)
    add("--seed", type=int, default=42, metavar="N", help="seed of grids and all random numbers (default: 42)")
    add("--batch-size", type=_positive, default=64, metavar="N", help="images per batch (default: 64)")
    add("--device", help="cpu or cuda (default: cuda if available)")


def _list(title: str, names: Sequence[str]) -> str:
    return textwrap.fill(f"{title}: {', '.join(names)}", 80, subsequent_indent="  ", break_on_hyphens=False)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")
    return int(text)


def _run(args: argparse.Namespace) -> int:
    from ..evaluate import results_table, run, write_report

    processes = args.processes
    setup, explainers, metrics = processes.in_turn(lambda: _choices(args))
    try:
        results = run(
            setup,
            explainers,
            metrics,
            args.output,
            command=args.command_line,
            overwrite=args.overwrite,
            processes=processes,
        )
    except KeyboardInterrupt:
        print(f"\nstopped; finished work is saved in {args.output}: run the same command to resume", file=sys.stderr)
        return 130
    if processes.rank:
        return 0
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


def _choices(args: argparse.Namespace) -> tuple[Any, list[Any], list[Any]]:
    """Return the setup, the explainers and the metrics."""
    from ..evaluate import Setup, make_explainer, make_metric

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
        device=choose_device(args.device, args.processes),
    )
    return setup, explainers, metrics
