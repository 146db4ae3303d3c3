"""Model families; importing this package registers all of them in timm."""

from .bcos_resnet import BcosResNet
from .bcos_vit import BcosVisionTransformer
from .bcosified import Bcosified, bcosify
from .coda_net import CodaNet

__all__ = ["BcosResNet", "BcosVisionTransformer", "Bcosified", "CodaNet", "bcosify"]
