"""CPU backend: the factorised DAU convolution as matrix products over blocks of positions that fit in cache.

Positions are rows: P (n, K) holds the patches of a block and serves `down`, `up` and the bias. With A (D, r, K), b, B,
G and c as in `functional.py`, h(s) the rescaling for s = |v|^2, and (x) the outer product at each position:

    forward    z = P B^T,  U = P A^T (n, D, r),  num = U z + P b^T,  s = z G z + 2 c z + |b|^2,  y = num h(s)
    data       dP = (g h (x) z) A + (g h) b                                   enough for explanations
    backward   alpha = g h, beta = 2 g num h'(s):
               dP = (alpha (x) z) A + [dz, alpha] [B; b],   dz = alpha U + beta (G z + c)
               dA = (alpha (x) z)^T P + E A + e b^T,  E = sum beta z z^T,  e = sum beta z,  likewise db, dB

U and the outer products are formed for one block at a time. Training saves U for backward if it is not too large,
because reading it takes a tenth of the time of recomputing it. z G z and E use each pair of numbers once
(`dau_norm.pairs`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dau_norm import add_norm_gradient, cached_norm_terms, from_pairs, pairs
from .dau_torch import rescaling, rescaling_slope
from .operator import make_operator
from .patches import as_rows, geometry, memory_format

__all__ = ["dau_conv2d"]

# Bytes of the largest temporary of a block: fits in a last-level cache, and is long enough for fast products.
_BLOCK = 2**24
# Largest U, in bytes, that a layer saves for backward. A larger U is recomputed there.
_KEPT = 2**28
# glibc returns freed memory to the system, and getting zeroed pages again takes as long as the products stored in them.
# After a program has freed an array of nearly 32 MB (here one that is never touched), glibc retains up to 64 MB.
torch.empty(2**25 - 2**16, dtype=torch.uint8)
# oneDNN's float32 product is up to twice as fast as the one behind torch.mm (measured on AMD), never slower.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _forward(x, down, up, up_bias, stride, padding, dilation, activation, keep):
    units, rank = up_bias.shape[0], down.shape[0]
    g = geometry(x, up, stride, padding, dilation)
    exact = torch.promote_types(x.dtype, torch.float32)
    a, b = g.flat(up), g.flat(up_bias)
    small = torch.cat([g.flat(down), b])  # (r + D, K)
    terms, packed = cached_norm_terms(up, up_bias, exact)

    z, num, s = (x.new_empty(g.positions, n, dtype=exact) for n in (rank, units, units))
    u = x.new_empty(g.positions if keep else 0, units * rank)
    windows = g.windows(g.padded(x))
    for index, now in g.blocks(_positions(a)):
        p = windows[index].reshape(now.stop - now.start, -1)
        low, plain = _product(p, small).split([rank, units], 1)
        z[now] = low
        tile = u[now].copy_(_product(p, a)) if keep else _product(p, a)
        torch.add(_contract(tile, low), plain, out=num[now])
    for now, both in pairs(z):
        s[now] = _product(both, packed, terms.square)
    y = (num * rescaling(s, activation)).to(x.dtype)
    y = y.view(x.shape[0], g.rows, g.columns, units).permute(0, 3, 1, 2)
    return y.contiguous(memory_format=memory_format(x)), z, num, s, u


def _data_gradient(grad, x, up, up_bias, z, s, stride, padding, dilation, activation):
    g = geometry(x, up, stride, padding, dilation)
    a, b = g.flat(up), g.flat(up_bias)
    alpha = (as_rows(grad) * rescaling(s, activation)).to(x.dtype)
    z = z.to(x.dtype)
    dx = g.padded_zeros(x)
    target = g.windows(dx)
    for index, now in g.blocks(_positions(a)):
        g.fold(target[index], _product(_outer(alpha[now], z[now]), a.t()).addmm_(alpha[now], b))
    return g.cropped(dx, x)


def _backward(grad, x, down, up, up_bias, z, num, s, u, stride, padding, dilation, activation, wants_dx):
    units, rank = up_bias.shape[0], down.shape[0]
    exact, low = num.dtype, x.dtype
    g = geometry(x, up, stride, padding, dilation)
    a, b = g.flat(up), g.flat(up_bias)
    small = torch.cat([g.flat(down), b])
    terms, _ = cached_norm_terms(up, up_bias, exact)

    grad = as_rows(grad).to(exact)
    alpha = (grad * rescaling(s, activation)).to(low)
    beta = 2 * grad * num * rescaling_slope(s, activation)
    dz, zeroth = beta @ terms.cross, beta.sum(0)
    gram, beta, z = (t.to(low) for t in (terms.gram.view(units * rank, rank), beta, z))
    # Products that sum over positions need them as columns.
    alpha_t, beta_t, z_t = (rows.t().contiguous() for rows in (alpha, beta, z))

    dweights = _Sum(units * rank + rank + units, a.shape[1], dtype=low)
    dnorm = _Sum(units, (rank // 2 + 2) * rank, dtype=low)
    dx = g.padded_zeros(x) if wants_dx else x.new_empty(0)
    windows, target = g.windows(g.padded(x)), g.windows(dx) if wants_dx else dx
    for index, now in g.blocks(_positions(a)):
        p = windows[index].reshape(now.stop - now.start, -1)
        tile = u[now] if len(u) else _product(p, a)
        dz[now].add_(_contract_units(alpha[now], tile)).add_(_contract_units(beta[now], _product(z[now], gram)))
        both = torch.cat([dz[now].to(low), alpha[now]], 1)
        if wants_dx:
            dp = _product(_outer(alpha[now], z[now]), a.t())
            g.fold(target[index], dp.addmm_(both, small))
        columns = p.new_empty(units * rank + rank + units, len(p))  # for the gradients of A, B and b
        outer, rest = columns.split([units * rank, rank + units])
        torch.mul(alpha_t[:, now].unsqueeze(1), z_t[:, now], out=outer.view(units, rank, -1))
        rest.copy_(both.t())
        dweights.add(_product(columns, p.t()))
    for now, both in pairs(z):
        dnorm.add(_product(beta_t[:, now], both.t()))
    second, first = from_pairs(dnorm.total, rank)
    da, dsmall = dweights.total.split([units * rank, rank + units])
    da, ddown, db = add_norm_gradient(a.view(units, rank, -1), b, da, dsmall, second, first, zeroth.to(low))
    return g.cropped(dx, x) if wants_dx else dx, *(g.unflat(t, x.shape[1]) for t in (ddown, da, db))


class _Sum:
    """Sum products over blocks, in float32 or better if there are several; `total` has the dtype `dtype`."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self._total: Any = None

    def add(self, part: Tensor) -> None:
        if self._total is None:
            self._total = part
        else:
            self._total = self._total.to(torch.promote_types(self.dtype, torch.float32)).add_(part)

    @property
    def total(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype) if self._total is None else self._total.to(self.dtype)


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


def _positions(a: Tensor) -> int:
    return max(_BLOCK // a[:, 0].nbytes, 64)


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return left right^T, with `bias` added to every row."""
    if _ONEDNN and left.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return F.linear(left, right, bias)


def _keeps(positions: int, up: Tensor) -> bool:
    return positions * up.shape[0] * up.itemsize <= _KEPT


dau_conv2d = make_operator("dau_conv2d_cpu", _forward, _data_gradient, _backward, keeps=_keeps)
