"""The names of a model's classes, and the class that a user's word names."""

import difflib
from collections.abc import Sequence
from typing import Any

from timm.data import ImageNetInfo

__all__ = ["class_names", "find_class", "training_data"]


def class_names(model: Any) -> tuple[str, ...]:
    """Return one name per class: the config's description, or else its label name, or else a number: "class 3"."""
    config = getattr(model, "pretrained_cfg", None) or {}
    names, plain = config.get("label_names"), config.get("label_descriptions") or {}
    if names is None and model.num_classes == 1000 and "in1k" in (config.get("tag") or ""):
        names = ImageNetInfo("imagenet-1k").label_descriptions()
    if names is None or len(names) != model.num_classes:
        return tuple(f"class {index}" for index in range(model.num_classes))
    return tuple(str(plain.get(name, name)) for name in names)


def training_data(model: Any) -> str:
    """Return in words what a model of the registry was trained on, with its published weights; else "".

    Models from folders and the Hub may have been trained on anything, whatever tag they started from.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    if config.get("source") in ("local-dir", "hf-hub"):
        return ""
    return _DATASETS.get((config.get("tag") or "").split("_")[-1], "")


_DATASETS = {  # by the end of a tag
    "digits": "handwritten digits, white on black",
    "cifar10": "CIFAR-10: photographs of vehicles and animals",
    "imagenet": "TinyImageNet: photographs of 200 kinds of things",
    "imagenet100": "ImageNet-100: photographs of 100 kinds of things, mostly animals",
    "in1k": "ImageNet: photographs of 1,000 kinds of things",
}


def find_class(names: Sequence[str], word: str) -> int:
    """Return the index of the class that `word` names: the whole name, one of "tench, Tinca tinca", or a number.

    Case is ignored. Names are tried before numbers, because the name of a class may be a number.

    Raises:
        ValueError: No class has this name, or several have it.
    """
    wanted = word.strip().casefold()
    whole = [index for index, name in enumerate(names) if name.casefold() == wanted]
    parts = [index for index, name in enumerate(names) if wanted in name.casefold().split(", ")]
    found = whole or parts
    if len(found) > 1:
        raise ValueError(f"class {word!r}: {len(found)} classes have this name, give a number: {found}"[:500])
    if found:
        return found[0]
    if wanted.removeprefix("class ").isdecimal():
        index = int(wanted.removeprefix("class "))
        if index < len(names):
            return index
        raise ValueError(f"class {word}: the model's classes are 0 to {len(names) - 1}")
    near = difflib.get_close_matches(wanted, [part for name in names for part in name.casefold().split(", ")])
    hint = f"; similar: {', '.join(near)}" if near else ""
    raise ValueError(f"no class is named {word!r}{hint}: give a name, or a number from 0 to {len(names) - 1}")
