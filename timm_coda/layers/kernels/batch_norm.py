"""Batch normalisation that only rescales, y = x w / sqrt(var + eps). Backward makes few passes over memory."""

import torch
from torch import Tensor

from .half import widened
from .transforms import needs_plain_torch

__all__ = ["channel_variance", "rescale_channels", "uncentered_batch_norm"]


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def channel_variance(x: Tensor) -> Tensor:
    """Return the biased variance of each channel, (B, C, H, W) to (C,), in float32 or better."""
    # Two passes are as accurate as torch.var, which takes ten times as long on a CPU.
    mean = _exact(x).mean([0, 2, 3], keepdim=True)
    return (_exact(x) - mean).square().mean([0, 2, 3])


def rescale_channels(x: Tensor, weight: Tensor, var: Tensor, eps: float) -> Tensor:
    """Return x w / sqrt(var + eps), in the dtype of `x`."""
    return (x * (widened(weight) * (widened(var) + eps).rsqrt())[:, None, None]).to(x.dtype)


class _UncenteredBatchNorm(torch.autograd.Function):
    """Return y and the batch's variance; only y is differentiable. Saves x and a few numbers per channel."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        var = channel_variance(x)
        return rescale_channels(x, weight, var, eps), var

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, output[1])

    @staticmethod
    def backward(ctx, *grads):
        x, weight, var = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient must itself be differentiable
            wanted = [i for i in range(2) if ctx.needs_input_grad[i]]
            y = rescale_channels(x, weight, channel_variance(x), ctx.eps)
            found = torch.autograd.grad(y, [(x, weight)[i] for i in wanted], grads[0], create_graph=True)
            gradients = dict(zip(wanted, found, strict=True))
            return gradients.get(0), gradients.get(1), None
        rate = (var + ctx.eps).rsqrt()
        scaled = _exact(weight) * rate
        evidence = (_exact(x) * grads[0]).sum([0, 2, 3])
        # d var / d x = 2 (x - mean) / n
        slope = -scaled * rate.square() * evidence * (x.shape[1] / x.numel())
        shift = -slope * _exact(x).mean([0, 2, 3])
        dx = torch.addcmul(shift[:, None, None], _exact(x), slope[:, None, None])
        dx.addcmul_(_exact(grads[0]), scaled[:, None, None])
        return dx.to(x.dtype), (evidence * rate).to(weight.dtype), None


def uncentered_batch_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x w / sqrt(var + eps) with the batch's variance, and that variance, (C,), without gradient."""
    if torch.jit.is_scripting() or needs_plain_torch():
        var = channel_variance(x)
        return rescale_channels(x, weight, var, eps), var
    return _UncenteredBatchNorm.apply(x, weight, eps)
