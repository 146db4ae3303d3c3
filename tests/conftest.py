"""Shared helpers: error norms, timm's own tests, the golden numbers' folder."""

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the CUDA kernels, on small problems, in Python
torch.set_num_threads(1)  # the problems here are tiny

SHARED = Path(__file__).parents[1].parent / "shared"


def relative_error(actual, expected) -> float:
    """|actual - expected| / |expected| in float64; inf for anything not finite."""
    actual, expected = (torch.as_tensor(t).detach().double().cpu() for t in (actual, expected))
    assert actual.shape == expected.shape, f"{list(actual.shape)} against {list(expected.shape)}"
    if not (torch.isfinite(actual).all() and torch.isfinite(expected).all()):
        return float("inf")
    scale = expected.norm().item()
    return (actual - expected).norm().item() / scale if scale else actual.norm().item()


@functools.cache
def fetch_timm_suite(script: Path) -> None:
    """The script downloads timm's tests when it is first called: one process at a time."""
    with FileLock(Path(tempfile.gettempdir()) / "timm_suite.lock"):
        command = [script, "timm_coda", "no_such_model", "--collect-only"]
        subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, check=False)


def run_timm_suite(models: str, *options: str, home: Path | None = None, skips: bool = False) -> None:
    """timm's own tests, unchanged, on the models of that pattern; none may fail, and none skip unless `skips`.

    Weights that timm would download are looked for in `home`/hub/checkpoints first.
    """
    script = SHARED / "tools" / "run_timm_suite.sh"
    if not script.exists():
        pytest.skip(f"{script} is not here")
    fetch_timm_suite(script)
    environment = os.environ | {"PYTHON": sys.executable} | ({"TORCH_HOME": str(home)} if home else {})
    command = [script, "timm_coda", models, "-q", "-rs", *options]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert skips or "skipped" not in run.stdout.splitlines()[-1], run.stdout[-2000:]


@pytest.fixture(scope="session")
def golden():
    """The module that makes the authors' weights by rule and loads their expected numbers."""
    folder = Path(os.environ.get("TIMM_CODA_GOLDEN", SHARED / "golden"))
    if not (folder / "golden.py").exists():
        pytest.skip(f"no golden numbers in {folder}: set TIMM_CODA_GOLDEN")
    spec = importlib.util.spec_from_file_location("golden", folder / "golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
