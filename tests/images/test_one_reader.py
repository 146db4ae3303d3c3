"""One photo gives the same pixels wherever it comes in; for the demo see demo/test_demo.py."""

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from timm.data import resolve_model_data_config

from helpers.photos import save_turned_digits, turned
from timm_coda import cli, data
from timm_coda.data.datasets import decode
from timm_coda.gallery.placement import eval_transform
from timm_coda.images import read_image


def dataset_pixels(split: data.Split, transform) -> np.ndarray:
    dataset = data.ImageDataset(split, transform)
    batch = data.collate([dataset[index] for index in range(len(dataset))])
    assert batch.skipped == []
    return batch.images.numpy()


def test_forty_turned_photos(tmp_path):
    save_turned_digits(tmp_path / "photos" / "train")
    files = save_turned_digits(tmp_path / "photos" / "validation")
    model = timm.create_model("coda_net_xs.digits", pretrained=True).eval()
    explained = model.explain([Image.open(file) for file in files])
    assert explained.prediction.tolist() == [int(file.parent.name) for file in files]
    pixels = explained.images.numpy()

    # Evaluation and training
    config, found = resolve_model_data_config(model), data.load_data([str(tmp_path / "photos")])
    assert [file.parent.name for file in files] == [found.label_names[label] for label in found.test.labels]
    _, transform = data.create_transforms(config)
    assert np.array_equal(dataset_pixels(found.train, transform), pixels)
    assert np.array_equal(dataset_pixels(found.test, transform), pixels)

    # The command line, for each orientation once: figures take time
    chosen = {file.stem: file for file in files[::5]}
    options = ["--model", "coda_net_xs.digits", "--output", str(tmp_path / "out")]
    assert cli.main(["explain", *map(str, chosen.values()), *options]) == 0
    assert sorted(chosen) == list("12345678")
    for number, file in list(enumerate(files))[::5]:
        with np.load(tmp_path / "out" / f"{file.stem}.npz") as arrays:
            assert np.array_equal(arrays["images"][0], pixels[number]), file


def test_every_kind_of_file(tmp_path):
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (24, 16, 4), dtype=np.uint8))
    grey = rng.integers(0, 65536, (24, 16), dtype=np.uint16)
    palette = colours.convert("RGB").quantize(8)
    palette.info["transparency"] = 3
    kinds = {
        "transparent.png": colours,
        "palette.png": palette,
        "ink.jpg": colours.convert("RGB").convert("CMYK"),
        "deep.png": Image.fromarray(grey),
        "float.tif": Image.fromarray((grey / 65535 * 1.001).astype(np.float32)),
        "float255.tif": Image.fromarray((grey / 257 * 1.004).astype(np.float32)),
        "lab.tif": Image.fromarray(rng.integers(0, 256, (24, 16, 3), dtype=np.uint8), "LAB"),
        "line.tif": colours.convert("1"),
    }
    for number, (name, image) in enumerate(kinds.items()):
        stored, exif = turned(image, 1 + number)
        stored.save(tmp_path / name, exif=exif)
    for channels in (1, 3):
        shape = {"input_size": (channels, 16, 16), "mean": (0.0,) * channels, "std": (1.0,) * channels}
        options = {"num_classes": 3, "in_chans": channels, "pretrained_cfg_overlay": shape}
        model = timm.create_model("coda_net_xs", **options).eval()
        _, evaluating = data.create_transforms(resolve_model_data_config(model))
        for name in kinds:
            path = tmp_path / name
            (seen,) = model.explain(Image.open(path)).images
            assert torch.equal(eval_transform(model)(read_image(path)), seen), name  # command line
            for encoded in ({"path": str(path), "bytes": None}, {"path": None, "bytes": path.read_bytes()}):
                assert torch.equal(evaluating(decode(encoded)), seen), name
        # Already read, by this package or by others that obey EXIF, and given on
        read = [read_image(tmp_path / name) for name in kinds]
        others = [ImageOps.exif_transpose(Image.open(tmp_path / name)) for name in kinds]
        assert torch.equal(model.explain(read).images, model.explain(others).images)
