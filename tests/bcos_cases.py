"""What the tests of B-cos networks share: the authors' numbers, and what each layer of a network sees."""

from math import log

import torch
from conftest import relative_error


def assert_authors_numbers(golden, case, model, loaded):
    """Explanations of a model that `loaded` the golden weights are those that the authors' code computed."""
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    model = model.double().eval()
    expected = golden.expected(case)
    targets = torch.from_numpy(expected["targets"]).expand(2, -1)
    explanation = model.explain(torch.from_numpy(golden.inputs(case)).double(), targets)
    bias = model.logits.bias
    assert bias == -log(999)
    assert relative_error(explanation.logits - bias, expected["logits"] - bias) < 1e-9
    assert relative_error(explanation.contributions, expected["contributions"]) < 1e-9
    assert relative_error(explanation.weights[:1, :1], expected["weights"]) < 1e-6
    return explanation


def layers_and_inputs(model, x, kinds):
    """(layer, its input) of every layer of these kinds, when the model sees x."""
    seen = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    hooks = [
        layer.register_forward_hook(lambda module, args, output, name=name: seen.update({name: args[0]}))
        for name, layer in layers.items()
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return [(layer, seen[name]) for name, layer in layers.items()]
