"""The papers' formulas, literally: slow, memory-hungry, any floating dtype.

This is the stated truth that tests and `timm-coda benchmark` compare every fast path with. Each function writes the
dynamic weights out, as the publications do, and leaves differentiation to autograd.

Source: Böhle, Fritz, Schiele, "Convolutional Dynamic Alignment Networks for Interpretable Classifications",
CVPR 2021 (arXiv 2104.00032), section 3; and for B-cos "B-cos Networks: Alignment is All We Need for Interpretability",
CVPR 2022 (arXiv 2205.10268), section 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["bcos_conv2d", "bcos_weights", "dau_conv2d", "dynamic_weights", "rescale"]


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


def bcos_weights(
    p: Tensor,
    weight: Tensor,
    *,
    groups: int,
    b: float,
    max_out: int,
    scale: float,
    unit_norm: bool,
    norm_eps: float = 1e-6,
) -> Tensor:
    """The dynamic weights of all D units at all patches `p` (B, C*kh*kw, L), channels first: (B, D, C*kh*kw, L).

    w is the candidate with the largest w^T p of a unit's `max_out`; its dynamic weight is |cos|^(B-1) w / s. The
    published models take |p| = sqrt(sum p^2 + norm_eps) and, where B is not 2, |cos| + 1e-6.
    """
    w = weight.flatten(1)
    if unit_norm:
        w = w / torch.linalg.vector_norm(w, dim=1, keepdim=True)
    candidates, inputs = w.shape
    in_group = p.new_zeros(candidates, groups)  # which group's channels a candidate sees
    in_group[torch.arange(candidates), torch.arange(candidates) * groups // candidates] = 1
    w = (in_group.unsqueeze(2) * w.unsqueeze(1)).reshape(candidates, groups * inputs)
    linear = torch.einsum("dk,bkl->bdl", w, p)
    norm = (in_group @ p.unflatten(1, (groups, inputs)).square().sum(2) + norm_eps).sqrt()  # (B, D * max_out, L)
    best = linear.unflatten(1, (-1, max_out)).argmax(2)
    best = best + max_out * torch.arange(best.shape[1], device=p.device)[:, None]  # (B, D, L)
    cosine = (linear / norm).gather(1, best).abs() + (0 if b == 2 else 1e-6)
    factor = cosine ** (b - 1) / scale if b != 1 else torch.full_like(cosine, 1 / scale)
    return factor.unsqueeze(2) * w[best].permute(0, 1, 3, 2)


def bcos_conv2d(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    b: float = 2.0,
    max_out: int = 1,
    scale: float = 1.0,
    unit_norm: bool = True,
    frozen: bool = False,
    norm_eps: float = 1e-6,
) -> Tensor:
    """y_d = w_d(p)^T p for every patch p, (B, D, H', W'). Arguments as `functional.bcos_conv2d`."""
    kernel_size = (weight.shape[2], weight.shape[3])
    p = F.unfold(x, kernel_size, dilation, padding, stride)  # (B, K, L)
    options = {"groups": groups, "b": b, "max_out": max_out, "scale": scale, "unit_norm": unit_norm}
    w = bcos_weights(p, weight, **options, norm_eps=norm_eps)
    if frozen:
        w = w.detach()
    rows = (x.shape[2] + 2 * padding[0] - dilation[0] * (kernel_size[0] - 1) - 1) // stride[0] + 1
    return (w * p.unsqueeze(1)).sum(2).unflatten(2, (rows, -1))
