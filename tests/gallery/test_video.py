"""Explained videos: real files, written and read with PyAV."""

import csv
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from timm_coda import data
from timm_coda.explanation.figures import color_limit
from timm_coda.gallery import placement, video

av = pytest.importorskip("av", reason="needs PyAV: pip install 'timm_coda[video]'")

CLEAR_REFS = Path("/proc/self/clear_refs")


@pytest.fixture(scope="module")
def model():
    return timm.create_model("coda_net_xs.digits", pretrained=True).eval()


@pytest.fixture(scope="module")
def digits() -> list[np.ndarray]:
    split = data.load_data("digits").test
    return [np.asarray(split.image(index).resize((96, 96), Image.Resampling.BICUBIC)) for index in range(10)]


def write_video(file: Path, pictures, *, rate=25, times=None, rotation=None, aspect=None, codec="h264") -> Path:
    """Write frames, uint8 (H, W, 3), to a video; `times` are in milliseconds."""
    with av.open(str(file), "w") as container:
        stream = None
        for number, picture in enumerate(pictures):
            if stream is None:
                stream = container.add_stream(codec, rate=rate, options={"crf": "1"} if codec == "h264" else {})
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = "yuv420p"
                if times:
                    stream.codec_context.time_base = Fraction(1, 1000)
                if rotation:
                    if not hasattr(stream, "set_display_rotation"):
                        pytest.skip("this PyAV cannot write a turned video")
                    stream.set_display_rotation(rotation)
                if aspect:
                    stream.codec_context.sample_aspect_ratio = aspect
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file


def read_video(file: Path) -> tuple[list[np.ndarray], list[float]]:
    with av.open(str(file)) as container:
        frames = list(container.decode(video=0))
    return [frame.to_ndarray(format="rgb24") for frame in frames], [float(frame.time) for frame in frames]


def faded(digits: list[np.ndarray], frames: int) -> list[np.ndarray]:
    """A digit that fades in, with grey strips at both sides that the model does not see."""
    pictures = []
    for strength in np.linspace(0.1, 1, frames):
        picture = np.full((96, 128, 3), 60, np.uint8)
        picture[:, 16:112] = (digits[1] * strength).astype(np.uint8)
        pictures.append(picture)
    return pictures


def test_a_color_means_the_same_in_all_frames(tmp_path, model, digits):
    source = write_video(tmp_path / "in.mkv", faded(digits, 12))
    found = video.explain_video(model, source, tmp_path / "out.mp4", target=4, batch_size=5)
    assert (found.frames, found.width, found.height, found.rate, found.target) == (12, 128, 96, 25, 4)
    drawn, _ = read_video(tmp_path / "out.mp4")
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    pictures, _ = read_video(source)
    box = placement.seen_box(resolve_model_data_config(model), 128, 96)
    differences, others = [], []
    for picture, seen in zip(pictures, drawn, strict=True):
        one = model.explain(transform(Image.fromarray(picture))[None], target=4)
        for limit, results in ((found.limit, differences), (color_limit(one.contributions), others)):
            expected = placement.overlay_whole(picture, one.contributions[0], box=box, limit=limit)
            results.append(np.abs(seen.astype(int) - expected).mean())
    assert max(differences) < 3  # grey levels of 255: H.264 rounds, and halves the resolution of colours
    assert max(np.divide(others, differences)) > 2, "a scale for each frame would be seen"


def test_the_table_has_the_numbers_of_every_frame(tmp_path, model, digits):
    pictures = [digits[number] for number in (0, 1, 1, 1)]
    source = write_video(tmp_path / "in.mp4", pictures, rate=10)
    found = video.explain_video(model, source, tmp_path / "out.mp4", versus=9, label_names="abcdefghij")
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["frame"] for row in rows] == ["0", "1", "2", "3"]
    assert [float(row["seconds"]) for row in rows] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert {row["target"] for row in rows} == {"abcdefghij"[found.target]}, "one class in all frames"
    assert found.predicted == sum(row["prediction"] == row["target"] for row in rows)
    seen, _ = read_video(source)
    one = model.explain(Image.fromarray(seen[2]), target=found.target, versus=9)
    assert float(rows[2]["value"]) == pytest.approx(one.value.item(), abs=1e-3)
    assert float(rows[2]["probability"]) == pytest.approx(torch.sigmoid(one.logits.max()).item(), abs=1e-3)
    assert sorted(os.listdir(tmp_path)) == ["in.mp4", "out.csv", "out.mp4"], "nothing is left beside them"


def test_times_sizes_and_turns_are_kept(tmp_path, model, digits):
    times = [0, 40, 50, 200, 1000]
    source = write_video(tmp_path / "uneven.mp4", [digits[number] for number in range(5)], times=times)
    video.explain_video(model, source, tmp_path / "out.mp4")
    assert read_video(tmp_path / "out.mp4")[1] == pytest.approx([time / 1000 for time in times])
    wide = write_video(tmp_path / "wide.mkv", [digits[0]] * 3, aspect=Fraction(4, 3), codec="mpeg4", rate=30)
    assert video.explain_video(model, wide, tmp_path / "out.mp4").rate == 30
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(4, 3)
        assert container.streams.video[0].average_rate == 30
    tall = np.zeros((64, 96, 3), np.uint8)
    tall[:32, :32] = 255  # upper left; after a clockwise turn, upper right
    turned = write_video(tmp_path / "turned.mp4", [tall] * 2, rotation=-90)
    found = video.explain_video(model, turned, tmp_path / "out.mp4")
    assert (found.width, found.height) == (64, 96)
    picture = read_video(tmp_path / "out.mp4")[0][0]
    assert picture.shape == (96, 64, 3)
    assert picture[20:30, 40:60].mean() > picture[20:30, 5:25].mean() + 50


def test_an_odd_side_gets_one_more_pixel(tmp_path, model):
    rng = np.random.default_rng(0)
    with av.open(str(tmp_path / "odd.avi"), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.width, stream.height, stream.pix_fmt = 61, 43, "bgr0"
        frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (43, 61, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    found = video.explain_video(model, tmp_path / "odd.avi", tmp_path / "out.mp4")
    assert (found.frames, found.width, found.height) == (1, 61, 43)
    assert read_video(tmp_path / "out.mp4")[0][0].shape == (44, 62, 3)


def sound(file: Path) -> None:
    with av.open(str(file), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def frameless(file: Path) -> None:
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 64
        container.start_encoding()


def damaged(file: Path) -> None:
    rng = np.random.default_rng(0)
    write_video(file, rng.integers(0, 256, (8, 64, 64, 3), np.uint8))
    content = bytearray(file.read_bytes())
    content[2000:60_000] = rng.integers(0, 256, 58_000, np.uint8).tobytes()
    file.write_bytes(content)


def cut(file: Path) -> None:
    write_video(file, np.zeros((8, 64, 64, 3), np.uint8))
    file.write_bytes(file.read_bytes()[:-600])  # without the index at the end


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: file.write_text("hello"), "not a video, or damaged"),
        (lambda file: file.touch(), "not a video, or damaged"),
        (lambda file: file.write_text("#EXTM3U\n#EXTINF:1,\nother.mp4\n"), "not a video, or damaged"),
        (lambda file: file.write_text("ffconcat version 1.0\nfile other.mp4\n"), "not a video, or damaged"),
        (lambda file: None, "cannot be opened: No such file"),
        (sound, "the file has no video stream"),
        (frameless, "has no video stream|has no frames"),
        (damaged, "not a video, or damaged"),
        (cut, "damaged"),
    ],
    ids=["text", "empty", "playlist", "list of files", "no file", "sound", "no frames", "damaged", "cut"],
)
def test_what_is_no_video_is_named(tmp_path, model, make, message):
    file = tmp_path / "film.mp4"
    make(file)
    output = tmp_path / "out"
    with pytest.raises(video.VideoError, match=f"film.mp4: .*({message})"):
        video.explain_video(model, file, output / "out.mp4")
    assert not output.exists() or not os.listdir(output)


def test_a_video_that_ends_early_says_so(tmp_path, model, digits):
    file = write_video(tmp_path / "film.mkv", [digits[number % 10] for number in range(60)], rate=10)
    assert video.explain_video(model, file, tmp_path / "out.mp4").note == ""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "of 6.0 s: the video is cut off or damaged" in video.explain_video(model, file, tmp_path / "out.mp4").note


def test_wrong_arguments(tmp_path, model, digits, monkeypatch):
    source = write_video(tmp_path / "in.mp4", [digits[0]])
    with pytest.raises(ValueError, match=r"out.avi: the output name must end in .mp4"):
        video.explain_video(model, source, tmp_path / "out.avi")
    with pytest.raises(ValueError, match="target=10: the model's classes are 0 to 9"):
        video.explain_video(model, source, tmp_path / "out.mp4", target=10)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'timm_coda\[video\]'"):
        video.explain_video(model, source, tmp_path / "out.mp4")


def test_nothing_is_left_after_an_error(tmp_path, model, digits, monkeypatch):
    source = write_video(tmp_path / "in.mp4", digits)
    (tmp_path / "out.mp4").write_text("of before")

    def broken(*args):
        raise RuntimeError("no ink")

    monkeypatch.setattr(video, "draw_legend", broken)
    with pytest.raises(RuntimeError, match="no ink"):
        video.explain_video(model, source, tmp_path / "out.mp4")
    assert sorted(os.listdir(tmp_path)) == ["in.mp4", "out.mp4"]
    assert (tmp_path / "out.mp4").read_text() == "of before"


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="the peak of memory is read from Linux's /proc")
def test_memory_does_not_grow_with_length(tmp_path):
    """Four times as many frames need no more memory."""
    code = """
import pathlib, re, sys, timm, torch, timm_coda
from timm_coda.gallery import explain_video
torch.set_num_threads(1)
model = timm.create_model("coda_net_xs.digits", pretrained=True).eval()
for file in [sys.argv[1], *sys.argv[1:]]:  # the first time fills caches
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    frames = explain_video(model, file, file + ".out.mp4").frames
    print(frames, re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""
    pictures = [np.roll(np.tile(np.arange(320, dtype=np.uint8)[:, None], (240, 1, 3)), n, 1) for n in range(70)]
    files = [write_video(tmp_path / f"{count}.mkv", (pictures * 4)[:count]) for count in (70, 280)]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    _, (short, before), (long, after) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert (short, long) == (70, 280)
    assert after - before < 24_000, "kB; the 210 frames more would be 48_000"
