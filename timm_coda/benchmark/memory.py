"""Measure the peak memory of an operation; on a CPU, in a separate process."""

import contextlib
import gc
import importlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["extra_memory", "free_memory", "peak_growth", "peak_of"]

_CLEAR_REFS = Path("/proc/self/clear_refs")


def extra_memory(device: str, peak: Callable[[], int], measure: Callable[..., int], **order: Any) -> dict[str, Any]:
    """Return `extra_bytes`, the peak memory of an operation, or `memory_missing`, the reason why it is unknown.

    Args:
        device: "cuda" or "cpu"
        peak: measures the peak in this process; used for CUDA
        measure: measures the peak in a separate process; used for the CPU. A module-level function, called with `order`
        order: JSON-serialisable keyword arguments
    """
    if device == "cuda":
        try:
            return {"extra_bytes": peak()}
        except torch.OutOfMemoryError:
            return {"memory_missing": "out of memory with parameter gradients in memory"}
    message = {"module": measure.__module__, "name": measure.__name__, "order": order}
    message["threads"] = torch.get_num_threads()
    # Return large blocks to the system when they are freed: what glibc would retain varies from run to run.
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", f"from {__name__} import _process; _process()"]
    done = subprocess.run(command, input=json.dumps(message), capture_output=True, text=True, env=variables)
    if done.returncode == 0:
        return {"extra_bytes": json.loads(done.stdout.splitlines()[-1])}
    if done.returncode < 0:
        return {"memory_missing": f"killed by {signal.Signals(-done.returncode).name}"}
    return {"memory_missing": (done.stderr.strip().splitlines() or ["failed"])[-1]}


def _process() -> None:
    message = json.load(sys.stdin)
    torch.set_num_threads(message["threads"])
    measure = getattr(importlib.import_module(message["module"]), message["name"])
    print(json.dumps(measure(**message["order"])))


def peak_of(run: Callable[[], object], model: nn.Module, device: str) -> int:
    """Return `peak_growth` of an operation of the model, with parameter gradients already allocated."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # ones, because pages of zeros become resident only when written to
    if device == "cuda" or _CLEAR_REFS.exists():
        run()  # initialise libraries, compile
    return peak_growth(run, device)


def peak_growth(run: Callable[[], object], device: str) -> int:
    """Return the bytes by which memory grows at the peak of a call: allocated on CUDA, resident on a CPU."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        _CLEAR_REFS.write_text("5")  # resets the peak
    except OSError:  # not Linux: use the growth of the peak since the process started
        import resource

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return growth if sys.platform == "darwin" else growth * 1024
    before = _kilobytes("/proc/self/status", "VmRSS")
    run()
    return (_kilobytes("/proc/self/status", "VmHWM") - before) * 1024


def free_memory(device: str) -> float:
    """Return the free memory in bytes; infinity if unknown."""
    if device == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = math.inf
    with contextlib.suppress(OSError):
        free = _kilobytes("/proc/meminfo", "MemAvailable") * 1024
    with contextlib.suppress(OSError, ValueError):  # limit of the container; "max", not a number, if it has no limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free


def _kilobytes(path: str, name: str) -> int:
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(f"{name}:"))
