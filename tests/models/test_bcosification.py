"""B-cosification on real images: as accurate as plain fine-tuning of the same weights for the same number of epochs.

`python -m pytest -m slow -rP tests/models/test_bcosification.py` prints the accuracies. TIMM_CODA_OUTPUT=FOLDER saves a
figure of the maps there.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import adaptive_clip_grad

import timm_coda
from timm_coda.data.datasets import load_data

PRETRAINING, FINE_TUNING = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]
MEAN = STD = 0.5


def digits(split, classes):
    """The split's digits of these classes, upsampled to (N, 3, 16, 16) in [0, 1], and their class numbers."""
    rows = [row for row, label in enumerate(split.labels) if label in classes]
    pixels = torch.from_numpy(np.stack([np.asarray(split.image(row)) for row in rows])).permute(0, 3, 1, 2) / 255
    labels = torch.tensor([classes.index(split.labels[row]) for row in rows])
    return pixels.repeat_interleave(2, 2).repeat_interleave(2, 3).contiguous(), labels


class Normalised(torch.nn.Module):
    """A plain model after the normalisation that its B-cos version includes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model((x - MEAN) / STD)


def uniform_off_targets(logits, labels):
    """The B-cos recipe's binary cross-entropy, with 1 / classes as the target of all other classes."""
    classes = logits.shape[1]
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, classes).float().clamp_min(1 / classes))


def train(model, images, labels, epochs, loss, batch=32):
    """Train with Adam, a one-cycle schedule and shifts of up to two pixels; all models see the same batches."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters())
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, epochs * steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator)[: steps * batch].split(batch):
            top, left = torch.randint(5, (2,), generator=generator).tolist()
            x = F.pad(images[rows], (2,) * 4)[:, :, top : top + 16, left : left + 16]
            optimizer.zero_grad()
            loss(model(x), labels[rows]).backward()
            if loss is uniform_off_targets:
                adaptive_clip_grad(model.parameters())
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model, images, labels):
    return model(images).argmax(1).eq(labels).float().mean().item()


@pytest.mark.slow
def test_as_accurate_as_plain_fine_tuning(tmp_path, capsys):
    data = load_data(["digits"])
    torch.manual_seed(0)
    plain = timm.create_model("resnet18", num_classes=5, output_stride=16)
    plain.pretrained_cfg |= {"mean": (MEAN,) * 3, "std": (STD,) * 3, "input_size": (3, 16, 16)}
    train(Normalised(plain), *digits(data.train, PRETRAINING), 8, F.cross_entropy)
    plain.reset_classifier(5)
    bcos = timm_coda.bcosify(plain, from_pretrained=True)

    test_images, test_labels = digits(data.test, FINE_TUNING)
    scores = {}
    for name, model, loss in (("plain", Normalised(plain), F.cross_entropy), ("B-cos", bcos, uniform_off_targets)):
        train(model, *digits(data.train, FINE_TUNING), 8, loss)
        scores[name] = accuracy(model, test_images, test_labels)
    explanation = bcos.explain(test_images[:8])
    assert explanation.residual.abs().max() < 1e-3 * (explanation.logits - explanation.bias).abs().max()
    picture = Path(os.environ.get("TIMM_CODA_OUTPUT", tmp_path)) / "bcosified_resnet18.png"
    explanation.save(picture, label_names=list(map(str, FINE_TUNING)))
    with capsys.disabled():
        print(f"\naccuracy on {len(test_labels)} images after fine-tuning: {scores}; maps: {picture}")
    assert scores["plain"] > 0.95
    assert scores["B-cos"] > scores["plain"] - 0.02
