"""Numbering classes: gaps, huge and negative numbers, names that look alike, and splits that must agree."""

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


def write(tmp_path, **splits) -> str:
    """Write a parquet file for each split, with these labels, and return the folder."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "set"
    folder.mkdir(exist_ok=True)
    for split, labels in splits.items():
        table = pa.table({"image": [image_file(rng, 0) for _ in range(len(labels))], "label": labels})
        pq.write_table(table, folder / f"{split}.parquet")
    return str(folder)


both = pytest.mark.parametrize("load", [data.load_data, data.load_stream])


@both
@pytest.mark.parametrize(
    ("train", "names", "numbers"),
    [
        ([17, 1_000_003, 17], ("17", "1000003"), [0, 1, 0]),
        ([5_000_000_000, 2, 3], ("2", "3", "5000000000"), [2, 0, 1]),
        ([1, 2, 3], ("1", "2", "3"), [0, 1, 2]),
        ([10, 9, 10], ("9", "10"), [1, 0, 1]),
    ],
)
def test_labels_with_gaps_are_renumbered(tmp_path, load, train, names, numbers):
    loaded = load([write(tmp_path, train=train, test=train[::-1])])
    assert loaded.label_names == names and loaded.label_kind != "numbers"
    assert loaded.train.labels.tolist() == numbers and loaded.test.labels.tolist() == numbers[::-1]
    assert f"{len(names)} classes renumbered" in loaded.notes[0] and f"{names[0]} is 0" in loaded.notes[0]
    folder = write(tmp_path, test=[train[0], train[0] + 5])
    with pytest.raises(data.DataError, match=rf"test row 1 has the label {train[0] + 5} .*not a class.*: {names[0]}, "):
        load([folder])


@both
def test_labels_without_gaps_are_the_numbers_of_classes(tmp_path, load):
    loaded = load([write(tmp_path, train=pa.array([2, 0, 1], pa.uint8()), test=[1, 1])])
    assert loaded.label_names == ("0", "1", "2") and loaded.label_kind == "numbers" and loaded.notes == ()
    folder = write(tmp_path, train=[0, 3], test=[2, 1])
    loaded = load([folder], num_classes=5)
    assert loaded.label_names == ("0", "1", "2", "3", "4") and loaded.label_kind == "numbers"
    assert loaded.train.labels.tolist() == [0, 3] and loaded.test.labels.tolist() == [2, 1]
    with pytest.raises(data.DataError, match=r"train row 1 has the label 3 .*3 classes are numbered 0 to 2"):
        load([folder], num_classes=3)


@both
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, -1], r"train row 2 has the label -1 .*labels below 0 usually mark images without a label"),
        (pa.array([0, 2**63], pa.uint64()), r"train: a label \(column label\) is too large"),
        ([0, None, 1], r"train row 1 has no label \(column label\)"),
        ([3, 3, 3], r"all 3 images to train on are of one class, '3'"),
        (["a", "a"], r"all 2 images to train on are of one class, 'a'"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, load, labels, message):
    with pytest.raises(data.DataError, match=message):
        load([write(tmp_path, train=labels, test=labels)])


def test_two_spellings_of_a_name_are_one_class(tmp_path):
    loaded = data.load_data(write(tmp_path, train=["caf\u00e9", "cafe\u0301", "tea"], test=["cafe\u0301"]))
    assert loaded.label_names == ("caf\u00e9", "tea")
    assert loaded.train.labels.tolist() == [0, 0, 1] and loaded.test.labels.tolist() == [0]
    assert loaded.notes == (
        "1 class names have a second spelling in Unicode, with combining characters",
        "no test images of 1 of 2 classes: tea",
    )


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("c\u0430t", r"closest is 'cat' \(character 2: CYRILLIC SMALL LETTER A, and LATIN SMALL LETTER A\)"),
        ("cat ", r"closest is 'cat' \(character 4: SPACE, and nothing\)"),
        ("sea\u00a0eel", r"closest is 'sea eel' \(character 4: NO-BREAK SPACE, and SPACE\)"),
        ("Cat", r"closest is 'cat'$"),
        ("xyz", r"not a class of training: cat, sea eel$"),
    ],
)
def test_names_that_look_alike(tmp_path, name, difference):
    with pytest.raises(data.DataError, match=difference):
        data.load_data(write(tmp_path, train=["cat", "sea eel"], test=["cat", name]))


def test_declared_classes_must_be_the_same(tmp_path):
    files = []
    for split, names in (
        ("train", ["cat", "caf\u00e9"]),
        ("test", ["cat", "cafe\u0301"]),
        ("val", ["cat", "caf\u0435"]),
    ):
        kind = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = {"image": [{"bytes": image_file(np.random.default_rng(0), 0), "path": None}] * 2, "label": [1, 0]}
        files.append(tmp_path / f"{split}.parquet")
        pq.write_table(datasets.Dataset.from_dict(rows, features=kind).data.table, files[-1])
    loaded = data.load_stream([*map(str, files[:2])])
    assert loaded.label_names == ("cat", "caf\u00e9") and loaded.test.labels.tolist() == [1, 0]
    with pytest.raises(data.DataError, match=r"class 1 is 'caf.' and 'caf.' \(character 4: CYRILLIC .*, and LATIN"):
        data.load_stream([str(files[0]), str(files[2])])


@both
def test_kinds_of_labels_are_not_mixed(tmp_path, load):
    with pytest.raises(data.DataError, match=r"labels of the test split are int64, those of training are texts"):
        data.load_stream([write(tmp_path, train=["a", "b"], test=[0, 1])])
    loaded = data.load_stream([write(tmp_path, train=[7, 9], test=["9", "7"])])
    assert loaded.test.labels.tolist() == [1, 0]
