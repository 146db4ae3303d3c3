"""Model families; importing this package registers all of them in timm."""

from .bcos_conv_net import BcosConvNet
from .bcos_convnext import BcosConvNeXt
from .bcos_densenet import BcosDenseNet
from .bcos_resnet import BcosResNet
from .bcos_v1 import BcosV1DenseNet, BcosV1InceptionV3, BcosV1ResNet, BcosV1VGG
from .bcos_vgg import BcosVGG
from .bcos_vit import BcosVisionTransformer
from .bcosified import Bcosified, bcosify
from .coda_net import CodaNet

__all__ = [
    "BcosConvNeXt",
    "BcosConvNet",
    "BcosDenseNet",
    "BcosResNet",
    "BcosV1DenseNet",
    "BcosV1InceptionV3",
    "BcosV1ResNet",
    "BcosV1VGG",
    "BcosVGG",
    "BcosVisionTransformer",
    "Bcosified",
    "CodaNet",
    "bcosify",
]
