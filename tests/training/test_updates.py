"""Updates: gradients are limited, and updates that are not finite are skipped."""

from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch import nn

from timm_coda.training.updates import Updates, limit_gradients


def test_gradients_are_limited_unit_by_unit():
    layer = nn.Linear(3, 2, bias=False)
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    model = nn.ParameterList([layer.weight, frozen])
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0, 4], [0, 1, 0]]))  # norms 5 and 1
    layer.weight.grad = torch.tensor([[0.0, 2, 0], [0.001, 0, 0]])
    limit_gradients(Accelerator(cpu=True), model, 0.0, 0.1)
    assert torch.allclose(layer.weight.grad, torch.tensor([[0.0, 0.5, 0], [0.001, 0, 0]]))
    limit_gradients(Accelerator(cpu=True), model, 0.1, 0.0)
    assert torch.allclose(layer.weight.grad.norm(), torch.tensor(0.1))
    before = layer.weight.grad.clone()
    limit_gradients(SimpleNamespace(sync_gradients=False), model, 1e-9, 1e-9)
    assert torch.equal(layer.weight.grad, before)


def test_an_update_without_a_finite_gradient_is_skipped_whole():
    """Weights, optimiser state and running variances are unchanged, and the next update is made normally."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model, optimizer = accelerator.prepare(network, torch.optim.Adam(network.parameters(), 0.1))
    updates = Updates(accelerator, model, optimizer, norm=1.0, adaptive=0.0)
    images = torch.rand(8, 3)

    def step(factor: float) -> bool:
        with accelerator.accumulate(model):
            accelerator.backward(model(images * factor).square().sum() * factor)
            return updates.step()

    assert step(1.0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert not step(float("nan")) and not step(float("inf"))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(weight.grad is None for weight in network.parameters())
    assert step(1.0)
    assert {int(state["step"]) for state in optimizer.state_dict()["state"].values()} == {2}
    assert not torch.equal(network[0].weight, before["0.weight"]) and network[1].num_batches_tracked == 2
