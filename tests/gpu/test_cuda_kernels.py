"""The CUDA kernels on a GPU against `reference.py` in float64: pytest -m gpu.

tests/layers/kernels/test_dau_backends.py runs the same kernels on small problems anywhere, in Triton's interpreter.
GPU_TESTS_ON=cpu runs these tests in it, too, without bfloat16: a rehearsal.
"""

import pytest
import torch

from helpers import relative_error
from helpers.dau_cases import NAMES, assert_equals_reference, gradients, random_problem
from helpers.gpu import DEVICE, needs_gpu, skip_in_rehearsal

pytestmark = needs_gpu

# name: input (B, C, H, W), units, rank, kernel, stride, padding, dilation
CASES = {
    "rank_8": ((3, 6, 17, 15), 16, 8, 3, 1, 1, 1),
    "rank_16": ((2, 16, 20, 20), 33, 16, 3, 2, 1, 1),
    "rank_32": ((4, 16, 32, 32), 16, 32, 3, 1, 1, 1),
    "rank_64": ((2, 64, 16, 16), 64, 64, 3, 1, 1, 1),
    "rank_128": ((2, 8, 9, 11), 5, 128, 3, 1, 1, 1),
    "rank_256": ((2, 5, 9, 11), 3, 256, 3, 1, 1, 1),
    "head": ((8, 64, 8, 8), 10, 64, 1, 1, 0, 1),
    "dilated": ((1, 3, 19, 18), 4, 16, 3, 1, 2, 2),
    "large_stem": ((2, 6, 41, 37), 7, 32, 7, 4, 3, 1),
    "one_position": ((1, 2, 3, 3), 1, 16, 3, 1, 0, 1),
    "no_position": ((0, 6, 8, 8), 5, 32, 3, 1, 1, 1),
}
# Of tensors and of products.
PRECISIONS = {
    "float32": (torch.float32, False, 1e-5),
    "tf32": (torch.float32, True, 5e-3),
    "float16": (torch.float16, True, 5e-3),
    "bfloat16": (torch.bfloat16, True, 2e-2),
}


@pytest.fixture
def tf32():
    """Restores torch's setting."""
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("activation", ["squash", "l2"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_equals_reference(case, precision, activation, layout, tf32):
    from timm_coda.layers.kernels import dau_triton

    shape, units, rank, kernel, *pairs = CASES[case]
    skip_in_rehearsal(precision == "bfloat16")
    dtype, torch.backends.cuda.matmul.allow_tf32, bound = PRECISIONS[precision]
    options = [*((n, n) for n in pairs), activation]
    tensors = [
        t.to(DEVICE, dtype, memory_format=layout).requires_grad_() for t in random_problem(shape, units, rank, kernel)
    ]
    assert_equals_reference(dau_triton.dau_conv2d, tensors, options, bound)


def test_more_numbers_than_32_bits_count():
    """Patches (N, K) with N K > 2^31: each image alone gives the same."""
    from timm_coda.layers.kernels import dau_triton

    skip_in_rehearsal()
    torch.manual_seed(0)
    x = torch.randn(4, 64, 968, 968, device=DEVICE, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    assert x.shape[0] * x.shape[2] * x.shape[3] * 576 > 2**31
    weights = [t.to(DEVICE, torch.bfloat16).requires_grad_() for t in random_problem((1, 64, 3, 3), 3, 8, 3)[1:]]

    def run(images):
        y = dau_triton.dau_conv2d(images, *weights, (1, 1), (1, 1), (1, 1), "squash", False)
        return y.detach(), torch.autograd.grad(y.float().square().sum(), [images, *weights])

    y, (dx, *whole) = run(x)
    parts = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
    for n in range(len(x)):
        y_alone, (dx_alone, *part) = run(x[n : n + 1].detach().requires_grad_())
        assert torch.equal(y[n : n + 1], y_alone) and torch.equal(dx[n : n + 1], dx_alone), n
        for total, one in zip(parts, part, strict=True):
            total += one.float()
    for name, actual, right in zip(NAMES[1:], whole, parts, strict=True):
        assert relative_error(actual, right) < 2e-2, name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_same_bits_twice(precision):
    """Without torch.use_deterministic_algorithms: the kernels have no atomic sums."""
    from timm_coda.layers.kernels import dau_triton

    skip_in_rehearsal(precision == "bfloat16")
    shape = (16, 16, 32, 32)
    dtype = PRECISIONS[precision][0]
    tensors = [t.to(DEVICE, dtype).requires_grad_() for t in random_problem(shape, 16, 32, 3)]
    found = []
    for _ in range(2):
        y = dau_triton.dau_conv2d(*tensors, (1, 1), (1, 1), (1, 1), "squash", False)
        found.append([y, *gradients(y, tensors)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rank", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_tile_gives_the_same(rank, precision, monkeypatch):
    """What tuning may choose: all tiles, up to the order of sums."""
    from timm_coda.layers.kernels import dau_triton, tiles

    skip_in_rehearsal(precision == "bfloat16")
    dtype, _, bound = PRECISIONS[precision]
    capability = torch.cuda.get_device_capability() if DEVICE == "cuda" else (9, 0)
    tensors = [t.to(DEVICE, dtype).requires_grad_() for t in random_problem((2, 16, 19, 17), 11, rank, 3)]
    seen = {}

    def launch(problem, device, run):
        seen[problem.kernel] = tiles.candidates(problem, capability)
        choices = seen[problem.kernel]
        return run(choices[min(number, len(choices) - 1)])

    monkeypatch.setattr(dau_triton, "launch", launch)
    results = []
    number = 0
    while number == 0 or number < max(map(len, seen.values())):
        y = dau_triton.dau_conv2d(*tensors, (1, 1), (1, 1), (1, 1), "squash", False)
        results.append([y, *gradients(y, tensors)])
        number += 1
    assert set(seen) == {"norm", "contract", "code", "data", "weight"}
    for result in results[1:]:
        for name, actual, right in zip(("y", *NAMES), result, results[0], strict=True):
            assert relative_error(actual, right) < bound / 2, name
