"""Register a backend's three functions as operators that support autograd, torch.compile, torch.export and vmap."""

import typing
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import dau_torch as convolution
from .patches import memory_format, output_size

__all__ = ["make_operator"]

_Ints = typing.Sequence[int]  # torch 2.6 reads no other spelling from a signature


def _flops(z: tuple, up: tuple, up_bias: tuple) -> tuple[int, int, int, int]:
    """Return the floating-point operations of z = B p, A p, b^T p and z^T G z, from the shapes of z, A and b.

    Two for each multiply-accumulate, and without the terms that `benchmark.Macs` does not count either.
    """
    (positions, rank), inputs = z, prod(up_bias[1:])
    rows = rank, up[0], up_bias[0]
    down, large, bias = (2 * positions * inputs * row for row in rows)
    return down, large, bias, 2 * positions * up[0] * rank


def make_operator(
    name: str,
    forward: Callable,
    data_gradient: Callable,
    backward: Callable,
    *,
    keeps: Callable[[int, Tensor], bool] = lambda positions, up: False,
) -> Callable[..., Tensor]:
    """Return the `dau_conv2d` of a backend, with the arguments of `functional.dau_conv2d`.

    Args:
        name: the operators are timm_coda::{name}, {name}_data and {name}_backward
        forward: maps (x, down, up, up_bias, stride, padding, dilation, activation, keep) to (y, z, num, s, U):
            y (B, D, H', W'); for all N positions, in float32 or better, z (N, r), num = v^T p (N, D) and s = |v|^2
            (N, D); and U (N, D*r) in the dtype of x, or (0, D*r) without `keep`
        data_gradient: maps (grad, x, up, up_bias, z, s, stride, padding, dilation, activation) to W^T grad, like x; of
            x it uses only shape and memory format
        backward: maps (grad, x, down, up, up_bias, z, num, s, u, stride, padding, dilation, activation, wants_dx) to
            the gradients of x, down, up and up_bias; the gradient of x is empty without `wants_dx`
        keeps: maps (N, up) to whether training saves U for backward
    """

    @torch.library.custom_op(f"timm_coda::{name}", mutates_args=())
    def forward_op(
        x: Tensor,
        down: Tensor,
        up: Tensor,
        up_bias: Tensor,
        stride: _Ints,
        padding: _Ints,
        dilation: _Ints,
        activation: str,
        frozen: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x, down, up, up_bias, stride, padding, dilation, activation, keep)

    @forward_op.register_fake
    def _(x, down, up, up_bias, stride, padding, dilation, activation, frozen, keep):
        rows, columns = output_size(x, up.shape[2:], stride, padding, dilation)
        units, positions = up_bias.shape[0], x.shape[0] * rows * columns
        exact = torch.promote_types(x.dtype, torch.float32)
        y = x.new_empty(x.shape[0], units, rows, columns).contiguous(memory_format=memory_format(x))
        found = (x.new_empty(positions, n, dtype=exact) for n in (down.shape[0], units, units))
        return y, *found, x.new_empty(positions if keep else 0, up.shape[0])

    @torch.library.custom_op(f"timm_coda::{name}_data", mutates_args=())
    def data_op(
        grad: Tensor,
        x: Tensor,
        up: Tensor,
        up_bias: Tensor,
        z: Tensor,
        s: Tensor,
        stride: _Ints,
        padding: _Ints,
        dilation: _Ints,
        activation: str,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return data_gradient(grad, x, up, up_bias, z, s, stride, padding, dilation, activation)

    @data_op.register_fake
    def _(grad, x, up, up_bias, z, s, stride, padding, dilation, activation):
        return torch.empty_like(x, memory_format=memory_format(x))

    @data_op.register_vmap
    def _(info, in_dims, grad, *others):
        if any(dim is not None for dim in in_dims[1:]):
            raise NotImplementedError("vmap over a DAU's input or weights is not supported: use the backend 'torch'")
        grads = grad.movedim(in_dims[0], 0).unbind()  # several targets for one forward pass
        return torch.stack([data_op(target, *others) for target in grads]), 0

    @torch.library.custom_op(f"timm_coda::{name}_backward", mutates_args=())
    def backward_op(
        grad: Tensor,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        up_bias: Tensor,
        z: Tensor,
        num: Tensor,
        s: Tensor,
        u: Tensor,
        stride: _Ints,
        padding: _Ints,
        dilation: _Ints,
        activation: str,
        wants_dx: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return backward(grad, x, down, up, up_bias, z, num, s, u, stride, padding, dilation, activation, wants_dx)

    @backward_op.register_fake
    def _(grad, x, down, up, up_bias, z, num, s, u, stride, padding, dilation, activation, wants_dx):
        dx = torch.empty_like(x, memory_format=memory_format(x)) if wants_dx else x.new_empty(0)
        return dx, *(t.new_empty(t.shape) for t in (down, up, up_bias))

    def setup_context(ctx, inputs, output) -> None:
        x, down, up, up_bias, *ctx.options, ctx.frozen, _ = inputs
        _, *found = output
        ctx.mark_non_differentiable(*found)
        ctx.set_materialize_grads(False)  # they would be zeros as large as U
        ctx.save_for_backward(x, down, up, up_bias, *found)

    def differentiate(ctx, grad, *_):
        no_options = (None,) * 6
        if grad is None:
            return *(None,) * 4, *no_options
        x, down, up, up_bias, z, num, s, u = ctx.saved_tensors
        # The gradient must itself be differentiable: with create_graph=True, or where forward mode runs over it.
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            inputs = (x, down, up, up_bias)
            wanted = [i for i in range(4) if ctx.needs_input_grad[i]]
            with torch.enable_grad():
                y = convolution.dau_conv2d(*inputs, *ctx.options, ctx.frozen)  # pyright: ignore[reportCallIssue]
            leaves, again = [inputs[i] for i in wanted], torch.is_grad_enabled()
            found = torch.autograd.grad(y, leaves, grad, create_graph=again, allow_unused=True)
            gradients = dict(zip(wanted, found, strict=True))
            return *(gradients.get(i) for i in range(4)), *no_options
        if ctx.frozen:
            return data_op(grad, x, up, up_bias, z, s, *ctx.options), None, None, None, *no_options
        wants_dx = ctx.needs_input_grad[0]
        dx, *others = backward_op(grad, x, down, up, up_bias, z, num, s, u, *ctx.options, wants_dx)
        return dx if wants_dx else None, *others, *no_options

    forward_op.register_autograd(differentiate, setup_context=setup_context)

    @register_flop_formula(getattr(torch.ops.timm_coda, name))
    def _(x, down, up, up_bias, *others, out_shape):
        return sum(_flops(out_shape[1], up, up_bias))

    @register_flop_formula(getattr(torch.ops.timm_coda, f"{name}_data"))
    def _(grad, x, up, up_bias, z, *others, out_shape):
        _, large, bias, _ = _flops(z, up, up_bias)
        return large + bias

    @register_flop_formula(getattr(torch.ops.timm_coda, f"{name}_backward"))
    def _(grad, x, down, up, up_bias, z, *others, out_shape):
        *products, quadratic = _flops(z, up, up_bias)
        wants_dx = others[-1]
        return (2 if wants_dx else 1) * sum(products) + 2 * quadratic

    def dau_conv2d(
        x: Tensor,
        down: Tensor,
        up: Tensor,
        up_bias: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        activation: str,
        frozen: bool,
    ) -> Tensor:
        keep = False
        if torch.is_grad_enabled() and not frozen and any(weight.requires_grad for weight in (down, up, up_bias)):
            rows, columns = output_size(x, up.shape[2:], stride, padding, dilation)
            keep = keeps(x.shape[0] * rows * columns, up)
        return forward_op(x, down, up, up_bias, [*stride], [*padding], [*dilation], activation, frozen, keep)[0]

    return dau_conv2d
