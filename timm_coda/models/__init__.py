"""Model families; importing this package registers all of them in timm."""

from .bcos_convnext import BcosConvNeXt
from .bcos_densenet import BcosDenseNet
from .bcos_resnet import BcosResNet
from .bcos_vgg import BcosVGG
from .bcos_vit import BcosVisionTransformer
from .coda_net import CodaNet

__all__ = ["BcosConvNeXt", "BcosDenseNet", "BcosResNet", "BcosVGG", "BcosVisionTransformer", "CodaNet"]
