"""Heat maps, overlays, coloured explanations and figures, and writing them to files."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from timm_coda.explanation import figures

MIDDLE = [247, 247, 247]
FOR, AGAINST = [103, 0, 31], [5, 48, 97]


def explained(batch=2, targets=2, classes=10, height=16, width=16, bias=-2.2, seed=0):
    """Arguments of `figure`: the most probable classes are explained, by maps whose sums are exact."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-2, 2, (batch, classes)).round(2)
    order = np.argsort(-logits, 1)[:, :targets]
    maps = rng.normal(0, 0.1, (batch, targets, height, width))
    scores = np.take_along_axis(logits, order, 1)
    maps += ((scores - bias - maps.sum((-2, -1))) / (height * width))[..., None, None]
    images = rng.uniform(0, 1, (batch, 3, height, width))
    return {"images": images, "contributions": maps, "logits": logits, "targets": order, "bias": bias}


def texts(figure):
    return [text for axes in figure.axes for text in axes.texts if text.get_text()]


def strings(figure):
    return [text.get_text() for text in texts(figure)]


def test_import_needs_no_matplotlib():
    code = "import sys, timm_coda.explanation; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_figures_need_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    figures.heatmap(np.ones((2, 2)))
    with pytest.raises(ImportError, match=r"pip install 'timm_coda\[viz\]'"):
        figures.figure(**explained())


def test_color_limit():
    values = np.arange(-100, 101) / 10
    assert figures.color_limit(values, percentile=100) == pytest.approx(10)
    assert figures.color_limit([-3.0, 1.0], percentile=50) == pytest.approx(2)
    sparse = np.zeros(10_000)
    sparse[7] = -4
    assert figures.color_limit(sparse) == 4, "the percentile is 0, so the maximum is taken"
    assert 0 < figures.color_limit(np.zeros((3, 3))) < 1e-30
    assert isinstance(figures.color_limit(values), float)


def test_color_limit_is_robust_to_outliers():
    values = np.random.default_rng(0).normal(size=(100, 100))
    clean = figures.color_limit(values)
    values[0, :10] = 1e6
    assert figures.color_limit(values) == pytest.approx(clean, rel=0.1)


def test_heatmap_colors():
    colors = figures.heatmap(np.array([[-2.0, -1.0, 0.0, 1.0, 2.0]]), limit=1.0)
    assert colors.dtype == np.uint8 and colors.shape == (1, 5, 3)
    assert colors[0].tolist() == [AGAINST, AGAINST, MIDDLE, FOR, FOR]
    assert figures.heatmap(np.zeros((3, 4))).tolist() == [[MIDDLE] * 4] * 3


def test_heatmap_is_symmetric_and_ordered():
    ramp = np.linspace(-1, 1, 101)[None]
    colors = figures.heatmap(ramp, limit=1)[0].astype(int)
    assert np.array_equal(colors[::-1], figures.heatmap(-ramp, limit=1)[0])
    luminance = colors @ [0.299, 0.587, 0.114]
    assert (np.diff(luminance[:51]) >= 0).all() and (np.diff(luminance[50:]) <= 0).all()
    assert abs(luminance - luminance[::-1]).max() < 25, "the same strength must look equally strong on both sides"
    assert (colors[:45, 2] > colors[:45, 0]).all() and (colors[56:, 0] > colors[56:, 2]).all()


def test_heatmap_limits_each_map_alone_unless_told():
    maps = np.stack([np.full((4, 4), 1.0), np.full((4, 4), 10.0)])
    assert (figures.heatmap(maps) == FOR).all()
    shared = figures.heatmap(maps, limit=figures.color_limit(maps))
    assert (shared[1] == FOR).all() and not (shared[0] == FOR).any()
    assert (figures.heatmap(-maps) == AGAINST).all()


def test_heatmap_survives_extreme_ranges():
    sparse = np.full((100, 100), 1e-38, np.float32)
    sparse[0, 0] = 1e6
    assert figures.heatmap(sparse)[0, 0].tolist() == FOR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors(dtype):
    maps = torch.tensor([[[-1.0, 0.0], [0.5, 1.0]]], dtype=dtype, requires_grad=True)
    weights = torch.ones(1, 6, 2, 2, dtype=dtype)
    images = torch.full((1, 3, 2, 2), 0.5, dtype=dtype)
    array = maps.detach().float().numpy()
    assert np.array_equal(figures.heatmap(maps), figures.heatmap(array))
    assert np.array_equal(figures.overlay(images, maps), figures.overlay(images.float().numpy(), array))
    assert np.array_equal(
        figures.rgba(weights, contributions=maps), figures.rgba(weights.float().numpy(), contributions=array)
    )
    figures.figure(images, contributions=maps, logits=maps[:, 0] * 0 + 1, targets=torch.tensor([1]))


@pytest.mark.parametrize("channels", [1, 3])
def test_overlay_zero_shows_the_grey_image(channels):
    images = np.linspace(0, 1, 16).reshape(1, 1, 4, 4).repeat(channels, 1)
    picture = figures.overlay(images, np.zeros((1, 4, 4)))
    assert picture.shape == (1, 4, 4, 3)
    assert (np.ptp(picture, axis=-1) == 0).all()
    assert (np.diff(picture[0, :, :, 0].ravel().astype(int)) > 0).all()


def test_overlay_opacity_grows():
    images = np.zeros((3, 1, 5))
    picture = figures.overlay(images, np.array([[-1.0, -0.5, 0.0, 0.5, 1.0]]), limit=1)[0].astype(int)
    tint = picture[:, 0] - picture[:, 2]
    assert (np.diff(tint) > 0).all() and tint[2] == 0


def test_overlay_resizes_by_nearest_neighbour_and_takes_targets():
    images = np.full((2, 3, 4, 6), 0.5)
    maps = np.zeros((2, 3, 2, 2))
    maps[1, 2, 0, 1] = 1
    picture = figures.overlay(images, maps)
    assert picture.shape == (2, 3, 4, 6, 3)
    touched = (picture != picture[0, 0, 0, 0]).any(-1)
    expected = np.zeros((2, 3, 4, 6), bool)
    expected[1, 2, :2, 3:] = True
    assert np.array_equal(touched, expected)


@pytest.mark.parametrize(
    ("weights", "color"),
    [
        ([1, 0, 0, 0, 1, 1], (1, 0, 0)),
        ([5, 0, 0, 0, 5, 5], (1, 0, 0)),
        ([0, 2, 0, 2, 0, 2], (0, 1, 0)),
        ([0, 0, 0, 1, 1, 1], (0, 0, 0)),
        ([1, 1, 1, 0, 0, 0], (1, 1, 1)),
        ([3, 1, 2, 1, 3, 2], (0.75, 0.25, 0.5)),
        ([1, -2, 0, -1, 4, 0], (1, 0, 0.5)),
        ([3, 1], (0.75, 0.75, 0.75)),
        ([1, -1], (1, 1, 1)),
    ],
)
def test_rgba_colors(weights, color):
    pixels = np.broadcast_to(np.array(weights, float)[:, None, None], (len(weights), 3, 3))
    picture = figures.rgba(pixels, contributions=np.ones((3, 3)))
    assert picture.dtype == np.float32 and picture.shape == (3, 3, 4)
    assert picture == pytest.approx(np.broadcast_to([*color, 1.0], (3, 3, 4)))


def test_rgba_opacity():
    weights = np.zeros((6, 2, 2))
    weights[:2] = [[[3, 3], [6, 0]], [[4, 4], [8, 0]]]  # lengths 5, 5, 10, 0
    picture = figures.rgba(weights, contributions=np.array([[1.0, -1.0], [1.0, 1.0]]), smooth=1, percentile=100)
    assert picture[..., 3] == pytest.approx(np.array([[0.5, 0.0], [1.0, 0.0]]))


@pytest.mark.parametrize("maps", [np.zeros((2, 5, 5)), -np.ones((2, 5, 5))], ids=["zero", "negative"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_rgba_is_transparent_where_nothing_speaks_for_the_class(maps, weight):
    picture = figures.rgba(np.full((2, 6, 5, 5), weight), contributions=maps)
    assert np.isfinite(picture).all() and (picture[..., 3] == 0).all()


@pytest.mark.parametrize("smooth", [1, 2, 3, 4, 5, 50])
def test_rgba_smoothing_is_the_mean_of_the_window_inside_the_picture(smooth):
    rng = np.random.default_rng(0)
    weights, maps = rng.normal(size=(6, 7, 9)), rng.normal(size=(7, 9))
    alpha = np.where(maps > 0, np.sqrt((weights**2).sum(0)), 0)
    before, after = (smooth - 1) // 2, smooth // 2
    mean = np.array(
        [
            [alpha[max(i - before, 0) : i + after + 1, max(j - before, 0) : j + after + 1].mean() for j in range(9)]
            for i in range(7)
        ]
    )
    picture = figures.rgba(weights, contributions=maps, smooth=smooth, percentile=100)
    assert picture[..., 3] == pytest.approx(mean / mean.max(), abs=1e-6)


def test_rgba_default_window_scales_with_the_picture():
    rng = np.random.default_rng(0)
    for height, window in [(7, 1), (16, 1), (32, 3), (112, 9), (224, 15)]:
        weights, maps = rng.normal(size=(2, height, 8)), rng.normal(size=(height, 8))
        default = figures.rgba(weights, contributions=maps)
        assert np.array_equal(default, figures.rgba(weights, contributions=maps, smooth=window)), height


NAN = np.array([[np.nan, 1.0], [1.0, 1.0]])
GOOD = np.ones((2, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: figures.heatmap(NAN), "contributions has 1 NaN"),
        (lambda: figures.heatmap(np.ones(3)), r"got shape \(3,\)"),
        (lambda: figures.heatmap(np.ones((0, 3))), r"got shape \(0, 3\)"),
        (lambda: figures.heatmap(GOOD, limit=0.0), r"positive.*got 0\.0"),
        (lambda: figures.color_limit(GOOD, percentile=0), r"\(0, 100\], got 0"),
        (lambda: figures.color_limit(GOOD, percentile=101), r"\(0, 100\], got 101"),
        (lambda: figures.rgba(np.ones((6, 2, 2)), contributions=NAN), "contributions has 1 NaN"),
        (lambda: figures.rgba(np.ones((3, 2, 2)), contributions=GOOD), r"got \(3, 2, 2\)"),
        (lambda: figures.rgba(np.ones((6, 2, 3)), contributions=GOOD), r"got \(6, 2, 3\) and \(2, 2\)"),
        (lambda: figures.rgba(np.ones((6, 2, 2)), contributions=GOOD, smooth=0), "at least 1 pixel.*got 0"),
        (lambda: figures.overlay(np.ones((6, 2, 2)), GOOD), r"not encoded, got shape \(6, 2, 2\)"),
        (lambda: figures.overlay(np.full((3, 2, 2), 2.0), GOOD), r"got 2\.\.2: undo the normalisation"),
        (lambda: figures.overlay(np.ones((4, 3, 2, 2)), np.ones((5, 2, 2))), r"fit the images, got \(5, 2, 2\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.ones((3, 3, 16, 16))}, r"got \(3, 3, 16, 16\) and \(2, 2, 16, 16\)"),
        ({"logits": None}, "needs logits and targets, or values"),
        ({"targets": None}, "needs logits and targets, or values"),
        ({"logits": np.ones((3, 10))}, r"logits must have shape \(2, 10\).*got \(3, 10\)"),
        ({"targets": [[0, 1, 2]] * 2}, r"targets must have shape \(2, 2\).*got \(2, 3\)"),
        ({"targets": [[0, 10]] * 2}, r"targets must lie in 0\.\.9, got 0\.\.10"),
        ({"true_labels": [-1, 2]}, r"true_labels must lie in 0\.\.9, got -1\.\.2"),
        ({"label_names": ["a", "b"]}, "2 names for 10 classes"),
        ({"titles": [["a"]] * 2}, r"titles must have shape \(2, 2\).*got \(2, 1\)"),
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
    ],
)
def test_figure_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        figures.figure(**explained() | changes)


def test_figure_texts():
    maps = np.full((2, 2, 4, 4), 5.41 / 16)
    maps[:, 1] = -0.5 / 16
    logits = [[3.21, -2.7, -9.0], [3.21, -2.7, -9.0]]
    shown = strings(
        figures.figure(
            np.ones((2, 1, 4, 4)),
            contributions=maps,
            logits=logits,
            targets=[[0, 1]] * 2,
            bias=-2.2,
            label_names=["cat", "dog", "cow"],
            true_labels=[0, 2],
        )
    )
    assert shown.count("logit 3.21 = bias \N{MINUS SIGN}2.20 + 5.41") == 2
    assert shown.count("logit \N{MINUS SIGN}2.70 = bias \N{MINUS SIGN}2.20 \N{MINUS SIGN} 0.50") == 2
    assert shown.count("+0.34") == shown.count("\N{MINUS SIGN}0.34") == 2, "one symmetric scale for each row"
    assert shown.count("0.96") == 2, "sigmoid(3.21)"
    assert {"true: cat", "true: cow", "✓ correct", "✗ wrong", "for", "against", "contribution (logit)"} <= set(shown)
    assert not any("residual" in text for text in shown)


def test_figure_reports_the_residual_and_no_negative_zero():
    arguments = explained(batch=1, targets=1) | {"bias": 0.0}
    arguments["contributions"] = np.zeros((1, 16, 16))
    shown = strings(figures.figure(**arguments | {"logits": np.full((1, 10), -1.5), "targets": [0]}))
    assert "logit \N{MINUS SIGN}1.50 = bias 0.00 + 0.00" in shown
    assert "residual \N{MINUS SIGN}1.50" in shown


def test_figure_of_units_that_are_no_classes():
    maps = np.full((1, 2, 2, 2), 0.25)
    figure = figures.figure(
        np.ones((1, 3, 8, 8)), contributions=maps, values=[[1.0, 1.0]], titles=[["unit 3", "unit 7"]]
    )
    shown = strings(figure)
    assert {"unit 3", "unit 7", "value 1.00 = bias 0.00 + 1.00", "contribution (value)"} <= set(shown)
    assert not any("probability" in text for text in shown)


def test_figure_names_what_it_leaves_out():
    assert "first 2 of 3 images" in strings(figures.figure(**explained(batch=3), max_rows=2))


NAMES = [
    f"{i} a very long class name, with $maths$_{i}^2\nand a line break, that nobody would print" for i in range(100)
]


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 3},
        {"targets": 4, "classes": 100, "batch": 1},
        {"classes": 2, "batch": 1},
        {"classes": 1, "targets": 1},
        {"height": 240, "width": 240, "batch": 1},
        {"height": 8, "width": 64},
        {"height": 64, "width": 8, "batch": 1},
        {"height": 1, "width": 200, "batch": 1},
        {"bias": -123456.789, "batch": 1},
    ],
    ids=str,
)
def test_figure_texts_lie_inside_and_apart(options):
    arguments = explained(**options)
    classes = arguments["logits"].shape[1]
    truth = np.arange(len(arguments["logits"])) % classes
    figure = figures.figure(**arguments, label_names=NAMES[:classes], true_labels=truth, max_rows=2)
    renderer = figure.canvas.get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts(figure)]
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
    for (one, a), (other, b) in combinations(boxes, 2):
        assert not a.overlaps(b), (one, other)
    assert any(text.endswith("…") for text, _ in boxes)


def test_figure_maps_keep_their_pixels():
    arguments = explained(batch=1)
    pictures = [image for axes in figures.figure(**arguments).axes for image in axes.images]
    limit = figures.color_limit(arguments["contributions"][0])
    expected = figures.heatmap(arguments["contributions"][0], limit=limit)
    assert np.array_equal(pictures[1].get_array(), expected[0]) and np.array_equal(pictures[2].get_array(), expected[1])
    assert {image.get_interpolation() for image in pictures[:3]} == {"nearest"}


def test_figure_is_the_same_in_threads_and_under_any_settings(tmp_path):
    def saved(name):
        figures.save_figure(figures.figure(**explained(batch=1)), tmp_path / name)
        return (tmp_path / name).read_bytes()

    expected = saved("serial.png")
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(saved, [f"{i}.png" for i in range(8)])) == {expected}
    dark = {"figure.facecolor": "black", "savefig.facecolor": "black", "axes.grid": True, "font.size": 30}
    with matplotlib.rc_context(dark | {"figure.autolayout": True, "text.usetex": True, "text.color": "white"}):
        assert saved("dark.png") == expected


def test_figure_leaves_pyplot_alone():
    """Uses a separate process, because libraries of other tests import pyplot."""
    code = (
        "import sys, numpy; from timm_coda.explanation import figure; images = numpy.zeros((1, 3, 8, 8)); "
        "figure(images, contributions=images[:, 0], values=[[0.0]], titles=[['']], bias=0.0); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".PDF", b"%PDF"), (".svg", b"<?xml")])
def test_save_figure(tmp_path, suffix, start):
    figure = figures.figure(**explained(batch=1))
    first, second = tmp_path / "new" / f"a{suffix}", tmp_path / f"b{suffix}"
    figures.save_figure(figure, first)
    figures.save_figure(figure, str(second))
    assert first.read_bytes().startswith(start)
    assert suffix == ".svg" or first.read_bytes() == second.read_bytes()
    assert b"<dc:date>" not in first.read_bytes() and b"CreationDate" not in first.read_bytes()


def test_save_image(tmp_path):
    path = tmp_path / "new" / "a.png"
    colors = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    figures.save_image(colors, path)
    assert np.array_equal(np.asarray(Image.open(path)), colors)
    figures.save_image(torch.from_numpy(colors), path)
    assert np.array_equal(np.asarray(Image.open(path)), colors)
    figures.save_image(np.array([[[0, 0.5, 1, 0.2]]]), path)
    assert np.asarray(Image.open(path)).tolist() == [[[0, 128, 255, 51]]]
    grid = np.arange(2 * 3 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 3, 4, 5, 3)
    figures.save_image(grid, path)
    picture = np.asarray(Image.open(path))
    assert picture.shape == (8, 15, 3) and np.array_equal(picture[4:, 5:10], grid[1, 1])
    figures.save_image(grid[0], path)
    assert np.array_equal(np.asarray(Image.open(path))[:, 10:], grid[0, 2])


def test_save_errors(tmp_path):
    with pytest.raises(ValueError, match=r"'a\.jpg'.*\.png or \.svg or \.pdf"):
        figures.save_figure(figures.figure(**explained(batch=1)), tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"'a\.jpg'.*\.png"):
        figures.save_image(np.zeros((2, 2, 3)), tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"got \(2, 2\)"):
        figures.save_image(np.zeros((2, 2), np.uint8), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got up to 200"):
        figures.save_image(np.full((2, 2, 3), 200.0), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_failing_save_leaves_the_old_file(tmp_path):
    class Broken:
        def savefig(self, stream, **options):
            stream.write(b"half of a pict")
            raise OSError("disk full")

    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        figures.save_figure(Broken(), path)
    assert path.read_bytes() == b"old" and [Path(p).name for p in tmp_path.iterdir()] == ["a.png"]
