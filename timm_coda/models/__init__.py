"""Model families; importing this package registers all of them in timm."""

from .bcos_conv_net import BcosConvNet
from .bcos_resnet import BcosResNet
from .bcos_v1 import BcosV1DenseNet, BcosV1InceptionV3, BcosV1ResNet, BcosV1VGG
from .coda_net import CodaNet

__all__ = ["BcosConvNet", "BcosResNet", "BcosV1DenseNet", "BcosV1InceptionV3", "BcosV1ResNet", "BcosV1VGG", "CodaNet"]
