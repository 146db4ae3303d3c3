"""B-cos DenseNets, VGG and ConvNeXts: the authors' numbers, exactness on a second input, timm's suite."""

import sys
from math import log
from types import MethodType

import pytest
import timm
import torch

import golden
from helpers import relative_error
from helpers.bcos_cases import assert_authors_numbers, freeze
from helpers.timm_suite import run_timm_suite
from timm_coda import BcosConvNeXt, BcosDenseNet, BcosVGG
from timm_coda.export import export_model, largest_differences
from timm_coda.hub.checkpoints import ConvertError
from timm_coda.layers.bcos import BatchNormUncentered2d, PositionNorm2d
from timm_coda.models import bcos_convnext, bcos_densenet, bcos_vgg

# golden case: model, its module
GOLDEN = {
    "bcosv2_densenet121_64px": ("bcos_densenet121", bcos_densenet),
    "bcosv2_vgg11_bnu_64px": ("bcos_vgg11", bcos_vgg),
    "bcosv2_convnext_tiny_64px": ("bcos_convnext_tiny", bcos_convnext),
}

# model: golden case whose weights replace the published file in timm's suite; None for the model's own weights
SUITE = {model: case for case, (model, _) in GOLDEN.items()} | dict.fromkeys(
    (
        "bcos_densenet161",
        "bcos_densenet169",
        "bcos_densenet201",
        "bcos_convnext_base",
        "bcos_convnext_tiny_bnu",
        "bcos_convnext_base_bnu",
    )
)
QUICK = ("bcos_convnext_tiny",)

# name: small network with all kinds of parts of its family
TINY = {
    "densenet": (BcosDenseNet, {"growth_rate": 4, "block_config": (2, 1, 1, 2)}),
    "vgg": (BcosVGG, {"cfg": [8, "M", 12, 10, "M"], "mlp_ratio": 1 / 128}),
    "convnext_pn": (BcosConvNeXt, {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20), "ls_init_value": 0.5}),
    "convnext_bnu": (
        BcosConvNeXt,
        {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20), "ls_init_value": None, "norm": "bnu"},
    ),
}


def tiny(name, **arguments):
    """A small network whose norm weights and statistics differ from their initial values."""
    torch.manual_seed(0)
    kind, options = TINY[name]
    model = kind(**options | {"num_classes": 4} | arguments)
    for module in model.modules():
        if isinstance(module, (BatchNormUncentered2d, PositionNorm2d)):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, BatchNormUncentered2d):
            module.running_var.uniform_(0.01, 0.1)
    return model.double().eval()


def file_of(tag, folder):
    return folder / timm.get_pretrained_cfg(tag).url.rsplit("/", 1)[1]


@pytest.mark.parametrize("case", GOLDEN)
def test_equals_the_authors_numbers(case):
    name, family = GOLDEN[case]
    model = timm.create_model(name, device="meta")
    loaded = model.load_state_dict(family.checkpoint_filter_fn(golden.state_dict(case), model), assign=True)
    assert_authors_numbers(case, model, loaded)


def test_timm_loads_the_published_file(tmp_path):
    weights = golden.state_dict("bcosv2_convnext_tiny_64px")
    path = file_of("bcos_convnext_tiny", tmp_path)
    torch.save(weights, path)
    overlay = {"file": str(path)}
    model = timm.create_model("bcos_convnext_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5)
    assert torch.equal(model.stages[3].blocks[2].gamma, weights["features.8.2.layer_scale"].flatten())
    assert torch.equal(model.stages[1].downsample[1].weight, weights["features.3.1.linear.weight"])
    assert torch.equal(model.norm_pre.weight, weights["classifier.0.weight"])
    grey = timm.create_model("bcos_convnext_tiny", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1)
    assert relative_error(grey.stem[0].weight, model.stem[0].weight.view(96, 2, 3, 4, 4).sum(2)) < 1e-6
    assert grey.head.weight.shape == (1000, 768, 1, 1)


def test_published_batch_norms_of_a_convnext_load():
    weights = golden.state_dict("bcosv2_convnext_tiny_64px")
    for name in [name for name, value in weights.items() if name.endswith(".weight") and value.dim() == 1]:
        for buffer in ("running_mean", "running_var"):
            weights[name.replace("weight", buffer)] = torch.rand_like(weights[name])
        weights[name.replace("weight", "num_batches_tracked")] = torch.tensor(3)
    model = timm.create_model("bcos_convnext_tiny_bnu", device="meta")
    model.load_state_dict(bcos_convnext.checkpoint_filter_fn(weights, model), assign=True)
    assert torch.equal(model.stages[2].downsample[0].running_var, weights["features.5.0.running_var"])
    assert torch.equal(model.stages[0].blocks[1].norm.running_var, weights["features.2.1.block.1.running_var"])


@pytest.mark.parametrize("name", TINY)
def test_our_own_state_dict_stays_as_it_is(name):
    model = tiny(name)
    filtered = sys.modules[type(model).__module__].checkpoint_filter_fn(model.state_dict(), model)
    assert list(filtered) == list(model.state_dict())
    assert all(torch.equal(value, filtered[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["bcos_resnet18", "bcos_densenet121", "bcos_vgg11", "bcos_convnext_tiny"])
def test_a_file_of_another_model_is_named(name, tmp_path):
    weights = {"other.linear.weight": torch.rand(4, 6, 3, 3), "features.0.weight": torch.rand(4, 6, 1, 1)}
    torch.save({"state_dict": weights}, tmp_path / "other.pth")
    overlay = {"file": str(tmp_path / "other.pth")}
    with pytest.raises(ConvertError, match=r"does not fit this Bcos.*: missing: .*; only in the checkpoint: other\.w"):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("bcos_densenet121", {"growth_rate": 4, "block_config": [1, 1, 1, 1]}),
        ("bcos_vgg11", {"mlp_ratio": 1 / 128}),
        ("bcos_convnext_tiny_bnu", {"depths": [1, 1, 1, 1], "dims": [4, 8, 8, 8]}),
    ],
)
def test_saved_and_loaded(name, arguments, tmp_path):
    model = timm.create_model(name, num_classes=2, **arguments).eval()
    images = torch.rand(1, 3, 64, 64)
    model.save_pretrained(tmp_path, label_names=["cat", "dog"])
    assert torch.equal(type(model).from_pretrained(tmp_path)(images), model(images))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded.explain(images).contributions, model.explain(images).contributions)


def test_exported_explanation_equals_eager(tmp_path):
    """The ONNX graph includes the backward pass through poolings that do not cover all pixels."""
    model = tiny("densenet", logit_temperature=0.1).float()
    model.pretrained_cfg = {"input_size": (3, 70, 77), "num_classes": 4}
    path = export_model(model, tmp_path / "model.onnx", explain=True, img_size=(70, 77))
    assert max(largest_differences(path, model).values()) < 1e-5


def freeze_position_norms(model, x):
    """Fix the variances of position norms to their values at `x`."""
    seen = {}
    norms = [m for m in model.modules() if isinstance(m, PositionNorm2d)]
    hooks = [m.register_forward_hook(lambda module, args, output: seen.update({module: args[0]})) for m in norms]
    model(x)
    for hook in hooks:
        hook.remove()
    for norm in norms:
        centred = seen[norm] - seen[norm].mean(1, keepdim=True)
        factor = norm.weight[:, None, None] / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()

        def forward(self, x, factor=factor):
            return (x - x.mean(1, keepdim=True)) * factor

        norm.forward = MethodType(forward, norm)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_map_is_that_of_the_frozen_network_on_any_other_image(name):
    """Other images are needed, because at the image itself the sum also holds for plain input x gradient."""
    model = tiny(name, logit_temperature=0.5, logit_bias=-1.25, global_pool="sum")
    x, other = torch.rand(2, 1, 3, 70, 64, dtype=torch.float64)
    explanation = model.explain(x, torch.arange(4)[None])
    logits = model(x)
    frozen = freeze_position_norms(freeze(model, x), x)
    assert relative_error(frozen(x), logits) < 1e-12
    for image in (x, other, torch.zeros_like(x)):
        encoded = torch.cat([image, 1 - image], 1)
        predicted = (explanation.weights * encoded[:, None]).sum((2, 3, 4)) - 1.25
        assert relative_error(predicted, frozen(image)) < 1e-11
    assert explanation.residual.abs().max() < 1e-11


@pytest.mark.parametrize("name", TINY)
def test_explaining_in_training_leaves_the_model(name):
    model = tiny(name, drop_rate=0.1).train()
    x = torch.rand(3, 3, 64, 64, dtype=torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="call model.eval"):
        explanation = model.explain(x, 1)
    assert explanation.residual.abs().max() < 1e-12
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    encoded = torch.cat([x, 1 - x], 1).requires_grad_()
    gradient = torch.autograd.grad(model(encoded)[:, 1].sum(), encoded)[0]
    assert relative_error(gradient, explanation.weights) > 0.5, "plain gradients"


@pytest.mark.parametrize(
    ("name", "original", "renamed"),
    [
        *((f"bcos_densenet{depth}", f"densenet{depth}", {}) for depth in (121, 161, 169, 201)),
        ("bcos_vgg11", "vgg11_bn", {"head.fc.weight": "head.weight"}),
        *(
            (f"bcos_convnext_{size}{norm}", f"convnext_{size}", {"head.fc.weight": "head.weight"})
            for size in ("tiny", "base")
            for norm in ("", "_bnu")
        ),
    ],
)
def test_weights_are_those_of_timms_architecture(name, original, renamed):
    options = {"conv_mlp": True, "head_norm_first": True} if "convnext" in name else {}
    theirs = timm.create_model(original, in_chans=6, device="meta", **options).state_dict()
    unused = ("running_mean", "running_var", "num_batches_tracked", "bias")
    expected = {renamed.get(k, k): tuple(v.shape) for k, v in theirs.items() if not k.endswith(unused)}
    model = timm.create_model(name, device="meta")
    classifier = f"{model.pretrained_cfg['classifier']}.weight"
    expected[classifier] += (1, 1)
    assert {k: tuple(v.shape) for k, v in model.named_parameters()} == expected
    assert model.get_classifier().weight is dict(model.named_parameters())[classifier]
    norm = PositionNorm2d if name in ("bcos_convnext_tiny", "bcos_convnext_base") else BatchNormUncentered2d
    kinds = {type(m).__name__ for m in model.modules()}
    norms = {"BatchNormUncentered2d", "PositionNorm2d"}
    assert kinds & norms == {norm.__name__}
    replaced = {"Conv2d", "BatchNorm2d", "BatchNormAct2d", "LayerNorm2d", "Linear", "ReLU", "GELU", "MaxPool2d"}
    assert not kinds & replaced
    assert "SelectAdaptivePool2d" not in kinds


def test_registered_with_the_published_files():
    tags = {tag for pattern in ("bcos_dense*", "bcos_vgg*", "bcos_convnext*") for tag in timm.list_pretrained(pattern)}
    assert len(tags) == 10
    assert {tag.split(".")[0] for tag in tags} == set(SUITE)
    seen = set()
    for tag in tags:
        config = timm.get_pretrained_cfg(tag)
        stem = config.url.rsplit("/", 1)[1].removesuffix(".pth").rsplit("-", 1)
        seen.add(stem[0])
        assert len(stem[1]) == 10
        assert int(stem[1], 16) >= 0
        transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config.to_dict()))
        steps = {type(step).__name__: step for step in transform.transforms}
        assert steps["Resize"].size == (232 if "long" in tag else 256)
        assert steps["Resize"].interpolation.value == "bilinear"
        assert tuple(steps["CenterCrop"].size) == (224, 224)
        assert steps["Normalize"].mean.tolist() == [0, 0, 0]
        assert steps["Normalize"].std.tolist() == [1, 1, 1]
        assert config.license == "apache-2.0"
    depths = [f"densenet_{name}" for name in ("121", "121_long", "161", "169", "201")]
    variants = [f"convnext_{size}_{norm}" for size in ("tiny", "base") for norm in ("pn", "bnu")]
    assert seen == {*depths, *variants, "vgg_11_bnu"}
    assert timm.get_pretrained_cfg("bcos_convnext_base_bnu").url.endswith("convnext_base_bnu-7c32a704b3.pth")
    assert timm.get_pretrained_cfg("bcos_convnext_tiny").url.endswith("convnext_tiny_pn-539b1bfb37.pth")


@pytest.mark.parametrize("name", TINY)
def test_classifier_and_its_bias_follow_the_classes(name):
    model = tiny(name, num_classes=11, logit_temperature=2.0)
    assert model.logits.bias == -log(10)
    model.reset_classifier(101)
    assert (model.logits.bias, model.logits.temperature) == (-log(100), 2)
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    votes = model.get_classifier()(model.pre_logits(model.features(x)) if name == "vgg" else model.forward_features(x))
    assert relative_error(model(x), votes.mean((2, 3)) / 2 - log(100)) < 1e-12
    model.reset_classifier(5, "")
    assert model(x).shape == (1, 5, *votes.shape[2:])
    with pytest.raises(ValueError, match="global_pool='max'"):
        tiny(name, global_pool="max")
    with pytest.raises(TypeError):
        tiny(name, output_stride=16)


def test_unknown_norm():
    with pytest.raises(ValueError, match="norm='layernorm': choose one of 'pn', 'bnu'"):
        timm.create_model("bcos_convnext_tiny", norm="layernorm", device="meta")


@pytest.mark.parametrize("name", TINY)
def test_cut_short_and_given_a_new_head(name):
    """A pruned network with a new head classifies from the remaining layers."""
    model = tiny(name)
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    features = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1]) == [1]
    assert relative_error(model(x), features) < 1e-12
    model.reset_classifier(3, "avg")
    explanation = model.explain(x)
    assert explanation.logits.shape == (1, 3)
    assert explanation.residual.abs().max() < 1e-12


@pytest.mark.parametrize("name", ["densenet", "convnext_pn"])
def test_gradient_checkpointing_changes_nothing(name):
    model = tiny(name)
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    gradients, maps = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        gradients.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
        maps.append(model.explain(x).weights)
    for plain, checkpointed in zip(*gradients, strict=True):
        assert relative_error(checkpointed, plain) < 1e-12
    assert relative_error(maps[1], maps[0]) < 1e-12


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SUITE]
)
def test_timm_suite(name, tmp_path):
    """timm's own tests, unchanged; files with the published names are in timm's download cache."""
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    case = SUITE[name]
    weights = timm.create_model(name).state_dict() if case is None else golden.state_dict(case)
    for tag in timm.list_pretrained(f"{name}.*"):
        torch.save(weights, file_of(tag, folder))
    run_timm_suite(name, home=tmp_path)
