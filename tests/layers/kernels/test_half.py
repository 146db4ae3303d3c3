"""float16: numbers inside a layer leave its range, the layer's output does not. Rounding to float16 is up to 5e-4."""

import warnings

import pytest
import torch
from torch import nn

import timm_coda
from helpers import relative_error
from timm_coda.layers import BatchNormUncentered2d, GlobalPool, Logits, PositionNorm2d, functional, reference
from timm_coda.layers.kernels.bcos_alignment import align
from timm_coda.layers.kernels.half import scaled_product

BOUND = 2e-3


def problem(scale: float) -> list[torch.Tensor]:
    """Inputs of size `scale` and weights of the size of the shipped ones: x, down, up, up_bias."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((1, 32, 6, 5), scale), ((16, 32, 3, 3), 0.6), ((3 * 16, 32, 3, 3), 0.6), ((3, 32, 3, 3), 0.6)
    return [(factor * torch.randn(size, generator=generator)).half() for size, factor in sizes]


def run(layer, tensors, frozen: bool, slope: float) -> list[torch.Tensor]:
    """The output, and the gradients for output gradients of size `slope`: of all tensors, or if frozen of x."""
    leaves = [tensor.clone().requires_grad_(n == 0 or not frozen) for n, tensor in enumerate(tensors)]
    y = layer(*leaves, padding=(1, 1), frozen=frozen)
    slopes = slope * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y, *torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], slopes.half().to(y.dtype))]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("scale", "slope"), [(400, 1), (100, 1e-3), (0.01, 1)])
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference", "triton"])
def test_dau(backend, scale, slope, autocast):
    """At 400, v^T p is 1e8 and |v|^2 is 6e10; with slopes of 1e-3, gradients inside the layer are 1e-8."""
    if backend == "triton":
        pytest.importorskip("triton", reason="needs Triton, which comes with CUDA builds of PyTorch")
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    tensors = problem(scale)
    given = [tensor.to(device, torch.float32 if autocast else None) for tensor in tensors]
    for frozen in (False, True):
        wanted = run(reference.dau_conv2d, [tensor.double() for tensor in tensors], frozen, slope)

        def layer(*arguments, **options):
            with timm_coda.use_backend(backend), torch.autocast(device, torch.float16, autocast):
                return functional.dau_conv2d(*arguments, **options)

        found = run(layer, given, frozen, slope)
        assert found[0].dtype == torch.float16
        for name, actual, right in zip(("y", "x", "down", "up", "up_bias"), found, wanted, strict=False):
            assert relative_error(actual, right) < BOUND, (name, frozen)


def test_dau_by_torch_script():
    tensors = problem(100)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)  # of newer PyTorch
        module = torch.jit.script(timm_coda.DAUConv2d(32, 3, padding=1, rank=16).half())
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), tensors[1:], strict=True):
            parameter.copy_(value)
    right = reference.dau_conv2d(*(tensor.double() for tensor in tensors), padding=(1, 1))
    assert relative_error(module(tensors[0]), right) < BOUND


@pytest.mark.parametrize("b", [2.0, 1.5])
@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("size", [1e-3, 1.0, 200.0])
def test_bcos_convolution(size, unit_norm, b):
    """With s as in B-cos v1, |cos| / s is near float16's smallest number; weights are far from norm 1."""
    generator = torch.Generator().manual_seed(0)
    x = (size * torch.rand(2, 64, 4, 4, generator=generator)).half()
    weight = ((30 if unit_norm else 0.05) * torch.randn(8, 64, 3, 3, generator=generator)).half()
    options = {"padding": (1, 1), "b": b, "scale": 0.1 if size < 1 else 300.0, "unit_norm": unit_norm}
    exact = [tensor.double().requires_grad_() for tensor in (x, weight)]
    low = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    wanted, found = reference.bcos_conv2d(*exact, **options), functional.bcos_conv2d(*low, **options)
    assert torch.equal(functional.bcos_conv2d(*low, **options, frozen=True), found)
    with torch.autocast("cpu", torch.float16):
        mixed = functional.bcos_conv2d(x.float(), weight.float(), **options)
    for actual in (found, mixed):
        assert actual.dtype == torch.float16 and relative_error(actual, wanted) < 2 * BOUND
    # Large enough that the gradients are within the range.
    slopes = 30 * options["scale"] * size**-0.5 * torch.randn(found.shape, generator=generator)
    right = torch.autograd.grad(wanted, exact, slopes.double())
    for actual, expected in zip(torch.autograd.grad(found, low, slopes.half()), right, strict=True):
        assert relative_error(actual, expected) < 2 * BOUND


def test_a_bcos_unit_without_weight_is_zero():
    """1e-12, which keeps the norm above 0, is 0 in float16."""
    weight = torch.zeros(2, 4, 1, 1, dtype=torch.float16)
    assert not functional.bcos_conv2d(torch.ones(1, 4, 2, 2).half(), weight).any()
    assert not functional.bcos_linear(torch.ones(1, 4).half(), weight[..., 0, 0]).any()


def test_frozen_alignment_equals_the_other_bit_for_bit():
    linear, squares = torch.randn(2, 8, 4, 4).half(), 1e3 * torch.rand(2, 1, 4, 4)
    assert torch.equal(align(linear.clone(), squares, 2.0, 300.0, True), align(linear, squares, 2.0, 300.0, False))


@pytest.mark.parametrize("size", [1e-4, 1.0, 500.0])
@pytest.mark.parametrize("layer", [BatchNormUncentered2d, PositionNorm2d])
def test_frozen_norms(layer, size):
    """Variances of 1e-8 and 2e5 are outside of float16's range."""
    x = (size * torch.randn(2, 16, 5, 5, generator=torch.Generator().manual_seed(0))).half()
    norm = layer(16).half()
    exact = layer(16).double()
    with norm.frozen_dynamics:
        assert relative_error(norm(x), exact(x.double())) < BOUND


def test_sums_of_votes():
    votes = torch.full((1, 2, 10, 10), 1000.0, dtype=torch.float16)  # 1e5 a class
    logits = nn.Sequential(GlobalPool("sum"), Logits(1e4, -2.0))(votes)
    assert logits.tolist() == [[8.0, 8.0]]


def test_scaled_product():
    left, right = torch.randn(5, 70), torch.randn(70, 6).half()
    left *= torch.tensor([1e-9, 1e-4, 1.0, 1e4, 0.0])[:, None]
    for actual, expected in zip(scaled_product(left, right), left.double() @ right.double(), strict=True):
        assert relative_error(actual, expected) < 1e-3
    assert scaled_product(left, right.bfloat16()).dtype == torch.bfloat16
