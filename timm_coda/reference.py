"""The papers' formulas, literally: slow, memory-hungry, any floating dtype.

This is the stated truth that tests and `timm-coda benchmark` compare every fast path with. Each function writes the
dynamic weights out, as the publications do, and leaves differentiation to autograd.

Source: Böhle, Fritz, Schiele, "Convolutional Dynamic Alignment Networks for Interpretable Classifications",
CVPR 2021 (arXiv 2104.00032), section 3.
"""

import torch
import torch.nn.functional as F

__all__ = ["dau_conv2d", "dynamic_weights", "patches", "rescale"]


def patches(
    x: torch.Tensor,
    kernel_size: tuple[int, int],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> torch.Tensor:
    """What each position of a convolution sees: (B, C, H, W) to (B, K, L), K = C*kh*kw ordered (c, kh, kw)."""
    return F.unfold(x, kernel_size, dilation, padding, stride)


def rescale(v: torch.Tensor, activation: str, *, dim: int) -> torch.Tensor:
    """g(v) along `dim`: 'squash' is v * |v| / (1 + |v|^2), 'l2' is v / |v|; 0 at v = 0."""
    squared = (v * v).sum(dim, keepdim=True)
    # A zero weight vector has no direction: both formulas are 0/0 in their gradient there. The mask keeps it 0.
    norm = torch.where(squared > 0, squared, 1).sqrt()
    if activation == "squash":
        return torch.where(squared > 0, v * norm / (1 + squared), 0)
    return torch.where(squared > 0, v / norm, 0)


def dynamic_weights(
    p: torch.Tensor, down: torch.Tensor, up: torch.Tensor, up_bias: torch.Tensor, *, activation: str
) -> torch.Tensor:
    """Dynamic weights of all units at all positions, w = g(A B p + b).

    Args:
        p: patches, (B, K, L)
        down: B, (r, K)
        up: A, (D, r, K)
        up_bias: b, (D, K)
        activation: 'squash' or 'l2'

    Returns:
        (B, D, K, L): as many numbers as make the published formulation slow.
    """
    z = torch.einsum("rk,bkl->brl", down, p)
    v = torch.einsum("drk,brl->bdkl", up, z) + up_bias[..., None]
    return rescale(v, activation, dim=2)


def dau_conv2d(
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    activation: str = "squash",
    frozen: bool = False,
) -> torch.Tensor:
    """Convolution of dynamic alignment units, y_d = w_d(p)^T p. Arguments as `functional.dau_conv2d`."""
    units, kernel_size = up_bias.shape[0], (up_bias.shape[2], up_bias.shape[3])
    p = patches(x, kernel_size, stride=stride, padding=padding, dilation=dilation)
    w = dynamic_weights(
        p, down.flatten(1), up.reshape(units, down.shape[0], -1), up_bias.flatten(1), activation=activation
    )
    if frozen:
        w = w.detach()
    y = torch.einsum("bdkl,bkl->bdl", w, p)
    size = [
        (n + 2 * pad - d * (k - 1) - 1) // s + 1
        for n, k, s, pad, d in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    ]
    return y.unflatten(2, size)
