"""Parts of every dynamic-linear network: frozen mode of a layer, image encoding, pooling, and logits."""

import threading
from typing import Any

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from .kernels.half import widened

__all__ = ["DynamicLinear", "FrozenDynamics", "GlobalPool", "InverseEncoding", "Logits", "adapt_colours", "placement"]

_ACTIVE = "timm_coda.active_switches"


class _Thread(threading.local):
    """Switches that the current thread has entered. Autograd hands the set on to the threads that it computes in."""

    def __init__(self) -> None:
        self.switches: set[FrozenDynamics] = set()
        torch._C._stash_obj_in_tls(_ACTIVE, self.switches)


_thread = _Thread()


class _Depth(threading.local):
    """How often the current thread has entered one switch. Dynamo guards the flag, for each thread its own."""

    def __init__(self) -> None:
        self.count = 0
        self.active = False


class FrozenDynamics:
    """Switch that freezes one layer inside `with layer.frozen_dynamics:`. Re-entrant; each thread has its own state.

    This also holds for compiled code. A copied or unpickled layer gets a new, inactive switch.
    """

    def __init__(self) -> None:
        self._depth = _Depth()

    def __enter__(self) -> None:
        self._depth.count += 1
        self._depth.active = True
        _thread.switches.add(self)

    def __exit__(self, *exc_info: object) -> None:
        self._depth.count -= 1
        if self._depth.count == 0:
            self._depth.active = False
            _thread.switches.discard(self)

    def held(self) -> bool:
        """Return whether the switch is active in this thread, or in the one whose backward pass runs in this thread."""
        if self._depth.active:
            return True
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return False
        # On a GPU, gradient checkpointing recomputes in a thread of autograd, which has not entered the switch.
        return torch._C._is_key_in_tls(_ACTIVE) and self in torch._C._get_obj_in_tls(_ACTIVE)

    __bool__ = held  # dynamo before torch 2.15 cannot trace bool() of this object

    def __reduce__(self) -> tuple[type, tuple]:
        return FrozenDynamics, ()


class DynamicLinear(nn.Module):
    """Base class of all dynamic-linear layers, y = W(x) x.

    While `frozen_dynamics` is active, backward treats every input-dependent factor of the layer as a constant, so that
    backward is exactly multiplication by W(x)^T. The forward value is the same in both modes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen_dynamics = FrozenDynamics()

    def reset_parameters(self) -> None:
        """Initialise the layer's own weights."""

    def init_non_persistent_buffers(self) -> None:
        """Initialise the weights that transformers did not find in a checkpoint, such as those of a new classifier.

        This hook of timm's layers is the only one that transformers calls on a layer it does not know. Meanwhile the
        functions of `nn.init` are its own, which leave loaded weights as they are. timm's calls change nothing.
        """
        if nn.init.uniform_.__module__ == "transformers.initialization":
            self.reset_parameters()


@register_notrace_module
class InverseEncoding(nn.Module):
    """Concatenate x and its inverse 1 - x: (B, C, H, W) in [0, 1] to (B, 2C, H, W).

    With this encoding, dark pixels can contribute as much as bright ones. An input with 2C channels is already encoded
    and is returned unchanged.

    Args:
        in_chans: C, number of colour channels
        min_size: smallest height and width in pixels, the stride of the network that follows

    Raises:
        ValueError: the input has another number of channels, or is smaller than `min_size`.
    """

    def __init__(self, in_chans: int = 3, min_size: int = 1) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.min_size = min_size

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or (x.shape[1] != self.in_chans and x.shape[1] != 2 * self.in_chans):
            raise ValueError(
                f"expected images (B, {self.in_chans}, H, W), or encoded ones with {2 * self.in_chans} channels, "
                f"got {list(x.shape)}: for another channel count create the model with in_chans="
            )
        if min(x.shape[2], x.shape[3]) < self.min_size:
            raise ValueError(
                f"an image of {x.shape[2]}x{x.shape[3]} pixels is smaller than the network's stride: "
                f"resize it to at least {self.min_size}x{self.min_size}"
            )
        return x if x.shape[1] == 2 * self.in_chans else torch.cat([x, 1 - x], 1)

    def extra_repr(self) -> str:
        return f"{self.in_chans}, min_size={self.min_size}"


def placement(module: nn.Module) -> dict[str, Any]:
    """Return the `device` and `dtype` of a module's parameters, as arguments for a new one; None without parameters."""
    parameter = next(module.parameters(), None)
    return {"device": getattr(parameter, "device", None), "dtype": getattr(parameter, "dtype", None)}


def adapt_colours(weight: Tensor, in_chans: int) -> Tensor:
    """Adapt weights for encoded images, (N, 2C, k, k), to another number of colours, (N, 2 in_chans, k, k).

    As in timm, weights are summed over colours for `in_chans=1`, else repeated and scaled by C / in_chans. Weights with
    an odd number of input channels are returned unchanged.
    """
    source = weight.shape[1] // 2
    if source == in_chans or weight.shape[1] % 2:
        return weight
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))  # sums need more than half precision
    halves = weight.unflatten(1, (2, source))  # (N, 2, C, k, k): colours, then inverse colours
    if in_chans == 1:
        return halves.sum(2)
    repeated = halves[:, :, torch.arange(in_chans) % source]
    return (repeated * (source / in_chans)).flatten(1, 2)


@register_notrace_module
class GlobalPool(nn.Module):
    """Pool over positions, (B, C, H, W) to (B, C), by 'sum' (CoDA-Nets) or 'avg' (B-cos networks); '' does not pool.

    Sums are float32 for float16, whose range they leave before `Logits` divides them by the temperature.

    Raises:
        ValueError: another `pool_type`.
    """

    def __init__(self, pool_type: str = "sum") -> None:
        super().__init__()
        if pool_type not in ("sum", "avg", ""):
            raise ValueError(f"global_pool={pool_type!r}: choose 'sum', 'avg' or '' (none); others are not linear")
        self.pool_type = pool_type

    def forward(self, x: Tensor) -> Tensor:
        if self.pool_type == "sum":
            return widened(x).sum((2, 3))
        if self.pool_type == "avg":
            return x.mean((2, 3))
        return x

    def extra_repr(self) -> str:
        return repr(self.pool_type)


@register_notrace_module
class Logits(nn.Module):
    """Compute votes / temperature + bias, with one bias for all classes; in float32 for float16 and under autocast.

    Args:
        temperature: T; a larger T requires more alignment for the same confidence
        bias: b0, the logit of an image without evidence

    Raises:
        ValueError: `temperature` is not above 0.
    """

    def __init__(self, temperature: float, bias: float) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"logit_temperature={temperature}: must be above 0")
        self.temperature = float(temperature)
        self.bias = float(bias)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript skips this only as a branch of its own
            if not x.is_meta and torch.is_autocast_enabled(x.device.type):
                x = x.float()  # in half precision, adding the bias would round away evidence of 1e-4
        return widened(x) / self.temperature + self.bias

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, bias={self.bias:.4f}"
