"""B-cos operations and layers against `reference.py`, and `reference.py` against explicit loops, in float64."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

from helpers import relative_error
from timm_coda import BcosConv2d, BcosLinear, bcos_conv2d, bcos_linear, explanation_mode
from timm_coda.layers import reference
from timm_coda.layers.bcos import BatchNormUncentered2d, EncodedBcosConv2d, PositionNorm2d

# name: input (B, C, H, W), outputs, kernel, options
CASES = {
    "3x3": ((2, 6, 8, 8), 5, (3, 3), {"padding": (1, 1)}),
    "1x1_strided": ((2, 4, 7, 5), 3, (1, 1), {"stride": (2, 2)}),
    "1x1_padded": ((1, 3, 4, 4), 2, (1, 1), {"padding": (1, 1)}),
    "stem": ((1, 6, 20, 17), 4, (7, 7), {"stride": (2, 2), "padding": (3, 3)}),
    "rectangular_scaled": ((2, 3, 11, 6), 4, (5, 2), {"stride": (2, 1), "padding": (2, 0), "scale": 0.3}),
    "dilated": ((1, 2, 9, 9), 3, (3, 3), {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)}),
    "groups": ((2, 6, 7, 7), 4, (3, 3), {"padding": (1, 1), "groups": 2}),
    "depthwise": ((2, 4, 9, 9), 4, (7, 7), {"padding": (3, 3), "groups": 4}),
    "max_out": ((2, 3, 6, 6), 4, (3, 3), {"padding": (1, 1), "max_out": 2, "scale": 0.17}),
    "max_out_groups_dilated": ((1, 4, 8, 8), 6, (3, 3), {"dilation": (2, 2), "groups": 2, "max_out": 3}),
    "free_weights": ((2, 3, 6, 6), 4, (3, 3), {"unit_norm": False}),
    "norm_eps": ((2, 3, 6, 6), 4, (3, 3), {"norm_eps": 0.3}),
    "b1": ((2, 3, 6, 6), 4, (3, 3), {"b": 1.0, "max_out": 2, "scale": 2.0}),
    "b1.5": ((2, 3, 6, 6), 4, (3, 3), {"b": 1.5, "scale": 0.3, "max_out": 2}),
    "b2.5_groups": ((2, 4, 6, 6), 4, (3, 3), {"b": 2.5, "groups": 2, "unit_norm": False}),
    "more_weights_than_outputs": ((1, 16, 4, 4), 8, (3, 3), {}),
    "one_number": ((1, 1, 1, 1), 1, (1, 1), {}),
}


def problem(case, dtype=torch.float64):
    shape, units, kernel, options = CASES[case]
    generator = torch.Generator().manual_seed(0)
    weight = (units * options.get("max_out", 1), shape[1] // options.get("groups", 1), *kernel)
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, weight)]
    return [t.to(dtype).requires_grad_() for t in tensors], options


def by_hand(
    x,
    weight,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups=1,
    b=2.0,
    max_out=1,
    scale=1.0,
    unit_norm=True,
    norm_eps=1e-6,
):
    """Compute one position and one unit at a time."""
    candidates, channels, kh, kw = weight.shape
    units = candidates // max_out
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    rows = range(0, x.shape[2] - dilation[0] * (kh - 1), stride[0])
    columns = range(0, x.shape[3] - dilation[1] * (kw - 1), stride[1])
    y = torch.empty(len(x), units, len(rows), len(columns), dtype=x.dtype)
    for n in range(len(x)):
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                for d in range(units):
                    first = d * groups // units * channels
                    patch = x[n, first : first + channels, row:, column:]
                    patch = patch[:, : dilation[0] * kh : dilation[0], : dilation[1] * kw : dilation[1]]
                    products = []
                    for w in weight[d * max_out : (d + 1) * max_out]:
                        w = w / w.square().sum().sqrt() if unit_norm else w
                        products.append((w * patch).sum())
                    out = max(products)
                    norm = (patch.square().sum() + norm_eps).sqrt()
                    if b == 2:
                        out = out * out.abs() / norm
                    elif b != 1:
                        out = out * ((out / norm).abs() + 1e-6) ** (b - 1)
                    y[n, d, i, j] = out / scale
    return y


@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_formula(case):
    tensors, options = problem(case)
    tensors = [t.detach() for t in tensors]
    assert relative_error(reference.bcos_conv2d(*tensors, **options), by_hand(*tensors, **options)) < 1e-14


@pytest.mark.parametrize("case", CASES)
def test_fast_form_equals_the_reference(case):
    tensors, options = problem(case)
    y, expected = bcos_conv2d(*tensors, **options), reference.bcos_conv2d(*tensors, **options)
    assert relative_error(y, expected) < 1e-13
    grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(y, tensors, grad)
    for ours, theirs in zip(found, torch.autograd.grad(expected, tensors, grad), strict=True):
        assert relative_error(ours, theirs) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_frozen_backward_is_the_transposed_dynamic_weight(case):
    (x, weight), options = problem(case)
    y = bcos_conv2d(x, weight, **options, frozen=True)
    assert torch.equal(y, bcos_conv2d(x, weight, **options)), "the value depends on the switch"
    grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    dx, dw = torch.autograd.grad(y, (x, weight), grad, allow_unused=True)
    expected = torch.autograd.grad(reference.bcos_conv2d(x, weight, **options, frozen=True), x, grad)[0]
    assert relative_error(dx, expected) < 1e-13
    assert dw is None


@pytest.mark.parametrize("case", ["3x3", "groups", "depthwise", "max_out", "b1.5", "more_weights_than_outputs"])
def test_second_derivatives(case):
    (x, weight), options = problem(case)
    x = x[:1, :, :4, :4].detach().requires_grad_()
    options = options | ({"padding": (3, 3)} if case == "depthwise" else {"padding": (1, 1)})
    assert torch.autograd.gradcheck(lambda x, w: bcos_conv2d(x, w, **options), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x, w: bcos_conv2d(x, w, **options).sum((2, 3)), (x, weight))


@pytest.mark.parametrize("options", [{}, {"max_out": 2, "scale": 0.5}, {"b": 1.5}, {"unit_norm": False}, {"b": 1.0}])
def test_linear_is_the_convolution_of_one_pixel(options):
    torch.manual_seed(0)
    layer = BcosLinear(5, 4, **options).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    pixels = x.reshape(6, 5, 1, 1)
    expected = reference.bcos_conv2d(pixels, layer.weight[:, :, None, None], **options).view(2, 3, 4)
    assert relative_error(layer(x), expected) < 1e-13
    assert relative_error(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (layer(x), expected))) < 1e-12


@pytest.mark.parametrize("b", [1.0, 1.5, 2.0, 2.5])
def test_zero_input_and_zero_weight_are_finite(b):
    for x, w in (
        (torch.zeros(1, 2, 3, 3), torch.randn(2, 2, 3, 3)),
        (torch.randn(1, 2, 3, 3), torch.zeros(2, 2, 3, 3)),
    ):
        tensors = [x.requires_grad_(), w.requires_grad_()]
        y = bcos_conv2d(*tensors, b=b)
        assert y.abs().max() == 0
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.sum(), tensors))


@pytest.mark.parametrize("case", ["3x3", "groups", "max_out", "b1.5", "more_weights_than_outputs"])
@pytest.mark.parametrize("frozen", [False, True])
def test_bfloat16_and_autocast_keep_their_precision(case, frozen):
    (x, weight), options = problem(case)
    expected = bcos_conv2d(x, weight, **options)
    low = bcos_conv2d(x.bfloat16(), weight.bfloat16(), **options, frozen=frozen)
    assert low.dtype == torch.bfloat16
    assert relative_error(low, expected) < 0.02
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = bcos_conv2d(x.float(), weight.float(), **options, frozen=frozen)
    assert mixed.dtype == torch.bfloat16
    assert relative_error(mixed, expected) < 0.02
    gradient = torch.autograd.grad(mixed.float().sum(), x)[0]
    exact = torch.autograd.grad(bcos_conv2d(x, weight, **options, frozen=frozen).sum(), x)[0]
    assert relative_error(gradient, exact) < 0.05


def test_norm_is_not_rounded_to_bfloat16():
    x = torch.full((1, 4096, 1, 1), 0.5, dtype=torch.bfloat16)  # 4096 equal squares: a bfloat16 sum would stall at 64
    weight = torch.ones(1, 4096, 1, 1, dtype=torch.bfloat16)
    assert bcos_conv2d(x, weight).item() == 32, "w^T p = |p| = 32 for w along p"


def test_channels_last_changes_nothing():
    (x, weight), options = problem("groups")
    x, weight = x.detach(), weight.detach()
    y = bcos_conv2d(x.to(memory_format=torch.channels_last), weight.to(memory_format=torch.channels_last), **options)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, bcos_conv2d(x, weight, **options)) < 1e-13


@pytest.mark.parametrize(
    "layer",
    [
        BcosConv2d(4, 6, 3, padding=1, max_out=2),
        BcosConv2d(4, 6, 3, groups=2, b=1.5, scale=0.5),
        EncodedBcosConv2d(2, 4, 3, dilation=2),
        torch.nn.Sequential(BcosConv2d(4, 4), BatchNormUncentered2d(4), PositionNorm2d(4)),
    ],
    ids=["max_out", "groups_b1.5", "encoded_dilated", "norms"],
)
def test_compiled_exported_and_scripted(layer):
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double().eval()
    x = torch.rand(2, 4, 8, 8, dtype=torch.float64)
    expected = layer(x)
    assert relative_error(torch.export.export(layer, (x,)).module()(x), expected) < 1e-12
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)  # of newer PyTorch
        assert relative_error(torch.jit.script(layer)(x), expected) < 1e-12
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x.requires_grad_()

    def gradient(run):
        return torch.autograd.grad(run(x)[:, 0].sum(), x)[0]

    free = gradient(layer)
    with explanation_mode(layer):
        frozen = gradient(layer)
    assert relative_error(frozen, free) > 0.1
    assert relative_error(gradient(compiled), free) < 1e-12
    with explanation_mode(compiled):
        assert relative_error(gradient(compiled), frozen) < 1e-12


def test_batch_norm_only_rescales():
    torch.manual_seed(0)
    norm = BatchNormUncentered2d(5, momentum=0.25).double()
    torch.nn.init.normal_(norm.weight)
    x = (2 + 3 * torch.randn(3, 5, 4, 6, dtype=torch.float64)).requires_grad_()
    grad = torch.randn_like(x)
    var = x.var((0, 2, 3), unbiased=False)
    expected = x * (norm.weight / (var + norm.eps).sqrt())[:, None, None]
    y = norm(x)
    assert relative_error(y, expected) < 1e-13
    inputs = (x, norm.weight)
    for ours, theirs in zip(*(torch.autograd.grad(t, inputs, grad) for t in (y, expected)), strict=True):
        assert relative_error(ours, theirs) < 1e-12
    assert relative_error(norm.running_var, 0.75 + 0.25 * var) < 1e-13
    assert torch.autograd.gradgradcheck(lambda x, w: norm.train()(x[:1, :, :2, :2]), inputs)
    norm.eval()
    assert relative_error(norm(x), x * (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None]) < 1e-13
    assert norm(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm", [BatchNormUncentered2d(5), PositionNorm2d(5)], ids=["bnu", "pn"])
def test_norms_are_linear_while_frozen(norm, training):
    torch.manual_seed(0)
    norm = copy.deepcopy(norm).double().train(training)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    value = copy.deepcopy(norm)(x)
    buffers = copy.deepcopy(dict(norm.named_buffers()))
    with explanation_mode(norm):
        y = norm(x)
        assert relative_error(y, value) < 1e-13, "the value depends on the switch"
        direction = torch.randn_like(x)
        rows = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
        matrix = torch.stack([torch.autograd.grad(y, x, row, retain_graph=True)[0].flatten() for row in rows])
    assert relative_error((matrix @ x.flatten()).view_as(y), y) < 1e-13
    axes = (0, 2, 3) if isinstance(norm, BatchNormUncentered2d) else 1
    var = norm.running_var[:, None, None] if "running_var" in buffers and not training else None
    if var is None:
        var = x.var(axes, unbiased=False, keepdim=True)
    centre = direction if isinstance(norm, BatchNormUncentered2d) else direction - direction.mean(1, keepdim=True)
    expected = centre / (var + norm.eps).sqrt() * norm.weight[:, None, None]
    assert relative_error((matrix @ direction.flatten()).view_as(y), expected) < 1e-12
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in norm.named_buffers())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b": 0.5}, "b=0.5: a B-cos layer needs at least 1"),
        ({"max_out": 0}, "max_out=0"),
        ({"scale": 0}, "scale=0: must be above 0"),
        ({"groups": 2}, "groups=2 does not divide 3 input and 2 output channels"),
        ({"out_channels": 0}, "units=0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BcosConv2d(**{"in_channels": 3, "out_channels": 2} | arguments)


def test_bad_inputs():
    layer = BcosConv2d(3, 2, 5)
    with pytest.raises(ValueError, match=r"expected input \(B, 3, H, W\), got \[1, 4, 9, 9\]"):
        layer(torch.rand(1, 4, 9, 9))
    with pytest.raises(ValueError, match="smaller than the 5 pixels the kernel spans"):
        layer(torch.rand(1, 3, 4, 9))
    with pytest.raises(ValueError, match=r"expected input \(..., 3\), got \[2, 4\]"):
        bcos_linear(torch.rand(2, 4), torch.rand(2, 3))
    assert "3, 2, kernel_size=(5, 5), stride=(1, 1), b=2" in repr(layer)
