"""Layers that compute `W(x) x`: dynamic alignment units (DAUs), B-cos layers, and other layers of these networks."""

from .attention import DynamicGroupNorm2d, DynamicLayerNorm, SinCosPositions, freezable
from .base import DynamicLinear, GlobalPool, InverseEncoding, Logits, adapt_colours, placement
from .bcos import BatchNormUncentered2d, BcosConv2d, BcosLinear, EncodedBcosConv2d, PositionNorm2d
from .dau import DAUConv2d, DAULinear
from .functional import (
    BACKENDS,
    BEST_BACKEND,
    bcos_conv2d,
    bcos_linear,
    dau_conv2d,
    dau_linear,
    set_backend,
    use_backend,
)
from .gates import FrozenActivation, FrozenGate
from .kernels.dau_torch import rescaling, squared_norm
from .kernels.half import uses_float16, widened
from .kernels.products import cpu_slowdown, is_emulated

__all__ = [
    "BACKENDS",
    "BEST_BACKEND",
    "BatchNormUncentered2d",
    "BcosConv2d",
    "BcosLinear",
    "DAUConv2d",
    "DAULinear",
    "DynamicGroupNorm2d",
    "DynamicLayerNorm",
    "DynamicLinear",
    "EncodedBcosConv2d",
    "FrozenActivation",
    "FrozenGate",
    "GlobalPool",
    "InverseEncoding",
    "Logits",
    "PositionNorm2d",
    "SinCosPositions",
    "adapt_colours",
    "bcos_conv2d",
    "bcos_linear",
    "cpu_slowdown",
    "dau_conv2d",
    "dau_linear",
    "freezable",
    "is_emulated",
    "placement",
    "rescaling",
    "set_backend",
    "squared_norm",
    "use_backend",
    "uses_float16",
    "widened",
]
