"""Losses of train.py, mixing of images (Mixup, CutMix), and evaluation on a dataset."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from ..data import Batch

__all__ = ["LOSSES", "SCHEDULES", "Mixing", "evaluate", "make_loss", "share_buffers", "tally"]

LOSSES = ("bce", "bce-uniform", "ce")
SCHEDULES = ("cosine", "step", "poly", "tanh", "wsd", "constant")


class UniformBCE(nn.Module):
    """Binary cross entropy with target 1 for the true class and 1 / classes for each other class.

    With the logit bias -log(classes - 1), an image without evidence has zero gradient at the wrong classes.
    Source: Böhle et al., TPAMI 2024 (arXiv 2306.10898), section 4.
    """

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss over images and classes; `target` holds classes (B,) or probabilities (B, classes)."""
        classes = logits.shape[-1]
        if target.shape != logits.shape:
            target = F.one_hot(target, classes).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, target.clamp(min=1 / classes))


def make_loss(name: str, smoothing: float) -> nn.Module:
    """Return the loss of this name, one of `LOSSES`, with label smoothing; bce-uniform ignores `smoothing`."""
    if name == "bce":
        return BinaryCrossEntropy(smoothing)
    return UniformBCE() if name == "bce-uniform" else nn.CrossEntropyLoss(label_smoothing=smoothing)


class Mixing:
    """Mix images and their labels with timm's `Mixup`; leave both unchanged if both alphas are 0.

    Args:
        mixup, cutmix: alphas, as in timm
        smoothing: label smoothing of the mixed labels
        num_classes: number of classes
    """

    def __init__(self, mixup: float, cutmix: float, smoothing: float, num_classes: int) -> None:
        self.on = mixup > 0 or cutmix > 0
        settings: Any = {"mixup_alpha": mixup, "cutmix_alpha": cutmix, "label_smoothing": smoothing}
        self._mix = Mixup(**settings, num_classes=num_classes) if self.on else None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return images (B, C, H, W), labels (B,) and targets, (B,) or if mixed (B, classes).

        If an odd number of images is to be mixed, the last one is duplicated, because Mixup needs pairs.
        """
        if self._mix is None:
            return images, labels, labels
        if len(labels) % 2:
            images, labels = torch.cat([images, images[-1:]]), torch.cat([labels, labels[-1:]])
        mixed, targets = self._mix(images, labels)
        return mixed, labels, targets


def tally(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return sums over the images as a tensor (3,): loss, correct predictions, number of images."""
    right = (logits.argmax(1) == labels).sum()
    return torch.stack([loss.detach() * len(labels), right, torch.full_like(right, len(labels))])


def share_buffers(model: nn.Module) -> None:
    """Give all processes the buffers of the first, such as running means, which each updates with its own images."""
    for buffer in model.buffers():
        broadcast(buffer)


@torch.no_grad()
def evaluate(accelerator: Any, model: nn.Module, batches: Iterable[Batch], loss_function: nn.Module):
    """Return mean loss, accuracy and unreadable images with reasons.

    Loss and accuracy are over the readable images of all processes; the unreadable images are those of this process.
    """
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
