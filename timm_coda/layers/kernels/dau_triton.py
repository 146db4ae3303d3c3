"""CUDA backend in Triton, which writes neither dynamic weights nor U to memory.

Symbols as in `dau_cpu.py`. A tile is `BLOCK_N` positions by UNITS units, which are UNITS * r columns; U is contracted
tile by tile, where it was computed. Patches P (N, K) are written once per pass.

    _norm_kernel         s = z G z + 2 c z + |b|^2, over half of G
    _contract_kernel     U z for U = P A^T -> num, y = num h(s);  in backward sum beta G z, with beta for P and G for A
    _slope_kernel        alpha = g h, beta = 2 g num h'(s)
    _code_kernel         dz = alpha U, with U computed again
    _data_kernel         (alpha (x) z) A, with the outer product formed in registers
    _weight_kernel       (alpha (x) z)^T P for A, (beta (x) z)^T z for the norm; positions are split over programs, and
                         their sums added in a fixed order, so that the last bits do not vary from run to run
    _fold_kernel         sum of the patches' gradients at each pixel

Products have the precision of the tensors and accumulate in float32. The norm has float32, or TF32 where they have
less.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false
# Triton's language has its own types, which pyright does not know.

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dau_norm import add_norm_gradient, for_pairs, norm_terms
from .half import scaled_product
from .operator import make_operator
from .patches import Geometry, as_rows, geometry, memory_format
from .tiles import Problem, Tile, launch

__all__ = ["dau_conv2d", "supports"]


def supports(dtype: torch.dtype, rank: int) -> bool:
    """Return whether the kernels support dtype and rank: at most float32; 8, 16, 32, ... 256."""
    return dtype in (torch.float32, torch.bfloat16, torch.float16) and rank in (8, 16, 32, 64, 128, 256)


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


@triton.jit
def _norm_kernel(
    z_ptr,  # (N, r), float32
    half_ptr,  # (D, (r/2 + 2) r), float32: `for_pairs`
    square_ptr,  # (D,), float32: |b|^2
    s_ptr,  # (N, D), float32
    N,
    D,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,  # pairs of a step: one or more whole rows of r
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    units = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_rows = (rows < N)[:, None]
    in_units = units < D
    pair = tl.arange(0, BLOCK_K)
    i = pair % RANK
    z_ptrs = z_ptr + rows[:, None].to(tl.int64) * RANK
    z = tl.load(z_ptrs + i[None, :], mask=in_rows, other=0.0)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    LAST: tl.constexpr = RANK // 2 + 1  # the row of z itself
    for k in range(0, LAST + 1, BLOCK_K // RANK):
        row = k + pair // RANK
        other = tl.load(z_ptrs + ((i + row) % RANK)[None, :], mask=in_rows & (row < LAST)[None, :], other=1.0)
        at = units[None, :] * ((LAST + 1) * RANK) + (k * RANK + pair)[:, None]
        half = tl.load(half_ptr + at, mask=in_units[None, :] & (row <= LAST)[:, None], other=0.0)
        total = tl.dot(z * other, half, total, input_precision=PRECISION)
    total += tl.load(square_ptr + units, mask=in_units, other=0.0)[None, :]
    tl.store(s_ptr + rows[:, None].to(tl.int64) * D + units[None, :], total, mask=in_rows & in_units[None, :])


@triton.jit
def _contract_kernel(
    p_ptr,  # (N, K)
    a_ptr,  # (D*r, K)
    z_ptr,  # (N, r), float32
    plain_ptr,  # (N, D), float32: added
    s_ptr,  # (N, D), float32
    num_ptr,  # (N, D), float32
    y_ptr,  # (N, D)
    N,
    D,
    K,
    RANK: tl.constexpr,
    ACTIVATION: tl.constexpr,  # squash, l2, or none: without s and y
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # At least one unit per tile, whatever the rank.
    UNITS: tl.constexpr = COLUMNS // RANK if COLUMNS > RANK else 1
    across = tl.cdiv(D, UNITS)  # programs that read the same positions run side by side
    rows = tl.program_id(0) // across * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(0) % across * UNITS
    units = first + tl.arange(0, UNITS)
    columns = first * RANK + tl.arange(0, UNITS * RANK)
    in_rows = rows < N
    u = _products(p_ptr, a_ptr, rows, in_rows, columns, columns < D * RANK, K, BLOCK_K, PRECISION)
    z_ptrs = z_ptr + rows[:, None].to(tl.int64) * RANK + tl.arange(0, RANK)[None, :]
    z = tl.load(z_ptrs, mask=in_rows[:, None], other=0.0)[:, None, :]
    num = tl.sum(u.reshape(BLOCK_N, UNITS, RANK) * z, 2)
    at = rows[:, None].to(tl.int64) * D + units[None, :]
    inside = in_rows[:, None] & (units < D)[None, :]
    num += tl.load(plain_ptr + at, mask=inside, other=0.0)
    tl.store(num_ptr + at, num, mask=inside)
    if ACTIVATION != "none":
        s = tl.maximum(tl.load(s_ptr + at, mask=inside, other=1.0), 1e-20)
        h = 1 / tl.sqrt(s) if ACTIVATION == "l2" else tl.sqrt(s) / (1 + s)
        tl.store(y_ptr + at, (num * h).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _slope_kernel(
    grad_ptr,  # (N, D)
    num_ptr,  # (N, D), float32
    s_ptr,  # (N, D), float32
    alpha_ptr,  # (N, D), float32
    beta_ptr,  # (N, D), float32
    SIZE,
    ACTIVATION: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    norm = tl.load(s_ptr + at, mask=inside, other=1.0)
    s = tl.maximum(norm, 1e-20)
    h = 1 / tl.sqrt(s) if ACTIVATION == "l2" else tl.sqrt(s) / (1 + s)
    alpha = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * h
    tl.store(alpha_ptr + at, alpha, mask=inside)
    if BOTH:
        slope = -1 / s if ACTIVATION == "l2" else 1 / s - 2 / (1 + s)  # 2 h' / h, as `relative_slope`
        num = tl.load(num_ptr + at, mask=inside, other=0.0)
        tl.store(beta_ptr + at, tl.where(norm > 1e-20, alpha * num * slope, 0.0), mask=inside)


@triton.jit
def _code_kernel(
    p_ptr,  # (N, K)
    a_ptr,  # (D*r, K)
    alpha_ptr,  # (N, D), float32
    base_ptr,  # (N, r), float32: added
    dz_ptr,  # (N, r), float32
    N,
    D,
    K,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    UNITS: tl.constexpr = COLUMNS // RANK if COLUMNS > RANK else 1
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = rows < N
    z_at = rows[:, None].to(tl.int64) * RANK + tl.arange(0, RANK)[None, :]
    dz = tl.load(base_ptr + z_at, mask=in_rows[:, None], other=0.0)
    for unit in range(0, D, UNITS):
        units = unit + tl.arange(0, UNITS)
        columns = unit * RANK + tl.arange(0, UNITS * RANK)
        u = _products(p_ptr, a_ptr, rows, in_rows, columns, columns < D * RANK, K, BLOCK_K, PRECISION)
        at = rows[:, None].to(tl.int64) * D + units[None, :]
        alpha = tl.load(alpha_ptr + at, mask=in_rows[:, None] & (units < D)[None, :], other=0.0)
        dz += tl.sum(u.reshape(BLOCK_N, UNITS, RANK) * alpha[:, :, None], 1)
    tl.store(dz_ptr + z_at, dz, mask=in_rows[:, None])


@triton.jit
def _data_kernel(
    alpha_ptr,  # (N, D), float32
    z_ptr,  # (N, r), float32
    a_ptr,  # (D*r, K)
    base_ptr,  # (N, K): added
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
    across = tl.cdiv(K, BLOCK_K)
    rows = tl.program_id(0) // across * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = tl.program_id(0) % across * BLOCK_K + tl.arange(0, BLOCK_K)
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


@triton.jit
def _weight_kernel(
    alpha_ptr,  # (N, D), float32
    z_ptr,  # (N, r), float32
    right_ptr,  # (N, K)
    out_ptr,  # (splits, D*r, K), float32
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
    start = tl.program_id(2).to(tl.int64) * SPLIT
    end = tl.minimum(start + SPLIT, N)
    in_units = units < D
    in_inputs = inputs < K
    ranks = tl.arange(0, RANK)
    total = tl.zeros((UNITS * RANK, BLOCK_K), tl.float32)
    for n in range(0, SPLIT, BLOCK_N):
        rows = start + n + tl.arange(0, BLOCK_N)
        in_rows = rows < end
        alpha_ptrs = alpha_ptr + rows[None, :] * D + units[:, None]
        alpha = tl.load(alpha_ptrs, mask=in_units[:, None] & in_rows[None, :], other=0.0)
        z = tl.load(z_ptr + rows[None, :] * RANK + ranks[:, None], mask=in_rows[None, :], other=0.0)
        right_ptrs = right_ptr + rows[:, None] * K + inputs[None, :]
        right = tl.load(right_ptrs, mask=in_rows[:, None] & in_inputs[None, :], other=0.0)
        outer = (alpha[:, None, :] * z[None, :, :]).reshape(UNITS * RANK, BLOCK_N)
        total = tl.dot(outer.to(right.dtype), right, total, input_precision=PRECISION)
    columns = tl.program_id(0) * UNITS * RANK + tl.arange(0, UNITS * RANK)
    out_ptrs = out_ptr + tl.program_id(2).to(tl.int64) * D * RANK * K + columns[:, None].to(tl.int64) * K
    tl.store(out_ptrs + inputs[None, :], total, mask=(columns < D * RANK)[:, None] & in_inputs[None, :])


@triton.jit
def _fold_kernel(
    patches_ptr,  # (N, K)
    dx_ptr,  # (B, C, H, W), any strides
    PIXELS,  # B * H * W
    C,
    H,
    W,
    ROWS,  # of positions
    OVER,  # columns of positions
    IMAGE,  # strides of dx
    CHANNEL,
    ROW,
    COLUMN,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    LAST: tl.constexpr,  # whether channels are last in a patch
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pixel = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    image, row, column = pixel // (H * W), pixel // W % H, pixel % W
    inside = (pixel < PIXELS) & (c < C)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for i in range(KH):
        for j in range(KW):
            # The position whose patch has this pixel at (i, j), if there is one.
            y, x = row + PH - i * DH, column + PW - j * DW
            there = inside & (y >= 0) & (x >= 0) & (y % SH == 0) & (x % SW == 0)
            there = there & (y // SH < ROWS) & (x // SW < OVER)
            n = (image * ROWS + y // SH) * OVER + x // SW
            k = (i * KW + j) * C + c if LAST else (c * KH + i) * KW + j
            total += tl.load(patches_ptr + n * (KH * KW * C) + k, mask=there, other=0.0).to(tl.float32)
    at = image * IMAGE + c * CHANNEL + row * ROW + column * COLUMN
    tl.store(dx_ptr + at, total.to(dx_ptr.dtype.element_ty), mask=inside)


def _precision(dtype: torch.dtype) -> str:
    """Return the precision of products: full float32, unless the user allows TF32 for matrix products."""
    allowed = dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def _sizes(tile: Tile) -> dict[str, int]:
    """Return a tile as keyword arguments of a kernel."""
    return {
        "BLOCK_N": tile.positions, "COLUMNS": tile.columns, "BLOCK_K": tile.inputs,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _across(tile: Tile, units: int, rank: int) -> int:
    return triton.cdiv(units, max(tile.columns // rank, 1))


def _norm(z: Tensor, half: Tensor, square: Tensor, precision: str) -> Tensor:
    """Return s = |v|^2, (N, D), from z, `for_pairs` and |b|^2."""
    (positions, rank), units = z.shape, len(square)
    s = z.new_empty(positions, units)

    def run(tile: Tile) -> None:
        _norm_kernel[triton.cdiv(positions, tile.positions), triton.cdiv(units, tile.columns)](
            z, half, square, s, positions, units, RANK=rank, PRECISION=precision, BLOCK_N=tile.positions,
            BLOCK_D=tile.columns, BLOCK_K=max(rank, 16), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    launch(Problem("norm", units, rank, half.shape[1], 4), z.device, run)
    return s


def _contract(
    p: Tensor, a: Tensor, z: Tensor, plain: Tensor, s: Tensor | None = None, activation: str = "none"
) -> tuple[Tensor, Tensor]:
    """Return num = (P A^T) z + plain, (N, D), and y = num h(s) in the dtype of P, empty without s."""
    (positions, units), rank, inputs = plain.shape, z.shape[1], p.shape[1]
    num = torch.empty_like(plain)
    y = p.new_empty(0 if s is None else plain.shape)

    def run(tile: Tile) -> None:
        _contract_kernel[(triton.cdiv(positions, tile.positions) * _across(tile, units, rank),)](
            p, a, z, plain, s, num, y, positions, units, inputs,
            RANK=rank, ACTIVATION=activation, PRECISION=_precision(p.dtype), **_sizes(tile),
        )  # fmt: skip

    launch(Problem("contract", units, rank, inputs, p.itemsize), p.device, run)
    return num, y


def _slopes(grad: Tensor, num: Tensor | None, s: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return alpha and beta, which is empty without `num`."""
    alpha = torch.empty_like(s)
    beta = s.new_empty(0 if num is None else s.shape)
    _slope_kernel[(triton.cdiv(s.numel(), 1024),)](
        grad, num, s, alpha, beta, s.numel(), ACTIVATION=activation, BOTH=num is not None, BLOCK=1024
    )
    return alpha, beta


def _code(p: Tensor, a: Tensor, alpha: Tensor, base: Tensor) -> Tensor:
    """Return alpha U + base, (N, r), for U = P A^T."""
    (positions, units), rank, inputs = alpha.shape, base.shape[1], p.shape[1]
    dz = torch.empty_like(base)

    def run(tile: Tile) -> None:
        _code_kernel[(triton.cdiv(positions, tile.positions),)](
            p, a, alpha, base, dz, positions, units, inputs,
            RANK=rank, PRECISION=_precision(p.dtype), **_sizes(tile),
        )  # fmt: skip

    launch(Problem("code", units, rank, inputs, p.itemsize), p.device, run)
    return dz


def _data(alpha: Tensor, z: Tensor, a: Tensor, base: Tensor) -> Tensor:
    """Return (alpha (x) z) A + base, (N, K), in the dtype of A."""
    (positions, units), (rank, inputs) = alpha.shape, (z.shape[1], a.shape[1])
    out = torch.empty_like(base, dtype=a.dtype)

    def run(tile: Tile) -> None:
        _data_kernel[(triton.cdiv(positions, tile.positions) * triton.cdiv(inputs, tile.inputs),)](
            alpha, z, a, base, out, positions, units, inputs,
            RANK=rank, PRECISION=_precision(a.dtype), **_sizes(tile),
        )  # fmt: skip

    launch(Problem("data", units, rank, inputs, a.itemsize), a.device, run)
    return out


def _weight(alpha: Tensor, z: Tensor, right: Tensor) -> Tensor:
    """Return (alpha (x) z)^T right, (D*r, K), in float32."""
    (positions, units), (rank, inputs) = alpha.shape, (z.shape[1], right.shape[1])

    def run(tile: Tile) -> Tensor:
        across, over = _across(tile, units, rank), triton.cdiv(inputs, tile.inputs)
        # About two programs per multiprocessor, each with at least 1024 positions.
        splits = max(1, min(triton.cdiv(2 * _processors(alpha.device), across * over), positions // 1024))
        split = max(triton.cdiv(triton.cdiv(positions, splits), 64), 1) * 64
        out = alpha.new_empty(max(triton.cdiv(positions, split), 1), units * rank, inputs)
        _weight_kernel[across, over, len(out)](
            alpha, z, right, out, positions, units, inputs, split,
            RANK=rank, PRECISION=_precision(right.dtype), **_sizes(tile),
        )  # fmt: skip
        return out.sum(0)

    return launch(Problem("weight", units, rank, inputs, right.itemsize), alpha.device, run)


def _fold(g: Geometry, patches: Tensor, like: Tensor) -> Tensor:
    """Sum patches (N, K) to the image (B, C, H, W) that they were taken from, in the memory format of `like`."""
    dx = torch.empty_like(like, dtype=patches.dtype, memory_format=memory_format(like))
    batch, channels, height, width = dx.shape
    pixels, block_c = batch * height * width, min(triton.next_power_of_2(channels), 64)
    block_n = 1024 // block_c
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = g.kernel, g.stride, g.padding, g.dilation
    _fold_kernel[triton.cdiv(pixels, block_n), triton.cdiv(channels, block_c)](
        patches, dx, pixels, channels, height, width, g.rows, g.columns, *dx.stride(),
        KH=kh, KW=kw, SH=sh, SW=sw, PH=ph, PW=pw, DH=dh, DW=dw, LAST=g.channels_last, BLOCK_N=block_n, BLOCK_C=block_c,
    )  # fmt: skip
    return dx


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _responses(p: Tensor, weight: Tensor) -> Tensor:
    """Return P weight^T, (N, units), in float32."""
    if p.dtype == torch.float16:
        return scaled_product(weight, p.t()).t().contiguous()
    return (p @ weight.t()).float()


def _forward(x, down, up, up_bias, stride, padding, dilation, activation, keep):
    units, rank = up_bias.shape[0], down.shape[0]
    g = geometry(x, up, stride, padding, dilation)
    terms = norm_terms(up, up_bias, torch.float32)
    p = g.patches(x)
    z, plain = (_responses(p, g.flat(weight)) for weight in (down, up_bias))
    s = _norm(z, for_pairs(terms), terms.square, _precision(x.dtype))
    num, y = _contract(p, g.flat(up), z, plain, s, activation)
    y = y.view(x.shape[0], g.rows, g.columns, units).permute(0, 3, 1, 2)
    return y.contiguous(memory_format=memory_format(x)), z, num, s, x.new_empty(0, units * rank)


def _data_gradient(grad, x, up, up_bias, z, s, stride, padding, dilation, activation):
    g = geometry(x, up, stride, padding, dilation)
    alpha, _ = _slopes(as_rows(grad), None, s, activation)
    return _fold(g, _data(alpha, z, g.flat(up), scaled_product(alpha, g.flat(up_bias))), x)


def _backward(grad, x, down, up, up_bias, z, num, s, u, stride, padding, dilation, activation, wants_dx):
    units, rank = up_bias.shape[0], down.shape[0]
    g = geometry(x, up, stride, padding, dilation)
    a, b = g.flat(up), g.flat(up_bias)
    terms = norm_terms(up, up_bias, torch.float32)
    alpha, beta = _slopes(as_rows(grad), num, s, activation)
    p = g.patches(x)

    # Sum beta G z is a contraction too: with beta for P, and for A the rows G_ij of all units.
    low = torch.float32 if x.dtype == torch.float16 else x.dtype  # beta leaves the range of float16
    rows = terms.gram.flatten(1).t().contiguous()
    through_norm, _ = _contract(beta.to(low), rows.to(low), z, beta @ terms.cross)
    dz = _code(p, a, alpha, through_norm)
    both = torch.cat([dz, alpha], 1)
    dx = x.new_empty(0)
    if wants_dx:
        small = torch.cat([g.flat(down), b])
        dx = _fold(g, _data(alpha, z, a, scaled_product(both, small)), x)

    dsmall = scaled_product(both.t(), p).float()
    second = _weight(beta, z, z.to(low)).view(units, rank, rank)
    da, ddown, db = add_norm_gradient(
        a.view(units, rank, -1), b, _weight(alpha, z, p), dsmall, second, beta.t() @ z, beta.sum(0)
    )
    return dx, *(g.unflat(t, x.shape[1]).to(x.dtype) for t in (ddown, da, db))


dau_conv2d = make_operator("dau_conv2d_cuda", _forward, _data_gradient, _backward)
