"""Orders and batches of training images, for any number of workers and processes, on the CPU and on the device."""

import itertools
import subprocess
import sys
import time

import datasets
import numpy as np
import pytest
import timm
import torch

from helpers import cifar10_folder
from helpers.processes import not_forked
from timm_coda import data
from timm_coda.data import loading

CONFIG = {
    "input_size": (3, 16, 16),
    "interpolation": "bicubic",
    "mean": (0.0,) * 3,
    "std": (1.0,) * 3,
    "crop_pct": 1.0,
    "crop_mode": "center",
}
PLAIN = {"crop_padding": 0, "scale": [1, 1], "ratio": [1, 1], "hflip": 0.0, "color_jitter": 0.0, "erase": 0.0}
PLAIN |= {"auto_augment": None}
STRING = datasets.Value("string")


def make_loader(changes: dict, **options) -> loading.TrainLoader:
    defaults = {"batch_size": 64, "seed": 3, "workers": 0, "streaming": None, "data_on_device": False, "process": 0}
    defaults |= {"processes": 1, "device": torch.device("cpu"), "config": CONFIG} | options
    transform, _ = data.create_transforms(defaults["config"], **changes)
    split = data.load_data("digits").train
    return loading.make_train_loader(split, transform, changes=changes, **defaults)


def test_an_epoch_is_a_permutation_dealt_out_in_batches():
    def batches(epoch=0, start=0, **place):
        order = loading.EpochOrder(26, batch_size=4, seed=1, **place)
        order.seek(epoch, start)
        return list(order), len(order)

    whole, count = batches()
    assert count == len(whole) == 6 and all(len(batch) == 4 for batch in whole)
    assert len({index for batch in whole for _, index in batch}) == 24
    assert batches(start=4)[0] == whole[4:]
    halves = [batches(process=process, processes=2)[0] for process in (0, 1)]
    assert list(itertools.chain(*zip(*halves, strict=True))) == whole
    other, _ = batches(epoch=1)
    assert {epoch for batch in other for epoch, _ in batch} == {1}
    assert [key[1] for key in other[0]] != [key[1] for key in whole[0]]


def test_batches_do_not_depend_on_workers_and_begin_anywhere():
    changes = PLAIN | {"crop_padding": 2, "hflip": 0.5, "scale": [0.5, 1], "color_jitter": 0.4, "erase": 0.5}
    seen = []
    for workers in (0, 2):
        loader = make_loader(changes, workers=workers)
        seen.append(list(loader.from_batch(7, len(loader) - 2)))
        assert loader.end_of_dataloader and len(seen[-1]) == 2
        assert not loader.gradient_state.in_dataloader
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("streaming", [None, 8])
def test_workers_that_are_not_forked(tmp_path, streaming):
    """Such workers get the images by pickle: the default from Python 3.14 on, and on macOS and Windows."""
    digits = data.load_data("digits").train
    rows = {"image": [digits.image(row) for row in range(20)], "label": [str(label) for label in digits.labels[:20]]}
    for split in ("train", "test"):
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(image=datasets.Image(), label=STRING))
        table.to_parquet(tmp_path / f"{split}.parquet")
    changes = PLAIN | {"hflip": 0.5}
    transform, _ = data.create_transforms(CONFIG, **changes)
    same = {"changes": changes, "config": CONFIG, "batch_size": 4, "seed": 3, "streaming": streaming, "process": 0}
    same |= {"data_on_device": False, "processes": 1, "device": torch.device("cpu")}
    seen = []
    with not_forked():
        for workers in (0, 2):
            split = (data.load_stream if streaming else data.load_data)([str(tmp_path)]).train
            loader = loading.make_train_loader(split, transform, workers=workers, **same)
            seen.append(list(loader.from_batch(0, 0)))
    assert len(seen[0]) == len(seen[1]) == 5
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def test_images_on_the_device_are_those_of_the_transform():
    """Without shifts and flips, the values are those of the transform, also with another mean and std."""
    config = CONFIG | {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}
    for options in ({}, {"config": config}, {"process": 1, "processes": 2}):
        usual, device = make_loader(PLAIN, **options), make_loader(PLAIN, data_on_device=True, workers=2, **options)
        assert len(usual) == len(device)
        pairs = zip(usual.from_batch(2, 3), device.from_batch(2, 3), strict=True)
        for one, other in itertools.islice(pairs, 3):
            assert torch.equal(one.labels, other.labels)
            torch.testing.assert_close(one.images, other.images, rtol=0, atol=1e-6)


def test_images_on_the_device_are_shifted_and_flipped():
    """Each image is one of the 50 possible shifts (up to two pixels) and flips, all of them about equally often."""
    loader = make_loader(PLAIN | {"crop_padding": 2, "hflip": 0.5}, data_on_device=True)
    still = make_loader(PLAIN, data_on_device=True)
    counts = np.zeros((5, 5, 2), dtype=int)
    for moved, plain in zip(loader.from_batch(0, 0), still.from_batch(0, 0), strict=True):
        padded = torch.nn.functional.pad(plain.images, [2] * 4)
        found = torch.zeros(len(moved.labels), dtype=torch.long)
        for row, column, flip in itertools.product(range(5), range(5), range(2)):
            expected = padded[:, :, row : row + 16, column : column + 16]
            same = (moved.images == (expected.flip(3) if flip else expected)).flatten(1).all(1)
            counts[row, column, flip] += int(same.sum())
            found += same
        assert (found == 1).float().mean() > 0.99  # a digit may be its own mirror image
    assert counts.sum() >= 21 * 64 and counts.min() > 10 and counts.max() < 50  # 1344 images / 50 = 27 are expected
    one, again = (next(loader.from_batch(4, 6)) for _ in range(2))
    assert torch.equal(one.images, again.images)
    assert torch.equal(one.images, list(itertools.islice(loader.from_batch(4, 5), 2))[1].images)
    shares = make_loader(PLAIN | {"crop_padding": 2, "hflip": 0.5}, data_on_device=True, process=0, processes=2)
    assert torch.equal(one.images, next(shares.from_batch(4, 3)).images)


def test_the_device_only_shifts_and_flips():
    with pytest.raises(data.DataError, match=r"leave it out, or leave out --scale \[0.5, 1\], --erase 0.5"):
        make_loader(PLAIN | {"scale": [0.5, 1], "erase": 0.5}, data_on_device=True)


def test_images_that_cannot_be_read_are_left_out_on_the_device():
    digits = data.load_data("digits").train
    rows = digits.rows.select(range(40)).to_list()
    broken = [{"image": {"bytes": b"no", "path": f"{row}.png"}} if row in (3, 17) else rows[row] for row in range(40)]
    split = data.Split("train", datasets.Dataset.from_list(broken), "image", np.arange(40), digits.labels[:40])
    transform, _ = data.create_transforms(CONFIG, **PLAIN)
    options = {"batch_size": 19, "seed": 3, "workers": 0, "streaming": None, "process": 0, "processes": 1}
    options |= {"config": CONFIG, "changes": PLAIN, "device": torch.device("cpu"), "data_on_device": True}
    loader = loading.make_train_loader(split, transform, **options)
    first, second = loader.from_batch(0, 0)
    assert [name for name, _ in first.skipped] == ["train row 3 (3.png)", "train row 17 (17.png)"]
    assert second.skipped == [] and len(second.labels) == 19
    kept = [row for row in range(40) if row not in (3, 17)]
    assert sorted(torch.cat([first.labels, second.labels]).tolist()) == sorted(digits.labels[kept].tolist())
    images = {data.ImageDataset(split, transform)[row][0].numpy().tobytes() for row in kept}
    assert {image.numpy().tobytes() for image in torch.cat([first.images, second.images])} == images


def test_a_process_with_idle_workers_exits():
    """multiprocessing ends them with SIGTERM, which workers ignore as long as the process runs."""
    code = """
from torchvision.transforms.functional import to_tensor
from timm_coda import data
dataset = data.ImageDataset(data.load_data("digits").test, to_tensor)
loader = data.create_loader(dataset, batch_size=4, workers=1)
print(len(next(iter(loader)).labels))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "4\n", "")


@pytest.mark.slow
def test_how_many_images_a_second_real_data_cost():
    """Print (-s) the speed of training with images on the device or from the loader, relative to one fixed batch."""
    folder = cifar10_folder()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, changes = CONFIG | {"input_size": (3, 32, 32)}, PLAIN | {"crop_padding": 4, "hflip": 0.5}
    transform, _ = data.create_transforms(config, **changes)
    split = data.load_data(folder / "test.parquet", val_fraction=0.5).train  # 5000 images
    same = {"batch_size": 32, "seed": 0, "streaming": None, "process": 0, "processes": 1, "device": device}
    same |= {"config": config, "changes": changes}
    kinds = {"on the device": (True, 0), "loader, no workers": (False, 0), "loader, one worker": (False, 1)}
    loaders = {
        name: loading.make_train_loader(split, transform, data_on_device=kept, workers=workers, **same)
        for name, (kept, workers) in kinds.items()
    }
    model = timm.create_model("coda_net_xs").to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def speed(batches) -> float:
        seen, begin = 0, None
        for step, (images, labels, _) in enumerate(batches):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert np.isfinite(loss.item())
            if step == 2:  # warmed up
                begin = time.perf_counter()
            elif step > 2:
                seen += len(labels)
            if step == 10:
                break
        assert begin is not None
        return seen / (time.perf_counter() - begin)

    fixed = next(loaders["on the device"].from_batch(0, 0))
    speeds: dict[str, list[float]] = {"one batch in memory": [], **{name: [] for name in loaders}}
    for round_ in range(3):
        for name, values in speeds.items():
            batches = itertools.repeat(fixed) if name not in loaders else loaders[name].from_batch(round_, 0)
            values.append(speed(batches))
    print()
    for name, values in speeds.items():
        share = np.median(np.array(values) / np.array(speeds["one batch in memory"]))
        print(f"{name:20} {np.median(values):8.0f} images/s, {share:6.1%} of one batch in memory")
