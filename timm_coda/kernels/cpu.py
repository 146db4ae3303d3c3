"""CPU backend: the factorised DAU convolution as matrix products over blocks of positions that stay in cache.

Positions are rows: P (n, K) holds the patches of a block, once for `down`, `up` and the bias. With A (D, r, K), b, B
and G, c as in `functional.py`, h(s) the rescaling of |v|^2 = s:

    forward    z = P B^T,  U = P A^T (n, D, r),  num = U z + P b^T,  s = z G z + 2 c z + |b|^2,  y = num h(s)
    data       dP = (g h (x) z) A + (g h) b                                   all that an explanation needs
    backward   alpha = g h, beta = g num h'(s), M = alpha A (n, r, K):
               dP = z M + [dz, alpha] [B; b],   dz = M P + 2 beta (G z + c)
               dA = (alpha (x) z)^T P + 2 (E A + e b^T),  E = sum beta z z^T,  e = sum beta z,  likewise db, dB

M gives both its products without forming U again, so a training step is three large products a layer. U, M and the
outer products exist only for a block; nothing but z, num and s is kept for backward.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import convolution
from .convolution import rescaling

__all__ = ["dau_conv2d"]

# Numbers in the largest temporary of a block: 8 MB in float32, within a last-level cache, long enough for the products.
_BLOCK = 2**21


class _Geometry(NamedTuple):
    """Where patches lie: sizes, and the order of a patch's numbers, (c, kh, kw) or `channels_last` (kh, kw, c)."""

    batch: int
    rows: int
    columns: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    channels_last: bool

    def windows(self, padded: Tensor) -> Tensor:
        """All patches as a view of the padded image (B, H, W, C): (B, H', W', K...)."""
        image, row, column, channel = padded.stride()
        view = padded.as_strided(
            (self.batch, self.rows, self.columns, *self.kernel, padded.shape[3]),
            (
                image,
                row * self.stride[0],
                column * self.stride[1],
                row * self.dilation[0],
                column * self.dilation[1],
                channel,
            ),
        )
        return view if self.channels_last else view.permute(0, 1, 2, 5, 3, 4)

    def blocks(self, width: int) -> Iterator[tuple[tuple[slice, slice], slice]]:
        """Blocks of about _BLOCK / width positions: (images, rows) and the positions' range in the flat order."""
        positions = max(_BLOCK // width, 64)
        area = self.rows * self.columns
        if area <= positions:
            step = positions // area
            for i in range(0, self.batch, step):
                end = min(i + step, self.batch)
                yield (slice(i, end), slice(None)), slice(i * area, end * area)
        else:
            step = max(positions // self.columns, 1)
            for i in range(self.batch):
                for row in range(0, self.rows, step):
                    end = min(row + step, self.rows)
                    start = i * area
                    yield (slice(i, i + 1), slice(row, end)), slice(
                        start + row * self.columns, start + end * self.columns
                    )

    def flat(self, weight: Tensor) -> Tensor:
        """(N, C, kh, kw) as (N, K), a copy only where the order of a patch's numbers is another one."""
        return (weight.permute(0, 2, 3, 1) if self.channels_last else weight).reshape(weight.shape[0], -1)

    def unflat(self, weight: Tensor, channels: int) -> Tensor:
        """The inverse of `flat`."""
        if self.channels_last:
            return weight.reshape(-1, *self.kernel, channels).permute(0, 3, 1, 2)
        return weight.reshape(-1, channels, *self.kernel)

    def fold(self, target: Tensor, index: tuple[slice, slice], patches: Tensor) -> None:
        """Add a block's patches (n, K) to the padded image behind `target`, a `windows` view."""
        block = target[index]
        patches = patches.view(block.shape)
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                at = (..., i, j, slice(None)) if self.channels_last else (..., i, j)
                block[at] += patches[at]


def _geometry(
    x: Tensor, up: Tensor, stride: list[int], padding: list[int], dilation: list[int], rows: int, columns: int
) -> _Geometry:
    # Patches are copied ten times as fast channels last. Weights that are stored otherwise are worth a copy where
    # there are more positions than rows of `up`.
    channels_last = up.is_contiguous(memory_format=torch.channels_last) or x.shape[0] * rows * columns > up.shape[0]
    pairs = [(int(a), int(b)) for a, b in (up.shape[2:], stride, padding, dilation)]
    return _Geometry(x.shape[0], rows, columns, *pairs, channels_last)


def _output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _sizes(x: Tensor, up: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> tuple[int, int]:
    return (
        _output_size(x.shape[2], up.shape[2], stride[0], padding[0], dilation[0]),
        _output_size(x.shape[3], up.shape[3], stride[1], padding[1], dilation[1]),
    )


def _padded(x: Tensor, padding: tuple[int, int]) -> Tensor:
    """(B, C, H, W) to contiguous (B, H + 2ph, W + 2pw, C)."""
    x = x.permute(0, 2, 3, 1)
    if padding != (0, 0):
        x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    return x.contiguous()


def _format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _gram(a: Tensor, b: Tensor, exact: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of a (D, r, K) and b (D, K): G (D, r, r), c (D, r) and |b|^2 (D)."""
    a, b = a.to(exact), b.to(exact)
    return a @ a.transpose(1, 2), (a @ b.unsqueeze(2)).squeeze(2), b.square().sum(1)


def _rescaling_slope(squared: Tensor, activation: str) -> Tensor:
    """dh/ds, 0 where `rescaling` clamps."""
    s = squared.clamp(min=1e-20)
    slope = -0.5 * s.rsqrt() / s if activation == "l2" else (1 - s) * (0.5 * s.rsqrt()) / (1 + s).square()
    return torch.where(squared > 1e-20, slope, 0)


@torch.library.custom_op("timm_coda::dau_conv2d_cpu", mutates_args=(), device_types="cpu")
@torch.autocast("cpu", enabled=False)
def _forward(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    up_bias: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (B, D, H', W'), and for backward z (N, r), num (N, D), s (N, D) of all N positions."""
    units, rank = up_bias.shape[0], down.shape[0]
    g = _geometry(x, up, stride, padding, dilation, *_sizes(x, up, stride, padding, dilation))
    exact = torch.promote_types(x.dtype, torch.float32)
    a, b = g.flat(up), g.flat(up_bias)
    small = torch.cat([g.flat(down), b])  # (r + D, K)
    gram, cross, square = _gram(a.view(units, rank, -1), b, exact)
    gram, cross = gram.view(units * rank, rank), 2 * cross.view(-1)

    positions = x.shape[0] * g.rows * g.columns
    z, num, s = (x.new_empty(positions, n, dtype=exact) for n in (rank, units, units))
    windows = g.windows(_padded(x, g.padding))
    for index, now in g.blocks(units * rank):
        p = windows[index].reshape(now.stop - now.start, -1)
        low, plain = (p @ small.t()).split([rank, units], 1)
        z[now] = low
        u = (p @ a.t()).view(-1, units, rank).mul_(low.unsqueeze(1))
        torch.add(u.sum(2, dtype=exact), plain, out=num[now])
        quadratic = torch.addmm(cross, z[now], gram.t()).view(-1, units, rank).mul_(z[now].unsqueeze(1))
        torch.add(quadratic.sum(2), square, out=s[now])
    y = (num * rescaling(s, activation)).to(x.dtype)
    y = y.view(x.shape[0], g.rows, g.columns, units).permute(0, 3, 1, 2)
    return y.contiguous(memory_format=_format(x)), z, num, s


@_forward.register_fake
def _(x, down, up, up_bias, stride, padding, dilation, activation, frozen):
    rows, columns = _sizes(x, up, stride, padding, dilation)
    units, positions = up_bias.shape[0], x.shape[0] * rows * columns
    exact = torch.promote_types(x.dtype, torch.float32)
    y = x.new_empty(x.shape[0], units, rows, columns).contiguous(memory_format=_format(x))
    return y, *(x.new_empty(positions, n, dtype=exact) for n in (down.shape[0], units, units))


def _rows(g: Tensor) -> Tensor:
    """(B, D, H', W') to (N, D)."""
    return g.permute(0, 2, 3, 1).reshape(-1, g.shape[1]).contiguous()


@torch.library.custom_op("timm_coda::dau_conv2d_cpu_data", mutates_args=(), device_types="cpu")
@torch.autocast("cpu", enabled=False)
def _data_gradient(
    grad: Tensor,
    x: Tensor,
    up: Tensor,
    up_bias: Tensor,
    z: Tensor,
    s: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
) -> Tensor:
    """W^T grad, the dynamic weights constant: one large product. Of `x` only the shape and format matter."""
    units = up_bias.shape[0]
    g = _geometry(x, up, stride, padding, dilation, grad.shape[2], grad.shape[3])
    a, b = g.flat(up), g.flat(up_bias)
    alpha = (_rows(grad) * rescaling(s, activation)).to(up.dtype)
    z = z.to(up.dtype)
    dx = x.new_zeros(
        x.shape[0], x.shape[2] + 2 * g.padding[0], x.shape[3] + 2 * g.padding[1], x.shape[1], dtype=up.dtype
    )
    target = g.windows(dx)
    for index, now in g.blocks(a.shape[0]):
        outer = (alpha[now].unsqueeze(2) * z[now].unsqueeze(1)).view(-1, units * z.shape[1])
        g.fold(target, index, torch.addmm(alpha[now] @ b, outer, a))
    return _cropped(dx, x, g)


def _cropped(dx: Tensor, x: Tensor, g: _Geometry) -> Tensor:
    top, left = g.padding
    dx = dx[:, top : top + x.shape[2], left : left + x.shape[3]].permute(0, 3, 1, 2)
    return dx.clone(memory_format=_format(x))


@_data_gradient.register_fake
def _(grad, x, up, up_bias, z, s, stride, padding, dilation, activation):
    return x.new_empty(x.shape, dtype=up.dtype).contiguous(memory_format=_format(x))


@_data_gradient.register_vmap
def _(info, in_dims, grad, x, up, up_bias, z, s, stride, padding, dilation, activation):
    """Several targets of one forward pass: only `grad` has the extra axis."""
    if any(dim is not None for dim in in_dims[1:6]):
        raise NotImplementedError("vmap over a DAU's input or weights: use the backend 'torch'")
    grads = grad.movedim(in_dims[0], 0).unbind()
    results = [_data_gradient(t, x, up, up_bias, z, s, stride, padding, dilation, activation) for t in grads]
    return torch.stack(results), 0


@torch.library.custom_op("timm_coda::dau_conv2d_cpu_backward", mutates_args=(), device_types="cpu")
@torch.autocast("cpu", enabled=False)
def _backward(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    up_bias: Tensor,
    z: Tensor,
    num: Tensor,
    s: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, down, up and up_bias."""
    units, rank = up_bias.shape[0], down.shape[0]
    exact, low = num.dtype, x.dtype
    g = _geometry(x, up, stride, padding, dilation, grad.shape[2], grad.shape[3])
    a, b = g.flat(up), g.flat(up_bias)
    small = torch.cat([g.flat(down), b])
    gram, cross, _ = _gram(a.view(units, rank, -1), b, exact)
    inputs = a.shape[1]

    grad = _rows(grad).to(exact)
    alpha = grad * rescaling(s, activation)
    beta = grad.mul(num).mul_(_rescaling_slope(s, activation))

    da = torch.zeros(a.shape, dtype=exact)
    dsmall = torch.zeros(small.shape, dtype=exact)
    second = torch.zeros(units * rank, rank, dtype=exact)  # E
    dx = x.new_zeros(x.shape[0], x.shape[2] + 2 * g.padding[0], x.shape[3] + 2 * g.padding[1], x.shape[1])
    windows, target = g.windows(_padded(x, g.padding)), g.windows(dx)
    step = max(_BLOCK // (2 * rank * inputs), 16)  # positions of a block of M
    for index, now in g.blocks(units * rank):
        p = windows[index].reshape(now.stop - now.start, -1)
        zn, an, bn = z[now], alpha[now], beta[now]
        zl, al = zn.to(low), an.to(low)
        outer = al.unsqueeze(2) * zl.unsqueeze(1)
        _accumulate(da, outer.view(-1, units * rank), p)
        outer = bn.unsqueeze(2) * zn.unsqueeze(1)
        second.addmm_(outer.view(-1, units * rank).t(), zn)
        dz = (bn @ gram.view(units, -1)).view(-1, rank, rank).mul_(zn.unsqueeze(1)).sum(2)
        dz.addmm_(bn, cross).mul_(2)
        dp = torch.empty_like(p)
        for start in range(0, len(p), step):
            part = slice(start, start + step)
            m = (al[part] @ a.view(units, -1)).view(-1, rank, inputs)
            dp[part] = torch.bmm(zl[part].unsqueeze(1), m).squeeze(1)
            dz[part] += m.mul_(p[part].unsqueeze(1)).sum(2, dtype=exact)
        both = torch.cat([dz.to(low), al], 1)
        g.fold(target, index, dp.addmm_(both, small))
        _accumulate(dsmall, both, p)

    # s = |A^T z + b|^2 through E, e and the sum of beta.
    first = beta.t() @ z  # e, (D, r)
    exact_a, exact_b = a.view(units, rank, -1).to(exact), b.to(exact)
    da = da.view(units, rank, -1)
    da.baddbmm_(second.view(units, rank, rank), exact_a, alpha=2)
    da.addcmul_(first.unsqueeze(2), exact_b.unsqueeze(1), value=2)
    ddown, db = dsmall.split([rank, units])
    db = db + 2 * (torch.bmm(first.unsqueeze(1), exact_a).squeeze(1) + beta.sum(0).unsqueeze(1) * exact_b)
    gradients = (g.unflat(t, x.shape[1]).to(low) for t in (ddown, da.view(a.shape), db))
    return _cropped(dx, x, g), *(t.contiguous() for t in gradients)


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, accumulated over blocks in the precision of `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left.t(), right)
    else:
        total += left.t() @ right


@_backward.register_fake
def _(grad, x, down, up, up_bias, z, num, s, stride, padding, dilation, activation):
    return x.new_empty(x.shape).contiguous(memory_format=_format(x)), *(
        x.new_empty(t.shape) for t in (down, up, up_bias)
    )


def _setup_context(ctx, inputs, output) -> None:
    x, down, up, up_bias, *ctx.options, ctx.frozen = inputs
    _, z, num, s = output
    ctx.mark_non_differentiable(z, num, s)
    ctx.save_for_backward(x, down, up, up_bias, z, num, s)


def _differentiate(ctx, grad, *_):
    x, down, up, up_bias, z, num, s = ctx.saved_tensors
    nothing = (None,) * 5
    if torch.is_grad_enabled():  # create_graph=True: the gradient is to be differentiated again
        inputs = [x, down, up, up_bias]
        wanted = [i for i in range(4) if ctx.needs_input_grad[i]]
        y = convolution.dau_conv2d(*inputs, *ctx.options, ctx.frozen)
        found = torch.autograd.grad(y, [inputs[i] for i in wanted], grad, create_graph=True)
        gradients = dict(zip(wanted, found, strict=True))
        return *(gradients.get(i) for i in range(4)), *nothing
    if ctx.frozen:
        return _data_gradient(grad, x, up, up_bias, z, s, *ctx.options), None, None, None, *nothing
    return *_backward(grad, x, down, up, up_bias, z, num, s, *ctx.options), *nothing


_forward.register_autograd(_differentiate, setup_context=_setup_context)


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
    """As `functional.dau_conv2d`."""
    return _forward(x, down, up, up_bias, [*stride], [*padding], [*dilation], activation, frozen)[0]
