"""B-cos ResNets: the authors' numbers, exactness on a second input, timm's suite."""

from math import log

import pytest
import timm
import torch
import torch.nn.functional as F

import golden
import timm_coda
from helpers import relative_error
from helpers.bcos_cases import assert_authors_numbers, freeze
from helpers.timm_suite import run_timm_suite
from timm_coda.layers.bcos import BatchNormUncentered2d, BcosConv2d
from timm_coda.models import bcos_resnet
from timm_coda.models._bcosify import replace_modules

MODELS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d"]

# golden case: model
GOLDEN = {"bcosv2_resnet18_64px": "bcos_resnet18", "bcosv2_resnet50_64px": "bcos_resnet50"}


def published_file(case, folder):
    """Write the case's weights in the authors' format, under the published file name."""
    config = timm.get_pretrained_cfg(GOLDEN[case])
    path = folder / config.url.rsplit("/", 1)[1]
    torch.save(golden.state_dict(case), path)
    return path


def tiny(**arguments):
    """A small ResNet with all kinds of parts; norm weights and statistics differ from their initial values."""
    torch.manual_seed(0)
    block = timm.models.resnet.BasicBlock
    model = timm_coda.BcosResNet(block, (1, 1, 1, 1), **{"num_classes": 4} | arguments)
    for module in model.modules():
        if isinstance(module, BatchNormUncentered2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_var.uniform_(0.01, 0.1)
    return model.double().eval()


@pytest.mark.parametrize("case", GOLDEN)
def test_equals_the_authors_numbers(case, tmp_path):
    path = published_file(case, tmp_path)
    model = timm.create_model(GOLDEN[case], pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    published = golden.state_dict(case)
    model = model.double()
    loaded = model.load_state_dict(bcos_resnet.checkpoint_filter_fn(published, model))
    assert_authors_numbers(case, model, loaded)


def test_timm_loads_the_published_file(tmp_path):
    path = published_file("bcosv2_resnet18_64px", tmp_path)
    published = golden.state_dict("bcosv2_resnet18_64px")
    overlay = {"file": str(path)}
    model = timm.create_model("bcos_resnet18", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.layer4[1].conv2.weight, published["layer4.1.conv2.linear.weight"])
    assert torch.equal(model.bn1.running_var, published["bn1.running_var"])
    fine_tuned = timm.create_model("bcos_resnet18", pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
    assert torch.equal(fine_tuned.conv1.weight, model.conv1.weight)
    grey = timm.create_model("bcos_resnet18", pretrained=True, in_chans=1, pretrained_cfg_overlay=overlay)
    image = torch.rand(2, 1, 64, 64)
    weights = model.conv1.weight.view(64, 2, 3, 7, 7).sum(2)
    assert relative_error(grey.conv1.weight, weights) < 1e-6
    assert (
        relative_error(
            F.conv2d(torch.cat([image, 1 - image], 1), grey.conv1.weight),
            F.conv2d(model.encoding(image.expand(-1, 3, -1, -1)), model.conv1.weight),
        )
        < 1e-5
    )
    multispectral = timm.create_model("bcos_resnet18", pretrained=True, in_chans=4, pretrained_cfg_overlay=overlay)
    assert relative_error(multispectral.conv1.weight[:, 4:7], 3 / 4 * model.conv1.weight[:, 3:]) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"block": timm.models.resnet.Bottleneck, "layers": (1, 1, 1, 1), "cardinality": 4, "base_width": 8},
        {"block": timm.models.resnet.BasicBlock, "layers": (1, 2, 1), "channels": (4, 6, 8), "small_stem": True},
    ],
    ids=["tiny", "grouped", "small_images"],
)
def test_map_is_that_of_the_frozen_network_on_any_other_image(arguments):
    """Other images are needed, because at the image itself the sum also holds for plain input x gradient."""
    model = tiny(output_stride=16, logit_temperature=0.5, logit_bias=-1.25)
    if arguments:
        torch.manual_seed(0)
        model = timm_coda.BcosResNet(num_classes=4, **arguments).double().eval()
    x, other = torch.rand(2, 1, 3, 33, 40, dtype=torch.float64)
    explanation = model.explain(x, torch.arange(4)[None])
    logits = model(x)
    frozen = freeze(model, x)
    assert relative_error(frozen(x), logits) < 1e-12
    for image in (x, other, torch.zeros_like(x)):
        encoded = torch.cat([image, 1 - image], 1)
        predicted = (explanation.weights * encoded[:, None]).sum((2, 3, 4)) + model.logits.bias
        assert relative_error(predicted, frozen(image)) < 1e-11
    assert explanation.residual.abs().max() < 1e-11


def test_map_is_not_input_times_gradient():
    model = tiny()
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    encoded = torch.cat([x, 1 - x], 1).requires_grad_()
    gradient = torch.autograd.grad(model(encoded)[:, 0].sum(), encoded)[0]
    assert relative_error(gradient, model.explain(x, 0).weights) > 0.5


def test_explaining_in_training_leaves_the_statistics():
    model = tiny(drop_path_rate=0.1, drop_rate=0.1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="call model.eval"):
        explanation = model.explain(torch.rand(3, 3, 32, 32, dtype=torch.float64))
    assert explanation.residual.abs().max() < 1e-12
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(torch.rand(3, 3, 32, 32, dtype=torch.float64))
    assert not torch.equal(model.bn1.running_var, before["bn1.running_var"])


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_timms_architecture(name):
    original = timm.create_model(name, in_chans=6, device="meta").state_dict()
    unused = ("running_mean", "num_batches_tracked", "bias")
    expected = {k: tuple(v.shape) for k, v in original.items() if not k.endswith(unused)}
    expected["fc.weight"] += (1, 1)
    model = timm.create_model(f"bcos_{name}", device="meta")
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected
    kinds = {type(m).__name__ for m in model.modules()}
    assert not kinds & {"Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "Linear"}


def test_registered_with_the_published_files():
    assert set(timm.list_models("bcos_res*")) == {f"bcos_{name}" for name in (*MODELS, "resnet20", "resnet56")}
    tags = timm.list_pretrained("bcos_res*")
    assert len(tags) == 8
    for tag in tags:
        config = timm.get_pretrained_cfg(tag)
        depth = tag.split(".")[0].removeprefix("bcos_").replace("resnet", "resnet_").replace("resnext", "resnext_")
        stem = config.url.rsplit("/", 1)[1].removesuffix(".pth").rsplit("-", 1)
        assert stem[0] == depth + ("_long" if "long" in tag else "")
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


def test_classifier_and_its_bias_follow_the_classes():
    model = timm.create_model("bcos_resnet18", num_classes=11, logit_temperature=2.0)
    assert model.logits.bias == -log(10)
    model.reset_classifier(101)
    assert (model.logits.bias, model.logits.temperature) == (-log(100), 2)
    assert model.get_classifier().weight.shape == (101, 512, 1, 1)
    model.reset_classifier(1)
    assert model.logits.bias == 0
    assert timm.create_model("bcos_resnet18", num_classes=7, logit_bias=0.0).logits.bias == 0
    logit_map = timm.create_model("bcos_resnet18", num_classes=7, global_pool="").eval()
    assert logit_map(torch.rand(1, 3, 64, 64)).shape == (1, 7, 2, 2)
    with pytest.raises(ValueError, match="global_pool='max'"):
        timm.create_model("bcos_resnet18", global_pool="max")
    with pytest.raises(TypeError):
        timm.create_model("bcos_resnet18", temperature=3)


def test_modules_inside_a_replaced_one_go_with_it():
    block = torch.nn.Sequential(torch.nn.Conv2d(6, 4, 3, groups=2), timm.layers.BatchNormAct2d(4))
    network = torch.nn.Sequential(block, torch.nn.MaxPool2d(3, 2, 1), torch.nn.GELU()).eval()
    weight = block[0].weight
    replace_modules(network, "0.0")
    kinds = ["Sequential", "EncodedBcosConv2d", "InverseEncoding", "BatchNormUncentered2d", "AvgPool2d", "Identity"]
    assert [type(m).__name__ for m in network.modules()][1:] == kinds
    assert torch.equal(network[0][0].weight, weight)
    assert not any(m.training for m in network.modules())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (torch.nn.InstanceNorm2d(4, affine=True), r"1 \(InstanceNorm2d\) has no B-cos counterpart"),
        (torch.nn.Conv2d(4, 4, 3, padding="same"), r"1 \(Conv2d, padding='same', zeros\)"),
        (torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "reflect"),
        (torch.nn.BatchNorm2d(4, affine=False), "needs a weight and running statistics"),
    ],
)
def test_what_has_no_counterpart_is_named(module, message):
    network = torch.nn.Sequential(torch.nn.Conv2d(6, 4, 3), module)
    with pytest.raises(ValueError, match=message):
        replace_modules(network, "0")


def test_compiled_model_follows_explanation_mode():
    model = tiny()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    expected = model.explain(x, 1)
    assert relative_error(timm_coda.explain(compiled, x, 1).weights, expected.weights) < 1e-12
    encoded = torch.cat([x, 1 - x], 1).requires_grad_()
    with timm_coda.explanation_mode(compiled):
        gradient = torch.autograd.grad(compiled(encoded)[:, 1].sum(), encoded)[0]
    assert relative_error(gradient, expected.weights) < 1e-12
    plain, fast = (torch.autograd.grad(run(encoded)[:, 1].sum(), encoded)[0] for run in (model, compiled))
    assert relative_error(fast, plain) < 1e-12


def test_gradient_checkpointing_changes_nothing():
    model = tiny()
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    gradients, maps = [], []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        gradients.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
        maps.append(model.explain(x).weights)
    for plain, checkpointed in zip(*gradients, strict=True):
        assert relative_error(checkpointed, plain) < 1e-12
    assert relative_error(maps[1], maps[0]) < 1e-12


@pytest.mark.parametrize(("name", "blocks"), [("bcos_resnet20", 3), ("bcos_resnet56", 9)])
def test_layout_for_small_images(name, blocks):
    """6n + 2 layers: two per block, the first one and the classifier. Plus a shortcut each time the channels grow."""
    model = timm.create_model(name, device="meta")
    layers = [module for module in model.modules() if isinstance(module, BcosConv2d)]
    shortcuts = [layer for layer in layers[1:-1] if layer.kernel_size == (1, 1)]
    assert (len(layers) - len(shortcuts), len(shortcuts)) == (6 * blocks + 2, 2)
    features = model.forward_features(torch.empty(2, 3, 32, 32, device="meta"))
    assert features.shape == (2, 64, 8, 8)
    with pytest.raises(timm_coda.hub.HubError, match=rf"{name}.cifar10 has no weights yet"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("name", ["bcos_resnet18", pytest.param("bcos_resnet20", marks=pytest.mark.slow)])
def test_timm_suite(name, tmp_path):
    """timm's own tests, unchanged; a file with the published name is in timm's download cache."""
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    published_file("bcosv2_resnet18_64px", folder)
    run_timm_suite(name, home=tmp_path)
