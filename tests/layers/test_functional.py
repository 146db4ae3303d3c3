"""The factorised computation against `reference.py`: values, all gradients, frozen mode, dtypes, edge cases."""

import pytest
import torch

from helpers import relative_error
from helpers.dau_cases import CASES, problem
from timm_coda import dau_conv2d, dau_linear
from timm_coda.layers import reference

NAMES = ("x", "down", "up", "up_bias")


def value_and_gradients(function, tensors, seed=1, **kwargs):
    y = function(*tensors, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    wanted = [t for t in tensors if t.requires_grad]
    return y, torch.autograd.grad(y, wanted, g, allow_unused=True)


@pytest.mark.parametrize("activation", ["squash", "l2"])
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case, activation):
    tensors, geometry = problem(case)
    y, gradients = value_and_gradients(dau_conv2d, tensors, **geometry, activation=activation)
    expected, expected_gradients = value_and_gradients(reference.dau_conv2d, tensors, **geometry, activation=activation)
    assert relative_error(y, expected) < 1e-12
    for name, actual, wanted in zip(NAMES, gradients, expected_gradients, strict=True):
        assert relative_error(actual, wanted) < 1e-11, name


@pytest.mark.parametrize("activation", ["squash", "l2"])
@pytest.mark.parametrize("case", CASES)
def test_frozen_gradient_is_the_dynamic_map(case, activation):
    tensors, geometry = problem(case)
    y, gradients = value_and_gradients(dau_conv2d, tensors, **geometry, activation=activation, frozen=True)
    expected, wanted = value_and_gradients(
        reference.dau_conv2d, tensors, **geometry, activation=activation, frozen=True
    )
    assert torch.equal(y, dau_conv2d(*tensors, **geometry, activation=activation)), "the value must not change"
    assert relative_error(y, expected) < 1e-12
    assert relative_error(gradients[0], wanted[0]) < 1e-12
    assert gradients[1:] == (None, None, None), "frozen weights have no gradient"


def test_second_derivatives():
    tensors, geometry = problem("stride")

    def scalar(*tensors):
        return dau_conv2d(*tensors, **geometry)

    assert torch.autograd.gradcheck(scalar, tensors)
    small = [t.detach()[:1].requires_grad_() if i == 0 else t for i, t in enumerate(tensors)]
    assert torch.autograd.gradgradcheck(scalar, small)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("activation", ["squash", "l2"])
def test_low_precision(dtype, bound, activation):
    tensors, geometry = problem("3x3")
    expected, wanted = value_and_gradients(dau_conv2d, tensors, **geometry, activation=activation)
    low = [t.detach().to(dtype).requires_grad_() for t in tensors]
    y, gradients = value_and_gradients(dau_conv2d, low, **geometry, activation=activation)
    assert y.dtype == dtype
    assert relative_error(y, expected) < bound
    for name, actual, exact in zip(NAMES, gradients, wanted, strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, exact) < bound, name


def test_norm_stays_float32_under_autocast():
    """The square of a weight of length 1e-3 is rounded away among bfloat16 products of size 1, but not in float32."""
    tensors, geometry = problem("3x3", torch.float32)
    expected, wanted = value_and_gradients(
        dau_conv2d, [t.detach().double().requires_grad_() for t in tensors], **geometry
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, gradients = value_and_gradients(dau_conv2d, tensors, **geometry)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < 2e-2
    for name, actual, exact in zip(NAMES, gradients, wanted, strict=True):
        assert actual.dtype == torch.float32
        assert relative_error(actual, exact) < 2e-2, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["squash", "l2"])
@pytest.mark.parametrize("zero", ["input", "input_and_bias", "weights"])
def test_zero_is_finite(zero, activation, dtype):
    tensors, geometry = problem("3x3", dtype)
    with torch.no_grad():
        for i in {"input": (0,), "input_and_bias": (0, 3), "weights": (2, 3)}[zero]:
            tensors[i].zero_()
    y, gradients = value_and_gradients(dau_conv2d, tensors, **geometry, activation=activation)
    assert torch.equal(y, torch.zeros_like(y))
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("frozen", [False, True])
def test_linear_is_a_convolution_of_single_positions(frozen):
    (x, down, up, bias), _ = problem("1x1")
    y, gradients = value_and_gradients(dau_conv2d, (x, down, up, bias), frozen=frozen)
    rows = x.detach().permute(0, 2, 3, 1).requires_grad_()
    flat = [t.detach().flatten(1).requires_grad_() for t in (down, up, bias)]
    z = dau_linear(rows, *flat, frozen=frozen)
    assert relative_error(z, y.permute(0, 2, 3, 1)) < 1e-14
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype).permute(0, 2, 3, 1)
    assert relative_error(torch.autograd.grad(z, rows, g)[0], gradients[0].permute(0, 2, 3, 1)) < 1e-12
    assert dau_linear(rows[0, 0, 0], *flat).shape == (10,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation='relu': choose one of 'squash', 'l2'"),
        ({"x": torch.ones(2, 5, 8, 8)}, r"expected input \(B, 6, H, W\), got \[2, 5, 8, 8\]"),
        ({"x": torch.ones(6, 8, 8)}, r"got \[6, 8, 8\]"),
        ({"x": torch.ones(1, 6, 2, 8), "padding": (0, 0)}, "smaller than the 3 pixels the kernel spans"),
        ({"up": torch.ones(7, 6, 3, 3)}, r"up has 7 rows, expected units \* rank = 5 \* 4"),
    ],
    ids=["activation", "channels", "no_batch", "too_small", "rows"],
)
def test_bad_input(change, message):
    tensors, geometry = problem("3x3", torch.float32)
    arguments = dict(zip(NAMES, tensors, strict=True), **geometry) | change
    with pytest.raises(ValueError, match=message):
        dau_conv2d(**arguments)
