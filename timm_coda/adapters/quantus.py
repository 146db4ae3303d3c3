"""Quantus: the model's own contributions as its `explain_func`."""

import numpy as np
import torch
from torch import nn

from .colors import explain_colors


def explain_func(
    model: nn.Module, inputs: np.ndarray, targets: np.ndarray | int, *, device: str | torch.device | None = None
) -> np.ndarray:
    """Signed contributions in logits, (N, 1, H, W), for `metric(..., explain_func=explain_func)`.

    Give the metric `ValidColors(model).eval()` as model: its perturbations then stay valid colours.

    Args:
        inputs: colours, (N, C, H, W)
        targets: N classes, or one for all
        device: what Quantus passes on; the model's own device is used either way

    Raises:
        ValueError: a device that is not the model's, what `explain` refuses.
    """
    parameter = next(model.parameters())
    if device is not None and torch.device(device).type != parameter.device.type:
        raise ValueError(f"device={str(device)!r}, but the model is on {parameter.device}: move it there first")
    images = torch.as_tensor(inputs).to(parameter)
    return explain_colors(model, images, torch.as_tensor(targets)).contributions[:, None].cpu().numpy()
