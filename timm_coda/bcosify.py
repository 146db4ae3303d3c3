"""Turns the modules of timm's own architectures into their B-cos counterparts.

What changes: convolutions become B-cos convolutions, batch normalisation the uncentred one, max pooling average
pooling, activations nothing, as the B-cos transform is the non-linearity. The encoding of the image goes into the first
convolution and the classifier in front of the pooling, so that the architecture's own forward pass stays as it is.
"""

from math import log

from torch import nn

from .bcos import BatchNormUncentered2d, BcosConv2d, EncodedBcosConv2d, PositionNorm2d
from .layers import DynamicLinear, InverseEncoding, Logits

__all__ = ["NORMS", "bcos_classifier", "bcos_logits", "replace_modules"]

NORMS = {"bnu": BatchNormUncentered2d, "pn": PositionNorm2d}
"""Normalisations by the published models' names: uncentred BatchNorm and position norm."""


def replace_modules(network: nn.Module, first_conv: str, encoding: InverseEncoding, *, b: float = 2.0) -> None:
    """Replace, in place, every module inside `network` that has a B-cos counterpart; parameters are carried over.

    Args:
        network: with a first convolution for the encoded image's channels
        first_conv: name of that convolution, which takes `encoding` up
        encoding: of the image
        b: B of all layers

    Raises:
        ValueError: a layer with parameters that has no counterpart here.
    """
    for name, module in list(network.named_modules()):
        replaced = _counterpart(name, module, encoding if name == first_conv else None, b)
        if replaced is not module:
            network.set_submodule(name, replaced.train(module.training))


def _counterpart(name: str, module: nn.Module, encoding: InverseEncoding | None, b: float) -> nn.Module:
    if isinstance(module, nn.Conv2d):
        return _bcos_conv(name, module, encoding, b)
    if isinstance(module, nn.BatchNorm2d):
        norm = BatchNormUncentered2d(module.num_features, module.eps, module.momentum or 0.1, device="meta")
        norm.weight, norm.running_var = module.weight, module.running_var
        return norm
    if isinstance(module, nn.MaxPool2d):
        return nn.AvgPool2d(module.kernel_size, module.stride, module.padding, module.ceil_mode)
    if isinstance(module, (nn.ReLU, nn.GELU)):
        return nn.Identity()
    if not isinstance(module, DynamicLinear) and any(True for _ in module.parameters(recurse=False)):
        raise ValueError(f"{name} ({type(module).__name__}) has no B-cos counterpart: replace it before")
    return module


def _bcos_conv(name: str, conv: nn.Conv2d, encoding: InverseEncoding | None, b: float) -> BcosConv2d:
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros" or type(conv) is not nn.Conv2d:
        raise ValueError(
            f"{name} ({type(conv).__name__}, padding={conv.padding!r}, {conv.padding_mode}): only plain convolutions "
            "with a number of zeros around the image have a B-cos counterpart"
        )
    options = {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "b": b,
        "device": "meta",
    }
    if encoding is None:
        layer = BcosConv2d(conv.in_channels, conv.out_channels, conv.kernel_size, **options)
    else:
        layer = EncodedBcosConv2d(encoding, conv.out_channels, conv.kernel_size, **options)
    layer.weight = conv.weight
    return layer


def bcos_classifier(num_features: int, num_classes: int, *, b: float = 2.0, device=None, dtype=None) -> nn.Module:
    """Each position's votes for the classes, (B, C, H, W) to (B, num_classes, H, W); nothing for 0 classes."""
    if num_classes == 0:
        return nn.Identity()
    return BcosConv2d(num_features, num_classes, b=b, device=device, dtype=dtype)


def bcos_logits(num_classes: int, temperature: float, bias: float | None) -> Logits:
    """The last layer; without a bias given, b0 = -log(classes - 1): a class's odds where nothing is seen."""
    return Logits(temperature, -log(max(num_classes - 1, 1)) if bias is None else bias)
