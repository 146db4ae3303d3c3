"""What the norm |v|^2 = z G z + 2 c z + |b|^2 needs of the weights alone: G, c, |b|^2 and their gradients."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["NormTerms", "add_norm_gradient", "cached_norm_terms", "for_pairs", "from_pairs", "norm_terms", "pairs"]


_BLOCK = 2**22  # bytes of a block of pairs


class NormTerms(NamedTuple):
    """Of A (D, r, K) and b (D, K)."""

    gram: Tensor
    """G = A A^T, (D, r, r)."""
    cross: Tensor
    """c = A b, (D, r)."""
    square: Tensor
    """|b|^2, (D)."""


def norm_terms(up: Tensor, up_bias: Tensor, exact: torch.dtype) -> NormTerms:
    """In the dtype `exact`, of up (D*r, ...) and up_bias (D, ...)."""
    units = up_bias.shape[0]
    # Memory-mapped weights may lie anywhere, and MKL rounds by where they lie.
    up, up_bias = (weight.clone() if weight.data_ptr() % 64 else weight for weight in (up, up_bias))
    a, b = up.reshape(units, up.shape[0] // units, -1).to(exact), up_bias.reshape(units, -1).to(exact)
    return NormTerms(a @ a.transpose(1, 2), (a @ b.unsqueeze(2)).squeeze(2), b.square().sum(1))


def pairs(z: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Every z_i z_j once (z_i z_(i + r/2) twice), and then every z_i: (n, r) to (n, (r//2 + 2) r), in blocks of n.

    Row k < r//2 + 1 of the second axis holds z_i z_(i + k), counted round: long runs of neighbours, and half of the
    products that a square has.
    """
    rank = z.shape[1]
    rows = rank // 2 + 1
    size = max(_BLOCK // (z.itemsize * (rows + 1) * rank), 16)
    memory = z.new_empty(min(size, len(z)), rows + 1, rank)
    for start in range(0, len(z), size):
        now = slice(start, min(start + size, len(z)))
        out = memory[: now.stop - start]
        shifted = torch.cat([z[now], z[now, : rank // 2]], 1).unfold(1, rank, 1)  # (n, rows, r)
        torch.mul(z[now].unsqueeze(1), shifted, out=out[:, :rows])
        out[:, rows] = z[now]
        yield now, out.flatten(1)


def for_pairs(terms: NormTerms) -> Tensor:
    """What z G z + 2 c z takes of each of `pairs(z)`, (D, (r//2 + 2) r)."""
    places, often, _ = _pair_places(terms.cross.shape[1])
    return torch.cat([terms.gram.flatten(1)[:, places] * often, 2 * terms.cross], 1)


def from_pairs(sums: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Sums over positions of weighted pairs, (D, (r//2 + 2) r), as those of z z^T (D, r, r) and of z (D, r)."""
    *_, back = _pair_places(rank)
    return sums[:, back].unflatten(1, (rank, rank)), sums[:, -rank:]


@lru_cache
def _pair_places(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of `pairs`: where they are in a square, how often it has them, and where the square's are among them."""
    i = torch.arange(rank)
    k = torch.arange(rank // 2 + 1)[:, None]
    often = torch.where((k == 0) | (2 * k == rank), 1, 2).expand(-1, rank)
    ahead = (i - i[:, None]) % rank  # of column before row
    back = torch.where(ahead <= rank // 2, ahead * rank + i[:, None], (rank - ahead) * rank + i)
    return (i * rank + (i + k) % rank).flatten(), often.flatten(), back.flatten()


_cache = WeakTensorKeyDictionary()  # up: (its and the bias's fingerprints, dtype, what was found), gone with it


def cached_norm_terms(up: Tensor, up_bias: Tensor, exact: torch.dtype) -> tuple[NormTerms, Tensor]:
    """`norm_terms` of CPU weights, and these `for_pairs`, computed anew only when they have changed.

    For a single image the Gram matrices cost as much as half the layer. Reading the weights to see whether they are
    the same costs a tenth of that, and sees what the version counter does not: writes through `.data`.
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


# What is summed lies so many 64-bit words apart, a prime number: whole rows, kernels or channels that change places
# change sums, too, for their distance is no multiple of it.
_STRIDE, _TERMS = 2039, 8


def _fingerprint(weight: Tensor) -> tuple[int, list[Tensor]] | None:
    """Version and sums of all bits, or None where they cannot be read as 64-bit numbers."""
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
    """Gradients of A (D*r, K), B and b, with what comes through s = |A^T z + b|^2 added.

    Args:
        a, b: (D, r, K) and (D, K)
        da, dsmall: what comes through v^T p, (D*r, K), and stacked of B and b (r + D, K)
        second, first, zeroth: sums over positions of beta z z^T (D, r, r), beta z (D, r), beta (D)
    """
    units, rank, _ = a.shape
    a, b = a.to(da.dtype), b.to(da.dtype)
    da = torch.baddbmm(da.view(a.shape), second, a)
    da.addcmul_(first.unsqueeze(2), b.unsqueeze(1))
    ddown, db = dsmall.split([rank, units])
    through_norm = torch.bmm(first.unsqueeze(1), a).squeeze(1) + zeroth.unsqueeze(1) * b
    return da.view(units * rank, -1), ddown, db + through_norm
