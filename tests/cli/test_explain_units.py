"""`timm-coda explain --unit`: the images of a dataset that activate units most, and one sheet of what they see."""

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image

from timm_coda import cli
from timm_coda.data import ImageDataset, create_transforms, load_data
from timm_coda.explanation import Unit, peaks, receptive_fields
from timm_coda.gallery import find_strongest, unit_sheet
from timm_coda.hub import save_model

MODEL = ["--model", "coda_net_xs.digits"]


@pytest.fixture(scope="module")
def model():
    return timm.create_model("coda_net_xs.digits", pretrained=True).eval()


@pytest.fixture(scope="module")
def silent(tmp_path_factory) -> Path:
    """The model of digits; channel 4 of stages.1 is always 0."""
    net = timm.create_model("coda_net_xs.digits", pretrained=True)
    layer = net.stages[1][-1]
    with torch.no_grad():
        layer.up.weight[4 * layer.rank : 5 * layer.rank] = 0
        layer.up.bias[4] = 0
    place = tmp_path_factory.mktemp("models") / "silent"
    save_model(net, place)
    return place


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve digits in two class folders, one of which cannot be read."""
    place, split = tmp_path_factory.mktemp("images"), load_data("digits").test
    for index in range(12):
        kind = "straight" if split.labels[index] in (1, 4, 7) else "round"
        (place / kind).mkdir(exist_ok=True)
        split.image(index).save(place / kind / f"{index}.png")
    whole = (place / kind / f"{index}.png").read_bytes()
    (place / kind / "cut.png").write_bytes(whole[: len(whole) // 2])
    return place


def dataset(source, model) -> tuple[ImageDataset, tuple[str, ...]]:
    data = load_data(source, training=False)
    _, transform = create_transforms(timm.data.resolve_model_data_config(model))
    first = replace(data.test, indices=data.test.indices[:60], labels=data.test.labels[:60])
    return ImageDataset(first, transform), data.label_names


def rows(printed: str) -> list[list[str]]:
    """Cells of the printed table: activation, position, class, image."""
    return [re.split(r"  +", line.strip()) for line in printed.splitlines() if re.match(r" +-?[\d.]+  ", line)]


def test_the_strongest_images_of_all(model):
    images, names = dataset("digits", model)
    units = [Unit("stages.1", 5), Unit("head", 3)]
    strongest, skipped = find_strongest(model, images, units, label_names=names, count=3, batch_size=25)
    assert not skipped
    stack = torch.stack([images[index][0] for index in range(len(images))])
    for row, unit in zip(strongest, units, strict=True):
        found = model.explain(stack, layer=unit.layer, unit=(unit.channel, "max"))
        best = found.value.argsort(descending=True)[:3]
        assert row.unit == unit and row.searched == 60 and list(row.indices) == best.tolist()
        assert row.classes == tuple(str(images.split.labels[index]) for index in row.indices)
        assert row.found is not None and torch.equal(row.found.position, found.position[best])
        assert torch.allclose(row.found.value, found.value[best]) and row.largest == pytest.approx(found.value.max())
        assert row.found.residual.abs().max() < 1e-4 * row.largest
        boxes = receptive_fields(model, unit.layer, found.position[best], (16, 16))
        for picture, box, image in zip(row.pictures, boxes, stack[best], strict=True):
            inside = (slice(max(-box.top, 0), 16 - box.top), slice(max(-box.left, 0), 16 - box.left))
            part = image[:, max(box.top, 0) : box.bottom, max(box.left, 0) : box.right].permute(1, 2, 0)
            assert np.abs(picture.seen[inside] / 255 - part.numpy()).max() < 1 / 255
    texts = [text.get_text() for axes in unit_sheet(strongest).axes for text in axes.texts]
    assert {"stages.1:5", "head:3", "for", "against"} <= set(texts)
    assert {f"{value:.4g}" for value in strongest[0].found.value.tolist()} <= set(texts)


def test_command_prints_a_table_and_draws_a_sheet(tmp_path, folder, model, capsys):
    sheet = tmp_path / "new" / "units.png"
    words = ["explain", *MODEL, "--unit", "stages.1:5", "--unit", "head:3", "--data", str(folder), "--images", "2"]
    assert cli.main([*words, "--output", str(sheet), "--batch-size", "5"]) == 1
    printed = capsys.readouterr()
    assert "1 skipped" in printed.err and "cut.png" in printed.err, "it is named, and the exit code says so"
    assert max(map(len, printed.out.splitlines()[:-1])) <= 80
    table = rows(printed.out)
    assert len(table) == 4
    images = sorted(path for path in folder.rglob("*.png") if path.name != "cut.png")
    found = model.explain([Image.open(path) for path in images], layer="stages.1", unit=(5, "max"))
    best = int(found.value.argmax())
    row, column = found.position[best].tolist()
    assert table[0][:3] == [f"{found.value[best].item():.4g}", f"{row}, {column}", images[best].parent.name]
    assert table[0][3].endswith(f"{images[best].name})")
    with Image.open(sheet) as drawn:
        assert drawn.width > 500 and drawn.height > 2 * 500
    assert cli.main([*words, "--output", str(sheet)]) == 2
    assert "exists; name another file, or add --overwrite" in capsys.readouterr().err


def test_a_share_of_no_pixel_is_said(tmp_path, folder, capsys):
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_bcos_224", num_classes=10, img_size=32, depth=2)
    net.pretrained_cfg["input_size"] = (3, 32, 32)
    save_model(net, tmp_path / "vit")
    words = ["--data", str(folder), "--unit", "blocks.0:3", "patch_embed:3", "--output", str(tmp_path / "u.png")]
    cli.main(["explain", "--model", str(tmp_path / "vit"), *words])
    inner, before = capsys.readouterr().out.split("patch_embed:3")
    assert re.search(r"Of these, up to [\d.]+ comes from the position embedding, from no pixel", inner)
    assert "no pixel" not in before, "the embedding comes after this layer"
    model = timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True).eval()
    images, names = dataset("digits", model)
    (row,), _ = find_strongest(model, images, [Unit("blocks.0", 3)], label_names=names, count=2)
    texts = [text.get_text() for axes in unit_sheet([row]).axes for text in axes.texts]
    assert sum(text.startswith("from no pixel: ") for text in texts) == 2


def test_parquet_without_the_model_classes(tmp_path, folder, capsys):
    """The classes of the images need not be the model's."""
    files = sorted(folder.glob("*/?.png"))
    column = [{"bytes": path.read_bytes(), "path": None} for path in files]
    pq.write_table(pa.table({"image": column, "kind": ["ant", "bee"] * (len(files) // 2)}), tmp_path / "test.parquet")
    words = ["--data", str(tmp_path / "test.parquet"), "--label-column", "kind", "--output", str(tmp_path / "u.svg")]
    assert cli.main(["explain", *MODEL, "--unit", "stages.0:3", *words]) == 0
    table = rows(capsys.readouterr().out)
    assert len(table) == min(8, len(files)) and {line[2] for line in table} == {"ant", "bee"}
    assert (tmp_path / "u.svg").read_text().startswith("<?xml")


def test_units_that_never_fire(tmp_path, silent, folder, capsys):
    words = ["explain", "--model", str(silent), "--data", str(folder), "--output", str(tmp_path / "u.png")]
    assert cli.main([*words, "--unit", "stages.1:4", "stages.1:3"]) == 1  # a file cannot be read
    printed = capsys.readouterr().out
    assert "stages.1:4\n  never fires: its largest activation in 12 images is 0\n" in printed
    assert len(rows(printed)) == 8
    (tmp_path / "u.png").unlink()
    assert cli.main([*words, "--unit", "stages.1:4"]) == 2
    assert "no unit fires in 12 images: nothing to draw" in capsys.readouterr().err
    assert not (tmp_path / "u.png").exists()


def test_only_images_in_which_a_unit_fires(model):
    """Of a unit that is negative in some images, or in all, these are not shown."""
    images, names = dataset("digits", model)
    stack = torch.stack([images[index][0] for index in range(len(images))])
    values = peaks(model, stack, [Unit("head", channel) for channel in range(10)])[0].T
    fires = (values > 0).sum(1)
    some = int(((fires > 0) & (fires < len(images))).nonzero()[0])
    (row,), _ = find_strongest(model, images, [Unit("head", some)], label_names=names, count=60)
    assert len(row.indices) == fires[some] and row.found is not None and row.found.value.min() > 0
    losing = [index for index in range(len(images)) if values[some, index] <= 0]
    split = images.split
    images.split = replace(split, indices=split.indices[losing], labels=split.labels[losing])
    (row,), _ = find_strongest(model, images, [Unit("head", some)], label_names=names)
    assert (row.indices, row.found) == ((), None)
    rounding = 1e-6 * values.abs().max().item()  # of sums in float32, which depend on the batch
    assert row.largest == pytest.approx(values[some, losing].max().item(), abs=rounding)
    texts = [text.get_text() for axes in unit_sheet([row]).axes for text in axes.texts]
    assert f"never fires: its largest activation in {len(losing)} images is {row.largest:.3g}" in texts


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--unit", "stages.9:1"], "layer='stages.9': no such layer; choose for example one of stages.0.0, stages.0.1"),
        (["--unit", "stages.1:32"], "layer 'stages.1' has size [32, 8, 8]; its channels are 0 to 31"),
        (
            ["--unit", "logits:1"],
            "layer='logits' outputs [[16, 10]] in a forward pass: choose a layer that outputs one",
        ),
        (["--unit", "stages.1"], "unit 'stages.1': write LAYER:CHANNEL"),
        (["--unit", "stages.1:1", "--images", "0"], "--images 0: must be at least 1"),
        (["--unit", "stages.1:1", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--unit", "stages.1:1", "--versus", "3"], "--versus 3: a unit is no class"),
        (["--unit", "stages.1:1", "--output", "u.jpg"], "a file that ends in .png, .svg or .pdf"),
        (["one.png", "--unit", "stages.1:1"], "one.png: --unit searches a dataset: give it as --data"),
        (["--unit", "stages.1:1", "--data", "nowhere/"], "nothing found at 'nowhere/'"),
        (["--unit", "stages.1:1", "--test-split", "dev"], "--test-split dev: no such split"),
        ([], "--data digits: only --unit searches a dataset"),
    ],
)
def test_wrong_commands(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["explain", *MODEL, "--data", "digits", "--output", "u.png", *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_missing(tmp_path, capsys):
    words = ["explain", *MODEL, "--output", str(tmp_path / "u.png")]
    assert cli.main(words) == 2
    assert "nothing to explain: give images, videos, folders or URLs; or --unit and --data" in capsys.readouterr().err
    assert cli.main([*words, "--unit", "stages.1:1"]) == 2
    assert "Name a dataset with --data" in capsys.readouterr().err
    save_model(timm.create_model("test_efficientnet", num_classes=10), tmp_path / "plain")
    plain = ["explain", "--model", str(tmp_path / "plain"), "--data", "digits", "--output", str(tmp_path / "u.png")]
    assert cli.main([*plain, "--unit", "blocks.0:1"]) == 2
    assert "EfficientNet cannot explain itself: use a timm_coda model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*words, "--unit", "stages.1:1", "--target", "3"])
    assert "not allowed with argument --unit" in capsys.readouterr().err


def test_no_images(tmp_path, folder, capsys):
    empty = pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "test.parquet")
    words = ["explain", *MODEL, "--unit", "stages.1:1", "--output", str(tmp_path / "u.png"), "--data"]
    assert cli.main([*words, str(tmp_path / "test.parquet")]) == 2
    assert "the test split" in (said := capsys.readouterr().err) and "is empty" in said
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    broken = pa.table({"image": [buffer.getvalue()[:30]] * 4, "label": ["a", "b"] * 2})
    pq.write_table(broken, tmp_path / "test.parquet")
    assert cli.main([*words, str(tmp_path / "test.parquet")]) == 2
    assert "can be read" in capsys.readouterr().err
