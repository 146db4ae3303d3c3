"""DAU layers, the switch for frozen dynamic weights, image encoding, pooling and logits."""

import copy
import pickle
import sys
import threading

import pytest
import timm
import torch

import timm_coda
from helpers import relative_error
from timm_coda import DAUConv2d, DAULinear, InverseEncoding, explanation_mode, layers
from timm_coda.layers import reference
from timm_coda.layers.base import GlobalPool, Logits


def test_published_initialisation_and_counts():
    torch.manual_seed(0)
    layer = DAUConv2d(6, 16, 3, padding=1, rank=32)
    inputs = 6 * 9
    assert sum(p.numel() for p in layer.parameters()) == 32 * inputs + 16 * inputs * 32 + 16 * inputs
    assert 0.95 * inputs**-0.5 < layer.down.weight.abs().max() <= inputs**-0.5
    assert 0.95 * 32**-0.5 < layer.up.weight.abs().max() <= 32**-0.5
    assert 0.95 * 32**-0.5 < layer.up.bias.abs().max() <= 32**-0.5


def test_convolution_takes_ints_and_pairs_like_torch():
    layer = DAUConv2d(4, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), rank=2, dtype=torch.float64)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    shape = torch.nn.Conv2d(4, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))(x.float()).shape
    y = layer(x)
    assert y.shape == shape
    expected = reference.dau_conv2d(
        x, layer.down.weight, layer.up.weight, layer.up.bias, layer.stride, layer.padding, layer.dilation
    )
    assert relative_error(y, expected) < 1e-13
    assert "4, 3, rank=2" in repr(layer)
    assert "dilation=(1, 2)" in repr(layer)


def test_output_never_exceeds_the_patch():
    layer = DAULinear(20, 7, rank=5, activation="l2")
    with torch.no_grad():
        x = 100 * torch.randn(50, 20)
        ratio = layer(x).abs() / x.norm(dim=1, keepdim=True)
    assert 0 < ratio.max() <= 1 + 1e-5


def test_device_and_dtype_reach_every_parameter():
    layer = DAUConv2d(6, 4, rank=2, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "relu"}, "activation='relu'"),
        ({"rank": 0}, "rank=0: a dynamic alignment layer needs at least 1"),
        ({"out_features": 0}, "units=0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DAULinear(**{"in_features": 3, "out_features": 2} | arguments)


def in_another_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_frozen_state_is_each_threads_own_and_not_copied():
    layer = DAULinear(3, 2, rank=2)
    with explanation_mode(layer), explanation_mode(layer):
        assert layer.frozen_dynamics
        assert not in_another_thread(layer.frozen_dynamics.held)
        assert not copy.deepcopy(layer).frozen_dynamics
        assert not pickle.loads(pickle.dumps(layer)).frozen_dynamics
    assert not layer.frozen_dynamics


@pytest.mark.skipif(
    sys.version_info < (3, 12) and torch.__version__ < "2.11",
    reason="PyTorch before 2.11 can crash under Python 3.11 when several threads compile: it reads a freed frame",
)
@pytest.mark.parametrize("first", ["free", "frozen"])
@pytest.mark.parametrize("kind", ["coda", "bcos"])
def test_compiled_code_follows_the_state_of_the_thread_that_runs_it(kind, first):
    """Whatever was compiled first, and whatever another thread does at the same time."""
    torch.manual_seed(0)
    if kind == "coda":
        model = timm_coda.CodaNet(depths=(1, 1, 1), channels=(4, 6, 6), strides=(1, 2, 2), rank=3)
    else:
        gate = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Conv2d(5, 5, 1), torch.nn.Sigmoid())
        norms = [layers.PositionNorm2d(5), layers.BatchNormUncentered2d(5), layers.DynamicGroupNorm2d(5)]
        model = torch.nn.Sequential(layers.BcosConv2d(3, 5, 3), layers.FrozenGate(gate), *norms)
    model = model.double().eval()
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)

    def gradient(run):
        return torch.autograd.grad(run(x)[0, 0].square().sum(), x)[0]

    def explained(run):
        with explanation_mode(run):
            return gradient(run)

    free, frozen = gradient(model), explained(model)
    assert relative_error(frozen, free) > 0.1
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if first == "free":
        assert relative_error(gradient(compiled), free) < 1e-12
        assert relative_error(in_another_thread(lambda: explained(compiled)), frozen) < 1e-12
    with explanation_mode(compiled):
        assert relative_error(in_another_thread(lambda: gradient(compiled)), free) < 1e-12
        assert relative_error(gradient(compiled), frozen) < 1e-12
        with explanation_mode(compiled):
            assert relative_error(gradient(compiled), frozen) < 1e-12
        assert relative_error(in_another_thread(lambda: explained(compiled)), frozen) < 1e-12
        assert relative_error(in_another_thread(lambda: gradient(compiled)), free) < 1e-12
    assert relative_error(gradient(compiled), free) < 1e-12
    assert relative_error(in_another_thread(lambda: explained(compiled)), frozen) < 1e-12


def test_encoding():
    encoding = InverseEncoding(3, min_size=2)
    x = torch.rand(2, 3, 4, 4)
    encoded = encoding(x)
    assert torch.equal(encoded, torch.cat([x, 1 - x], 1))
    assert torch.equal(encoding(encoded), encoded)
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\).*got \[2, 4, 4, 4\].*in_chans="):
        encoding(torch.rand(2, 4, 4, 4))
    with pytest.raises(ValueError, match="4x1 pixels is smaller than the network's stride: resize it to at least 2x2"):
        encoding(torch.rand(2, 3, 4, 1))


def test_pooling_and_logits():
    x = torch.arange(8.0).view(1, 2, 2, 2)
    assert GlobalPool("sum")(x).tolist() == [[6, 22]]
    assert GlobalPool("avg")(x).tolist() == [[1.5, 5.5]]
    assert GlobalPool("")(x) is x
    with pytest.raises(ValueError, match="global_pool='max': choose 'sum', 'avg' or ''"):
        GlobalPool("max")
    assert Logits(4, -1)(torch.tensor([6.0])).item() == 0.5
    with pytest.raises(ValueError, match="logit_temperature=0"):
        Logits(0, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        votes = torch.tensor([0.25], dtype=torch.bfloat16)
        assert Logits(1000, -2.0)(votes).item() == pytest.approx(-1.99975, abs=1e-6), "evidence rounded away"


class Nested(torch.autograd.Function):
    """Call `inner` in a backward pass inside `depth` others. Autograd runs those above 60 in a thread of its own."""

    @staticmethod
    def forward(ctx, x, depth, inner):
        ctx.depth, ctx.inner = depth, inner
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        if ctx.depth == 0:
            ctx.inner()
        else:
            with torch.enable_grad():
                Nested.apply(torch.zeros((), requires_grad=True), ctx.depth - 1, ctx.inner).backward()
        return grads[0], None, None


@pytest.mark.parametrize("depth", [0, 80])
def test_what_checkpointing_computes_again_in_a_thread_of_autograds_is_as_in_the_thread_that_asked(depth):
    torch.manual_seed(0)
    model = timm.create_model("bcos_resnet18", num_classes=3).double().eval()
    model.set_grad_checkpointing()
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)

    def gradient() -> torch.Tensor:
        y, found = model(x)[:, 0].sum(), []

        def recompute() -> None:
            found.append(torch.autograd.grad(y, x)[0])
            assert (threading.get_ident() == caller) == (depth == 0)

        caller = threading.get_ident()
        Nested.apply(torch.zeros((), requires_grad=True), depth, recompute).backward()
        return found[0]

    free = torch.autograd.grad(model(x)[:, 0].sum(), x)[0]
    with timm_coda.explanation_mode(model):
        frozen = torch.autograd.grad(model(x)[:, 0].sum(), x)[0]
        assert torch.equal(gradient(), frozen)
        assert torch.equal(in_another_thread(gradient), free), "another thread's state"
    assert torch.equal(in_another_thread(gradient), free)
    assert relative_error(frozen, free) > 0.1
