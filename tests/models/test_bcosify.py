"""B-cos versions of timm's architectures: exact on other images, training, saving, and errors for unsupported ones."""

from types import MethodType

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import nn

import timm_coda
from helpers import relative_error
from helpers.timm_suite import run_timm_suite
from timm_coda import hub
from timm_coda.layers.attention import DynamicLayerNorm
from timm_coda.layers.bcos import BatchNormUncentered2d, BcosConv2d, BcosLinear, PositionNorm2d
from timm_coda.layers.gates import FrozenActivation, FrozenGate
from timm_coda.models import bcosified
from timm_coda.models._bcosify import replace_modules

# architecture: arguments that keep it small
ARCHITECTURES = {
    "resnet18": {},
    "resnext50_32x4d": {},
    "densenet121": {},
    "vgg11_bn": {"mlp_ratio": 0.02},
    "convnext_tiny": {"depths": [1, 1, 2, 1], "ls_init_value": 0.5},
    "efficientnet_b0": {},
    "mobilenetv3_small_100": {},
    "regnety_004": {},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 3},
}
both = pytest.mark.parametrize("from_pretrained", [False, True], ids=["scratch", "pretrained"])


def settled(architecture, from_pretrained=False, **arguments):
    """A B-cos version in float64 whose running statistics come from images, as after training."""
    if ARCHITECTURES.get(architecture) and not hasattr(timm.models, "get_model_args"):
        pytest.skip("timm before 1.0.31 does not record the arguments of its models, and bcosify says so")
    torch.manual_seed(0)
    original = timm.create_model(architecture, num_classes=4, **ARCHITECTURES.get(architecture, {}), **arguments)
    model = timm_coda.bcosify(original, from_pretrained=from_pretrained).double()
    norms = [m for m in model.modules() if isinstance(m, BatchNormUncentered2d)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    with torch.no_grad():
        model.train()(torch.rand(4, 3, 64, 64, dtype=torch.float64))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def frozen_forward(module, seen):
    """Forward function of `module` with its input-dependent factors at `seen`, computed from the formulas."""
    if isinstance(module, (BcosConv2d, BcosLinear)):
        conv = isinstance(module, BcosConv2d)
        axes = tuple(range(1, module.weight.dim()))
        weight = module.weight
        if module.unit_norm:
            weight = weight / weight.square().sum(axes, keepdim=True).sqrt()
        geometry = (None, module.stride, module.padding, module.dilation, module.groups) if conv else ()
        linear = F.conv2d if conv else F.linear
        norm = (linear(seen.square(), torch.ones_like(weight), *geometry) + 1e-6).sqrt()
        factor = linear(seen, weight, *geometry).abs() / norm
        return lambda x: linear(x, weight, *geometry) * factor
    if isinstance(module, BatchNormUncentered2d):
        return lambda x: x * (module.weight / (module.running_var + module.eps).sqrt())[:, None, None]
    if isinstance(module, (PositionNorm2d, DynamicLayerNorm)):
        axis = 1 if isinstance(module, PositionNorm2d) else -1
        weight = module.weight[:, None, None] if axis == 1 else module.weight
        std = (seen.var(axis, correction=0, keepdim=True) + module.eps).sqrt()
        return lambda x: (x - x.mean(axis, keepdim=True)) / std * weight
    if isinstance(module, FrozenGate):
        gate = module.gate(seen)
        return lambda x: x * gate
    if isinstance(module, FrozenActivation):
        slope = torch.where(seen == 0, 0, module.activation(seen.clone()) / seen)
        return lambda x: x * slope
    if isinstance(module, Attention):
        heads = module.num_heads

        def project(x):  # (3, B, heads, N, C / heads)
            return F.linear(x, module.qkv.weight).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)

        q, k, _ = project(seen)
        matrix = (q @ k.mT * module.head_dim**-0.5).softmax(-1)
        return lambda x: module.proj((matrix @ project(x)[2]).transpose(1, 2).flatten(2))
    mask = (seen > 0).to(seen.dtype)  # ReLU
    return lambda x: x * mask


DYNAMIC = (
    *(BcosConv2d, BcosLinear, BatchNormUncentered2d, PositionNorm2d, DynamicLayerNorm, FrozenGate),
    *(FrozenActivation, nn.ReLU, Attention),
)


def freeze(model, x):
    """Make the network linear: fix the factors of each layer to their values at `x`."""
    inputs = {}

    def note(module, args):
        assert module not in inputs, "a module used twice"
        inputs[module] = args[0].clone()

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, DYNAMIC)]
    model(x)
    for hook in hooks:
        hook.remove()
    inner = {m for gate in inputs if isinstance(gate, (FrozenGate, FrozenActivation)) for m in gate.modules()} - {
        gate for gate in inputs if isinstance(gate, (FrozenGate, FrozenActivation))
    }
    forwards = {m: frozen_forward(m, seen) for m, seen in inputs.items() if m not in inner}
    for module, forward in forwards.items():
        module.forward = MethodType(lambda self, x, forward=forward, **options: forward(x), module)
    return model


@torch.no_grad()
@both
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_map_is_that_of_the_frozen_network_on_any_other_image(architecture, from_pretrained):
    model = settled(architecture, from_pretrained)
    x, other = torch.rand(2, 1, 3, 64, 64, dtype=torch.float64)
    explanation = model.explain(x, torch.arange(4)[None])
    logits = model(x)
    added = model.logits.bias + explanation.residual  # not contributed by any pixel
    unexplained = relative_error(explanation.contributions.sum((2, 3)) + model.logits.bias, logits)
    if architecture.startswith("vit"):
        assert unexplained > 1e-6, "positions are added"
    else:
        assert explanation.residual.abs().max() < 1e-9 * (logits - model.logits.bias).abs().max()
    frozen = freeze(model, x)
    for image in (x, other):
        encoded = torch.cat([image, 1 - image], 1)
        predicted = (explanation.weights * encoded[:, None]).sum((2, 3, 4))
        assert relative_error(predicted, frozen(image) - added) < 1e-9
    assert relative_error(frozen(x) - model.logits.bias, logits - model.logits.bias) < 1e-9


@both
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trains_saves_and_loads(architecture, from_pretrained, tmp_path):
    model = settled(architecture, from_pretrained).train()
    images, truth = torch.rand(2, 3, 64, 64, dtype=torch.float64), F.one_hot(torch.tensor([1, 3]), 4).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    F.binary_cross_entropy_with_logits(model(images), truth).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    model.float().eval()
    folder = hub.save_model(model, tmp_path, label_names=["a", "b", "c", "d"])
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = images.float()
    assert torch.equal(again(images), model(images))
    assert torch.equal(again.explain(images).contributions, model.explain(images).contributions)


def test_same_model_by_name_and_by_registry():
    torch.manual_seed(0)
    made = timm_coda.bcosify("resnet18", num_classes=7, base_args={"output_stride": 16}, b=1.5, logit_bias=-1.0)
    arguments = {"base_args": {"output_stride": 16}, "b": 1.5, "logit_bias": -1.0}
    again = timm.create_model("bcosified", base="resnet18", num_classes=7, **arguments)
    again.load_state_dict(made.state_dict())
    assert repr(made) == repr(again)
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(made.eval()(x), again.eval()(x))
    assert made.forward_features(x).shape == (2, 512, 4, 4)
    other = timm.create_model("bcosified", base="regnety_004", num_classes=3, device="meta")
    assert other.pretrained_cfg["crop_pct"] == 0.965
    assert other.pretrained_cfg["mean"] == (0, 0, 0)


def test_arguments_that_no_weight_shows_are_kept():
    """Or refused with an error, by a timm that does not record them."""
    try:
        made = timm_coda.bcosify(timm.create_model("resnet18", output_stride=16))
    except ValueError as error:
        assert "does not record the arguments" in str(error) and not hasattr(timm.models, "get_model_args")
    else:
        assert made.forward_features(torch.rand(1, 3, 64, 64)).shape == (1, 512, 4, 4)


@torch.no_grad()
def test_first_convolution_takes_up_mean_and_standard_deviation():
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = torch.rand(2, 3, 9, 8)
    wide = bcosified._see_encoded(conv, mean, std)
    expected = conv((x - mean[:, None, None]) / std[:, None, None])
    assert relative_error(wide(torch.cat([x, 1 - x], 1)), expected) < 1e-5
    published = bcosified._see_encoded(conv, torch.full((3,), 0.5), torch.ones(3)).weight
    assert torch.equal(published, torch.cat([conv.weight, -conv.weight], 1) / 2)


def test_weights_are_carried_over_and_the_original_is_left():
    original = timm.create_model("resnet18", num_classes=5).eval()
    nn.init.uniform_(original.bn1.running_var, 0.5, 2)
    before = {name: value.clone() for name, value in original.state_dict().items()}
    model = timm_coda.bcosify(original, from_pretrained=True)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert model.get_submodule("body.layer3.0.conv1").unit_norm is False
    assert isinstance(model.get_submodule("body.act1"), nn.ReLU)
    state = model.state_dict()
    for name in ("layer1.0.conv1.weight", "bn1.running_var", "bn1.weight"):
        assert torch.equal(state[f"body.{name}"], before[name])
    assert torch.equal(state["head.weight"][:, :, 0, 0], before["fc.weight"])
    assert not any(name.endswith(("bias", "running_mean")) for name in state)
    fewer = timm_coda.bcosify(original, from_pretrained=True, num_classes=3)
    assert fewer.get_classifier().weight.shape == (3, 512, 1, 1)
    assert timm_coda.bcosify(original.double()).get_classifier().weight.dtype == torch.float64


class Outside(nn.Module):
    """A module that calls a non-linearity as a function."""

    def forward(self, x):
        return F.gelu(x)


def test_a_hidden_non_linearity_is_found(monkeypatch):
    replace = bcosified.replace_modules

    def hide(body, **rules):
        replace(body, **rules)
        body.act1 = Outside()

    monkeypatch.setattr(bcosified, "replace_modules", hide)
    with pytest.raises(ValueError, match="ResNet computes something non-linear outside its modules"):
        timm_coda.bcosify("resnet18", num_classes=2)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("swin_tiny_patch4_window7_224", r"no B-cos version: layers.0.blocks.0.attn \(WindowAttention\) has input"),
        ("convnextv2_atto", r"stages.0.blocks.0.mlp.grn \(GlobalResponseNorm\) has no B-cos counterpart"),
        ("tf_efficientnet_b0", r"conv_stem \(Conv2dSame"),
        ("coda_net_xs", "already has exact explanations"),
        ("bcos_resnet18", "already has exact explanations"),
    ],
)
def test_what_cannot_be_converted_says_why(architecture, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("bcosified", base=architecture, device="meta")


def test_what_cannot_be_made():
    with pytest.raises(ValueError, match="timm has no such architecture"):
        timm.create_model("bcosified", base="resnet17")
    with pytest.raises(ValueError, match="Sequential has no architecture name"):
        timm_coda.bcosify(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(ValueError, match=r"which cannot be saved as JSON|does not record the arguments"):
        timm_coda.bcosify(timm.create_model("resnet18", act_layer=nn.SiLU))
    with pytest.raises(ValueError, match="give in_chans as a separate argument"):
        timm.create_model("bcosified", base_args={"in_chans": 3})
    with pytest.raises(ValueError, match="only for a model name"):
        timm_coda.bcosify(timm.create_model("resnet18", num_classes=2), base_args={"output_stride": 8})
    with pytest.raises(TypeError, match="unexpected"):
        timm.create_model("bcosified", temperature=2.0)


def test_grey_images_of_a_saved_colour_model(tmp_path):
    model = timm_coda.bcosify("resnet18", num_classes=2).eval()
    folder = hub.save_model(model, tmp_path)
    grey = timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=1).eval()
    image = torch.rand(2, 1, 64, 64)
    expected = model.get_submodule("body.conv1").weight.view(64, 2, 3, 7, 7).sum(2)
    assert relative_error(grey.get_submodule("body.conv1").weight, expected) < 1e-6
    assert grey.explain(image).weights.shape == (2, 2, 64, 64)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (FrozenActivation(nn.SiLU(inplace=True)), (2, 3, 4, 5)),
        (FrozenActivation(nn.ReLU6()), (2, 3, 4, 5)),
        (FrozenGate(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1), nn.Sigmoid())), (2, 6, 4, 5)),
    ],
    ids=["silu", "relu6", "gate"],
)
def test_frozen_layer_is_linear_with_the_same_value(layer, shape):
    torch.manual_seed(0)
    layer = layer.double()
    x = (6 * torch.randn(shape, dtype=torch.float64)).requires_grad_()  # some values are above 6, where ReLU6 saturates
    plain = layer(x.clone())
    with timm_coda.explanation_mode(layer):
        frozen = layer(x)
        weighed = torch.randn_like(frozen)
        gradient = torch.autograd.grad((frozen * weighed).sum(), x)[0]
    assert relative_error(frozen, plain) < 1e-12
    assert abs((gradient * x).sum() - (frozen * weighed).sum()) < 1e-9
    assert relative_error(gradient, torch.autograd.grad((plain * weighed).sum(), x)[0]) > 1e-3, "not the gradient"


def test_norms_and_activations_have_counterparts():
    network = nn.Sequential(
        nn.GroupNorm(2, 4),
        timm.layers.LayerNorm2d(4),
        timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU),
        timm.layers.GELU(),
        timm.layers.LayerNorm(4),
        timm.layers.create_pool2d("max", 3, 2, padding="same"),
        timm.layers.SEModule(8),
    )
    replace_modules(network, keep_activations=True)
    kinds = ["DynamicGroupNorm2d", "PositionNorm2d", "Sequential", "FrozenActivation", "DynamicLayerNorm"]
    assert [type(m).__name__ for m in network] == [*kinds, "AvgPool2dSame", "FrozenGate"]
    assert [type(m).__name__ for m in network[2]] == ["BatchNormUncentered2d", "FrozenActivation"]
    with pytest.raises(ValueError, match=r"0 \(SEModule\) has max pooling"):
        replace_modules(nn.Sequential(timm.layers.SEModule(8, add_maxpool=True)))


def test_timm_suite(tmp_path):
    """timm's own tests, unchanged."""
    run_timm_suite("bcosified", home=tmp_path, skips=True)
