"""Compute exact explanations of dynamic-linear models: logits = W(x) x + bias, with one backward pass per target.

A model needs layers with a `frozen_dynamics` switch, an `encoding` and `logits.bias`.
"""

import copy
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..layers import uses_float16
from .checks import check_finite, warn_if_random
from .classes import Classes
from .result import Explanation, concatenate

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ExplainMixin", "explain", "explanation_mode", "output_map", "output_of", "unit_output"]


@contextmanager
def explanation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Context manager that makes the gradient of `model` its dynamic linear map W(x).

    In the backward pass, all input-dependent weights are constants. Forward values do not change. Only the thread that
    enters the context is affected. The context is re-entrant and restores the previous mode after an error.

    Args:
        model: a timm_coda model, also inside a wrapper (DDP, Accelerate, torch.compile). Its layers are collected on
            entry.

    Yields:
        `model`

    Raises:
        ValueError: the model has no dynamic-linear layer.
    """
    switches = [m.frozen_dynamics for m in model.modules() if hasattr(m, "frozen_dynamics")]
    if not switches:
        raise ValueError(
            f"{type(model).__name__} has no dynamic-linear layer and therefore no exact explanation: use one of "
            "timm_coda's models"
        )
    with ExitStack() as stack:
        for switch in switches:
            stack.enter_context(switch)  # pyright: ignore[reportArgumentType]
        yield model


def explain(model: nn.Module, images: "Tensor | Image | Sequence[Image]", *args: Any, **kwargs: Any) -> Explanation:
    """Explain a model that may be wrapped by DDP, torch.compile or transformers; see `ExplainMixin.explain`.

    Classes are called as in `id2label` of a transformers wrapper.

    Args:
        model: a timm_coda model, or a wrapper around one
        images, args, kwargs: as in `ExplainMixin.explain`

    Raises:
        TypeError: `model` neither has `explain` nor wraps a model that has it.
    """
    inner, named = model, None
    while not isinstance(inner, ExplainMixin):
        for name in ("module", "_orig_mod", "timm_model"):
            if isinstance(getattr(inner, name, None), nn.Module):
                named = Classes.of(inner) if name == "timm_model" else named
                inner = getattr(inner, name)
                break
        else:
            raise TypeError(f"{type(inner).__name__} cannot explain itself: use one of timm_coda's models")
    explanation = inner.explain(images, *args, **kwargs)
    return explanation if named is None else replace(explanation, label_names=named.names if named.labels else None)


class ExplainMixin:
    """Adds `explain` to a model with dynamic-linear layers, an `encoding` and a final `logits` layer."""

    def explain(
        self,
        images: "Tensor | Image | Sequence[Image]",
        target: int | Sequence[int] | Tensor | None = None,
        *,
        top: int | None = None,
        versus: int | Sequence[int] | Tensor | None = None,
        layer: str | None = None,
        unit: int | tuple[int, int, int] | tuple[int, str] | None = None,
        batch_size: int | None = None,
    ) -> Explanation:
        """Explain a class exactly: compute which pixels are evidence for and against it.

        The contributions of all pixels sum to the class's logit minus the bias, up to `Explanation.residual`. Takes one
        forward pass, and one backward pass per target. The model and the caller's tensors are not modified.

        The range of float16 is too small for W(x): a float16 model is explained by a float32 copy of its weights, and
        float16 autocast is suspended. Warns about layers in training mode that depend on the batch or on chance.

        Args:
            images: colours in [0, 1], (B, C, H, W) or (C, H, W); or encoded images with 2C channels; or PIL images,
                which are made RGB, upright and opaque like a file (`images.to_rgb`) and go through the model's own eval
                transform
            target: class to explain: None for the predicted class, an int for all images, B ints for one class per
                image, or (B, T) for T classes per image
            top: instead of `target`, explain the `top` classes with the largest logits, in that order
            versus: class to contrast with, shaped like `target` or one per image: explains the difference of two logits
            layer: name of an inner layer: explains the class by this layer's output instead of the pixels
            unit: unit of `layer` to explain by the pixels, instead of a class: a channel, summed over its positions;
                (channel, row, column); or (channel, "max"), at the position of each image where it is largest
            batch_size: images per forward pass, to limit memory; None for all at once

        Returns:
            The explanation of the whole batch.

        Raises:
            ValueError: a shape is wrong, images or the result have NaN or infinite values, a class is out of range,
                arguments exclude each other, or the model has no pooled classifier.
            TypeError: images are not floats or PIL images, or classes are not integers.
        """
        model: Any = self
        pooling = getattr(model.global_pool, "pool_type", model.global_pool)  # timm's ViTs store only a name
        if not model.num_classes or not pooling:
            raise ValueError("the model has no pooled classifier to explain: add one with reset_classifier()")
        if target is not None and top is not None:
            raise ValueError(f"target={target} and top={top} exclude each other: give only one")
        if top is not None and not 1 <= top <= model.num_classes:
            raise ValueError(f"top={top}: the model has {model.num_classes} classes")
        if unit is not None and (layer is None or target is not None or versus is not None or top is not None):
            raise ValueError("unit= needs layer= and excludes target=, top= and versus=")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        batch = _as_batch(images)
        warn_if_random(model, stacklevel=2)
        count = len(batch)
        step = count if batch_size is None else batch_size
        place = (unit,) if isinstance(unit, int) else None if unit is None else tuple(unit)
        with torch.inference_mode(False), torch.enable_grad(), _wide_range(model) as model, explanation_mode(model):
            targets = _as_classes("target", target, count, model.num_classes)
            others = _as_classes("versus", versus, count, model.num_classes)
            parts = []
            for start in range(0, count, step):
                now = slice(start, start + step)
                encoded = _encode(model, batch[now])
                goal = None if targets is None else targets[now]
                other = None if others is None else others[now]
                part = _explain_batch(model, encoded, goal, top, other, layer, place)
                numbers = range(start, start + len(part))
                check_finite(model, encoded, part.logits, part.contributions, numbers=numbers)
                parts.append(part)
        return concatenate(parts)


@contextmanager
def _wide_range(model: nn.Module) -> Iterator[Any]:
    """Context manager that yields the model, or for float16 a float32 copy, and suspends float16 autocast."""
    parameter = next(model.parameters())
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.dtype == torch.float16]
    # Entering a tensor here makes deepcopy take the new one.
    wide: dict[int, Any] = {}
    for t in tensors:
        is_parameter = isinstance(t, nn.Parameter)
        wide[id(t)] = nn.Parameter(t.detach().float(), t.requires_grad) if is_parameter else t.detach().float()
    with torch.autocast(parameter.device.type, enabled=False) if uses_float16(parameter) else nullcontext():
        yield copy.deepcopy(model, wide) if tensors else model


def _explain_batch(
    model: Any,
    encoded: Tensor,
    target: Tensor | None,
    top: int | None,
    versus: Tensor | None,
    layer: str | None,
    unit: tuple[Any, ...] | None,
) -> Explanation:
    encoded.requires_grad_()
    with nullcontext() if layer is None else output_of(model, layer) as outputs:
        logits = model(encoded)
    inner = None if layer is None else _only_output(outputs or [], layer)
    grid = None if inner is None else _token_grid(model, encoded, inner, layer)
    position = None

    prediction = logits.argmax(1)
    chosen: Tensor = prediction if top is None else logits.topk(top, 1).indices
    if target is not None:
        chosen = target.to(logits.device)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    several = chosen.reshape(len(encoded), -1)  # (B, T)
    bias = model.logits.bias
    source = encoded
    if unit is not None and inner is not None:
        value, position = unit_output(_as_map(inner, grid), unit, layer)
        bias = 0.0
    else:
        value = exact.gather(1, several)
        source = encoded if inner is None else inner
        if versus is not None:
            versus = versus.to(logits.device).reshape(len(encoded), -1).expand_as(several)
            value, bias = value - exact.gather(1, versus), 0.0
            versus = versus.reshape(chosen.shape)

    weights = []
    for t in range(value.shape[1]):
        grad = torch.autograd.grad(value[:, t].sum(), source, retain_graph=t + 1 < value.shape[1])[0]
        weights.append(_as_map(grad.to(exact.dtype), grid))
    weights = torch.stack(weights, 1)  # (B, T, C, H, W)
    seen = _as_map(source.detach().to(exact.dtype), grid)
    contributions = (weights * seen.unsqueeze(1)).sum(2)
    colours = encoded.detach()[:, : encoded.shape[1] // 2].to(exact.dtype)
    names = Classes.of(model)
    shape = chosen.shape
    return Explanation(
        images=colours,
        logits=logits.detach(),
        prediction=prediction,
        target=chosen,
        value=value.detach().reshape(shape),
        contributions=contributions.reshape(shape + contributions.shape[2:]),
        weights=weights.reshape(shape + weights.shape[2:]),
        bias=bias,
        versus=versus,
        layer=layer,
        unit=None if unit is None else tuple(index for index in unit if index != "max"),
        position=position,
        label_names=names.names if names.labels else None,
    )


def _as_batch(images: "Tensor | Image | Sequence[Image]") -> "Tensor | list[Image]":
    """Return images as a (B, C, H, W) tensor or a list of PIL images."""
    if isinstance(images, Tensor):
        if not images.is_floating_point():
            raise TypeError(f"images have dtype {images.dtype}: give floats in [0, 1], such as images / 255")
        batch = images[None] if images.dim() == 3 else images
    elif isinstance(images, Sequence):
        batch = list(images)
    else:
        batch = [images]
    if len(batch) == 0:
        raise ValueError("no images: the batch is empty")
    if not isinstance(batch, Tensor) and not all(hasattr(image, "convert") for image in batch):
        kind = next(type(image).__name__ for image in batch if not hasattr(image, "convert"))
        raise TypeError(f"images are {kind}: give a tensor (B, C, H, W), a PIL image or a list of PIL images")
    return batch


def _encode(model: Any, images: "Tensor | list[Image]") -> Tensor:
    """Encode images into a new tensor with the model's device and dtype."""
    parameter = next(model.parameters())
    if isinstance(images, Tensor):
        x = images
    else:
        from timm.data import create_transform, resolve_model_data_config

        from ..images import to_rgb

        transform: Any = create_transform(**resolve_model_data_config(model), is_training=False)
        stack = []
        for image in images:
            image = to_rgb(image)
            image = image if model.in_chans == 3 else image.convert("L").convert("RGB")
            stack.append(transform(image)[: model.in_chans])
        x = torch.stack(stack)
    # clone: an inference tensor cannot take part in autograd, and the caller's tensor must not.
    x = x.detach().clone().to(parameter.device, parameter.dtype)
    encoded = model.encoding(x)
    if not torch.isfinite(x).all():
        bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(f"images {bad} have NaN or infinite values and cannot be explained: give finite values")
    low, high = x.min().item(), x.max().item()
    if low < -1e-3 or high > 1 + 1e-3:
        warnings.warn(
            f"images have values from {low:.3g} to {high:.3g}, outside [0, 1]: if they are normalised by mean and "
            "std, remove that step; the model expects colours in [0, 1] and encodes them itself",
            stacklevel=4,
        )
    return encoded.detach().clone() if encoded is x else encoded


def _as_classes(name: str, value: int | Sequence[int] | Tensor | None, count: int, num_classes: int) -> Tensor | None:
    """Return validated class indices, (B,) or (B, T)."""
    if value is None:
        return None
    classes = torch.as_tensor(value)
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {classes.dtype}: give class indices as integers")
    classes = classes.long().clone()  # an inference tensor cannot take part in autograd
    if classes.dim() == 0:
        classes = classes.expand(count)
    if classes.dim() > 2 or len(classes) != count or classes.numel() == 0:
        raise ValueError(
            f"{name} has shape {list(classes.shape)} for {count} images: give one class, one per image ({count},), or "
            f"several per image ({count}, T)"
        )
    outside = classes[(classes < 0) | (classes >= num_classes)]
    if outside.numel():
        raise ValueError(f"{name}={outside[0].item()}: the model's classes are 0 to {num_classes - 1}")
    return classes


@contextmanager
def output_of(model: nn.Module, layer: str) -> Iterator[list[Any]]:
    """Context manager that collects the outputs of the layer named `layer` in this thread.

    Raises:
        ValueError: the model has no such layer.
    """
    try:
        module = model.get_submodule(layer)
    except AttributeError:
        names = [name for name, m in model.named_modules() if hasattr(m, "frozen_dynamics")]
        raise ValueError(f"layer={layer!r}: no such layer; choose for example one of {', '.join(names)}") from None
    thread = threading.get_ident()
    outputs = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            outputs.append(output)

    handle = module.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


def _only_output(outputs: list[Any], layer: str) -> Tensor:
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or outputs[0].dim() not in (3, 4):
        seen = [list(o.shape) if isinstance(o, Tensor) else type(o).__name__ for o in outputs]
        raise ValueError(
            f"layer={layer!r} outputs {seen or 'nothing'} in a forward pass: choose a layer that outputs one map "
            "(B, C, H, W), or the tokens (B, N, C) of a vision transformer"
        )
    return outputs[0]


def _token_grid(model: Any, encoded: Tensor, tokens: Tensor, layer: str | None) -> tuple[int, int] | None:
    """Rows and columns of the tokens (B, N, C); None for a map (B, C, H, W)."""
    if tokens.dim() == 4:
        return None
    rows, columns = model.patch_embed.dynamic_feat_size(encoded.shape[2:]) if hasattr(model, "patch_embed") else (0, 0)
    if rows * columns != tokens.shape[1]:
        raise ValueError(f"layer={layer!r} outputs {list(tokens.shape)}, but the model has {rows} x {columns} tokens")
    return rows, columns


def output_map(model: Any, encoded: Tensor, outputs: list[Any], layer: str) -> Tensor:
    """Return the outputs that `output_of` collected in one forward pass as one map, (B, C, H, W).

    Raises:
        ValueError: the layer did not output one map, or the tokens of a vision transformer.
    """
    inner = _only_output(outputs, layer)
    return _as_map(inner, _token_grid(model, encoded, inner, layer))


def _as_map(x: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Return a map (B, C, H, W); tokens (B, H * W, C) are reshaped to `grid`, (H, W)."""
    return x.transpose(1, 2).unflatten(2, grid) if grid is not None and x.dim() == 3 else x


def unit_output(inner: Tensor, unit: tuple[Any, ...], layer: str | None) -> tuple[Tensor, Tensor | None]:
    """The unit's output, (B, 1), float32 or better, and its row and column, (B, 2); a channel alone is summed."""
    strongest = unit[1:] == ("max",)
    indices = unit[:1] if strongest else unit
    size = list(inner.shape[1:])
    fits = [isinstance(index, int) and 0 <= index < limit for index, limit in zip(indices, size, strict=False)]
    if len(indices) not in (1, 3) or not all(fits):
        remedy = "give a channel, or (channel, row, column), or (channel, 'max')"
        remedy = f"its channels are 0 to {size[0] - 1}" if fits and not fits[0] else remedy
        raise ValueError(f"unit={unit}: layer {layer!r} has size {size}; {remedy}")
    channel = inner[:, unit[0]]
    channel = channel.to(torch.promote_types(channel.dtype, torch.float32))
    columns = channel.shape[2]
    if strongest:
        place = channel.flatten(1).argmax(1)
    elif len(indices) == 3:
        place = torch.full((len(channel),), indices[1] * columns + indices[2], device=channel.device)
    else:
        return channel.sum((1, 2))[:, None], None
    position = torch.stack([place // columns, place % columns], 1)
    return channel.flatten(1).gather(1, place[:, None]), position
