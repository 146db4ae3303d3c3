"""Number the classes of a dataset, and check the label of every row."""

import difflib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from ..explanation import listed

__all__ = ["DataError", "LabelTable", "check_several", "encode_labels", "missing_classes", "normalised"]


class DataError(ValueError):
    """A dataset that cannot be used; the message names what was found and says how to fix the problem."""


@dataclass(frozen=True)
class LabelTable:
    """The classes of a training split."""

    names: tuple[str, ...]
    kind: str
    """"declared" by the dataset, "texts" or "booleans"; "numbers" from 0 on, without names; or other numbers: "ids"."""
    note: str = ""
    """What the user should know about them."""

    def padded(self, num_classes: int | None) -> tuple[str, ...]:
        """Return `num_classes` names: some are left out, or named after their numbers."""
        if num_classes is None:
            return self.names
        return (self.names + tuple(str(number) for number in range(len(self.names), num_classes)))[:num_classes]


def encode_labels(
    rows: datasets.Dataset, column: str, split: str, classes: LabelTable | None, num_classes: int | None
) -> tuple[np.ndarray, LabelTable]:
    """Number the classes and check the label of every row.

    Integers without names are the numbers of the classes if they are all of 0, 1, ..., n - 1 or if `num_classes` is
    given. Other integers are ids: the classes are those that occur, in their order, each named after its integer.

    Args:
        rows: The rows of a split.
        column: The label column.
        split: The split's name, for error messages.
        classes: LabelTable of the training split; None if this is the training split.
        num_classes: Number of classes; by default those that are named or occur.

    Returns:
        Class numbers (n,) and the classes.

    Raises:
        DataError: A label is missing or not a class, or the classes differ from those of training.
    """
    kind = rows.features[column]
    table: pa.Table = rows.select_columns([column]).with_format("arrow")[:]
    values = table.column(column)
    if values.null_count:
        row = values.is_null().index(True).as_py()
        raise DataError(f"{split} row {row} has no label (column {column}): give it one or remove the row")
    if isinstance(kind, datasets.ClassLabel):
        own = LabelTable(_distinct(kind.names, column), "declared")
    elif kind.dtype == "bool":
        own = LabelTable(("false", "true"), "booleans")
    elif "string" in kind.dtype:
        return _number_texts(values, column, split, classes, num_classes)
    else:
        own = None
    try:
        numbers = values.cast(pa.int64()).to_numpy().copy()  # arrow's own array is read-only
    except pa.ArrowInvalid as error:
        raise DataError(f"{split}: a label (column {column}) is too large: {error}") from error
    if own is None and classes is None:
        own = _integer_classes(numbers, column, split, num_classes)
    if classes is None:
        assert own is not None
        classes = own
    elif own is None and classes.kind in ("texts", "booleans"):
        raise DataError(f"the labels of the {split} split are {kind.dtype}, those of training are {classes.kind}")
    elif own is not None:
        _check_same(own.names, classes.names, split)
    if classes.kind == "ids":
        ids = np.array([int(name) for name in classes.names])
        places = np.searchsorted(ids, numbers).clip(max=len(ids) - 1)
        unknown = np.flatnonzero(ids[places] != numbers)
        if len(unknown):
            raise DataError(
                f"{split} row {unknown[0]} has the label {numbers[unknown[0]]} (column {column}), which is not a class "
                f"of training: {listed(classes.names)}; --num-classes keeps labels as they are, from 0 on"
            )
        return places, classes
    _check_limit(numbers, lambda row: numbers[row].item(), column, split, classes, num_classes)
    return numbers, classes


def check_several(labels: np.ndarray, names: Sequence[str], hint: str) -> None:
    """Check that there is something to learn.

    Raises:
        DataError: All labels (n,) are of one class; the message ends in the hint.
    """
    if len(labels) and (labels == labels[0]).all():
        raise DataError(
            f"all {len(labels):,} images to train on are of one class, {names[labels[0]]!r}: "
            + (hint or "give images of at least two classes")
        )


def missing_classes(labels: np.ndarray, classes: LabelTable, split: str) -> str:
    """Return a note about classes without any of the labels (n,) of a split, "" if there are none."""
    missing = [classes.names[number] for number in sorted(set(range(len(classes.names))) - set(labels.tolist()))]
    if classes.kind not in ("texts", "ids") or not missing:
        return ""
    return f"no {split} images of {len(missing)} of {len(classes.names)} classes: {listed(missing)}"


def normalised(name: str) -> str:
    """Return a name in one of its spellings in Unicode (NFC): macOS stores "é" in file names as "e" and an accent."""
    return unicodedata.normalize("NFC", name)


def _number_texts(
    values: pa.ChunkedArray, column: str, split: str, classes: LabelTable | None, num_classes: int | None
) -> tuple[np.ndarray, LabelTable]:
    """See `encode_labels`."""
    encoded: Any = values.combine_chunks().dictionary_encode()
    texts, rows = [normalised(text) for text in encoded.dictionary.to_pylist()], encoded.indices.to_numpy()
    if classes is None:
        names = tuple(sorted(set(texts)))
        spellings = len(texts) - len(names)
        note = f"{spellings} class names have a second spelling in Unicode, with combining characters"
        classes = LabelTable(names, "texts", note if spellings else "")
    known = {name: number for number, name in enumerate(classes.names)}
    numbers = np.array([known.get(text, -1) for text in texts], dtype=np.int64)[rows]
    unknown = np.flatnonzero(numbers < 0)
    if len(unknown):
        row = unknown[0]
        text = texts[rows[row]]
        raise DataError(
            f"{split} row {row} has the label {text!r}, which is not a class of training{_closest(text, known)}"
        )
    _check_limit(numbers, lambda row: texts[rows[row]], column, split, classes, num_classes)
    return numbers, classes


def _integer_classes(numbers: np.ndarray, column: str, split: str, num_classes: int | None) -> LabelTable:
    if num_classes is not None:
        return LabelTable(tuple(str(number) for number in range(num_classes)), "numbers")
    found = np.unique(numbers)
    if len(found) and found[0] < 0:
        row = np.flatnonzero(numbers < 0)[0]
        raise DataError(
            f"{split} row {row} has the label {numbers[row]} (column {column}): labels below 0 usually mark images "
            "without a label; correct or remove them, or choose another column with --label-column"
        )
    names = tuple(str(number) for number in found.tolist())
    if len(found) == 0 or found[-1] == len(found) - 1:
        return LabelTable(names, "numbers")
    few = ", ".join(f"{name} is {number}" for number, name in enumerate(names[:3])) + (", ..." if names[3:] else "")
    return LabelTable(
        names, "ids", f"{len(names)} classes renumbered, as the labels are not all of 0, 1, 2, ...: {few}"
    )


def _check_limit(
    numbers: np.ndarray,
    show: Callable[[int], Any],
    column: str,
    split: str,
    classes: LabelTable,
    num_classes: int | None,
) -> None:
    """Check that all class numbers (n,) are below the number of classes; `show` gives the label of a row."""
    limit = len(classes.names) if num_classes is None else num_classes
    wrong = np.flatnonzero((numbers < 0) | (numbers >= limit))
    if len(wrong):
        raise DataError(
            f"{split} row {wrong[0]} has the label {show(wrong[0])!r} (column {column}), but the {limit} classes are "
            f"numbered 0 to {limit - 1}: correct the row, or choose another split, column or --num-classes"
        )


def _distinct(names: Sequence[str], column: str) -> tuple[str, ...]:
    numbers: dict[str, int] = {}
    for number, name in enumerate(map(normalised, names)):
        if numbers.setdefault(name, number) != number:
            raise DataError(f"column {column}: the classes {numbers[name]} and {number} are both named {name!r}")
    return tuple(numbers)


def _check_same(own: tuple[str, ...], names: tuple[str, ...], split: str) -> None:
    if own == names:
        return
    number = next((i for i, pair in enumerate(zip(own, names, strict=False)) if pair[0] != pair[1]), -1)
    first = "" if number < 0 else f"; class {number} is {own[number]!r} and {names[number]!r}"
    first += "" if number < 0 else _difference(own[number], names[number])
    raise DataError(
        f"the classes of the {split} split, {listed(own)}, differ from those of training, {listed(names)}{first}"
    )


def _closest(name: str, names: Any) -> str:
    """Name the most similar of some names, and how it differs, for the end of an error message."""
    close = difflib.get_close_matches(name, list(names), 1)
    return f"; the closest is {close[0]!r}{_difference(name, close[0])}" if close else f": {listed(names)}"


def _difference(one: str, other: str) -> str:
    """Say which characters differ first in two names, if these may look alike."""
    place = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    place = min(len(one), len(other)) if place is None else place
    pair = [text[place] if place < len(text) else "" for text in (one, other)]
    if all(letter.isascii() and (letter.isalnum() or letter in "_-.") for letter in pair if letter):
        return ""
    first, second = (unicodedata.name(letter, f"U+{ord(letter):04X}") if letter else "nothing" for letter in pair)
    return f" (character {place + 1}: {first}, and {second})"
