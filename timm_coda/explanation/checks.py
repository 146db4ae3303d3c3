"""Checks of explanations: finite results, and no layer whose output depends on the batch or on chance."""

import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_finite", "warn_if_random"]

_HALF = (torch.float16, torch.bfloat16)


def check_finite(
    model: nn.Module,
    images: Tensor,
    *outputs: Tensor,
    numbers: Sequence[int] | None = None,
    error: type[ValueError] = ValueError,
) -> None:
    """Raise `error` if an output of the model has NaN or infinite values; the message gives the cause and the remedy.

    Only then, another forward pass looks for the first layer whose output is not finite.

    Args:
        model: the model that computed the outputs, in the same mode
        images: its input, (B, C, H, W)
        outputs: logits, maps and the like, (B, ...)
        numbers: names the images in the message; counted from 0 if None
        error: class of the exception
    """
    finite = torch.stack([output.isfinite().flatten(1).all(1) for output in outputs]).all(0)
    if not finite.all():
        bad = [place if numbers is None else numbers[place] for place in (~finite).nonzero().flatten().tolist()]
        raise error(f"the model gives NaN or infinite values for {_listed('image', bad)}: {_cause(model, images)}")


def _cause(model: nn.Module, images: Tensor) -> str:
    broken = [name for name, value in model.state_dict().items() if not _finite(value)]
    if broken:
        return f"its weights have NaN or infinite values, first {broken[0]}: initialise or load them again"
    found = _first_bad_layer(model, images)
    if found is None:
        return "the forward pass is finite, but its gradient is not: use float32 or float64"
    name, layer, dtype = found
    at = f"layer {name or 'output'} ({type(layer).__name__}) is the first whose output is not finite, in {dtype}"
    if dtype == torch.float16:
        return f"{at}, which ends at 65504: use bfloat16 or float32"
    largest, weight = max(((value.abs().max().item(), key) for key, value in _weights(layer)), default=(0.0, ""))
    about = f"; its {weight} has numbers up to {largest:.3g}, is it initialised?" if weight else ""
    return f"{at}{about or ': check the weights of the layers before it'}"


def _weights(layer: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in layer.named_parameters() if value.numel()]


def _finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(value.isfinite().all())


@torch.no_grad()
def _first_bad_layer(model: nn.Module, images: Tensor) -> tuple[str, nn.Module, torch.dtype] | None:
    """Return the name, layer and dtype of the first output in a forward pass that is not finite."""
    thread, found, handles = threading.get_ident(), [], []

    def look(name: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            if not found and threading.get_ident() == thread and isinstance(output, Tensor) and not _finite(output):
                found.append((name, layer, output.dtype))

        return hook

    try:
        for name, layer in model.named_modules():
            handles.append(layer.register_forward_hook(look(name)))
        with torch.random.fork_rng(_cuda(images)):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _cuda(images: Tensor) -> list[torch.device]:
    return [images.device] if images.device.type == "cuda" else []


def warn_if_random(model: nn.Module, *, stacklevel: int) -> None:
    """Warn if a layer in training mode makes an explanation depend on the rest of the batch, or on chance.

    These are layers that normalise by the batch's statistics, and all kinds of dropout whose rate is above 0.
    """
    found = [name or type(model).__name__ for name, layer in model.named_modules() if layer.training and _varies(layer)]
    if found:
        warnings.warn(
            f"the model is in training mode: the output of {_listed('layer', found)} depends on the other images of "
            "the batch or on chance, and so does this explanation: call model.eval() first",
            stacklevel=stacklevel + 1,
        )


def _varies(layer: nn.Module) -> bool:
    """Return whether the layer's output depends on the batch or on chance in training mode."""
    if getattr(layer, "running_var", None) is not None:
        return not isinstance(layer, nn.modules.instancenorm._InstanceNorm)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return True
    # The rate of torch's and timm's dropout layers, and of layers that apply functional dropout themselves.
    return any(_rate(layer, name) > 0 for name in ("p", "drop_prob", "prob", "drop_rate", "dropout", "attn_drop"))


def _rate(layer: nn.Module, name: str) -> float:
    value = getattr(layer, name, 0.0)
    if name == "attn_drop" and isinstance(value, nn.Module):
        value = getattr(value, "p", 0.0)  # fused attention applies it in the mode of the whole layer
    return float(value) if isinstance(value, int | float) else 0.0


def _listed(kind: str, names: Sequence[Any]) -> str:
    """Return such as "layers a, b, c and 3 more"."""
    shown = ", ".join(map(str, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{kind} {shown}" if len(names) == 1 else f"{kind}s {shown}"
