"""Grid and box localisation, on grids and maps constructed by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.evaluate_cases import Linear, fixed, make_subject
from timm_coda.evaluate import EvaluationError, Explainer
from timm_coda.evaluate.localisation import (
    BoxEnergy,
    GridLocalisation,
    PointingGame,
    arrange,
    choose_grids,
    share_in_cells,
)


def test_cells_are_arranged_row_by_row():
    cells = torch.arange(4.0)[None, :, None, None, None].expand(1, 4, 3, 2, 3)
    grid = arrange(cells, 2)
    assert grid.shape == (1, 3, 4, 6)
    assert grid[0, 1].tolist() == [[0.0] * 3 + [1.0] * 3] * 2 + [[2.0] * 3 + [3.0] * 3] * 2
    inside = arrange(torch.arange(24.0).reshape(1, 4, 1, 2, 3), 2)
    assert torch.equal(inside[0, 0, 2:, :3], torch.arange(12.0, 18).reshape(2, 3)), "cells are not transposed"


def test_share_in_cells():
    def in_cell(number: int) -> Tensor:
        return arrange(
            nn.functional.one_hot(torch.tensor([number]), 4).float()[..., None, None, None].expand(1, 4, 1, 2, 2), 2
        )[0, 0]

    perfect = torch.stack([in_cell(k) for k in range(4)])
    wrong = torch.stack([in_cell((k + 1) % 4) for k in range(4)])
    uniform = torch.ones(4, 4, 4)
    transposed = torch.stack([in_cell(k).T for k in range(4)])
    assert share_in_cells(perfect[None], 2).tolist() == [[1, 1, 1, 1]]
    assert share_in_cells(wrong[None], 2).tolist() == [[0, 0, 0, 0]]
    assert share_in_cells(uniform[None], 2).tolist() == [[0.25] * 4]
    assert share_in_cells(transposed[None], 2).tolist() == [[1, 0, 0, 1]], "rows and columns are not swapped"
    assert share_in_cells(-uniform[None], 2).tolist() == [[0, 0, 0, 0]], "no evidence for the class"
    mixed = perfect * 3 - 5 * wrong + torch.roll(perfect, 2, 0)  # 3 of 4: negative values do not count
    assert share_in_cells(mixed[None], 2).tolist() == [[0.75] * 4]


def sure(labels: list[int], margins: list[float], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and logits: the label's logit is the margin, all others are -5."""
    logits = np.full((len(labels), classes), -5.0, np.float32)
    logits[np.arange(len(labels)), labels] = margins
    return np.array(labels), logits


def test_grids_are_of_the_surest_images():
    #         0  1  2  3  4  5  6  7  8  9
    labels = [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    margin = [1, 3, 2, 5, 6, -1, 4, 4, 9, 8]  # image 5 is predicted correctly, but with p < .5
    labels, logits = sure(labels, margin, 5)
    logits[9, 4] = 20  # image 9 is predicted wrongly
    first = {0: [1, 2, 0], 1: [4, 3], 2: [6, 7], 3: [8]}
    grids = choose_grids(labels, logits, 1, 2, confidence=0.5, seed=42)
    assert sorted(grids[0].tolist()) == [1, 4, 6, 8]
    order = np.random.default_rng(42).choice([0, 1, 2, 3], 4, replace=False)
    assert labels[grids[0]].tolist() == order.tolist(), "in the order drawn, row by row"
    assert len(choose_grids(labels, logits, 9, 2, confidence=0.5, seed=42)) == 1, "class 3 has one image"
    with pytest.raises(EvaluationError, match=r"images of 4 classes with p > 0.5, but a grid of 3 x 3 needs 9 classes"):
        choose_grids(labels, logits, 1, 3, confidence=0.5, seed=42)
    # Grids of one image: each image is used once, and those of a class in the order of confidence.
    taken = choose_grids(labels, logits, 9, 1, confidence=0.5, seed=0)
    assert len(taken) == 8
    for c, images in first.items():
        assert [int(i) for i in taken[:, 0] if labels[i] == c] == images
    assert len(choose_grids(labels, logits, 9, 1, confidence=0.99, seed=0)) == 3  # logit above 4.595: 3, 4, 8
    one, other = (choose_grids(labels, logits, 9, 1, confidence=0.5, seed=seed) for seed in (0, 1))
    assert np.array_equal(one, taken)
    assert not np.array_equal(one, other)
    with pytest.raises(EvaluationError, match="predicts none of 10 images correctly"):
        choose_grids((labels + 2) % 5, logits, 1, 2, confidence=0.5, seed=42)


@pytest.fixture
def subject():
    """Images of one colour, 2 x 2 pixels, labelled by this colour, and a linear model that classifies them."""
    torch.manual_seed(0)
    labels = [0, 1, 2, 3] * 6
    images = torch.zeros(24, 4, 2, 2)
    images[range(24), labels] = torch.rand(24, 1, 1) * 0.5 + 0.5
    weight = torch.eye(4)[:, :, None, None].expand(4, 4, 1, 1)

    class Colour(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight.clone())

        def forward(self, x):
            return nn.functional.conv2d(x, self.weight).sum((2, 3)) * 10 - 10

    return make_subject(Colour(), images, labels, batch_size=8)


def test_grid_localisation(subject):
    def evidence(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return images.gather(1, targets[:, :, None, None].expand(-1, -1, *images.shape[2:]))

    metric = GridLocalisation(grids=5, size=2)
    exact = metric(subject, Explainer("exact", "Exact", "", evidence))
    assert exact.values.shape == (5, 4), "a row per grid: intervals resample whole grids"
    assert (exact.values == 1).all()
    uniform = Explainer("uniform", "Uniform", "", lambda model, x, t: torch.ones(*t.shape, *x.shape[2:]))
    assert (metric(subject, uniform).values == metric.baseline(subject).value).all()
    assert metric.baseline(subject).value == 0.25
    images, targets = metric.make(subject, metric.choose(subject)[:1])
    assert images.shape == (1, 4, 4, 4)
    assert [int(images[0, :, 2 * row, 2 * column].argmax()) for row in (0, 1) for column in (0, 1)] == targets[
        0
    ].tolist()


def test_names():
    assert GridLocalisation().name == "grid_localisation"
    assert GridLocalisation(confidence=0.99).name == "grid_localisation_0.99"
    assert "p > 0.99" in GridLocalisation(confidence=0.99).about


def test_size_that_does_not_fit():
    subject = make_subject(Linear(torch.ones(2, 3, 4, 4)), torch.rand(4, 3, 4, 4), [0, 0, 0, 0])
    with pytest.raises(EvaluationError, match=r"does not accept grids, images of 8 x 8 pixels: .*leave out grid"):
        metric = GridLocalisation(grids=1, size=2)
        object.__setattr__(metric, "choose", lambda subject: np.array([[0, 1, 2, 3]]))
        metric(subject, fixed(torch.ones(1, 8, 8)))


def test_boxes():
    maps = torch.tensor([[[-1.0, 2, 0], [0, 1, 5]], [[0.0, 0, 0], [0, 0, 0]]])  # a map with evidence, and one without
    images = torch.stack([torch.full((3, 2, 3), float(k)) for k in range(2)])
    subject = make_subject(Linear(torch.ones(2, 3, 2, 3)), images, [0, 0])
    boxes = [[1, 0, 2, 2], [0, 0, 3, 1]]  # the middle column, the upper row
    assert BoxEnergy(boxes)(subject, fixed(maps)).values.tolist() == [3 / 8, 0]
    assert PointingGame(boxes)(subject, fixed(maps)).values.tolist() == [0, 0.5]
    assert PointingGame([[2, 1, 3, 2]] * 2)(subject, fixed(maps)).values.tolist() == [1, 1 / 6]
    assert BoxEnergy(boxes).baseline(subject).value == pytest.approx((1 / 3 + 1 / 2) / 2)
    for wrong, message in (
        ([[0, 0, 4, 1]] * 2, r"box \[0, 0, 4, 1\] of image 0 is empty or not inside 3 x 2 pixels"),
        ([boxes[0], [1, 1, 1, 2]], r"box \[1, 1, 1, 2\] of image 1 is empty"),
        (boxes[:1], "1 boxes for 2 images"),
        ([[0.0, 0, 0.5, 1]], "pass four integers"),
        ([[0, 0, 1]], "pass four integers"),
    ):
        with pytest.raises(EvaluationError, match=message):
            BoxEnergy(wrong)(subject, fixed(maps))
