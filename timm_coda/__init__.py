"""Image classifiers that explain themselves, exactly: CoDA-Nets and B-cos networks as ordinary timm models.

Importing this package registers every model in timm.
"""

from .bcos import BcosConv2d, BcosLinear
from .explain import ExplainMixin, explain, explanation_mode
from .explanation import Explanation
from .functional import bcos_conv2d, bcos_linear, dau_conv2d, dau_linear, set_backend, use_backend
from .hub import HubMixin
from .layers import DAUConv2d, DAULinear, InverseEncoding
from .models import (
    BcosConvNet,
    BcosConvNeXt,
    BcosDenseNet,
    Bcosified,
    BcosResNet,
    BcosV1DenseNet,
    BcosV1InceptionV3,
    BcosV1ResNet,
    BcosV1VGG,
    BcosVGG,
    BcosVisionTransformer,
    CodaNet,
    bcosify,
)

__version__ = "0.1.0"

__all__ = [
    "BcosConv2d",
    "BcosConvNeXt",
    "BcosConvNet",
    "BcosDenseNet",
    "BcosLinear",
    "BcosResNet",
    "BcosV1DenseNet",
    "BcosV1InceptionV3",
    "BcosV1ResNet",
    "BcosV1VGG",
    "BcosVGG",
    "BcosVisionTransformer",
    "Bcosified",
    "CodaNet",
    "DAUConv2d",
    "DAULinear",
    "ExplainMixin",
    "Explanation",
    "HubMixin",
    "InverseEncoding",
    "__version__",
    "bcos_conv2d",
    "bcos_linear",
    "bcosify",
    "dau_conv2d",
    "dau_linear",
    "explain",
    "explanation_mode",
    "set_backend",
    "use_backend",
]
