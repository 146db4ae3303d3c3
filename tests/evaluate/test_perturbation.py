"""Removal, insertion and single deletion, on tiny images and linear models."""

import math

import numpy as np
import pytest
import torch

from helpers import relative_error
from helpers.evaluate_cases import Linear, fixed, make_subject
from timm_coda.evaluate import EvaluationError, metrics
from timm_coda.evaluate.metrics import METRICS, make_metric
from timm_coda.evaluate.perturbation import IDSDS, Removal, removal_ranks, remove
from timm_coda.layers.base import InverseEncoding


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def removal(most_first: bool, fill: str = "zeros", insert: bool = False) -> Removal:
    return Removal("removal", "Removal", "", most_first, fill, last=1.0, steps=4, insert=insert)


@pytest.fixture
def subject():
    """A 2 x 2 image whose pixels add 1, 2, 4 and 8 to the logit of class 1; its bias is -3."""
    weight = torch.zeros(2, 1, 2, 2)
    weight[1, 0] = torch.tensor([[1.0, 2], [4, 8]])
    return make_subject(Linear(weight, bias=-3.0), torch.ones(1, 1, 2, 2), [1])


MAPS = torch.tensor([[[-0.5, 0.1], [3.0, 0.2]]]).repeat(2, 1, 1)  # in descending order: 3, 0.2, 0.1, -0.5


@pytest.mark.parametrize(
    ("metric", "sums"),
    [
        (removal(most_first=True), [15, 11, 3, 1, 0]),
        (removal(most_first=False), [15, 14, 12, 4, 0]),
        (removal(most_first=True, insert=True), [0, 4, 12, 14, 15]),
    ],
)
def test_curves(metric, sums, subject):
    scores = metric(subject, fixed(MAPS))
    expected = [sigmoid(s - 3) for s in sums]
    assert scores.curve.x.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert relative_error(scores.curve.y[0], expected) < 1e-6
    assert scores.values == pytest.approx([np.mean(expected)])
    assert scores.curve.x_label == f"share of pixels {'inserted' if metric.insert else 'removed'}"


def test_fills():
    image = torch.tensor([[[0.2, 0.4], [0.6, 0.8]]]).expand(1, 3, 2, 2)
    encoded = InverseEncoding()(image)
    ranks = removal_ranks(torch.tensor([[[4.0, 3], [2, 1]]]), True, 0)
    assert ranks.tolist() == [[[0, 1], [2, 3]]]
    zeros = remove(encoded, ranks, 1, "zeros")
    assert zeros[0, :, 0, 0].tolist() == [0] * 6, "zero in all channels, which is not black"
    assert torch.equal(zeros[0, :, 1], encoded[0, :, 1])
    mean = remove(encoded, ranks, 3, "mean")
    assert relative_error(mean[0, :, 0, 0], torch.full((6,), 0.5)) < 1e-6
    assert torch.equal(mean[0, :, 1, 1], encoded[0, :, 1, 1])


def test_equal_pixels_go_in_an_order_of_their_own():
    ranks = removal_ranks(torch.zeros(2, 8, 8), True, 0)
    assert sorted(ranks[0].flatten().tolist()) == list(range(64))
    assert ranks[0].flatten().tolist() != list(range(64)), "ties are not in reading order"
    assert torch.equal(ranks[0], ranks[1])
    assert not torch.equal(ranks, removal_ranks(torch.zeros(2, 8, 8), True, 1))
    half = torch.zeros(1, 8, 8)
    half[0, 3, 3] = 1
    assert removal_ranks(half, True, 0)[0, 3, 3] == 0
    assert removal_ranks(half, False, 0)[0, 3, 3] == 63


def test_idsds():
    torch.manual_seed(0)
    weight, images = torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    images[:, 0, 0, 0] = torch.tensor([0.0, 1.0])  # the index of the image, which the model ignores
    weight[1] = torch.arange(16.0).reshape(1, 4, 4)
    subject = make_subject(Linear(weight), images, [1, 1])
    right = weight[1].repeat(2, 1, 1)
    assert IDSDS()(subject, fixed(right)).values.tolist() == pytest.approx([1, 1])
    assert IDSDS()(subject, fixed(-right, "minus")).values.tolist() == pytest.approx([-1, -1])
    assert IDSDS()(subject, fixed(torch.ones(2, 4, 4), "flat")).values.tolist() == [0, 0]
    # Two patches per side: patch sums of the map are in the order 4, 3, 1, 2, and drops 10, 18, 42, 50: the reverse
    # order, except for two swapped patches: 1 - 6 * (9 + 1 + 4 + 4) / (4 * 15)
    coarse = torch.tensor([[4.0, 3], [1, 2]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert IDSDS(patches=2)(subject, fixed(coarse.repeat(2, 1, 1), "coarse")).values.tolist() == pytest.approx(
        [-0.8] * 2
    )


def test_metrics_by_name():
    made = [make_metric(name, grids=3, grid_size=2) for name in METRICS]
    assert [metric.name for metric in made] == list(METRICS)
    assert len({metric.label for metric in made}) == len(made)
    better = {metric.name: metric.higher_is_better for metric in made if isinstance(metric, Removal)}
    lower = [name for name, higher in better.items() if not higher]
    assert lower == ["removal_most_zeros", "removal_most_mean", "deletion"]
    assert set(metrics.DEFAULT_METRICS) <= set(METRICS)
    with pytest.raises(EvaluationError, match="unknown metric 'fid': choose grid_localisation, "):
        make_metric("fid")
    # Steps of 2 pixels on images of 32 x 32, as in the papers.
    shares = np.linspace(0, 0.25, make_metric("removal_least_zeros").steps + 1)
    assert (shares * 1024).tolist() == list(range(0, 257, 2))
