"""Stream training images from parquet files: nothing is copied or cached, and training starts at once.

Row groups are shuffled, and their rows are divided among lanes, each with a shuffle buffer. Batches come from the lanes
in turn. Each process has its own lanes, so no two processes read the same rows. The number of lanes is the same for 1,
2, 4 and 8 processes, so these train on the same batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import fsspec
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..explanation import listed
from . import sources
from .datasets import ImageData, ImageDataset, Skipped, Split, decode
from .folder import EVAL_NAMES, TRAIN_NAMES
from .labels import DataError, check_several, encode_labels, missing_classes

__all__ = ["StreamOrder", "StreamedDataset", "StreamedSplit", "load_stream"]

LANES = 8


@dataclass(frozen=True)
class StreamedSplit:
    """The row groups of a split's parquet files, with a checked class number for each row."""

    name: str
    files: tuple[str, ...]
    column: str
    groups: np.ndarray  # (g, 3): index of the file, index of the row group in it, number of rows
    labels: np.ndarray  # (n,) class numbers
    sizes: np.ndarray  # (g,) uncompressed bytes of each row group

    def __len__(self) -> int:
        return len(self.labels)

    def read_group(self, group: int) -> pa.ChunkedArray:
        """Read the encoded images of a row group."""
        file, number, _ = self.groups[group].tolist()
        with open_parquet(self.files[file]) as parquet:
            return parquet.read_row_group(number, columns=[self.column]).column(0)


def load_stream(
    source: Sequence[str],
    *,
    subset: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    val_fraction: float = 0.1,
    num_classes: int | None = None,
) -> ImageData:
    """Load a dataset of parquet files, local or on the Hub, for streaming. Arguments as for `load_data`.

    Of the training split, only the labels are read now. The split to evaluate on is loaded completely; it must exist,
    because `val_fraction` is ignored.

    Raises:
        DataError: As for `load_data`; or there are no parquet files, or no split to evaluate on.
    """
    if list(source) == ["digits"]:
        raise DataError("--streaming cannot be used with the built-in digits: give parquet files or a Hub id")
    files, notes = sources.find_files(list(source))
    files = files or _hub_files(source[0], subset)
    train_name = sources.choose_split(files, train_split, TRAIN_NAMES, "--train-split")
    usual = [name for name in EVAL_NAMES if name != train_name]
    test_name = sources.choose_split(files, test_split, usual, "--test-split")
    if train_name is None or test_name is None:
        raise DataError(
            f"--streaming needs a train and a test split, found {listed(files)}: choose them with "
            "--train-split and --test-split, or leave out --streaming"
        )
    paths = tuple(files[train_name])
    groups, tables = [], []
    for number, path in enumerate(paths):
        try:
            with open_parquet(path) as parquet:
                if number == 0:
                    features = datasets.Features.from_arrow_schema(parquet.schema_arrow)
                    image_column, label_column = sources.find_columns(features, image_column, label_column)
                tables.append(parquet.read(columns=[label_column]))
                groups += [(number, *group) for group in row_groups(parquet)]
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path!r} cannot be read as parquet: {error}") from error
    assert image_column is not None and label_column is not None
    labels, classes = encode_labels(
        datasets.Dataset(pa.concat_tables(tables)), label_column, train_name, None, num_classes
    )
    if not len(labels):
        raise DataError(f"the {train_name} split of {listed(source)} is empty: there is nothing to learn from")
    check_several(labels, classes.names, "")
    loaded = sources.read_parquet({test_name: files[test_name]}, notes)
    test_rows = loaded.read(test_name)
    test_labels, _ = encode_labels(test_rows, label_column, test_name, classes, num_classes)
    images = sources.encoded_images(test_rows, image_column)
    test = Split(test_name, images, image_column, np.arange(len(test_labels)), test_labels, loaded.origins[test_name])
    table = np.array(groups)
    train = StreamedSplit(train_name, paths, image_column, table[:, :3], labels, table[:, 3])
    notes = [*loaded.notes, classes.note, missing_classes(test_labels, classes, test_name)]
    notes = [note for note in (*notes, sources.unused_splits(files, (train_name, test_name))) if note]
    names = classes.padded(num_classes)
    return ImageData(train, test, image_column, label_column, names, tuple(notes), classes.kind)


class StreamedDataset(ImageDataset):
    """A `StreamedSplit` as a dataset; its indices come from `StreamOrder` and contain the encoded image."""

    def __getitem__(self, key: Any) -> tuple[torch.Tensor, int] | Skipped:
        epoch, index, encoded = key
        if isinstance(encoded, Skipped):
            return encoded
        if isinstance(encoded, bytes):
            encoded = {"bytes": encoded, "path": None}
        try:
            image: PIL.Image.Image = decode(encoded)
        except Exception as error:  # decoders raise almost any exception for broken images
            path = (encoded or {}).get("path")
            name = f"{self.split.name} row {index}" + (f" ({path})" if path else "")
            return Skipped(name, f"{type(error).__name__}: {error}")
        return self.change(image, epoch, index), int(self.split.labels[index])


class StreamOrder:
    """Batches of (epoch, index, encoded image); the row groups are read one after the other.

    The order runs in the main process and passes what it reads to the workers. Row groups that cannot be read are
    reported as skipped.

    Args:
        split: the split to read
        buffer: images in the shuffle buffers of all lanes together; this determines the memory used
        batch_size, seed, process, processes: as for `loading.EpochOrder`
    """

    def __init__(
        self, split: StreamedSplit, *, buffer: int, batch_size: int, seed: int, process: int = 0, processes: int = 1
    ) -> None:
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.process, self.processes = process, processes
        self.lanes = -(-LANES // processes) * processes  # a multiple, so that each lane has one process
        if len(split) // self.lanes < batch_size:
            self.lanes = processes
        self.buffer = max(buffer // self.lanes // batch_size, 1) * batch_size  # images per lane, whole batches
        self.per_lane = len(split) // self.lanes // batch_size  # batches per lane
        self.starts = np.concatenate([[0], np.cumsum(split.groups[:, 2])])  # first row of each group
        self.epoch, self.batch = 0, 0

    def __len__(self) -> int:
        return self.per_lane * self.lanes // self.processes

    def seek(self, epoch: int, batch: int) -> None:
        """See `loading.Order.seek`."""
        self.epoch, self.batch = epoch, batch

    def __iter__(self) -> Iterator[list[tuple[int, int, Any]]]:
        first, last = self.batch * self.processes + self.process, self.per_lane * self.lanes
        lanes: dict[int, Iterator[list[tuple[int, int, Any]]]] = {}
        for number in range(first, last, self.processes):
            lane = number % self.lanes
            if lane not in lanes:
                lanes[lane] = self._lane(self.epoch, lane, number // self.lanes)
            yield next(lanes[lane])

    def _lane(self, epoch: int, lane: int, batch: int) -> Iterator[list[tuple[int, int, Any]]]:
        """Yield the batches of a lane, a part of the epoch's sequence of rows, buffer by buffer, from `batch` on."""
        groups = np.random.default_rng((self.seed, epoch)).permutation(len(self.split.groups))
        ends = np.cumsum(self.split.groups[groups, 2])  # of the groups, in the sequence
        size = self.per_lane * self.batch_size
        holds: int = -1
        held: Any = None
        offset = lane * (len(self.split) // self.lanes)
        start = batch * self.batch_size // self.buffer * self.buffer
        skip = batch * self.batch_size - start
        for begin in range(start, size, self.buffer):
            rows: list[tuple[int, int, Any]] = []
            position, end = offset + begin, offset + min(begin + self.buffer, size)
            while position < end:
                place = int(np.searchsorted(ends, position, side="right"))
                group, upto = int(groups[place]), min(int(ends[place]), end)
                if holds != group:
                    holds, held = group, self._read(group)
                low = position - int(ends[place] - self.split.groups[group, 2])  # row in the group
                first, count = int(self.starts[group]) + low, upto - position
                unread = isinstance(held, Skipped)
                values = [held] * count if unread else held.slice(low, count).to_pylist()
                rows += [(epoch, first + row, value) for row, value in enumerate(values)]
                position = upto
            shuffled = np.random.default_rng((self.seed, epoch, lane, begin)).permutation(len(rows))
            for at in range(skip, len(rows), self.batch_size):
                yield [rows[row] for row in shuffled[at : at + self.batch_size]]
            skip = 0

    def _read(self, group: int) -> Any:
        """Read the encoded images of a row group; return `Skipped` if this fails."""
        try:
            return self.split.read_group(group)
        except (pa.ArrowException, OSError) as error:
            file, number, count = self.split.groups[group].tolist()
            name = f"{self.split.files[file]} row group {number} ({count} images)"
            return Skipped(name, f"{type(error).__name__}: {error}")


def open_parquet(file: str) -> pq.ParquetFile:
    """Open a parquet file at a local path or a URL that fsspec supports."""
    if "://" not in file:
        return pq.ParquetFile(file)
    system, path = fsspec.url_to_fs(file)
    return pq.ParquetFile(path, filesystem=system)


def row_groups(parquet: pq.ParquetFile) -> list[tuple[int, int, int]]:
    """Return (index, number of rows, uncompressed bytes) of the row groups with rows."""
    groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
    return [(number, group.num_rows, group.total_byte_size) for number, group in enumerate(groups) if group.num_rows]


def _hub_files(name: str, subset: str | None) -> dict[str, list[str]]:
    """Return the URLs of a Hub dataset's parquet files by split."""
    try:
        found: Any = datasets.load_dataset_builder(name, subset).config.data_files
    except Exception as error:  # the errors of Hub access have no common base class
        raise DataError(
            f"--streaming: {name!r} is neither a local file or folder nor a dataset on the Hugging Face "
            f"Hub ({type(error).__name__}: {error})"
        ) from error
    files = {str(split): [str(file) for file in paths] for split, paths in (found or {}).items()}
    if not files or not all(path.endswith(".parquet") for paths in files.values() for path in paths):
        raise DataError(f"--streaming needs parquet files, but {name!r} has others: leave out --streaming")
    return files
