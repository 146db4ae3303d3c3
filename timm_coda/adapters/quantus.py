"""Quantus adapter: exact contributions as an `explain_func`."""

import numpy as np
import torch
from torch import nn

from .colors import explain_colors


def explain_func(
    model: nn.Module,
    inputs: np.ndarray,
    targets: np.ndarray | int,
    *,
    device: str | torch.device | None = None,
    method: str | None = None,
    xai_lib: str | None = None,
) -> np.ndarray:
    """Return signed contributions in logits, (N, 1, H, W), for Quantus' metrics and `quantus.evaluate`.

    Pass `ValidColors(model).eval()` to the metric as its model, so that perturbed images stay valid colours.

    Args:
        model: a timm_coda model, or `ValidColors` around one
        inputs: colours in [0, 1], (N, C, H, W)
        targets: N classes, or one class for all images
        device: passed by Quantus; the model's own device is used either way
        method: the key in `xai_methods`, passed by `quantus.evaluate`; not used
        xai_lib: passed to all of `xai_methods`, for `quantus.explain` among them; not used

    Raises:
        ValueError: `device` is not of the type of the model's device, or an argument that `explain` rejects.
    """
    parameter = next(model.parameters())
    if device is not None and torch.device(device).type != parameter.device.type:
        raise ValueError(f"device={str(device)!r}, but the model is on {parameter.device}: move it there first")
    images = torch.as_tensor(inputs).to(parameter)
    return explain_colors(model, images, torch.as_tensor(targets)).contributions[:, None].cpu().numpy()
