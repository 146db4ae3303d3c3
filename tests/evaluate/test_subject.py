"""Predictions of a dataset: logits that are not finite are refused, with the cause."""

import numpy as np
import pytest
import timm
import torch

from timm_coda import data
from timm_coda.evaluate import EvaluationError, TrainingLocalisation, subject


@pytest.fixture
def digits():
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg("coda_net_xs.digits").to_dict())
    _, transform = data.create_transforms(config)
    return data.ImageDataset(data.load_data(["digits"]).test, transform)


def test_float16_predicts(digits):
    model = timm.create_model("coda_net_xs.digits", pretrained=True).eval().half()
    readable, logits, skipped = subject.predict(model, digits, batch_size=150)
    assert len(readable) == len(logits) == 450 and not skipped
    assert np.mean(logits.argmax(1) == digits.split.labels) > 0.99


def test_logits_that_are_not_finite(digits, capsys):
    model = timm.create_model("coda_net_xs.digits", pretrained=True).eval()
    with torch.no_grad():
        model.head.down.weight[0] = float("inf")
    with pytest.raises(EvaluationError, match=r"images 0, 1, 2 and 47 more: its weights .* head\.down\.weight"):
        subject.predict(model, digits, batch_size=50)
    assert TrainingLocalisation(digits, 10, every=1).after_epoch(model, 1) == {"localisation": None}
    assert "head.down.weight" in capsys.readouterr().out
