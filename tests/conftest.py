"""Shared helpers: error norms, random DAU problems, the golden numbers' folder."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

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
