"""Random DAU problems of many shapes, shared by the tests of every implementation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from timm_coda.layers import reference

from . import relative_error

NAMES = ("x", "down", "up", "up_bias")
# name: input (B, C, H, W), units, rank, kernel, stride, padding, dilation
CASES = {
    "3x3": ((2, 6, 8, 8), 5, 4, (3, 3), (1, 1), (1, 1), (1, 1)),
    "stride": ((2, 4, 9, 7), 3, 2, (3, 3), (2, 2), (1, 1), (1, 1)),
    "1x1": ((3, 8, 5, 5), 10, 6, (1, 1), (1, 1), (0, 0), (1, 1)),
    "one_position": ((1, 3, 4, 4), 2, 3, (4, 4), (1, 1), (0, 0), (1, 1)),
    "one_pixel_one_unit_rank_1": ((1, 2, 1, 1), 1, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    "rectangular": ((2, 3, 11, 6), 4, 5, (5, 2), (2, 1), (2, 0), (1, 1)),
    "dilated": ((1, 2, 9, 9), 3, 4, (3, 3), (1, 2), (2, 1), (2, 1)),
    "large_stem": ((1, 6, 20, 20), 16, 12, (7, 7), (3, 3), (3, 3), (1, 1)),
}


def problem(case: str, dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], dict]:
    """Leaf tensors x, down, up, up_bias and the keyword arguments of a case, always the same."""
    shape, units, rank, kernel, stride, padding, dilation = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def leaf(*size: int, scale: float = 1.0) -> torch.Tensor:
        values = scale * torch.randn(*size, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    channels = shape[1]
    inputs = channels * kernel[0] * kernel[1]
    tensors = [
        leaf(*shape),
        leaf(rank, channels, *kernel, scale=inputs**-0.5),
        leaf(units * rank, channels, *kernel, scale=rank**-0.5),
        leaf(units, channels, *kernel, scale=0.5),
    ]
    return tensors, {"stride": stride, "padding": padding, "dilation": dilation}


def random_problem(shape: tuple[int, ...], units: int, rank: int, kernel: int) -> list[Tensor]:
    """Tensors x, down, up, up_bias in float32, always the same."""
    generator = torch.Generator().manual_seed(0)
    inputs = shape[1] * kernel**2
    sizes = [
        (shape, 1.0),
        ((rank, shape[1], kernel, kernel), inputs**-0.5),
        ((units * rank, shape[1], kernel, kernel), rank**-0.5),
        ((units, shape[1], kernel, kernel), 0.5),
    ]
    return [scale * torch.randn(size, generator=generator) for size, scale in sizes]


def gradients(y: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients for a random gradient of y, always the same."""
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad(y, tensors, g.to(y.device, y.dtype))


def assert_equals_reference(dau_conv2d: Callable[..., Tensor], tensors: list[Tensor], options: Any, bound: float):
    """Compare output, gradients, and frozen output and gradient with `reference.py` in float64."""
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = reference.dau_conv2d(*exact, *options)
    y = dau_conv2d(*tensors, *options, frozen=False)
    assert y.dtype == tensors[0].dtype
    assert relative_error(y, expected) < bound
    for name, actual, right in zip(NAMES, gradients(y, tensors), gradients(expected, exact), strict=True):
        assert relative_error(actual, right) < bound, name
    frozen = dau_conv2d(tensors[0], *(t.detach() for t in tensors[1:]), *options, frozen=True)
    assert torch.equal(frozen, y)
    right = gradients(reference.dau_conv2d(*exact, *options, frozen=True), exact[:1])[0]
    assert relative_error(gradients(frozen, tensors[:1])[0], right) < bound
