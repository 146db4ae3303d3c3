"""Fingerprints of weights: whether measured facts, such as an accuracy or a figure, belong to a model."""

import hashlib
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from safetensors.torch import load_file

__all__ = ["PICTURE_KEY", "fingerprint_in_picture", "weights_fingerprint"]

PICTURE_KEY = "Weights"  # of the text in a PNG file, for `Explanation.save(..., metadata={PICTURE_KEY: fingerprint})`


def weights_fingerprint(weights: Any) -> str:
    """Hash the names, types, shapes and values of all weights of a model, or of a .safetensors file.

    A saved model has the fingerprint of its file. The device and the memory format do not matter.

    Returns:
        16 hexadecimal digits.
    """
    named = load_file(weights) if isinstance(weights, (str, Path)) else weights.state_dict()
    found = hashlib.sha256()
    for name, value in sorted(named.items()):
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def fingerprint_in_picture(path: Path) -> str | None:
    """Return the fingerprint of the weights that a PNG file records, or None."""
    try:
        with PIL.Image.open(path, formats=["PNG"]) as picture:
            return getattr(picture, "text", {}).get(PICTURE_KEY)
    except OSError:  # not a PNG file
        return None
