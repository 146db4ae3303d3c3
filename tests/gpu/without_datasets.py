"""Parquet files as training and test images where the package `datasets` is not installed, as on a bare GPU machine."""

import importlib.machinery
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["install"]


class _Rows:
    """Encoded images of a table, as `datasets` gives the rows of a column that is not decoded."""

    def __init__(self, column: str, values: pa.ChunkedArray) -> None:
        self.column, self.values = column, values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {self.column: self.values[row].as_py()}


def install() -> None:
    """Make `timm_coda.data` importable, with a `load_data` that reads parquet files with columns of images and classes.

    Their names contain train or test, and were written by `datasets`.
    """
    if "datasets" not in sys.modules:
        for name in ("datasets", "datasets.data_files"):
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = module
        # Types that our code names in annotations or asks columns about; no column comes from here.
        for name in ("Dataset", "IterableDataset", "Features", "ClassLabel", "Image", "Value"):
            setattr(sys.modules["datasets"], name, type(name, (), {}))
        sys.modules["datasets.data_files"].DataFilesList = list
    from timm_coda import data
    from timm_coda.evaluate import runner

    data.load_data = runner.load_data = load_data


def load_data(source: str | Sequence[str], **options: Any) -> Any:
    """Return the `ImageData` of parquet files, or of a folder of them."""
    from timm_coda.data import ImageData
    from timm_coda.data.datasets import Split

    sources = [source] if isinstance(source, str) else list(source)
    files = [file for item in sources for file in (sorted(Path(item).glob("*.parquet")) or [Path(item)])]
    splits, names = {}, ()
    for split in ("train", "test"):
        chosen = [str(file) for file in files if split in file.name]
        tables = [pq.ParquetFile(file).read() for file in chosen]
        if not tables:
            continue
        kinds = json.loads(tables[0].schema.metadata[b"huggingface"])["info"]["features"]
        image = next(name for name, kind in kinds.items() if kind["_type"] == "Image")
        label = next(name for name, kind in kinds.items() if kind["_type"] == "ClassLabel")
        names = tuple(kinds[label]["names"])
        table = pa.concat_tables(table.replace_schema_metadata(None) for table in tables)
        labels = table.column(label).to_numpy().astype(np.int64)
        rows: Any = _Rows(image, table.column(image))
        splits[split] = Split(split, rows, image, np.arange(len(labels)), labels, tuple(chosen))
    test = splits["test"]
    return ImageData(splits.get("train", test), test, test.column, "label", names, ())
