"""`timm-coda explain` on the command line: files of all kinds, folders, class names and errors."""

import csv
import errno
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps

from helpers.processes import Program
from timm_coda import cli, data
from timm_coda.gallery import gallery
from timm_coda.hub import claimed, save_model

MODEL = ["--model", "coda_net_xs.digits"]


@pytest.fixture(scope="module")
def model():
    return timm.create_model("coda_net_xs.digits", pretrained=True).eval()


@pytest.fixture(scope="module")
def digits() -> list[Image.Image]:
    split = data.load_data("digits").test
    return [split.image(index) for index in range(10)]


@pytest.fixture
def mixed(tmp_path, digits) -> Path:
    """A folder of typical files, three of which cannot be explained."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    (folder / ".hidden").write_text("not looked at")
    digits[0].save(folder / "a.png")
    digits[1].save(folder / "a.bmp")
    digits[2].resize((64, 48)).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.asarray(digits[3].convert("L")).astype(np.uint16) * 257).save(folder / "sixteen.png")
    digits[4].save(folder / "moving.gif", save_all=True, append_images=[digits[5]])
    digits[6].convert("RGBA").save(folder / "below" / "clear.png")
    (folder / "notes.txt").write_text("no image at all")
    whole = (folder / "sixteen.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    header = struct.pack(">II", 10_000, 10_000) + whole[24:29]
    huge = whole[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + whole[33:]
    (folder / "huge.png").write_bytes(huge)
    return folder


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "table.csv").read_text(encoding="utf-8").splitlines()))


def test_a_folder_of_everything(tmp_path, mixed, model, digits, capsys):
    out = tmp_path / "out"
    assert cli.main(["explain", str(mixed), *MODEL, "--output", str(out), "--batch-size", "4"]) == 1
    printed = capsys.readouterr()
    assert max(map(len, printed.out.splitlines()[:-1])) <= 80
    assert "6 of 9 explained" in printed.out and "(first of several frames)" in printed.out
    said = " ".join(printed.err.split())
    assert "3 skipped" in said
    assert "cut.png: damaged or incomplete (image file is truncated)" in said
    assert "huge.png: 10000x10000 pixels are 100,000,000, the limit is 50,000,000: make it smaller" in said
    assert "notes.txt: not an image in a supported format" in said
    stems = ["a", "a-2", "below/clear", "cmyk", "moving", "sixteen"]
    expected = {f"{stem}.{ending}" for stem in stems for ending in ("figure.png", "overlay.png", "npz")}
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == expected | {"table.csv", "contact_sheet.png", ".explain.jsonl"}

    rows = table(out)
    assert [Path(row["image"]).name for row in rows] == sorted(
        ["a.bmp", "a.png", "cmyk.jpg", "cut.png", "huge.png", "moving.gif", "notes.txt", "sixteen.png", "clear.png"],
        key=lambda name: ("below/" if name == "clear.png" else "") + name,
    )
    one = model.explain(digits[3])
    row = next(row for row in rows if row["image"].endswith("sixteen.png"))
    assert row["prediction"] == row["target"] == str(one.prediction.item())
    assert float(row["value"]) == pytest.approx(one.value.item(), rel=1e-4)
    assert float(row["probability"]) == pytest.approx(torch.sigmoid(one.value).item(), rel=1e-4)
    assert float(row["evidence_for"]) + float(row["evidence_against"]) + float(row["bias"]) == pytest.approx(
        float(row["value"]), abs=1e-3
    )
    with np.load(out / "sixteen.npz") as arrays:
        assert np.allclose(arrays["contributions"][0], one.contributions.numpy(), atol=1e-5)
        assert arrays["weights"].shape == (1, 1, 6, 16, 16)
        assert arrays["label_names"].tolist() == list("0123456789")


def test_overlay_lies_where_the_model_looked(tmp_path, model, digits):
    wide = Image.new("RGB", (640, 320), "white")
    wide.paste(digits[0].resize((320, 320)), (160, 0))
    wide.save(tmp_path / "wide.png")
    assert cli.main(["explain", str(tmp_path / "wide.png"), *MODEL, "--output", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out" / "wide.overlay.png") as image:
        drawn = np.asarray(image).astype(int)
    assert drawn.shape == (320, 640, 3)
    assert drawn[:, :160].max() < 100 and drawn[:, 480:].max() < 100, "cropped parts are dark"
    with np.load(tmp_path / "out" / "wide.npz") as arrays:
        strongest = arrays["contributions"][0, 0]
    row, column = np.unravel_index(strongest.argmax(), strongest.shape)
    red = drawn[row * 20 + 10, 160 + column * 20 + 10]
    assert red[0] > red[2] + 100
    assert not (tmp_path / "out" / "contact_sheet.png").exists(), "one image has no contact sheet"


def test_classes_and_contrasts(tmp_path, digits, capsys):
    digits[0].save(tmp_path / "one.png")
    words = ["explain", str(tmp_path / "one.png"), *MODEL, "--overwrite", "--output", str(tmp_path / "out")]
    assert cli.main([*words, "--target", "1", "7", "--versus", "4", "--figure", "svg"]) == 0
    rows = table(tmp_path / "out")
    assert [(row["target"], row["versus"]) for row in rows] == [("1", "4"), ("7", "4")]
    assert rows[0]["bias"] == "0"
    names = sorted(path.name for path in (tmp_path / "out").glob("[!.]*"))
    assert names == ["one.figure.svg", "one.npz", "one.overlay-1.png", "one.overlay-2.png", "table.csv"]
    assert cli.main([*words, "--top", "3"]) == 0
    rows = table(tmp_path / "out")
    values = [float(row["value"]) for row in rows]
    assert len(values) == 3 and values == sorted(values, reverse=True)
    for wrong, message in (
        (["--target", "seven"], "no class is named 'seven': give a name, or a number from 0 to 9"),
        (["--target", "10"], "class 10: the model's classes are 0 to 9"),
        (["--target", "3", "--versus", "3"], "--versus 3: the same class as --target"),
        (["--target", "3", "--versus", "1", "2"], "--versus has 2 classes: give one, or one for each --target"),
        (["--top", "11"], "--top 11: the model has 10 classes"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--device", "tpu"], "--device tpu: choose cpu or cuda"),
    ):
        capsys.readouterr()
        assert cli.main([*words, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_nothing_is_overwritten_silently(tmp_path, digits, capsys):
    digits[0].save(tmp_path / "one.png")
    words = ["explain", str(tmp_path / "one.png"), *MODEL, "--output", str(tmp_path / "out")]
    assert cli.main(words) == 0
    (tmp_path / "out" / "mine.txt").write_text("of a person")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert cli.main([*words, "--target", "1", "--figure", "svg"]) == 2
    message = "has results with other settings (target was None, is [1]; figure was '.png', is '.svg'): name another"
    assert message in capsys.readouterr().err
    (tmp_path / "out" / ".explain.jsonl").rename(tmp_path / "record")
    assert cli.main(words) == 2
    assert "out: not a new or empty folder; name another, or add --overwrite" in capsys.readouterr().err
    (tmp_path / "record").rename(tmp_path / "out" / ".explain.jsonl")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert cli.main([*words, "--overwrite"]) == 0
    assert (tmp_path / "out" / "mine.txt").read_text() == "of a person"
    assert cli.main(["explain", str(tmp_path), *MODEL, "--overwrite", "--output", str(tmp_path)]) == 2
    assert "is also the output folder" in capsys.readouterr().err
    # Results inside the folder of images are not explained.
    capsys.readouterr()
    assert cli.main(["explain", str(tmp_path), *MODEL, "--overwrite", "--output", str(tmp_path / "out")]) == 0
    assert "1 of 1 explained" in capsys.readouterr().out


def test_a_video_among_images(tmp_path, digits, capsys):
    av = pytest.importorskip("av", reason="needs PyAV: pip install 'timm_coda[video]'")
    digits[0].save(tmp_path / "one.png")
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        stream = container.add_stream("h264", rate=25)
        stream.width = stream.height = 96
        for digit in digits[:5]:
            container.mux(stream.encode(av.VideoFrame.from_image(digit.resize((96, 96)))))
        container.mux(stream.encode(None))
    (tmp_path / "broken.MP4").write_text("no video")
    files = [str(tmp_path / name) for name in ("film.mp4", "one.png", "broken.MP4")]
    assert cli.main(["explain", *files, *MODEL, "--output", str(tmp_path / "out"), "--target", "1"]) == 1
    names = sorted(path.name for path in (tmp_path / "out").glob("[!.]*"))
    assert names == [
        *("film.overlay.csv", "film.overlay.mp4", "one.figure.png", "one.npz", "one.overlay.png", "table.csv"),
    ]
    printed = capsys.readouterr()
    assert re.search(r"film.mp4 +5 frames, \d+ % of them 1\n", printed.out)
    films = [tmp_path / "out" / name for name in ("film.overlay.csv", "film.overlay.mp4")]
    before = [film.stat().st_mtime_ns for film in films]
    words = ["explain", *files, *MODEL, "--output", str(tmp_path / "out"), "--target", "1"]
    assert cli.main(words) == 1
    assert "2 of 3 explained (2 before)" in capsys.readouterr().out
    assert [film.stat().st_mtime_ns for film in films] == before
    films[0].unlink()
    assert cli.main(words) == 1
    assert "2 of 3 explained (1 before)" in capsys.readouterr().out and films[0].exists()
    assert "broken.MP4: not a video, or damaged" in " ".join(printed.err.split())


def test_nothing_to_show(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    out = ["--output", str(tmp_path / "out")]
    assert cli.main(["explain", str(tmp_path / "notes.txt"), *MODEL, *out]) == 2
    save_model(timm.create_model("test_resnet", num_classes=2), tmp_path / "ordinary")
    notes = str(tmp_path / "notes.txt")
    for words, message in (
        ([str(tmp_path / "none.png"), *MODEL], "none.png': no such file or folder"),
        ([str(tmp_path / "empty"), *MODEL], "empty': the folder has no files"),
        ([notes, "--model", str(tmp_path / "ordinary")], "ResNet cannot explain itself: use a timm_coda model"),
        ([notes, "--model", "coda_net_t"], "timm has no model 'coda_net_t'"),
    ):
        capsys.readouterr()
        assert cli.main(["explain", *words, "--output", str(tmp_path / "new")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


def test_sheets_of_many_images(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(gallery, "_TILES", 2)
    (tmp_path / "in").mkdir()
    for index in range(5):
        digits[index].save(tmp_path / "in" / f"{index}.png")
    assert cli.main(["explain", str(tmp_path / "in"), *MODEL, "--output", str(tmp_path / "out")]) == 0
    sheets = sorted(path.name for path in (tmp_path / "out").glob("contact_sheet*"))
    assert sheets == ["contact_sheet-2.png", "contact_sheet-3.png", "contact_sheet.png"]
    with Image.open(tmp_path / "out" / sheets[1]) as last, Image.open(tmp_path / "out" / sheets[2]) as first:
        assert last.width < first.width


def test_it_is_a_command(tmp_path, digits):
    digits[0].save(tmp_path / "one.png")
    words = ["explain", "one.png", *MODEL, "--output", "out"]
    done = subprocess.run(
        [sys.executable, "-m", "timm_coda", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "one.png                    1            1.00" in done.stdout


def test_where_nothing_is_recognised_the_table_says_so(tmp_path, digits, capsys):
    """The model was trained on white digits on black: a black one on white is none of its classes."""
    digits[0].save(tmp_path / "white.png")
    ImageOps.invert(digits[0]).save(tmp_path / "black.png")
    files = [str(tmp_path / "white.png"), str(tmp_path / "black.png")]
    assert cli.main(["explain", *files, *MODEL, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "The model was trained on handwritten digits, white on black." in printed
    assert printed.count("nothing recognised: no class reaches 0.50") == 1
    assert re.search(r"black\.png .*\n  \(nothing recognised", printed)


@pytest.mark.filterwarnings("ignore:no installed font has:UserWarning")  # on a machine without a Chinese font
def test_long_and_equal_names(tmp_path, digits):
    """Names are cut by bytes, endings included, and stay different: for every file system, also after the cut."""
    folder = tmp_path / "in"
    long, accents = "\u5b57" * 82, "\u00e9" * 120  # 246 and 240 bytes
    (folder / long).mkdir(parents=True)
    names = [f"{long}.png", f"{long[:-1]}a.png", f"{long}/{long}.png", f"{accents}.png"]
    names += ["caf\u00e9.png", "cafe\u0301.png", "CAFE\u0301.png"]
    for name, digit in zip(names, digits, strict=False):
        digit.save(folder / name)
    out = tmp_path / "out"
    assert cli.main(["explain", str(folder), *MODEL, "--output", str(out), "--top", "2"]) == 0
    assert len(table(out)) == 2 * len(names)
    stems = {path.relative_to(out).as_posix().removesuffix(".npz") for path in out.rglob("*.npz")}
    folded = {unicodedata.normalize("NFD", unicodedata.normalize("NFD", stem).casefold()) for stem in stems}
    assert len(stems) == len(folded) == len(names)
    assert len(list(out.rglob("*.overlay-2.png"))) == len(names)
    assert max(len(part.encode()) for stem in stems for part in stem.split("/")) < 255 - len("-99.overlay-1000.png")


def test_an_output_that_cannot_be_written_is_skipped(tmp_path, digits, capsys):
    (tmp_path / "in").mkdir()
    for index in range(4):
        digits[index].save(tmp_path / "in" / f"{index}.png")
    out = tmp_path / "out"
    (out / "1.npz").mkdir(parents=True)  # in the way
    (out / "2.figure.png").mkdir()
    words = ["explain", str(tmp_path / "in"), *MODEL, "--overwrite", "--output", str(out)]
    assert cli.main(words) == 1
    assert [bool(row["skipped"]) for row in table(out)] == [False, True, True, False]
    printed = capsys.readouterr()
    assert "2 of 4 explained" in printed.out and "1.png: cannot be written: Is a directory" in " ".join(
        printed.err.split()
    )
    (out / "1.npz").rmdir()
    (out / "2.figure.png").rmdir()
    assert cli.main([word for word in words if word != "--overwrite"]) == 0
    assert "4 of 4 explained (2 before)" in capsys.readouterr().out
    assert [row["skipped"] for row in table(out)] == [""] * 4


def test_a_full_disk_ends_with_a_table(tmp_path, digits, capsys, monkeypatch):
    (tmp_path / "in").mkdir()
    for index in range(4):
        digits[index].save(tmp_path / "in" / f"{index}.png")
    out, rename = tmp_path / "out", os.replace
    words = ["explain", str(tmp_path / "in"), *MODEL, "--batch-size", "2", "--output", str(out)]

    def full(source, target):
        if str(target).endswith("2.npz"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert re.search(r"error: .*No space left on device: '.*2\.npz'", said) and "run the same command to go on" in said
    assert [Path(row["image"]).name for row in table(out)] == ["0.png", "1.png"]
    assert not list(out.rglob(".saving*"))
    assert cli.main(words) == 0
    assert len(table(out)) == 4


def test_stopped_it_goes_on(tmp_path, digits, capsys):
    """Ctrl-C leaves a table and a contact sheet; a kill does not. After both, the same command does only the rest."""
    folder, out, whole = tmp_path / "in", tmp_path / "out", tmp_path / "whole"
    folder.mkdir()
    for index in range(10):
        digits[index].save(folder / f"{index:02}.png")
    words = ["explain", str(folder), *MODEL, "--batch-size", "2", "--output"]
    command = "import sys; from timm_coda.cli import main; sys.exit(main())"
    done = {}
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = Program(["-c", command, *words, str(out)], cwd=tmp_path, environment={**os.environ})
        while len(list(out.glob("[!.]*.npz"))) < len(done) + 3 and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code, said
        kept = [json.loads(line)["files"] for line in (out / ".explain.jsonl").read_text().splitlines()[1:]]
        assert all((out / name).stat().st_mtime_ns == time for name, time in done.items()), "not explained again"
        done = {name: (out / name).stat().st_mtime_ns for names in kept for name in names}
        if number == signal.SIGINT:
            assert f"stopped; {len(kept)} of 10 explained" in said and "run the same command to go on" in said
            assert [Path(row["image"]).stem for row in table(out)] == [f"{index:02}" for index in range(len(kept))]
            assert (out / "contact_sheet.png").exists()
    changed, *_ = [name for name in done if name.endswith(".npz")]
    digits[9].save(folder / changed.replace(".npz", ".png"))
    assert cli.main([*words, str(out)]) == 0
    assert f"10 of 10 explained ({len(kept) - 1} before)" in capsys.readouterr().out
    again = {name for name, time in done.items() if (out / name).stat().st_mtime_ns != time}
    assert again == {name for name in done if name.startswith(changed.replace(".npz", "."))}
    assert cli.main([*words, str(whole)]) == 0
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in out.iterdir())
    for name in names:
        assert name == ".explain.jsonl" or (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_two_commands_do_not_share_a_folder(tmp_path, digits, capsys):
    digits[0].save(tmp_path / "one.png")
    words = ["explain", str(tmp_path / "one.png"), *MODEL, "--overwrite", "--output", str(tmp_path / "out")]
    with claimed(tmp_path / "out"):
        assert cli.main(words) == 2
    assert f"another run writes into {tmp_path}/out (process {os.getpid()} on" in capsys.readouterr().err
    assert cli.main(words) == 0
