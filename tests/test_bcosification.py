"""B-cosification on real images: as accurate as plain fine-tuning from the same weights in as many epochs.

`python -m pytest -m slow -s tests/test_bcosification.py` prints the accuracies, and with TIMM_CODA_OUTPUT=FOLDER keeps
a picture of the maps there.
"""

import io
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import SHARED
from timm.utils import adaptive_clip_grad

import timm_coda

CIFAR = Path(os.environ.get("TIMM_CODA_CIFAR10", SHARED / "data" / "cifar10"))
PRETRAINING = ["airplane", "automobile", "bird", "cat", "deer"]
FINE_TUNING = ["dog", "frog", "horse", "ship", "truck"]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def images_of(classes, file, count):
    """The file's first images of these classes, (N, 3, 32, 32) in [0, 1], and their class numbers."""
    table = pyarrow.parquet.read_table(CIFAR / f"{file}.parquet")
    labels = table["label"].to_pylist()
    rows = [row for row, label in enumerate(labels) if label in classes][:count]
    pixels = [np.asarray(PIL.Image.open(io.BytesIO(table["img"][row].as_py()["bytes"])).convert("RGB")) for row in rows]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous() / 255
    return images, torch.tensor([classes.index(labels[row]) for row in rows])


class Normalised(torch.nn.Module):
    """A plain model behind the normalisation that its B-cos version takes up itself."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

    def forward(self, x):
        return self.model((x - self.mean) / self.std)


def train(model, images, labels, epochs, loss, lr=1e-3, batch=64):
    """Adam, one cycle; flips and shifts; the same order of the same images for any model."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters())
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator)[: steps * batch].split(batch):
            x = F.pad(images[rows], (4,) * 4)
            flip, top, left = (int(torch.randint(n, (), generator=generator)) for n in (2, 9, 9))
            x = x[:, :, top : top + 32, left : left + 32]
            optimizer.zero_grad()
            loss(model(x.flip(3) if flip else x), labels[rows]).backward()
            if loss is uniform_off_targets:
                adaptive_clip_grad(model.parameters())
            optimizer.step()
            schedule.step()
    return model.eval()


def uniform_off_targets(logits, labels):
    """The B-cos recipe's binary cross entropy, with 1 / classes for what an image is not."""
    classes = logits.shape[1]
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, classes).float().clamp_min(1 / classes))


@torch.no_grad()
def accuracy(model, images, labels):
    return torch.cat([model(x).argmax(1) for x in images.split(250)]).eq(labels).float().mean().item()


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR.exists(), reason=f"no CIFAR-10 in {CIFAR}: set TIMM_CODA_CIFAR10")
def test_as_accurate_as_plain_fine_tuning(tmp_path, capsys):
    torch.manual_seed(0)
    plain = timm.create_model("resnet18", num_classes=5, output_stride=16)
    plain.pretrained_cfg |= {"mean": MEAN, "std": STD, "input_size": (3, 32, 32)}
    train(Normalised(plain), *images_of(PRETRAINING, "train-0", 8000), 4, F.cross_entropy, lr=2e-3)
    plain.reset_classifier(5)
    bcos = timm_coda.bcosify(plain, from_pretrained=True)

    images, labels = images_of(FINE_TUNING, "train-1", 3000)
    test_images, test_labels = images_of(FINE_TUNING, "test", 2000)
    scores = {}
    for name, model, loss in (("plain", Normalised(plain), F.cross_entropy), ("B-cos", bcos, uniform_off_targets)):
        train(model, images, labels, 5, loss)
        scores[name] = accuracy(model, test_images, test_labels)
    explanation = bcos.explain(test_images[:8])
    assert explanation.residual.abs().max() < 1e-3 * (explanation.logits - explanation.bias).abs().max()
    picture = Path(os.environ.get("TIMM_CODA_OUTPUT", tmp_path)) / "bcosified_resnet18.png"
    explanation.save(picture, label_names=FINE_TUNING)
    with capsys.disabled():
        print(f"\nfine-tuned accuracy on {len(test_labels)} images: {scores}; maps: {picture}")
    assert scores["B-cos"] > scores["plain"] - 0.02
