"""What train.py's networks learn with, beyond timm's: losses by name, limits for gradients, updates, a test."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from ..data import Batch

__all__ = ["LOSSES", "SCHEDULES", "Mixing", "evaluate", "make_loss", "tally"]

LOSSES = ("bce", "bce-uniform", "ce")
SCHEDULES = ("cosine", "step", "poly", "tanh", "wsd", "constant")


class UniformBCE(nn.Module):
    """Binary cross entropy whose wrong classes are each wanted with probability 1 / classes, and the right one with 1.

    With the logit bias -log(classes - 1) nothing is lost where nothing is seen. Source: Böhle et al., TPAMI 2024 (arXiv
    2306.10898), section 4.
    """

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean over images and classes; `target` are classes (B,), or probabilities (B, classes)."""
        classes = logits.shape[-1]
        if target.shape != logits.shape:
            target = F.one_hot(target, classes).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, target.clamp(min=1 / classes))


def make_loss(name: str, smoothing: float) -> nn.Module:
    """One of `LOSSES`, with smoothed labels; those of bce-uniform are what they are."""
    if name == "bce":
        return BinaryCrossEntropy(smoothing)
    return UniformBCE() if name == "bce-uniform" else nn.CrossEntropyLoss(label_smoothing=smoothing)


class Mixing:
    """Images mixed with each other, and so their labels, as timm's `Mixup` does; as they are where both alphas are 0.

    Args:
        mixup, cutmix: alphas, see timm
        smoothing: of the mixed labels
        num_classes: number of classes
    """

    def __init__(self, mixup: float, cutmix: float, smoothing: float, num_classes: int) -> None:
        self.on = mixup > 0 or cutmix > 0
        settings: Any = {"mixup_alpha": mixup, "cutmix_alpha": cutmix, "label_smoothing": smoothing}
        self._mix = Mixup(**settings, num_classes=num_classes) if self.on else None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images, their labels and what to learn; the last image twice where it would have none to be mixed with."""
        if self._mix is None:
            return images, labels, labels
        if len(labels) % 2:
            images, labels = torch.cat([images, images[-1:]]), torch.cat([labels, labels[-1:]])
        mixed, targets = self._mix(images, labels)
        return mixed, labels, targets


def tally(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over images: of the loss, of right answers, of one."""
    right = (logits.argmax(1) == labels).sum()
    return torch.stack([loss.detach() * len(labels), right, torch.full_like(right, len(labels))])


@torch.no_grad()
def evaluate(accelerator: Any, model: nn.Module, batches: Iterable[Batch], loss_function: nn.Module):
    """Mean loss and accuracy over the images that can be read, and the others with the reason."""
    sums, unread, training = torch.zeros(3, device=accelerator.device), [], model.training
    model.eval()
    for images, labels, skipped in batches:
        unread += skipped
        if len(labels):
            images, labels = images.to(accelerator.device), labels.to(accelerator.device)
            with accelerator.autocast():
                logits = model(images).float()
            sums += tally(loss_function(logits, labels), logits, labels)
    model.train(training)
    loss, right, count = accelerator.reduce(sums).tolist()
    return loss / max(count, 1), right / max(count, 1), unread
