"""Descriptions of datasets: the same for the same data wherever it is, and each change is named."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.train_cases import image_file
from timm_coda import data


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write(root: Path, classes=("cat", "dog"), count: int = 20) -> Path:
    rng = np.random.default_rng(0)
    for number, name in enumerate(classes):
        for split, rows in (("train", range(count)), ("test", range(count // 4))):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for row in rows:
                (root / split / name / f"{row:03}.png").write_bytes(image_file(rng, number))
    return root


def describe(root: Path, **options) -> dict:
    return json.loads(json.dumps(data.describe_data(data.load_data(root, **options))))


def test_it_does_not_matter_where_the_folder_is(tmp_path, monkeypatch):
    before = describe(write(tmp_path / "a"))
    assert before["classes"] == ["cat", "dog"] and before["train"]["per_class"] == [20, 20]
    shutil.copytree(tmp_path / "a", tmp_path / "other place" / "b")
    monkeypatch.chdir(tmp_path / "other place")
    for place in ("b", "./b/", tmp_path / "other place" / "b"):
        assert describe(place) == before and data.data_changes(before, describe(place)) == []


def rename_class(root):
    for split in ("train", "test"):
        (root / split / "cat").rename(root / split / "zebra")


def delete_half(root):
    for path in sorted((root / "train").rglob("*.png"))[::2]:
        path.unlink()


def move_one(root):
    (root / "train/cat/000.png").rename(root / "train/dog/x.png")


def exchange(root):
    rng = np.random.default_rng(1)
    image = np.frombuffer(image_file(rng, 0), np.uint8)
    (root / "train/cat/000.png").write_bytes(image.tobytes() + b"more")


def rename_file(root):
    (root / "test/dog/000.png").rename(root / "test/dog/new.png")


def add_class(root):
    for split in ("train", "test"):
        shutil.copytree(root / split / "cat", root / split / "eel")


@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        (rename_class, ["class 'cat' is now 'zebra'"]),
        (delete_half, ["training images were 40, are 20"]),
        (move_one, ["labels of training images changed: 19 'cat' (were 20), 21 'dog' (were 20)"]),
        (exchange, ["training images changed: other names, sizes or order of files"]),
        (rename_file, ["test images changed: other names, sizes or order of files"]),
        (add_class, ["classes new: 'eel'", "training images were 40, are 60", "test images were 10, are 15"]),
    ],
)
def test_each_change_is_named(tmp_path, change, sentences):
    before = describe(write(tmp_path / "a"))
    change(tmp_path / "a")
    assert data.data_changes(before, describe(tmp_path / "a")) == sentences


def test_images_that_are_held_out(tmp_path):
    root = write(tmp_path / "a") / "train"
    before = describe(root)
    assert data.data_changes(before, describe(root)) == []
    assert data.data_changes(before, describe(root, seed=1)) == [
        "training images changed: other names, sizes or order of files",
        "test images changed: other names, sizes or order of files",
    ]
    changes = data.data_changes(before, describe(root, val_fraction=0.2))
    assert changes == ["training images were 36, are 32", "test images were 4, are 8"]


def write_shards(root: Path, names=("cat", "dog"), rows: int = 12, shift: int = 0, value: int = 0) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(("train-0", "train-1", "test-0")):
        rng = np.random.default_rng(number + value)
        table = pa.table(
            {
                "image": [image_file(rng, 0) for _ in range(rows)],
                "label": [names[(row + shift) % 2] for row in range(rows)],
            }
        )
        pq.write_table(table, root / f"{file}.parquet", row_group_size=5)
    return root


@pytest.mark.parametrize("load", [data.load_data, data.load_stream])
def test_parquet_files(tmp_path, load):
    before = data.describe_data(load([str(write_shards(tmp_path / "a"))]))
    assert before == data.describe_data(data.load_data(tmp_path / "a")), "however the files are read"
    for change, sentences in (
        ({}, []),
        ({"names": ("cat", "kitten")}, ["class 'dog' is now 'kitten'"]),
        ({"rows": 10}, ["training images were 24, are 20", "test images were 12, are 10"]),
        ({"shift": 1}, ["labels of training images changed", "labels of test images changed"]),
        ({"names": ("ant", "bat")}, ["classes gone: 'cat', 'dog'", "classes new: 'ant', 'bat'"]),
    ):
        folder = write_shards(tmp_path / f"b{len(str(change))}", **change)
        now = data.describe_data(load([str(folder)]))
        assert data.data_changes(before, now) == sentences and (now == before) == (not sentences)
    (tmp_path / "a/train-1.parquet").rename(tmp_path / "a/train-2.parquet")
    now = data.describe_data(load([str(tmp_path / "a")]))
    assert data.data_changes(before, now) == ["training images changed: other names, sizes or order of files"]


def test_datasets_without_files(tmp_path, monkeypatch):
    """A dataset of the Hub, for which a folder that `load_dataset` reads stands in."""
    from timm_coda.data import sources

    descriptions = []
    for value in (0, 0, 1):
        folder = write_shards(tmp_path / f"hub{len(descriptions)}", value=value)
        monkeypatch.chdir(folder)
        splits = sources._read_hub(str(folder), None)
        rows = splits.read("train")
        images = sources.encoded_images(rows, "image")
        split = data.Split("train", images, "image", np.arange(24), np.zeros(24, int))
        loaded = data.ImageData(split, split, "image", "label", ("cat",), ())
        descriptions.append(data.describe_data(loaded))
    assert data.data_changes(*descriptions[:2]) == []
    assert len(data.data_changes(descriptions[0], descriptions[2])) == 2


def test_the_digits():
    digits = data.load_data("digits")
    assert data.describe_data(digits) == data.describe_data(data.load_data(["digits"]))
    assert digits.notes == () and digits.label_kind == "declared" and digits.account == {}
