"""Tests of losses, Mixup and evaluation."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from timm_coda.data.datasets import Batch, Skipped
from timm_coda.training import losses


def test_uniform_targets():
    torch.manual_seed(0)
    logits, target = torch.randn(3, 4, dtype=torch.float64), torch.tensor([1, 0, 3])
    likely = logits.sigmoid()
    expected = 0.0
    for image in range(3):
        for c in range(4):
            wanted = 1.0 if c == target[image] else 0.25
            expected -= wanted * likely[image, c].log() + (1 - wanted) * (1 - likely[image, c]).log()
    loss = losses.make_loss("bce-uniform", 0.0)
    assert torch.allclose(loss(logits, target), expected / 12)
    mixed = torch.tensor([[0.5, 0.5, 0, 0]] * 3, dtype=torch.float64)
    assert torch.allclose(loss(logits, mixed), loss(logits, mixed.clamp(min=0.25)))
    # At the bias -log(classes - 1), an image without evidence has no gradient at wrong classes.
    silent = torch.full((1, 4), -torch.tensor(3.0).log().item(), requires_grad=True)
    loss(silent, torch.tensor([2])).backward()
    assert silent.grad is not None and silent.grad[0, [0, 1, 3]].abs().max() < 1e-7 < -silent.grad[0, 2]


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_falls_with_the_right_logit(name):
    loss = losses.make_loss(name, 0.0)
    logits = torch.zeros(2, 5)
    assert loss(logits + nn.functional.one_hot(torch.tensor([1, 4]), 5), torch.tensor([1, 4])) < loss(
        logits, torch.tensor([1, 4])
    )


def test_evaluation_leaves_the_mode_and_counts_what_can_be_read():
    accelerator, network = Accelerator(cpu=True), nn.Identity()
    network.train()
    batches = [
        Batch(torch.tensor([[2.0, 0], [0, 3]]), torch.tensor([0, 0]), [Skipped("a", "broken")]),
        Batch(torch.empty(0), torch.empty(0, dtype=torch.long), [Skipped("b", "gone")]),
    ]
    loss, accuracy, unread = losses.evaluate(accelerator, network, batches, nn.CrossEntropyLoss())
    expected = (torch.tensor([-2.0, 3.0]).exp() + 1).log().mean().item()
    assert abs(loss - expected) < 1e-6 and accuracy == 0.5 and network.training
    assert [name for name, _ in unread] == ["a", "b"]


def test_mixing_wants_pairs():
    images, labels = torch.rand(3, 3, 4, 4), torch.tensor([0, 1, 2])
    same, kept, targets = losses.Mixing(0.0, 0.0, 0.1, 3)(images, labels)
    assert same is images and kept is labels and targets is labels
    mixed, kept, targets = losses.Mixing(0.5, 0.0, 0.0, 3)(images.clone(), labels)
    assert mixed.shape == (4, 3, 4, 4) and kept.tolist() == [0, 1, 2, 2] and targets.shape == (4, 3)
    assert torch.allclose(targets.sum(1), torch.ones(4))
