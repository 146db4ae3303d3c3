"""timm's optimisers, fit for the device: Muon in float32 on CPUs without bfloat16 instructions, in batches on GPUs."""

import functools
from typing import Any

import torch
from timm.optim import create_optimizer_v2, muon
from torch import Tensor, nn

from ..layers import is_emulated

__all__ = ["BatchedMuon", "Float32Muon", "create_optimizer"]


class Float32Muon(muon.Muon):
    """timm's Muon, which orthogonalises updates in float32 instead of bfloat16.

    timm's function has an argument for the dtype, but its optimiser has no option that sets it.
    """

    def step(self, closure: Any = None) -> Any:
        original = muon.zeropower_via_newtonschulz
        muon.zeropower_via_newtonschulz = functools.partial(original, dtype=torch.float32)
        try:
            return super().step(closure)
        finally:
            muon.zeropower_via_newtonschulz = original


class BatchedMuon(muon.Muon):
    """timm's Muon, which orthogonalises the updates of many weights at once: a GPU is idle in most small products.

    A batch holds the weights of one shape, or all small ones, padded with zeros. Zeros stay zeros: each step multiplies
    the singular values by a polynomial, and those of the padding are 0.
    """

    def step(self, closure: Any = None) -> Any:
        original = muon.muon
        muon.muon = functools.partial(_update_in_batches, original)
        try:
            return super().step(closure)
        finally:
            muon.muon = original


def _update_in_batches(
    original: Any, weights: list[Tensor], gradients: list[Tensor], momenta: list[Tensor], **options: Any
) -> None:
    """Make the update of `timm.optim.muon.muon`, whose arguments these are; leave its rarer options to it."""
    if options["conv_mode"] != "flatten" or options.get("scale_eps"):
        original(weights, gradients, momenta, **options)
        return
    lr, momentum = options["lr"], options["momentum"]
    torch._foreach_mul_(weights, 1 - lr * options["weight_decay"])
    torch._foreach_lerp_(momenta, gradients, 1 - momentum)
    updates = torch._foreach_lerp(gradients, momenta, momentum) if options["nesterov"] else momenta
    matrices = [update.flatten(1) for update in updates]
    batches: dict[Any, list[int]] = {}
    for n, matrix in enumerate(matrices):
        small = min(matrix.shape) <= 64 and max(matrix.shape) <= 1024
        batches.setdefault((matrix.dtype, None if small else matrix.shape), []).append(n)
    how = {name: options[name] for name in ("eps", "safety_factor")}
    coefficients = muon.resolve_ns_coefficients(options["ns_coefficients"], muon._COEFFICIENTS)
    for chosen in batches.values():
        wide = [_wide(matrices[n]) for n in chosen]
        rows, columns = (max(matrix.shape[side] for matrix in wide) for side in (0, 1))
        batch = wide[0].new_zeros(len(wide), rows, columns)
        parts = [part[: len(matrix), : matrix.shape[1]] for part, matrix in zip(batch, wide, strict=True)]
        torch._foreach_copy_(parts, wide)
        found = muon.zeropower_via_newtonschulz(batch, options["ns_steps"], coefficients, **how)
        for n, matrix, result in zip(chosen, wide, found, strict=True):
            shape, scale = matrices[n].shape, 1.0
            if options["adjust_lr_fn"]:
                scale = muon.get_lr_scale(shape, options["adjust_lr_fn"])
            result = result[: len(matrix), : matrix.shape[1]].to(weights[n].dtype)
            weights[n].sub_((result if matrix.shape == shape else result.t()).reshape(weights[n].shape) * (lr * scale))


def _wide(matrix: Tensor) -> Tensor:
    """Return the matrix, transposed if it has more rows than columns."""
    return matrix.t() if len(matrix) > matrix.shape[1] else matrix


def create_optimizer(model: nn.Module, device: torch.device, **options: Any) -> torch.optim.Optimizer:
    """Return `timm.optim.create_optimizer_v2(model, **options)`, fit for a model that is trained on `device`.

    On a GPU it is `capturable` if it can be: its step can be recorded as a CUDA graph.
    """
    optimizer = create_optimizer_v2(model, **options)
    inner = getattr(optimizer, "_base_optimizer", optimizer)  # of timm's Lookahead
    if isinstance(inner, muon.Muon) and device.type == "cpu" and is_emulated(torch.bfloat16):
        inner.__class__ = Float32Muon
    if device.type == "cuda":
        if isinstance(inner, muon.Muon):
            inner.__class__ = BatchedMuon
        if "capturable" in optimizer.defaults:
            for group in (optimizer.defaults, *optimizer.param_groups):
                group["capturable"] = True
    return optimizer
