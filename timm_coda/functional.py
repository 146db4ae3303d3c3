"""Dynamic linear operations as plain functions: argument checks and the factorised computation.

The published formulation writes D*K dynamic weights a position to memory. Nothing needs them: with A, b, B as in
`reference.py`, v_d = A_d^T z + b_d and z = B p,

    v_d^T p  = z^T (A_d p) + b_d^T p                        one convolution with D*r channels, contracted with z
    |v_d|^2  = z^T G_d z + 2 c_d^T z + |b_d|^2              G_d = A_d A_d^T, c_d = A_d b_d, once a forward
    y_d      = v_d^T p * g(|v_d|^2)                         g = |v| / (1 + |v|^2) or 1 / |v|
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "dau_conv2d", "dau_linear"]

ACTIVATIONS = ("squash", "l2")


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
    """Convolution of dynamic alignment units, equal to `reference.dau_conv2d` without ever forming a dynamic weight.

    Args:
        x: input, (B, C, H, W)
        down: (r, C, kh, kw), shared by all units
        up: (D*r, C, kh, kw), the r rows of a unit adjacent
        up_bias: (D, C, kh, kw)
        stride, padding, dilation: rows and columns
        activation: 'squash', v*|v| / (1+|v|^2), or 'l2', v / |v|
        frozen: backward treats the dynamic weights as constants: the gradient of `x` is W^T times the output's, and
            the parameters get none. The value is the same.

    Returns:
        (B, D, H', W')

    Raises:
        ValueError: an unknown activation, or an input of another channel count or smaller than the kernel.
    """
    if not torch.jit.is_scripting():
        _check_dau(x, down, up, up_bias, padding, dilation, activation)
    rank, units = down.shape[0], up_bias.shape[0]
    if frozen:
        down, up, up_bias = down.detach(), up.detach(), up_bias.detach()
    z = F.conv2d(x.detach() if frozen else x, down, None, stride, padding, dilation)  # (B, r, H', W')
    u = F.conv2d(x, up, None, stride, padding, dilation).unflatten(1, (units, rank))  # (B, D, r, H', W')
    aligned = (u * z.unsqueeze(1)).sum(2) + F.conv2d(x, up_bias, None, stride, padding, dilation)  # v^T p
    if torch.jit.is_scripting() or x.is_meta:
        factor = _rescaling(z, up, up_bias, activation)
    else:
        with torch.autocast(x.device.type, enabled=False):
            factor = _rescaling(z, up, up_bias, activation)
    return (aligned * factor).to(aligned.dtype)


def dau_linear(
    x: Tensor, down: Tensor, up: Tensor, up_bias: Tensor, activation: str = "squash", frozen: bool = False
) -> Tensor:
    """Dynamic alignment units on the last axis: (..., K) to (..., D); `down` (r, K), `up` (D*r, K), `up_bias` (D, K).

    Other arguments and errors as `dau_conv2d`.
    """
    p = x.reshape(-1, x.shape[-1], 1, 1)
    y = dau_conv2d(
        p,
        down[:, :, None, None],
        up[:, :, None, None],
        up_bias[:, :, None, None],
        activation=activation,
        frozen=frozen,
    )
    return y.reshape(x.shape[:-1] + up_bias.shape[:1])


def _rescaling(z: Tensor, up: Tensor, up_bias: Tensor, activation: str) -> Tensor:
    """g(|v|^2) in float32 or better: (B, r, H', W') to (B, D, H', W')."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    units, rank = up_bias.shape[0], z.shape[1]
    z, a, b = z.to(dtype), up.reshape(units, rank, -1).to(dtype), up_bias.reshape(units, -1, 1).to(dtype)
    gram = a @ a.transpose(1, 2)  # (D, r, r)
    cross = 2 * (a @ b)  # (D, r, 1)
    quadratic = F.conv2d(z, gram.reshape(units * rank, rank, 1, 1), cross.reshape(-1)).unflatten(1, (units, rank))
    squared = (quadratic * z.unsqueeze(1)).sum(2) + b.square().sum(1).unsqueeze(-1)
    # Rounding may leave |v|^2 = 0 slightly negative, and sqrt has no finite gradient at 0.
    squared = squared.clamp(min=1e-20)
    if activation == "l2":
        return squared.rsqrt()
    return squared.sqrt() / (1 + squared)


def _check_dau(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    up_bias: Tensor,
    padding: tuple[int, int],
    dilation: tuple[int, int],
    activation: str,
) -> None:
    if activation not in ("squash", "l2"):
        raise ValueError(f"activation={activation!r}: choose 'squash' or 'l2'")
    if x.dim() != 4 or x.shape[1] != down.shape[1]:
        raise ValueError(f"expected input (B, {down.shape[1]}, H, W), got {list(x.shape)}")
    if up.shape[0] != down.shape[0] * up_bias.shape[0]:
        raise ValueError(f"up has {up.shape[0]} rows, expected units * rank = {up_bias.shape[0]} * {down.shape[0]}")
    for axis in range(2):
        seen = dilation[axis] * (down.shape[2 + axis] - 1) + 1
        if x.shape[2 + axis] + 2 * padding[axis] < seen:
            raise ValueError(f"input {list(x.shape)} is smaller than the {seen} pixels the kernel spans: enlarge it")
