"""Matrix products on a CPU: whose are the fastest here, and how slow a dtype is without instructions of its own.

The choices follow from the CPU, and not from times: these vary on a busy machine, and with the choice the last bits of
a model's results would.
"""

import os
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["add_product", "cpu_slowdown", "is_emulated", "product", "takes_columns", "warn_if_emulated"]

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return left right of (M, K) and (K, N), into `out` if given; fastest if `right` is the transpose of rows."""
    if left.dtype == torch.float32 and _prefers_onednn():
        found = _onednn_product(left, right)
        return found if out is None else out.copy_(found)
    return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add left right to `total` (M, N) in place, and return it. `total` is float32 if the product is of less."""
    if total.dtype != left.dtype or (left.dtype == torch.float32 and _prefers_onednn()):
        return total.add_(product(left, right))
    return total.addmm_(left, right)


def takes_columns(dtype: torch.dtype) -> bool:
    """Return whether `product` is as fast if its left argument is the transpose of rows."""
    return dtype != torch.float32 or not _prefers_onednn()


def _onednn_product(left: Tensor, right: Tensor) -> Tensor:
    left = left if left.stride(1) == 1 else left.contiguous()  # else it takes three times as long
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")


@lru_cache(maxsize=1)
def _prefers_onednn() -> bool:
    """Return whether oneDNN has the faster float32 product.

    It is twice as fast as MKL's on AMD CPUs with AVX-512, which MKL does not use there. On other CPUs, MKL's is as fast
    or up to 1.3 times faster.
    """
    if not (_HAS_ONEDNN and torch.backends.mkl.is_available()):
        return _HAS_ONEDNN
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in _cpu_vendor()


def _cpu_vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return os.environ.get("PROCESSOR_IDENTIFIER", "")  # of Windows
    return next((line for line in lines if line.startswith("vendor_id")), "")


@lru_cache
def cpu_slowdown(dtype: torch.dtype) -> float:
    """Return how many times as long a matrix product takes on this CPU in `dtype` as in float32.

    bfloat16 takes some 100 times as long on a CPU without AVX-512, and half as long or less with instructions for it.
    """
    a = torch.ones(192, 192)
    low = a.to(dtype)
    theirs, single = _fastest(lambda: torch.mm(low, low), lambda: torch.mm(a, a))
    return theirs / single


def is_emulated(dtype: torch.dtype) -> bool:
    """Return whether this CPU has no instructions for a dtype of 16 bits, so that it takes far longer than float32.

    On AVX-512 without such instructions, oneDNN's emulation takes about as long as float32: this does not count.
    """
    if not dtype.is_floating_point or dtype.itemsize != 2:
        return False
    if not torch.backends.mkldnn.is_available():
        return cpu_slowdown(dtype) > 4
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return not getattr(torch.ops.mkldnn, name)()


@lru_cache
def warn_if_emulated(dtype: torch.dtype) -> None:
    """Warn of a dtype that `is_emulated`, once per process."""
    if is_emulated(dtype):
        name = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"this CPU has no {name} instructions: products take {cpu_slowdown(dtype):.0f} times as long as in "
            "float32; use model.float(), and no autocast",
            stacklevel=3,
        )


@torch.no_grad()
def _fastest(*runs: Callable[[], object], rounds: int = 5, enough: float = 0.05) -> list[float]:
    """Return the fewest seconds that each function took in alternating rounds, after one to warm up.

    One thread runs them: several would wait for each other on a busy machine. After `enough` seconds no round begins.
    """
    threads, best = torch.get_num_threads(), [float("inf")] * len(runs)
    torch.set_num_threads(1)
    try:
        with torch.autocast("cpu", enabled=False):
            for run in runs:
                run()
            begin = time.perf_counter()
            for _ in range(rounds):
                for index, run in enumerate(runs):
                    start = time.perf_counter()
                    run()
                    best[index] = min(best[index], time.perf_counter() - start)
                if time.perf_counter() - begin > enough:
                    break
    finally:
        torch.set_num_threads(threads)
    return best
