"""Image folders: every file is used or accounted for, links are followed, and splits are not taken for classes."""

import json
import os
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from helpers.train_cases import image_file
from timm_coda import data

IMAGE = image_file(np.random.default_rng(0), 0)


def write(root: Path, *folders: str, count: int = 10, ending: str = ".png") -> Path:
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for row in range(count):
            (root / folder / f"{row}{ending}").write_bytes(IMAGE)
    return root


def test_every_file_is_used_or_accounted_for(tmp_path):
    root = write(tmp_path / "f", "train/cat", "train/dog")
    os.symlink(write(tmp_path / "elsewhere", "more") / "more", root / "train/cat/linked")
    os.symlink(tmp_path / "elsewhere/more/0.png", root / "train/dog/linked.png")
    write(root, "train/eel", ending="")  # names without ending
    write(root, "train", count=5)  # loose images
    (root / "train/empty").mkdir()
    (root / "train/cat/notes.txt").write_text("no image")
    (root / "train/eel/README").write_text("Python, no image, although it begins like a PPM file")
    (root / "train/.DS_Store").write_text("hidden")
    (root / "train/dog/._0.png").write_text("hidden")
    write(root, "train/__MACOSX/cat", count=2)
    os.symlink(root / "train", root / "train/dog/loop")
    os.symlink("/no/such/file.png", root / "train/dog/gone.png")
    (root / "labels.csv").write_text("a,b")
    loaded = data.load_data(root)
    assert loaded.label_names == ("cat", "dog", "eel") and loaded.label_kind != "numbers"
    labels = np.concatenate([loaded.train.labels, loaded.test.labels])
    assert np.bincount(labels).tolist() == [20, 11, 10]
    account = json.loads(json.dumps(loaded.account))
    assert account["used"] == {"train": 41} and account["links"] == 2
    assert {reason: entry["count"] for reason, entry in account["left_out"].items()} == {
        "beside the class folders": 5,
        "hidden": 3,  # of __MACOSX, the folder
        "link to a folder that contains it": 1,
        "broken link": 1,
        "empty folder, so not a class": 1,
        "no image, .txt": 1,
        "no image, .csv": 1,
        "no image, without ending": 1,
    }
    assert account["left_out"]["beside the class folders"]["examples"] == ["train/0.png", "train/1.png"]
    assert "5 left out, beside the class folders: train/0.png, train/1.png, ..." in loaded.notes
    assert any(note.startswith("3 left out, no image (1 .csv, 1 .txt, 1 without ending): ") for note in loaded.notes)
    assert "2 links to files or folders followed" in loaded.notes and len(loaded.notes) == 8, loaded.notes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("ending", "reason"),
    [(".heic", r"10 HEIC, which needs pillow-heif \(pip install pillow-heif\)"), (".txt", r"10 no image, \.txt")],
)
def test_no_class_is_lost(tmp_path, monkeypatch, ending, reason, training):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    write(write(tmp_path, "cat", "dog"), "eel", ending=ending)
    with pytest.raises(data.DataError, match=rf"no image in the class folder '.*/eel' can be used \({reason}\)"):
        data.load_data(tmp_path, training=training)


def test_classes_that_are_links(tmp_path):
    write(tmp_path, "a/cat", "elsewhere/dog")
    os.symlink(tmp_path / "elsewhere/dog", tmp_path / "a/dog")
    assert data.load_data(tmp_path / "a").label_names == ("cat", "dog")
    os.symlink("../a/cat", tmp_path / "a/kitty")
    with pytest.raises(data.DataError, match=r"/kitty' can be used \(1 link to a folder that is included already\)"):
        data.load_data(tmp_path / "a")
    (tmp_path / "a/kitty").unlink()
    os.symlink("/no/such/folder", tmp_path / "a/eel")
    with pytest.raises(data.DataError, match=r"/eel' can be used \(1 broken link\)"):
        data.load_data(tmp_path / "a")
    write(tmp_path / "b", "train/cat", "train/dog")
    os.symlink("train", tmp_path / "b/test")  # a split may be the same as another
    loaded = data.load_data(tmp_path / "b")
    assert len(loaded.train) == len(loaded.test) == 20


def test_a_folder_too_high(tmp_path):
    write(tmp_path / "deep", "photos/cat", "photos/dog")
    with pytest.raises(data.DataError) as error:
        data.load_data(tmp_path / "deep")
    inside = str(tmp_path / "deep/photos")
    assert str(error.value).startswith("all 20 images to train on are of one class, 'photos': one folder too high? ")
    assert str(error.value).endswith(f"{inside!r} has the folders cat, dog")
    assert data.load_data(inside).label_names == ("cat", "dog")
    write(tmp_path / "deeper", "a/b/cat/x", "a/b/dog/y")
    with pytest.raises(data.DataError, match=r"too high\? '.*/deeper/a/b' has the folders cat, dog"):
        data.load_data(tmp_path / "deeper")
    write(tmp_path / "one", "cat")
    with pytest.raises(data.DataError, match=r"one class, 'cat': give images of at least two classes"):
        data.load_data(tmp_path / "one")
    # To evaluate on one class is fine, but not to overlook the classes inside.
    assert data.load_data(tmp_path / "one", training=False).label_names == ("cat",)
    assert "has the folders cat, dog" in data.load_data(tmp_path / "deep", training=False).notes[0]


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (["seg_train/cat", "seg_train/dog", "seg_test/cat", "seg_test/dog", "seg_pred"], ["seg_train", "seg_test"]),
        (
            ["train_images/cat", "train_images/dog", "test_images/cat", "test_images/dog"],
            ["train_images", "test_images"],
        ),
        (["train_images/cat", "train_images/dog"], ["train_images"]),
        (["TrainSet/cat", "TrainSet/dog", "valSet/cat", "docs", "more"], ["TrainSet", "valSet"]),
        (
            ["seg_train/seg_train/cat", "seg_train/seg_train/dog", "seg_test/seg_test/cat"],
            ["seg_train/seg_train", "seg_test/seg_test"],
        ),
        (["a/train/cat", "a/train/dog", "a/test/cat"], ["a/train", "a/test"]),
    ],
)
def test_splits_are_not_taken_for_classes(tmp_path, folders, splits):
    write(tmp_path, *folders)
    (tmp_path / "notes.txt").write_text("text")
    for training in (True, False):
        if splits[0].startswith("a/") and not training:
            continue  # only a note
        with pytest.raises(
            data.DataError, match=r"If they are splits, use --train-split|'.*/a' has the folders test, train"
        ):
            data.load_data(tmp_path, training=training)
    chosen = dict(zip(("train_split", "test_split"), splits, strict=False))
    loaded = data.load_data(tmp_path, **chosen)
    assert loaded.label_names == ("cat", "dog")
    used = sum(loaded.account["used"].values())
    left = sum(entry["count"] for entry in loaded.account["left_out"].values())
    assert used + left == sum(path.is_file() for path in tmp_path.rglob("*")) and left % 10 == 1


def test_the_message_names_the_options(tmp_path):
    write(tmp_path, "seg_train/seg_train/cat", "seg_train/seg_train/dog", "seg_test/seg_test/cat")
    with pytest.raises(data.DataError, match=r"use --train-split seg_train --test-split seg_test; if they are classes"):
        data.load_data(tmp_path)
    with pytest.raises(data.DataError, match=r"use --train-split seg_train/seg_train;"):
        data.load_data(tmp_path, train_split="seg_train", test_split="seg_test")
    write(tmp_path / "flat", "train", "test")
    with pytest.raises(data.DataError, match=r"sort their images into class folders \(test/cat/1.png\)"):
        data.load_data(tmp_path / "flat")


def test_a_class_called_train(tmp_path):
    write(tmp_path / "plain", "train", "cat", "dog")
    assert data.load_data(tmp_path / "plain").label_names == ("cat", "dog", "train")
    write(tmp_path / "words", "bullet_train", "test_tube", "cat", "dog", "eel")
    assert len(data.load_data(tmp_path / "words").label_names) == 5
    root = write(tmp_path / "deep", "train/steam", "train/diesel", "cat", "dog")
    with pytest.raises(data.DataError) as error:
        data.load_data(root)
    message = str(error.value)
    assert "train may be splits with the classes diesel, steam, or classes like cat, dog" in message
    assert "--train-split" in message and repr(str(root / "train")) in message
    loaded = data.load_data(root, train_split="train")
    assert loaded.label_names == ("diesel", "steam")
    assert loaded.account["left_out"]["beside the splits"] == {"count": 20, "examples": ["cat/0.png", "cat/1.png"]}
    (root / "all").mkdir()
    for name in ("train", "cat", "dog"):
        (root / name).rename(root / "all" / name)
    (root / "all").rename(root / "train")
    loaded = data.load_data(root)
    assert loaded.label_names == ("cat", "dog", "train") and len(loaded.train) + len(loaded.test) == 40


def test_what_lies_beside_the_splits(tmp_path):
    write(tmp_path, "train/cat", "train/dog", "val/cat", "val/dog", "test", "extra/x", count=10)
    write(tmp_path, "annotations", ending=".xml", count=3)
    (tmp_path / "eval").mkdir()
    loaded = data.load_data(tmp_path)
    assert (loaded.train.name, loaded.test.name) == ("train", "val")
    assert {reason: entry["count"] for reason, entry in loaded.account["left_out"].items()} == {
        "beside the splits": 10,
        "in no class folder": 10,
        "no image, .xml": 3,
        "empty folder": 1,
    }
    write(tmp_path, "test/cat", "test/eel")
    loaded = data.load_data(tmp_path)
    assert "20 left out, in the split test, which is not used: test/cat/0.png, test/cat/1.png, ..." not in loaded.notes
    assert any("30 left out, in the split test, which is not used" in note for note in loaded.notes)
    with pytest.raises(data.DataError, match="label 'eel', which is not a class of training"):
        data.load_data(tmp_path, test_split="test")


def test_only_a_test_split(tmp_path):
    write(tmp_path, "test/cat", "test/dog")
    loaded = data.load_data(tmp_path, training=False)
    assert len(loaded.test) == 20 and loaded.label_names == ("cat", "dog") and not loaded.notes
    loaded = data.load_data(tmp_path)
    assert len(loaded.train) == 18 and loaded.notes[0] == "the only split is test: its images are trained on"


def test_a_class_without_test_images(tmp_path):
    write(tmp_path, "train/cat", "train/dog", "test/cat")
    (tmp_path / "test/dog").mkdir()
    assert data.load_data(tmp_path).notes == (
        "no test images of 1 of 2 classes: dog",
        "1 left out, empty folder, so not a class: test/dog",
    )


def test_names_are_compared_as_they_look(tmp_path):
    names = [unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD")]
    write(tmp_path, f"train/{names[0]}", "train/tea", f"test/{names[1]}", "test/tea")
    loaded = data.load_data(tmp_path)
    assert loaded.label_names == (names[0], "tea") and np.bincount(loaded.test.labels).tolist() == [10, 10]
    write(tmp_path, f"train/{names[1]}")
    loaded = data.load_data(tmp_path)
    assert np.bincount(loaded.train.labels).tolist() == [20, 10]
    assert loaded.notes == (f"two folders spell {names[0]!r} differently in Unicode; they are one class",)
    assert loaded.train.image(0).size == loaded.train.image(19).size == (8, 8)


def test_names_that_are_not_text(tmp_path):
    write(tmp_path, "cat", "dog")
    (tmp_path / "cat" / os.fsdecode(b"\xff.png")).write_bytes(IMAGE)
    loaded = data.load_data(tmp_path)
    assert loaded.account["left_out"]["name is not UTF-8"] == {"count": 1, "examples": ["cat/?.png"]}


def test_loose_images_only(tmp_path):
    write(tmp_path / "photos", ".")
    with pytest.raises(data.DataError, match=r"no images in .* but 10 that are in no class folder: .*photos/cat/1.png"):
        data.load_data(f"{tmp_path}/photos/")
