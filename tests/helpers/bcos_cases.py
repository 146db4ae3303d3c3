"""What the tests of B-cos networks share: the authors' numbers, and what each layer of a network sees."""

from math import log

import golden
from helpers import relative_error


def assert_authors_numbers(case, model, loaded):
    """Explanations of a model that `loaded` the golden weights are those that the authors' code computed."""
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    model = model.double().eval()
    explanation = model.explain(golden.inputs(case).double(), golden.targets(case))
    bias = model.logits.bias
    assert bias == -log(999)
    assert relative_error(explanation.logits - bias, golden.logits(case) - bias) < 1e-9
    assert golden.error(case, "contributions", explanation.contributions) < 1e-9
    assert golden.error(case, "weights", explanation.weights[:1, :1]) < 1e-6
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
