"""pytorch-grad-cam adapter: exact contributions with the interface of its CAM classes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from torch import Tensor, nn

from .colors import explain_colors


class InherentCAM(AbstractContextManager):
    """Exact maps at full resolution, called as `cam(input_tensor, targets)` like `GradCAM(...)`; no target layer.

    Like the library's own maps, these show only evidence for the class, each map scaled to [0, 1]. For signed maps in
    logits, call `model.explain`. No hooks are registered; `with InherentCAM(model) as cam:` works, but is not needed.

    Args:
        model: a timm_coda model, or `ValidColors` around one
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, input_tensor: Tensor, targets: Sequence[Callable[[Tensor], Tensor]] | None = None) -> np.ndarray:
        """Return float32 maps in [0, 1], (N, H, W); a map without evidence for the class is all 0.

        Args:
            input_tensor: colours in [0, 1], (N, C, H, W)
            targets: N of pytorch-grad-cam's `ClassifierOutputTarget`, or None for the prediction

        Raises:
            TypeError: a target is of another class.
            ValueError: an argument that `explain` rejects.
        """
        classes = None if targets is None else [_category(target) for target in targets]
        maps = explain_colors(self.model, input_tensor, classes).contributions.clamp_min(0)
        peak = maps.amax((1, 2), keepdim=True)
        return (maps / peak.where(peak > 0, 1)).float().cpu().numpy()

    def __exit__(self, *exc_info: object) -> None:
        pass


def _category(target: Any) -> int:
    # Other target classes of the library also have a `category`, but are not linear in the logits.
    if type(target).__name__ != "ClassifierOutputTarget":
        raise TypeError(f"target {target!r}: only logits have exact explanations: use ClassifierOutputTarget(class)")
    return int(target.category)
