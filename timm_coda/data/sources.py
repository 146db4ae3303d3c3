"""Where labelled images come from: the splits of a data set, its columns of images and labels, its classes.

`data.py` keeps them on this machine, `streaming.py` reads them while training.
"""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

DIGITS = Path(__file__).parent / "digits"
# How a split is called, in the order in which we take one to evaluate on: validation before test, because the test
# labels of many data sets on the Hub are withheld (-1).
TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")


class DataError(ValueError):
    """A data set that cannot be used as it is; the message names what was seen and how to mend it."""


def find_splits(sources: list[str], subset: str | None) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Find the splits of a data set, by name, and what to tell about how they were found."""
    if sources == ["digits"]:
        return {split: _read_in_memory([str(DIGITS / f"{split}.parquet")]) for split in ("train", "test")}, []
    if len(sources) == 1 and os.path.isdir(sources[0]) and not any(Path(sources[0]).rglob("*.parquet")):
        return _read_image_folder(Path(sources[0])), []
    files = find_files(sources)
    return read_parquet(files) if files else _read_hub(sources[0], subset)


def find_files(sources: list[str]) -> dict[str, list[str]]:
    """Find parquet files, by the name of the split they belong to; none where the source may be an id on the Hub."""
    files: dict[str, str] = {}  # path: the part of it that may name a split
    for source in sources:
        if os.path.isdir(source):
            found = sorted(str(path) for path in Path(source).rglob("*.parquet"))
            files |= {file: os.path.relpath(file, source) for file in found}
        else:
            found = [source] if os.path.isfile(source) else sorted(glob.glob(source, recursive=True))
            files |= {file: os.path.basename(file) for file in found}
        if not found and (len(sources) > 1 or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source)):
            raise DataError(
                f"nothing is at {source!r}: no parquet file, no folder, and no file matches it as a pattern"
            )
    for file in files:
        if not file.endswith(".parquet"):
            raise DataError(f"{file!r} is not a parquet file; give parquet files, a folder of images, or a Hub id")
    by_split: dict[str, list[str]] = {}
    for file, name in files.items():
        words = re.findall(r"[a-z]+", name.lower().removesuffix(".parquet"))
        named = [word for word in words if word in TRAIN_NAMES + EVAL_NAMES]
        by_split.setdefault(named[-1] if named else "", []).append(file)
    if set(by_split) == {""}:
        return {"train": by_split[""]}
    if "" in by_split:
        raise DataError(f"{listed(by_split[''])} says neither train nor test in its name, unlike the other files")
    return by_split


def _read_hub(name: str, subset: str | None) -> tuple[dict[str, datasets.Dataset], list[str]]:
    try:
        return dict(datasets.load_dataset(name, subset)), []  # type: ignore[arg-type]
    except Exception as error:  # what can go wrong on the way to the Hub has no common base
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{name!r} is neither a file or folder here nor a data set that could be loaded from the Hugging Face Hub "
            f"({type(error).__name__}: {reason}); check the spelling, the connection and HF_HUB_OFFLINE"
        ) from error


def read_parquet(by_split: dict[str, list[str]]) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Read the parquet files of each split."""
    for split, paths in by_split.items():
        rows = 0
        for file in paths:
            try:
                rows += pq.read_metadata(file).num_rows
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{file!r} cannot be read as parquet: {error}") from error
        if rows == 0:  # of which `datasets` says only that an instruction corresponds to no data
            raise DataError(f"the {split} split is empty: no rows in {listed(paths)}")
    try:
        return dict(datasets.load_dataset("parquet", data_files=by_split)), []  # type: ignore[arg-type]
    except OSError as error:
        note = f"the cache of Hugging Face data sets cannot be written ({error}): the images are kept in memory"
        return {split: _read_in_memory(paths) for split, paths in by_split.items()}, [note]
    except Exception as error:
        reason = error.__cause__ or error
        files = [file for paths in by_split.values() for file in paths]
        raise DataError(f"{listed(files)} cannot be read as one data set: {reason}") from error


def _read_in_memory(files: list[str]) -> datasets.Dataset:
    """Read parquet files without the cache that `datasets` would write."""
    return datasets.Dataset(pa.concat_tables(pq.ParquetFile(file).read() for file in files))


def _read_image_folder(folder: Path) -> dict[str, datasets.Dataset]:
    """Read `[split/]class/**/image`; the class is the name of the folder."""
    parts = {path.name: path for path in _folders(folder) if path.name.lower() in TRAIN_NAMES + EVAL_NAMES}
    if not any(name.lower() in TRAIN_NAMES for name in parts):
        parts = {"train": folder}
    splits = {}
    endings = tuple(ending for ending, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN)
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    for name, part in parts.items():
        found = [(str(path), kind.name) for kind in _folders(part) for path in sorted(kind.rglob("*"))]
        found = [(path, kind) for path, kind in found if path.lower().endswith(endings)]
        if not found:
            raise DataError(
                f"no images in {str(part)!r}: expected a folder for each class with image files in it "
                f"({part.name}/cat/1.png), or *.parquet files"
            )
        columns = {"image": [path for path, _ in found], "label": [kind for _, kind in found]}
        splits[name] = datasets.Dataset.from_dict(columns, features=features)
    return splits


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def choose_split(splits: dict, wanted: str | None, usual: Sequence[str], flag: str) -> str | None:
    if wanted is not None:
        if wanted not in splits:
            raise DataError(f"{flag} {wanted}: there is no such split, only {listed(splits)}")
        return wanted
    lower = {name.lower(): name for name in splits}
    return next((lower[name] for name in usual if name in lower), None)


def find_columns(features: datasets.Features, image: str | None, label: str | None) -> tuple[str, str]:
    """Find the columns of images and labels by their types; a name that was given wins."""
    for flag, name in (("--image-column", image), ("--label-column", label)):
        if name is not None and name not in features:
            raise DataError(f"{flag} {name}: there is no such column; {columns_of(features)}")
    if image is None:
        candidates = [name for name, kind in features.items() if _is_image(kind)]
        image = _only(candidates, ("image", "img"), features, "images", "--image-column")
    if label is None:
        named = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        plain = [name for name, kind in features.items() if name != image and _is_label(kind)]
        label = _only(named or plain, ("label", "labels"), features, "labels", "--label-column")
    elif not isinstance(features[label], datasets.ClassLabel) and not _is_label(features[label]):
        raise DataError(f"--label-column {label}: labels must be whole numbers or strings; {columns_of(features)}")
    return image, label


def _is_image(kind: Any) -> bool:
    # Parquet files written without the `datasets` library have the structure, or the bytes, without the type.
    bare = isinstance(kind, dict) and set(kind) == {"bytes", "path"}
    return isinstance(kind, datasets.Image) or bare or getattr(kind, "dtype", None) in ("binary", "large_binary")


def _is_label(kind: Any) -> bool:
    return isinstance(kind, datasets.Value) and re.fullmatch(r"u?int\d+|(large_)?string", kind.dtype) is not None


def _only(candidates: list[str], usual: Sequence[str], features: datasets.Features, what: str, flag: str) -> str:
    preferred = [name for name in candidates if name in usual]
    for choice in (candidates, preferred):
        if len(choice) == 1:
            return choice[0]
    found = f"{listed(candidates)} could all hold the {what}" if candidates else f"no column holds {what}"
    raise DataError(f"{found}; {columns_of(features)}: name the right one with {flag}")


def columns_of(features: datasets.Features) -> str:
    kinds = {name: getattr(kind, "dtype", None) or type(kind).__name__ for name, kind in features.items()}
    kinds |= {name: type(features[name]).__name__ for name in kinds if not isinstance(features[name], datasets.Value)}
    return "the columns are " + ", ".join(f"{name} ({kind})" for name, kind in kinds.items())


def encoded_images(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    try:
        return rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise DataError(f"--image-column {column}: not a column of images; {columns_of(rows.features)}") from error


def encode_labels(
    rows: datasets.Dataset, column: str, split: str, names: tuple[str, ...] | None, num_classes: int | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Number the classes, from the training split (`names` is None), and check the label of every row."""
    kind = rows.features[column]
    table: pa.Table = rows.select_columns([column]).with_format("arrow")[:]
    values = table.column(column).to_pylist()
    for row, value in enumerate(values):
        if value is None:
            raise DataError(f"{split} row {row} has no label (column {column}): give it one or remove the row")
    if isinstance(kind, datasets.ClassLabel):
        own = tuple(kind.names)
        if names is not None and own != names:
            raise DataError(
                f"the classes of the {split} split, {listed(own)}, are not those of training, {listed(names)}"
            )
        numbers, names = values, own
    elif values and isinstance(values[0], str):
        names = tuple(sorted(set(values))) if names is None else names
        known = {name: number for number, name in enumerate(names)}
        for row, value in enumerate(values):
            if value not in known:
                raise DataError(f"{split} row {row} has the label {value!r}, which is not a class of training")
        numbers = [known[value] for value in values]
    else:
        names = tuple(str(number) for number in range(max(values) + 1)) if names is None else names
        numbers = values
    limit = len(names) if num_classes is None else num_classes
    for row, number in enumerate(numbers):
        if not 0 <= number < limit:
            raise DataError(
                f"{split} row {row} has the label {values[row]!r} (column {column}), but the {limit} classes are "
                f"numbered 0 to {limit - 1}: correct the row, or choose another split, column or --num-classes"
            )
    return np.asarray(numbers, dtype=np.int64), names


def listed(names: Any) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
