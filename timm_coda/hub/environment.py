"""Record the software versions and the hardware of a run."""

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

__all__ = ["__version__", "environment"]

__version__ = "0.2.0"


def environment() -> dict[str, str]:
    """Return versions, commit and hardware as strings, to record with a run's results."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "timm_coda": __version__}
    for name in ("torchvision", "timm", "accelerate", "datasets", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    root = Path(__file__).parents[2]
    if (root / ".git").exists():  # a git clone, not an installed package
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            ask = [
                "git",
                "--no-optional-locks",
                "-C",
                str(root),
                "describe",
                "--always",
                "--dirty",
                "--abbrev=40",
                "--exclude=*",
            ]
            versions["commit"] = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    threads = torch.get_num_threads()
    cpu += f", {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' if threads > 1 else ''}"
    hardware = {"cpu": cpu, "gpus": ", ".join(gpus) or "none"}
    return {**versions, "platform": platform.platform(), **hardware}
