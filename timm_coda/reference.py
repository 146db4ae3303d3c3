"""The papers' formulas, literally: slow, memory-hungry, any floating dtype.

This is the stated truth that tests and `timm-coda benchmark` compare every fast path with. Each function writes the
dynamic weights out, as the publications do, and leaves differentiation to autograd.

Source: Böhle, Fritz, Schiele, "Convolutional Dynamic Alignment Networks for Interpretable Classifications",
CVPR 2021 (arXiv 2104.00032), section 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dau_conv2d", "dynamic_weights", "rescale"]


def rescale(v: Tensor, activation: str, *, dim: int) -> Tensor:
    """g(v) along `dim`: 'squash' is v * |v| / (1 + |v|^2), 'l2' is v / |v|; 0 at v = 0, where both are undefined."""
    squared = (v * v).sum(dim, keepdim=True)
    norm = torch.where(squared > 0, squared, 1).sqrt()
    factor = norm / (1 + squared) if activation == "squash" else 1 / norm
    return v * torch.where(squared > 0, factor, 0)


def dynamic_weights(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    up_bias: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    activation: str = "squash",
) -> Tensor:
    """w = g(A B p + b) of all D units at all positions, (B, D, K, H', W'), K = C*kh*kw ordered (c, kh, kw).

    As many numbers as make the published formulation slow: one convolution gives the code z = B p, a 1x1 convolution
    the raw weights v = A z + b. Arguments as `functional.dau_conv2d`.
    """
    units, rank, inputs = up_bias.shape[0], down.shape[0], up_bias[0].numel()
    z = F.conv2d(x, down, None, stride, padding, dilation)
    a = up.reshape(units, rank, inputs).transpose(1, 2).reshape(units * inputs, rank, 1, 1)
    v = F.conv2d(z, a, up_bias.reshape(-1)).unflatten(1, (units, inputs))
    return rescale(v, activation, dim=2)


def dau_conv2d(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    up_bias: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    activation: str = "squash",
    frozen: bool = False,
) -> Tensor:
    """y_d = w_d(p)^T p for every patch p, (B, D, H', W'). Arguments as `functional.dau_conv2d`."""
    w = dynamic_weights(x, down, up, up_bias, stride=stride, padding=padding, dilation=dilation, activation=activation)
    if frozen:
        w = w.detach()
    kernel_size = (up_bias.shape[2], up_bias.shape[3])
    p = F.unfold(x, kernel_size, dilation, padding, stride).unflatten(2, w.shape[3:])  # (B, K, H', W')
    return (w * p.unsqueeze(1)).sum(2)
