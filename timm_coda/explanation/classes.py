"""The names of a classifier's classes: whose they are, which class a word names, and which classes of two tables agree.

A model has names only if they belong to the weights of its classifier: those of a pretrained tag, or of a saved folder.
A classifier that is new, or was trained elsewhere, has none until it is given some.
"""

import difflib
import functools
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from timm.data import ImageNetInfo

__all__ = ["Classes", "ClassesError", "forget_names", "listed", "read_names", "training_data"]

_SHOWN = 20  # names in an error message
_DATASETS = {  # by the end of a tag
    "digits": "handwritten digits, white on black",
    "cifar10": "CIFAR-10: photographs of vehicles and animals",
    "imagenet": "TinyImageNet: photographs of 200 kinds of things",
    "imagenet100": "ImageNet-100: photographs of 100 kinds of things, mostly animals",
    "in1k": "ImageNet: photographs of 1,000 kinds of things",
}


class ClassesError(ValueError):
    """Class names are wrong, or two tables of classes do not fit; the message gives the reason and the remedy."""


@dataclass(frozen=True)
class Classes:
    """A table of classes, in the order of their numbers."""

    names: tuple[str, ...]
    """A name per class, to show: its description if there is one, else its label, else "class 3"."""
    labels: tuple[str, ...] = ()
    """The label per class, such as the WordNet ID "n01440764"; empty if nobody has named the classes."""

    @classmethod
    def named(cls, labels: Sequence[str], descriptions: Mapping[str, str] | None = None) -> "Classes":
        """Create a table from labels, and descriptions by label."""
        described = dict(descriptions or {})
        return cls(tuple(str(described.get(label, label)) for label in labels), tuple(labels))

    @classmethod
    def unnamed(cls, count: int) -> "Classes":
        """Create a table of classes that nobody has named."""
        return cls(tuple(f"class {number}" for number in range(count)))

    @classmethod
    def of(cls, model: Any) -> "Classes":
        """Return the classes of a model, also inside a wrapper of transformers, whose `id2label` comes first.

        Raises:
            ClassesError: The model's config has names that are not one per class.
        """
        given = getattr(getattr(model, "config", None), "id2label", None)
        if isinstance(given, Mapping) and hasattr(model, "timm_model"):
            names = read_names(given, model.timm_model.num_classes)
            if names != tuple(f"LABEL_{number}" for number in range(len(names))):  # what transformers makes up
                return cls.named(names)
        model = getattr(model, "timm_model", model)
        return cls.of_config(getattr(model, "pretrained_cfg", None) or {}, model.num_classes)

    @classmethod
    def of_config(cls, config: Mapping[str, Any], count: int) -> "Classes":
        """Return the classes of a classifier with `count` outputs that a config, timm's `pretrained_cfg`, describes.

        Raises:
            ClassesError: The config has `count` classes, but its names are not one per class.
        """
        if config.get("num_classes", count) != count:  # names of another classifier
            return cls.unnamed(count)
        names = config.get("label_names")
        if names is not None:
            return cls.named(read_names(names, count), config.get("label_descriptions"))
        if "label_names" not in config and count == 1000 and "in1k" in (config.get("tag") or ""):
            return _imagenet()
        return cls.unnamed(count)

    def __len__(self) -> int:
        return len(self.names)

    def as_config(self) -> dict[str, Any]:
        """Return the entries of timm's `pretrained_cfg` that describe these classes; None where nobody named them."""
        known = {label: name for label, name in zip(self.labels, self.names, strict=False) if label != name}
        return {"label_names": self.labels or None, "label_descriptions": known or None}

    def find(self, word: str) -> int:
        """Return the number of the class that `word` names: a name, one of "tench, Tinca tinca", a label or a number.

        Case is ignored. Names are tried before numbers, because the name of a class may be a number.

        Raises:
            ClassesError: No class has this name, or several have it.
        """
        wanted = _plain(word)
        whole = [number for number in range(len(self)) if wanted in (_plain(name) for name in self._known_as(number))]
        parts = [number for number, name in enumerate(self.names) if wanted in _plain(name).split(", ")]
        found = whole or parts
        if len(found) > 1:
            raise ClassesError(f"class {word!r}: {len(found)} classes have this name, give a number: {found}"[:500])
        if found:
            return found[0]
        if wanted.removeprefix("class ").isdecimal():
            index = int(wanted.removeprefix("class "))
            if index < len(self):
                return index
            raise ClassesError(f"class {word}: the model's classes are 0 to {len(self) - 1}")
        near = difflib.get_close_matches(wanted, [part for name in self.names for part in _plain(name).split(", ")])
        hint = f"; similar: {', '.join(near)}" if near else ""
        raise ClassesError(f"no class is named {word!r}{hint}: give a name, or a number from 0 to {len(self) - 1}")

    def match(self, labels: Sequence[str]) -> tuple[int, ...]:
        """Return the number here of each class of another table with these labels, such as a dataset's.

        A label matches a class that has it as label or description. Case and Unicode normalisation are ignored.

        Raises:
            ClassesError: A label is no class here, or two labels are the same class.
        """
        if tuple(labels) == self.labels:  # also where a name occurs twice
            return tuple(range(len(self)))
        numbers: dict[str, set[int]] = {}
        for number in range(len(self.labels)):
            for name in self._known_as(number):
                numbers.setdefault(_plain(name), set()).add(number)
        found = [numbers.get(_plain(label), set()) for label in labels]
        missing = [label for label, at in zip(labels, found, strict=True) if not at]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            raise ClassesError(
                f"{listed(missing)} {verb} not among the model's {len(self)} classes: {listed(self.names)}"
            )
        unclear = [label for label, at in zip(labels, found, strict=True) if len(at) > 1]
        if unclear:
            raise ClassesError(f"{listed(unclear)}: the model has several classes of this name")
        matched = tuple(next(iter(at)) for at in found)
        if len(set(matched)) < len(matched):
            twice = [label for label, number in zip(labels, matched, strict=True) if matched.count(number) > 1]
            raise ClassesError(f"{listed(map(ascii, twice))} are one class of the model: give them one name")
        return matched

    def _known_as(self, number: int) -> tuple[str, ...]:
        return (self.names[number], *self.labels[number : number + 1])


@functools.cache
def _imagenet() -> Classes:
    known = ImageNetInfo("imagenet-1k")
    return Classes.named(known.label_names(), known.label_descriptions(as_dict=True))  # type: ignore[arg-type]


def read_names(names: Any, count: int) -> tuple[str, ...]:
    """Read one name per class from a list, or from a mapping by number such as `{"0": "cat", "1": "dog"}`.

    Raises:
        ClassesError: There is not one name for each of the `count` classes.
    """
    if isinstance(names, Mapping):
        by_number = {str(key): name for key, name in names.items()}
        missing = [number for number in range(count) if str(number) not in by_number]
        if missing or len(by_number) != count:
            raise ClassesError(
                f"label names by number are {listed(by_number)}, but the {count} classes are numbered 0 to {count - 1}"
            )
        names = [by_number[str(number)] for number in range(count)]
    if not isinstance(names, Sequence) or isinstance(names, str) or len(names) != count:
        given = f"{names!r:.60} as" if not isinstance(names, Sequence) or isinstance(names, str) else len(names)
        raise ClassesError(f"{given} label names for {count} classes: give one per class, or none")
    return tuple(map(str, names))


def forget_names(model: Any) -> None:
    """Remove the class names that a model got from its config, because its classifier is another one."""
    if getattr(model, "pretrained_cfg", None):
        model.pretrained_cfg = {**model.pretrained_cfg, "label_names": None, "label_descriptions": None}
        model.default_cfg = model.pretrained_cfg  # timm's older name


def training_data(model: Any) -> str:
    """Return what a published model was trained on, in a few words; "" if nobody knows."""
    config = getattr(model, "pretrained_cfg", None) or {}
    if config.get("source") in ("local-dir", "hf-hub", "file") or not Classes.of(model).labels:
        return ""
    return _DATASETS.get((config.get("tag") or "").split("_")[-1], "")


def listed(names: Any) -> str:
    """Join at most 20 names with commas, and state how many more there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip()).casefold()
