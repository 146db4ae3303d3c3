"""Replace the modules of timm's architectures with their B-cos counterparts.

- Convolutions and linear layers become B-cos layers.
- Normalisations lose their bias, and explanations hold their statistics constant.
- Max pooling becomes average pooling.
- Activations are removed, because the B-cos transform is the non-linearity, or become gates (`keep_activations`).
- Squeeze-excitation and attention stay; explanations hold the gate and the attention matrix constant.

The image encoding moves into the first convolution, or in front of the network, and the classifier in front of the
pooling. The architecture's own forward pass does not change.
"""

from collections import OrderedDict
from dataclasses import dataclass
from math import log

from timm import layers as timm_layers
from timm.layers import activations as timm_activations
from timm.models import _efficientnet_blocks as efficientnet_blocks
from torch import nn

from ..layers import (
    BatchNormUncentered2d,
    BcosConv2d,
    BcosLinear,
    DynamicGroupNorm2d,
    DynamicLayerNorm,
    DynamicLinear,
    EncodedBcosConv2d,
    FrozenActivation,
    FrozenGate,
    Logits,
    PositionNorm2d,
    freezable,
)

__all__ = ["bcos_classifier", "bcos_logits", "replace_modules"]

_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Tanh, timm_activations.Swish, timm_activations.Mish, timm_activations.HardSwish, timm_activations.HardMish),
    *(timm_activations.Tanh, timm_activations.GELU, timm_activations.GELUTanh, timm_activations.QuickGELU),
)
_PIECEWISE_LINEAR = (nn.ReLU, nn.LeakyReLU, nn.PReLU)  # f(0) = 0: the gradient already is the frozen gate
_GATES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.GLU, timm_activations.Sigmoid, timm_activations.HardSigmoid)
_SQUEEZE_EXCITE = (timm_layers.SEModule, timm_layers.EffectiveSEModule, efficientnet_blocks.SqueezeExcite)
_SCALES = (timm_layers.LayerScale, timm_layers.LayerScale2d)  # already linear
_NORMS_2D = (
    *(timm_layers.LayerNorm2d, timm_layers.LayerNorm2dFp32, timm_layers.LayerNormAct2d),
    *(timm_layers.LayerNormAct2dFp32, timm_layers.norm.LayerNormExp2d),
)


@dataclass(frozen=True)
class _Rules:
    """Options of `replace_modules`."""

    first_conv: str | None
    b: float
    unit_norm: bool
    keep_activations: bool


def replace_modules(
    network: nn.Module,
    first_conv: str | None = None,
    *,
    b: float = 2.0,
    unit_norm: bool = True,
    keep_activations: bool = False,
) -> None:
    """Replace every module inside `network` with its B-cos counterpart, in place.

    Weights are carried over; biases are dropped.

    Args:
        network: network whose first convolution takes the channels of the encoded image
        first_conv: name of that convolution, which will include the encoding; None to encode in front of the network
        b: exponent B of all B-cos layers
        unit_norm: scale the weights of each unit of convolutions and linear layers to norm 1
        keep_activations: keep activations, as gates that explanations hold constant

    Raises:
        ValueError: a module has no counterpart; the message names it.
    """
    _replace_children(network, "", _Rules(first_conv, b, unit_norm, keep_activations))


def _replace_children(parent: nn.Module, prefix: str, rules: _Rules) -> None:
    for child, module in list(parent.named_children()):
        name = prefix + child
        replaced = _counterpart(name, module, rules)
        if replaced is module:
            _replace_children(module, f"{name}.", rules)
        else:
            setattr(parent, child, replaced.train(module.training))


def _counterpart(name: str, module: nn.Module, rules: _Rules) -> nn.Module:
    if isinstance(module, DynamicLinear):
        return module
    if isinstance(module, nn.Conv2d):
        return _bcos_conv(name, module, rules)
    if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
        return _norm(name, module, rules)
    if type(module) is nn.Linear:
        return _linear(module, rules.b, rules.unit_norm)
    if isinstance(module, timm_layers.pool2d_same.MaxPool2dSame):
        return timm_layers.AvgPool2dSame(module.kernel_size, module.stride, ceil_mode=module.ceil_mode)
    if isinstance(module, nn.MaxPool2d):
        return nn.AvgPool2d(module.kernel_size, module.stride, module.padding, module.ceil_mode)
    if isinstance(module, _ACTIVATIONS):
        return _activation(module, rules)
    if isinstance(module, _SQUEEZE_EXCITE):
        return _squeeze_excite(name, module)
    if type(module) is timm_layers.Attention and module.gate is None:
        setattr(module, "qkv", _linear(module.qkv, 1.0, False))  # noqa: B010, linear as in the published transformers
        return freezable(module)
    if isinstance(module, _GATES) or "Attention" in type(module).__name__:
        raise ValueError(
            f"{name} ({type(module).__name__}) has input-dependent weights that cannot be held constant, so no "
            "explanation would be exact: choose an architecture without it"
        )
    leaf = next(module.children(), None) is None
    if leaf and next(module.parameters(), None) is not None and not isinstance(module, _SCALES):
        raise ValueError(f"{name} ({type(module).__name__}) has no B-cos counterpart: replace it first")
    return module


def _bcos_conv(name: str, conv: nn.Conv2d, rules: _Rules) -> BcosConv2d:
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros" or type(conv) is not nn.Conv2d:
        raise ValueError(
            f"{name} ({type(conv).__name__}, padding={conv.padding!r}, {conv.padding_mode}) has no B-cos counterpart: "
            "use nn.Conv2d with a fixed number of zeros as padding"
        )
    rows, columns = conv.kernel_size
    options = {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "b": rules.b,
        "unit_norm": rules.unit_norm,
        "device": "meta",
    }
    if name == rules.first_conv:
        layer = EncodedBcosConv2d(conv.in_channels // 2, conv.out_channels, (rows, columns), **options)
    else:
        layer = BcosConv2d(conv.in_channels, conv.out_channels, (rows, columns), **options)
    layer.weight = nn.Parameter(conv.weight)
    return layer


def _linear(linear: nn.Linear, b: float, unit_norm: bool) -> BcosLinear:
    layer = BcosLinear(linear.in_features, linear.out_features, b=b, unit_norm=unit_norm, device="meta")
    layer.weight = nn.Parameter(linear.weight)
    return layer


def _norm(name: str, module: nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm, rules: _Rules) -> nn.Module:
    """Return the norm's counterpart, followed by the norm's own activation (timm's norms can have one) if kept."""
    if isinstance(module, nn.BatchNorm2d):
        if module.running_var is None or not module.affine or module.momentum is None:
            raise ValueError(f"{name} ({module}) needs a weight and running statistics with a momentum")
        norm = BatchNormUncentered2d(module.num_features, module.eps, module.momentum, device="meta")
        norm.running_var = module.running_var
    elif module.weight is None:
        raise ValueError(f"{name} ({module}) needs a weight")
    elif isinstance(module, nn.GroupNorm):
        norm = DynamicGroupNorm2d(module.num_channels, module.num_groups, module.eps, device="meta")
    elif len(module.normalized_shape) > 1:
        raise ValueError(f"{name} ({module}) normalises several axes: only norms over the channels have a counterpart")
    else:
        kind = PositionNorm2d if isinstance(module, _NORMS_2D) else DynamicLayerNorm
        norm = kind(module.weight.numel(), module.eps, device="meta")
    norm.weight = nn.Parameter(module.weight)
    kept = [m for child in ("drop", "act") if (m := getattr(module, child, None)) and type(m) is not nn.Identity]
    if not rules.keep_activations or not kept:
        return norm
    return nn.Sequential(norm, *(_activation(m, rules) if isinstance(m, _ACTIVATIONS) else m for m in kept))


def _activation(module: nn.Module, rules: _Rules) -> nn.Module:
    if not rules.keep_activations:
        return nn.Identity()
    linear = isinstance(module, _PIECEWISE_LINEAR)
    return module if linear else FrozenActivation(module)


def _squeeze_excite(name: str, module: nn.Module) -> FrozenGate:
    """Turn the module's layers, in their order of use, into a gate. They keep their biases and activations."""
    if getattr(module, "add_maxpool", False) or any(isinstance(m, nn.BatchNorm2d) for m in module.modules()):
        raise ValueError(f"{name} ({type(module).__name__}) has max pooling or a norm inside, which is not supported")
    return FrozenGate(nn.Sequential(OrderedDict(pool=nn.AdaptiveAvgPool2d(1), **dict(module.named_children()))))


def bcos_classifier(
    num_features: int, num_classes: int, *, b: float = 2.0, unit_norm: bool = True, device=None, dtype=None
) -> nn.Module:
    """Create the classifier of each position, (B, C, H, W) to (B, num_classes, H, W); the identity for 0 classes."""
    if num_classes == 0:
        return nn.Identity()
    return BcosConv2d(num_features, num_classes, b=b, unit_norm=unit_norm, device=device, dtype=dtype)


def bcos_logits(num_classes: int, temperature: float, bias: float | None) -> Logits:
    """Create the last layer. By default b0 = -log(classes - 1): probability 1 / classes if there is no evidence."""
    return Logits(temperature, -log(max(num_classes - 1, 1)) if bias is None else bias)
