"""Dynamic linear operations as functions, with argument checks and selection of the backend.

The published formulation writes D*K dynamic weights per position to memory, which the output does not need. For a patch
p (K), with `down` B (r, K), unit d's rows A_d (r, K) of `up`, and its bias b_d (K) in `up_bias`:

    z = B p,   v_d^T p = z^T (A_d p) + b_d^T p          one convolution with D*r channels, contracted with z
    |v_d|^2 = z^T G_d z + 2 c_d^T z + |b_d|^2           G_d = A_d A_d^T, c_d = A_d b_d, once per forward pass
    y_d = v_d^T p * h(|v_d|^2)                          h = |v| / (1 + |v|^2) or 1 / |v|
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from . import reference
from .kernels import bcos_alignment as alignment
from .kernels import dau_cpu as cpu
from .kernels import dau_torch as convolution
from .kernels.half import uses_float16, widened
from .kernels.products import warn_if_emulated
from .kernels.transforms import needs_plain_torch

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "BEST_BACKEND",
    "bcos_conv2d",
    "bcos_linear",
    "dau_conv2d",
    "dau_linear",
    "set_backend",
    "use_backend",
]

ACTIVATIONS = ("squash", "l2")


def _triton(x: Tensor, down: Tensor, *others) -> Tensor:
    from .kernels import dau_triton as cuda

    if cuda.supports(x.dtype, down.shape[0]):
        return cuda.dau_conv2d(x, down, *others)
    return _widening(convolution.dau_conv2d, x, down, *others)


def _widening(backend: Callable[..., Tensor], x: Tensor, *others) -> Tensor:
    """Run a backend, for float16 in float32: sums and gradients inside a layer leave the range of float16."""
    if x.dtype != torch.float16:
        return backend(x, *others)
    with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
        return backend(x.float(), *(widened(o) if isinstance(o, Tensor) else o for o in others)).half()


BACKENDS = {
    "reference": reference.dau_conv2d,  # the published formulation: slow, the reference implementation
    "torch": convolution.dau_conv2d,  # convolutions: for every device, export and any order of derivative
    "cpu": cpu.dau_conv2d,  # matrix products over blocks of positions
    "triton": _triton,  # CUDA kernels; fall back to 'torch' for other ranks and dtypes
}
BEST_BACKEND = {"cpu": "cpu", "cuda": "torch"}
try:
    import triton  # only with CUDA builds of PyTorch; 3.2, of torch 2.6, also needs setuptools
except ImportError:
    triton = None
if triton is not None:
    from .kernels import dau_triton  # noqa: F401  # now, as a FlopCounterMode knows only the operators before it

    BEST_BACKEND["cuda"] = "triton"


def _checked(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}, or None for the default")
    return name


_backend: str | None = _checked(os.environ.get("TIMM_CODA_BACKEND") or None)


def set_backend(name: str | None) -> None:
    """Set the backend of DAUs for the whole process.

    The environment variable TIMM_CODA_BACKEND sets the backend at import. Transforms of `torch.func`, forward-mode
    differentiation, tracing and export support only 'torch', and always get it.

    Args:
        name: 'reference', 'torch', 'cpu' or 'triton', or None for the best backend for each device

    Raises:
        ValueError: `name` is unknown.
    """
    global _backend
    _backend = _checked(name)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Set the backend as `set_backend` does, for the body of a `with` statement."""
    before = _backend
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def dau_conv2d(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    up_bias: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    activation: str = "squash",
    frozen: bool = False,
) -> Tensor:
    """Convolution of dynamic alignment units, equal to `reference.dau_conv2d`, without forming dynamic weights.

    Args:
        x: input, (B, C, H, W)
        down: (r, C, kh, kw), shared by all units
        up: (D*r, C, kh, kw), with the r rows of a unit adjacent
        up_bias: (D, C, kh, kw)
        stride, padding, dilation: (rows, columns)
        activation: 'squash', v*|v| / (1+|v|^2), or 'l2', v / |v|
        frozen: treat the dynamic weights as constants in backward: the gradient of `x` is W(x)^T times the output
            gradient, and the parameters get no gradient. The forward value is the same.

    Returns:
        (B, D, H', W'), in the autocast dtype under autocast

    Raises:
        ValueError: `activation` is unknown, shapes do not match, or the input is smaller than the kernel.
    """
    if torch.jit.is_scripting():
        return convolution.dau_conv2d(x, down, up, up_bias, stride, padding, dilation, activation, frozen)
    else:
        _check_dau(x, down, up, up_bias, padding, dilation, activation)
        _warn_of_dtype(x)
        name = _backend
        if x.is_meta or needs_plain_torch():
            name = "torch"
        elif name is None:
            name = BEST_BACKEND.get(x.device.type, "torch")
        # Autocast handles the convolutions of the other backends. As it does there, leave float64 unchanged.
        explicit = name in ("cpu", "triton") or uses_float16(x)
        if explicit and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            low = torch.get_autocast_dtype(x.device.type)
            x, down, up, up_bias = x.to(low), down.to(low), up.to(low), up_bias.to(low)
        arguments = (x, down, up, up_bias, stride, padding, dilation, activation, frozen)
        return BACKENDS[name](*arguments) if name == "triton" else _widening(BACKENDS[name], *arguments)


def dau_linear(
    x: Tensor, down: Tensor, up: Tensor, up_bias: Tensor, activation: str = "squash", frozen: bool = False
) -> Tensor:
    """Dynamic alignment units on the last axis: (..., K) to (..., D).

    `down` is (r, K), `up` (D*r, K) and `up_bias` (D, K). Other arguments and errors as in `dau_conv2d`.
    """
    p = x.reshape(-1, x.shape[-1], 1, 1)
    y = dau_conv2d(
        p,
        down[:, :, None, None],
        up[:, :, None, None],
        up_bias[:, :, None, None],
        activation=activation,
        frozen=frozen,
    )
    return y.reshape(x.shape[:-1] + up_bias.shape[:1])


def _check_dau(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    up_bias: Tensor,
    padding: tuple[int, int],
    dilation: tuple[int, int],
    activation: str,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: choose one of {', '.join(map(repr, ACTIVATIONS))}")
    _check_image(x, down.shape[1], down.shape[2], down.shape[3], padding, dilation)
    if up.shape[0] != down.shape[0] * up_bias.shape[0]:
        raise ValueError(f"up has {up.shape[0]} rows, expected units * rank = {up_bias.shape[0]} * {down.shape[0]}")


def bcos_conv2d(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    b: float = 2.0,
    max_out: int = 1,
    scale: float = 1.0,
    unit_norm: bool = True,
    frozen: bool = False,
    norm_eps: float = alignment.NORM_EPS,
) -> Tensor:
    """B-cos convolution, equal to `reference.bcos_conv2d`: y = w^T p |w^T p / |p||^(b-1) / s for patches p.

    Source: Böhle et al., CVPR 2022 (arXiv 2205.10268), section 3.

    Args:
        x: input, (B, C, H, W)
        weight: (D * max_out, C / groups, kh, kw), with the candidates of a unit adjacent
        stride, padding, dilation: (rows, columns)
        groups: as in `torch.nn.Conv2d`
        b: exponent, B in the papers, at least 1; a larger b requires more alignment of w and p; 1 is a linear layer
        max_out: number of candidates per unit, of which the largest is the output
        scale: s, divides the output
        unit_norm: scale each row of `weight` to norm 1; False (free weights) in B-cosification
        frozen: treat the cosine as a constant in backward: the gradient of `x` is W(x)^T times the output gradient,
            and `weight` gets no gradient. The forward value is the same.
        norm_eps: added to |p|^2, above 0

    Returns:
        (B, D, H', W'), in the autocast dtype under autocast; the patch norm is computed in float32 or better

    Raises:
        ValueError: the input has another number of channels, or is smaller than the kernel.
    """
    if not torch.jit.is_scripting():
        _check_image(x, weight.shape[1] * groups, weight.shape[2], weight.shape[3], padding, dilation)
        _warn_of_dtype(x)
    if frozen:
        weight = weight.detach()
    if unit_norm:
        linear = alignment.unit_norm_conv2d(x, weight, stride, padding, dilation, groups)
    else:
        linear = torch.conv2d(x, weight, None, stride, padding, dilation, groups)
    linear = alignment.max_out_units(linear, max_out, 1)
    if b == 1.0:
        return linear / scale if scale != 1.0 else linear
    kernel_size = (weight.shape[2], weight.shape[3])
    seen = x.detach() if frozen else x
    if torch.jit.is_scripting() or x.is_meta:
        squares = alignment.patch_squares(seen, kernel_size, stride, padding, dilation, groups)
    else:
        with torch.autocast(x.device.type, enabled=False):
            squares = alignment.patch_squares(seen, kernel_size, stride, padding, dilation, groups)
    if groups == 1 or groups == linear.shape[1]:
        return alignment.align(linear, squares, b, scale, frozen, norm_eps)
    grouped = linear.unflatten(1, (groups, linear.shape[1] // groups))
    return alignment.align(grouped, squares.unsqueeze(2), b, scale, frozen, norm_eps).flatten(1, 2)


def bcos_linear(
    x: Tensor,
    weight: Tensor,
    b: float = 2.0,
    max_out: int = 1,
    scale: float = 1.0,
    unit_norm: bool = True,
    frozen: bool = False,
    norm_eps: float = alignment.NORM_EPS,
) -> Tensor:
    """B-cos units on the last axis: (..., K) to (..., D).

    `weight` is (D * max_out, K). Other arguments as in `bcos_conv2d`.

    Raises:
        ValueError: the last axis of `x` is not of size K.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"expected input (..., {weight.shape[1]}), got {list(x.shape)}")
    if frozen:
        weight = weight.detach()
    if unit_norm:
        weight = (weight / alignment.weight_norm(weight)).to(weight.dtype)
    linear = alignment.max_out_units(torch.nn.functional.linear(x, weight), max_out, x.dim() - 1)
    if b == 1.0:
        return linear / scale if scale != 1.0 else linear
    squares = alignment.channel_squares(x.detach() if frozen else x, -1)
    return alignment.align(linear, squares, b, scale, frozen, norm_eps)


def _check_image(
    x: Tensor, channels: int, rows: int, columns: int, padding: tuple[int, int], dilation: tuple[int, int]
) -> None:
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"expected input (B, {channels}, H, W), got {list(x.shape)}")
    for axis, kernel in enumerate((rows, columns)):
        seen = dilation[axis] * (kernel - 1) + 1
        if x.shape[2 + axis] + 2 * padding[axis] < seen:
            raise ValueError(f"input {list(x.shape)} is smaller than the {seen} pixels the kernel spans: enlarge it")


def _warn_of_dtype(x: Tensor) -> None:
    """Warn if the products of a layer with input `x` are in a dtype that this CPU has no instructions for."""
    if x.is_cpu and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        autocast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
        warn_if_emulated(torch.get_autocast_dtype("cpu") if autocast else x.dtype)
