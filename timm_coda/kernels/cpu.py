"""CPU backend: the factorised DAU convolution as matrix products over blocks of positions that stay in cache.

Positions are rows: P (n, K) holds the patches of a block, once for `down`, `up` and the bias. With A (D, r, K), b, B,
G and c as in `functional.py` and h(s) the rescaling of s = |v|^2:

    forward    z = P B^T,  U = P A^T (n, D, r),  num = U z + P b^T,  s = z G z + 2 c z + |b|^2,  y = num h(s)
    data       dP = (g h (x) z) A + (g h) b                                   all that an explanation needs
    backward   alpha = g h, beta = g num h'(s):
               dP = (alpha (x) z) A + [dz, alpha] [B; b],   dz = alpha U + 2 beta (G z + c)
               dA = (alpha (x) z)^T P + 2 (E A + e b^T),  E = sum beta z z^T,  e = sum beta z,  likewise db, dB

U and the outer products exist only for a block; nothing but z, num and s is kept for backward, which forms U again:
a product costs less than writing it to memory and reading it back.
"""

import torch
from torch import Tensor

from .convolution import rescaling, rescaling_slope
from .operator import make_operator
from .patches import as_rows, geometry, memory_format

__all__ = ["dau_conv2d"]

# Numbers in the largest temporary of a block: 8 MB in float32, within a last-level cache, long enough for the products.
_BLOCK = 2**21
# oneDNN's float32 product is up to twice as fast as the one behind torch.mm (measured on AMD), never slower.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _forward(x, down, up, up_bias, stride, padding, dilation, activation):
    units, rank = up_bias.shape[0], down.shape[0]
    g = geometry(x, up, stride, padding, dilation)
    exact = torch.promote_types(x.dtype, torch.float32)
    a, b = g.flat(up), g.flat(up_bias)
    small = torch.cat([g.flat(down), b])  # (r + D, K)
    gram, cross, square = gram_of(a.view(units, rank, -1), b, exact)
    gram, cross = gram.view(units * rank, rank), 2 * cross.view(-1)

    z, num, s = (x.new_empty(g.positions, n, dtype=exact) for n in (rank, units, units))
    windows = g.windows(g.padded(x))
    for index, now in g.blocks(_positions(units * rank)):
        p = windows[index].reshape(now.stop - now.start, -1)
        low, plain = _product(p, small).split([rank, units], 1)
        z[now] = low
        u = _product(p, a).view(-1, units, rank).mul_(low.unsqueeze(1))
        torch.add(u.sum(2, dtype=exact), plain, out=num[now])
        quadratic = _product(z[now], gram).add_(cross).view(-1, units, rank).mul_(z[now].unsqueeze(1))
        torch.add(quadratic.sum(2), square, out=s[now])
    y = (num * rescaling(s, activation)).to(x.dtype)
    y = y.view(x.shape[0], g.rows, g.columns, units).permute(0, 3, 1, 2)
    return y.contiguous(memory_format=memory_format(x)), z, num, s


def _data_gradient(grad, x, up, up_bias, z, s, stride, padding, dilation, activation):
    g = geometry(x, up, stride, padding, dilation)
    a, b = g.flat(up), g.flat(up_bias)
    alpha = (as_rows(grad) * rescaling(s, activation)).to(x.dtype)
    z = z.to(x.dtype)
    dx = g.padded_zeros(x)
    target = g.windows(dx)
    for index, now in g.blocks(_positions(a.shape[0])):
        outer = (alpha[now].unsqueeze(2) * z[now].unsqueeze(1)).view(-1, a.shape[0])
        g.fold(target[index], _product(outer, a.t()).addmm_(alpha[now], b))
    return g.cropped(dx, x)


def _backward(grad, x, down, up, up_bias, z, num, s, stride, padding, dilation, activation):
    units, rank = up_bias.shape[0], down.shape[0]
    exact, low = num.dtype, x.dtype
    g = geometry(x, up, stride, padding, dilation)
    a, b = g.flat(up), g.flat(up_bias)
    small = torch.cat([g.flat(down), b])
    gram, cross, _ = gram_of(a.view(units, rank, -1), b, exact)

    grad = as_rows(grad).to(exact)
    alpha = grad * rescaling(s, activation)
    beta = grad * num * rescaling_slope(s, activation)

    da = torch.zeros(a.shape, dtype=exact)
    dsmall = torch.zeros(small.shape, dtype=exact)
    second = torch.zeros(units * rank, rank, dtype=exact)  # E
    dx = g.padded_zeros(x)
    windows, target = g.windows(g.padded(x)), g.windows(dx)
    for index, now in g.blocks(_positions(units * rank)):
        p = windows[index].reshape(now.stop - now.start, -1)
        zn, bn = z[now], beta[now]
        zl, al = zn.to(low), alpha[now].to(low)
        outer = (al.unsqueeze(2) * zl.unsqueeze(1)).view(-1, units * rank)
        dp = _product(outer, a.t())
        _accumulate(da, outer, p)
        outer = (bn.unsqueeze(2) * zn.unsqueeze(1)).view(-1, units * rank)
        _accumulate(second, outer, zn)
        dz = _product(bn, gram.view(units, -1).t()).view(-1, rank, rank).mul_(zn.unsqueeze(1)).sum(2)
        dz.addmm_(bn, cross).mul_(2)
        u = _product(p, a).view(-1, units, rank)
        dz += torch.bmm(al.unsqueeze(1), u).squeeze(1)
        both = torch.cat([dz.to(low), al], 1)
        g.fold(target[index], dp.addmm_(both, small))
        _accumulate(dsmall, both, p)

    da, ddown, db = add_norm_gradient(a.view(units, rank, -1), b, da, dsmall, second, beta.t() @ z, beta.sum(0))
    return g.cropped(dx, x), *(g.unflat(t, x.shape[1]).to(low) for t in (ddown, da, db))


def gram_of(a: Tensor, b: Tensor, exact: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of a (D, r, K) and b (D, K): G (D, r, r), c (D, r) and |b|^2 (D)."""
    a, b = a.to(exact), b.to(exact)
    return a @ a.transpose(1, 2), (a @ b.unsqueeze(2)).squeeze(2), b.square().sum(1)


def add_norm_gradient(
    a: Tensor, b: Tensor, da: Tensor, dsmall: Tensor, second: Tensor, first: Tensor, zeroth: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of A (D*r, K), B and b, with what comes through s = |A^T z + b|^2 added.

    Args:
        a, b: (D, r, K) and (D, K)
        da, dsmall: what comes through v^T p, (D*r, K), and stacked of B and b (r + D, K)
        second, first, zeroth: sums over positions of beta z z^T (D*r, r), beta z (D, r), beta (D)
    """
    units, rank, _ = a.shape
    a, b = a.to(da.dtype), b.to(da.dtype)
    da = torch.baddbmm(da.view(a.shape), second.view(units, rank, rank), a, alpha=2)
    da.addcmul_(first.unsqueeze(2), b.unsqueeze(1), value=2)
    ddown, db = dsmall.split([rank, units])
    through_norm = torch.bmm(first.unsqueeze(1), a).squeeze(1) + zeroth.unsqueeze(1) * b
    return da.view(units * rank, -1), ddown, db + 2 * through_norm


def _positions(width: int) -> int:
    return max(_BLOCK // width, 64)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left right^T."""
    if _ONEDNN and left.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return left @ right.t()


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, summed over blocks in the precision of `total`."""
    if left.dtype == torch.float64:
        total.addmm_(left.t(), right)
    else:
        total += _product(left.t(), right.t())


dau_conv2d = make_operator("dau_conv2d_cpu", _forward, _data_gradient, _backward)
