"""`timm-coda benchmark`: speed and memory, side by side."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from ._command import new_command

_DESCRIPTION = """\
Time and memory of a model, side by side with the published formulation of its
layers (which writes every dynamic weight to memory) and with this machine's own
matrix products.

  timm-coda benchmark coda_net_s                       # the CIFAR-10 network
  timm-coda benchmark coda_net_s --repeats 7 --output s.json
  timm-coda benchmark coda_net_s --layers --no-memory  # who takes the time?
  timm-coda benchmark coda_net_s --batch-size 256 --dtype float32 bfloat16
  timm-coda benchmark coda_net_l --batch-size 1 --operations explain
  timm-coda benchmark bcos_resnet50 --against resnet50 --batch-size 8
  timm-coda benchmark coda_net_s --scaling --batch-size 64 --operations forward

A round takes every operation of every backend once, in random order, so that a
busy machine disturbs all of them alike; still, stop other work for numbers to
publish. The table has medians over the rounds and, in brackets, quartiles.

  forward      without gradients, in eval mode
  train        forward, binary cross entropy, backward; no optimiser
  explain      explain() the highest class; explain-all: the 10 highest (or all)
  x published  times as fast as the published formulation, in the same dtype and
               the same round
  x ordinary   with --against, for networks that have no published formulation
               to compare with (B-cos): times as long as the ordinary model
               takes in the same round, an explanation against its forward
  relative     with --scaling: time an image and pixel in parts of the time they
               take in the largest batch of the smallest images; 1 throughout
               would be time that grows with batch and pixels and nothing else
  GEMM         counted multiply-accumulates a second, in parts of what the
               faster square matrix product reaches in that round: torch.mm or,
               for float32 on a CPU, oneDNN's, which convolutions use. What is
               counted is the factorised form, for the published one too; a
               training step counts as three forwards, an explanation of T
               classes as one and T products with the large weight
  + MB         peak memory beyond the model, its parameter gradients and the
               images; on a CPU resident memory of a process of its own, which
               gives back what it frees at once (glibc by default keeps some)
"""


def add(subcommands: Any) -> None:
    parser = new_command(
        subcommands,
        "benchmark",
        "speed and memory against the published formulation and the machine's limit",
        _DESCRIPTION,
        _run,
    )
    what = parser.add_argument_group("what")
    add = what.add_argument
    add("model", help="a name in timm's registry, such as coda_net_s; weights do not change the time, so none are read")
    add("--model-args", nargs="+", default=[], metavar="NAME=JSON", help="of its constructor, as rank=16")
    instead = what.add_mutually_exclusive_group()
    hint = "an ordinary timm model to compare with, in place of backends"
    instead.add_argument("--against", metavar="MODEL", help=hint)
    hint = "also smaller batches, down to one image, and images up to four times as large, in place of backends"
    instead.add_argument("--scaling", action="store_true", help=hint)
    add("--img-size", type=int, metavar="N", help="pixels a side (default: the model's)")
    add("--num-classes", type=int, metavar="N", help="(default: the model's)")
    add(
        "--batch-size", type=int, metavar="N", default=16, help="images at once (default: 16, the papers' for training)"
    )
    dtypes, operations = ["float32", "bfloat16", "float16"], ["forward", "train", "explain", "explain-all"]
    hint = "what model and images are cast to; several are compared (default: float32, what training starts in)"
    add("--dtype", nargs="+", default=["float32"], choices=dtypes, metavar="DTYPE", help=f"{', '.join(dtypes)}: {hint}")
    hint = f"of {', '.join(operations)} (default: all)"
    add("--operations", nargs="+", default=operations, choices=operations, metavar="NAME", help=hint)
    add = parser.add_argument_group("how").add_argument
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--threads", type=int, metavar="N", help="of the CPU (default: PyTorch's choice, every core)")
    add(
        "--backend",
        action="append",
        metavar="NAME",
        help="repeat for several: reference (the published formulation, run if it fits into memory), torch (plain "
        "convolutions), cpu, triton (default: the device's best, and reference)",
    )
    add("--channels-last", action="store_true", help="model and images in this memory format (default: contiguous)")
    add("--compile", action="store_true", help="torch.compile forward and train, but not the published formulation")
    add(
        "--repeats",
        type=int,
        metavar="N",
        default=5,
        help="rounds (default: 5, the least that quartiles say something of)",
    )
    add("--seed", type=int, metavar="N", default=0, help="of weights, images and the order within rounds (default: 0)")
    add("--no-memory", action="store_true", help="skip + MB: on a CPU each takes a process, some seconds")
    add("--layers", action="store_true", help="also time each layer alone, on random input of its shape")
    add("--output", type=Path, metavar="FILE", help="write every number, and what ran where, as JSON")


def _run(args: argparse.Namespace) -> int:
    import torch

    from ..benchmark import Setup, benchmark_table, compare, comparison_table, measure, measure_scaling, scaling_table
    from ..hub import write_text

    if args.output and (args.output.is_dir() or not os.access(args.output.absolute().parent, os.W_OK)):
        raise ValueError(f"--output {args.output}: cannot be written; name a file in a folder that is there")
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
        print(f"\n{args.output}: every number")
    return 0
