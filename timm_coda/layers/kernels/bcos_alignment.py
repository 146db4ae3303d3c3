"""B-cos operations: y = (w^T p) |cos(w, p)|^(b-1) / s, with cos = w^T p / (|w| |p|) for w of unit norm.

Besides the linear map, only the patch norm is needed: squares are summed over the channels in one pass, then over the
window in a single channel (one per group). For b = 2, no power is computed and backward is written by hand, so that
training saves only w^T p and the small norm.

Source: Böhle et al., CVPR 2022 (arXiv 2205.10268), section 3; TPAMI 2024 (arXiv 2306.10898), section 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .half import uses_float16, widened
from .transforms import is_batched, needs_plain_torch

__all__ = ["NORM_EPS", "align", "channel_squares", "max_out_units", "patch_squares", "unit_norm_conv2d", "weight_norm"]

NORM_EPS = 1e-6
"""Added to |p|^2 under the root, and to |cos| if b is not 2, as in the published convolutions."""


def weight_norm(weight: Tensor) -> Tensor:
    """Return |w| of each unit (first axis), with the other axes of size 1; never 0. float32 for float16."""
    weight = widened(weight)
    if weight.dim() == 2:
        norm = torch.linalg.vector_norm(weight, 2, [1], True)
    else:
        norm = torch.linalg.vector_norm(weight, 2, [1, 2, 3], True)
    return norm.clamp_min(1e-12)


def unit_norm_conv2d(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Convolve with w / |w|."""
    norm = weight_norm(weight)
    if not torch.jit.is_scripting() and not torch.jit.is_tracing() and not torch.compiler.is_compiling():
        positions = (x.shape[2] // stride[0]) * (x.shape[3] // stride[1])
        # Divide the smaller of weights and output, counted for one image, because exports leave the batch size open.
        # In float16, w^T p can overflow before the division.
        if weight.numel() > weight.shape[0] * positions and not uses_float16(x):
            linear = torch.conv2d(x, weight, None, stride, padding, dilation, groups)
            return (linear / norm.view(-1, 1, 1)).to(linear.dtype)
    return torch.conv2d(x, (weight / norm).to(weight.dtype), None, stride, padding, dilation, groups)


def max_out_units(linear: Tensor, max_out: int, dim: int) -> Tensor:
    """Return the largest of each `max_out` adjacent units along `dim`, which must not be negative."""
    if max_out == 1:
        return linear
    return linear.unflatten(dim, (linear.shape[dim] // max_out, max_out)).max(dim + 1)[0]


class _ChannelSquares(torch.autograd.Function):
    """Sum the squares over `dim`, in float32 or better. Saves only the input."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        if x.is_contiguous() and x.device.type == "cpu" and dim == 1:
            return x.to(exact).square().sum(dim, keepdim=True)  # vector_norm over a strided axis is slow here
        return torch.linalg.vector_norm(x, 2, dim, True, dtype=exact).square()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, *grads):
        (x,) = ctx.saved_tensors
        return (x * (2 * grads[0])).to(x.dtype), None


def channel_squares(x: Tensor, dim: int) -> Tensor:
    """Return |x|^2 along `dim`, which stays as an axis of size 1, in float32 or better."""
    if torch.jit.is_scripting() or needs_plain_torch():
        return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(dim, keepdim=True)
    return _ChannelSquares.apply(x, dim)


def patch_squares(
    x: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Return |p|^2 of all patches, (B, C, H, W) to (B, groups, H', W'), in float32 or better."""
    if groups == 1:
        squares = channel_squares(x, 1)
    elif groups == x.shape[1]:
        squares = x.to(torch.promote_types(x.dtype, torch.float32)).square()
    else:
        squares = channel_squares(x.unflatten(1, (groups, x.shape[1] // groups)), 2).squeeze(2)
    inputs = kernel_size[0] * kernel_size[1]
    if inputs == 1 and max(padding) == 0:
        return squares[:, :, :: stride[0], :: stride[1]]
    if max(dilation) == 1 and 2 * padding[0] <= kernel_size[0] and 2 * padding[1] <= kernel_size[1]:
        # Rows, then columns: kh + kw additions per patch instead of kh * kw.
        squares = F.avg_pool2d(squares, (kernel_size[0], 1), (stride[0], 1), (padding[0], 0))
        squares = F.avg_pool2d(squares, (1, kernel_size[1]), (1, stride[1]), (0, padding[1]))
        return squares * inputs
    window = torch.ones([groups, 1, kernel_size[0], kernel_size[1]], dtype=squares.dtype, device=squares.device)
    return F.conv2d(squares, window, None, stride, padding, dilation, groups)


def _times(own: Tensor, factor: Tensor) -> Tensor:
    """Multiply the temporary `own` by `factor`, in place where that is allowed: new memory is slower than a pass."""
    return own * factor if torch.is_grad_enabled() or is_batched(factor) else own.mul_(factor)


class _Align(torch.autograd.Function):
    """Return y = lin |lin| r for r = 1 / (|p| s). Saves lin and the small r."""

    generate_vmap_rule = True

    @staticmethod
    def forward(linear: Tensor, reciprocal: Tensor) -> Tensor:
        exact = widened(linear)
        return exact.abs().mul_(reciprocal).mul_(exact).to(linear.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        linear, reciprocal = ctx.saved_tensors
        exact = widened(linear)
        aligned = _times(exact.abs(), grads[0])
        d_reciprocal = (aligned * exact).sum_to_size(reciprocal.shape)
        return _times(aligned, 2 * reciprocal).to(linear.dtype), d_reciprocal.to(reciprocal.dtype)


def align(
    linear: Tensor,
    squares: Tensor,
    b: float,
    scale: float,
    frozen: bool,
    norm_eps: float = NORM_EPS,
    cos_eps: float = NORM_EPS,
) -> Tensor:
    """Return lin |cos|^(b-1) / s, from lin = w^T p of any shape and |p|^2, which broadcasts against it.

    Args:
        linear: lin = w^T p, after MaxOut; may be overwritten for b = 2 if `frozen`
        squares: |p|^2, in float32 or better
        b: exponent, not 1
        scale: s
        frozen: treat |cos|^(b-1) as a constant in backward
        norm_eps: added to |p|^2
        cos_eps: added to |cos| if b is not 2
    """
    reciprocal = (squares + norm_eps).rsqrt()
    if b == 2.0:
        reciprocal = reciprocal / scale
        if torch.jit.is_scripting() or needs_plain_torch():
            factor = linear.abs() * reciprocal
        elif frozen:
            factor = widened(linear.detach()).abs().mul_(reciprocal)
            # In place: nothing else reads lin, and its convolution saves only the input. With groups lin is a view, and
            # changing views in place is slow.
            return linear * factor if linear.dim() == 5 else linear.mul_(factor)
        else:
            return _Align.apply(linear, reciprocal)
    else:
        factor = ((linear.detach() if frozen else linear) * reciprocal).abs() + cos_eps
        factor = factor ** (b - 1.0) / scale
    if frozen:
        factor = factor.detach()
    return (linear * factor).to(linear.dtype)
