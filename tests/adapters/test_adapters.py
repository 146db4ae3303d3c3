"""The adapters with the real Captum, Quantus and pytorch-grad-cam."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from captum.attr import IntegratedGradients, NoiseTunnel
from captum.metrics import infidelity, infidelity_perturb_func_decorator, sensitivity_max
from pytorch_grad_cam import SESS, GradCAM, RefineCAM
from pytorch_grad_cam.metrics.arcc import ARCC
from pytorch_grad_cam.metrics.cam_mult_image import CamMultImageConfidenceChange
from pytorch_grad_cam.metrics.road import ROADCombined, ROADMostRelevantFirst
from pytorch_grad_cam.utils.image import show_cam_on_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget, ClassifierOutputTarget

from helpers import relative_error
from timm_coda import data
from timm_coda.adapters import ValidColors
from timm_coda.adapters.captum import InherentAttribution
from timm_coda.adapters.grad_cam import InherentCAM
from timm_coda.adapters.quantus import explain_func


@pytest.fixture(scope="module")
def model():
    return timm.create_model("coda_net_xs.digits", pretrained=True).eval()


@pytest.fixture(scope="module")
def other_model():
    """Another architecture: B-cos, with normalisation layers. It is untrained, so its logits are close to the bias."""
    torch.manual_seed(0)
    return timm.create_model("bcos_resnet18", num_classes=5).double().eval()


@pytest.fixture(scope="module")
def digits(model):
    """Four test images, (4, 3, 16, 16), and their labels."""
    test = data.load_data(["digits"]).test
    _, transform = data.create_transforms(timm.data.resolve_model_data_config(model))
    return torch.stack([transform(test.image(i)) for i in range(4)]), torch.as_tensor(test.labels[:4])


def noise(inputs):
    return inputs + 0.3 * torch.randn_like(inputs)


# ValidColors ---------------------------------------------------------------------------------------------------------


def test_valid_colors_change_nothing_inside(model, digits):
    images = digits[0].clone().requires_grad_()
    wrapped = ValidColors(model)
    assert torch.equal(wrapped(images), model(images))
    gradients = [torch.autograd.grad(m(images)[:, 3].sum(), images)[0] for m in (wrapped, model)]
    assert torch.equal(*gradients)
    assert not wrapped.training
    assert ValidColors(copy.deepcopy(model).train()).training


def test_valid_colors_clamp_outside(model, digits):
    wild = digits[0] * 3 - 1
    assert torch.equal(ValidColors(model)(wild), model(wild.clamp(0, 1)))
    assert not torch.equal(model(wild), model(wild.clamp(0, 1)))
    expected = model.explain(wild.clamp(0, 1), 2).contributions
    assert relative_error(InherentAttribution(ValidColors(model)).attribute(wild, 2).sum(1), expected) < 1e-5
    with pytest.warns(UserWarning, match=r"outside \[0, 1\]"):
        InherentAttribution(model).attribute(wild, 2)


# Captum --------------------------------------------------------------------------------------------------------------


def test_attributions_sum_to_the_contributions(model, digits):
    images, labels = digits
    explanation = model.explain(images, labels)
    shares = InherentAttribution(model).attribute(images, labels)
    assert shares.shape == images.shape and not shares.requires_grad
    assert relative_error(shares.sum(1), explanation.contributions) < 1e-5
    assert relative_error(shares.sum((1, 2, 3)), explanation.value - explanation.bias) < 1e-5
    encoded = model.encoding(images)
    shares = InherentAttribution(model).attribute(encoded, labels)
    assert relative_error(shares, explanation.weights * encoded) < 1e-6


def test_colours_have_the_share_of_both_encodings(model, digits):
    image = digits[0][:1]
    weights = model.explain(image, 4).weights[0]
    shares = InherentAttribution(model).attribute(image, 4)[0]
    for c, y, x in ((0, 3, 7), (1, 8, 8), (2, 15, 0)):
        color = image[0, c, y, x]
        expected = weights[c, y, x] * color + weights[3 + c, y, x] * (1 - color)
        torch.testing.assert_close(shares[c, y, x], expected)


@pytest.mark.parametrize("target", [7, [7, 7, 7, 7], torch.tensor(7), torch.tensor([7]), torch.full((4,), 7)], ids=str)
def test_targets_as_captum_writes_them(model, digits, target):
    expected = model.explain(digits[0], 7).contributions
    assert relative_error(InherentAttribution(model).attribute(digits[0], target).sum(1), expected) < 1e-5


def test_no_target_is_the_prediction(model, digits):
    expected = model.explain(digits[0]).contributions
    assert relative_error(InherentAttribution(model).attribute(digits[0]).sum(1), expected) < 1e-5


@pytest.mark.parametrize("name", ["model", "other_model"])
def test_convergence_delta_is_rounding(name, request, digits):
    net = request.getfixturevalue(name)
    method = InherentAttribution(net)
    images = digits[0] if name == "model" else torch.rand(2, 3, 64, 64, dtype=torch.float64)
    shares, delta = method.attribute(images, 1, return_convergence_delta=True)
    total = shares.sum((1, 2, 3))
    assert delta.shape == (len(images),) and delta.abs().max() < 1e-5 * total.abs().max()
    assert torch.equal(method.compute_convergence_delta(shares, None, images, 1), delta)
    torch.testing.assert_close(method.compute_convergence_delta(2 * shares, None, images, 1), delta + total)


def test_noise_tunnel(model, digits):
    images, labels = digits
    tunnel = NoiseTunnel(InherentAttribution(ValidColors(model)))
    still = tunnel.attribute(images, nt_samples=2, stdevs=0.0, target=labels)
    assert relative_error(still, InherentAttribution(model).attribute(images, labels)) < 1e-5
    torch.manual_seed(0)
    smooth, delta = tunnel.attribute(
        images, nt_samples=3, nt_samples_batch_size=2, stdevs=0.2, target=labels, return_convergence_delta=True
    )
    assert smooth.shape == images.shape and delta.shape == (12,)
    assert delta.abs().max() < 1e-3 < relative_error(smooth, still)
    torch.manual_seed(0)
    wild = images.repeat_interleave(5, 0) + torch.normal(0, torch.full((20, 3, 16, 16), 0.2))
    expected = model.explain(wild.clamp(0, 1), labels.repeat_interleave(5)).contributions.unflatten(0, (4, 5)).mean(1)
    torch.manual_seed(0)
    assert relative_error(tunnel.attribute(images, stdevs=0.2, target=labels).sum(1), expected) < 1e-4
    variance = tunnel.attribute(images, nt_type="vargrad", stdevs=0.2, target=labels)
    assert variance.min() > -1e-6 and variance.max() > 1e-6


def test_infidelity(model, digits):
    images, labels = digits
    encoded = model.encoding(images)
    shares = InherentAttribution(model).attribute(encoded, labels)

    def remove_all(inputs):
        return torch.ones_like(inputs), torch.zeros_like(inputs)

    score = infidelity(model, remove_all, encoded, shares, target=labels, n_perturb_samples=1)
    assert score.max() < 1e-6  # contributions predict exactly how much the logit drops if everything is removed
    score = infidelity(model, remove_all, encoded, 2 * shares, target=labels, n_perturb_samples=1)
    torch.testing.assert_close(score, shares.sum((1, 2, 3)) ** 2, rtol=1e-3, atol=1e-5)

    torch.manual_seed(0)
    wrapped = ValidColors(model)
    shares = InherentAttribution(wrapped).attribute(images, labels)
    perturb = infidelity_perturb_func_decorator(multiply_by_inputs=True)(noise)
    score = infidelity(wrapped, perturb, images, shares, target=labels, n_perturb_samples=5)
    assert score.shape == (4,) and torch.isfinite(score).all() and score.min() > 0


def test_sensitivity_max(model, digits):
    images, labels = digits
    method = InherentAttribution(ValidColors(model))
    torch.manual_seed(0)
    scores = [
        sensitivity_max(method.attribute, images, perturb_radius=radius, n_perturb_samples=3, target=labels)
        for radius in (0.0, 0.02, 0.3)
    ]
    assert scores[0].max() < 1e-6
    assert (scores[1] > 0).all() and (scores[1] < scores[2]).all()


def test_captums_own_methods_agree_with_the_wrapper(model, digits):
    """Integrated gradients of the wrapper, from a black image, converge: Captum treats it like any other model."""
    _, delta = IntegratedGradients(ValidColors(model)).attribute(
        digits[0], target=digits[1], n_steps=100, return_convergence_delta=True
    )
    value = (model(digits[0]) - model(torch.zeros(1, 3, 16, 16))).gather(1, digits[1][:, None]).abs()
    assert delta.abs().max() < 0.05 * value.max()


def test_captum_errors_name_the_mend(model, digits):
    method = InherentAttribution(model)
    with pytest.raises(ValueError, match="2 inputs: expected one, the images"):
        method.attribute((digits[0], digits[0]), 1)
    with pytest.raises(ValueError, match=r"additional_forward_args=\(3,\): the models take only images"):
        method.attribute(digits[0], 1, (3,))
    with pytest.raises(ValueError, match="start_point must be None"):
        method.compute_convergence_delta(digits[0], torch.zeros_like(digits[0]), digits[0], 1)
    with pytest.raises(ValueError, match="target=10: the model's classes are 0 to 9"):
        method.attribute(digits[0], 10)


# Quantus -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(model, digits):
    """Arguments shared by all Quantus metrics."""
    images, labels = digits[0].numpy(), digits[1].numpy()
    wrapped = ValidColors(model)
    a_batch = explain_func(wrapped, images, labels)
    return {"model": wrapped, "x_batch": images, "y_batch": labels, "a_batch": a_batch, "explain_func": explain_func}


def quiet(metric, **options):
    np.random.seed(0)
    return metric(disable_warnings=True, **options)


def test_explain_func_gives_contributions(model, digits):
    images, labels = digits
    maps = explain_func(model=model, inputs=images.numpy(), targets=labels.numpy(), device="cpu")
    assert isinstance(maps, np.ndarray) and maps.shape == (4, 1, 16, 16) and maps.min() < 0 < maps.max()
    np.testing.assert_array_equal(maps[:, 0], model.explain(images, labels).contributions)
    in_float64 = explain_func(ValidColors(model), images.numpy().astype(np.float64) * 2, labels.tolist())
    np.testing.assert_array_equal(in_float64[:, 0], model.explain((2 * images).clamp(0, 1), labels).contributions)
    with pytest.raises(ValueError, match="device='cuda', but the model is on cpu: move it there first"):
        explain_func(model, images.numpy(), labels.numpy(), device="cuda")


def test_quantus_faithfulness_correlation(batch):
    import quantus  # here, as importing it takes seconds

    # The background is black, so removed pixels get the mean colour: black would not change the background.
    options = {"nr_runs": 50, "subset_size": 64, "perturb_baseline": "mean", "return_aggregate": False}
    scores, negated = (
        quiet(quantus.FaithfulnessCorrelation, **options)(**batch | {"a_batch": sign * batch["a_batch"]})
        for sign in (1, -1)
    )
    assert len(scores) == 4
    assert np.mean(scores) > 0.2 > -0.2 > np.mean(negated)


def test_quantus_max_sensitivity(batch):
    import quantus

    scores = [
        np.array(quiet(quantus.MaxSensitivity, nr_samples=3, lower_bound=radius)(**batch)) for radius in (0.01, 0.3)
    ]
    assert scores[0].shape == (4,) and (scores[0] > 0).all() and (scores[0] < scores[1]).all()


def test_quantus_random_logit(batch):
    import quantus

    same_class = np.array(quiet(quantus.RandomLogit, num_classes=10, seed=42)(**batch))
    assert same_class.shape == (4,) and (same_class < 0.95).all()  # it is 1 if maps ignore the class


@pytest.mark.parametrize("order", ["top_down", "independent"])
def test_quantus_mprt(model, batch, order):
    import quantus

    before = copy.deepcopy(model.state_dict())
    scores = quiet(quantus.MPRT, layer_order=order, seed=42)(**batch)
    layers = [name for name, module in batch["model"].named_modules() if hasattr(module, "reset_parameters")]
    expected = layers[::-1] if order == "top_down" else layers
    assert list(scores) == ["original", *expected] and len(layers) > 3
    np.testing.assert_allclose(scores["original"], 1)
    assert max(np.mean(scores[layer]) for layer in layers) < 0.9
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_quantus_sparseness(batch):
    import quantus

    scores = quiet(quantus.Sparseness)(**batch)
    # Textbook formula of the Gini index.
    values = np.sort(np.abs(batch["a_batch"].reshape(4, -1)).astype(np.float64))
    rank = np.arange(1, 257)
    expected = ((2 * rank - 257) * values).sum(1) / (256 * values.sum(1))
    np.testing.assert_allclose(scores, expected, atol=2e-3)


@pytest.mark.filterwarnings("ignore::UserWarning:quantus")  # advice about parameters
def test_quantus_evaluate(batch):
    """Quantus' own loop, in which our method stands beside one of Quantus' and maps that were computed before."""
    import quantus

    images, labels, wrapped = batch["x_batch"], batch["y_batch"], batch["model"]
    metrics = {
        "MaxSensitivity": quantus.MaxSensitivity(nr_samples=2, lower_bound=0.01, disable_warnings=True),
        "RandomLogit": quantus.RandomLogit(num_classes=10, seed=42, disable_warnings=True),
        "Sparseness": quantus.Sparseness(disable_warnings=True),
    }
    for options in ({}, {"device": "cpu"}, {"device": "cpu", "xai_lib": "captum"}):
        methods = {"ours": explain_func, "InputXGradient": quantus.explain}
        results = quantus.evaluate(metrics, methods, wrapped, images, labels, explain_func_kwargs=options)
        for name in methods:  # Quantus prints a metric's error, and leaves the metric out
            assert {metric: len(scores) for metric, scores in results[name].items()} == dict.fromkeys(metrics, 4)
        direct = quantus.Sparseness(disable_warnings=True)(**batch)
        np.testing.assert_array_equal(results["ours"]["Sparseness"], direct)
        assert not np.array_equal(results["InputXGradient"]["Sparseness"], direct)
        assert (np.array(results["ours"]["RandomLogit"]) < 0.95).all()
    with pytest.raises(TypeError, match="reduce_axes"):  # it would change the maps
        quantus.evaluate(metrics, methods, wrapped, images, labels, explain_func_kwargs={"reduce_axes": ()})


# pytorch-grad-cam ----------------------------------------------------------------------------------------------------


def test_cam_is_the_positive_part_of_the_contributions(model, digits):
    images, labels = digits
    targets = [ClassifierOutputTarget(c) for c in labels.tolist()]
    with InherentCAM(model) as cam:
        maps = cam(input_tensor=images, targets=targets)
    assert maps.shape == (4, 16, 16) and maps.dtype == np.float32
    expected = model.explain(images, labels).contributions.clamp_min(0)
    for one, map_ in zip(expected, maps, strict=True):
        np.testing.assert_allclose(map_, one / one.max(), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(
        cam(images), cam(images, [ClassifierOutputTarget(c) for c in model(images).argmax(1)])
    )


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # SciPy's sparse matrices in ROAD
def test_cam_in_place_of_the_librarys(model, digits):
    """The same two lines with `GradCAM` and `InherentCAM`, then the library's own overlay and metric."""
    images = digits[0][:2]
    targets = [ClassifierOutputTarget(c) for c in digits[1][:2].tolist()]
    other = copy.deepcopy(model)  # GradCAM leaves gradients on the parameters
    with GradCAM(model=other, target_layers=[other.stages[-1]]) as cam:
        theirs = cam(input_tensor=images, targets=targets)
    ours = InherentCAM(model)(input_tensor=images, targets=targets)
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    picture = show_cam_on_image(images[0].permute(1, 2, 0).numpy(), ours[0], use_rgb=True)
    assert picture.shape == (16, 16, 3) and picture.dtype == np.uint8
    scores = [ROADMostRelevantFirst(percentile=75)(images, maps, targets, model) for maps in (ours, 1 - ours)]
    assert scores[0].shape == (2,) and (scores[0] < scores[1]).all()  # removing important pixels lowers the logit more


def test_cam_runs_the_librarys_usage_example(model, digits):
    """The example of pytorch-grad-cam's README with the name of the class replaced."""
    input_tensor, labels = digits[0][:1], digits[1][:1].tolist()
    rgb_img = input_tensor[0].permute(1, 2, 0).numpy()
    target_layers = [model.stages[-1]]
    targets = [ClassifierOutputTarget(labels[0])]
    with InherentCAM(model=model, target_layers=target_layers) as cam:
        grayscale_cam = cam(input_tensor=input_tensor, targets=targets, aug_smooth=False, eigen_smooth=False)
        grayscale_cam = grayscale_cam[0, :]
        visualization = show_cam_on_image(rgb_img, grayscale_cam, use_rgb=True)
        model_outputs = cam.outputs
    assert visualization.shape == (16, 16, 3)
    assert relative_error(model_outputs, model(input_tensor)) < 1e-6
    with GradCAM(model=copy.deepcopy(model), target_layers=[]) as theirs:
        assert not theirs.model.training
    assert not InherentCAM(copy.deepcopy(model).train()).model.training


def test_cam_of_layers(model, digits):
    """A target layer gives the map of the layer's output, enlarged to the image; several give the mean."""
    images, labels = digits
    targets = [ClassifierOutputTarget(c) for c in labels.tolist()]
    alone, expected = [], []
    for name in ("stages.0", "stages.2"):
        maps = model.explain(images, labels, layer=name).contributions.clamp_min(0)
        maps = torch.nn.functional.interpolate(maps[:, None], (16, 16), mode="bilinear")[:, 0]
        expected.append(maps / maps.amax((1, 2), keepdim=True))
        alone.append(InherentCAM(ValidColors(model), [model.get_submodule(name)])(images, targets))
        np.testing.assert_allclose(alone[-1], expected[-1], atol=1e-5)
    assert alone[0].shape == alone[1].shape == (4, 16, 16)
    both = InherentCAM(model, [model.stages[0], model.stages[2]])(images, targets)
    mean = (alone[0] + alone[1]) / 2
    np.testing.assert_allclose(both, mean / mean.max((1, 2), keepdims=True), atol=1e-5)
    with pytest.raises(ValueError, match="the target layer Linear is not part of this CodaNet"):
        InherentCAM(model, [torch.nn.Linear(1, 1)])
    with pytest.raises(ValueError, match="target_layers is empty"):
        InherentCAM(model, [])


def test_cam_of_a_vision_transformers_tokens():
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_bcos_224", num_classes=3, img_size=64, depth=1).eval()
    images = torch.rand(2, 3, 64, 64)
    cam = InherentCAM(net, [net.blocks[-1].norm1], reshape_transform=lambda tokens: tokens)
    maps = net.explain(images, 1, layer="blocks.0.norm1").contributions.clamp_min(0)
    found = cam(images, [ClassifierOutputTarget(1)] * 2)
    assert maps.shape == (2, 4, 4) and found.shape == (2, 64, 64)
    strongest = [divmod(int(one.argmax()), 4) for one in maps]
    seen = [divmod(int(one.argmax()), 64) for one in found]
    assert strongest == [(row // 16, column // 16) for row, column in seen]


def test_cam_smoothed_over_versions_of_the_image(model, digits):
    images, labels = digits
    targets = [ClassifierOutputTarget(c) for c in labels.tolist()]
    cam = InherentCAM(model)
    smooth = cam(images, targets, aug_smooth=True)
    assert torch.equal(cam.outputs, model.explain(images).logits), "of the images themselves"
    versions = []
    for factor in (0.9, 1, 1.1):
        bright = (factor * images).clamp(0, 1)
        versions += [cam(bright, targets), cam(bright.flip(-1), targets)[:, :, ::-1]]
    np.testing.assert_allclose(smooth, np.mean(versions, 0), atol=1e-6)
    assert np.abs(smooth - versions[2]).max() > 0.05 and 0 <= smooth.min() <= smooth.max() <= 1
    np.testing.assert_allclose(cam(images.flip(-1), targets, aug_smooth=True)[:, :, ::-1], smooth, atol=1e-6)
    np.testing.assert_allclose(cam(model.encoding(images), targets, aug_smooth=True), smooth, atol=1e-6)
    with pytest.raises(ValueError, match="eigen_smooth=True: a principal component"):
        cam(images, targets, eigen_smooth=True)


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # SciPy's sparse matrices in ROAD
def test_cam_in_the_librarys_metrics_and_methods(model, digits):
    images, labels = digits[0][:2], digits[1][:2].tolist()
    targets = [ClassifierOutputTarget(c) for c in labels]
    cam = InherentCAM(model)
    maps = cam(images, targets)
    softmax = [ClassifierOutputSoftmaxTarget(c) for c in labels]
    change = CamMultImageConfidenceChange()(images, maps, softmax, model)
    assert change.shape == (2,) and (np.abs(change) <= 1).all()
    assert (ROADCombined(percentiles=[40, 80])(images, maps, targets, model) > 0).all()
    assert (((score := ARCC(cam, road_percentiles=[40])(images, maps, targets, model)) > 0) & (score <= 1)).all()
    with SESS(model, [model.stages[2]], base_method=InherentCAM, num_scales=2) as sess:
        assert sess(images, targets).shape == (2, 16, 16)
    refined = RefineCAM(model, [model.stages[1], model.stages[2]], base_method=InherentCAM)(images, targets)
    assert refined.shape == (2, 16, 16) and np.isfinite(refined).all()


def test_cam_where_nothing_speaks_for_the_class():
    net = timm.create_model("coda_net_xs", num_classes=2, rank=2).eval()
    torch.nn.init.zeros_(net.get_classifier().up.weight)
    torch.nn.init.zeros_(net.get_classifier().up.bias)
    assert (InherentCAM(net)(torch.rand(1, 3, 16, 16)) == 0).all()


def test_cam_refuses_what_has_no_exact_explanation(model, digits):
    targets = [ClassifierOutputSoftmaxTarget(1)] * 4
    with pytest.raises(TypeError, match=r"only logits have exact explanations: use ClassifierOutputTarget"):
        InherentCAM(model)(digits[0], targets)
    with pytest.raises(ValueError, match="4 images"):
        InherentCAM(model)(digits[0], [ClassifierOutputTarget(1)])


# All -----------------------------------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was(model, digits):
    images = digits[0].clone().requires_grad_()
    before = copy.deepcopy(model.state_dict())
    InherentAttribution(model).attribute(images, 1)
    explain_func(model, images.detach().numpy(), np.arange(4))
    InherentCAM(model)(images)
    assert images.grad is None and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_without_captum_the_error_names_the_extra():
    code = "import sys; sys.modules['captum'] = None; import timm_coda.adapters.quantus, timm_coda.adapters.grad_cam; "
    run = subprocess.run(
        [sys.executable, "-c", code + "import timm_coda.adapters.captum"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr.strip().endswith("ImportError: this adapter needs Captum: pip install 'timm_coda[evaluate]'")
