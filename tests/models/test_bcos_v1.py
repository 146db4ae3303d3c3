"""B-cos v1 networks: the authors' numbers, exactness on a second input, tags, timm's suite."""

import os
import sys
from math import log, sqrt
from types import MethodType

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock

import golden
import timm_coda
from helpers import relative_error
from helpers.bcos_cases import layers_and_inputs
from helpers.timm_suite import run_timm_suite
from timm_coda import cli, hub
from timm_coda.hub.checkpoints import ConvertError
from timm_coda.layers.bcos import BcosConv2d, EncodedBcosConv2d

IMAGENET = {"resnet34": 100, "densenet121": 100, "vgg11": 1000, "inception_v3": 200}  # sqrt(inputs of a unit) / s

# golden case: tag
GOLDEN = {
    "bcosv1_cifar_b2_32px": "bcos_v1_conv9.mpi_b2_cifar10",
    "bcosv1_cifar_b1.5_32px": "bcos_v1_conv9.mpi_b1_5_cifar10",
    "bcosv1_resnet34_64px": "bcos_v1_resnet34.mpi_in1k",
    "bcosv1_densenet121_64px": "bcos_v1_densenet121.mpi_in1k",
    "bcosv1_inception_v3_107px": "bcos_v1_inception_v3.mpi_in1k",
    "bcosv1_vgg11_64px": "bcos_v1_vgg11.mpi_in1k",
}


def filter_of(model):
    return sys.modules[type(model).__module__].checkpoint_filter_fn


@pytest.mark.parametrize("case", GOLDEN)
def test_equals_the_authors_numbers(case):
    model = timm.create_model(GOLDEN[case], device="meta").eval()
    loaded = model.load_state_dict(filter_of(model)(golden.state_dict(case), model), assign=True)
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    model = model.double()
    explanation = model.explain(golden.inputs(case).double(), golden.targets(case))
    bias = model.logits.bias
    assert bias == (log(0.1 / 0.9) if "cifar" in case else log(0.01 / 0.99))
    assert relative_error(explanation.logits - bias, golden.logits(case) - bias) < 1e-9
    assert golden.error(case, "contributions", explanation.contributions) < 1e-9
    assert golden.error(case, "weights", explanation.weights[:1, :1]) < 1e-6


@pytest.mark.parametrize(
    ("case", "stem", "layer", "theirs"),
    [
        ("bcosv1_cifar_b2_32px", "stages.0.0", "stages.2.1", "6"),
        ("bcosv1_densenet121_64px", "features.conv0", "features.transition3.conv", "0.features.transition3.conv"),
    ],
)
def test_timm_loads_the_published_file(case, stem, layer, theirs, tmp_path):
    published = golden.state_dict(case)
    torch.save(published, tmp_path / "published.pt")
    overlay = {"file": str(tmp_path / "published.pt")}

    def load(**arguments):
        model = timm.create_model(GOLDEN[case], pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
        assert torch.equal(model.get_submodule(layer).weight, published[f"{theirs}.linear.weight"])
        return model

    model = load()
    first = model.get_submodule(stem).weight
    grey, spectral = (load(in_chans=n, num_classes=5).get_submodule(stem).weight for n in (1, 4))
    assert relative_error(grey, first.unflatten(1, (2, 3)).sum(2)) < 1e-6
    assert relative_error(spectral[:, 4:7], 3 / 4 * first[:, 3:]) < 1e-6
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in filter_of(model)(weights, model).items())


def test_another_networks_checkpoint_is_named():
    conv9 = timm.create_model("bcos_v1_conv9", device="meta")
    resnet = timm.create_model("bcos_v1_resnet34", device="meta")
    with pytest.raises(ConvertError, match=r"0\.conv1\.linear\.weight is not one of the 9 layers"):
        filter_of(conv9)({"0.conv1.linear.weight": torch.ones(1)}, conv9)
    with pytest.raises(ConvertError, match=r"missing: conv1\.weight.*only in the checkpoint: features\.0\.weight"):
        filter_of(resnet)({"0.features.0.linear.weight": torch.ones(1)}, resnet)
    vgg = timm.create_model("bcos_v1_vgg11", device="meta")
    with pytest.raises(ConvertError, match=r"missing: features\.0\.weight.*only in the checkpoint: features\.conv0\."):
        filter_of(vgg)({"0.features.conv0.linear.weight": torch.ones(1)}, vgg)


def freeze(model, x):
    """Fix the network's weights, candidates and cosines to their values at `x`, computed from the formulas."""
    for layer, p in layers_and_inputs(model, x, BcosConv2d):
        encoded = isinstance(layer, EncodedBcosConv2d) and p.shape[1] == 3
        p = torch.cat([p, 1 - p], 1) if encoded else p
        weight = layer.weight / layer.weight.square().sum((1, 2, 3), keepdim=True).sqrt()

        def candidates(p, weight=weight, layer=layer):
            return F.conv2d(p, weight, None, layer.stride, layer.padding).unflatten(1, (-1, layer.max_out))

        linear, chosen = candidates(p).max(2, keepdim=True)
        squares = F.conv2d(p.square(), torch.ones_like(weight[:1]), None, layer.stride, layer.padding)
        cosine = linear[:, :, 0].abs() / (squares + 1e-6).sqrt() + (0 if layer.b == 2 else 1e-6)
        factor = (cosine ** (layer.b - 1)) / layer.scale

        def forward(self, x, candidates=candidates, chosen=chosen, factor=factor, encoded=encoded):
            x = torch.cat([x, 1 - x], 1) if encoded else x
            return candidates(x).gather(2, chosen.expand(len(x), -1, -1, -1, -1))[:, :, 0] * factor

        layer.forward = MethodType(forward, layer)
    return model


def tiny(kind, b=2.0):
    """A small network with all kinds of parts, whose values are large enough to differ from rounding in float64."""
    torch.manual_seed(0)
    options = {"b": b, "num_classes": 4, "logit_temperature": 0.001, "dtype": torch.float64}
    if kind == "resnet":
        return timm_coda.BcosV1ResNet(BasicBlock, (1, 1, 1, 1), **options)
    if kind == "densenet":
        return timm_coda.BcosV1DenseNet(8, (2, 2, 1), **options)
    if kind == "vgg":
        return timm_coda.BcosV1VGG([8, "M", 8, "M"], scale_divisor=1000.0, **options)
    if kind == "inception":
        return timm_coda.BcosV1InceptionV3(scale_divisor=200.0, **options)
    return timm_coda.BcosConvNet((1, 2), (8, 8, 12), (1, 2, 1), scale=0.1, **options)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "b"),
    [("resnet", 2), ("densenet", 2), ("vgg", 2), ("inception", 2), ("conv", 1.0), ("conv", 1.75), ("conv", 2.5)],
)
def test_map_is_that_of_the_frozen_network_on_any_other_image(kind, b):
    """Other images are needed, because at the image itself the sum also holds for plain input x gradient."""
    model = tiny(kind, b).eval()
    size = (75, 91) if kind == "inception" else (33, 40)
    x, other = torch.rand(2, 1, 3, *size, dtype=torch.float64)
    explanation = model.explain(x, torch.arange(4)[None])
    logits = model(x)
    bias = model.logits.bias
    evidence = (logits - bias).norm()
    assert evidence > 1e-6
    frozen = freeze(model, x)
    for image in (x, other, torch.zeros_like(x)):
        encoded = torch.cat([image, 1 - image], 1)
        predicted = (explanation.weights * encoded[:, None]).sum((2, 3, 4))
        assert relative_error(predicted, frozen(image) - bias) < 1e-8
    assert relative_error(frozen(x), logits) < 1e-12
    assert explanation.residual.abs().max() < 1e-8 * evidence


def test_map_is_not_input_times_gradient():
    model = tiny("densenet").eval()
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    encoded = torch.cat([x, 1 - x], 1).requires_grad_()
    gradient = torch.autograd.grad(model(encoded)[:, 0].sum(), encoded)[0]
    assert relative_error(gradient, model.explain(x, 0).weights) > 0.5


@pytest.mark.parametrize(("name", "divisor"), IMAGENET.items())
def test_layers_are_those_of_timms_architecture(name, divisor):
    original = timm.create_model(name, in_chans=6, device="meta")
    convolutions = {n: m for n, m in original.named_modules() if isinstance(m, torch.nn.Conv2d)}
    model = timm.create_model(f"bcos_v1_{name}", device="meta")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BcosConv2d)}
    assert list(layers) == [*convolutions, "fc"]
    assert {f"{n}.weight" for n in layers} == set(model.state_dict()), "no bias, no norm"
    for n, layer in layers.items():
        assert layer.b == 2
        assert len(layer.weight) == 2 * layer.out_channels
        rows, columns = layer.kernel_size
        assert layer.scale == pytest.approx(sqrt(rows * columns * layer.in_channels) / divisor)
        if n != "fc":
            assert (layer.out_channels, layer.stride) == (convolutions[n].out_channels, convolutions[n].stride)
            assert layer.padding == ((3, 3) if n == "pre_logits.fc1" else convolutions[n].padding)
    kinds = {type(m).__name__ for m in model.modules()}
    assert not kinds & {"Conv2d", "BatchNorm2d", "BatchNormAct2d", "ReLU", "MaxPool2d", "Linear"}
    assert [type(m).__name__ for m in model.modules()].count("EncodedBcosConv2d") == 1


def test_nine_layers_as_published():
    model = timm.create_model("bcos_v1_conv9", device="meta")
    assert sum(p.numel() for p in model.parameters()) == 3_772_160
    published = {1: 1e-3, 1.25: 1e-3, 1.5: 1e-2, 1.75: 10, 2: 100, 2.25: 100, 2.5: 1000}
    for b, temperature in published.items():
        tag = f"bcos_v1_conv9.mpi_b{b:g}_cifar10".replace(".", "_").replace("conv9_", "conv9.")
        for model in (timm.create_model(tag, device="meta"), timm.create_model("bcos_v1_conv9", b=b, device="meta")):
            layers = [m for m in model.modules() if isinstance(m, BcosConv2d)]
            assert len(layers) == 9
            assert {(m.b, m.max_out) for m in layers} == {(b, 2)}
            assert all(m.scale == pytest.approx(10 ** (1.75 - 1.5 * b)) for m in layers)
            assert model.logits.temperature == temperature
    assert timm.create_model("bcos_v1_conv9", b=1.6, scale=2, logit_temperature=3, device="meta").head.scale == 2
    with pytest.raises(ValueError, match=r"b=1\.6 has no published temperature \(only 1, 1\.25, "):
        timm.create_model("bcos_v1_conv9", b=1.6)
    with pytest.raises(ValueError, match=r"3 layers .* need as many channels and strides: got 2 and 3"):
        timm_coda.BcosConvNet((1, 2), (8, 8), (1, 2, 1))
    with pytest.raises(TypeError):
        timm.create_model("bcos_v1_conv9", temperature=3)


def test_registered_with_the_published_files():
    names = ["bcos_v1_conv9", *(f"bcos_v1_{name}" for name in IMAGENET)]
    assert timm.list_models("bcos_v1*") == sorted(names)
    tags = timm.list_pretrained("bcos_v1*")
    links = [timm.get_pretrained_cfg_value(tag, "url") for tag in tags]
    assert len({url for url, _ in links}) == len(tags) == 12
    assert [file for _, file in links] == [f"{tag}.pt" for tag in tags]
    for tag in tags:
        config = timm.get_pretrained_cfg(tag)
        assert config.license == "non-commercial-research"
        assert "for non-commercial research only" in config.description
        assert ("CIFAR-10 top-1 9" in config.description) == ("cifar10" in tag)
        transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config.to_dict()))
        steps = {type(step).__name__: step for step in transform.transforms}
        size = {"conv9": (32, 32), "inception": (341, 299)}.get(tag.split(".")[0].split("_")[2], (256, 224))
        assert (steps["Resize"].size, steps["CenterCrop"].size[0]) == size
        assert (steps["Normalize"].mean.tolist(), steps["Normalize"].std.tolist()) == ([0, 0, 0], [1, 1, 1])
    for name in names:  # the authors' weights are used only if their tag is given
        ours = timm.get_pretrained_cfg(name)
        assert (ours.tag, ours.license) == ("b2_cifar10" if "conv9" in name else "in1k", "apache-2.0")
        with pytest.raises(hub.HubError, match=rf"{name}\.\w+ has no weights yet \(available: {name}\.mpi_"):
            timm.create_model(name, pretrained=True)
    assert timm.get_pretrained_cfg_value("bcos_v1_conv9", "label_names")[9] == "truck"


def test_classifier_follows_the_classes():
    for name in ("resnet34", "densenet121"):
        model = timm.create_model(f"bcos_v1_{name}", num_classes=11, logit_temperature=2.0, logit_bias=-3.0)
        model.reset_classifier(5)
        head = model.get_classifier()
        assert head.weight.shape == (10, model.num_features, 1, 1)
        assert (head.scale, head.max_out) == (pytest.approx(sqrt(model.num_features) / 100), 2)
        assert (model.logits.bias, model.logits.temperature) == (-3, 2)
    logit_map = timm.create_model("bcos_v1_densenet121", num_classes=7, global_pool="").eval()
    assert logit_map(torch.rand(1, 3, 64, 64)).shape == (1, 7, 2, 2)
    with pytest.raises(ValueError, match="scale_divisor=0"):
        timm.create_model("bcos_v1_resnet34", scale_divisor=0)
    with pytest.raises(TypeError, match="temperature"):
        timm.create_model("bcos_v1_resnet34", temperature=3)


def test_convert_command(tmp_path, capsys):
    case = "bcosv1_cifar_b1.5_32px"
    torch.save(golden.state_dict(case), tmp_path / "theirs.pt")
    cli.main(["convert", str(tmp_path / "theirs.pt"), "--model", GOLDEN[case], "--output", str(tmp_path / "ours")])
    assert str(tmp_path / "ours") in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).double().eval()
    with torch.no_grad():
        logits = model(golden.inputs(case).double())
    assert relative_error(logits, golden.logits(case)) < 1e-9
    assert model.pretrained_cfg["license"] == "non-commercial-research"


def test_a_folder_keeps_b_and_temperature(tmp_path):
    model = timm.create_model("bcos_v1_conv9.mpi_b1_5_cifar10", channels=(4,) * 8, num_classes=3).eval()
    folder = hub.save_model(model, tmp_path)
    same = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert (same.head.b, same.logits.temperature, same.num_classes) == (1.5, 0.01, 3)
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(same(x), model(x))
    grey = timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=1)
    assert relative_error(grey.stages[0][0].weight, model.stages[0][0].weight.unflatten(1, (2, 3)).sum(2)) < 1e-6


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
def test_inception_is_scripted_without_the_auxiliary_classifier():
    torch.manual_seed(0)
    model = timm.create_model("bcos_v1_inception_v3", num_classes=3).eval()
    x = torch.rand(1, 3, 107, 107)
    with torch.no_grad():
        assert relative_error(torch.jit.script(model)(x) - model.logits.bias, model(x) - model.logits.bias) < 1e-5


SUITE = {
    "bcos_v1_conv9": "bcosv1_cifar_b2_32px",
    "bcos_v1_densenet121": "bcosv1_densenet121_64px",
    "bcos_v1_resnet34": "bcosv1_resnet34_64px",
    "bcos_v1_inception_v3": "bcosv1_inception_v3_107px",
    "bcos_v1_vgg11": "bcosv1_vgg11_64px",
}


LARGE = ("bcos_v1_densenet121", "bcos_v1_resnet34", "bcos_v1_inception_v3", "bcos_v1_vgg11")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in LARGE else []) for n in SUITE])
def test_timm_suite(name, tmp_path):
    """timm's own tests, unchanged; files with the published names are in the download cache."""
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(golden.state_dict(SUITE[name]), tmp_path / "published.pt")
    for tag in timm.list_pretrained(f"{name}.*"):
        os.link(tmp_path / "published.pt", folder / timm.get_pretrained_cfg_value(tag, "url")[1])
    # timm skips one test for networks above 100 million parameters
    run_timm_suite(name, home=tmp_path, skips=name == "bcos_v1_vgg11")
