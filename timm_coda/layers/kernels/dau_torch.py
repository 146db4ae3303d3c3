"""Backend 'torch': the factorised DAU convolution as convolutions and a contraction.

It runs on every device and supports tracing, scripting, export and derivatives of any order. The fast backends differ
from it only in speed and memory. For the formulas see `functional.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .half import widened

__all__ = ["dau_conv2d", "relative_slope", "rescaling", "squared_norm"]


def rescaling(squared: Tensor, activation: str) -> Tensor:
    """Return h(|v|^2): |v| / (1 + |v|^2) for 'squash', 1 / |v| for 'l2'."""
    # Rounding can turn |v|^2 = 0 slightly negative, and the square root has no finite gradient at 0.
    squared = squared.clamp(min=1e-20)
    if activation == "l2":
        return squared.rsqrt()
    return squared.sqrt() / (1 + squared)


def relative_slope(squared: Tensor, activation: str) -> Tensor:
    """Return 2 h'(|v|^2) / h(|v|^2), 0 where `rescaling` clamps."""
    s = squared.clamp(min=1e-20)
    slope = s.reciprocal()
    if activation == "l2":
        slope.neg_()
    else:
        slope.sub_((1 + s).reciprocal_(), alpha=2)
    return slope.masked_fill_(squared <= 1e-20, 0)


def dau_conv2d(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    up_bias: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    activation: str,
    frozen: bool,
) -> Tensor:
    """Compute `functional.dau_conv2d`."""
    rank, units = down.shape[0], up_bias.shape[0]
    if frozen:
        down, up, up_bias = down.detach(), up.detach(), up_bias.detach()
    # z^T (A p) and its product with z leave the range of float16.
    z = widened(F.conv2d(x.detach() if frozen else x, down, None, stride, padding, dilation))  # (B, r, H', W')
    u = F.conv2d(x, up, None, stride, padding, dilation).unflatten(1, (units, rank))  # (B, D, r, H', W')
    aligned = (u * z.unsqueeze(1)).sum(2) + F.conv2d(x, up_bias, None, stride, padding, dilation)  # v^T p
    if torch.jit.is_scripting() or x.is_meta:
        factor = rescaling(squared_norm(z, up, up_bias), activation)
    else:
        with torch.autocast(x.device.type, enabled=False):
            factor = rescaling(squared_norm(z, up, up_bias), activation)
    return (aligned * factor).to(u.dtype)


def squared_norm(z: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
    """Return |v|^2, (B, D, H', W'), in float32 or better."""
    exact = torch.promote_types(z.dtype, torch.float32)
    units, rank = up_bias.shape[0], up.shape[0] // up_bias.shape[0]  # not from z, for the ONNX exporter
    z, a, b = z.to(exact), up.reshape(units, rank, -1).to(exact), up_bias.reshape(units, -1, 1).to(exact)
    gram = (a @ a.transpose(1, 2)).flatten(0, 1)[:, :, None, None]
    cross = 2 * (a @ b).reshape(-1)
    quadratic = F.conv2d(z, gram, cross).unflatten(1, (units, rank))
    return (quadratic * z.unsqueeze(1)).sum(2) + b.square().sum(1).unsqueeze(-1)
