"""Updates: gradients are limited, and updates that are not finite are skipped."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from timm_coda.training import updates as training_updates
from timm_coda.training.updates import RecordedUpdates, Updates, can_record, limit_gradients


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


def learner(kind: type[Updates] = Updates, *, capturable: bool = True):
    """A small network with running variances, its optimiser, and its updates; a batch is images, factor and weight."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["capturable"] = capturable  # as other optimisers are on a GPU
    model, optimizer = accelerator.prepare(network, optimizer)

    def compute(images: torch.Tensor, factor: torch.Tensor, weight: float) -> None:
        accelerator.backward(model(images * factor).square().sum() * factor * weight)

    return network, optimizer, kind(accelerator, model, optimizer, compute, norm=1.0, adaptive=0.0)


@pytest.mark.parametrize("kind", [Updates, RecordedUpdates])
def test_an_update_without_a_finite_gradient_is_skipped_whole(kind, stand_in):
    """Weights, optimiser state and running variances are unchanged, and the next update is made normally."""
    network, optimizer, updates = learner(kind)
    images = torch.rand(8, 3)

    def step(factor: float) -> bool:
        return updates.step(images, torch.tensor(factor), 1.0)

    assert all(step(1.0) for _ in range(5))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    momenta = copy.deepcopy(optimizer.state_dict()["state"])
    assert not step(float("nan")) and not step(float("inf"))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    for number, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], momenta[number]["momentum_buffer"])
    assert all(weight.grad is None for weight in network.parameters())
    assert step(1.0)
    assert not torch.equal(network[0].weight, before["0.weight"]) and network[1].num_batches_tracked == 6


class StandIn:
    """Does on a CPU what a CUDA graph does: runs a function again, with the tensors that it had when recorded."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, run: Callable[[], None]) -> None:
        self.network, self.optimizer, self.run, self.replays = network, optimizer, run, 0
        self.writes = all(weight.grad is None for weight in network.parameters())
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.run()
        self.gradients = [weight.grad for weight in network.parameters()]

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        here = [group["lr"] for group in self.optimizer.param_groups]
        for weight, gradient in zip(self.network.parameters(), self.gradients, strict=True):
            weight.grad = None if self.writes else gradient
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate
        with torch.enable_grad():
            self.run()
        for weight, gradient in zip(self.network.parameters(), self.gradients, strict=True):
            if self.writes:
                gradient.copy_(weight.grad)
            weight.grad = None  # a graph sets no attributes
        for group, rate in zip(self.optimizer.param_groups, here, strict=True):
            group["lr"] = rate


@pytest.fixture
def stand_in(monkeypatch):
    """Record stand-ins for CUDA graphs; yields a list of them."""
    graphs, seen = [], []
    make = RecordedUpdates.__init__

    def note(self, *args, **options):
        make(self, *args, **options)
        seen[:] = [self.model, self.optimizer.optimizer]

    def record(run, stream, before=None):
        model, optimizer = seen
        tensors = [*model.state_dict().values(), *(state["momentum_buffer"] for state in optimizer.state.values())]
        before = [tensor.clone() for tensor in tensors]
        graphs.append(StandIn(model, optimizer, run))
        for tensor, value in zip(tensors, before, strict=True):  # nothing is done when a graph is recorded
            tensor.copy_(value)
        return graphs[-1]

    monkeypatch.setattr(RecordedUpdates, "__init__", note)
    monkeypatch.setattr(training_updates, "record", record)
    return graphs


@pytest.mark.parametrize(("capturable", "replays"), [(False, [14]), (True, [14, 12])])
def test_recorded_updates_are_the_usual_ones(capturable, replays, stand_in):
    """With a changing learning rate, gradients that are not finite, batches of another size, and one of weight 0."""
    found = []
    for kind in (Updates, RecordedUpdates):
        network, optimizer, updates = learner(kind, capturable=capturable)
        generator, made = torch.Generator().manual_seed(1), []
        for number in range(20):
            optimizer.param_groups[0]["lr"] = 0.1 / (number + 1)
            images = torch.rand(5 if number in (7, 12) else 8, 3, generator=generator)
            factor = torch.tensor(float("nan") if number in (9, 12, 13) else 1.0)
            made.append(updates.step(images, factor, 0.0 if number == 15 else 1.0))
            assert isinstance(optimizer.param_groups[0]["lr"], float)
        assert made == [number not in (9, 12, 13) for number in range(20)]
        found.append(network.state_dict())
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], rtol=1e-6), name
    assert [graph.replays for graph in stand_in] == replays


def test_updates_that_cannot_be_recorded_are_made_as_usual(monkeypatch, capsys):
    def fail(run, stream, before=None):
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(training_updates, "record", fail)
    found = []
    for kind in (Updates, RecordedUpdates):
        network, _, updates = learner(kind)
        for number in range(6):
            assert updates.step(torch.ones(8, 3) * number, torch.tensor(1.0), 1.0)
        found.append(network[0].weight)
    assert torch.equal(*found)
    said = capsys.readouterr()
    assert (said.out + said.err).count("not replayed as CUDA graphs, which is slower: operation not permitted") == 1


def test_what_can_be_recorded():
    def can(**other) -> bool:
        usual = {"num_processes": 1, "gradient_accumulation_steps": 1, "scaler": None, "device": torch.device("cuda")}
        return can_record(SimpleNamespace(**usual | other))

    assert can() and not can(num_processes=2) and not can(gradient_accumulation_steps=2)
    assert not can(scaler=object()) and not can_record(Accelerator(cpu=True))
