"""Describe a dataset in a few values, and say what changed between two descriptions, without reading the images."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..explanation import listed
from .datasets import ImageData, Split
from .labels import normalised
from .streaming import StreamedSplit, open_parquet, row_groups

__all__ = ["data_changes", "describe_data"]

_SAMPLES = 16  # images that stand for all others where there are no files to compare


def describe_data(data: ImageData, splits: Sequence[str] = ("train", "test")) -> dict[str, Any]:
    """Return JSON-able values that change if the classes, labels or images of a dataset change.

    Images are identified by the names and sizes of their files, or by the names of parquet files with the numbers of
    rows and bytes in them; of other datasets, some of the images are compared. It does not matter where the files are.

    Returns:
        `classes`: the names; `train` and `test`, or one of them: the split's name, the number of images, those of each
        class, and hashes of the labels and the images in their order.
    """
    return {"classes": list(data.label_names)} | {
        key: _describe_split(split, len(data.label_names))
        for key, split in (("train", data.train), ("test", data.test))
        if key in splits
    }


def data_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a sentence for each difference between two descriptions, [] if they are equal."""
    changes = _class_changes(before["classes"], now["classes"])
    renamed = bool(changes)
    for key, kind in (("train", "training"), ("test", "test")):
        if key not in before or key not in now:
            continue
        old, new = before[key], now[key]
        if old["split"] != new["split"]:
            changes.append(f"the {kind} split was {old['split']}, is {new['split']}")
        counts = [dict(zip(data["classes"], data[key]["per_class"], strict=True)) for data in (before, now)]
        moved = [name for name in counts[0] if name in counts[1] and counts[0][name] != counts[1][name]]
        if old["images"] != new["images"]:
            changes.append(f"{kind} images were {old['images']:,}, are {new['images']:,}")
        elif moved:
            few = [f"{counts[1][name]:,} {name!r} (were {counts[0][name]:,})" for name in moved]
            changes.append(f"labels of {kind} images changed: {listed(few)}")
        elif not renamed and old["content"] != new["content"]:
            changes.append(f"{kind} images changed: other names, sizes or order of files")
        elif not renamed and old["labels"] != new["labels"]:
            changes.append(f"labels of {kind} images changed")
    return changes or ([] if before == now else ["the data changed"])


def _describe_split(split: Split | StreamedSplit, classes: int) -> dict[str, Any]:
    return {
        "split": split.name,
        "images": len(split),
        "per_class": np.bincount(split.labels, minlength=classes).tolist(),
        "labels": _hash([np.asarray(split.labels, "<i8").tobytes()]),
        "content": _hash(_identities(split)),
    }


def _class_changes(before: list[str], now: list[str]) -> list[str]:
    gone = [name for name in before if name not in set(now)]
    new = [name for name in now if name not in set(before)]
    if len(gone) == len(new) == 1:
        return [f"class {gone[0]!r} is now {new[0]!r}"]
    changes = [f"classes {what}: {listed(map(repr, names))}" for what, names in (("gone", gone), ("new", new)) if names]
    return changes or ([] if before == now else ["the classes have another order"])


def _identities(split: Split | StreamedSplit) -> Iterator[bytes]:
    """Yield what identifies the images of a split, in their order."""
    if isinstance(split, StreamedSplit):
        for number, file in enumerate(split.files):
            chosen = split.groups[:, 0] == number
            yield _shard(file, np.column_stack([split.groups[chosen, 2], split.sizes[chosen]]).tolist())
        return
    if len(split.origin) == 1 and os.path.isdir(split.origin[0]):
        paths = split.rows.data.table.column(split.column).combine_chunks().field("path").to_pylist()
        start = len(os.path.join(split.origin[0], ""))
        for index in split.indices.tolist():
            # Without the folder of the class: the name of the class is compared by itself.
            inside = paths[index][start:].split(os.sep)[1:]
            yield f"{normalised('/'.join(inside))}\0{os.stat(paths[index]).st_size}".encode()
        return
    for file in split.origin:
        with open_parquet(file) as parquet:
            yield _shard(file, [[rows, size] for _, rows, size in row_groups(parquet)])
    if not split.origin:
        yield str(len(split.rows)).encode()
        for index in np.linspace(0, len(split) - 1, _SAMPLES).astype(int).tolist():
            encoded = split.rows[int(split.indices[index])][split.column] or {}
            yield encoded.get("bytes") or os.path.basename(encoded.get("path") or "").encode()
    if not np.array_equal(split.indices, np.arange(len(split.rows))):
        yield np.asarray(split.indices, "<i8").tobytes()


def _shard(file: str, groups: list[list[int]]) -> bytes:
    return json.dumps([normalised(re.split(r"[/\\]", file)[-1]), groups]).encode()


def _hash(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()[:16]
