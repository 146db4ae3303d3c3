"""Losses and limits for gradients, against what they say."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from timm_coda import learning


def test_uniform_targets():
    torch.manual_seed(0)
    logits, target = torch.randn(3, 4, dtype=torch.float64), torch.tensor([1, 0, 3])
    likely = logits.sigmoid()
    expected = 0.0
    for image in range(3):
        for c in range(4):
            wanted = 1.0 if c == target[image] else 0.25
            expected -= wanted * likely[image, c].log() + (1 - wanted) * (1 - likely[image, c]).log()
    loss = learning.make_loss("bce-uniform", 0.0)
    assert torch.allclose(loss(logits, target), expected / 12)
    mixed = torch.tensor([[0.5, 0.5, 0, 0]] * 3, dtype=torch.float64)
    assert torch.allclose(loss(logits, mixed), loss(logits, mixed.clamp(min=0.25)))
    # At the bias -log(classes - 1), an image without evidence pulls at no wrong class.
    silent = torch.full((1, 4), -torch.tensor(3.0).log().item(), requires_grad=True)
    loss(silent, torch.tensor([2])).backward()
    assert silent.grad is not None and silent.grad[0, [0, 1, 3]].abs().max() < 1e-7 < -silent.grad[0, 2]


@pytest.mark.parametrize("name", learning.LOSSES)
def test_every_loss_falls_with_the_right_logit(name):
    loss = learning.make_loss(name, 0.0)
    logits = torch.zeros(2, 5)
    assert loss(logits + nn.functional.one_hot(torch.tensor([1, 4]), 5), torch.tensor([1, 4])) < loss(
        logits, torch.tensor([1, 4])
    )


def test_gradients_are_limited_unit_by_unit():
    layer = nn.Linear(3, 2, bias=False)
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    model = nn.ParameterList([layer.weight, frozen])
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0, 4], [0, 1, 0]]))  # norms 5 and 1
    layer.weight.grad = torch.tensor([[0.0, 2, 0], [0.001, 0, 0]])
    learning.limit_gradients(Accelerator(cpu=True), model, 0.0, 0.1)
    assert torch.allclose(layer.weight.grad, torch.tensor([[0.0, 0.5, 0], [0.001, 0, 0]]))
    learning.limit_gradients(Accelerator(cpu=True), model, 0.1, 0.0)
    assert torch.allclose(layer.weight.grad.norm(), torch.tensor(0.1))
    before = layer.weight.grad.clone()
    learning.limit_gradients(SimpleNamespace(sync_gradients=False), model, 1e-9, 1e-9)
    assert torch.equal(layer.weight.grad, before)
