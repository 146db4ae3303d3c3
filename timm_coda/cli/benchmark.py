"""`timm-coda benchmark`: measure speed and memory side by side."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ._command import new_command

_DESCRIPTION = """\
Measure time and memory of a model, side by side with the published formulation
of its layers (which writes every dynamic weight to memory) and with this
machine's matrix products (GEMM).

  timm-coda benchmark coda_net_s                       # the CIFAR-10 network
  timm-coda benchmark coda_net_s --repeats 7 --output s.json
  timm-coda benchmark coda_net_s --layers --no-memory  # time per layer
  timm-coda benchmark coda_net_s --batch-size 256 --dtype float32 bfloat16
  timm-coda benchmark coda_net_l --batch-size 1 --operations explain
  timm-coda benchmark bcos_resnet50 --against resnet50 --batch-size 8
  timm-coda benchmark coda_net_s --scaling --batch-size 64 --operations forward

Each round runs every operation of every backend once, in random order, so that
a busy machine disturbs all of them alike. Still, stop other work if you publish
the numbers. The table shows medians over rounds, with quartiles in brackets.

Operations:
  forward      forward pass in eval mode, without gradients
  train        forward pass, binary cross entropy, backward pass; no optimiser
  explain      explain() the highest class
  explain-all  explain() the 10 highest classes (or all, if there are fewer)

Columns:
  x published  speed relative to the published formulation, in the same dtype
               and round
  GEMM         multiply-accumulates per second, relative to the faster square
               matrix product in that round: torch.mm or, for float32 on a CPU,
               that of oneDNN, which convolutions use. The factorised form is
               counted for all backends; a training step counts as three forward
               passes, an explanation of T classes as one forward pass and T
               products with the large weight
  + MB         peak memory beyond the model, its parameter gradients and the
               images. On a CPU: resident memory of a separate process that
               returns freed memory at once (by default, glibc retains some)
  x ordinary   --against, for models without a published formulation (B-cos):
               time relative to the ordinary model in the same round; an
               explanation is compared with its forward pass
  relative     --scaling: time per image and pixel, relative to the largest
               batch of the smallest images; 1 everywhere if time is
               proportional to batch and pixels
"""


def add(subcommands: Any) -> None:
    parser = new_command(
        subcommands,
        "benchmark",
        "compare speed and memory with the published formulation and matrix products",
        _DESCRIPTION,
        _run,
    )
    what = parser.add_argument_group("what")
    add = what.add_argument
    add("model", help="name of a timm model, such as coda_net_s; its weights are random: they do not affect the time")
    add("--model-args", nargs="+", default=[], metavar="NAME=JSON", help="model arguments, such as rank=16")
    instead = what.add_mutually_exclusive_group()
    hint = "compare with this ordinary timm model instead of comparing backends"
    instead.add_argument("--against", metavar="MODEL", help=hint)
    hint = "also run smaller batches, down to 1, and images of up to 4 times the side, instead of comparing backends"
    instead.add_argument("--scaling", action="store_true", help=hint)
    add("--img-size", type=int, metavar="N", help="pixels per side (default: the model's)")
    add("--num-classes", type=int, metavar="N", help="number of classes (default: the model's)")
    add("--batch-size", type=int, metavar="N", default=16, help="images per batch (default: 16, as in the papers)")
    dtypes, operations = ["float32", "bfloat16", "float16"], ["forward", "train", "explain", "explain-all"]
    hint = "cast model and images to it; several are compared (default: float32)"
    add("--dtype", nargs="+", default=["float32"], choices=dtypes, metavar="DTYPE", help=f"{', '.join(dtypes)}: {hint}")
    hint = f"operations to run: {', '.join(operations)} (default: all)"
    add("--operations", nargs="+", default=operations, choices=operations, metavar="NAME", help=hint)
    add = parser.add_argument_group("how").add_argument
    add("--device", help="cpu or cuda (default: cuda if available)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice, every core)")
    add(
        "--backend",
        action="append",
        metavar="NAME",
        help="reference (the published formulation, skipped if it does not fit into memory), torch (plain "
        "convolutions), cpu or triton; repeat for several (default: the device's best, and reference)",
    )
    add("--channels-last", action="store_true", help="use the channels_last memory format (default: contiguous)")
    add("--compile", action="store_true", help="use torch.compile for forward and train, except for reference")
    add(
        "--repeats",
        type=int,
        metavar="N",
        default=5,
        help="number of rounds (default: 5, the fewest for meaningful quartiles)",
    )
    add("--seed", type=int, metavar="N", default=0, help="seed of weights, images and order within rounds (default: 0)")
    add("--no-memory", action="store_true", help="skip + MB: on a CPU, each value takes a process and some seconds")
    add("--layers", action="store_true", help="also time each layer alone, on random inputs of its shape")
    add("--output", type=Path, metavar="FILE", help="write all numbers, settings and the environment to this JSON file")


def _run(args: argparse.Namespace) -> int:
    import torch

    from ..benchmark import Setup, benchmark_table, compare, comparison_table, measure, measure_scaling, scaling_table
    from ..hub import write_text

    if args.output and (args.output.is_dir() or not os.access(args.output.absolute().parent, os.W_OK)):
        raise ValueError(f"--output {args.output}: cannot be written; choose a file in an existing folder")
    setup = Setup(
        model=args.model,
        model_args=tuple(args.model_args),
        batch_size=args.batch_size,
        img_size=args.img_size,
        num_classes=args.num_classes,
        dtypes=tuple(args.dtype),
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        channels_last=args.channels_last,
        compile=args.compile,
        backends=tuple(args.backend or ()),
        operations=tuple(args.operations),
        repeats=args.repeats,
        threads=args.threads,
        seed=args.seed,
        memory=not args.no_memory,
        layers=args.layers,
    )
    if args.against:
        measured, table = compare(setup, args.against), comparison_table
    elif args.scaling:
        measured, table = measure_scaling(setup), scaling_table
    else:
        measured, table = measure(setup), benchmark_table
    report = {"command": args.command_line, **measured}
    print(table(report))
    if args.output:
        write_text(args.output, json.dumps(report, indent=1) + "\n")
        print(f"\nall numbers are in {args.output}")
    return 0
