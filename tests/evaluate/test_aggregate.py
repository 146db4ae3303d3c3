"""Aggregates: exact means of exact explanations, independent of the batch size, and their figure."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from timm_coda import data
from timm_coda.evaluate import EvaluationError, Subject
from timm_coda.evaluate.aggregate import aggregate, figure
from timm_coda.explanation import figures

LAYER = "stages.1.0"


@pytest.fixture(scope="module")
def digits():
    """The shipped model with its first 60 test images."""
    model = timm.create_model("coda_net_xs.digits", pretrained=True).eval()
    test = data.load_data(["digits"]).test
    _, transform = data.create_transforms(timm.data.resolve_model_data_config(model))
    images = torch.stack([transform(test.image(i)) for i in range(60)])
    labels, names = np.asarray(test.labels[:60]), tuple(model.pretrained_cfg["label_names"])
    loaded = []

    def load(numbers):
        loaded.append(len(numbers))
        return images[list(numbers)]

    subject = Subject(model, load, labels, np.zeros((60, 10)), 50, label_names=names, batch_size=7)
    return subject, images, labels, loaded


@pytest.fixture(scope="module")
def result(digits):
    return aggregate(digits[0], layer=LAYER)


def test_means_of_the_explanations_of_each_class(digits, result):
    subject, images, labels, _ = digits
    assert result.classes.tolist() == list(range(10)) and result.counts.sum() == 50
    for row in (0, 3, 9):
        of_class = np.flatnonzero(labels[:50] == row)
        explanation = subject.model.explain(images[of_class], row)
        assert result.counts[row] == len(of_class)
        np.testing.assert_allclose(result.values[row], explanation.value.mean(), rtol=1e-5)
        np.testing.assert_allclose(result.images[row], images[of_class].mean(0), atol=1e-6)
        np.testing.assert_allclose(result.contributions[row], explanation.contributions.mean(0), rtol=1e-3, atol=1e-6)
        weight = explanation.contributions.clamp(min=0)
        np.testing.assert_allclose(result.evidence[row], weight.mean(0), rtol=1e-3, atol=1e-6)
        colors = (weight[:, None] * images[of_class]).sum(0) / weight.sum(0)
        np.testing.assert_allclose(
            result.colors[row][:, weight.sum(0) > 1e-3], colors[:, weight.sum(0) > 1e-3], rtol=1e-3
        )
        inner = subject.model.explain(images[of_class], row, layer=LAYER)
        np.testing.assert_allclose(result.positions[row], inner.contributions.mean(0), rtol=1e-3, atol=1e-5)


def test_all_three_views_sum_to_the_mean_logit(result):
    for shares in (result.contributions, result.positions, result.channels):
        total = shares.reshape(10, -1).sum(1)
        np.testing.assert_allclose(result.bias + total, result.values, rtol=1e-4)


def test_a_channels_share_is_what_the_logit_is_made_of(digits, result):
    """The head is a linear map of the channels: without a channel, the logit drops by its contribution."""
    subject, images, labels, _ = digits
    of_class = np.flatnonzero(labels[:50] == 4)
    outputs = []
    handle = subject.model.get_submodule(LAYER).register_forward_hook(
        lambda module, args, output: outputs.append(output)
    )
    inner = subject.model.explain(images[of_class], 4, layer=LAYER)
    handle.remove()
    without = outputs[0].detach().clone()
    without[:, 18] = 0
    less = (inner.weights * without).sum((1, 2, 3)) - (inner.weights * outputs[0].detach()).sum((1, 2, 3))
    np.testing.assert_allclose(result.channels[4, 18], -less.mean(), rtol=1e-4)
    order = result.strongest(4, 3)
    size = np.abs(result.channels[4])
    assert size[order].tolist() == sorted(size)[::-1][:3]


def test_bounded_memory_and_the_same_in_any_batches(digits, result):
    subject, images, labels, loaded = digits
    loaded.clear()
    some = aggregate(subject, classes=[7, 2])
    assert max(loaded) <= 7 and sum(loaded) == (labels[:50] == 7).sum() + (labels[:50] == 2).sum()
    assert some.classes.tolist() == [7, 2] and some.layer is some.channels is some.positions is None
    whole = Subject(subject.model, lambda numbers: images[list(numbers)], labels, subject.logits, 50, batch_size=50)
    for other, rows in ((some, [7, 2]), (aggregate(whole), slice(None))):
        np.testing.assert_allclose(other.contributions, result.contributions[rows], rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(other.colors, result.colors[rows], atol=1e-3)


def test_tokens_of_a_vision_transformer():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_bcos_224", img_size=32, num_classes=2).eval()
    images, labels = torch.rand(4, 3, 32, 32), np.array([0, 1, 1, 0])
    subject = Subject(model, lambda numbers: images[list(numbers)], labels, np.zeros((4, 2)), 4)
    views = aggregate(subject, layer="blocks.0")
    inner = model.explain(images, torch.from_numpy(labels), layer="blocks.0")
    assert views.positions.shape[1:] == inner.contributions.shape[1:]
    assert views.channels.shape == (2, inner.weights.shape[1])
    np.testing.assert_allclose(views.channels.sum(1), views.positions.sum((1, 2)), rtol=1e-3)


def test_the_true_class_is_explained_even_where_another_is_predicted(digits):
    subject, images, labels, _ = digits
    wrong = Subject(subject.model, subject.load, (labels + 1) % 10, subject.logits, 50)
    of_class = np.flatnonzero((labels[:50] + 1) % 10 == 5)
    expected = subject.model.explain(images[of_class], 5).value.mean()
    np.testing.assert_allclose(aggregate(wrong, classes=[5]).values, [expected], rtol=1e-4)


def test_colours_where_nothing_speaks_for_a_class_are_the_mean_images():
    model = timm.create_model("coda_net_xs", num_classes=2, rank=2).eval()
    nn.init.zeros_(model.get_classifier().up.weight)
    nn.init.zeros_(model.get_classifier().up.bias)
    images = torch.rand(3, 3, 16, 16)
    subject = Subject(model, lambda numbers: images[list(numbers)], np.zeros(3, np.int64), np.zeros((3, 2)), 3)
    views = aggregate(subject)
    np.testing.assert_allclose(views.colors[0], images.mean(0), atol=1e-6)
    assert (views.evidence == 0).all()
    figure(views)


def test_errors_name_the_mend(digits, result):
    subject, *_ = digits
    with pytest.raises(EvaluationError, match=r"no image of class \[11\] among 50 images: leave out the class, or"):
        aggregate(subject, classes=[1, 11])
    with pytest.raises(EvaluationError, match="no image of class"):
        aggregate(subject, classes=[])
    with pytest.raises(ValueError, match="layer='nowhere': no such layer; choose for example one of stages"):
        aggregate(subject, layer="nowhere")
    with pytest.raises(TypeError, match="Linear cannot explain itself"):
        aggregate(Subject(nn.Linear(1, 1), subject.load, subject.labels, subject.logits, 50))
    with pytest.raises(ValueError, match=r"pass layer= to aggregate\(\)"):
        aggregate(subject, classes=[1]).strongest(0)


def test_figure_is_drawn_and_nothing_is_cut(tmp_path, digits, result):
    sizes = []
    for views, rows in ((result, 2), (aggregate(digits[0], classes=[3]), 10)):
        picture = figure(views, max_rows=rows)
        page = picture.bbox
        for text in picture.axes[0].texts:
            box = text.get_window_extent(picture.canvas.get_renderer())
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text.get_text()
        figures.save_figure(picture, tmp_path / "views.png")
        with Image.open(tmp_path / "views.png") as saved:
            sizes.append(saved.size)
    assert sizes[0][0] > sizes[1][0] and sizes[0][1] > sizes[1][1]
    texts = [text.get_text() for text in figure(result, max_rows=2).axes[0].texts]
    assert {f"positions of {LAYER}", f"channels of {LAYER}", "first 2 of 10 classes", "0", "1"} <= set(texts)
