"""Models on a GPU: exact explanations, the CPU's training steps, graphs, compilation, memory: pytest -m gpu."""

import threading

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import timm_coda  # noqa: F401  # registers the models
from helpers import relative_error
from helpers.gpu import DEVICE, needs_gpu, skip_in_rehearsal
from timm_coda.training.optimizers import create_optimizer
from timm_coda.training.updates import RecordedUpdates, Updates

pytestmark = needs_gpu

# One of each family, and the pixels of an image that it takes.
FAMILIES = {
    "coda_net_xs": 32,
    "coda_net_s": 32,
    "bcos_resnet18": 64,
    "bcos_densenet121": 64,
    "bcos_vgg11": 64,
    "bcos_convnext_tiny": 64,
    "vit_tiny_patch16_bcos_224": 224,
    "bcos_v1_conv9": 32,
}


@pytest.fixture(autouse=True)
def exact_products():
    """Restores torch's settings; convolutions and products in float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def create(name: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **options).to(DEVICE).eval()


def images(count: int, size: int) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def check(explanation, bound: float) -> None:
    """Check that contributions and bias sum to the logit."""
    total = explanation.bias + explanation.contributions.double().sum((-2, -1))
    assert relative_error(total, explanation.value) < bound


@pytest.mark.parametrize("name", FAMILIES)
def test_explanations_are_exact(name):
    model, x = create(name), images(2, FAMILIES[name])
    explanation = model.explain(x, top=2)
    assert explanation.contributions.device.type == DEVICE
    if not name.startswith("vit"):  # its position embedding contributes, too
        check(explanation, 1e-3)
    there = model.cpu().explain(x.cpu(), target=explanation.target.cpu())
    assert relative_error(explanation.logits, there.logits) < 1e-3
    assert relative_error(explanation.contributions, there.contributions) < 1e-2


@pytest.mark.parametrize("name", ["coda_net_s", "bcos_resnet18"])
def test_explanations_in_autocast(name):
    skip_in_rehearsal(name == "coda_net_s")
    model, x = create(name), images(2, FAMILIES[name])
    with torch.autocast(DEVICE, torch.bfloat16):
        check(model.explain(x), 0.1)


@pytest.mark.parametrize("name", ["coda_net_s", "bcos_resnet18"])
def test_explanations_under_checkpointing(name):
    model, x = create(name), images(2, FAMILIES[name])
    plain = model.explain(x)
    model.set_grad_checkpointing(True)
    again = model.explain(x)
    assert relative_error(again.contributions, plain.contributions) < 1e-5


def test_explanations_in_threads():
    """Two threads explain with one model while a third trains another: nobody sees another's mode."""
    skip_in_rehearsal()
    model, trained, x = create("coda_net_s"), create("coda_net_s").train(), images(4, 32)
    right, found, stop = model.explain(x), [], threading.Event()

    def train():
        while not stop.is_set():
            trained.zero_grad()
            trained(x).sum().backward()
            assert all(weight.grad is not None for weight in trained.parameters())

    def explain():
        found.extend(model.explain(x) for _ in range(5))

    threads = [threading.Thread(target=run) for run in (train, explain, explain)]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    stop.set()
    threads[0].join()
    assert len(found) == 10
    for explanation in found:
        assert torch.equal(explanation.contributions, right.contributions)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer.zero_grad(set_to_none=False)
    targets = torch.nn.functional.one_hot(labels, model.num_classes).to(x.dtype)
    torch.nn.functional.binary_cross_entropy_with_logits(model(x), targets).backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["coda_net_xs", "coda_net_s", "bcos_resnet18"])
def test_a_training_step_is_the_cpus(name):
    x, labels = images(4, 32), torch.arange(4, device=DEVICE)
    models = create(name, num_classes=10).train(), create(name, num_classes=10).train().cpu()
    before = [weight.detach().cpu().clone() for weight in models[1].parameters()]
    for model, device in zip(models, (DEVICE, "cpu"), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step(model, optimizer, x.to(device), labels.to(device))
    for (name, here), there, start in zip(models[0].named_parameters(), models[1].parameters(), before, strict=True):
        assert relative_error(here.detach().cpu() - start, there.detach() - start) < 1e-2, name


def train(name: str, kind: type[Updates], opt: str, precision: str, *, reads: bool = False):
    """Train on 12 batches, of which one is smaller and one has no finite loss; return how the weights changed."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=precision, cpu=DEVICE == "cpu")
    network = create(name, num_classes=10).train()
    start = [weight.detach().clone() for weight in network.parameters()]
    model, optimizer = accelerator.prepare(network, create_optimizer(network, accelerator.device, opt=opt, lr=1e-3))

    def compute(x: torch.Tensor, labels: torch.Tensor, factor: torch.Tensor) -> None:
        targets = torch.nn.functional.one_hot(labels, 10).float()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x).float(), targets) * factor
        if reads:
            loss.item()
        accelerator.backward(loss)

    updates = kind(accelerator, model, optimizer, compute, norm=1.0, adaptive=0.01)
    made = []
    for n in range(12):
        optimizer.param_groups[0]["lr"] = 1e-3 / (n + 1)
        x, labels = images(8, 32).roll(n, 0), torch.arange(8, device=DEVICE).roll(n)
        factor = torch.tensor(float("nan") if n == 8 else 1.0, device=DEVICE)
        made.append(updates.step(*(t[:5] if n == 6 else t for t in (x, labels)), factor))
    assert made == [n != 8 for n in range(12)]
    return [weight.detach() - before for weight, before in zip(network.parameters(), start, strict=True)]


@pytest.mark.parametrize(
    ("name", "opt", "precision"),
    [
        ("coda_net_xs", "muon", "no"),
        ("coda_net_s", "muon", "bf16"),
        ("coda_net_s", "adam", "no"),
        ("bcos_resnet18", "adamw", "no"),
        ("bcos_resnet18", "sgd", "bf16"),
    ],
)
def test_updates_as_cuda_graphs(name, opt, precision, capsys):
    skip_in_rehearsal()
    usual, recorded = (train(name, kind, opt, precision) for kind in (Updates, RecordedUpdates))
    assert "not replayed" not in "".join(capsys.readouterr())
    for one, other in zip(usual, recorded, strict=True):
        assert relative_error(other, one) < (1e-3 if precision == "no" else 5e-2)


def test_updates_that_cannot_be_recorded(capsys):
    """A layer that reads a number from the GPU: a message, and the usual updates."""
    skip_in_rehearsal()
    recorded = train("coda_net_xs", RecordedUpdates, "adam", "no", reads=True)
    assert "not replayed as CUDA graphs" in "".join(capsys.readouterr())
    for one, other in zip(train("coda_net_xs", Updates, "adam", "no"), recorded, strict=True):
        assert relative_error(other, one) < 1e-3


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode):
    skip_in_rehearsal()
    model, x = create("coda_net_xs", num_classes=10).train(), images(8, 32)
    loss = torch.nn.functional.mse_loss
    wanted = torch.autograd.grad(loss(model(x), x[:, 0, 0, :10]), list(model.parameters()))
    compiled = torch.compile(model, mode=mode)
    for _ in range(3):  # reduce-overhead: warm up, capture, replay
        found = torch.autograd.grad(loss(compiled(x), x[:, 0, 0, :10]), list(model.parameters()))
        for (name, _), actual, right in zip(model.named_parameters(), found, wanted, strict=True):
            assert relative_error(actual, right) < 1e-3, name


def test_deterministic_mode():
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            model = create("coda_net_s", num_classes=10).train()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for n in range(2):
                step(model, optimizer, images(4, 32).roll(n, 0), torch.arange(4, device=DEVICE))
            found.append([weight.detach().clone() for weight in model.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("name", "batch", "size"), [("coda_net_s", 512, 32), ("coda_net_l", 64, 240)])
def test_memory_of_a_training_step(name, batch, size):
    """In bfloat16 autocast: at most a quarter more than what must be saved, and the largest layer's temporaries."""
    from helpers.predictions import training_memory

    skip_in_rehearsal()
    model = create(name).train()
    x, labels = images(batch, size), torch.arange(batch, device=DEVICE) % model.num_classes
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast(DEVICE, torch.bfloat16):
        logits = model(x)
    torch.nn.functional.cross_entropy(logits.float(), labels).backward()
    grown = torch.cuda.max_memory_allocated() - before
    assert grown < 1.25 * training_memory(model, batch, size), f"{grown / 2**30:.1f} GiB"
