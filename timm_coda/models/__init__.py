"""Model families; importing this package registers all of them in timm."""

from .coda_net import CodaNet

__all__ = ["CodaNet"]
