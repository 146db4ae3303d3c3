"""Tests of reports that compare a model with an ordinary one; speed itself is not tested."""

import pytest
import timm
import torch

from timm_coda.benchmark import comparison, macs, memory
from timm_coda.benchmark.measurement import Setup

SMALL = {"model": "bcos_resnet18", "img_size": 32, "batch_size": 2, "num_classes": 5, "repeats": 3, "memory": False}


def test_report(monkeypatch):
    monkeypatch.setattr(macs, "SAMPLE_SECONDS", 1e-3)
    before = torch.get_num_threads(), torch.random.get_rng_state()
    report = comparison.compare(Setup(**SMALL, operations=("forward", "explain")), "resnet18")
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert (report["image"], report["classes"], report["against"]) == ([3, 32, 32], 5, "resnet18")
    assert [row["operation"] for row in report["rows"]] == ["forward", "explain"]
    for row in report["rows"]:
        ours, theirs = row["seconds"]["samples"], row["against_seconds"]["samples"]
        assert len(ours) == len(theirs) == 3
        assert row["ratio"]["samples"] == [a / b for a, b in zip(ours, theirs, strict=True)], "ratios are per round"
        assert row["ratio"]["median"] == sorted(row["ratio"]["samples"])[1]
        assert "extra_bytes" not in row


def test_what_is_run(monkeypatch):
    """An explanation is compared with a plain forward pass, on the same images."""
    pair = comparison._Pair(Setup(**SMALL), "resnet18")
    ours, theirs = pair.models.values()
    assert isinstance(theirs, timm.models.ResNet) and not hasattr(theirs, "explain")
    assert ours.num_classes == theirs.num_classes == 5
    calls = []
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.register_forward_pre_hook(lambda m, args, name=name: calls.append((name, m.training, args[0].shape[1])))
    for side in comparison._SIDES:
        for operation in ("forward", "train", "explain"):
            pair.operation(operation, side)()
    assert calls == [
        *(("ours", False, 3), ("ours", True, 3), ("ours", False, 6)),  # 6 channels: explain() has encoded the images
        *(("theirs", False, 3), ("theirs", True, 3), ("theirs", False, 3)),
    ]


@pytest.mark.skipif(not memory._CLEAR_REFS.exists(), reason="only Linux reports the peak of a call")
def test_memory(monkeypatch):
    monkeypatch.setattr(macs, "SAMPLE_SECONDS", 1e-3)
    setup = Setup(**{**SMALL, "img_size": 64, "batch_size": 8, "memory": True, "repeats": 2}, operations=("train",))
    (row,) = comparison.compare(setup, "resnet18")["rows"]
    kept = 4 * 8 * 32 * 32 * 64  # bytes of the first convolution's output
    assert row["extra_bytes"] > kept
    assert row["against_extra_bytes"] > kept
