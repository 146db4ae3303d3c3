"""Adapters that make exact explanations usable in Captum, Quantus and pytorch-grad-cam.

`adapters.captum`, `adapters.quantus` and `adapters.grad_cam` use models only through `explain`. Only `adapters.captum`
imports its library.
"""

from .colors import ValidColors

__all__ = ["ValidColors"]
