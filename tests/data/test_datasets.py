"""Loading datasets: real parquet files and image folders, broken images, and the built-in digits."""

import io
import os
import random
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from helpers import ROOT, cifar10_folder
from timm_coda import data
from timm_coda.data import sources
from timm_coda.data.datasets import fixed_randomness

DIGIT_CONFIG = {
    "input_size": (3, 16, 16),
    "interpolation": "bicubic",
    "mean": (0.0,) * 3,
    "std": (1.0,) * 3,
    "crop_pct": 1.0,
    "crop_mode": "center",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def png(value: int = 128, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, value if mode in ("L", "P", "I;16") else (value,) * len(mode)).save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, labels, *, kind=None, images=None, label="label", **more) -> Path:
    images = images or [{"bytes": png(20 + row), "path": f"{row}.png"} for row in range(len(labels))]
    kind = kind or datasets.ClassLabel(names=["cat", "dog", "eel"])
    features = datasets.Features({"image": datasets.Image(), label: kind})
    columns = {"image": images, label: list(labels)}
    for name, values in more.items():
        columns[name] = values
        features[name] = datasets.Value("int64" if isinstance(values[0], int) else "string")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(datasets.Dataset.from_dict(columns, features=features).data.table, path)
    return path


def write_images(folder: Path, classes=("cat", "dog"), count: int = 3) -> Path:
    for number, name in enumerate(classes):
        (folder / name / "deep").mkdir(parents=True)
        for row in range(count):
            (folder / name / ("deep" if row else "") / f"{row}.png").write_bytes(png(50 * number + row))
    return folder


def test_the_digits_ship_with_the_package():
    digits = data.load_data("digits")
    assert (len(digits.train), len(digits.test)) == (1347, 450)
    assert digits.label_names == tuple("0123456789")
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    original = sklearn_datasets.load_digits()
    seen = []
    for split in (digits.train, digits.test):
        for index in range(0, len(split), 7):
            row = int(split.rows[index]["image"]["path"].removesuffix(".png"))
            expected = np.rint(original.images[row] * 255 / 16)
            assert np.array_equal(np.asarray(split.image(index))[..., 0], expected)
            assert split.labels[index] == original.target[row]
        seen += [path["path"] for path in split.rows["image"]]
    assert sorted(seen) == [f"{row:04}.png" for row in range(1797)]
    shares = np.bincount(digits.test.labels) / np.bincount(original.target)
    assert np.ptp(shares) < 0.01


def test_the_digits_need_no_network_and_no_writable_home(tmp_path):
    (tmp_path / "home").write_text("a file, so nothing can be written below it")
    before = sorted(path.name for path in sources.DIGITS.iterdir())
    code = "from timm_coda.data import load_data; print(len(load_data('digits').train))"
    home = str(tmp_path / "home")
    environment = os.environ | {"HOME": home, "HF_HOME": f"{home}/hf", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    run = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == "1347\n", run.stderr
    assert sorted(path.name for path in sources.DIGITS.iterdir()) == before


@pytest.mark.parametrize(
    ("names", "source"),
    [
        (["train-0.parquet", "train-1.parquet", "test.parquet"], "."),
        (["data/train/0.parquet", "data/train/1.parquet", "data/validation/0.parquet"], "."),
        (["a_train.parquet", "b.TRAIN.parquet", "a_test.parquet"], "*.parquet"),
    ],
    ids=["folder", "subfolders", "pattern"],
)
def test_parquet_files_are_divided_by_name(tmp_path, names, source):
    for name in names:
        write_parquet(tmp_path / "set" / name, [0, 1, 2, 1])
    loaded = data.load_data(os.path.join(tmp_path / "set", source))
    assert (len(loaded.train), len(loaded.test)) == (8, 4)
    assert loaded.label_names == ("cat", "dog", "eel")
    assert loaded.train.labels.tolist() == [0, 1, 2, 1] * 2
    assert not loaded.notes


def test_a_list_of_files_and_named_splits(tmp_path):
    files = [write_parquet(tmp_path / name, [0, 1]) for name in ("train.parquet", "test.parquet", "val.parquet")]
    assert data.load_data(files).test.name == "val"
    loaded = data.load_data(files, train_split="test", test_split="train")
    assert (loaded.train.name, loaded.test.name) == ("test", "train")
    with pytest.raises(data.DataError, match=r"--test-split dev.*train, test, val"):
        data.load_data(files, test_split="dev")


def test_parquet_without_the_types_of_the_datasets_library(tmp_path):
    images = pa.array([{"bytes": png(row), "path": None} for row in range(4)])
    pq.write_table(pa.table({"img": images, "label": ["b", "a", "b", "a"]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"img": images, "label": ["a", "a", "b", "b"]}), tmp_path / "test.parquet")
    loaded = data.load_data(tmp_path)
    assert loaded.label_names == ("a", "b")
    assert loaded.train.labels.tolist() == [1, 0, 1, 0]
    assert loaded.test.image(3).getpixel((0, 0)) == (3, 3, 3)
    pq.write_table(pa.table({"picture": [png(7)] * 4, "label": [0, 1, 0, 1]}), tmp_path / "bytes.parquet")
    loaded = data.load_data(tmp_path / "bytes.parquet", val_fraction=0.5)
    assert loaded.image_column == "picture"
    assert loaded.train.image(0).getpixel((0, 0)) == (7, 7, 7)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "train.parquet", [0, 1] * 5)
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "taken" / "cache")
    loaded = data.load_data(file)
    assert "kept in memory" in loaded.notes[0]
    assert len(loaded.train) + len(loaded.test) == 10


def test_image_folders(tmp_path):
    write_images(tmp_path / "a" / "train")
    write_images(tmp_path / "a" / "val", count=1)
    (tmp_path / "a" / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "train" / ".hidden").mkdir()
    loaded = data.load_data(tmp_path / "a")
    assert (len(loaded.train), len(loaded.test), loaded.label_names) == (6, 2, ("cat", "dog"))
    assert loaded.train.describe(5).endswith("dog/deep/2.png)")
    write_images(tmp_path / "b", count=10)
    loaded = data.load_data(tmp_path / "b", val_fraction=0.2)
    assert (len(loaded.train), len(loaded.test)) == (16, 4)
    assert np.bincount(loaded.test.labels).tolist() == [2, 2]
    assert "4 of 20 training images are held out" in loaded.notes[0]
    again = data.load_data(tmp_path / "b", val_fraction=0.2)
    assert np.array_equal(loaded.test.indices, again.test.indices)
    assert not set(loaded.test.indices) & set(loaded.train.indices)


def test_held_out_training_images(tmp_path):
    write_images(tmp_path / "train", count=10)
    write_images(tmp_path / "test", count=2)
    whole = data.load_data(tmp_path)
    for count in (1, 6, 19):
        loaded = whole.held_out(count)
        assert (len(loaded.train), len(loaded.test), loaded.test.name) == (20 - count, count, "validation")
        assert abs(np.diff(np.bincount(loaded.test.labels, minlength=2))[0]) <= 1
        assert sorted([*loaded.train.indices, *loaded.test.indices]) == list(range(20))
        assert np.array_equal(loaded.test.indices, whole.held_out(count).test.indices)
        assert "the 4 test images are used once" in loaded.notes[-1]
    with pytest.raises(data.DataError, match=r"--hold-out 20: there are only 20 training images"):
        whole.held_out(20)


def test_labels_of_every_kind(tmp_path):
    numbers = write_parquet(tmp_path / "n" / "train.parquet", [2, 0, 1, 2], kind=datasets.Value("int32"))
    words = write_parquet(tmp_path / "w" / "train.parquet", ["b", "a", "c", "b"], kind=datasets.Value("string"))
    for file, names, expected in ((numbers, ("0", "1", "2"), [2, 0, 1, 2]), (words, ("a", "b", "c"), [1, 0, 2, 1])):
        loaded = data.load_data(file, train_split="train", test_split="train")
        assert loaded.label_names == names
        assert loaded.train.labels.tolist() == expected
    assert data.load_data(numbers, val_fraction=0.5, num_classes=5).label_names == ("0", "1", "2", "3", "4")


def test_columns_are_found_or_named(tmp_path):
    file = write_parquet(tmp_path / "train.parquet", [0, 1] * 5, size=list(range(10)))
    assert data.load_data(file).label_column == "label"  # the only ClassLabel column
    kind = datasets.Value("int64")
    file = write_parquet(tmp_path / "2" / "train.parquet", [0, 1] * 5, kind=kind, size=list(range(10)))
    assert data.load_data(file).label_column == "label"  # the column named "label"
    file = write_parquet(tmp_path / "3" / "train.parquet", [0, 1] * 5, kind=kind, label="fine", coarse=[0] * 10)
    with pytest.raises(data.DataError, match=r"no column holds labels.*image \(Image\).*coarse.*--label-column"):
        data.load_data(file)
    with pytest.raises(data.DataError, match=r"all 10 images to train on are of one class, '0'"):
        data.load_data(file, label_column="coarse")
    assert data.load_data(file, label_column="coarse", training=False).label_names == ("0",)
    with pytest.raises(data.DataError, match=r"--image-column photo.*image \(Image\), fine \(int64\)"):
        data.load_data(file, image_column="photo")


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"id": range(6), "label": [True, False] * 3}, "label"),
        (
            {"image_id": range(6), "label": [[1], [0, 1]] * 3},
            r"column label looks like .*label \(List\).*--label-column",
        ),
        ({"file_name": "abcdef", "Labels": [0.0, 1.0] * 3}, r"column Labels looks like .*Labels \(float64\)"),
        ({"width": [8, 9] * 3, "target": [[0]] * 6}, r"column target looks like"),
        ({"id": range(6)}, r"no column holds labels by its type \(ClassLabel\) or name \(label, .*id \(int64\)"),
        ({"id": range(6), "Category": ["b", "a"] * 3}, "Category"),
        ({"class": [0, 1] * 3, "label": [1, 0] * 3}, "label"),
        ({"class": [0, 1] * 3, "category": [1, 0] * 3}, r"class, category could all hold the labels"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_label_column_is_not_guessed_from_what_is_left(tmp_path, columns, found):
    table = {"image": [png(row) for row in range(6)], **{name: list(values) for name, values in columns.items()}}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    if found in columns:
        loaded = data.load_data(tmp_path, val_fraction=0.5)
        assert loaded.label_column == found and len(loaded.label_names) == 2
        if columns[found][0] is True:
            assert loaded.label_names == ("false", "true") and loaded.label_kind != "numbers"
            labels = np.concatenate([loaded.train.labels, loaded.test.labels])
            assert labels[np.argsort([*loaded.train.indices, *loaded.test.indices])].tolist() == [1, 0] * 3
    else:
        with pytest.raises(data.DataError, match=found):
            data.load_data(tmp_path, val_fraction=0.5)


def test_a_column_of_the_type_for_labels_beside_one_of_that_name(tmp_path):
    file = write_parquet(tmp_path / "train.parquet", [0, 1] * 5, label="kind", label_text=["a", "b"] * 5)
    assert data.load_data(file).label_column == "kind"
    file = write_parquet(tmp_path / "2" / "train.parquet", [0, 1] * 5, label="kind", Label=[3, 4] * 5)
    with pytest.raises(data.DataError, match="Label, kind could all hold the labels"):
        data.load_data(file)


@pytest.mark.parametrize(
    ("name", "other"),
    [("data[1]", "data1"), ("a*b", "aXb"), ("a?b", "aXb"), ("[!a]", "b"), ("{a,b}", "a"), ("a::b", "a")],
)
@pytest.mark.parametrize("load", [data.load_data, data.load_stream])
def test_names_on_disk_are_not_patterns(tmp_path, monkeypatch, name, other, load):
    monkeypatch.chdir(tmp_path)
    for folder, names in ((name, ["cat", "dog"]), (other, ["eel", "fox", "gnu"])):
        for split in ("train", "test"):
            write_parquet(tmp_path / folder / f"{split}.parquet", [0, 1], kind=datasets.ClassLabel(names=names))
    files = [f"{name}/train.parquet", str(tmp_path / name / "test.parquet")]
    for source in ([name], [str(tmp_path / name)], files, [f"{name}/*.parquet"]):
        loaded = load(source)
        assert loaded.label_names == ("cat", "dog") and len(loaded.train) == len(loaded.test) == 2
    if load is data.load_data:
        write_images(tmp_path / "images" / name, count=10)
        write_images(tmp_path / "images" / other, classes=("eel", "fox"), count=10)
        images = data.load_data(tmp_path / "images" / name)
        assert images.label_names == ("cat", "dog") and images.test.image(0).size == (8, 8)


def test_a_folder_of_parquet_files_with_links_and_images(tmp_path):
    write_parquet(tmp_path / "elsewhere" / "train.parquet", [0, 1] * 5)
    write_parquet(tmp_path / "set" / "test.parquet", [0, 1])
    os.symlink(tmp_path / "elsewhere", tmp_path / "set" / "more")
    write_parquet(tmp_path / "set" / ".cache" / "train.parquet", [0, 1])
    (tmp_path / "set" / "1.png").write_bytes(png())
    loaded = data.load_data(tmp_path / "set")
    assert (len(loaded.train), len(loaded.test)) == (10, 2)
    assert loaded.notes == ("1 left out, images beside the parquet files: 1.png, ...",)


def test_splits_that_are_not_used_are_named(tmp_path):
    for name in ("train", "test", "val"):
        write_parquet(tmp_path / f"{name}.parquet", [0, 1])
    for load in (data.load_data, data.load_stream):
        assert load([str(tmp_path)]).notes == ("not used: the splits test",)


def test_columns_of_the_wrong_kind(tmp_path):
    pq.write_table(pa.table({"x": [1.0], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(data.DataError, match=r"no column holds images.*x \(float64\).*--image-column"):
        data.load_data(tmp_path / "train.parquet")
    with pytest.raises(data.DataError, match=r"--image-column x: not a column of images"):
        data.load_data(tmp_path / "train.parquet", image_column="x")
    pq.write_table(pa.table({"image": [png()], "score": [0.5]}), tmp_path / "train.parquet")
    with pytest.raises(data.DataError, match=r"no column holds labels"):
        data.load_data(tmp_path / "train.parquet")
    with pytest.raises(data.DataError, match=r"--label-column score: labels must be integers, strings or booleans"):
        data.load_data(tmp_path / "train.parquet", label_column="score")


def test_wrong_labels(tmp_path):
    integers = datasets.Value("int64")
    train = write_parquet(tmp_path / "train.parquet", [0, 1, 2, 1], kind=integers)
    for bad, message in ((-1, "has the label -1"), (3, "has the label 3"), (None, "has no label")):
        test = write_parquet(tmp_path / "test.parquet", [0, 1, bad], kind=integers)
        with pytest.raises(data.DataError, match=f"test row 2 {message}"):
            data.load_data([train, test])
    with pytest.raises(
        data.DataError, match=r"train row 2 has the label 2.*2 classes are numbered 0 to 1.*--num-classes"
    ):
        data.load_data(train, num_classes=2)
    train = write_parquet(tmp_path / "s" / "train.parquet", ["a", "b"], kind=datasets.Value("string"))
    test = write_parquet(tmp_path / "s" / "test.parquet", ["b", "z"], kind=datasets.Value("string"))
    with pytest.raises(data.DataError, match="test row 1 has the label 'z'"):
        data.load_data([train, test])


def test_nothing_to_load(tmp_path):
    empty = write_parquet(tmp_path / "train.parquet", [], kind=datasets.Value("int64"))
    with pytest.raises(data.DataError, match="train split is empty: no rows in"):
        data.load_data(empty)
    with pytest.raises(data.DataError, match="nothing found at '/no/such/folder'"):
        data.load_data("/no/such/folder")
    with pytest.raises(data.DataError, match=r"nothing found at .*parquet'"):
        data.load_data(str(tmp_path / "*x*.parquet"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(data.DataError, match=r"no images in .*bare.*one folder per class"):
        data.load_data(tmp_path / "bare")
    (tmp_path / "train.csv").write_text("a,b")
    with pytest.raises(data.DataError, match="not a parquet file"):
        data.load_data(tmp_path / "train.csv")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(data.DataError, match=r"broken\.parquet' cannot be read as parquet"):
        data.load_data(tmp_path / "broken.parquet")
    file = write_parquet(tmp_path / "few" / "train.parquet", [0, 1])
    with pytest.raises(data.DataError, match=r"--val-fraction 0.1 splits 2 images"):
        data.load_data(file)
    write_parquet(tmp_path / "few" / "more.parquet", [0, 1])
    with pytest.raises(data.DataError, match=r"more.parquet has neither train nor test"):
        data.load_data(tmp_path / "few")


def test_a_hub_data_set_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(data.DataError, match=r"'no-one/nothing' is neither .* HF_HUB_OFFLINE"):
        data.load_data("no-one/nothing")


def test_16_bit_images_are_scaled(tmp_path):
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    rows = [{"bytes": file.getvalue(), "path": None}] * 2
    loaded = data.load_data(write_parquet(tmp_path / "train.parquet", [0, 1], images=rows), val_fraction=0.5)
    assert np.array_equal(np.asarray(loaded.train.image(0))[..., 2], np.rint(ramp / 257))


def broken_images() -> dict[str, dict]:
    whole = png(99, size=(64, 64))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    file = io.BytesIO()
    noise.save(file, "PNG")
    cut = file.getvalue()[:2000]
    header = struct.pack(">II", 60000, 60000) + whole[24:29]
    bomb = whole[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + whole[33:]
    return {
        "cut off": {"bytes": cut, "path": "cut.png"},
        "text": {"bytes": b"<html>404</html>", "path": None},
        "empty": {"bytes": b"", "path": None},
        "too many pixels": {"bytes": bomb, "path": None},
        "no such file": {"bytes": None, "path": "/no/such/file.png"},
        "none": None,
    }


@pytest.mark.parametrize("kind", broken_images())
def test_an_image_that_cannot_be_read_is_named(tmp_path, kind):
    broken = broken_images()[kind]
    rows = [{"bytes": png(1), "path": None}, broken, {"bytes": png(2), "path": None}, {"bytes": png(3), "path": None}]
    file = write_parquet(tmp_path / "train.parquet", [0, 1, 2, 1], images=rows)
    split = data.load_data([file], train_split="train", test_split="train").test
    dataset = data.ImageDataset(split, data.create_transforms(DIGIT_CONFIG)[1])
    batch = data.collate([dataset[index] for index in range(4)])
    assert batch.labels.tolist() == [0, 2, 1]
    assert batch.images.shape == (3, 3, 16, 16)
    ((name, reason),) = batch.skipped
    assert name.startswith("train row 1") and reason
    if broken and broken["path"]:
        assert broken["path"] in name


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_go_on_past_broken_images(tmp_path, workers):
    rows = [{"bytes": b"broken" if row % 3 == 0 or 8 <= row < 12 else png(row), "path": None} for row in range(18)]
    file = write_parquet(tmp_path / "train.parquet", [row % 3 for row in range(18)], images=rows)
    split = data.load_data([file], train_split="train", test_split="train").test
    dataset = data.ImageDataset(split, data.create_transforms(DIGIT_CONFIG)[1])
    batches = list(data.create_loader(dataset, batch_size=4, workers=workers))
    assert [len(batch.labels) for batch in batches] == [2, 3, 0, 2, 2]
    assert [len(batch.skipped) for batch in batches] == [2, 1, 4, 2, 0]
    assert isinstance(batches[0], data.Batch)
    assert dataset.examples(5).labels.tolist() == [1, 2, 1, 2, 1]


def test_examples_are_of_different_classes():
    digits = data.load_data("digits")
    dataset = data.ImageDataset(digits.test, data.create_transforms(DIGIT_CONFIG)[1])
    assert dataset.examples(12).labels.tolist() == [*range(10), 0, 1]
    assert len(dataset.examples(0).labels) == 0


def global_state() -> list:
    numpy_state = np.random.get_state()
    return [random.getstate(), numpy_state[1].tolist(), numpy_state[2:], torch.get_rng_state().tolist()]


def test_randomness_is_a_function_of_seed_epoch_and_index():
    digits = data.load_data("digits")
    transform, _ = data.create_transforms(
        DIGIT_CONFIG, scale=(0.5, 1), ratio=(0.8, 1.2), crop_padding=2, hflip=0.5, color_jitter=0.4, erase=0.5,
        auto_augment="rand-m9-mstd0.5",
    )  # fmt: skip
    dataset = data.ImageDataset(digits.train, transform, seed=3)
    before = global_state()
    one = dataset[1, 5][0]
    assert global_state() == before
    torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(dataset[1, 5][0], one)
    assert not torch.equal(dataset[2, 5][0], one)
    assert not torch.equal(data.ImageDataset(digits.train, transform, seed=4)[1, 5][0], one)
    assert one.min() >= 0 and one.max() <= 1


def test_randomness_is_put_back_after_an_error():
    before = global_state()
    with pytest.raises(ZeroDivisionError), fixed_randomness(1, 2):
        torch.rand(3), np.random.rand(3), random.random()
        raise ZeroDivisionError
    assert global_state() == before


def test_transforms_give_one_channel_where_the_model_has_one():
    config = DIGIT_CONFIG | {"input_size": (1, 16, 16), "mean": (0.0,), "std": (1.0,)}
    for transform in data.create_transforms(config, crop_padding=2):
        image = transform(Image.new("RGB", (20, 9), (255, 0, 0)))
        assert image.shape == (1, 16, 16)
        assert image.min() >= 0 and image.max() <= 1


def test_check_images():
    class Explains(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1) @ torch.zeros(12, 2)

        def explain(self): ...

    data.check_images(Explains(), torch.rand(2, 3, 2, 2))
    with pytest.raises(data.DataError, match=r"range from -2.00 to -?0.00.*mean/std normalisation"):
        data.check_images(Explains(), -2 * torch.eye(2).expand(1, 3, 2, 2))
    with pytest.raises(data.DataError, match="does not accept images of shape 3x4x4"):
        data.check_images(Explains(), torch.rand(2, 3, 4, 4))
    with pytest.raises(data.DataError, match="can be read"):
        data.check_images(Explains(), torch.empty(0))


def test_cifar10_as_it_is_on_the_hub(tmp_path):
    folder = cifar10_folder()
    shutil.copy(folder / "test.parquet", tmp_path / "test.parquet")
    table = pq.read_table(folder / "train-0.parquet").slice(0, 500)
    pq.write_table(table, tmp_path / "train-0.parquet")
    loaded = data.load_data(tmp_path)
    assert (loaded.image_column, loaded.label_column) == ("img", "label")
    assert (len(loaded.train), len(loaded.test)) == (500, 10000)
    assert loaded.label_names[:3] == ("airplane", "automobile", "bird")
    assert loaded.test.image(0).size == (32, 32)
