"""`explain` refuses results that are not finite, and warns about layers that depend on the batch or on chance."""

import warnings

import pytest
import timm
import torch
from timm.layers import DropBlock2d, DropPath
from torch import nn

import timm_coda
from helpers import relative_error
from timm_coda.explanation import check_finite


def small(**options) -> timm_coda.CodaNet:
    torch.manual_seed(0)
    options = {"depths": (2,), "channels": (4, 6), "strides": (1, 1), "rank": 3, "num_classes": 4} | options
    return timm_coda.CodaNet(**options).eval()


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 7, 6, generator=torch.Generator().manual_seed(1))


def test_the_shipped_models_are_exact_in_float16():
    for name in ("coda_net_xs.digits", "coda_net_xs.cifar10"):
        model = timm.create_model(name, pretrained=True).eval()
        pictures = torch.rand(2, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
        expected = model.double().explain(pictures.double(), top=2)
        half = model.half()
        before = {key: value.clone() for key, value in half.state_dict().items()}
        found = half.explain(pictures, top=2)
        assert relative_error(found.logits, expected.logits) < 1e-3
        # The maps of weights that float16 has rounded; those of the weights themselves are the next line's.
        assert relative_error(found.contributions, expected.contributions) < 5e-3
        exact = model.double().explain(pictures.double(), top=2)
        assert relative_error(found.contributions, exact.contributions) < 1e-5
        assert found.residual.abs().max() < 1e-4
        assert all(torch.equal(before[key].double(), value) for key, value in model.state_dict().items())
        with torch.autocast("cpu", torch.float16):
            mixed = model.float().explain(pictures, top=2)
        assert relative_error(mixed.contributions, exact.contributions) < 1e-5


@pytest.mark.parametrize("layer", [None, "stages.0.1"])
def test_float16_and_inner_layers(layer):
    model = small()
    expected = model.half().double().explain(images().double(), 1, layer=layer)
    assert relative_error(model.half().explain(images(), 1, layer=layer).contributions, expected.contributions) < 1e-5


def test_weights_that_are_not_finite_are_named():
    model = small()
    with torch.no_grad():
        model.head.up.bias[1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"images 0, 1, 2: its weights have NaN or infinite .* head\.up\.bias"):
        model.explain(images())
    with pytest.raises(ValueError, match=r"its weights have NaN or infinite"):
        model.half().explain(images(), layer="stages.0.1")


def test_weights_that_are_finite_but_overflow_are_named():
    """As in uninitialised memory."""
    model = small()
    with torch.no_grad():
        model.head.up.weight.fill_(1e36)
    with pytest.raises(ValueError, match=r"layer head \(DAUConv2d\) .* torch.float32; its up.weight .* up to 1e\+36"):
        model.explain(images())
    assert not any(layer._forward_hooks for layer in model.modules())


class OverflowInGrey(nn.Module):
    def forward(self, x):
        return torch.where(x.flatten(1).std(1)[:, None, None, None] < 1e-6, float("inf"), 1.0) * x


def test_only_the_images_concerned_are_named():
    """By their place among all images, also if they are explained in parts."""
    model = small()
    model.stages.insert(0, OverflowInGrey())
    given = torch.cat([images(4), torch.full((1, 3, 7, 6), 0.5)])
    assert torch.isfinite(model.explain(given[:4]).contributions).all()
    with pytest.raises(ValueError, match=r"for image 4: layer stages\.0 \(OverflowInGrey\)"):
        model.explain(given, batch_size=2)


def test_float16_names_its_layer_and_the_remedy():
    """A forward pass in float16, as in an evaluation; here even the layer's output leaves the range."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten()).half()
    nn.init.constant_(model[0].weight, 6e4)
    given = images().half()
    with pytest.raises(ValueError, match=r"images 7, 8, 9: layer 0 \(Conv2d\) .*float16, .* 65504: use bfloat16"):
        check_finite(model, given, model(given), numbers=[7, 8, 9])
    check_finite(model.float(), given.float(), model(given.float()))


def warned(model: nn.Module, given: torch.Tensor) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        timm_coda.explain(model, given, 0)
    assert all(one.category is UserWarning for one in seen)
    return [str(one.message) for one in seen]


def test_a_model_without_eval():
    """Its batch normalisation makes maps depend on the other images."""
    model = timm.create_model("bcos_resnet20")
    given = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    (message,) = warned(model, given)
    assert "layers bn1, " in message and "more depends on the other images" in message
    assert "call model.eval() first" in message
    assert warned(model.eval(), given) == []
    model.layer1[0].bn1.train()
    (message,) = warned(Wrapper(model), given)
    assert "the output of layer layer1.0.bn1 depends" in message


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


def test_coda_nets_do_not_warn():
    assert warned(small().train(), images()) == []


class Functional(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drop_rate = rate

    def forward(self, x):
        return nn.functional.dropout(x, self.drop_rate, self.training)


@pytest.mark.parametrize(
    "layer",
    [
        *(nn.Dropout, nn.Dropout2d, DropPath, Functional),
        lambda rate: DropBlock2d(rate, block_size=3),
        lambda rate: nn.BatchNorm2d(6),
    ],
)
def test_layers_that_depend_on_chance_or_the_batch(layer):
    model = small()
    model.stages[0].append(layer(0.5))
    assert warned(model.eval(), images()) == []
    (message,) = warned(model.train(), images())
    assert "output of layer stages.0.2 depends" in message
    if isinstance(model.stages[0][2], nn.BatchNorm2d):
        return
    model.stages[0][2] = layer(0.0)
    assert warned(model.train(), images()) == []


@pytest.mark.parametrize(
    ("rate", "name"),
    [("drop_path_rate", "blocks.1.drop_path1"), ("attn_drop_rate", "blocks.0.attn"), ("proj_drop_rate", "blocks.0")],
)
def test_transformers(rate, name):
    sizes = {"img_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4, "patch_size": 8}
    model = timm_coda.BcosVisionTransformer(**sizes, **{rate: 0.2})
    given = torch.rand(2, 3, 16, 16)
    assert warned(model.eval(), given) == []
    (message,) = warned(model.train(), given)
    assert name in message and "call model.eval() first" in message


def test_the_warning_points_at_the_caller():
    model = small()
    model.stages[0].append(nn.Dropout(0.5))
    with pytest.warns(UserWarning, match="call model.eval") as seen:
        model.train().explain(images())
    assert [one.filename for one in seen] == [__file__]
