"""Reference implementation: the papers' formulas, literally. Slow, memory-hungry, for any floating dtype.

Tests and `timm-coda benchmark` compare every fast implementation with this one. Each function forms the dynamic weights
explicitly, as the papers do, and leaves differentiation to autograd.

Sources: Böhle, Fritz, Schiele, "Convolutional Dynamic Alignment Networks for Interpretable Classifications",
CVPR 2021 (arXiv 2104.00032), section 3; and for B-cos "B-cos Networks: Alignment is All We Need for Interpretability",
CVPR 2022 (arXiv 2205.10268), section 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["bcos_conv2d", "bcos_weights", "dau_conv2d", "dynamic_weights", "rescale"]


def rescale(v: Tensor, activation: str, *, dim: int) -> Tensor:
    """Return g(v) along `dim`: v * |v| / (1 + |v|^2) for 'squash', v / |v| for 'l2'.

    At v = 0, where v / |v| is undefined, g is 0.
    """
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
    """Return w = g(A B p + b) of all D units at all positions, (B, D, K, H', W'), K = C*kh*kw ordered (c, kh, kw).

    One convolution gives the code z = B p, and a 1x1 convolution the raw weights v = A z + b. The size of this result
    is what makes the published formulation slow. Arguments as in `functional.dau_conv2d`.
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
    """Return y_d = w_d(p)^T p for every patch p, (B, D, H', W'). Arguments as in `functional.dau_conv2d`."""
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
    """Return the dynamic weights of all D units at all patches `p` (B, C*kh*kw, L): (B, D, C*kh*kw, L).

    K = C*kh*kw is ordered (c, kh, kw). Among the `max_out` candidates of a unit, w is the one with the largest w^T p;
    the dynamic weight is |cos(w, p)|^(b-1) w / s. As in the published models, |p| is sqrt(sum p^2 + norm_eps) and, if b
    is not 2, 1e-6 is added to |cos|. Other arguments as in `functional.bcos_conv2d`.
    """
    w = weight.flatten(1)
    if unit_norm:
        w = w / torch.linalg.vector_norm(w, dim=1, keepdim=True)
    candidates, inputs = w.shape
    in_group = p.new_zeros(candidates, groups)  # the group whose channels a candidate sees
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
    """Return y_d = w_d(p)^T p for every patch p, (B, D, H', W'). Arguments as in `functional.bcos_conv2d`."""
    kernel_size = (weight.shape[2], weight.shape[3])
    p = F.unfold(x, kernel_size, dilation, padding, stride)  # (B, K, L)
    options = {"groups": groups, "b": b, "max_out": max_out, "scale": scale, "unit_norm": unit_norm}
    w = bcos_weights(p, weight, **options, norm_eps=norm_eps)
    if frozen:
        w = w.detach()
    rows = (x.shape[2] + 2 * padding[0] - dilation[0] * (kernel_size[0] - 1) - 1) // stride[0] + 1
    return (w * p.unsqueeze(1)).sum(2).unflatten(2, (rows, -1))
