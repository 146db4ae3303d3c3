"""Image classifiers with exact explanations: CoDA-Nets and B-cos networks as ordinary timm models.

Importing this package registers all of its models in timm.
"""

from .explanation import ExplainMixin, Explanation, explain, explanation_mode
from .hub import HubMixin, __version__
from .layers import (
    BcosConv2d,
    BcosLinear,
    DAUConv2d,
    DAULinear,
    InverseEncoding,
    bcos_conv2d,
    bcos_linear,
    dau_conv2d,
    dau_linear,
    set_backend,
    use_backend,
)
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
