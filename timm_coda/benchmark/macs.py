"""Multiply-accumulates (MACs): how many a model needs per image, and how many this machine does per second."""

import contextlib
import functools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

__all__ = [
    "SAMPLE_SECONDS",
    "Call",
    "GemmRate",
    "Macs",
    "count_macs",
    "layer_calls",
    "seconds",
    "seconds_in_rounds",
    "share_of_products",
]

_Key = TypeVar("_Key")

SAMPLE_SECONDS = 0.1  # shorter calls are repeated until a sample lasts this long


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates per image in the matrix products of the factorised form (`functional.py`).

    Not counted are terms that are cheaper by a factor of the rank or more: the contraction with z, and 2 c^T z.
    """

    down: int = 0
    """z = B p: positions * r * K."""
    up: int = 0
    """A_d p: positions * D * r * K."""
    bias: int = 0
    """b_d^T p: positions * D * K."""
    quadratic: int = 0
    """z^T G_d z: positions * D * r * r."""
    per_forward: int = 0
    """Gram matrices G_d, D * r * r * K: once per forward pass for any batch size, so not part of any other number."""

    def __add__(self, other: "Macs") -> "Macs":
        return Macs(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def forward(self) -> int:
        return self.down + self.up + self.bias + self.quadratic

    @property
    def train(self) -> int:
        """Three forward passes by convention: the two gradients of a product cost as much as two products."""
        return 3 * self.forward

    def explain(self, targets: int = 1) -> int:
        """A forward pass and, per target, one product with `up` and one with its bias."""
        return self.forward + targets * (self.up + self.bias)

    def counts(self, targets: int) -> dict[str, int]:
        """Return all counts by name; `explain-all` explains `targets` classes."""
        found = {"forward": self.forward, "train": self.train, "explain": self.explain()}
        return {**asdict(self), **found, "explain-all": self.explain(targets), "published": self.published}

    @property
    def published(self) -> int:
        """Forward pass of the published formulation: z, A_d^T z, and w_d^T p, which costs as much as `bias`."""
        return self.down + self.up + self.bias


@dataclass(frozen=True)
class Call:
    """One call of a layer in a forward pass of one image."""

    name: str
    layer: Any
    input_shape: torch.Size
    positions: int

    @property
    def macs(self) -> Macs:
        n, r, (d, k) = self.positions, self.layer.rank, self.layer.up.bias.flatten(1).shape
        return Macs(n * r * k, n * d * r * k, n * d * k, n * d * r * r, d * r * r * k)


def layer_calls(model: Any, image_size: int | tuple[int, int]) -> list[Call]:
    """Return the calls of dynamic alignment layers in order, from a forward pass on the meta device."""
    calls = []

    def note(name: str, layer: Any, args: Any, output: Tensor) -> None:
        calls.append(Call(name, layer, args[0].shape, output.numel() // layer.up.bias.shape[0]))

    handles = [
        layer.register_forward_hook(lambda *seen, name=name: note(name, *seen))
        for name, layer in model.named_modules()
        if hasattr(layer, "frozen_dynamics") and hasattr(layer, "rank")
    ]
    if not handles:
        raise ValueError(
            f"{type(model).__name__} has no dynamic alignment layer: choose a CoDA-Net; compare a B-cos network "
            "with its ordinary counterpart (timm-coda benchmark bcos_resnet50 --against resnet50)"
        )
    try:
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        _run_on_meta(model, (model.in_chans, *size))
    finally:
        for handle in handles:
            handle.remove()
    return calls


@torch.no_grad()
def _run_on_meta(model: nn.Module, input_size: Sequence[int]) -> None:
    state = [*model.named_parameters(), *model.named_buffers()]
    shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in state}
    torch.func.functional_call(model, shapes, torch.empty(1, *input_size, device="meta"))


def count_macs(model: nn.Module, image_size: int | tuple[int, int]) -> dict[str, Macs]:
    """Count multiply-accumulates per image of each dynamic alignment layer, by name.

    `sum(count_macs(...).values(), Macs())` is the total.

    Args:
        model: a CoDA-Net; its weights do not matter, so it may be on the meta device
        image_size: pixels, one number for both sides or (height, width)

    Raises:
        ValueError: the model has no such layer, or the image is smaller than the model's stride.
    """
    counts: dict[str, Macs] = {}
    for call in layer_calls(model, image_size):
        counts[call.name] = counts.get(call.name, Macs()) + call.macs
    return counts


def seconds(run: Callable[[], object], calls: int, device: str) -> float:
    """Return the seconds per call, as the mean over `calls` calls."""
    wait = torch.cuda.synchronize if device == "cuda" else int
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return (time.perf_counter() - start) / calls


def seconds_in_rounds(
    runs: Mapping[_Key, Callable[[], object]], repeats: int, seed: int, device: str
) -> dict[_Key, list[float]]:
    """Return seconds per call of each function, one sample per round. A round runs each once, in random order."""
    jobs = []
    for key, run in tqdm(runs.items(), "warming up", disable=None, leave=False):
        seconds(run, 1, device)  # fills caches
        jobs.append((key, run, math.ceil(min(SAMPLE_SECONDS / seconds(run, 1, device), 1000))))
    samples: dict[_Key, list[float]] = {key: [] for key in runs}
    order = random.Random(seed)
    for _ in tqdm(range(repeats), "rounds", disable=None, leave=False):
        order.shuffle(jobs)
        for key, run, calls in jobs:
            samples[key].append(seconds(run, calls, device))
    return samples


class GemmRate:
    """Rate of square matrix products (GEMM) on this machine in a dtype: the best of several sizes in each round."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.device = device
        # torch.mm, and oneDNN, which convolutions use: it is twice as fast on processors that MKL does not support.
        kinds = ["mm"] + ["onednn"] * (
            device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
        )
        self.rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        """Multiply-accumulates per second, one sample per round."""
        self.products: list[tuple[str, int, Callable[[], object], int]] = []
        with self._precision():
            for kind in kinds:
                for size in (1024, 2048, 4096, 8192):
                    a = torch.rand(size, size, device=device).to(dtype)
                    run = functools.partial(torch.mm, a, a)
                    if kind == "onednn":
                        run = functools.partial(F.linear, a.to_mkldnn(), a)
                    seconds(run, 1, device)
                    once = seconds(run, 1, device)
                    self.products.append((kind, size, run, math.ceil(SAMPLE_SECONDS / once)))
                    if once > SAMPLE_SECONDS:  # the next size would take a second
                        break

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        """Use TF32 for float32 products on CUDA if convolutions do, so that both are measured alike."""
        if self.device == "cpu":
            yield
            return
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("high" if torch.backends.cudnn.allow_tf32 else before)
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def sample(self) -> None:
        with self._precision(), torch.no_grad():
            rates = [(kind, n**3 / seconds(run, calls, self.device)) for kind, n, run, calls in self.products]
        for kind, samples in self.rates.items():
            samples.append(max(rate for name, rate in rates if name == kind))

    @property
    def best(self) -> list[float]:
        """Rate of the faster kind of product, one sample per round."""
        return [max(rates) for rates in zip(*self.rates.values(), strict=True)]


def share_of_products(
    model: nn.Module, input_size: Sequence[int], images_per_second: float, *, dtype: torch.dtype, device: str
) -> float:
    """Return the multiply-accumulates of a training, as a fraction of those of matrix products on this device.

    A model without dynamic alignment layers is counted by PyTorch's `FlopCounterMode`.

    Args:
        model: the model that is trained, on any device
        input_size: channels, height and width of an image
        images_per_second: speed of the training
        dtype: of the products in the training
        device: type of the device of the training
    """
    try:
        height, width = input_size[1:]
        macs = sum(count_macs(model, (height, width)).values(), Macs()).train
    except ValueError:
        with FlopCounterMode(display=False) as counter:
            _run_on_meta(model, input_size)
        macs = 3 * counter.get_total_flops() // 2
    rate = GemmRate(dtype, device)
    rate.sample()
    return macs * images_per_second / rate.best[0]
