"""The first quarter of an hour on a GPU: prove, tune and time the kernels, then train, and bring home what was found.

  python tests/gpu/first_run.py --output OUT                      # rates, tests, tune, benchmark
  python tests/gpu/first_run.py --output OUT --data DATA          # and train, explain
  GPU_TESTS_ON=cpu TRITON_INTERPRET=1 python tests/gpu/first_run.py --output OUT --data DATA --tiny   # a rehearsal;
      FIRST_RUN_BREAKS=PART makes a part fail, FIRST_RUN_HANGS=PART hang

Each part is a process of its own, with a time limit. Whatever fails, hangs or is killed, the others run, and OUT holds
what each has found so far: first_run.json and first_run.log, tiles.json (for timm_coda/layers/kernels), and of the
training the weights of the best epoch in half precision (model.safetensors), config.json, summary.json and
explanation.png. A second call does what is missing. DATA is a folder with the parquet files of CIFAR-10; neither the
package `datasets` nor an installed timm_coda is needed.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMITS = {"rates": 25, "tests": 150, "tune": 90, "benchmark": 120, "train": 300, "explain": 60}
"""Seconds of each part."""


class Notebook:
    """A part's results: a JSON file that is complete after every line added."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, json.loads(path.read_text()) if path.exists() else {}

    def add(self, **found: Any) -> None:
        """Add results, print them, and write the file."""
        self.found |= found
        for name, value in found.items():
            print(f"{name}: {json.dumps(value)[:2000]}", flush=True)
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(self.found, indent=1))
        temporary.replace(self.path)


# Parts. Each runs in a process of its own.


def rates(args: argparse.Namespace, notes: Notebook) -> None:
    """Measure the rates of matrix products and of copies, which bound everything else."""
    import torch
    import triton

    from timm_coda import hub

    notes.add(environment=hub.environment(), triton=triton.__version__)
    cuda = args.device == "cuda"
    if cuda:
        about = torch.cuda.get_device_properties(0)
        notes.add(card=about.name, capability=torch.cuda.get_device_capability(), memory=about.total_memory)
        notes.add(processors=about.multi_processor_count)
    kinds = {"bfloat16": (torch.bfloat16, True), "tf32": (torch.float32, True), "float32": (torch.float32, False)}
    for name, (dtype, tf32) in kinds.items():
        size = 256 if args.tiny else 4096 if name == "float32" else 8192
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a = torch.randn(size, size, device=args.device).to(dtype)
        notes.add(**{name: 2 * size**3 / median_seconds(lambda a=a: a @ a, args)})
    a = torch.empty((1 if args.tiny else 1024) << 20, device=args.device)
    b = torch.empty_like(a)
    notes.add(bytes=2 * a.nbytes / median_seconds(lambda: b.copy_(a), args))


def tests(args: argparse.Namespace, notes: Notebook) -> None:
    """Run the tests marked `gpu`; say which failed and why, also if there was no time for all."""
    said = args.work / "tests.txt"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider"]
    command += ["--dist", "load", "-n", str(min(os.cpu_count() or 1, 14)), "tests/gpu"]
    if args.tiny:
        command += ["-k", "one_position and contiguous", "-W", "ignore:Conversion of an array"]
    with said.open("w") as output:
        try:
            status = subprocess.run(
                command, cwd=ROOT, stdout=output, timeout=LIMITS["tests"] - 15, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
    lines = said.read_text().splitlines()
    pattern = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED) (tests/\S+\.py::.*?)(?: - (.*))?$")
    found = [match.groups() for match in map(pattern.search, lines) if match]
    names = {kind: sorted({name.strip() for how, name, _ in found if how == kind}) for kind in ("PASSED", "SKIPPED")}
    failed = {name: "" for how, name, _ in found if how in ("FAILED", "ERROR")}
    failed |= {name: why[:600] for how, name, why in found if name in failed and why}  # of the summary at the end
    notes.add(status=status, passed=len(names["PASSED"]), skipped=len(names["SKIPPED"]), failed=failed, said=lines[-3:])
    (args.output / "tests.txt").write_text("\n".join(lines))
    if not found:
        raise RuntimeError("no test was run")
    wrong = [name for name in failed if "test_cuda_kernels" in name and "float32" not in name]
    right = [name for name in names["PASSED"] if "test_cuda_kernels" in name]
    notes.add(kernels_are_right=not wrong and len(right) > (0 if args.tiny else 100))


def tune(args: argparse.Namespace, notes: Notebook) -> None:
    """Compile every kernel with every tile in parallel, then time them; write tiles.json."""
    import torch

    from timm_coda.layers.kernels import tiles

    jobs = [("coda_net_s", 32, 512), ("coda_net_xs", 32, 512), ("coda_net_l", 240, 16)]
    jobs = [("coda_net_xs", 8, 1)] if args.tiny else jobs
    start = time.perf_counter()
    compilers = [
        subprocess.Popen([sys.executable, __file__, "--compile", str(n), str(len(jobs) * 4)], cwd=ROOT)
        for n in range(0 if args.tiny else len(jobs) * 4)
    ]
    for compiler in compilers:
        compiler.wait()
    notes.add(compile_seconds=time.perf_counter() - start)
    os.environ["TIMM_CODA_TUNE"] = "1"
    for dtype in (torch.bfloat16, torch.float32):
        for name, size, batch in jobs:
            start = time.perf_counter()
            run_layers(name, size, batch, args.device, dtype)
            capability = torch.cuda.get_device_capability() if args.device == "cuda" else (8, 0)
            rows = [[list(problem), list(tile)] for problem, tile in tiles.found.items()]
            (args.output / "tiles.json").write_text(json.dumps({".".join(map(str, capability)): rows}))
            notes.add(**{f"{name} {dtype}": {"seconds": time.perf_counter() - start, "problems": len(rows)}})
    (args.work / "tuned").write_text("")


def run_layers(name: str, size: int, batch: int, device: str, dtype: Any) -> None:
    """Run a training step of a CoDA-Net."""
    import timm
    import torch

    import timm_coda  # noqa: F401

    model = timm.create_model(name).to(device, dtype).train()
    x = torch.rand(batch, 3, size, size, device=device, dtype=dtype)
    model(x).float().square().mean().backward()


def compile_share(number: int, count: int) -> None:
    """Compile a share of the kernels, with every tile, by running them on one image."""
    import torch

    from timm_coda.layers.kernels import dau_triton, tiles

    def launch(problem: Any, device: Any, run: Callable[[Any], Any]) -> Any:
        result = None
        for place, tile in enumerate(tiles.candidates(problem, torch.cuda.get_device_capability())):
            if (place + zlib.crc32(problem.kernel.encode())) % (count // 3) == number // 3 or place == 0:
                try:
                    found = run(tile)
                    result = found if result is None else result
                except Exception as error:  # reported when it is timed
                    print(f"{problem} {tile}: {error}"[:400], flush=True)
        return result

    dau_triton.launch = launch
    name, size = [("coda_net_s", 32), ("coda_net_xs", 32), ("coda_net_l", 64)][number % 3]
    for dtype in (torch.bfloat16, torch.float32):
        run_layers(name, size, 1, "cuda", dtype)


def benchmark(args: argparse.Namespace, notes: Notebook) -> None:
    """Time models and layers: our kernels, the backend `torch`, and the published formulation."""
    from_arrays()
    import torch

    from helpers import predictions
    from timm_coda.benchmark import comparison, macs
    from timm_coda.benchmark.measurement import Setup, measure

    macs.SAMPLE_SECONDS = 0.02
    from timm_coda.benchmark import measurement

    measurement.SAMPLE_SECONDS = 0.02
    torch.backends.cuda.matmul.allow_tf32 = True
    common = {"device": args.device, "repeats": 5, "memory": not args.tiny, "channels_last": True}
    ours = "cpu" if args.device == "cpu" else args.backend
    bf16, both = ("bfloat16",), ("bfloat16", "float32")
    one = {"backends": (ours, "torch"), "dtypes": bf16}
    against = {"backends": (ours, "torch", "reference"), "dtypes": both}
    plans = {
        "coda_net_s, batch 1024": one | {"layers": True},
        "coda_net_s, batch 256": against,
        "coda_net_xs, batch 1024": one,
        "coda_net_l, batch 64": one,
    }
    if args.tiny:
        common |= {"img_size": 8, "repeats": 2}
        plans = {"coda_net_xs, batch 2": {"backends": (ours, "reference")}, "coda_net_none, batch 2": {}}
    for name, plan in plans.items():
        start = time.perf_counter()
        model, _, batch = name.split()
        try:
            report = measure(Setup(model=model.strip(","), batch_size=int(batch), **common | plan))
            notes.add(**{name: summary_of(report) | {"took": time.perf_counter() - start}})
        except Exception as error:
            notes.add(**{name: f"{type(error).__name__}: {error}"[:500]})
        torch.cuda.empty_cache()
    pairs = [("bcos_resnet50", "resnet50", 224, 64, "bfloat16"), ("bcos_resnet50", "resnet50", 224, 64, "float32")]
    pairs = [("bcos_resnet18", "resnet18", 32, 2, "float32")] if args.tiny else pairs
    for model, against, size, batch, dtype in pairs:
        try:
            own = {"model": model, "img_size": size, "batch_size": batch, "dtypes": (dtype,)}
            setup = Setup(**common | own)
            notes.add(**{f"{model} against {against}, {dtype}": comparison.compare(setup, against)["rows"]})
        except Exception as error:
            notes.add(**{f"{model} against {against}, {dtype}": f"{type(error).__name__}: {error}"[:500]})
    for name, size in [("coda_net_xs", 8)] if args.tiny else [("coda_net_s", 32), ("coda_net_xs", 32)]:
        try:
            notes.add(**{f"updates of {name}, ms": time_updates(name, size, args)})
        except Exception as error:
            notes.add(**{f"updates of {name}, ms": f"{type(error).__name__}: {error}"[:500]})
    rates = known(args).get("rates", {}).get("found", {})
    if not args.tiny and "bytes" in rates:
        import timm

        sizes = predictions.layers(timm.create_model("coda_net_s"), 1024, 32)
        floors = {
            layer.name: [
                1e6 * sum(kernel.seconds(rates) for kernel in kernels)
                for kernels in (predictions.forward(layer), predictions.backward(layer))
            ]
            for layer in sizes
        }
        notes.add(**{"predicted microseconds of coda_net_s, batch 1024, forward and backward": floors})


def time_updates(name: str, size: int, args: argparse.Namespace) -> dict[str, float]:
    """Return milliseconds of train.py's updates in bfloat16 with Muon, as usual and as CUDA graphs."""
    import timm
    import torch
    from accelerate import Accelerator

    import timm_coda  # noqa: F401
    from timm_coda.training import losses, optimizers, updates

    found, batch = {}, 2 if args.tiny else 256
    accelerator = Accelerator(mixed_precision="no" if args.tiny else "bf16", cpu=args.device == "cpu")
    network = timm.create_model(name, num_classes=10).train().to(accelerator.device)
    optimizer = optimizers.create_optimizer(network, accelerator.device, opt="muon", lr=1e-3)
    model, optimizer = accelerator.prepare(network, optimizer)
    loss_function = losses.make_loss("bce", 0.0)

    def compute(x: Any, labels: Any) -> None:
        accelerator.backward(loss_function(model(x), labels))

    x = torch.rand(batch, 3, size, size, device=accelerator.device)
    if args.device == "cuda":
        x = x.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=accelerator.device) % 10
    for kind in [updates.Updates, updates.RecordedUpdates][: 1 if args.device == "cpu" else 2]:
        made = kind(accelerator, model, optimizer, compute, norm=0.0, adaptive=0.0)
        times = []
        for _ in range(6 if args.tiny else 60):
            start = time.perf_counter()
            made.step(x, labels)  # waits for the gradient, and so for the update before
            times.append(time.perf_counter() - start)
        found[kind.__name__] = 1e3 * sorted(times[5:])[len(times[5:]) // 2]
        if kind is updates.RecordedUpdates:
            found["graphs"] = len(made._graphs)
    return found


def known(args: argparse.Namespace) -> dict[str, Any]:
    """Return what all parts have found so far."""
    file = args.work / "first_run.json"
    return json.loads(file.read_text()) if file.exists() else {}


def summary_of(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report's medians."""
    rows = []
    for row in [*report["rows"], *report["layers"]]:
        kept = {
            name: row[name]
            for name in ("dtype", "backend", "operation", "layer", "missing", "extra_bytes")
            if name in row
        }
        if "seconds" in row:
            kept["ms"] = 1e3 * row["seconds"]["median"]
            kept["of_product"] = row["gemm_fraction"]["median"]
            kept["times_published"] = {name: value["median"] for name, value in row.get("times_published", {}).items()}
        rows.append(kept)
    rate = {dtype: kinds["mm"]["median"] for dtype, kinds in report["gemm_macs_per_second"].items()}
    return {"macs_per_second": rate, "rows": rows}


def train(args: argparse.Namespace, notes: Notebook) -> None:
    """Train S by its recipe, in as many epochs as the time allows."""
    import torch

    from_arrays()
    sys.path.insert(0, str(ROOT))
    import train as script

    epochs, options = args.epochs, list(args.options)
    if args.tiny:
        options += ["--model", "coda_net_xs", "--img-size", "8", "--mixed-precision", "no", "--batch-size", "8"]
        options += ["--workers", "0", "--model-args", "rank=2"]
    command = ["train.py", "--config", str(args.recipe), "--data", str(args.data), "--output", str(args.work / "run")]
    command += ["--resume", "auto", "--epochs", str(epochs), "--explain-every", "0", "--eval-explanations", "0"]
    failed = [name for name in known(args).get("tests", {}).get("found", {}).get("failed", {}) if "cuda_graphs" in name]
    if failed or args.no_graphs:
        command.append("--no-cuda-graph")
        notes.add(no_graphs=", ".join(failed) or "the first attempt failed")
    command += options
    notes.add(command=command, backend=os.environ.get("TIMM_CODA_BACKEND", ""), epochs=epochs)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    sys.argv = command
    notes.add(exit_code=script.main())


def explain(args: argparse.Namespace, notes: Notebook) -> None:
    """Score explanations of what was trained: grid localisation and removal, against other methods as time allows."""
    from_arrays()
    from timm_coda import cli

    folder, model = args.work / "scores", args.work / "best"
    size = ["--grids", "4", "--images", "16"] if args.tiny else ["--grids", "500", "--images", "1024"]
    for explainers in (["inherent", "random"], ["grad_cam", "gradient", "input_x_gradient"]):
        command = [
            "evaluate",
            "--model",
            str(model),
            "--data",
            str(args.data / "test.parquet"),
            "--device",
            args.device,
        ]
        command += ["--output", str(folder / explainers[0]), "--explainers", *explainers, *size, "--batch-size", "250"]
        try:
            code = cli.main(command)
        except SystemExit as stopped:
            code = stopped.code
        results = folder / explainers[0] / "results.json"
        notes.add(**{" ".join(command): code})
        if results.exists():
            notes.add(**{", ".join(explainers): json.loads(results.read_text())})


def from_arrays() -> None:
    """Read parquet files without the package `datasets`, if it is missing."""
    try:
        import datasets  # noqa: F401
    except ImportError:
        sys.path.insert(0, str(HERE))
        import without_datasets

        without_datasets.install()


def median_seconds(run: Callable[[], Any], args: argparse.Namespace) -> float:
    """Return the median time of a function, on a GPU by its events."""
    import torch

    if args.device == "cuda":
        from triton.testing import do_bench

        return do_bench(run, warmup=50, rep=300, return_mode="median") / 1e3
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(torch.tensor(times).median())


PARTS = {part.__name__: part for part in (rates, tests, tune, benchmark, train, explain)}

# The parent: starts the parts, and keeps what they find.


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for what is brought home")
    parser.add_argument("--work", type=Path, help="folder that stays (default: first_run in the temporary folder)")
    parser.add_argument("--data", type=Path, help="folder with train*.parquet and test.parquet")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all that can run")
    parser.add_argument("--limit", type=float, default=560, help="seconds for everything")
    parser.add_argument("--recipe", type=Path, default=ROOT / "hub_configs/coda_net_s.cifar10/recipe.yaml")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="more options of train.py")
    parser.add_argument("--epochs", type=int, help="default: as many as the measured speed allows, at most 60")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: tiny problems")
    parser.add_argument("--again", action="store_true", help="repeat parts that are done")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in the process of a part
    parser.add_argument("--compile", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="triton", help=argparse.SUPPRESS)
    parser.add_argument("--no-graphs", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        compile_share(*args.compile)
        return 0
    if args.output is None:
        parser.error("give --output")
    args.device = os.environ.get("GPU_TESTS_ON", "cuda")
    args.output = args.output.resolve()
    args.work = (args.work or Path(tempfile.gettempdir()) / "first_run").resolve()
    for folder in (args.output, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    if args.data is not None:
        args.data = args.data.resolve()
    if args.part:
        if args.part == os.environ.get("FIRST_RUN_BREAKS"):
            raise RuntimeError("a rehearsed failure")
        if args.part == os.environ.get("FIRST_RUN_HANGS"):
            time.sleep(1e6)
        PARTS[args.part](args, Notebook(args.work / f"{args.part}.json"))
        return 0
    return run_parts(args)


def run_parts(args: argparse.Namespace) -> int:
    """Run each part in a process of its own, and print a table."""
    end = time.monotonic() + args.limit
    file = args.output / "first_run.json"
    kept = args.work / "first_run.json"  # the output folder may be empty in a second call
    state = known(args)
    wanted = args.parts or [name for name in PARTS if args.data is not None or name not in ("train", "explain")]

    def write() -> None:
        for path in (kept, file):
            path.write_text(json.dumps(state, indent=1))

    write()
    for name in wanted:
        if state.get(name, {}).get("status") == "done" and not args.again:
            print(f"{name}: done before")
            continue
        left = end - time.monotonic()
        limit = min(20 if name == os.environ.get("FIRST_RUN_HANGS") else LIMITS[name], left - 10)
        if limit < 10:
            state[name] = {"status": "no time left"}
            write()
            continue
        right = state.get("tests", {}).get("found", {}).get("kernels_are_right", False)
        reason = "" if right or args.device == "cpu" else "the kernels were not proved right: " + tests_said(state)
        if name == "train" and args.epochs is None:
            args.epochs = epochs_for(state, limit, args)
        tuned = (args.output / "tiles.json").exists() and (args.work / "tuned").exists()
        if args.device == "cuda" and tuned and right:  # a rehearsal leaves the package as it is
            (ROOT / "timm_coda/layers/kernels/tiles.json").write_bytes((args.output / "tiles.json").read_bytes())
        backend = "cpu" if args.device == "cpu" else "triton" if right else "torch"
        state[name] = {"status": "running", "limit": limit, "backend": backend, "why": reason}
        write()
        started = time.monotonic()
        status = run_part(name, limit, backend, args)
        if name == "train" and status.startswith("failed"):  # once more, with less that can fail
            args.no_graphs, left = True, limit - (time.monotonic() - started)
            status = f"{run_part(name, left, backend, args)} (first attempt: {status})" if left > 20 else status
        found = args.work / f"{name}.json"
        state[name] |= {"status": status.split(" (first")[0], "said": status, "seconds": time.monotonic() - started}
        state[name]["found"] = json.loads(found.read_text()) if found.exists() else {}
        write()
        print(f"--- {name}: {status} in {state[name]['seconds']:.0f} s", flush=True)
    print("\n".join(f"{name:10} {part['status']:20} {part.get('seconds', 0):5.0f} s" for name, part in state.items()))
    return 0 if all(part["status"] == "done" for part in state.values()) else 1


def tests_said(state: dict[str, Any]) -> str:
    """Say in a line what the tests found."""
    part = state.get("tests", {})
    failed = part.get("found", {}).get("failed", {})
    return f"{len(failed)} tests failed, {', '.join(list(failed)[:3])}" if failed else f"tests {part.get('status')}"


def run_part(name: str, limit: float, backend: str, args: argparse.Namespace) -> str:
    """Run a part until it ends or its time is over, with what it prints in the log; save weights as they come."""
    options = ["--part", name, "--output", args.output, "--work", args.work, "--recipe", args.recipe]
    options += ["--backend", backend, *(["--data", args.data] if args.data else []), *(["--tiny"] if args.tiny else [])]
    options += ["--no-graphs"] if args.no_graphs else []
    options += ["--epochs", args.epochs or 1, *(["--options", *args.options] if args.options else [])]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if name in ("train", "explain"):
        environment["TIMM_CODA_BACKEND"] = backend
    log = args.output / "first_run.log"
    with log.open("a") as output:
        print(f"\n=== {name}, at most {limit:.0f} s", file=output, flush=True)
        command = [sys.executable, __file__, *map(str, options)]
        process = subprocess.Popen(
            command, cwd=args.work, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        end, asked = time.monotonic() + limit, False
        while process.poll() is None:
            time.sleep(0.5)
            if name == "train":
                save_weights(args)
            over = time.monotonic() - end
            if over > 0 and not asked:
                asked = True
                process.send_signal(signal.SIGTERM)  # train.py saves, and ends
            if over > 15:
                os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # what the part started and left
            os.killpg(process.pid, signal.SIGKILL)
    if name == "train":
        save_weights(args)
    if asked:
        return "out of time"
    return "done" if process.returncode == 0 else f"failed ({process.returncode})"


def save_weights(args: argparse.Namespace) -> None:
    """Copy the run's best model so far: as it is for `explain`, and with weights in half precision to the output."""
    import torch
    from safetensors.torch import load_file, save_file

    run, best = args.work / "run", args.work / "best"
    weights = run / "model.safetensors"
    known = best / "model.safetensors"
    if not weights.exists() or (known.exists() and known.stat().st_mtime >= weights.stat().st_mtime):
        return
    best.mkdir(exist_ok=True)
    try:
        tensors = load_file(weights)
        for name in ("config.json", "model.safetensors"):
            (best / name).write_bytes((run / name).read_bytes())
    except Exception:  # being written: next time
        return
    half = {name: t.half() if t.dtype == torch.float32 else t for name, t in tensors.items()}
    save_file(half, args.output / "model.safetensors")
    for name in ("config.json", "summary.json", "explanation.png", "recipe.yaml"):
        if (run / name).exists():
            (args.output / name).write_bytes((run / name).read_bytes())


def epochs_for(state: dict[str, Any], limit: float, args: argparse.Namespace) -> int:
    """Return how many epochs of 50,000 images fit in the time, by the measured speed of a training step."""
    if args.tiny:
        return 1
    times = state.get("benchmark", {}).get("found", {}).get("updates of coda_net_s, ms")
    if not isinstance(times, dict):
        return 30
    epoch = 195 * (min(times["Updates"], times.get("RecordedUpdates", 1e9)) + 0.3) / 1e3 + 1.5  # data, evaluation
    return max(5, min(60, int((limit - 30) / epoch)))


if __name__ == "__main__":
    sys.exit(main())
