"""Our explanations in the shapes that other libraries of explanations expect.

`adapters.captum`, `adapters.quantus` and `adapters.grad_cam` meet models only through `explain`; a library is needed
only where its own classes are.
"""

from .colors import ValidColors

__all__ = ["ValidColors"]
