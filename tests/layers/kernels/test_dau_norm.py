"""The cache of norm terms: always matches the current weights, and is freed together with them."""

import gc

import pytest
import torch

from timm_coda.layers.kernels import dau_norm


def weights(dtype: torch.dtype = torch.float32, inputs: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, inputs, 3, 3, dtype=dtype), torch.randn(2, inputs, 3, 3, dtype=dtype)  # rank 3


def assert_current(up: torch.Tensor, up_bias: torch.Tensor) -> None:
    known, packed = dau_norm.cached_norm_terms(up, up_bias, torch.float64)
    current = dau_norm.norm_terms(up, up_bias, torch.float64)
    for kept, new in zip((*known, packed), (*current, dau_norm.for_pairs(current)), strict=True):
        assert torch.equal(kept, new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inputs", [9, 10], ids=["odd", "even"])
def test_terms_follow_every_way_of_writing(dtype, inputs):
    up, up_bias = weights(dtype, inputs)
    assert_current(up, up_bias)
    with torch.no_grad():
        up.mul_(2)
    assert_current(up, up_bias)
    for tensor in (up, up_bias):
        numbers = tensor.data.view(-1)  # writes through it do not change the version counter
        for index in (0, 1, len(numbers) - 1):  # the same change at different places
            numbers[index] += 0.25
            assert_current(up, up_bias)
            numbers[index] -= 0.25
        numbers[[0, 1]] = numbers[[1, 0]]
        assert_current(up, up_bias)
    with torch.inference_mode():
        assert_current(up.clone(), up_bias.clone())


def test_no_two_small_changes_look_alike():
    """Finite differences change one number after another by the same amount; each change has its own fingerprint."""
    for units, indices in ((6, range(540)), (2000, range(70_000, 75_000, 9))):
        up, seen = torch.randn(units, 10, 3, 3), set()
        numbers = up.data.view(-1)
        for index in indices:
            before = numbers[index].item()
            for step in (1e-3, -1e-3):
                numbers[index] = before + step
                version, sums = dau_norm._fingerprint(up)
                seen.add((version, *(tensor.numpy().tobytes() for tensor in sums)))
            numbers[index] = before
        assert len(seen) == 2 * len(indices)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_that_change_places_are_seen(dtype, memory_format):
    torch.manual_seed(0)
    up = torch.randn(1024, 64, 3, 3).to(dtype).contiguous(memory_format=memory_format)
    before, original = dau_norm._fingerprint(up), up.clone()
    swaps = [(dim, i, j) for dim, size in enumerate(up.shape) for i, j in ((0, 1), (0, 2), (0, size // 2), (1, -1))]
    moved = {f"flip of {dim}": original.flip(dim) for dim in range(4)}
    moved |= {f"shift of {dim} by {n}": original.roll(n, dim) for dim in range(4) for n in (1, 2)}
    moved["transposed kernels"] = original.transpose(2, 3)
    for dim, i, j in swaps:
        order = torch.arange(up.shape[dim])
        order[i], order[j] = order[j].item(), order[i].item()
        moved[f"{i} and {j} of {dim}"] = original.index_select(dim, order)
    for name, weight in moved.items():
        up.data.copy_(weight)
        assert torch.equal(up, original) or not dau_norm._equal(before, dau_norm._fingerprint(up)), name
    up.data.copy_(original)
    assert dau_norm._equal(before, dau_norm._fingerprint(up))


def test_computed_once_and_gone_with_the_weights():
    up, up_bias = weights()
    first = dau_norm.cached_norm_terms(up, up_bias, torch.float32)
    assert dau_norm.cached_norm_terms(up, up_bias, torch.float32) is first
    gc.collect()  # frees models of other tests
    entries = len(dau_norm._cache)
    del up
    gc.collect()
    assert len(dau_norm._cache) == entries - 1


def test_strided_weights_are_not_kept():
    up, up_bias = weights()
    gc.collect()
    entries = len(dau_norm._cache)
    assert_current(up[:, ::2], up_bias[:, ::2])
    assert len(dau_norm._cache) == entries


def test_bits_do_not_depend_on_where_the_weights_lie():
    """Memory-mapped weights, as loaded by transformers, are aligned only to 8 bytes."""
    for rank, inputs in ((7, 13), (64, 64), (33, 20)):
        up, up_bias = torch.randn(2 * rank, inputs, 3, 3), torch.randn(2, inputs, 3, 3)
        shifted = []
        for weight in (up, up_bias):
            memory = torch.empty(weight.numel() + 16)
            offset = 6 - memory.data_ptr() % 64 // 4
            shifted.append(memory[offset % 16 :][: weight.numel()].view(weight.shape).copy_(weight))
            assert shifted[-1].data_ptr() % 64 == 24
        expected = dau_norm.norm_terms(up, up_bias, torch.float32)
        for one, other in zip(dau_norm.norm_terms(*shifted, torch.float32), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 7, 8])
def test_pairs_are_a_square(rank):
    torch.manual_seed(0)
    z, weight = torch.randn(37, rank, dtype=torch.float64), torch.randn(37, 2, dtype=torch.float64)
    up, up_bias = torch.randn(2 * rank, 9, dtype=torch.float64), torch.randn(2, 9, dtype=torch.float64)
    terms = dau_norm.norm_terms(up, up_bias, torch.float64)
    expected = torch.einsum("ni,dij,nj->nd", z, terms.gram, z) + 2 * z @ terms.cross.T
    pairs = dau_norm.pairs(z)
    torch.testing.assert_close(pairs @ dau_norm.for_pairs(terms).T, expected)
    second, first = dau_norm.from_pairs(weight.T @ pairs, rank)
    torch.testing.assert_close(second, torch.einsum("nd,ni,nj->dij", weight, z, z))
    torch.testing.assert_close(first, weight.T @ z)
