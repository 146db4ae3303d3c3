"""Every transform of torch through every kind of layer, in both modes, against differences and plain backward."""

from contextlib import nullcontext

import pytest
import torch
from timm.layers import Attention
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import timm_coda
from helpers import relative_error
from timm_coda import layers

# From within torch: its formulas of forward mode are scripted when they are first needed, and the graph of `linearize`.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]

# Before, PyTorch's group norm has no vmap, and dynamo takes all compiled code for an export: correct, but slower.
RECENT = torch.__version__ >= "2.11"


class Tokens(nn.Module):
    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def coda_net():
    return timm_coda.CodaNet(
        depths=(1, 1, 1), channels=(4, 3, 3), strides=(1, 2, 2), rank=2, num_classes=3, logit_temperature=1
    )


def bcos_net():
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())
    return nn.Sequential(
        layers.EncodedBcosConv2d(3, 4, 3),
        layers.BcosConv2d(4, 4, 3, padding=1, groups=2),
        layers.BatchNormUncentered2d(4),
        layers.FrozenGate(gate),
        layers.BcosConv2d(4, 4, 1, b=1.5, max_out=2),
        layers.PositionNorm2d(4),
        layers.FrozenActivation(nn.GELU()),
        layers.DynamicGroupNorm2d(4) if RECENT else nn.Identity(),
        Tokens(),
        layers.BcosLinear(4, 4),
        layers.DAULinear(4, 3, rank=2),
        Mean(),
    )


def attention():
    return nn.Sequential(
        layers.EncodedBcosConv2d(3, 8, 2, stride=2),
        Tokens(),
        layers.DynamicLayerNorm(8),
        layers.freezable(Attention(8, num_heads=2, qkv_bias=False)),
        layers.BcosLinear(8, 3),
        Mean(),
    )


MODELS = {"coda_net": coda_net, "bcos_net": bcos_net, "attention": attention}


@pytest.fixture(params=[f"{name}-{mode}" for name in MODELS for mode in ("free", "frozen")])
def case(request):
    """Model, images, a direction, and the Jacobian of its logits by plain backward passes, within the mode."""
    name, mode = request.param.split("-")
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    x = torch.rand(1, 3, 4, 4, dtype=torch.float64)
    v = torch.randn_like(x)
    with timm_coda.explanation_mode(model) if mode == "frozen" else nullcontext():
        leaf = x.clone().requires_grad_()
        y = model(leaf)[0]
        jacobian = torch.stack([torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in y])
        if mode == "free":
            step = 1e-6
            difference = (model(x + step * v) - model(x - step * v)) / (2 * step)
            assert relative_error((jacobian * v).sum((1, 2, 3, 4)), difference[0]) < 1e-7
        yield model, x, v, jacobian


def square(model, x):
    return model(x).square().sum()


def curvature(model, x, v):
    """Hessian of `square` times v by plain double backward; the attention is unfused, as that has no second one."""
    leaf = x.clone().requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        first = torch.autograd.grad(square(model, leaf), leaf, create_graph=True)[0]
    return torch.autograd.grad(first, leaf, v)[0]


def test_forward_mode(case):
    model, x, v, jacobian = case
    right = (jacobian * v).sum((1, 2, 3, 4))
    assert right.norm() > 1e-4
    assert relative_error(jvp(model, (x,), (v,))[1][0], right) < 1e-10
    assert relative_error(linearize(model, x)[1](v)[0], right) < 1e-10
    with forward_ad.dual_level():
        y = model(forward_ad.make_dual(x, v))
        assert relative_error(forward_ad.unpack_dual(y).tangent[0], right) < 1e-10
    assert relative_error(jacfwd(model)(x)[0], jacobian) < 1e-10
    several = vmap(lambda v: jvp(model, (x,), (v,))[1])(torch.stack([v, -2 * v]))
    assert relative_error(several[1, 0], -2 * right) < 1e-10


def test_reverse_mode(case):
    model, x, _, jacobian = case
    assert relative_error(jacrev(model)(x)[0], jacobian) < 1e-10
    y, back = vjp(model, x)
    assert relative_error(back(torch.ones_like(y))[0], jacobian.sum(0)) < 1e-10
    gradient = torch.einsum("k, kbchw -> bchw", 2 * y[0], jacobian)
    assert relative_error(grad(lambda x: square(model, x))(x), gradient) < 1e-10
    assert relative_error(torch.autograd.functional.jacobian(model, x, vectorize=True)[0], jacobian) < 1e-10


def test_vmap(case):
    model, x, v, jacobian = case
    pair = torch.cat([x, x + 0.1 * v])
    assert relative_error(vmap(lambda x: model(x[None])[0])(pair), model(pair)) < 1e-10
    found = vmap(grad(lambda x: square(model, x[None])))(pair)
    assert relative_error(found[0], torch.einsum("k, kbchw -> bchw", 2 * model(x)[0], jacobian)[0]) < 1e-10
    leaf = pair.clone().requires_grad_()
    assert relative_error(found, torch.autograd.grad(square(model, leaf), leaf)[0]) < 1e-10


def test_second_derivatives(case):
    model, x, v, _ = case
    right = curvature(model, x, v)
    assert relative_error(grad(lambda x: (grad(lambda x: square(model, x))(x) * v).sum())(x), right) < 1e-9
    if not any(isinstance(layer, layers.DynamicGroupNorm2d) for layer in model.modules()) or model[0].frozen_dynamics:
        # torch's fused group norm has no forward mode over its backward: it says so.
        assert relative_error(jvp(grad(lambda x: square(model, x)), (x,), (v,))[1], right) < 1e-9
        small = x[..., :2].contiguous()
        second = hessian(lambda part: square(model, torch.cat([part, x[..., 2:]], 3)))(small)
        column = torch.zeros_like(x)
        column[0, 0, 0, 0] = 1
        assert relative_error(second[0, 0, 0, 0], curvature(model, x, column)[..., :2]) < 1e-9


def test_gradients_of_parameters_image_by_image():
    torch.manual_seed(0)
    model = coda_net().double()
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = vmap(grad(lambda p, x: functional_call(model, p, x[None]).square().sum()), (None, 0))(parameters, images)
    right = torch.autograd.grad(square(model, images[1:]), list(model.parameters()))
    for name, expected in zip(found, right, strict=True):
        assert relative_error(found[name][1], expected) < 1e-10, name


@pytest.mark.parametrize("kind", ["coda_net", "bcos_net"])
def test_many_gradients_in_one_backward_pass(kind):
    """Also without frozen mode, where the gradients of the weights are among them."""
    torch.manual_seed(0)
    model = MODELS[kind]().double().eval()
    x = torch.rand(1, 3, 4, 4, dtype=torch.float64)
    y = model(x)
    outer = torch.eye(3, dtype=torch.float64)[:, None]
    batched = torch.autograd.grad(y, list(model.parameters()), outer, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, list(model.parameters()), row, retain_graph=True) for row in outer]
    for found, *right in zip(batched, *single, strict=True):
        assert relative_error(found, torch.stack(right)) < 1e-12


@pytest.mark.parametrize("frozen", [False, True])
def test_forward_mode_over_a_backward_pass_that_began_without_it(frozen):
    torch.manual_seed(0)
    model = coda_net().double()
    x = torch.rand(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    with timm_coda.explanation_mode(model) if frozen else nullcontext():
        y = model(x)
        outer, direction = torch.ones_like(y), torch.randn_like(y)
        right = torch.autograd.grad(y, x, direction, retain_graph=True)[0]
        with forward_ad.dual_level():
            found = torch.autograd.grad(y, x, forward_ad.make_dual(outer, direction))[0]
            assert relative_error(forward_ad.unpack_dual(found).tangent, right) < 1e-10


def test_a_frozen_gradient_can_be_differentiated_while_the_weights_are_trained():
    torch.manual_seed(0)
    model = coda_net().double()
    x = torch.rand(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    with timm_coda.explanation_mode(model):
        outer = torch.ones_like(model(x)).requires_grad_()
        weights = torch.autograd.grad(model(x), x, outer, create_graph=True)[0]
        assert relative_error(torch.autograd.grad(weights.sum(), outer)[0], jacrev(model)(x).sum((2, 3, 4, 5))) < 1e-10


def test_a_transform_is_compiled_and_compiled_code_has_the_fast_operator_without_one():
    torch.manual_seed(0)
    model = nn.Sequential(layers.DAUConv2d(3, 4, 3, rank=2), layers.BcosConv2d(4, 2, 2)).double()
    x = torch.rand(1, 3, 4, 4, dtype=torch.float64)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    forward = torch.compile(lambda x: jvp(model, (x,), (x,))[1], backend=keep, fullgraph=True)
    assert relative_error(forward(x), jvp(model, (x,), (x,))[1]) < 1e-10
    plain = torch.compile(model, backend=keep, fullgraph=True)
    assert relative_error(plain(x), model(x)) < 1e-12
    assert ["timm_coda.dau_conv2d_cpu" in graph for graph in graphs] == [False, RECENT]
