"""Explanation methods to compare: the model's own, Captum's, RISE, and random maps.

All methods attribute the encoded input, as the papers do. Methods with a value for each of the 6 channels sum over
them; methods that remove pixels set all 6 channels to zero, which encodes no colour. Gradients are the true ones,
outside of explanation mode.
"""

import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..explanation import explain
from .base import EvaluationError, Explainer, ExplainerError

__all__ = ["EXPLAINERS", "encode", "make_explainer"]

_STEPS = 20  # for integrated gradients, as in the papers
_SAMPLES = 500  # for LIME and kernel SHAP: a few for each of at most 144 patches
_MASKS = 1000  # for RISE on images of 32 to 96 pixels; its authors use 4000 and more for 224
_CELLS = 8  # per side of a RISE mask; its authors use 7, the side of a network's smallest feature map


def encode(model: Any, images: Tensor) -> Tensor:
    """Return a new tensor, the input of a model's first layer for images (B, C, H, W): (B, 2C, H, W) for our models."""
    images = images.detach().clone()
    return model.encoding(images) if hasattr(model, "encoding") else images


def _inherent(model: Any, images: Tensor, targets: Tensor) -> Tensor:
    try:
        return explain(model, images, targets).contributions
    except TypeError as error:
        raise ExplainerError(error) from error


def _captum(name: str, model: Any, images: Tensor, targets: Tensor, **settings: Any) -> Tensor:
    """Apply a gradient method of Captum to one target after the other, and sum over the encoded channels."""
    import captum.attr

    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting (forward, )?backward hooks", UserWarning)  # Captum removes them
        method = getattr(captum.attr, name)(model)
        x = encode(model, images).requires_grad_()
        goals = targets.clone().unbind(1)
        return torch.stack([method.attribute(x, target=goal, **settings).detach().sum(1) for goal in goals], 1)


def _integrated_gradients(model: Any, images: Tensor, targets: Tensor, *, batch_size: int) -> Tensor:
    batch = {"n_steps": _STEPS, "internal_batch_size": max(batch_size, len(images))}
    return _captum("IntegratedGradients", model, images, targets, **batch)


def _deeplift(model: Any, images: Tensor, targets: Tensor) -> Tensor:
    if any(hasattr(module, "frozen_dynamics") for module in model.modules()):
        raise ExplainerError(
            "DeepLIFT has no rule for layers whose weights depend on the input, such as those of "
            f"{type(model).__name__}; without one, Captum's version would be input x gradient under another name"
        )
    return _captum("DeepLift", model, images, targets)


def _guided_backprop(model: Any, images: Tensor, targets: Tensor) -> Tensor:
    if not any(isinstance(module, nn.ReLU) for module in model.modules()):
        raise ExplainerError(
            f"guided backprop changes the gradient of ReLUs, but {type(model).__name__} has none: it would be the "
            "gradient under another name"
        )
    return _captum("GuidedBackprop", model, images, targets)


def _grad_cam(model: Any, images: Tensor, targets: Tensor) -> Tensor:
    from captum.attr import LayerAttribution, LayerGradCam

    if not hasattr(model, "get_classifier"):
        raise ExplainerError(f"Grad-CAM needs get_classifier(), which {type(model).__name__} does not have")
    if hasattr(model, "patch_embed"):
        raise ExplainerError(f"Grad-CAM needs feature maps, but {type(model).__name__} has tokens")
    with torch.inference_mode(False), torch.enable_grad():
        method = LayerGradCam(model, model.get_classifier())
        x = encode(model, images).requires_grad_()
        maps = []
        for goal in targets.clone().unbind(1):
            coarse: Any = method.attribute(x, target=goal, attribute_to_layer_input=True)
            if coarse.dim() != 4:
                raise ExplainerError(f"Grad-CAM needs feature maps, but the classifier's input is {list(coarse.shape)}")
            maps.append(LayerAttribution.interpolate(coarse.detach(), images.shape[2:], "bilinear")[:, 0])
        return torch.stack(maps, 1)


@torch.no_grad()
def _perturb(
    attribute: Callable[[Any, Tensor, int], Tensor], model: Any, images: Tensor, targets: Tensor, seed: int
) -> Tensor:
    """Apply a perturbation method of Captum to one image at a time, for all targets at the cost of one.

    `attribute(forward, x, t)` explains column t of the output of `forward` for x (1, C, H, W). It makes the same calls
    for every target, so the outputs for the first target are reused for the others.
    """
    maps = []
    for image, goal in zip(encode(model, images).split(1), targets, strict=True):
        answers: list[Tensor] = []

        def ask(x: Tensor, goal: Tensor = goal, answers: list[Tensor] = answers) -> Tensor:
            answers.append(model(x)[:, goal])
            return answers[-1]

        for t in range(len(goal)):
            kept = iter(answers[:])
            with _seeded(image.device, seed, _fingerprint(image)):
                maps.append(attribute(ask if t == 0 else lambda x, kept=kept: next(kept), image, t)[0, 0])
    return torch.stack(maps).unflatten(0, tuple(targets.shape))


def _occlusion(size: int, model: Any, images: Tensor, targets: Tensor, *, batch_size: int) -> Tensor:
    from captum.attr import Occlusion

    if size > min(images.shape[2:]):
        raise ExplainerError(f"a window of {size} pixels does not fit into images of {list(images.shape[2:])}")

    def attribute(forward: Any, x: Tensor, t: int) -> Tensor:
        window, stride = (x.shape[1], size, size), (x.shape[1], size // 2 or 1, size // 2 or 1)
        return Occlusion(forward).attribute(x, window, stride, target=t, perturbations_per_eval=batch_size)

    return _perturb(attribute, model, images, targets, 0)


def _patches(x: Tensor) -> Tensor:
    """Return the index of each pixel's patch, (1, 1, H, W), among at most 12 x 12 square patches."""
    edge = -(-max(x.shape[2:]) // 12)
    rows, columns = (torch.arange(n, device=x.device) // edge for n in x.shape[2:])
    return (rows[:, None] * (columns[-1] + 1) + columns)[None, None]


def _surrogate(name: str, model: Any, images: Tensor, targets: Tensor, *, seed: int, batch_size: int) -> Tensor:
    """Apply Captum's Lime or KernelShap: a linear model of which patches are present."""
    import captum.attr

    def attribute(forward: Any, x: Tensor, t: int) -> Tensor:
        method = getattr(captum.attr, name)(forward)
        settings = {"n_samples": _SAMPLES, "perturbations_per_eval": batch_size}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Objective did not converge")  # in LIME's default number of iterations
            return method.attribute(x, target=t, feature_mask=_patches(x), **settings)

    return _perturb(attribute, model, images, targets, seed)


@torch.no_grad()
def _rise(model: Any, images: Tensor, targets: Tensor, *, seed: int, batch_size: int) -> Tensor:
    x = encode(model, images)
    maps = torch.zeros(*targets.shape, *x.shape[2:], device=x.device)
    for masks in _rise_masks(x.shape[2:], seed, batch_size):
        masks = masks.to(x.device, x.dtype)
        for row, image in enumerate(x):
            likely = model(image * masks[:, None])[:, targets[row]].sigmoid()  # (masks, T)
            maps[row] += torch.einsum("mt,mhw->thw", likely.float(), masks.float())
    return maps / (_MASKS * 0.5)


def _rise_masks(size: Any, seed: int, batch_size: int) -> Iterator[Tensor]:
    """Yield smooth random masks in [0, 1], with mean 0.5, at most batch_size at a time: (batch, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    cell = [-(-n // _CELLS) for n in size]
    # One cell more than fits, cropped at a random offset in each mask, so that no pixel is always at a cell's border.
    grids = (torch.rand(_MASKS, 1, _CELLS + 1, _CELLS + 1, generator=generator) < 0.5).float()
    corners = torch.stack([torch.randint(n, (_MASKS,), generator=generator) for n in cell], 1)
    for grid, corner in zip(grids.split(batch_size), corners.split(batch_size), strict=True):
        whole = F.interpolate(grid, [(_CELLS + 1) * n for n in cell], mode="bilinear")[:, 0]
        pairs = zip(whole, corner.tolist(), strict=True)
        yield torch.stack([mask[i : i + size[0], j : j + size[1]] for mask, (i, j) in pairs])


def _random(model: Any, images: Tensor, targets: Tensor, *, seed: int) -> Tensor:
    maps = []
    for image, goal in zip(images, targets.tolist(), strict=True):
        draws = [np.random.default_rng((seed, _fingerprint(image), target)) for target in goal]
        maps.append([draw.standard_normal(image.shape[1:], dtype=np.float32) for draw in draws])
    return torch.from_numpy(np.array(maps))


def _fingerprint(image: Tensor) -> int:
    """Hash all pixels of an image, to seed random numbers that do not depend on the batch."""
    return zlib.crc32(image.detach().float().cpu().numpy().tobytes())


@contextmanager
def _seeded(device: torch.device, *key: int) -> Iterator[None]:
    """Seed torch, and restore its random states at the end."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        yield


_SIGNED = "summed over the encoded channels"
_GONE = "removed pixels are zero in all encoded channels"
_METHODS: dict[str, tuple[str, str, Any]] = {
    "inherent": ("Model-inherent", "The model's own exact contributions: W(x) * x, which sum to the logit.", _inherent),
    "gradient": (
        "Gradient",
        f"The logit's gradient, {_SIGNED} (Captum's Saliency).",
        partial(_captum, "Saliency", abs=False),
    ),
    "input_x_gradient": (
        "Input x gradient",
        f"The gradient times the input, {_SIGNED} (Captum).",
        partial(_captum, "InputXGradient"),
    ),
    "integrated_gradients": (
        "Integrated gradients",
        f"Input times the mean gradient on the path from zero, {_STEPS} steps, {_SIGNED} (Captum).",
        _integrated_gradients,
    ),
    "deeplift": ("DeepLIFT", f"Differences from a zero input, layer by layer, {_SIGNED} (Captum).", _deeplift),
    "guided_backprop": (
        "Guided backprop",
        f"Gradient of which ReLUs pass only the positive part, {_SIGNED} (Captum).",
        _guided_backprop,
    ),
    "grad_cam": (
        "Grad-CAM",
        "The classifier's input features, weighted by their mean gradient, signed, upsampled bilinearly (Captum).",
        _grad_cam,
    ),
    "lime": (
        "LIME",
        f"A sparse linear model of {_SAMPLES} samples that lack some of at most 12 x 12 patches; {_GONE} (Captum).",
        partial(_surrogate, "Lime"),
    ),
    "kernel_shap": (
        "Kernel SHAP",
        f"Shapley values of at most 12 x 12 patches, estimated from {_SAMPLES} samples; {_GONE} (Captum).",
        partial(_surrogate, "KernelShap"),
    ),
    "rise": (
        "RISE",
        f"{_MASKS} random smooth masks, averaged with the class's probability as weight; unsigned "
        f"(Petsiuk et al., BMVC 2018); {_GONE}.",
        _rise,
    ),
    "random": ("Random", "Normally distributed random numbers: a chance baseline.", _random),
}
_NEED_NO_CAPTUM = {"inherent", "rise", "random"}
# In the order used by tables and figures.
EXPLAINERS = (
    *("inherent", "gradient", "input_x_gradient", "integrated_gradients", "deeplift", "guided_backprop", "grad_cam"),
    *("occlusion_5", "occlusion_9", "lime", "kernel_shap", "rise", "random"),
)


def make_explainer(name: str, *, batch_size: int = 64, seed: int = 42) -> Explainer:
    """Create an explainer by name.

    Args:
        name: one of EXPLAINERS, or occlusion_N for a window of N x N pixels
        batch_size: images, or perturbed images, per forward pass
        seed: seed of random numbers

    Raises:
        EvaluationError: the name is unknown, or Captum is not installed.
    """
    window = re.fullmatch(r"occlusion_([1-9]\d*)", name)
    if not window and name not in _METHODS:
        raise EvaluationError(f"unknown explainer {name!r}: choose {', '.join(EXPLAINERS)}, or occlusion_N for any N")
    if name not in _NEED_NO_CAPTUM:
        missing = [package for package in ("captum", "sklearn") if find_spec(package) is None]
        if missing:
            raise EvaluationError(
                f"the explainer {name} needs {' and '.join(missing)}: pip install 'timm_coda[evaluate]'"
            )
    if window:
        size = int(window[1])
        about = (
            f"Drop in the logit without a window of {size} x {size} pixels, moved by {size // 2 or 1}; {_GONE} "
            "(Captum)."
        )
        method = partial(_occlusion, size, batch_size=batch_size)
        return Explainer(name, f"Occlusion {size}", about, method, batch_size)
    label, about, method = _METHODS[name]
    if name == "random":
        method = partial(method, seed=seed)
    elif name == "integrated_gradients":
        method = partial(method, batch_size=batch_size)
    elif name in ("lime", "kernel_shap", "rise"):
        method = partial(method, seed=seed, batch_size=batch_size)
    return Explainer(name, label, about, method, batch_size)
