"""Explainers: correct maps of models that can be explained by hand, and no side effects on a real model."""

import pytest
import timm
import torch
from torch import nn

from helpers import relative_error
from helpers.evaluate_cases import Linear
from timm_coda import bcosify
from timm_coda.evaluate import EvaluationError, Explainer, ExplainerError, explainers
from timm_coda.evaluate.explainers import EXPLAINERS, make_explainer

INAPPLICABLE = {"deeplift", "guided_backprop"}  # they do not apply to CoDA-Nets


@pytest.fixture(scope="module")
def model():
    return timm.create_model("coda_net_xs.digits", pretrained=True).eval()


@pytest.fixture(scope="module")
def linear():
    torch.manual_seed(0)
    weight, images = torch.randn(3, 2, 4, 4), torch.rand(2, 2, 4, 4)
    targets = torch.tensor([[0, 2], [1, 1]])
    contributions = (weight[targets] * images[:, None]).sum(2)  # (2, 2, 4, 4)
    return Linear(weight, bias=0.5), images, targets, contributions


@pytest.fixture
def few_samples(monkeypatch):
    monkeypatch.setattr(explainers, "_SAMPLES", 200)  # more than there are patches, or kernel SHAP depends on rounding
    monkeypatch.setattr(explainers, "_MASKS", 40)
    monkeypatch.setattr(explainers, "_STEPS", 2)


# For a linear model, all of these return weight * input. In kernel SHAP, each patch is one pixel here, and 500 samples
# determine its 16 values.
@pytest.mark.parametrize("name", ["input_x_gradient", "integrated_gradients", "deeplift", "occlusion_1", "kernel_shap"])
def test_linear_model(name, linear):
    model, images, targets, contributions = linear
    maps = make_explainer(name)(model, images, targets)
    assert maps.dtype == torch.float32
    assert relative_error(maps, contributions) < 1e-4


def test_linear_model_by_samples(linear):
    model, images, targets, contributions = linear
    assert relative_error(make_explainer("gradient")(model, images, targets), model.weight[targets].sum(2)) < 1e-6
    lime = make_explainer("lime")(model, images, targets)  # sparse: some values are zero, the others slightly too small
    together = torch.corrcoef(torch.stack([lime.flatten(), contributions.flatten()]))[0, 1]
    assert together > 0.95


def test_occlusion_window(linear):
    # A window of 2 moves by 1: a pixel gets the mean drop of the 1, 2 or 4 windows that cover it.
    model, images, targets, contributions = linear
    falls = nn.functional.avg_pool2d(contributions, 2, stride=1) * 4  # (2, 2, 3, 3)
    maps = make_explainer("occlusion_2")(model, images, targets)
    assert relative_error(maps[..., 0, 0], falls[..., 0, 0]) < 1e-5
    assert relative_error(maps[..., 0, 1], falls[..., 0, :2].mean(-1)) < 1e-5
    assert relative_error(maps[..., 1, 2], falls[..., :2, 1:].mean((-2, -1))) < 1e-5


def test_guided_backprop_stops_what_is_negative():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 1), nn.Linear(16, 2)
    net = nn.Sequential(first, nn.ReLU(), nn.Flatten(), second).eval()
    x = torch.rand(1, 3, 2, 2)
    grad = second.weight[1].reshape(4, 2, 2)
    passed = torch.where(first(x)[0] > 0, grad, 0).clamp(min=0)  # (4, 2, 2)
    expected = torch.einsum("dhw,dc->hw", passed, first.weight[:, :, 0, 0])
    assert relative_error(make_explainer("guided_backprop")(net, x, torch.tensor([1]))[0], expected) < 1e-5
    assert not first._forward_hooks
    assert not net[1]._backward_hooks


def test_grad_cam_by_hand():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.AvgPool2d(2), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.head(self.stem(x)).sum((2, 3))

        def get_classifier(self):
            return self.head

    torch.manual_seed(0)
    net, x = Net(), torch.rand(1, 3, 4, 4)
    # The gradient of the features is the head's weight at every position, and so is its mean.
    coarse = torch.einsum("chw,c->hw", net.stem(x)[0], net.head.weight[1, :, 0, 0])
    maps = make_explainer("grad_cam")(net, x, torch.tensor([1]))
    assert relative_error(maps[0, ::3, ::3], coarse) < 1e-5, "corners are not blended"
    assert relative_error(maps[0, 0, 1], 0.75 * coarse[0, 0] + 0.25 * coarse[0, 1]) < 1e-5


def test_rise():
    # One pixel decides: the class is likely only if a mask keeps it. So nearly all masks with a large weight keep this
    # pixel, but not distant pixels.
    weight = torch.zeros(2, 1, 16, 16)
    weight[1, 0, 3, 12] = 20
    maps = make_explainer("rise")(Linear(weight, bias=-10.0), torch.ones(1, 1, 16, 16), torch.tensor([1]))[0]
    assert (maps >= 0).all()
    assert (maps.argmax() // 16 - 3).abs() <= 1
    assert (maps.argmax() % 16 - 12).abs() <= 1
    assert maps[3, 12] > 1.5 * maps[12, 3]
    masks = torch.cat(list(explainers._rise_masks((16, 10), 0, 300)))
    assert masks.shape == (1000, 16, 10)
    assert masks.min() >= 0
    assert masks.max() <= 1
    assert 0.45 < masks.mean() < 0.55


def test_gradients_are_true_ones(model):
    x, targets = torch.rand(1, 3, 16, 16), torch.tensor([4])
    encoded = model.encoding(x).requires_grad_()
    (true,) = torch.autograd.grad(model(encoded)[0, 4], encoded)
    assert relative_error(make_explainer("gradient")(model, x, targets), true.sum(1)) < 1e-5
    explained = model.explain(x, targets)
    assert relative_error(true, explained.weights) > 0.1
    assert torch.equal(make_explainer("inherent")(model, x, targets), explained.contributions)


@pytest.mark.parametrize("name", [name for name in EXPLAINERS if name not in INAPPLICABLE])
def test_same_map_in_any_batch_and_nothing_left_behind(name, model, few_samples):
    torch.manual_seed(1)
    images, targets = torch.rand(3, 3, 16, 16), torch.tensor([[1, 2], [3, 3], [0, 9]])
    model.train()
    model.stages[0].eval()
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    try:
        maps = make_explainer(name, batch_size=2)(model, images, targets)
        assert flags == [module.training for module in model.modules()]
    finally:
        model.eval()
    assert torch.equal(state, torch.get_rng_state())
    assert maps.shape == (3, 2, 16, 16)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    with torch.inference_mode():
        again = make_explainer(name)(model, images[1:], targets[1:, 1])
    assert relative_error(again, maps[1:, 1]) < 1e-4
    other = make_explainer(name, seed=7)(model, images, targets)
    assert (relative_error(other, maps) > 1e-3) == (name in ("lime", "kernel_shap", "rise", "random"))


@pytest.mark.parametrize("name", ["occlusion_5", "kernel_shap", "rise"])
def test_perturbed_images_come_in_batches(name, model, few_samples):
    seen = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    try:
        make_explainer(name, batch_size=16)(model, torch.rand(2, 3, 16, 16), torch.tensor([[0, 1, 2], [3, 4, 5]]))
    finally:
        handle.remove()
    assert max(seen) == 16
    once = {"occlusion_5": 49 + 2, "kernel_shap": 200 + 1, "rise": 40}[name]  # including unperturbed images
    assert sum(seen) <= 2 * once + 2, "three targets need no more forward passes than one"


@pytest.mark.parametrize("name", sorted(INAPPLICABLE))
def test_what_does_not_apply_says_why(name, model):
    with pytest.raises(ExplainerError, match="CodaNet") as caught:
        make_explainer(name)(model, torch.rand(1, 3, 16, 16), torch.tensor([0]))
    assert "under another name" in str(caught.value)


def test_a_bcosified_network_has_relus():
    torch.manual_seed(0)
    net = bcosify(timm.create_model("resnet18", num_classes=4), from_pretrained=True).eval()
    maps = make_explainer("guided_backprop")(net, torch.rand(1, 3, 32, 32), torch.tensor([1]))
    assert maps.abs().max() > 0
    with pytest.raises(ExplainerError, match="DeepLIFT has no rule"):
        make_explainer("deeplift")(net, torch.rand(1, 3, 32, 32), torch.tensor([1]))


def test_bad_maps_and_names(model):
    nan = Explainer("mine", "Mine", "", lambda model, images, targets: torch.full((*targets.shape, 16, 16), torch.nan))
    with pytest.raises(ExplainerError, match="mine: 2 of 2 maps have NaN"):
        nan(model, torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))
    small = Explainer("mine", "Mine", "", lambda model, images, targets: torch.zeros(*targets.shape, 4, 4))
    with pytest.raises(ExplainerError, match=r"mine returned maps \[1, 1, 4, 4\] for images \[1, 3, 16, 16\]"):
        small(model, torch.rand(1, 3, 16, 16), torch.tensor([0]))
    with pytest.raises(ExplainerError, match="a window of 17 pixels does not fit"):
        make_explainer("occlusion_17")(model, torch.rand(1, 3, 16, 16), torch.tensor([0]))
    with pytest.raises(ExplainerError, match="cannot explain itself"):
        make_explainer("inherent")(nn.Conv2d(3, 2, 1), torch.rand(1, 3, 16, 16), torch.tensor([0]))
    with pytest.raises(ExplainerError, match="has tokens"):
        vit = timm.create_model("vit_tiny_patch16_bcos_224", img_size=32)
        make_explainer("grad_cam")(vit, torch.rand(1, 3, 32, 32), torch.tensor([0]))
    for name in ("saliency", "occlusion_0", "occlusion"):
        with pytest.raises(EvaluationError, match=f"unknown explainer '{name}': choose inherent, gradient"):
            make_explainer(name)


def test_without_captum(monkeypatch):
    monkeypatch.setattr(explainers, "find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"lime needs captum and sklearn: pip install 'timm_coda\[evaluate\]'"):
        make_explainer("lime")
    assert make_explainer("rise").name == "rise"
