"""Sanity metrics: tiny maps by hand, comparison with other libraries, and a trained network."""

import copy

import numpy as np
import pytest
import timm
import torch
from captum.metrics import sensitivity_max
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity
from torch import nn

from timm_coda import data
from timm_coda.evaluate import EvaluationError, Explainer, ExplainerError, Subject, sanity
from timm_coda.evaluate.explainers import make_explainer
from timm_coda.evaluate.sanity import ContrastiveLocalisation, NoiseSensitivity, Randomisation, Sparseness


def explainer(method, name="hand"):
    return Explainer(name, name, "made by hand", method)


IMAGE_ITSELF = explainer(lambda model, images, targets: images[:, :1])
SAME_FOR_ALL = explainer(lambda model, images, targets: torch.arange(4.0).view(1, 1, 2, 2).expand(len(images), 1, 2, 2))
NOTHING = explainer(lambda model, images, targets: torch.zeros(len(images), 1, *images.shape[2:]))


def subject_of(images, model=None, **options):
    """A subject of in-memory images (N, C, H, W), all of class 0."""
    model = nn.Linear(1, 1).eval() if model is None else model
    labels = np.zeros(len(images), np.int64)
    options = {"batch_size": 2, "seed": 1} | options
    return Subject(
        model, lambda numbers: images[list(numbers)], labels, np.zeros((len(images), 2)), len(images), **options
    )


@pytest.fixture(scope="module")
def digits():
    """The shipped model with its first eight test images."""
    model = timm.create_model("coda_net_xs.digits", pretrained=True).eval()
    test = data.load_data(["digits"]).test
    _, transform = data.create_transforms(timm.data.resolve_model_data_config(model))
    images = torch.stack([transform(test.image(i)) for i in range(8)])
    logits = model(images).detach().numpy()
    return Subject(model, lambda numbers: images[list(numbers)], np.asarray(test.labels[:8]), logits, 8, batch_size=3)


# Gini ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, expected",
    [
        ([1, 1, 1, 1], 0),
        ([-1, 1, -1, 1], 0),
        ([0, 0, 0, 5], 3 / 4),  # (n - 1) / n
        ([0, 0, 2, 2], 1 / 2),
        ([1, 2, 3, 4], 1 / 4),  # (-3 * 1 - 1 * 2 + 1 * 3 + 3 * 4) / (4 * 10)
        ([-4, 1, 3, -2], 1 / 4),
        ([0, 0, 0, 0], 0),
    ],
)
def test_gini_by_hand(values, expected):
    assert sanity.gini(torch.tensor(values, dtype=torch.float32).view(1, 2, 2)).item() == pytest.approx(expected)


def test_sparseness_baseline_is_that_of_random_maps(digits):
    random = torch.randn(3, 200, 200, generator=torch.Generator().manual_seed(0))
    baseline = Sparseness().baseline(digits)
    torch.testing.assert_close(sanity.gini(random), torch.full((3,), baseline.value), rtol=0.01, atol=0)
    scores = Sparseness()(digits, make_explainer("inherent")).values
    maps = digits.model.explain(digits.load(range(8)), torch.from_numpy(digits.labels)).contributions
    np.testing.assert_allclose(scores, sanity.gini(maps), rtol=1e-5)


# Noise ---------------------------------------------------------------------------------------------------------------


def test_noise_sensitivity_by_hand():
    images = torch.full((3, 1, 2, 2), 0.5)
    metric = NoiseSensitivity(radius=0.1, draws=4)
    scores = metric(subject_of(images), IMAGE_ITSELF).values
    expected = []
    for number in range(3):  # the map is the image, so its change is the noise, and |map| = 1
        generator = torch.Generator().manual_seed(data.derive_seed(1, number))
        noise = 0.1 * (2 * torch.rand(4, 1, 2, 2, generator=generator) - 1)
        expected.append(noise.flatten(1).norm(dim=1).max())
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert scores.max() <= 0.2 and len(set(scores.tolist())) == 3


def test_noise_keeps_colours_valid_and_is_the_same_in_any_batch():
    seen = []

    def watch(model, images, targets):
        seen.append(images)
        return images[:, :1]

    images = torch.rand(5, 1, 2, 2).round()
    one = NoiseSensitivity(radius=0.3)(subject_of(images, batch_size=5), explainer(watch)).values
    two = NoiseSensitivity(radius=0.3)(subject_of(images, batch_size=2), explainer(watch)).values
    np.testing.assert_array_equal(one, two)
    assert torch.cat(seen).min() >= 0 and torch.cat(seen).max() <= 1
    assert len(NoiseSensitivity(images=3)(subject_of(images), IMAGE_ITSELF).values) == 3


def test_noise_sensitivity_of_maps_that_do_not_look():
    subject = subject_of(torch.rand(3, 1, 2, 2))
    assert (NoiseSensitivity()(subject, SAME_FOR_ALL).values == 0).all()
    assert (NoiseSensitivity()(subject, NOTHING).values == 0).all()


def test_noise_sensitivity_is_captums(digits):
    images, labels = digits.load(range(8)), torch.from_numpy(digits.labels)
    metric, inherent = NoiseSensitivity(radius=0.05, draws=3), make_explainer("inherent")
    noise = torch.stack([metric._noise(image, digits.seed, i) for i, image in enumerate(images)], 0)  # (N, 3, C, H, W)

    def explain(inputs, target):
        if isinstance(inputs, tuple):
            return (inherent(digits.model, *inputs, target),)
        return inherent(digits.model, inputs.clamp(0, 1), target)

    def perturb(inputs, radius):
        return inputs + noise.flatten(0, 1)

    expected = sensitivity_max(explain, images, perturb, 0.05, n_perturb_samples=3, target=labels)
    np.testing.assert_allclose(metric(digits, inherent).values, expected, rtol=1e-4)
    random = metric(digits, make_explainer("random")).values
    assert random.mean() == pytest.approx(metric.baseline(digits).value, rel=0.1)


# Similarities --------------------------------------------------------------------------------------------------------


def test_spearman_by_hand_and_by_scipy():
    ranks = torch.tensor([[[1.0, 2, 3, 4]], [[1, 2, 3, 4]], [[1, 2, 3, 4]], [[5, 5, 5, 5]], [[5, 5, 5, 5]]])
    others = torch.tensor([[[10.0, 20, 30, 99]], [[4, 3, 2, 1]], [[2, 1, 4, 3]], [[1, 2, 3, 4]], [[5, 5, 5, 5]]])
    # Third: 1 - 6 * (1 + 1 + 1 + 1) / (4 * 15)
    assert sanity.rank_similarity(ranks, others).tolist() == pytest.approx([1, -1, 0.6, 0, 1])
    a, b = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)).round(decimals=0)  # many ties
    expected = [spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(sanity.rank_similarity(a, b), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(16, 16), (7, 12), (9, 8)], ids=str)
def test_ssim_is_scikit_images(shape):
    a, b = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    b = a + 0.3 * b
    scaled = [[0.5 + 0.5 * x / np.abs(x).max() for x in m.numpy().astype(np.float64)] for m in (a, b)]
    expected = [structural_similarity(x, y, data_range=1) for x, y in zip(*scaled, strict=True)]
    np.testing.assert_allclose(sanity.ssim(a, b), expected, rtol=1e-5)


def test_ssim_of_equal_opposite_and_empty_maps():
    maps = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sanity.ssim(maps, 3 * maps), torch.ones(2))
    assert sanity.ssim(maps, -maps).max() < -0.8
    assert torch.isfinite(sanity.ssim(maps, torch.zeros(2, 8, 8))).all()
    assert torch.isfinite(sanity.ssim(maps[:, :1, :4], maps[:, :1, 4:])).all()  # smaller than the default window


# Randomisation -------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two linear layers of one weight each, and a norm between them."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(1, 1, bias=False), nn.LayerNorm(1), nn.Linear(1, 1, bias=False)


def test_layers_from_the_classifier_down():
    model = Two()
    assert sanity.layer_groups(model, 10) == [["second"], ["first", "norm"]]
    assert sanity.layer_groups(model, 1) == [["second", "first", "norm"]]
    deep = nn.Sequential(*[nn.Linear(1, 1) for _ in range(7)])
    assert sanity.layer_groups(deep, 3) == [["6", "5", "4"], ["3", "2"], ["1", "0"]]
    with pytest.raises(EvaluationError, match="ReLU has no layer with reset_parameters"):
        sanity.layer_groups(nn.ReLU(), 3)


@pytest.mark.parametrize(
    "order, expected", [("cascading", ["ab", "aB", "AB"]), ("independent", ["ab", "aB", "Ab"])], ids=str
)
def test_what_is_initialised_anew(order, expected):
    """At each step, a layer is as learned (lower case) or reinitialised (upper case)."""
    model = Two().eval()
    learned = {name: getattr(model, name).weight.item() for name in ("first", "second")}
    seen = []

    def watch(net, images, targets):
        a, b = (getattr(net, name).weight.item() == learned[name] for name in ("first", "second"))
        seen.append(("a" if a else "A") + ("b" if b else "B"))
        return images[:, :1]

    scores = Randomisation(order=order)(subject_of(torch.rand(2, 1, 2, 2), model), explainer(watch))
    assert seen == expected
    assert scores.curve.y.shape == (2, 3) and (scores.curve.y == 1).all() and (scores.values == 1).all()


@pytest.mark.parametrize("changed, alike", [([2.0, 1, 4, 3], 0.6), ([-1.0, -2, -3, -4], 1)], ids=["other", "turned"])
def test_the_mean_leaves_out_the_trained_network(changed, alike):
    model = Two().eval()
    learned = model.second.weight.item()

    def dependent(net, images, targets):  # the map changes if the classifier changes
        values = torch.tensor([1.0, 2, 3, 4] if net.second.weight.item() == learned else changed)
        return values.view(1, 1, 2, 2).expand(len(images), 1, 2, 2)

    cascading, independent = (
        Randomisation(order=order)(subject_of(torch.rand(3, 1, 2, 2), model), explainer(dependent))
        for order in ("cascading", "independent")
    )
    np.testing.assert_allclose(cascading.curve.y, [[1, alike, alike]] * 3, rtol=1e-6)
    np.testing.assert_allclose(independent.curve.y, [[1, alike, 1]] * 3, rtol=1e-6)
    np.testing.assert_allclose(cascading.values, alike, rtol=1e-6)
    np.testing.assert_allclose(independent.values, (alike + 1) / 2, rtol=1e-6)


@pytest.mark.parametrize("similarity", ["spearman", "ssim"])
def test_randomisation_of_a_trained_network(digits, similarity):
    before, random_state = copy.deepcopy(digits.model.state_dict()), torch.get_rng_state()
    names = [name for name, _ in digits.model.named_modules()]
    inherent, random = make_explainer("inherent"), make_explainer("random")
    for order in ("cascading", "independent"):
        metric = Randomisation(order=order, similarity=similarity, images=4)
        scores = metric(digits, inherent)
        assert scores.values.shape == (4,)
        np.testing.assert_allclose(scores.curve.y[:, 0], 1)
        assert scores.values.mean() < 0.8  # its maps depend on what was learned
        np.testing.assert_array_equal(metric(digits, inherent).curve.y, scores.curve.y)
        np.testing.assert_allclose(metric(digits, random).values, 1, rtol=1e-5)  # random maps do not depend on it
    assert torch.equal(random_state, torch.get_rng_state())
    assert names == [name for name, _ in digits.model.named_modules()]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), digits.model.state_dict().values(), strict=True))


def test_a_network_whose_maps_break_is_the_explainers_error():
    model = Two().eval()
    learned = model.second.weight.item()

    def broken(net, images, targets):
        return images[:, :1] * (1 if net.second.weight.item() == learned else float("nan"))

    with pytest.raises(ExplainerError, match="hand: 2 of 2 maps have NaN"):
        Randomisation(order="cascading")(subject_of(torch.rand(2, 1, 2, 2), model), explainer(broken))


# Contrast ------------------------------------------------------------------------------------------------------------


def test_contrast_by_hand():
    # A grid of 2 x 2 cells of one pixel each; one map per class, cells row by row.
    maps = torch.tensor([[4.0, 0, 0, 0], [1, 2, 0, 0], [0, 0, 0, 6], [0, 0, 0, 3]]).view(1, 4, 2, 2)
    # 0 - 1: (3, -2, 0, 0): all right, 5 of 5
    # 1 - 2: (1, 2, 0, -6): 2 in cell 1, nothing in cell 2: 2 of 9
    # 2 - 3: (0, 0, 0, 3): evidence for the first class in the second's cell: 0 of 3
    # 3 - 0: (-4, 0, 0, 3): all right, 7 of 7
    assert sanity.contrast_in_cells(maps, 2)[0].tolist() == pytest.approx([1, 2 / 9, 0, 1])


def test_contrast_of_perfect_equal_and_random_maps():
    perfect = torch.eye(9).view(1, 9, 3, 3).repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(sanity.contrast_in_cells(perfect, 3), torch.ones(1, 9, dtype=torch.float64))
    assert (sanity.contrast_in_cells(perfect.roll(3, 1), 3) == 0).all()  # cells of the next row
    assert (sanity.contrast_in_cells(perfect[:, :1].expand(1, 9, 12, 12), 3) == 0).all()
    random = torch.randn(2, 9, 150, 150, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        sanity.contrast_in_cells(random, 3).float(), torch.full((2, 9), 1 / 9), rtol=0.05, atol=0
    )


def test_contrast_is_the_models_own(digits):
    """The difference of two maps is the map of `explain(versus=)`; the median exceeds the baseline."""
    metric = ContrastiveLocalisation(grids=2, size=2)
    images, targets = metric.grids.make(digits, metric.grids.choose(digits))
    scores = metric(digits, make_explainer("inherent")).values
    assert scores.shape == targets.shape
    difference = digits.model.explain(images, targets, versus=targets.roll(-1, 1)).contributions[0].double()
    for i in range(4):
        j = (i + 1) % 4
        own, other = (difference[i, 16 * (c // 2) :][:16, 16 * (c % 2) :][:, :16] for c in (i, j))
        expected = (own.clamp(min=0).sum() - other.clamp(max=0).sum()) / difference[i].abs().sum()
        assert scores[0, i] == pytest.approx(expected.item(), rel=1e-3)
    assert np.median(scores) > 0.5 > metric.baseline(digits).value == 0.25


def test_contrast_errors_name_the_mend(digits):
    with pytest.raises(EvaluationError, match="a grid of 4 x 4 needs 16 classes: use a smaller --grid-size"):
        ContrastiveLocalisation(grids=2, size=4)(digits, make_explainer("random"))


# All -----------------------------------------------------------------------------------------------------------------


def test_names_are_distinct_and_texts_say_the_settings(digits):
    metrics = [
        NoiseSensitivity(),
        Sparseness(),
        ContrastiveLocalisation(),
        *(Randomisation(order=o, similarity=s) for o in ("cascading", "independent") for s in ("spearman", "ssim")),
    ]
    assert len({m.name for m in metrics}) == len({m.label for m in metrics}) == len(metrics)
    assert "0.02" in metrics[0].about and "at most 10 steps" in metrics[3].about
    assert all(m.baseline(digits).label for m in metrics)
