"""Optimisers for CPUs with and without bfloat16 instructions."""

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
