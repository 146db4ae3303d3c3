"""The reference implementation against explicit loops: sliced patches, weights summed over the rank, in float64."""

import pytest
import torch

from helpers import relative_error
from helpers.dau_cases import CASES, problem
from timm_coda.layers import reference


def by_hand(x, down, up, up_bias, stride, padding, dilation, activation):
    """Compute one position and one unit at a time."""
    units, _, kh, kw = up_bias.shape
    rank = down.shape[0]
    x = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    rows = range(0, x.shape[2] - dilation[0] * (kh - 1), stride[0])
    columns = range(0, x.shape[3] - dilation[1] * (kw - 1), stride[1])
    y = torch.empty(len(x), units, len(rows), len(columns), dtype=x.dtype)
    for n in range(len(x)):
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                patch = torch.stack(
                    [
                        x[n, c, row + dilation[0] * a, column + dilation[1] * b]
                        for c in range(x.shape[1])
                        for a in range(kh)
                        for b in range(kw)
                    ]
                )
                code = [torch.dot(down[q].flatten(), patch) for q in range(rank)]
                for d in range(units):
                    v = up_bias[d].flatten()
                    for q in range(rank):
                        v = v + code[q] * up[d * rank + q].flatten()
                    length = torch.linalg.vector_norm(v)
                    w = v / length
                    if activation == "squash":
                        w = w * length**2 / (1 + length**2)
                    y[n, d, i, j] = torch.dot(w, patch)
    return y


@pytest.mark.parametrize("activation", ["squash", "l2"])
@pytest.mark.parametrize("case", [name for name in CASES if name != "large_stem"])
def test_reference_is_the_formula(case, activation):
    tensors, geometry = problem(case)
    tensors = [t.detach() for t in tensors]
    y = reference.dau_conv2d(*tensors, **geometry, activation=activation)
    assert relative_error(y, by_hand(*tensors, **geometry, activation=activation)) < 1e-14


@pytest.mark.parametrize("activation", ["squash", "l2"])
def test_output_is_bounded_by_the_patch_and_reached_by_alignment(activation):
    v = torch.tensor([[3.0, 4.0], [300.0, 400.0]], dtype=torch.float64)
    w = reference.rescale(v, activation, dim=1)
    lengths = [25 / 26, 250000 / 250001] if activation == "squash" else [1, 1]
    assert w.norm(dim=1).tolist() == pytest.approx(lengths)
    assert torch.equal(w[0, 0] * 4, w[0, 1] * 3)


@pytest.mark.parametrize("activation", ["squash", "l2"])
def test_a_zero_weight_vector_stays_zero_with_finite_gradient(activation):
    v = torch.zeros(2, 3, requires_grad=True)
    w = reference.rescale(v, activation, dim=1)
    w.sum().backward()
    assert torch.equal(w, torch.zeros(2, 3))
    assert torch.isfinite(v.grad).all()
