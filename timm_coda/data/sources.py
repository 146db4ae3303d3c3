"""Find the splits of a labelled image dataset, and its image and label columns.

`datasets.py` loads the images before training; `streaming.py` reads them during training.
"""

import glob
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.data_files import DataFilesList

from ..explanation import listed
from ..images import image_endings, walk_folder
from .folder import EVAL_NAMES, TRAIN_NAMES, ImageFolder
from .labels import DataError

DIGITS = Path(__file__).parent / "digits"
# Usual names of label columns, in any case; the second kind is considered only if there is none of the first.
LABEL_NAMES = (("label", "labels"), ("class", "category", "target"))


@dataclass(frozen=True)
class Splits:
    """The splits of a dataset, to be read by name."""

    names: tuple[str, ...]
    read: Callable[[str], datasets.Dataset]
    origins: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Of each split: its parquet files, or the folder of its class folders; nothing for a dataset of the Hub."""
    notes: tuple[str, ...] = ()
    folder: ImageFolder | None = None


def unused_splits(names: Collection[str], used: Collection[str]) -> str:
    """Return a note about splits that are not used, "" if there are none."""
    others = [name for name in names if name not in used]
    return f"not used: the splits {listed(others)}" if others else ""


def find_splits(sources: list[str], subset: str | None, wanted: Sequence[str | None] = ()) -> Splits:
    """Find a dataset's splits. Of an image folder, the `wanted` folders are splits however they are named."""
    if sources == ["digits"]:
        digits = {split: (str(DIGITS / f"{split}.parquet"),) for split in ("train", "test")}
        return Splits(tuple(digits), lambda split: _read_in_memory(digits[split]), digits)
    if len(sources) == 1 and os.path.isdir(sources[0]):
        entries = walk_folder(sources[0])
        if not any(entry.kind == "file" and entry.path.endswith(".parquet") for entry in entries):
            folder = ImageFolder(sources[0], entries, wanted)
            origins = {name: (folder.place(name),) for name in folder.names}
            return Splits(folder.names, lambda split: _read_images(folder, split), origins, folder=folder)
    files, notes = find_files(sources)
    return read_parquet(files, notes) if files else _read_hub(sources[0], subset)


def find_files(sources: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Find parquet files, by the name of their split, and notes. There are none if the source may be a Hub id."""
    files: dict[str, str] = {}  # path: the part of it that may contain the split's name
    notes = []
    for source in sources:
        if os.path.isdir(source):
            inside = [entry.path for entry in walk_folder(source) if entry.kind == "file"]
            found = [os.path.join(source, path) for path in inside if path.endswith(".parquet")]
            files |= {file: os.path.relpath(file, source) for file in found}
            endings = image_endings()
            others = [path for path in inside if os.path.splitext(path)[1].lower() in endings]
            if others:
                notes.append(f"{len(others):,} left out, images beside the parquet files: {others[0]}, ...")
        else:
            found = [source] if os.path.isfile(source) else _matches(source)
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
        return {"train": by_split[""]}, notes
    if "" in by_split:
        raise DataError(f"{listed(by_split[''])} has neither train nor test in its name, unlike the other files")
    return by_split, notes


def _matches(pattern: str) -> list[str]:
    """Return the files that match a pattern. Its first folders are literal as far as folders of these names exist."""
    fixed, rest = "", Path(pattern).parts
    while len(rest) > 1 and os.path.isdir(os.path.join(fixed, rest[0])):
        fixed, rest = os.path.join(fixed, rest[0]), rest[1:]
    return sorted(glob.glob(os.path.join(glob.escape(fixed), *rest), recursive=True))


def _read_hub(name: str, subset: str | None) -> Splits:
    try:
        found: dict[str, datasets.Dataset] = dict(datasets.load_dataset(name, subset))  # type: ignore[arg-type]
        return Splits(tuple(found), found.__getitem__)
    except Exception as error:  # the errors of Hub access have no common base class
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{name!r} is neither a local file or folder nor a dataset that could be loaded from the Hugging Face Hub "
            f"({type(error).__name__}: {reason}); check the spelling, the connection and HF_HUB_OFFLINE"
        ) from error


def read_parquet(by_split: dict[str, list[str]], notes: Sequence[str] = ()) -> Splits:
    """Read the parquet files of each split."""
    for split, paths in by_split.items():
        rows = 0
        for file in paths:
            try:
                rows += pq.read_metadata(file).num_rows
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{file!r} cannot be read as parquet: {error}") from error
        if rows == 0:  # `datasets` would only report that an instruction corresponds to no data
            raise DataError(f"the {split} split is empty: no rows in {listed(paths)}")
    origins = {split: tuple(paths) for split, paths in by_split.items()}
    try:
        # Plain names would be taken for patterns: "data[1]" for "data1".
        exact = {split: _exact_files(paths) for split, paths in by_split.items()}
        found: dict[str, datasets.Dataset] = dict(datasets.load_dataset("parquet", data_files=exact))  # type: ignore
        return Splits(tuple(found), found.__getitem__, origins, tuple(notes))
    except OSError as error:
        note = f"the cache of Hugging Face datasets cannot be used ({error}): the images are kept in memory"
        return Splits(tuple(by_split), lambda split: _read_in_memory(by_split[split]), origins, (*notes, note))
    except Exception as error:
        reason = error.__cause__ or error
        files = [file for paths in by_split.values() for file in paths]
        raise DataError(f"{listed(files)} cannot be read as one dataset: {reason}") from error


def _exact_files(paths: Sequence[str]) -> DataFilesList:
    """Return files for `load_dataset` that are not patterns. The times of change decide whether its cache is valid."""
    paths = [os.path.abspath(path) for path in paths]
    if any("::" in path for path in paths):
        raise OSError("it reads names with '::' as archives in archives")
    return DataFilesList(paths, [(str(os.stat(path).st_mtime),) for path in paths])


def _read_in_memory(files: Sequence[str]) -> datasets.Dataset:
    """Read parquet files into memory, without the cache that `datasets` would write."""
    return datasets.Dataset(pa.concat_tables(pq.ParquetFile(file).read() for file in files))


def _read_images(folder: ImageFolder, split: str) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    classes = folder.read(split)
    paths = [path for paths in classes.values() for path in paths]
    labels = [name for name, paths in classes.items() for _ in paths]
    images = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), pa.array(paths)], ["bytes", "path"])
    table: Any = pa.table({"image": images, "label": labels})
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))


def choose_split(splits: Collection[str], wanted: str | None, usual: Sequence[str], flag: str) -> str | None:
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
    found = f"--label-column {label}"
    if label is None:
        label = _find_label(features, image)
        found = f"column {label} looks like the labels, but cannot be used"
    if not isinstance(features[label], datasets.ClassLabel) and not _is_label(features[label]):
        raise DataError(
            f"{found}: labels must be integers, strings or booleans; {columns_of(features)}: choose another one with "
            "--label-column"
        )
    return image, label


def _find_label(features: datasets.Features, image: str) -> str:
    """Return the only column that is marked as the labels, by its type or its name."""
    first, second = ([name for name in features if name != image and name.lower() in usual] for usual in LABEL_NAMES)
    typed = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    both = [name for name in first if name in typed]
    candidates = (both or [*first, *typed]) if first else typed or second
    if not candidates:
        raise DataError(
            f"no column holds labels by its type (ClassLabel) or name ({listed(sum(LABEL_NAMES, ()))}); "
            f"{columns_of(features)}: choose one with --label-column"
        )
    return _only(candidates, (), features, "labels", "--label-column")


def _is_image(kind: Any) -> bool:
    # Parquet files written without the `datasets` library have its image structure, or bare bytes, but not its type.
    bare = isinstance(kind, dict) and set(kind) == {"bytes", "path"}
    return isinstance(kind, datasets.Image) or bare or getattr(kind, "dtype", None) in ("binary", "large_binary")


def _is_label(kind: Any) -> bool:
    return isinstance(kind, datasets.Value) and re.fullmatch(r"u?int\d+|(large_)?string|bool", kind.dtype) is not None


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
