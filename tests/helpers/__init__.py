"""What tests of several rooms share."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def cifar10_folder() -> Path:
    """The folder of CIFAR-10's parquet files, in TIMM_CODA_CIFAR10; skips where there is none."""
    folder = Path(os.environ.get("TIMM_CODA_CIFAR10", ROOT.parent / "shared/data/cifar10"))
    if not (folder / "test.parquet").exists():
        pytest.skip(
            "no CIFAR-10: set TIMM_CODA_CIFAR10 to a folder of test.parquet and train-0.parquet, from "
            "https://huggingface.co/datasets/uoft-cs/cifar10"
        )
    return folder


def relative_error(actual, expected) -> float:
    """|actual - expected| / |expected| in float64; inf for anything not finite."""
    actual, expected = (torch.as_tensor(t).detach().double().cpu() for t in (actual, expected))
    assert actual.shape == expected.shape, f"{list(actual.shape)} against {list(expected.shape)}"
    if not (torch.isfinite(actual).all() and torch.isfinite(expected).all()):
        return float("inf")
    scale = expected.norm().item()
    return (actual - expected).norm().item() / scale if scale else actual.norm().item()
