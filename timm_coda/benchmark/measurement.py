"""Measure speed and memory of a model against the published formulation and this machine's matrix products.

All are measured side by side: each round runs every (dtype, backend, operation) and a square matrix product (GEMM)
once, in random order. Ratios are computed within each round; reported are their medians over rounds.
"""

import contextlib
import math
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..errors import wrap_errors
from ..explanation import explain
from ..hub import create_model, environment
from ..layers import BACKENDS, BEST_BACKEND, cpu_slowdown, is_emulated, use_backend
from .macs import SAMPLE_SECONDS, Call, GemmRate, Macs, count_macs, layer_calls, seconds
from .memory import extra_memory, free_memory, peak_of

__all__ = ["BenchmarkError", "Macs", "Setup", "count_macs", "measure"]

OPERATIONS = ("forward", "train", "explain", "explain-all")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PUBLISHED = "reference"
# Measured peak memory of the published formulation, in arrays of the size of a layer's dynamic weights: copies of the
# largest layer's always, and copies of all layers' if a backward pass follows.
_LARGEST_COPIES, _KEPT_COPIES = 3, {"forward": 0, "train": 2, "explain": 1, "explain-all": 1}


class BenchmarkError(ValueError):
    """A benchmark that cannot be run as requested; the message gives the remedy."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What to measure.

    Raises:
        BenchmarkError: a number is too small, a name is unknown, or the device is not available.
    """

    model: str
    model_args: tuple[str, ...] = ()
    """Arguments of the model, each as NAME=JSON."""
    batch_size: int = 16
    img_size: int | None = None
    """Pixels per side; None for the model's default."""
    num_classes: int | None = None
    dtypes: tuple[str, ...] = ("float32",)
    """Names in `DTYPES`. Model and images are cast to each of them; autocast is not used."""
    device: str = "cpu"
    channels_last: bool = False
    compile: bool = False
    """Use torch.compile for forward and train, except for the published formulation."""
    backends: tuple[str, ...] = ()
    """Names in `BACKENDS`; empty: the device's best and the published formulation."""
    operations: tuple[str, ...] = OPERATIONS
    repeats: int = 5
    """Number of rounds."""
    threads: int | None = None
    seed: int = 0
    memory: bool = True
    layers: bool = False

    def __post_init__(self) -> None:
        for name, least in {"batch_size": 1, "img_size": 1, "num_classes": 1, "repeats": 2, "threads": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise BenchmarkError(f"{name}={value}: must be at least {least}")
        if ":" in self.model and self.num_classes is None:
            raise BenchmarkError(f"num_classes=None: {self.model} is not in timm's registry, give num_classes")
        if self.device not in ("cpu", "cuda"):
            raise BenchmarkError(f"device={self.device!r}: choose cpu or cuda (CUDA_VISIBLE_DEVICES selects the GPU)")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise BenchmarkError(f"device='cuda': PyTorch {torch.__version__} finds no CUDA device; choose cpu")
        defaults = {"dtypes": (), "backends": (BEST_BACKEND[self.device], PUBLISHED), "operations": OPERATIONS}
        for name, choices in {"dtypes": DTYPES, "backends": BACKENDS, "operations": OPERATIONS}.items():
            values = tuple(dict.fromkeys(getattr(self, name) or defaults[name]))
            for value in values or (None,):
                if value not in choices:
                    raise BenchmarkError(f"{name}: unknown value {value!r}, choose from {', '.join(choices)}")
            object.__setattr__(self, name, values)


@contextlib.contextmanager
def conditions(setup: Setup) -> Iterator[None]:
    """Use the setup's number of threads inside the block; restore it and the random state afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(setup.threads or threads)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)


class Problem:
    """The model of a setup in one dtype, a batch of images, and the operations on them."""

    def __init__(self, setup: Setup, dtype: str) -> None:
        self.setup, self.dtype = setup, dtype
        torch.manual_seed(setup.seed)
        with wrap_errors(f"no pretrained configuration of {setup.model}", BenchmarkError):
            config = timm.get_pretrained_cfg(setup.model) if timm.is_model(setup.model) else None
        classes = setup.num_classes or (config.num_classes if config else 1)  # create_model rejects unknown models
        model: Any = create_model(setup.model, num_classes=classes, model_args=setup.model_args)
        size = setup.img_size or model.pretrained_cfg["input_size"][-1]
        self.calls = layer_calls(model, size)
        self.format = torch.channels_last if setup.channels_last else torch.contiguous_format
        self.model = model.to(setup.device, DTYPES[dtype], memory_format=self.format)
        self.images = self.random(setup.batch_size, model.in_chans, size, size)
        self.macs = sum((call.macs for call in self.calls), Macs())
        self.targets = min(classes, 10)

    def random(self, *shape: int) -> Tensor:
        x = torch.rand(*shape).to(self.setup.device, DTYPES[self.dtype])
        return x.contiguous(memory_format=self.format) if x.dim() == 4 else x

    def operation(self, name: str, backend: str, *, keep_gradients: bool = False) -> Callable[[], object]:
        """Return the function to time, without an optimiser. It resets parameter gradients, unless they are kept."""
        run = torch.compile(self.model) if self.setup.compile and backend != PUBLISHED else self.model
        return model_operation(name, self.model, self.images, self.targets, run=run, keep_gradients=keep_gradients)

    def layer_operation(self, name: str, call: Call) -> Callable[[], object]:
        """Return the function to time for one layer alone, on random input of its shape; backward as in the model."""
        layer, parameters = call.layer, list(call.layer.parameters())
        x = self.random(self.setup.batch_size, *call.input_shape[1:]).requires_grad_()
        with torch.no_grad():
            grad = torch.rand_like(layer(x))
        inner = x if call is not self.calls[0] else x.detach()  # training needs no gradient for the images

        def forward() -> None:
            with torch.no_grad():
                layer(x)

        def train() -> None:
            torch.autograd.grad(layer(inner), parameters + [inner] * inner.requires_grad, grad)

        def explain() -> None:
            with layer.frozen_dynamics:
                torch.autograd.grad(layer(x), x, grad)

        return {"forward": forward, "train": train, "explain": explain}[name]

    def cells(self) -> list["_Cell"]:
        """Return everything to time."""
        setup, cells = self.setup, []
        for backend in setup.backends:
            for name in setup.operations:
                missing = self._too_large(name) if backend == PUBLISHED else ""
                cells.append(_Cell(self, name, backend, self.operation(name, backend), missing=missing))
                if setup.layers and backend != PUBLISHED and name != "explain-all":
                    for call in self.calls:
                        cells.append(_Cell(self, name, backend, self.layer_operation(name, call), call))
        return cells

    def _too_large(self, operation: str) -> str:
        """Return why the published formulation does not fit into memory (bytes needed and free); empty if it fits."""
        sizes = [call.macs.bias for call in self.calls]  # also the number of dynamic weights
        copies = _KEPT_COPIES[operation] * sum(sizes) + _LARGEST_COPIES * max(sizes)
        needed = copies * self.setup.batch_size * DTYPES[self.dtype].itemsize
        free = free_memory(self.setup.device)
        return f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free" if needed > 0.7 * free else ""


def model_operation(
    name: str,
    model: Any,
    images: Tensor,
    targets: int,
    *,
    run: Callable[..., Any] | None = None,
    keep_gradients: bool = False,
) -> Callable[[], object]:
    """Return one of `OPERATIONS` as a function without arguments.

    Args:
        name: the operation
        model: the model
        images: (B, C, H, W)
        targets: number of classes that "explain-all" explains
        run: computes the logits instead of `model`, for example its compiled version
        keep_gradients: whether "train" adds to parameter gradients instead of resetting them first
    """
    compute: Callable[..., Any] = model if run is None else run
    truth = F.one_hot(torch.arange(len(images)) % model.num_classes, model.num_classes).float().to(images.device)

    def forward() -> None:
        model.eval()
        with torch.no_grad():
            compute(images)

    def train() -> None:
        model.train()
        if not keep_gradients:
            model.zero_grad()
        F.binary_cross_entropy_with_logits(compute(images).float(), truth).backward()

    def explain_top() -> None:
        explain(model.eval(), images, top=targets if name == "explain-all" else 1)

    return {"forward": forward, "train": train}.get(name, explain_top)


@dataclass
class _Cell:
    """One operation to time in every round, of the whole model or of one of its layers."""

    problem: Problem
    operation: str
    backend: str
    run: Callable[[], object]
    call: Call | None = None
    calls: int = 1
    samples: list[float] = field(default_factory=list)
    """Seconds per call, one sample per round."""
    missing: str = ""
    """Why there are no samples; empty if there are."""

    def time(self) -> float:
        with use_backend(self.backend):
            return seconds(self.run, self.calls, self.problem.setup.device)

    def warm_up(self) -> None:
        try:
            once = self.time()  # compile, autotune, fill caches
            if once < 10 * SAMPLE_SECONDS or self.problem.setup.compile:
                once = self.time()
            self.calls = math.ceil(min(SAMPLE_SECONDS / once, 1000))
        except (RuntimeError, ValueError) as error:  # out of memory, or not supported by the backend
            self.missing = (str(error).strip().splitlines() or [repr(error)])[0]

    def sample(self) -> None:
        self.samples.append(self.time())

    def extra_memory(self) -> dict[str, Any]:
        """Return `extra_bytes` of the operation, or `memory_missing`, the reason why it is unknown."""
        setup, dtype = self.problem.setup, self.problem.dtype
        how = {"operation": self.operation, "backend": self.backend}
        return extra_memory(
            setup.device, lambda: _peak(self.problem, **how), _peak_of_setup, setup=asdict(setup), dtype=dtype, **how
        )

    def row(self, cells: list["_Cell"], gemms: dict[str, GemmRate]) -> dict[str, Any]:
        """Return this operation's row of the report."""
        batch, macs = self.problem.setup.batch_size, self.call.macs if self.call else self.problem.macs
        count = batch * macs.counts(self.problem.targets)[self.operation]
        row = {"dtype": self.problem.dtype, "backend": self.backend, "operation": self.operation, "macs": count}
        row |= {"layer": self.call.name} if self.call else {}
        if self.missing:
            return row | {"missing": self.missing}
        row |= {"seconds": spread(self.samples), "images_per_second": spread([batch / s for s in self.samples])}
        rates = gemms[self.problem.dtype].best
        row["gemm_fraction"] = spread([count / s / rate for s, rate in zip(self.samples, rates, strict=True)])
        row["times_published"] = {
            other.problem.dtype: spread([b / a for a, b in zip(self.samples, other.samples, strict=True)])
            for other in cells
            if other.backend == PUBLISHED and other.operation == self.operation and other.samples and not self.call
        }
        return row


def spread(samples: list[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high, "samples": samples}


def measure(setup: Setup) -> dict[str, Any]:
    """Time the setup's operations in rounds, measure their memory, and return a JSON-serialisable report.

    Numbers measured in rounds have `median`, the quartiles `low` and `high`, and `samples`, one per round:

    - `seconds`: per batch
    - `gemm_fraction`: multiply-accumulates per second divided by the rate of the faster matrix product; for every
      backend, the multiply-accumulates are those of the factorised form
    - `times_published`: time of the published formulation divided by this time, by the published formulation's dtype

    `cpu_slowdown` is the time of a small product in each dtype divided by that in float32, on a CPU. There are no
    instructions for a dtype in `emulated`. `extra_bytes` is the peak memory beyond the model, its parameter gradients
    and the images (on a CPU: resident).

    Raises:
        BenchmarkError: nothing could be measured.
        ValueError: the model is unknown, or the image is too small for it.
    """
    # Each cell is compiled once. Beyond its recompile limit, torch.compile would fall back to plain PyTorch.
    limit = torch._dynamo.config.patch(recompile_limit=64) if setup.compile else contextlib.nullcontext()
    with conditions(setup):
        with limit:
            problems = [Problem(setup, dtype) for dtype in setup.dtypes]
            cells = [cell for problem in problems for cell in problem.cells()]
            gemms = {problem.dtype: GemmRate(DTYPES[problem.dtype], setup.device) for problem in problems}
            _sample(cells, list(gemms.values()), setup)
        rows = [cell.row(cells, gemms) for cell in cells]
        for cell, row in zip(tqdm(cells, "memory", disable=None, leave=False), rows, strict=True):
            if setup.memory and not cell.call and not cell.missing:
                row |= cell.extra_memory()
        machine = environment()
        slowdown = {name: cpu_slowdown(DTYPES[name]) for name in setup.dtypes if setup.device == "cpu"}
    problem = problems[0]
    return {
        "setup": asdict(setup),
        "image": list(problem.images.shape[1:]),
        "classes": problem.model.num_classes,
        "targets": problem.targets,
        "environment": machine,
        "cpu_slowdown": slowdown,
        "emulated": [name for name in slowdown if is_emulated(DTYPES[name])],
        "tf32": torch.backends.cudnn.allow_tf32,
        "macs_an_image": {"model": problem.macs.counts(problem.targets)}
        | {call.name: call.macs.counts(problem.targets) for call in problem.calls},
        "gemm_macs_per_second": {
            dtype: {kind: spread(samples) for kind, samples in gemm.rates.items()} for dtype, gemm in gemms.items()
        },
        "rows": [row for row in rows if "layer" not in row],
        "layers": [row for row in rows if "layer" in row],
    }


def _sample(cells: list[_Cell], gemms: list[GemmRate], setup: Setup) -> None:
    for cell in tqdm(cells, "warming up", disable=None, leave=False):
        if not cell.missing:
            cell.warm_up()
    jobs: list[Any] = [cell for cell in cells if not cell.missing]
    if not jobs:
        raise BenchmarkError(f"nothing could be measured: {cells[0].missing}")
    jobs += gemms
    order = random.Random(setup.seed)
    for _ in tqdm(range(setup.repeats), "rounds", disable=None, leave=False):
        order.shuffle(jobs)
        for job in jobs:
            job.sample()


def _peak_of_setup(setup: dict[str, Any], dtype: str, operation: str, backend: str) -> int:
    return _peak(Problem(Setup(**setup), dtype), operation, backend)


def _peak(problem: Problem, operation: str, backend: str) -> int:
    run = problem.operation(operation, backend, keep_gradients=True)
    with use_backend(backend):
        return peak_of(run, problem.model, problem.setup.device)
