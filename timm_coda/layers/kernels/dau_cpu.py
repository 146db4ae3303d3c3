"""CPU backend: the factorised DAU convolution as matrix products over blocks of positions that fit in cache.

Positions are rows: P (n, K) holds the patches of a block and serves `down`, `up` and the bias. With A (D, r, K), b, B,
G and c as in `functional.py`, h(s) the rescaling for s = |v|^2, and (x) the outer product at each position:

    forward    z = P B^T,  U = P A^T (n, D, r),  num = U z + P b^T,  s = z G z + 2 c z + |b|^2,  y = num h(s)
    data       dP = (g h (x) z) A + (g h) b                                   enough for explanations
    backward   alpha = g h, beta = 2 g num h'(s):
               dP = (alpha (x) z) A + [dz, alpha] [B; b],   dz = alpha U + beta (G z + c)
               dA = (alpha (x) z)^T P + E A + e b^T,  E = sum beta z z^T,  e = sum beta z,  likewise db, dB

All of it is computed for one block after the other. The outer products are formed as columns (D*r, n), for which
multiplication runs along positions, whatever the rank. Training saves U for backward if it is not too large, because
reading it takes a tenth of the time of recomputing it. z G z and E use each pair of numbers once (`dau_norm.pairs`).
"""

import torch
from torch import Tensor

from .dau_norm import add_norm_gradient, cached_norm_terms, from_pairs, pairs
from .dau_torch import relative_slope, rescaling
from .operator import make_operator
from .patches import as_rows, geometry, memory_format
from .products import add_product, product, takes_columns

__all__ = ["dau_conv2d"]

# Bytes of the largest temporary of a block: fits in a cache, and is long enough for fast products.
_BLOCK = 2**23
# Largest U, in bytes, that a layer saves for backward. A larger U is recomputed there.
_KEPT = 2**28
# glibc returns freed memory to the system, and getting zeroed pages again takes as long as the products stored in them.
# After a program has freed an array of nearly 32 MB (here one that is never touched), glibc retains up to 64 MB.
torch.empty(2**25 - 2**16, dtype=torch.uint8)


def _forward(x, down, up, up_bias, stride, padding, dilation, activation, keep):
    units, rank = up_bias.shape[0], down.shape[0]
    g = geometry(x, up, stride, padding, dilation)
    exact = torch.promote_types(x.dtype, torch.float32)
    a, b = g.flat(up), g.flat(up_bias)
    small = torch.cat([g.flat(down), b])  # (r + D, K)
    terms, packed = cached_norm_terms(up, up_bias, exact)

    z, num, s = (x.new_empty(g.positions, n, dtype=exact) for n in (rank, units, units))
    u, y = (x.new_empty(n, m) for n, m in ((g.positions if keep else 0, units * rank), (g.positions, units)))
    windows = g.windows(g.padded(x))
    for index, now in g.blocks(_positions(a, rank)):
        p = windows[index].reshape(now.stop - now.start, -1)
        low, plain = product(p, small.t()).split([rank, units], 1)
        tile = product(p, a.t(), u[now] if keep else None)
        z[now] = low
        torch.add(_contract(tile, low), plain, out=num[now])
        torch.addmm(terms.square, pairs(z[now]), packed.t(), out=s[now])
        torch.mul(num[now], rescaling(s[now], activation), out=y[now])
    y = y.view(x.shape[0], g.rows, g.columns, units).permute(0, 3, 1, 2)
    return y.contiguous(memory_format=memory_format(x)), z, num, s, u


def _data_gradient(grad, x, up, up_bias, z, s, stride, padding, dilation, activation):
    g = geometry(x, up, stride, padding, dilation)
    a, b = g.flat(up), g.flat(up_bias)
    grad, z = as_rows(grad), z.to(x.dtype)
    dx = g.padded_zeros(x)
    target = g.windows(dx)
    for index, now in g.blocks(_positions(a, z.shape[1])):
        alpha = (grad[now] * rescaling(s[now], activation)).to(x.dtype)
        g.fold(target[index], add_product(product(_outer(alpha, z[now]), a), alpha, b))
    return g.cropped(dx, x)


def _backward(grad, x, down, up, up_bias, z, num, s, u, stride, padding, dilation, activation, wants_dx):
    units, rank = up_bias.shape[0], down.shape[0]
    exact, low = num.dtype, x.dtype
    g = geometry(x, up, stride, padding, dilation)
    a, b = g.flat(up), g.flat(up_bias)
    small = torch.cat([g.flat(down), b])
    terms, _ = cached_norm_terms(up, up_bias, exact)
    gram = terms.gram.to(low)

    grad = as_rows(grad)
    dweights = x.new_zeros(units * rank + rank + units, a.shape[1], dtype=exact)
    dnorm = x.new_zeros(units, (rank // 2 + 2) * rank, dtype=exact)
    zeroth = x.new_zeros(units, dtype=exact)
    dx = g.padded_zeros(x) if wants_dx else x.new_empty(0)
    windows, target = g.windows(g.padded(x)), g.windows(dx) if wants_dx else dx
    for index, now in g.blocks(_positions(a, rank)):
        p = windows[index].reshape(now.stop - now.start, -1)
        tile = u[now] if len(u) else product(p, a.t())
        alpha = grad[now] * rescaling(s[now], activation)
        beta = (alpha * num[now]).mul_(relative_slope(s[now], activation))
        zeroth += beta.sum(0)
        dz = beta @ terms.cross
        alpha, beta, zs = (t.to(low) for t in (alpha, beta, z[now]))
        dz.add_(_contract_units(alpha, tile)).add_(_norm_slope(beta, zs, gram))
        add_product(dnorm, beta.t(), pairs(zs))
        columns = p.new_empty(len(dweights), len(p))  # for the gradients of A, B and b
        outer, rest = columns.split([units * rank, rank + units])
        both = torch.cat([dz.to(low), alpha], 1)
        rest.copy_(both.t())
        torch.mul(rest[rank:].unsqueeze(1), zs.t().contiguous(), out=outer.view(units, rank, -1))
        add_product(dweights, columns, p)
        if wants_dx:
            dp = product(outer.t() if takes_columns(low) else _outer(alpha, zs), a)
            g.fold(target[index], add_product(dp, both, small))
    second, first = (t.to(low) for t in from_pairs(dnorm, rank))
    da, dsmall = dweights.to(low).split([units * rank, rank + units])
    da, ddown, db = add_norm_gradient(a.view(units, rank, -1), b, da, dsmall, second, first, zeroth.to(low))
    return g.cropped(dx, x) if wants_dx else dx, *(g.unflat(t, x.shape[1]) for t in (ddown, da, db))


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Outer product at each position: (n, D) and (n, r) to (n, D*r)."""
    if left.itemsize == 2:  # broadcasting multiplies short half-precision rows one number at a time
        return torch.bmm(left.unsqueeze(2), right.unsqueeze(1)).flatten(1)
    return (left.unsqueeze(2) * right.unsqueeze(1)).flatten(1)


def _contract(u: Tensor, z: Tensor) -> Tensor:
    """Sum over r: (n, D*r) and (n, r) to (n, D)."""
    return torch.bmm(z.unsqueeze(1), u.view(len(u), -1, z.shape[1]).transpose(1, 2)).squeeze(1)


def _contract_units(left: Tensor, u: Tensor) -> Tensor:
    """Sum over D: (n, D) and (n, D*r) to (n, r)."""
    return torch.bmm(left.unsqueeze(1), u.view(*left.shape, -1)).squeeze(1)


def _norm_slope(beta: Tensor, z: Tensor, gram: Tensor) -> Tensor:
    """Sum beta G z over units: beta (n, D), z (n, r) and G (D, r, r) to (n, r)."""
    units, rank, _ = gram.shape
    if units > rank:  # the same number of multiplications, with the smaller intermediate result
        return torch.bmm((beta @ gram.flatten(1)).unflatten(1, (rank, rank)), z.unsqueeze(2)).squeeze(2)
    return _contract_units(beta, product(z, gram.flatten(0, 1).t()))


def _positions(a: Tensor, rank: int) -> int:
    return max(_BLOCK // (max(len(a), (rank // 2 + 2) * rank) * a.itemsize), 64)


def _keeps(positions: int, up: Tensor) -> bool:
    return positions * up.shape[0] * up.itemsize <= _KEPT


dau_conv2d = make_operator("dau_conv2d_cpu", _forward, _data_gradient, _backward, keeps=_keeps)
