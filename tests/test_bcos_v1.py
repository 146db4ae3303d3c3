"""B-cos v1 networks: the authors' numbers, exactness on a second input, tags, timm's contract."""

import os
import subprocess
import sys
from math import log, sqrt
from types import MethodType

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import SHARED, relative_error

import timm_coda
from timm_coda import convert
from timm_coda.bcos import BcosConv2d, EncodedBcosConv2d
from timm_coda.models import bcos_v1

# golden case: tag
GOLDEN = {
    "bcosv1_resnet34_64px": "bcos_v1_resnet34.mpi_in1k",
    "bcosv1_densenet121_64px": "bcos_v1_densenet121.mpi_in1k",
    "bcosv1_inception_v3_107px": "bcos_v1_inception_v3.mpi_in1k",
    "bcosv1_vgg11_64px": "bcos_v1_vgg11.mpi_in1k",
}


def published_weights(golden, case):
    return {name: torch.from_numpy(value) for name, value in golden.state_dict(case).items()}


@pytest.mark.parametrize("case", GOLDEN)
def test_equals_the_authors_numbers(golden, case):
    model = timm.create_model(GOLDEN[case], dtype=torch.float64).eval()
    loaded = model.load_state_dict(bcos_v1.checkpoint_filter_fn(published_weights(golden, case), model))
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    expected = golden.expected(case)
    targets = torch.from_numpy(expected["targets"]).expand(2, -1)
    explanation = model.explain(torch.from_numpy(golden.inputs(case)).double(), targets)
    bias = model.logits.bias
    print(case, relative_error(explanation.logits - bias, expected["logits"] - bias), relative_error(explanation.contributions, expected["contributions"]), relative_error(explanation.weights[:1, :1], expected["weights"]))
    assert bias == log(0.01 / 0.99)
    assert relative_error(explanation.logits - bias, expected["logits"] - bias) < 1e-9
    assert relative_error(explanation.contributions, expected["contributions"]) < 1e-9
    assert relative_error(explanation.weights[:1, :1], expected["weights"]) < 1e-6
