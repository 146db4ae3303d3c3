"""float16, which ends at 65504 and loses precision below 6e-5: numbers inside a layer leave this range, not its output.

Sums, norms and their factors are therefore computed in float32. bfloat16 has the range of float32 and needs no care.
"""

import torch
from torch import Tensor

__all__ = ["scaled_product", "uses_float16", "widened"]


def widened(x: Tensor) -> Tensor:
    """Return float16 as float32, and every other dtype unchanged."""
    if x.dtype == torch.float16:
        return x.float()
    return x


def uses_float16(x: Tensor) -> bool:
    """Return whether products with `x` are computed in float16, by its own dtype or by autocast."""
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x.dtype == torch.float16
    return torch.get_autocast_dtype(x.device.type) == torch.float16


def scaled_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left right, (M, K) and (K, N), as a product in the dtype of `right`; in float32 if that is float16.

    For float16, each row of `left` is first scaled by a power of two to a norm of about 1. The product then leaves the
    range only if the norm of a column of `right` does.
    """
    if right.dtype != torch.float16:
        return left.to(right.dtype) @ right
    left = left.float()
    exponents = torch.frexp(torch.linalg.vector_norm(left, 2, 1, True))[1]
    return torch.ldexp((torch.ldexp(left, -exponents).half() @ right).float(), exponents)
