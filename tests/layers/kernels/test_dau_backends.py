"""Fast backends against `reference.py`, and as operators: compile, export, vmap, double backward, autocast."""

import json
import os
import subprocess
import sys

import pytest
import torch

import timm_coda
from helpers import relative_error
from helpers.dau_cases import CASES, NAMES, assert_equals_reference, gradients, problem, random_problem
from timm_coda.layers import functional, reference
from timm_coda.layers.kernels import dau_cpu, dau_torch, products, tiles

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("block", ["whole", "tiny", "forgetful"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("activation", ["squash", "l2"])
@pytest.mark.parametrize("case", CASES)
def test_cpu_equals_reference(case, activation, layout, block, monkeypatch):
    if block == "tiny":  # small blocks: a few rows of one image, or a few positions
        monkeypatch.setattr(dau_cpu, "_positions", lambda a, rank: 5)
    if block == "forgetful":  # backward recomputes U
        monkeypatch.setattr(dau_cpu, "_KEPT", 0)
    exact, options = problem(case)
    options = [*options.values(), activation]
    expected = reference.dau_conv2d(*exact, *options)
    wanted = gradients(expected, exact)
    tensors = [t.detach().to(memory_format=FORMATS[layout]).requires_grad_() for t in exact]
    y = dau_cpu.dau_conv2d(*tensors, *options, frozen=False)
    assert relative_error(y, expected) < 1e-12
    for name, actual, right in zip(NAMES, gradients(y, tensors), wanted, strict=True):
        assert relative_error(actual, right) < 1e-11, name
    frozen = dau_cpu.dau_conv2d(tensors[0], *(t.detach() for t in tensors[1:]), *options, frozen=True)
    assert torch.equal(frozen, y)
    wanted = gradients(reference.dau_conv2d(*exact, *options, frozen=True), exact[:1])
    assert relative_error(gradients(frozen, tensors[:1])[0], wanted[0]) < 1e-12


def test_no_image_at_all():
    tensors, options = problem("3x3")
    x = tensors[0].detach()[:0].requires_grad_()
    y = dau_cpu.dau_conv2d(x, *tensors[1:], *options.values(), activation="squash", frozen=False)
    assert y.shape == (0, 5, 8, 8)
    for gradient, tensor in zip(gradients(y, (x, *tensors[1:])), (x, *tensors[1:]), strict=True):
        assert gradient.shape == tensor.shape and not gradient.any()


@pytest.mark.parametrize("layout", FORMATS)
def test_memory_format_is_kept(layout):
    tensors, options = problem("3x3")
    x = tensors[0].detach().to(memory_format=FORMATS[layout]).requires_grad_()
    y = dau_cpu.dau_conv2d(x, *tensors[1:], *options.values(), activation="squash", frozen=False)
    assert y.is_contiguous(memory_format=FORMATS[layout])
    assert gradients(y, x)[0].is_contiguous(memory_format=FORMATS[layout])


@pytest.mark.parametrize("kernel", [1, 3])
def test_gradients_have_the_strides_of_their_weights(kernel):
    """Also along axes with one element, as in a 1x1 kernel: DDP compares the numbers, and warns."""
    torch.manual_seed(0)
    layer = timm_coda.DAUConv2d(8, 4, kernel, rank=2)
    layer(torch.rand(2, 8, 5, 5)).sum().backward()
    for name, weight in layer.named_parameters():
        assert weight.grad is not None and weight.grad.stride() == weight.stride(), name


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_images_need_no_gradient_for_the_weights_to_have_theirs(name, request):
    """As in training of the first layer, where the gradient of the images is not computed."""
    kernels = dau_cpu if name == "cpu" else request.getfixturevalue("cuda_kernels")
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 3, 6, 5), (16, 3, 3, 3), (64, 3, 3, 3), (4, 3, 3, 3)
    x, *weights = (torch.randn(size, generator=generator).to(device) for size in sizes)
    weights = [weight.requires_grad_() for weight in weights]

    def run(images):
        return kernels.dau_conv2d(images, *weights, (1, 1), (1, 1), (1, 1), "squash", False)

    for alone, beside in zip(
        gradients(run(x), weights), gradients(run(x.clone().requires_grad_()), weights), strict=True
    ):
        assert torch.equal(alone, beside)


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_cpu_equals_reference_in_float32_with_either_product(case, onednn, monkeypatch):
    """The product that this CPU does not prefer is somebody else's."""
    monkeypatch.setattr(products, "_prefers_onednn", lambda: onednn)
    exact, options = problem(case)
    options = [*options.values(), "squash"]
    tensors = [t.detach().float().requires_grad_() for t in exact]
    single = [t.detach().double().requires_grad_() for t in tensors]
    expected = reference.dau_conv2d(*single, *options)
    y = dau_cpu.dau_conv2d(*tensors, *options, frozen=False)
    assert relative_error(y, expected) < 1e-6
    for name, actual, right in zip(NAMES, gradients(y, tensors), gradients(expected, single), strict=True):
        assert relative_error(actual, right) < 1e-5, name


@pytest.mark.parametrize("activation", ["squash", "l2"])
def test_bfloat16(activation):
    exact, options = problem("large_stem")
    options = [*options.values(), activation]
    expected = reference.dau_conv2d(*exact, *options)
    low = [t.detach().bfloat16().requires_grad_() for t in exact]
    y = dau_cpu.dau_conv2d(*low, *options, frozen=False)
    assert relative_error(y, expected) < 2e-2
    for name, actual, right in zip(NAMES, gradients(y, low), gradients(expected, exact), strict=True):
        assert actual.dtype == torch.bfloat16
        assert relative_error(actual, right) < 2e-2, name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # raised by torch's own checks
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("case", ["3x3", "stride", "one_position"])
def test_operators_are_registered_right(case, frozen, layout):
    """Run torch's own checks: schema, fake tensors, autograd registration, AOT dispatch with dynamic shapes."""
    tensors, options = problem(case, torch.float32)
    tensors = [t.detach().to(memory_format=FORMATS[layout]).requires_grad_() for t in tensors]
    if frozen:
        tensors[1:] = [t.detach() for t in tensors[1:]]
    elif case == "stride":
        tensors[0] = tensors[0].detach()
    arguments = (*tensors, *(list(pair) for pair in options.values()), "squash", frozen, not frozen)
    torch.library.opcheck(torch.ops.timm_coda.dau_conv2d_cpu.default, arguments)


def test_vmap_over_targets():
    """`is_grads_batched` runs one vmapped backward pass for all targets of a forward pass."""
    tensors, options = problem("3x3")
    x, *weights = tensors
    frozen = dau_cpu.dau_conv2d(x, *(w.detach() for w in weights), *options.values(), activation="squash", frozen=True)
    targets = torch.randn(4, *frozen.shape, dtype=frozen.dtype)
    batched = torch.autograd.grad(frozen, x, targets, is_grads_batched=True, retain_graph=True)[0]
    single = [torch.autograd.grad(frozen, x, target, retain_graph=True)[0] for target in targets]
    assert torch.equal(batched, torch.stack(single))


@pytest.mark.parametrize("frozen", [False, True])
def test_double_backward(frozen):
    tensors, options = problem("one_position")
    if frozen:
        tensors[1:] = [t.detach() for t in tensors[1:]]

    def run(*leaves):
        return dau_cpu.dau_conv2d(
            *leaves, *tensors[len(leaves) :], *options.values(), activation="squash", frozen=frozen
        )

    leaves = tensors[:1] if frozen else tensors
    if not frozen:
        assert torch.autograd.gradcheck(run, leaves)
        assert torch.autograd.gradgradcheck(run, leaves)
    x = tensors[0]
    g = torch.ones_like(run(*leaves)).requires_grad_()
    first = torch.autograd.grad(run(*leaves), x, g, create_graph=True)[0]
    assert torch.autograd.grad(first.sum(), g)[0].shape == g.shape


@pytest.mark.parametrize("frozen", [False, True])
def test_compiles_into_one_graph(frozen):
    tensors, options = problem("3x3", torch.float32)
    if frozen:
        tensors[1:] = [t.detach() for t in tensors[1:]]
    leaves = [t for t in tensors if t.requires_grad]

    def run():
        return functional.dau_conv2d(*tensors, **options, frozen=frozen).sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(), run()) < 1e-6
    for actual, right in zip(gradients(compiled(), leaves), gradients(run(), leaves), strict=True):
        assert relative_error(actual, right) < 1e-5


def test_the_switch(monkeypatch):
    tensors, options = problem("3x3")
    called = []
    for name, function in list(functional.BACKENDS.items()):

        def spy(*args, name=name, function=function):
            called.append(name)
            return function(*args)

        monkeypatch.setitem(functional.BACKENDS, name, spy)

    def run():
        functional.dau_conv2d(*tensors, **options)
        return called.pop()

    assert run() == "cpu"
    with timm_coda.use_backend("reference"):
        assert run() == "reference"
        with timm_coda.use_backend("torch"):
            assert run() == "torch"
        assert run() == "reference"
        with pytest.raises(ValueError, match=r"backend 'cudnn': choose one of reference, torch, cpu, triton"):
            timm_coda.set_backend("cudnn")
        assert run() == "reference"
    assert run() == "cpu"
    try:
        timm_coda.set_backend("torch")
        assert run() == "torch"
    finally:
        timm_coda.set_backend(None)


def test_environment_variable():
    code = """
import importlib, os
import timm_coda.layers.functional as functional
for value in ("torch", "", "fast"):
    os.environ["TIMM_CODA_BACKEND"] = value
    print(importlib.reload(functional)._backend)
"""
    environment = os.environ | {"TIMM_CODA_BACKEND": "reference"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["torch", "None"]
    assert "backend 'fast': choose one of" in run.stderr


# name: input (B, C, H, W), units, rank, kernel, stride, padding, dilation. No size is a multiple of a tile.
TRITON_CASES = {
    "odd": ((2, 6, 9, 7), 5, 16, 3, 1, 1, 1),
    "stride": ((1, 4, 11, 6), 3, 32, 3, 2, 1, 1),
    "1x1": ((3, 8, 5, 5), 10, 16, 1, 1, 0, 1),
    "low_rank": ((2, 3, 7, 5), 19, 8, 3, 1, 1, 1),
    "one_unit_a_tile": ((1, 2, 5, 4), 2, 128, 3, 1, 1, 1),
    "dilated": ((1, 3, 9, 8), 4, 16, 3, 1, 2, 2),
    "one_position": ((1, 2, 3, 3), 1, 16, 3, 1, 0, 1),
    "no_position": ((0, 2, 3, 3), 1, 16, 3, 1, 0, 1),
}


@pytest.fixture
def cuda_kernels():
    pytest.importorskip("triton", reason="needs Triton, which comes with CUDA builds of PyTorch")
    from timm_coda.layers.kernels import dau_triton

    return dau_triton


@pytest.mark.parametrize("activation", ["squash", "l2"])
@pytest.mark.parametrize("case", TRITON_CASES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 2e-2)])
def test_triton_equals_reference(cuda_kernels, case, activation, dtype, bound):
    """Runs on the GPU if there is one, else in Triton's interpreter."""
    if dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter has no bfloat16 products: needs a GPU; float16 is tested instead")
    shape, units, rank, kernel, *pairs = TRITON_CASES[case]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [t.to(device, dtype).requires_grad_() for t in random_problem(shape, units, rank, kernel)]
    options = [*((n, n) for n in pairs), activation]
    assert_equals_reference(cuda_kernels.dau_conv2d, tensors, options, bound)


def test_triton_leaves_odd_cases_to_convolutions(cuda_kernels, monkeypatch):
    assert cuda_kernels.supports(torch.bfloat16, 64)
    called = []
    monkeypatch.setattr(dau_torch, "dau_conv2d", lambda *args: called.append(args[1].shape[0]))
    for dtype, case in ((torch.float64, "3x3"), (torch.float32, "1x1")):
        tensors, options = problem(case, dtype)
        with timm_coda.use_backend("triton"):
            functional.dau_conv2d(*tensors, **options)
    assert called == [4, 6]


@pytest.mark.parametrize(("capability", "ranks", "instruction"), [("9.0", "64", "wgmma"), ("8.0", "8,256", "mma")])
def test_triton_kernels_compile(cuda_kernels, capability, ranks, instruction):
    """For GPUs that need not be here, with every tile: tensor cores, no spills, shared memory as foreseen."""
    command = [sys.executable, "-W", "ignore", "-m", "helpers.compiled_kernels", capability, ranks, "2", "--json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["tests", *sys.path])}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = json.loads(run.stdout)
    assert {row["kernel"] for row in rows} == {"norm", "contract", "code", "data", "weight"}
    for row in rows:
        assert row[instruction] > 0 and row["spilled"] == 0, row
        assert row["shared"] <= row["most_shared"], row


@pytest.mark.parametrize("kernel", ["norm", "contract", "code", "data", "weight"])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (12, 0)])
def test_every_gpu_has_a_tile(kernel, capability):
    for rank in (8, 16, 32, 64, 128, 256):
        for itemsize in (4,) if kernel == "norm" else (2, 4):
            problem = tiles.Problem(kernel, 10, rank, 576, itemsize)
            assert tiles.candidates(problem, capability), problem


def test_a_tile_that_was_timed_is_taken(monkeypatch):
    problem = tiles.Problem("contract", 10, 16, 54, 2)
    cpu = torch.device("cpu")
    usual = tiles.choose(problem, cpu)
    timed = tiles.Tile(64, 64, 64, 4, 3)
    assert usual == tiles.candidates(problem, (8, 0))[0] != timed
    monkeypatch.setitem(tiles.found, problem, timed)
    assert tiles.choose(problem, cpu) == timed
    assert tiles.launch(problem, cpu, lambda tile: tile) == timed
