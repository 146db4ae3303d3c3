"""CUDA backend in Triton, which writes neither dynamic weights nor U to memory.

The products contract each (positions, D*r) tile in their epilogues. Symbols as in `dau_cpu.py`; a tile is `BLOCK_N`
positions by `UNITS` units, UNITS * r columns. Patches P (N, K) are written once per layer. Products use the tensors'
precision and accumulate in float32; the norm is computed in float32.

    _forward_kernel   U = P A^T -> num = U z + P b^T;  z G -> s;  y = num h(s)
    _data_kernel      (alpha (x) z) A, with the outer product formed in registers
    _code_kernel      dz = alpha U + beta (G z + c), with U recomputed tile by tile
    _weight_kernel    (alpha (x) z)^T P (for A) and (beta (x) z)^T z (for the norm), positions split over programs
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false
# Triton's language has its own types, which pyright does not know.

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dau_norm import add_norm_gradient, norm_terms
from .dau_torch import relative_slope, rescaling
from .half import scaled_product
from .operator import make_operator
from .patches import as_rows, geometry, memory_format

__all__ = ["dau_conv2d", "supports"]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")  # as Triton reads it


def supports(dtype: torch.dtype, rank: int) -> bool:
    """Return whether the kernels support dtype and rank: at most float32; 16, 32, ... 256, because of tensor cores."""
    return dtype in (torch.float32, torch.bfloat16, torch.float16) and rank in (16, 32, 64, 128, 256)


def _configs(*shapes: tuple[int, int, int, int]) -> list[triton.Config]:
    """Return configs for (positions, columns, depth of a step, warps); the interpreter cannot time: it gets one."""
    configs = [
        triton.Config({"BLOCK_N": n, "COLUMNS": columns, "BLOCK_K": k}, num_warps=warps, num_stages=3)
        for n, columns, k, warps in shapes
    ]
    return configs[:1] if INTERPRETED else configs


@triton.jit
def _products(p_ptr, a_ptr, rows, in_rows, columns, in_columns, K, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """Compute the (rows, columns) tile of P A^T; both matrices have K numbers per row."""
    steps = tl.arange(0, BLOCK_K)
    p_ptrs = p_ptr + rows[:, None].to(tl.int64) * K + steps[None, :]
    a_ptrs = a_ptr + columns[None, :].to(tl.int64) * K + steps[:, None]
    tile = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for k in range(0, K, BLOCK_K):
        in_k = k + steps < K
        p = tl.load(p_ptrs + k, mask=in_rows[:, None] & in_k[None, :], other=0.0)
        a = tl.load(a_ptrs + k, mask=in_k[:, None] & in_columns[None, :], other=0.0)
        tile = tl.dot(p, a, tile, input_precision=PRECISION)
    return tile


@triton.autotune(
    _configs((32, 64, 16, 4), (64, 128, 32, 4), (128, 128, 32, 4), (128, 256, 32, 8), (128, 256, 64, 8)),
    key=["D", "K", "RANK"],
)
@triton.jit
def _forward_kernel(
    p_ptr,  # (N, K)
    a_ptr,  # (D*r, K)
    z_ptr,  # (N, r), float32
    plain_ptr,  # (N, D), float32: P b^T
    gram_ptr,  # (D*r, r), float32
    cross_ptr,  # (D*r,), float32: 2 c
    square_ptr,  # (D,), float32: |b|^2
    y_ptr,  # (N, D)
    num_ptr,  # (N, D), float32
    s_ptr,  # (N, D), float32
    N,
    D,
    K,
    RANK: tl.constexpr,
    L2: tl.constexpr,
    PRECISION: tl.constexpr,
    NORM_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # At least one unit per tile, whatever the rank.
    UNITS: tl.constexpr = COLUMNS // RANK if COLUMNS > RANK else 1
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    units = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    columns = tl.program_id(1) * UNITS * RANK + tl.arange(0, UNITS * RANK)
    in_rows = rows < N
    in_columns = columns < D * RANK
    z_ptrs = z_ptr + rows[:, None].to(tl.int64) * RANK + tl.arange(0, RANK)[None, :]

    u = _products(p_ptr, a_ptr, rows, in_rows, columns, in_columns, K, BLOCK_K, PRECISION)
    z = tl.load(z_ptrs, mask=in_rows[:, None], other=0.0)[:, None, :]
    aligned = tl.sum(u.reshape(BLOCK_N, UNITS, RANK) * z, 2)
    quadratic = _products(z_ptr, gram_ptr, rows, in_rows, columns, in_columns, RANK, 16, NORM_PRECISION)
    quadratic += tl.load(cross_ptr + columns, mask=in_columns, other=0.0)[None, :]
    norm = tl.sum(quadratic.reshape(BLOCK_N, UNITS, RANK) * z, 2)

    at = rows[:, None].to(tl.int64) * D + units[None, :]
    inside = in_rows[:, None] & (units < D)[None, :]
    num = aligned + tl.load(plain_ptr + at, mask=inside, other=0.0)
    s = norm + tl.load(square_ptr + units, mask=units < D, other=0.0)[None, :]
    clamped = tl.maximum(s, 1e-20)
    if L2:  # noqa: SIM108, Triton evaluates it at compile time
        h = 1 / tl.sqrt(clamped)
    else:
        h = tl.sqrt(clamped) / (1 + clamped)
    tl.store(num_ptr + at, num, mask=inside)
    tl.store(s_ptr + at, s, mask=inside)
    tl.store(y_ptr + at, (num * h).to(y_ptr.dtype.element_ty), mask=inside)


@triton.autotune(
    _configs((32, 64, 32, 4), (64, 64, 64, 4), (128, 64, 64, 4), (128, 64, 128, 8), (128, 128, 128, 8)),
    key=["D", "K", "RANK"],
)
@triton.jit
def _data_kernel(
    alpha_ptr,  # (N, D), float32
    z_ptr,  # (N, r), float32
    a_ptr,  # (D*r, K)
    base_ptr,  # (N, K): added to the product
    out_ptr,  # (N, K)
    N,
    D,
    K,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,  # (unit, rank) pairs per step
    BLOCK_K: tl.constexpr,  # columns of the output
):
    UNITS: tl.constexpr = COLUMNS // RANK if COLUMNS > RANK else 1
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_rows = rows < N
    in_inputs = inputs < K
    z_ptrs = z_ptr + rows[:, None].to(tl.int64) * RANK + tl.arange(0, RANK)[None, :]
    z = tl.load(z_ptrs, mask=in_rows[:, None], other=0.0)
    columns = tl.arange(0, UNITS * RANK)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for unit in range(0, D, UNITS):
        units = unit + tl.arange(0, UNITS)
        alpha_ptrs = alpha_ptr + rows[:, None].to(tl.int64) * D + units[None, :]
        alpha = tl.load(alpha_ptrs, mask=in_rows[:, None] & (units < D)[None, :], other=0.0)
        outer = (alpha[:, :, None] * z[:, None, :]).reshape(BLOCK_N, UNITS * RANK)
        row = unit * RANK + columns
        a_ptrs = a_ptr + row[:, None].to(tl.int64) * K + inputs[None, :]
        a = tl.load(a_ptrs, mask=(row < D * RANK)[:, None] & in_inputs[None, :], other=0.0)
        total = tl.dot(outer.to(a.dtype), a, total, input_precision=PRECISION)
    at = rows[:, None].to(tl.int64) * K + inputs[None, :]
    inside = in_rows[:, None] & in_inputs[None, :]
    total += tl.load(base_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.autotune(
    _configs((32, 64, 16, 4), (64, 128, 32, 4), (128, 128, 32, 4), (128, 256, 32, 8)), key=["D", "K", "RANK"]
)
@triton.jit
def _code_kernel(
    p_ptr,  # (N, K)
    a_ptr,  # (D*r, K)
    z_ptr,  # (N, r), float32
    gram_ptr,  # (D*r, r), float32
    cross_ptr,  # (D*r,), float32: c
    alpha_ptr,  # (N, D), float32
    beta_ptr,  # (N, D), float32
    dz_ptr,  # (N, r), float32
    N,
    D,
    K,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    NORM_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    UNITS: tl.constexpr = COLUMNS // RANK if COLUMNS > RANK else 1
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < N
    dz = tl.zeros((BLOCK_N, RANK), tl.float32)
    for unit in range(0, D, UNITS):
        units = unit + tl.arange(0, UNITS)
        columns = unit * RANK + tl.arange(0, UNITS * RANK)
        in_columns = columns < D * RANK
        at = rows[:, None].to(tl.int64) * D + units[None, :]
        inside = in_rows[:, None] & (units < D)[None, :]
        alpha = tl.load(alpha_ptr + at, mask=inside, other=0.0)
        beta = tl.load(beta_ptr + at, mask=inside, other=0.0)
        u = _products(p_ptr, a_ptr, rows, in_rows, columns, in_columns, K, BLOCK_K, PRECISION)
        dz += tl.sum(u.reshape(BLOCK_N, UNITS, RANK) * alpha[:, :, None], 1)
        half = _products(z_ptr, gram_ptr, rows, in_rows, columns, in_columns, RANK, 16, NORM_PRECISION)
        half += tl.load(cross_ptr + columns, mask=in_columns, other=0.0)[None, :]
        dz += tl.sum(half.reshape(BLOCK_N, UNITS, RANK) * beta[:, :, None], 1)
    dz_ptrs = dz_ptr + rows[:, None].to(tl.int64) * RANK + tl.arange(0, RANK)[None, :]
    tl.store(dz_ptrs, dz, mask=in_rows[:, None])


@triton.autotune(
    _configs((32, 64, 32, 4), (32, 128, 64, 4), (64, 128, 64, 8), (64, 128, 128, 8), (64, 256, 64, 8)),
    key=["D", "K", "RANK"],
    reset_to_zero=["out_ptr"],
)
@triton.jit
def _weight_kernel(
    alpha_ptr,  # (N, D), float32
    z_ptr,  # (N, r), float32
    right_ptr,  # (N, K)
    out_ptr,  # (D*r, K), float32, zero
    N,
    D,
    K,
    SPLIT,  # positions per program
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    UNITS: tl.constexpr = COLUMNS // RANK if COLUMNS > RANK else 1
    units = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    inputs = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    start = tl.program_id(2) * SPLIT
    in_units = units < D
    in_inputs = inputs < K
    ranks = tl.arange(0, RANK)
    total = tl.zeros((UNITS * RANK, BLOCK_K), tl.float32)
    for n in range(start, tl.minimum(start + SPLIT, N), BLOCK_N):
        rows = n + tl.arange(0, BLOCK_N)
        in_rows = rows < tl.minimum(start + SPLIT, N)
        long = rows.to(tl.int64)
        alpha_ptrs = alpha_ptr + long[None, :] * D + units[:, None]
        alpha = tl.load(alpha_ptrs, mask=in_units[:, None] & in_rows[None, :], other=0.0)
        z = tl.load(z_ptr + long[None, :] * RANK + ranks[:, None], mask=in_rows[None, :], other=0.0)
        right_ptrs = right_ptr + long[:, None] * K + inputs[None, :]
        right = tl.load(right_ptrs, mask=in_rows[:, None] & in_inputs[None, :], other=0.0)
        outer = (alpha[:, None, :] * z[None, :, :]).reshape(UNITS * RANK, BLOCK_N)
        total = tl.dot(outer.to(right.dtype), right, total, input_precision=PRECISION)
    columns = tl.program_id(0) * UNITS * RANK + tl.arange(0, UNITS * RANK)
    out_ptrs = out_ptr + columns[:, None].to(tl.int64) * K + inputs[None, :]
    tl.atomic_add(out_ptrs, total, mask=(columns < D * RANK)[:, None] & in_inputs[None, :])


def _precision(dtype: torch.dtype) -> str:
    """Return the precision of products: full float32, unless the user allows TF32 for matrix products."""
    allowed = dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def _units(meta: dict) -> int:
    return max(meta["COLUMNS"] // meta["RANK"], 1)


def _forward(x, down, up, up_bias, stride, padding, dilation, activation, keep):
    units, rank = up_bias.shape[0], down.shape[0]
    g = geometry(x, up, stride, padding, dilation)
    a, b = g.flat(up), g.flat(up_bias)
    gram, cross, square = norm_terms(up, up_bias, torch.float32)
    p = g.windows(g.padded(x)).reshape(g.positions, -1)
    z, plain = (_responses(p, weight) for weight in (g.flat(down), b))
    y = x.new_empty(g.positions, units)
    num, s = (torch.empty_like(plain) for _ in range(2))
    precision = _precision(x.dtype)
    _forward_kernel[
        lambda meta: (triton.cdiv(g.positions, meta["BLOCK_N"]), triton.cdiv(units, _units(meta)))
    ](
        p, a, z, plain, gram, 2 * cross, square, y, num, s, g.positions, units, a.shape[1],
        RANK=rank, L2=activation == "l2", PRECISION=precision, NORM_PRECISION=precision,
    )  # fmt: skip
    y = y.view(x.shape[0], g.rows, g.columns, units).permute(0, 3, 1, 2)
    return y.contiguous(memory_format=memory_format(x)), z, num, s, x.new_empty(0, units * rank)


def _responses(p: Tensor, weight: Tensor) -> Tensor:
    """Return P weight^T, (N, units), in float32."""
    if p.dtype == torch.float16:
        return scaled_product(weight, p.t()).t().contiguous()
    return (p @ weight.t()).float()


def _data(alpha: Tensor, z: Tensor, a: Tensor, base: Tensor) -> Tensor:
    """Return base + (alpha (x) z) A, (N, K), in the dtype of A."""
    (positions, units), inputs = alpha.shape, a.shape[1]
    out = torch.empty_like(base, dtype=a.dtype)
    _data_kernel[
        lambda meta: (triton.cdiv(positions, meta["BLOCK_N"]), triton.cdiv(inputs, meta["BLOCK_K"]))
    ](alpha, z, a, base, out, positions, units, inputs, RANK=z.shape[1], PRECISION=_precision(a.dtype))  # fmt: skip
    return out


def _weight(alpha: Tensor, z: Tensor, right: Tensor) -> Tensor:
    """Return (alpha (x) z)^T right, (D*r, K), in float32."""
    (positions, units), (rank, inputs) = alpha.shape, (z.shape[1], right.shape[1])
    out = alpha.new_zeros(units * rank, inputs)
    # About two programs per multiprocessor, each with at least 1024 positions.
    tiles = triton.cdiv(units * rank, 128) * triton.cdiv(inputs, 64)
    splits = max(1, min(triton.cdiv(2 * _processors(alpha.device), tiles), positions // 1024))
    split = triton.cdiv(triton.cdiv(positions, splits), 64) * 64
    _weight_kernel[
        lambda meta: (
            triton.cdiv(units, _units(meta)), triton.cdiv(inputs, meta["BLOCK_K"]), triton.cdiv(positions, split)
        )
    ](alpha, z, right, out, positions, units, inputs, split, RANK=rank, PRECISION=_precision(right.dtype))  # fmt: skip
    return out


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _data_gradient(grad, x, up, up_bias, z, s, stride, padding, dilation, activation):
    g = geometry(x, up, stride, padding, dilation)
    alpha = as_rows(grad).float() * rescaling(s, activation)
    dp = _data(alpha, z, g.flat(up), scaled_product(alpha, g.flat(up_bias)))
    dx = g.padded_zeros(x)
    g.fold(g.windows(dx), dp)
    return g.cropped(dx, x)


def _backward(grad, x, down, up, up_bias, z, num, s, u, stride, padding, dilation, activation, wants_dx):
    units, rank = up_bias.shape[0], down.shape[0]
    g = geometry(x, up, stride, padding, dilation)
    a, b = g.flat(up), g.flat(up_bias)
    gram, cross, _ = norm_terms(up, up_bias, torch.float32)
    small = torch.cat([g.flat(down), b])
    grad = as_rows(grad).float()
    alpha = grad * rescaling(s, activation)
    beta = alpha * num * relative_slope(s, activation)
    p = g.windows(g.padded(x)).reshape(g.positions, -1)

    dz = torch.empty_like(z)
    precision = _precision(x.dtype)
    _code_kernel[
        lambda meta: (triton.cdiv(g.positions, meta["BLOCK_N"]),)
    ](
        p, a, z, gram, cross, alpha, beta, dz, g.positions, units, a.shape[1],
        RANK=rank, PRECISION=precision, NORM_PRECISION=precision,
    )  # fmt: skip
    both = torch.cat([dz, alpha], 1)
    dx = x.new_empty(0)
    if wants_dx:
        padded = g.padded_zeros(x)
        g.fold(g.windows(padded), _data(alpha, z, a, scaled_product(both, small)))
        dx = g.cropped(padded, x)

    dsmall = scaled_product(both.t(), p).float()
    second = _weight(beta, z, z).view(units, rank, rank)
    da, ddown, db = add_norm_gradient(
        a.view(units, rank, -1), b, _weight(alpha, z, p), dsmall, second, beta.t() @ z, beta.sum(0)
    )
    return dx, *(g.unflat(t, x.shape[1]).to(x.dtype) for t in (ddown, da, db))


dau_conv2d = make_operator("dau_conv2d_cuda", _forward, _data_gradient, _backward)
