"""What the tests of B-cos networks share: the authors' numbers, and what each layer of a network sees."""

from math import log
from types import MethodType

import torch
import torch.nn.functional as F

import golden
from helpers import relative_error
from timm_coda.layers import BcosConv2d, EncodedBcosConv2d


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


def freeze(model, x):
    """The network with the dynamic weights it has at `x` written into its convolutions, by the formulas alone."""
    for layer, p in layers_and_inputs(model, x, BcosConv2d):
        p = model.encoding(p) if isinstance(layer, EncodedBcosConv2d) else p
        weight = layer.weight / layer.weight.square().sum((1, 2, 3), keepdim=True).sqrt()
        geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        norm = (F.conv2d(p.square(), torch.ones_like(weight), None, *geometry) + 1e-6).sqrt()
        factor = F.conv2d(p, weight, None, *geometry).abs() / norm

        def forward(self, x, weight=weight, geometry=geometry, factor=factor):
            if isinstance(self, EncodedBcosConv2d):
                x = self.encoding(x)
            return F.conv2d(x, weight, None, *geometry) * factor

        layer.forward = MethodType(forward, layer)
    return model
