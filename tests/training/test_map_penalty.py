"""Tests of the differentiable linear map: it equals the explanations' map; its gradients match finite differences."""

import pytest
import timm
import torch

from helpers import relative_error
from timm_coda.layers import functional
from timm_coda.training.map_penalty import MapPenalty, linear_map


def small(**options):
    torch.manual_seed(0)
    layout = {"rank": 2, "num_classes": 4, "logit_temperature": 20.0}
    return timm.create_model("coda_net_xs", **layout | options).double().train()


def images() -> torch.Tensor:
    return torch.rand(3, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"activation": "l2"}, {"global_pool": "avg"}], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_it_is_the_map_of_the_explanation(options, backend):
    model, classes = small(**options), torch.tensor([[0, 3], [1, 1], [2, 0]])
    penalty = MapPenalty(model, 1.0)
    with functional.use_backend(backend):
        model(images())
        found = linear_map(penalty._inputs, classes, average=options.get("global_pool") == "avg")
        expected = model.eval().explain(images(), target=classes).weights * 20
    assert found.shape == (3, 2, 6, 9, 8)
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_its_derivatives_are_those_of_finite_differences(backend, checkpointing):
    """Check the gradient of loss plus penalty for each parameter, along a random direction."""
    model, labels = small(), torch.tensor([3, 0, 2])
    model.set_grad_checkpointing(checkpointing)
    penalty = MapPenalty(model, 3.0)

    def objective() -> torch.Tensor:
        torch.manual_seed(5)
        logits = model(images())
        return torch.nn.functional.cross_entropy(logits, labels) + penalty(labels)

    with functional.use_backend(backend):
        objective().backward()
        assert not penalty._inputs or checkpointing
        generator = torch.Generator().manual_seed(2)
        for name, weight in model.named_parameters():
            direction = torch.randn(weight.shape, dtype=torch.float64, generator=generator)
            values = []
            for step in (1e-5, -2e-5):
                with torch.no_grad():
                    weight += step * direction
                values.append(objective().item())
            with torch.no_grad():
                weight += 1e-5 * direction
            expected = (values[0] - values[1]) / 2e-5
            assert weight.grad is not None
            found = (weight.grad * direction).sum().item()
            assert abs(found - expected) < 1e-6 * max(abs(expected), 1e-2), name


def test_the_classes_are_the_true_one_and_another():
    model = small()
    penalty, seen = MapPenalty(model, 1.0), []
    for seed in range(12):
        torch.manual_seed(seed)
        model(images()[:1])
        inputs = list(penalty._inputs)
        value = penalty(torch.tensor([2]))
        pairs = {
            other: linear_map(inputs, torch.tensor([[2, other]]), average=False).abs().mean() for other in range(4)
        }
        seen += [other for other, expected in pairs.items() if torch.isclose(value, expected, rtol=1e-12)]
    assert len(seen) == 12 and set(seen) == {0, 1, 3}


def test_only_that_of_coda_nets():
    with pytest.raises(ValueError, match="a ResNet is not supported: choose a CoDA-Net"):
        MapPenalty(timm.create_model("test_resnet"), 1.0)
    with pytest.raises(ValueError, match="with pooled classes"):
        MapPenalty(small(num_classes=0), 1.0)
    with pytest.raises(ValueError, match="remove --mixup"):
        MapPenalty(small(), 1.0, mixed=True)
    assert MapPenalty(timm.create_model("test_resnet"), 0.0, mixed=True)(torch.zeros(1)) == 0


def test_it_is_float32_under_float16_autocast():
    """Its gradient, scaled as by GradScaler, has factors too small for float16; the forward pass is in float16."""
    model = small().float()
    penalty, gradients = MapPenalty(model, 2.0), []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.float16, enabled):
            model(images().float())
        value = penalty(torch.tensor([3, 0, 2]))
        assert value.dtype == torch.float32
        gradients.append([value.detach(), *torch.autograd.grad(2**12 * value, list(model.parameters()))])
    for found, right in zip(gradients[1], gradients[0], strict=True):
        assert relative_error(found, right) < 5e-3


def test_it_follows_autocast():
    model = small().float()
    penalty = MapPenalty(model, 2.0)
    values = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled):
            model(images().float())
        value = penalty(torch.tensor([3, 0, 2]))
        value.backward()
        values.append(value.item())
    assert 0 < abs(values[1] / values[0] - 1) < 0.02
