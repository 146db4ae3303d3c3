"""pytorch-grad-cam: the model's own contributions behind the calling convention of its CAM classes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from torch import Tensor, nn

from .colors import explain_colors


class InherentCAM(AbstractContextManager):
    """`cam(input_tensor, targets)` as `GradCAM(...)`, without a target layer to choose: exact, at full resolution.

    Like the library's own maps these show only what speaks for the class, each scaled to [0, 1]; for signed ones in
    logits call `model.explain`. Holds no hooks; `with InherentCAM(model) as cam:` works for code that is written so.

    Args:
        model: one of ours, or `ValidColors` of one
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, input_tensor: Tensor, targets: Sequence[Callable[[Tensor], Tensor]] | None = None) -> np.ndarray:
        """float32 maps in [0, 1], (N, H, W); all 0 where nothing speaks for the class.

        Args:
            input_tensor: colours in [0, 1], (N, C, H, W)
            targets: N of pytorch-grad-cam's ClassifierOutputTarget; None for the prediction

        Raises:
            TypeError: another kind of target.
            ValueError: what `explain` refuses.
        """
        classes = None if targets is None else [_category(target) for target in targets]
        maps = explain_colors(self.model, input_tensor, classes).contributions.clamp_min(0)
        peak = maps.amax((1, 2), keepdim=True)
        return (maps / peak.where(peak > 0, 1)).float().cpu().numpy()

    def __exit__(self, *exc_info: object) -> None:
        pass


def _category(target: Any) -> int:
    # Other targets of the library have a `category` as well, but are not linear in the logits.
    if type(target).__name__ != "ClassifierOutputTarget":
        raise TypeError(f"target {target!r}: only a logit has an exact explanation, give ClassifierOutputTarget(class)")
    return int(target.category)
