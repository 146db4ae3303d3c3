"""Image classifiers that explain themselves, exactly: CoDA-Nets as ordinary timm models.

Importing this package registers every model in timm.
"""

from .explain import ExplainMixin, Explanation, explain, explanation_mode
from .functional import dau_conv2d, dau_linear, set_backend, use_backend
from .hub import HubMixin
from .layers import DAUConv2d, DAULinear, InverseEncoding
from .models import CodaNet

__version__ = "0.1.0"

__all__ = [
    "CodaNet",
    "DAUConv2d",
    "DAULinear",
    "ExplainMixin",
    "Explanation",
    "HubMixin",
    "InverseEncoding",
    "__version__",
    "dau_conv2d",
    "dau_linear",
    "explain",
    "explanation_mode",
    "set_backend",
    "use_backend",
]
