"""The `timm-coda` command: parses, calls, prints.

A subcommand is a pair of functions, `_add_NAME(subcommands)` with its options and `_NAME(args)` that does it, imports
what it needs itself and returns the exit code; `make_parser` lists them.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:
    from argparse import _SubParsersAction

__all__ = ["main", "make_parser"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "timm-coda",
        description="Image classifiers that explain themselves, exactly. timm-coda COMMAND --help says more.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"timm_coda {__version__}")
    subcommands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_benchmark(subcommands)
    _add_convert(subcommands)
    _add_push(subcommands)
    _add_export(subcommands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 2 for what the user can mend, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = make_parser().parse_args(argv)
        args.command_line = shlex.join(["timm-coda", *argv])
        return args.run(args)
    except BrokenPipeError:  # as in `timm-coda ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:  # our own errors say what is wrong and how to mend it
        print(f"timm-coda: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


_BENCHMARK = """\
Time and memory of a model, side by side with the published formulation of its
layers (which writes every dynamic weight to memory) and with this machine's own
matrix products.

  timm-coda benchmark coda_net_s                       # the CIFAR-10 network
  timm-coda benchmark coda_net_s --repeats 7 --output s.json
  timm-coda benchmark coda_net_s --layers --no-memory  # who takes the time?
  timm-coda benchmark coda_net_s --batch-size 256 --dtype float32 bfloat16
  timm-coda benchmark coda_net_l --batch-size 1 --operations explain
  timm-coda benchmark bcos_resnet50 --against resnet50 --batch-size 8

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


def _add_benchmark(subcommands: "_SubParsersAction[Any]") -> None:
    parser = subcommands.add_parser(
        "benchmark",
        help="speed and memory against the published formulation and the machine's limit",
        description=_BENCHMARK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_benchmark)
    add = parser.add_argument_group("what").add_argument
    add("model", help="a name in timm's registry, such as coda_net_s; weights do not change the time, so none are read")
    add("--model-args", nargs="+", default=[], metavar="NAME=JSON", help="of its constructor, as rank=16")
    add("--against", metavar="MODEL", help="an ordinary timm model to compare with, in place of backends")
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


def _benchmark(args: argparse.Namespace) -> int:
    import torch

    from .benchmark import Setup, measure
    from .compare import compare
    from .runs import write_text

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
    measured = compare(setup, args.against) if args.against else measure(setup)
    report = {"command": args.command_line, **measured}
    print(comparison_table(report) if args.against else benchmark_table(report))
    if args.output:
        write_text(args.output, json.dumps(report, indent=1) + "\n")
        print(f"\n{args.output}: every number")
    return 0


_CONVERT = """\
A checkpoint, the authors' or one of yours, becomes a folder in timm's format:
config.json and model.safetensors. The model is then

  import timm, timm_coda
  timm.create_model("local-dir:FOLDER", pretrained=True)

  timm-coda convert cifar.pt --model coda_net_s.mpi_t1000_cifar10 \\
      --output FOLDER
  timm-coda convert https://... --model coda_net_l.mpi_t100000_imagenet100 \\
      --output FOLDER
  timm-coda convert mine.pt --model coda_net_s --num-classes 3 \\
      --label-names cat dog eel --model-args rank=16 --output FOLDER
  timm-coda convert runs/mine/model.safetensors --model coda_net_xs --half \\
      --output mine.safetensors                       # weights alone, half size

A checkpoint is a PyTorch or safetensors file of weights, bare or inside
{'state_dict': ...} or {'model': ...}, with or without 'module.' before keys.
Code in a file is never run: a pickle that holds more than weights is refused.
"""


def _add_convert(subcommands: "_SubParsersAction[Any]") -> None:
    parser = subcommands.add_parser(
        "convert",
        help="a published checkpoint, or one of yours, to a folder in timm's format",
        description=_CONVERT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_convert)
    add = parser.add_argument
    add("source", metavar="FILE_OR_URL", help="the checkpoint")
    hint = "a name in timm's registry; the tag says licence, class names and temperature: timm.list_models('coda*', "
    add("--model", required=True, metavar="NAME", help=hint + "include_tags=True)")
    add(
        "--output",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="new or empty; or FILE.safetensors, for weights alone",
    )
    add("--num-classes", type=int, metavar="N", help="of the checkpoint (default: the tag's)")
    hint = "in the order of the logits, or a text file with a name a line (default: the tag's)"
    add("--label-names", nargs="+", metavar="NAME", help=hint)
    add("--model-args", nargs="+", default=[], metavar="NAME=JSON", help="of its constructor, as rank=16")
    add("--half", action="store_true", help="save in half precision")
    hint = "replace the model in FOLDER, and no other file there, or FILE.safetensors"
    add("--overwrite", action="store_true", help=hint)


def _convert(args: argparse.Namespace) -> int:
    from .convert import convert_checkpoint

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


def benchmark_table(report: dict[str, Any]) -> str:
    """What `benchmark.measure` reports as text, 80 columns wide."""
    setup, environment, macs = report["setup"], report["environment"], report["macs_an_image"]["model"]
    size, machine = "x".join(map(str, report["image"])), "gpus" if setup["device"] == "cuda" else "cpu"
    options = [word for word in ("channels_last", "compile") if setup[word]]
    counts = [f"{macs[name] / 1e6:.4g} {name}" for name in setup["operations"]]
    lines = [
        " ".join([setup["model"], *setup["model_args"]]) + f", {report['classes']} classes",
        ", ".join([f"batches of {setup['batch_size']} images {size}", *options]),
        f"{setup['device']}: {environment[machine]}",
        f"million multiply-accumulates an image: {', '.join(counts)}",
        f"{setup['repeats']} rounds: median (quartiles)",
    ]
    for dtype, rates in report["gemm_macs_per_second"].items():
        unit, name = (1e12, "TFLOP/s") if rates["mm"]["median"] > 5e11 else (1e9, "GFLOP/s")
        reached = [f"{kind} {_with_quartiles(rate, 2 / unit)}" for kind, rate in rates.items()]
        lines += ["", f"{dtype}; GEMM in {name}: {', '.join(reached)}"]
        lines.append(_row("backend", "operation", "ms a batch", "images/s", "x published", "GEMM", "+ MB"))
        for row in (row for row in report["rows"] if row["dtype"] == dtype):
            lines.append(_benchmark_row(row))
            if "memory_missing" in row:
                lines.append(f"{'':21} extra memory unknown: {row['memory_missing']}"[:80])
        counts = report["macs_an_image"]
        lines += _layer_table([row for row in report["layers"] if row["dtype"] == dtype], counts)
    return "\n".join(lines)


def comparison_table(report: dict[str, Any]) -> str:
    """What `compare.compare` reports as text, 80 columns wide."""
    setup, environment = report["setup"], report["environment"]
    machine = "gpus" if setup["device"] == "cuda" else "cpu"
    size = "x".join(map(str, report["image"]))
    lines = [
        f"{' '.join([setup['model'], *setup['model_args']])} against {report['against']}, {report['classes']} classes",
        f"batches of {setup['batch_size']} images {size}, {setup['dtypes'][0]}",
        f"{setup['device']}: {environment[machine]}",
        f"{setup['repeats']} rounds: median (quartiles)",
        "",
        _comparison_row("operation", "ms a batch", "ordinary", "x ordinary", "+ MB", "x"),
    ]
    for row in report["rows"]:
        numbers = [_with_quartiles(row[name], 1000) for name in ("seconds", "against_seconds")]
        ours, theirs = (row.get(f"{side}extra_bytes") for side in ("", "against_"))
        memory = ["-", "-"]
        if ours is not None and theirs is not None:
            memory = [_short(ours / 1e6), _short(ours / theirs) if theirs else "-"]
        lines.append(_comparison_row(row["operation"], *numbers, _with_quartiles(row["ratio"], digits=2), *memory))
    return "\n".join(lines)


def _comparison_row(*words: str) -> str:
    return "{:11} {:>18} {:>18} {:>16} {:>6} {:>5}".format(*words)


def _row(*words: str) -> str:
    return "{:9} {:11} {:>19} {:>8} {:>16} {:>5} {:>6}".format(*words)


def _benchmark_row(row: dict[str, Any]) -> str:
    if "missing" in row:
        return f"{row['backend']:9} {row['operation']:11} not run: {row['missing']}"[:80]
    published = row["times_published"].get(row["dtype"])
    return _row(
        row["backend"],
        row["operation"],
        _with_quartiles(row["seconds"], 1000),
        _short(row["images_per_second"]["median"]),
        "1" if row["backend"] == "reference" else _with_quartiles(published, digits=2) if published else "-",
        f"{row['gemm_fraction']['median']:.0%}",
        _short(row["extra_bytes"] / 1e6) if "extra_bytes" in row else "-",
    )


def _layer_table(rows: list[dict[str, Any]], counts: dict[str, dict[str, int]]) -> list[str]:
    """For each backend a line a layer."""
    lines = []
    for backend in dict.fromkeys(row["backend"] for row in rows):
        mine = [row for row in rows if row["backend"] == backend]
        operations = list(dict.fromkeys(row["operation"] for row in mine))
        lines += ["", f"layers alone, {backend}: forward MMAC an image; ms, part of all layers' ms, GEMM"]
        lines.append(f"{'layer':12}{'MMAC':>8}" + "".join(f"{name:>20}" for name in operations))
        total = {name: sum(_milliseconds(row) for row in mine if row["operation"] == name) for name in operations}
        for layer in dict.fromkeys(row["layer"] for row in mine):
            line = f"{layer:12}{_short(counts[layer]['forward'] / 1e6):>8}"
            for row in (row for row in mine if row["layer"] == layer):
                time = _milliseconds(row)
                words = (
                    "not run"
                    if not time
                    else (
                        f"{_short(time):>8} {time / total[row['operation']]:5.0%} {row['gemm_fraction']['median']:5.0%}"
                    )
                )
                line += f"{words:>20}"
            lines.append(line)
    return lines


def _milliseconds(row: dict[str, Any]) -> float:
    return 0 if "missing" in row else 1000 * row["seconds"]["median"]


def _with_quartiles(spread: dict[str, float], unit: float = 1, digits: int = 3) -> str:
    median, low, high = (_short(unit * spread[name], digits) for name in ("median", "low", "high"))
    return f"{median} ({low}-{high})"


def _short(number: float, digits: int = 3) -> str:
    """As many digits or more, never an exponent, at most two behind the point of what is 1 or more."""
    return f"{number:.0f}" if number >= 100 else f"{number:#.3g}" if number >= 1 else f"{number:.{digits}g}"


_PUSH = """\
Publish a model's folder, as train.py or model.save_pretrained(FOLDER) leaves
it, on the Hugging Face Hub, where timm.create_model("hf-hub:USER/NAME") finds
it.

  hf auth login                                                  # once
  timm-coda push runs/coda_net_xs.digits me/digits --dry-run
  timm-coda push runs/coda_net_xs.digits me/digits --license mit
  timm-coda push runs/longer me/digits --message "Twice the epochs"

What goes there: config.json and model.safetensors, which are checked first;
explanation.png, summary.json and recipe.yaml where there are some; and
README.md, the model card. It is made from what train.py measured, unless the
folder has one: to write your own, begin with what --dry-run shows. Checkpoints
stay here.

All of it is one commit: others see the old model or the new one, never a half.
A connection that breaks is tried again; after a failure run the same command
once more, and what is uploaded already is not uploaded again.
"""


def _add_push(subcommands: "_SubParsersAction[Any]") -> None:
    parser = subcommands.add_parser(
        "push",
        help="publish a model's folder on the Hugging Face Hub, with a model card",
        description=_PUSH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_push)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="with config.json and model.safetensors")
    add("repo", metavar="REPO", help="USER/NAME, or NAME under your own; made if there is none")
    add("--dry-run", action="store_true", help="upload nothing: check the folder, list the files, print the card")
    add(
        "--license", metavar="NAME", help="of the weights, for the card, such as mit (default: that of those you tuned)"
    )
    add("--private", action="store_true", help="make a new repository private (default: what its owner's setting says)")
    add("--revision", metavar="BRANCH", help="commit to this branch, which is there already (default: main)")
    add("--message", default="Upload model", metavar="TEXT", help="first line of the commit (default: Upload model)")
    add("--create-pr", action="store_true", help="open a pull request in place of committing")
    add("--token", help="that may write there (default: HF_TOKEN, or hf auth login's, which no shell's history keeps)")


def _push(args: argparse.Namespace) -> int:
    from .remote import check_repo_id, files_to_push, push_folder

    check_repo_id(args.repo)
    files = files_to_push(args.folder, args.repo, license=args.license)
    for name, content in files.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        print(f"{size:>13,}  {name}")
    if args.dry_run:
        card = files["README.md"]
        print(f"\n{card.decode() if isinstance(card, bytes) else card.read_text(encoding='utf-8')}")
        return 0
    commit = push_folder(
        args.folder,
        args.repo,
        private=args.private or None,
        revision=args.revision,
        commit_message=args.message,
        token=args.token,
        create_pr=args.create_pr,
        license=args.license,
    )
    print(f"\n{commit.pr_url or commit.commit_url}")
    if not args.create_pr:
        at = f"@{args.revision}" if args.revision else ""
        print(f'import timm, timm_coda\ntimm.create_model("hf-hub:{commit.repo_url.repo_id}{at}", pretrained=True)')
    return 0


_EXPORT = """\
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


def _add_export(subcommands: "_SubParsersAction[Any]") -> None:
    parser = subcommands.add_parser(
        "export",
        help="a model, with its explanation, as one ONNX or torch.export file",
        description=_EXPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=_export)
    add = parser.add_argument
    add("model", help="a name in timm's registry, local-dir:FOLDER or hf-hub:ID")
    add("--output", type=Path, metavar="FILE", required=True, help="ends in .onnx or .pt2 (replaced if it is there)")
    add("--format", choices=["onnx", "torch"], help="(default: what the ending of --output says)")
    add("--explain", action="store_true", help="with the explanation")
    add("--img-size", type=int, metavar="N", help="pixels a side (default: the model's)")
    hint = "its weights (default: load them); --no-pretrained: random ones, to try a service"
    add("--pretrained", action=argparse.BooleanOptionalAction, default=True, help=hint)


def _export(args: argparse.Namespace) -> int:
    from . import export, hub

    if args.format and args.output.suffix != export.FORMATS[args.format]:
        raise ValueError(
            f"--format {args.format}: name --output {args.output.with_suffix(export.FORMATS[args.format])}"
        )
    with hub.blame(f"cannot load {args.model}", hub.HubError):
        import timm

        model = timm.create_model(args.model, pretrained=args.pretrained)
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


if __name__ == "__main__":
    sys.exit(main())
