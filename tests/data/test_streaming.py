"""Streaming parquet files: every row once, each read by one process, from any batch on, and with broken files."""

import itertools
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from helpers.train_cases import image_file
from timm_coda import data
from timm_coda.data import streaming

COUNT, GROUP = 264, 5  # rows in all training files, rows per row group


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Four training files with row groups of five rows, and one test file; an image's path is its row number."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["r", "g", "b"])})
    for name, rows in (*((f"train-{i}", range(66 * i, 66 * i + 66)) for i in range(4)), ("test", range(21))):
        images = [{"bytes": image_file(rng, row % 3), "path": f"{row}.png"} for row in rows]
        columns = {"image": images, "label": [row % 3 for row in rows]}
        table = datasets.Dataset.from_dict(columns, features=features).data.table
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=GROUP)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def make_order(split, **options) -> streaming.StreamOrder:
    return streaming.StreamOrder(split, **{"buffer": 64, "batch_size": 4, "seed": 1} | options)


def rows_of(batch) -> list[int]:
    return [index for _, index, _ in batch]


def test_labels_and_names_are_those_of_the_loaded_data_set(shards):
    streamed, loaded = streaming.load_stream([str(shards)]), data.load_data(shards)
    with pytest.raises(data.DataError, match="--hold-out cannot be used with --streaming"):
        streamed.held_out(1)
    assert streamed.label_names == loaded.label_names and len(streamed.test) == len(loaded.test) == 21
    assert np.array_equal(streamed.train.labels, loaded.train.labels)
    assert streamed.train.groups[:, 2].sum() == COUNT and len(streamed.train.groups) == 4 * 14
    found = streaming._hub_files(str(shards), None)  # a folder's dataset builder lists its files like a Hub dataset's
    assert {name: len(files) for name, files in found.items()} == {"train": 4, "test": 1}
    url = streaming.open_parquet(f"file://{shards}/test.parquet")
    assert url.metadata.num_rows == 21


def test_every_row_comes_once_with_its_image_and_label(shards):
    split = streaming.load_stream([str(shards)]).train
    dataset = streaming.StreamedDataset(split, lambda image: image.getpixel((0, 0)))
    order = make_order(split)
    batches = list(order)
    assert len(batches) == len(order) == 64 and {len(batch) for batch in batches} == {4}
    rows = [row for batch in batches for row in rows_of(batch)]
    assert len(set(rows)) == 256  # of 264: eight lanes of 33 rows give eight batches of four each
    for key in batches[5]:
        assert key[2]["path"] == f"{key[1]}.png"
        pixel, label = dataset[key]
        assert label == key[1] % 3 == int(np.argmax(pixel))
    order.seek(1, 0)
    other = [row for batch in order for row in rows_of(batch)]
    assert rows != other and len(set(rows) | set(other)) > 256  # other rows are left out
    steps = np.abs(np.diff([row for batch in batches[::8] for row in rows_of(batch)]))
    assert np.median(steps) > 2, "a lane's buffer is shuffled"


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_processes_share_the_batches_and_read_different_rows(shards, processes, monkeypatch):
    split = streaming.load_stream([str(shards)]).train
    reads: list[int] = []
    read_group = streaming.StreamedSplit.read_group
    monkeypatch.setattr(streaming.StreamedSplit, "read_group", lambda s, g: reads.append(g) or read_group(s, g))
    parts, by_process = [], []
    for process in range(processes):
        reads.clear()
        parts.append([rows_of(batch) for batch in make_order(split, process=process, processes=processes)])
        by_process.append(set(reads))
    together = [batch for turn in zip(*parts, strict=True) for batch in turn]
    assert len({row for batch in together for row in batch}) == 4 * len(together) >= 240
    if 8 % processes == 0:
        assert together == [rows_of(batch) for batch in make_order(split)]
    # A row group is read by one process, or by two if its rows belong to two lanes.
    assert sum(len(groups) for groups in by_process) <= 56 + 9


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_an_epoch_begins_at_any_batch(shards, processes):
    split = streaming.load_stream([str(shards)]).train
    order = make_order(split, process=processes - 1, processes=processes, buffer=100)
    order.seek(2, 0)
    whole = list(order)
    for batch in (1, 9, len(order) - 1, len(order)):
        order.seek(2, batch)
        assert list(order) == whole[batch:]


def test_what_cannot_be_read_is_reported(shards, tmp_path):
    """One file has broken data but an intact footer; another is deleted after the start."""
    files = [tmp_path / path.name for path in sorted(shards.glob("*.parquet"))]
    for file in files:
        file.write_bytes((shards / file.name).read_bytes())
    broken = bytearray(files[1].read_bytes())
    broken[4 : len(broken) // 2] = bytes(len(broken) // 2 - 4)
    labels = streaming.load_stream([str(tmp_path)]).train
    files[1].write_bytes(broken)
    files[2].unlink()
    dataset = streaming.StreamedDataset(labels, lambda image: np.zeros(1))
    samples = [dataset[key] for batch in make_order(labels) for key in batch]
    skipped = {sample.name: sample.reason for sample in samples if isinstance(sample, data.Skipped)}
    assert len(samples) == 256
    gone = {name for name in skipped if name.startswith(str(files[2]))}
    assert len(gone) == 14 and all("FileNotFoundError" in skipped[name] for name in gone)
    assert any(name.startswith(f"{files[1]} row group") and name.endswith("(5 images)") for name in skipped)
    assert sum(not isinstance(sample, data.Skipped) for sample in samples) > 120


def test_too_small_for_eight_lanes(shards):
    split = streaming.load_stream([str(shards)]).train
    order = make_order(split, batch_size=100)
    assert order.lanes == 1 and [len(batch) for batch in order] == [100, 100]
    assert len({row for batch in order for row in rows_of(batch)}) == 200
    assert len(make_order(split, batch_size=300)) == 0


def test_wrong_input(shards, tmp_path):
    with pytest.raises(data.DataError, match="--streaming needs a train and a test split, found train"):
        streaming.load_stream([str(shards / "train-0.parquet")])
    (tmp_path / "train.parquet").write_text("no")
    (tmp_path / "test.parquet").write_bytes((shards / "test.parquet").read_bytes())
    with pytest.raises(data.DataError, match=r"train.parquet' cannot be read as parquet"):
        streaming.load_stream([str(tmp_path)])
    with pytest.raises(data.DataError, match="--streaming cannot be used with the built-in digits"):
        streaming.load_stream(["digits"])
    assert len(list(itertools.islice(shards.iterdir(), 9))) == 5, "nothing is written beside the files"
