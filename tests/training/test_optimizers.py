"""Optimisers for CPUs with and without bfloat16 instructions."""

import functools

import pytest
import torch
from timm.optim import muon
from torch import nn

from helpers import relative_error
from timm_coda.training import optimizers


@pytest.mark.parametrize("opt", ["muon", "nmuon", "lookahead_muon"])
@pytest.mark.parametrize("emulated", [False, True])
def test_muon_computes_in_float32_where_bfloat16_is_emulated(emulated, opt, monkeypatch):
    monkeypatch.setattr(optimizers, "is_emulated", lambda dtype: emulated)
    found = []
    original = muon.zeropower_via_newtonschulz

    def spy(*args, dtype=torch.bfloat16, **options):
        found.append(dtype)
        return original(*args, dtype=dtype, **options)

    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", spy)
    model = nn.Linear(6, 4)
    optimizer = optimizers.create_optimizer(model, torch.device("cpu"), opt=opt, lr=0.1)
    model(torch.rand(3, 6)).sum().backward()
    optimizer.step()
    assert found == [torch.float32 if emulated else torch.bfloat16]
    assert muon.zeropower_via_newtonschulz is spy  # also of any other optimiser in the process
    assert not isinstance(optimizers.create_optimizer(model, torch.device("cuda"), opt=opt), optimizers.Float32Muon)


def test_float32_update_is_that_of_timm_but_more_exact():
    torch.manual_seed(0)
    start, gradient = torch.randn(8, 5), torch.randn(8, 5)
    weights = []
    for kind in (muon.Muon, optimizers.Float32Muon):
        weight = nn.Parameter(start.clone())
        weight.grad = gradient.clone()
        kind([weight], lr=1.0, weight_decay=0.0).step()
        weights.append(weight.detach() - start)
    assert 1e-5 < relative_error(*weights) < 2e-2


def test_an_update_that_fails_leaves_timm_as_it_was(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", fail)
    weight = nn.Parameter(torch.randn(8, 5))
    weight.grad = torch.randn(8, 5)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizers.Float32Muon([weight], lr=0.1).step()
    assert muon.zeropower_via_newtonschulz is fail


@pytest.mark.parametrize("options", [{}, {"nesterov": True, "weight_decay": 0.1}, {"conv_mode": "batched"}])
def test_muon_in_batches_is_timms(options, monkeypatch):
    """Weights of one shape, small ones of many shapes, tall and wide, and those that Muon leaves to AdamW."""
    exact = functools.partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
    sizes = []

    def counted(batch, *args, **named):
        sizes.append(len(batch) if batch.ndim == 3 else 0)
        return exact(batch, *args, **named)

    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", counted)
    shapes = [(70, 80), (80, 70), (70, 80), (16, 6, 3, 3), (64, 16, 3, 3), (640, 64), (10, 64), (10,), (1, 5)]
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in shapes]
    found = []
    for kind in (muon.Muon, optimizers.BatchedMuon):
        weights = [nn.Parameter(weight.clone()) for weight in start]
        optimizer = kind(weights, lr=0.1, **options)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            sizes.clear()
            optimizer.step()
        found.append([weight.detach() for weight in weights])
    for one, other, first in zip(*found, start, strict=True):
        assert relative_error(other - first, one - first) < 1e-5
    if "conv_mode" not in options:
        assert sorted(sizes) == [1, 2, 4]


def test_optimisers_that_can_be_recorded_are_made_so_on_a_gpu():
    model = nn.Linear(6, 4)
    for opt in ("muon", "adam", "sgd"):
        here, there = (optimizers.create_optimizer(model, torch.device(name), opt=opt) for name in ("cpu", "cuda"))
        assert not here.defaults.get("capturable")
        assert there.defaults.get("capturable", True) and all(g.get("capturable", True) for g in there.param_groups)
        assert isinstance(there, optimizers.BatchedMuon) == (opt == "muon")
