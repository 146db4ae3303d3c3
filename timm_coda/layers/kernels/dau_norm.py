"""Terms of |v|^2 = z G z + 2 c z + |b|^2 that depend only on the weights: G, c, |b|^2, their cache and gradients."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["NormTerms", "add_norm_gradient", "cached_norm_terms", "for_pairs", "from_pairs", "norm_terms", "pairs"]


class NormTerms(NamedTuple):
    """Norm terms of A (D, r, K) and b (D, K)."""

    gram: Tensor
    """G = A A^T, (D, r, r)."""
    cross: Tensor
    """c = A b, (D, r)."""
    square: Tensor
    """|b|^2, (D)."""


def norm_terms(up: Tensor, up_bias: Tensor, exact: torch.dtype) -> NormTerms:
    """Compute the terms of up (D*r, ...) and up_bias (D, ...), in the dtype `exact`."""
    units = up_bias.shape[0]
    # Memory-mapped weights may have any alignment, and MKL's rounding depends on it.
    up, up_bias = (weight.clone() if weight.data_ptr() % 64 else weight for weight in (up, up_bias))
    a, b = up.reshape(units, up.shape[0] // units, -1).to(exact), up_bias.reshape(units, -1).to(exact)
    return NormTerms(a @ a.transpose(1, 2), (a @ b.unsqueeze(2)).squeeze(2), b.square().sum(1))


def pairs(z: Tensor) -> Tensor:
    """Return each z_i z_j once (z_i z_(i + r/2) twice), then each z_i: (n, r) to (n, (r//2 + 2) r).

    Row k < r//2 + 1 of the second axis holds z_i z_(i + k), with indices modulo r. These are long runs of adjacent
    numbers, and half of the products in the full square.
    """
    rank = z.shape[1]
    rows = rank // 2 + 1
    out = z.new_empty(len(z), rows + 1, rank)
    shifted = torch.cat([z, z[:, : rank // 2]], 1).unfold(1, rank, 1)  # (n, rows, r)
    torch.mul(z.unsqueeze(1), shifted, out=out[:, :rows])
    out[:, rows] = z
    return out.flatten(1)


def for_pairs(terms: NormTerms) -> Tensor:
    """Return the coefficients of `pairs(z)` in z G z + 2 c z, (D, (r//2 + 2) r)."""
    places, often, _ = (t.to(terms.cross.device) for t in _pair_places(terms.cross.shape[1]))
    return torch.cat([terms.gram.flatten(1)[:, places] * often, 2 * terms.cross], 1)


def from_pairs(sums: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Convert sums of weighted pairs over positions, (D, (r//2 + 2) r), to sums of z z^T (D, r, r) and z (D, r)."""
    *_, back = _pair_places(rank)
    return sums[:, back].unflatten(1, (rank, rank)), sums[:, -rank:]


@lru_cache
def _pair_places(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each pair's index in the r x r square, its multiplicity, and the pair index of each square entry."""
    i = torch.arange(rank)
    k = torch.arange(rank // 2 + 1)[:, None]
    often = torch.where((k == 0) | (2 * k == rank), 1, 2).expand(-1, rank)
    ahead = (i - i[:, None]) % rank  # (column - row) modulo r
    back = torch.where(ahead <= rank // 2, ahead * rank + i[:, None], (rank - ahead) * rank + i)
    return (i * rank + (i + k) % rank).flatten(), often.flatten(), back.flatten()


_cache = WeakTensorKeyDictionary()  # up: (fingerprints of up and bias, dtype, terms); an entry lives as long as its key


def cached_norm_terms(up: Tensor, up_bias: Tensor, exact: torch.dtype) -> tuple[NormTerms, Tensor]:
    """Return `norm_terms` of CPU weights and their `for_pairs`, recomputed only if the weights have changed.

    For a single image, the Gram matrices cost as much as half the layer. Reading the weights to detect changes costs a
    tenth of that, and unlike the version counter also detects writes through `.data`.
    """
    seen = _fingerprint(up), _fingerprint(up_bias)
    known = _cache.get(up)
    if known is not None and known[1] == exact and all(map(_equal, known[0], seen)):
        return known[2]
    terms = norm_terms(up, up_bias, exact)
    found = terms, for_pairs(terms)
    if None not in seen:
        _cache[up] = seen, exact, found
    return found


# The 64-bit words of a sum are _STRIDE apart, a prime number. Therefore swapping whole rows, kernels or channels also
# changes the sums, because the distance between them is not a multiple of it.
_STRIDE, _TERMS = 2039, 8


def _fingerprint(weight: Tensor) -> tuple[int, list[Tensor]] | None:
    """Return the version and sums over all bits, or None if the weight cannot be read as 64-bit words."""
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    if not dense or weight.storage_offset() * weight.itemsize % 8 or weight.nbytes % 8:
        return None
    words = weight.detach().as_strided((weight.numel(),), (1,)).view(torch.int64)
    version = -1 if weight.is_inference() else weight._version
    table = len(words) // (_STRIDE * _TERMS)
    if table == 0:
        return version, [words.clone()]
    sums = words.as_strided((table, _TERMS, _STRIDE), (_STRIDE * _TERMS, _STRIDE, 1)).sum(1)
    return version, [sums, words[table * _STRIDE * _TERMS :].clone()]


def _equal(one: tuple[int, list[Tensor]] | None, other: tuple[int, list[Tensor]] | None) -> bool:
    if one is None or other is None or one[0] != other[0] or len(one[1]) != len(other[1]):
        return False
    return all(map(torch.equal, one[1], other[1]))


def add_norm_gradient(
    a: Tensor, b: Tensor, da: Tensor, dsmall: Tensor, second: Tensor, first: Tensor, zeroth: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of A (D*r, K), B and b, after adding the part that comes through s = |A^T z + b|^2.

    Args:
        a, b: the weights, (D, r, K) and (D, K)
        da, dsmall: gradients through v^T p: of A (D*r, K), and of B and b, stacked, (r + D, K)
        second, first, zeroth: sums over positions of beta z z^T (D, r, r), beta z (D, r), beta (D)
    """
    units, rank, _ = a.shape
    a, b = a.to(da.dtype), b.to(da.dtype)
    da = torch.baddbmm(da.view(a.shape), second, a)
    da.addcmul_(first.unsqueeze(2), b.unsqueeze(1))
    ddown, db = dsmall.split([rank, units])
    through_norm = torch.bmm(first.unsqueeze(1), a).squeeze(1) + zeroth.unsqueeze(1) * b
    return da.view(units * rank, -1), ddown, db + through_norm
