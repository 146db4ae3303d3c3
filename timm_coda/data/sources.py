"""Find the splits of a labelled image dataset, its image and label columns, and its classes.

`datasets.py` loads the images before training; `streaming.py` reads them during training.
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
# Names of splits, in order of preference. Validation comes before test, because the test labels of many datasets on the
# Hub are withheld (-1).
TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")


class DataError(ValueError):
    """A dataset that cannot be used; the message names what was found and says how to fix the problem."""


def find_splits(sources: list[str], subset: str | None) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Find a dataset's splits; return them by name, and notes for the user about how they were loaded."""
    if sources == ["digits"]:
        return {split: _read_in_memory([str(DIGITS / f"{split}.parquet")]) for split in ("train", "test")}, []
    if len(sources) == 1 and os.path.isdir(sources[0]) and not any(Path(sources[0]).rglob("*.parquet")):
        return _read_image_folder(Path(sources[0])), []
    files = find_files(sources)
    return read_parquet(files) if files else _read_hub(sources[0], subset)


def find_files(sources: list[str]) -> dict[str, list[str]]:
    """Find parquet files, grouped by the name of their split. Returns {} if the source may be an id on the Hub."""
    files: dict[str, str] = {}  # path: the part of it that may contain the split's name
    for source in sources:
        if os.path.isdir(source):
            found = sorted(str(path) for path in Path(source).rglob("*.parquet"))
            files |= {file: os.path.relpath(file, source) for file in found}
        else:
            found = [source] if os.path.isfile(source) else sorted(glob.glob(source, recursive=True))
            files |= {file: os.path.basename(file) for file in found}
        if not found and (len(sources) > 1 or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source)):
            raise DataError(
                f"nothing found at {source!r}: no parquet file, no folder, and no file matches it as a pattern"
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
        raise DataError(f"{listed(by_split[''])} has neither train nor test in its name, unlike the other files")
    return by_split


def _read_hub(name: str, subset: str | None) -> tuple[dict[str, datasets.Dataset], list[str]]:
    try:
        return dict(datasets.load_dataset(name, subset)), []  # type: ignore[arg-type]
    except Exception as error:  # the errors of Hub access have no common base class
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{name!r} is neither a local file or folder nor a dataset that could be loaded from the Hugging Face Hub "
            f"({type(error).__name__}: {reason}); check the spelling, the connection and HF_HUB_OFFLINE"
        ) from error


def read_parquet(by_split: dict[str, list[str]]) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Read the parquet files of each split; return the splits and notes as `find_splits` does."""
    for split, paths in by_split.items():
        rows = 0
        for file in paths:
            try:
                rows += pq.read_metadata(file).num_rows
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{file!r} cannot be read as parquet: {error}") from error
        if rows == 0:  # `datasets` would only report that an instruction corresponds to no data
            raise DataError(f"the {split} split is empty: no rows in {listed(paths)}")
    try:
        return dict(datasets.load_dataset("parquet", data_files=by_split)), []  # type: ignore[arg-type]
    except OSError as error:
        note = f"the cache of Hugging Face datasets cannot be written ({error}): the images are kept in memory"
        return {split: _read_in_memory(paths) for split, paths in by_split.items()}, [note]
    except Exception as error:
        reason = error.__cause__ or error
        files = [file for paths in by_split.values() for file in paths]
        raise DataError(f"{listed(files)} cannot be read as one dataset: {reason}") from error


def _read_in_memory(files: list[str]) -> datasets.Dataset:
    """Read parquet files into memory, without the cache that `datasets` would write."""
    return datasets.Dataset(pa.concat_tables(pq.ParquetFile(file).read() for file in files))


def _read_image_folder(folder: Path) -> dict[str, datasets.Dataset]:
    """Read `[split/]class/**/image`; the folder's name is the class."""
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
                f"no images in {str(part)!r}: expected one folder per class with image files in it "
                f"({part.name}/cat/1.png), or *.parquet files"
            )
        columns = {"image": [path for path, _ in found], "label": [kind for _, kind in found]}
        splits[name] = datasets.Dataset.from_dict(columns, features=features)
    return splits


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def choose_split(splits: dict, wanted: str | None, usual: Sequence[str], flag: str) -> str | None:
    """Return the name of the `wanted` split, or else the first `usual` one that exists, or else None.

    Raises:
        DataError: The wanted split does not exist.
    """
    if wanted is not None:
        if wanted not in splits:
            raise DataError(f"{flag} {wanted}: no such split, only {listed(splits)}")
        return wanted
    lower = {name.lower(): name for name in splits}
    return next((lower[name] for name in usual if name in lower), None)


def find_columns(features: datasets.Features, image: str | None, label: str | None) -> tuple[str, str]:
    """Find the image and the label column by their types; a given name is used instead.

    Raises:
        DataError: A column is missing, ambiguous or of a wrong type.
    """
    for flag, name in (("--image-column", image), ("--label-column", label)):
        if name is not None and name not in features:
            raise DataError(f"{flag} {name}: no such column; {columns_of(features)}")
    if image is None:
        candidates = [name for name, kind in features.items() if _is_image(kind)]
        image = _only(candidates, ("image", "img"), features, "images", "--image-column")
    if label is None:
        named = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        plain = [name for name, kind in features.items() if name != image and _is_label(kind)]
        label = _only(named or plain, ("label", "labels"), features, "labels", "--label-column")
    elif not isinstance(features[label], datasets.ClassLabel) and not _is_label(features[label]):
        raise DataError(f"--label-column {label}: labels must be integers or strings; {columns_of(features)}")
    return image, label


def _is_image(kind: Any) -> bool:
    # Parquet files written without the `datasets` library have its image structure, or bare bytes, but not its type.
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
    raise DataError(f"{found}; {columns_of(features)}: choose one with {flag}")


def columns_of(features: datasets.Features) -> str:
    """Describe the columns and their types, for error messages."""
    kinds = {name: getattr(kind, "dtype", None) or type(kind).__name__ for name, kind in features.items()}
    kinds |= {name: type(features[name]).__name__ for name in kinds if not isinstance(features[name], datasets.Value)}
    return "the columns are " + ", ".join(f"{name} ({kind})" for name, kind in kinds.items())


def encoded_images(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """Select the image column, without decoding the images.

    Raises:
        DataError: The column does not hold images.
    """
    try:
        return rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise DataError(f"--image-column {column}: not a column of images; {columns_of(rows.features)}") from error


def encode_labels(
    rows: datasets.Dataset, column: str, split: str, names: tuple[str, ...] | None, num_classes: int | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Number the classes and check the label of every row.

    Args:
        rows: The rows of a split.
        column: The label column.
        split: The split's name, for error messages.
        names: Class names of the training split; None if this is the training split.
        num_classes: Number of classes; by default that of the names.

    Returns:
        Class numbers (n,) and class names.

    Raises:
        DataError: A label is missing or not a class, or the classes differ from those of training.
    """
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
                f"the classes of the {split} split, {listed(own)}, differ from those of training, {listed(names)}"
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
    """Join at most 20 names with commas, and state how many more there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
