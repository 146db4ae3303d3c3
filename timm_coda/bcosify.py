"""Turns the modules of timm's own architectures into their B-cos counterparts.

What changes: convolutions become B-cos convolutions, batch normalisation the uncentred one, max pooling average
pooling, activations nothing, as the B-cos transform is the non-linearity. The encoding of the image goes into the first
convolution and the classifier in front of the pooling, so that the architecture's own forward pass stays as it is.
"""

from math import log

from torch import nn

from .bcos import BatchNormUncentered2d, BcosConv2d, EncodedBcosConv2d
from .layers import DynamicLinear, Logits

__all__ = ["bcos_classifier", "bcos_logits", "replace_modules"]


def replace_modules(network: nn.Module, first_conv: str, *, b: float = 2.0) -> None:
    """Replace, in place, every module inside `network` that has a B-cos counterpart; parameters are carried over.

    Args:
        network: with a first convolution for the encoded image's channels
        first_conv: name of that convolution, which takes the encoding up
        b: B of all layers

    Raises:
        ValueError: a layer with parameters that has no counterpart here.
    """
    _replace_children(network, "", first_conv, b)


def _replace_children(parent: nn.Module, prefix: str, first_conv: str, b: float) -> None:
    for child, module in list(parent.named_children()):
        name = prefix + child
        replaced = _counterpart(name, module, name == first_conv, b)
        if replaced is module:
            _replace_children(module, f"{name}.", first_conv, b)
        else:
            setattr(parent, child, replaced.train(module.training))


def _counterpart(name: str, module: nn.Module, encode: bool, b: float) -> nn.Module:
    if isinstance(module, nn.Conv2d):
        return _bcos_conv(name, module, encode, b)
    if isinstance(module, nn.BatchNorm2d):
        if module.running_var is None or not module.affine or module.momentum is None:
            raise ValueError(f"{name} ({module}) needs a weight and running statistics with a momentum")
        norm = BatchNormUncentered2d(module.num_features, module.eps, module.momentum, device="meta")
        norm.weight, norm.running_var = nn.Parameter(module.weight), module.running_var
        return norm
    if isinstance(module, nn.MaxPool2d):
        return nn.AvgPool2d(module.kernel_size, module.stride, module.padding, module.ceil_mode)
    if isinstance(module, (nn.ReLU, nn.GELU)):
        return nn.Identity()
    leaf = next(module.children(), None) is None
    if leaf and not isinstance(module, DynamicLinear) and next(module.parameters(), None) is not None:
        raise ValueError(f"{name} ({type(module).__name__}) has no B-cos counterpart: replace it before")
    return module


def _bcos_conv(name: str, conv: nn.Conv2d, encode: bool, b: float) -> BcosConv2d:
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros" or type(conv) is not nn.Conv2d:
        raise ValueError(
            f"{name} ({type(conv).__name__}, padding={conv.padding!r}, {conv.padding_mode}): only plain convolutions "
            "with a number of zeros around the image have a B-cos counterpart"
        )
    rows, columns = conv.kernel_size
    options = {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "b": b,
        "device": "meta",
    }
    if encode:
        layer = EncodedBcosConv2d(conv.in_channels // 2, conv.out_channels, (rows, columns), **options)
    else:
        layer = BcosConv2d(conv.in_channels, conv.out_channels, (rows, columns), **options)
    layer.weight = nn.Parameter(conv.weight)
    return layer


def bcos_classifier(num_features: int, num_classes: int, *, b: float = 2.0, device=None, dtype=None) -> nn.Module:
    """Each position's votes for the classes, (B, C, H, W) to (B, num_classes, H, W); nothing for 0 classes."""
    if num_classes == 0:
        return nn.Identity()
    return BcosConv2d(num_features, num_classes, b=b, device=device, dtype=dtype)


def bcos_logits(num_classes: int, temperature: float, bias: float | None) -> Logits:
    """The last layer; without a bias given, b0 = -log(classes - 1): a class's odds where nothing is seen."""
    return Logits(temperature, -log(max(num_classes - 1, 1)) if bias is None else bias)
