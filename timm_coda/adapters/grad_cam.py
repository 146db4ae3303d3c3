"""pytorch-grad-cam adapter: exact contributions with the interface of its CAM classes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..explanation import Explanation
from .colors import explain_colors


class InherentCAM(AbstractContextManager):
    """Exact maps, created and called like `GradCAM`, also as `base_method` of the library's `SESS` and `RefineCAM`.

    Like the library's own maps, these show only evidence for the class, each map scaled to [0, 1]. For signed maps in
    logits, call `model.explain`. No hooks are registered; `with InherentCAM(model) as cam:` works, but is not needed.

    Args:
        model: a timm_coda model, or `ValidColors` around one; set to eval mode, as by the library
        target_layers: by default the pixels, at full resolution. With layers, the class is explained by their outputs:
            maps at their resolution are enlarged to that of the image, and the mean of several is scaled to [0, 1].
        reshape_transform: not needed, because the maps of layers with tokens are two-dimensional already

    Attributes:
        outputs: logits of the last call's images, (N, classes)

    Raises:
        ValueError: a target layer is not part of the model.
    """

    # The library's SESS releases the hooks of its base method.
    activations_and_grads = SimpleNamespace(release=lambda: None)

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module] | None = None,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.outputs: Tensor | None = None
        self._layers = [None] if target_layers is None else [_name(model, layer) for layer in target_layers]
        if not self._layers:
            raise ValueError("target_layers is empty: leave it out to explain by the pixels")

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Callable[[Tensor], Tensor]] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> np.ndarray:
        """Return float32 maps in [0, 1], (N, H, W); a map without evidence for the class is all 0.

        Args:
            input_tensor: colours in [0, 1], (N, C, H, W)
            targets: N of pytorch-grad-cam's `ClassifierOutputTarget`, or None for the prediction
            aug_smooth: return the mean of the maps of six versions of each image: as it is and flipped, each at 0.9, 1
                and 1.1 times its brightness (at most white). Each is exact, but their mean is not that of the image.
            eigen_smooth: must be False

        Raises:
            TypeError: a target is of another class.
            ValueError: `eigen_smooth`, or an argument that `explain` rejects.
        """
        if eigen_smooth:
            raise ValueError(
                "eigen_smooth=True: a principal component of the contributions is not the evidence for a class, and "
                "even its sign is arbitrary: leave it out, or use aug_smooth=True"
            )
        classes = None if targets is None else [_category(target) for target in targets]
        maps, explanation = self._maps(input_tensor, classes)
        self.outputs = explanation.logits
        if aug_smooth:
            colors, maps = explanation.images, torch.zeros_like(maps)
            for factor in (0.9, 1, 1.1):
                version = (factor * colors).clamp_max(1)
                maps += self._maps(version, explanation.target)[0] / 6
                maps += self._maps(version.flip(-1), explanation.target)[0].flip(-1) / 6
        return maps.float().cpu().numpy()

    def _maps(self, images: Tensor, classes: list[int] | Tensor | None) -> tuple[Tensor, Explanation]:
        """Return maps in [0, 1], (N, H, W), and an explanation of the same images and classes."""
        explanations = [explain_colors(self.model, images, classes, layer=layer) for layer in self._layers]
        size, maps = images.shape[-2:], []
        for explanation in explanations:
            found = explanation.contributions.clamp_min(0)
            if found.shape[1:] != size:
                found = nn.functional.interpolate(found[:, None], size, mode="bilinear")[:, 0]
            maps.append(_scaled(found))
        return _scaled(torch.stack(maps).mean(0)), explanations[0]

    def __exit__(self, *exc_info: object) -> None:
        pass


def _scaled(maps: Tensor) -> Tensor:
    """Divide each map (N, H, W) by its maximum, unless that is 0."""
    peak = maps.amax((1, 2), keepdim=True)
    return maps / peak.where(peak > 0, 1)


def _name(model: nn.Module, layer: nn.Module) -> str:
    """Return the name of a layer in the model that explains itself, which may be inside wrappers."""
    inner = next((module for module in model.modules() if hasattr(module, "explain")), model)
    for name, module in inner.named_modules():
        if module is layer:
            return name
    raise ValueError(f"the target layer {type(layer).__name__} is not part of this {type(inner).__name__}")


def _category(target: Any) -> int:
    # Other target classes of the library also have a `category`, but are not linear in the logits.
    if type(target).__name__ != "ClassifierOutputTarget":
        raise TypeError(f"target {target!r}: only logits have exact explanations: use ClassifierOutputTarget(class)")
    return int(target.category)
