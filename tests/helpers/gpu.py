"""Where the tests marked `gpu` run: on a GPU, or with GPU_TESTS_ON=cpu in Triton's interpreter, as a rehearsal."""

import os

import pytest
import torch

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product: for deterministic mode

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]


def skip_in_rehearsal(needed: bool = True) -> None:
    """Skip a test without a GPU, if it needs one."""
    if needed and DEVICE == "cpu":
        pytest.skip("a rehearsal: needs a GPU")
