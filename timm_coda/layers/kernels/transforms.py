"""When the fast formulations must give way to PyTorch's own operators, which every transform and exporter knows."""

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad

__all__ = ["is_batched", "is_transformed", "needs_plain_torch"]

_NONE = type(None)


def is_transformed() -> bool:
    """Return whether a transform of `torch.func` or forward-mode differentiation is active."""
    # Dynamo takes `peek_interpreter_stack() is not None` for true.
    return not isinstance(peek_interpreter_stack(), _NONE) or forward_ad._current_level >= 0


@torch.jit.unused
def needs_plain_torch() -> bool:
    """Return whether a transform, tracing or an export is active.

    Custom operators and `torch.autograd.Function` have rules for reverse mode only: under other transforms they fail,
    or in forward mode give a derivative of 0. Exporters have no rule for custom operators.
    """
    return is_transformed() or torch.compiler.is_exporting() or torch.jit.is_tracing()


def is_batched(x: Tensor) -> bool:
    """Return whether `x` is many tensors to vmap, also to that of `torch.autograd.grad(..., is_grads_batched=True)`."""
    if torch.compiler.is_compiling():
        return True  # dynamo cannot tell
    return is_batchedtensor(x) or is_legacy_batchedtensor(x)
