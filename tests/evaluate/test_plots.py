"""Results of an evaluation, in words and in plots."""

import io
import json

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from helpers.evaluation_folder import write_evaluation
from timm_coda.evaluate import EvaluationError, plots
from timm_coda.evaluate.findings import headline, in_words, number, read_findings

LONG = "a_label_without_a_single_space_that_goes_on_and_on, $x_1$ and then-some more words"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_evaluation(tmp_path_factory.mktemp("plots") / "out")


def found(values, low, high, **more):
    """An explainer's entry in results.json."""
    values = list(map(float, values))
    middle = {"mean": float(np.mean(values)), "median": float(np.median(values))}
    return {"values": values, "n": len(values), "interval": [low, high], "curve": None, **middle, **more}


def findings_of(folder, explainers, *, higher=True, baseline=None, statistic="mean", labels=None):
    """Write the results of one metric, and read them as findings."""
    metric = {"label": "Metric", "about": "", "unit": "points", "higher_is_better": higher, "baseline": baseline}
    metric |= {"explainers": explainers, "statistic": statistic}
    names = {name: {"label": (labels or {}).get(name, name), "about": ""} for name in explainers}
    results = {"metrics": {"metric": metric}, "explainers": names, "label_names": []}
    (folder / "results.json").write_text(json.dumps(results))
    return read_findings(folder)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1, "1.00"),
        (0.93752, "0.938"),
        (0.0123, "0.012"),
        (-12.34, "\N{MINUS SIGN}12.3"),
        (4567.8, "4568"),
        (2e-5, "2.00e\N{MINUS SIGN}05"),
    ],
)
def test_numbers_as_texts(value, text):
    assert number(value) == text


def test_the_best_is_first_whichever_way_is_better(tmp_path):
    explainers = {"a": found([1, 2], 1, 2), "b": found([4, 5], 4, 5), "c": {"error": "ValueError: no"}}
    more, less = (findings_of(tmp_path, explainers, higher=higher).rankings[0] for higher in (True, False))
    assert [entry.explainer for entry in more.entries] == ["b", "a"]
    assert [entry.explainer for entry in less.entries] == ["a", "b"]
    assert more.failed == {"c": "ValueError: no"} and more.entry("c") is None


def test_words_say_whether_it_may_be_chance(tmp_path):
    baseline = {"value": 3, "label": "uniform map"}
    clear = {"a": found([1, 2], 1, 2), "b": found([4, 5], 4, 5)}
    findings = findings_of(tmp_path, clear, baseline=baseline)
    assert in_words(findings.rankings[0], findings) == (
        "b is first (mean 4.50, 95 % interval 4.00 to 5.00), a second (1.50, 1.00 to 2.00). The intervals lie "
        "apart. The baseline, uniform map, is at 3.00: the first is clearly better."
    )
    assert headline(findings, "b") == "b is first in 1 of 1 metric, with an interval apart from that of the second."
    assert headline(findings, "a") == "a is first in none of 1 metric."
    assert headline(findings, "c") == ""

    doubtful = clear | {"b": found([4, 5], 2, 5)}
    findings = findings_of(tmp_path, doubtful, baseline=baseline)
    words = in_words(findings.rankings[0], findings)
    assert "The intervals overlap: their order may be chance." in words and "not clearly better" in words
    assert headline(findings, "b") == "b is first in 1 of 1 metric, but its interval overlaps with that of the second."

    findings = findings_of(tmp_path, {"a": clear["a"]}, statistic="median")
    assert in_words(findings.rankings[0], findings) == (
        "a is the only one measured (median 1.50, 95 % interval 1.00 to 2.00)."
    )
    findings = findings_of(tmp_path, {"a": {"error": "no"}})
    assert in_words(findings.rankings[0], findings) == "Every explainer failed."


def test_samples_without_a_number(tmp_path):
    explainers = {"a": found([1, 3], 1, 3) | {"values": [[1, None], [3, None]]}, "b": found([1], 1, 1) | {"mean": None}}
    ranking = findings_of(tmp_path, explainers).rankings[0]
    assert ranking.entries[0].values.tolist() == [1, 3]
    assert ranking.failed == {"b": "no sample gave a number"}


def test_results_that_cannot_be_read(tmp_path):
    with pytest.raises(EvaluationError, match=r"no results\.json: first run timm-coda evaluate"):
        read_findings(tmp_path)
    for text, reason in (("{", "JSONDecodeError"), ('{"metrics": {"m": {}}}', "KeyError: 'explainers'")):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(EvaluationError, match=f"cannot be read .{reason}"):
            read_findings(tmp_path)


def test_files(folder):
    names = ["grid_localisation", "pixel_removal", "pixel_removal-curve", "examples", "grid"]
    written = plots.write_plots(folder)
    assert written == [folder / "plots" / f"{name}.{suffix}" for name in names for suffix in ("png", "svg", "pdf")]
    for path in written:
        start = path.read_bytes()[:8]
        assert start.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[path.suffix])
    with Image.open(folder / "plots/grid_localisation.png") as picture:
        assert picture.width == round(300 * plots.COLUMN), "the printed width at 300 dpi"


def test_boxes_show_the_numbers(tmp_path):
    values = np.arange(101)
    baseline = {"value": 7.0, "label": "uniform map"}
    explainers = {"a": found(values, 48, 53), "b": found(values - 100, -52, -47), "c": {"error": "no"}}
    findings = findings_of(tmp_path, explainers, baseline=baseline, statistic="median")
    figure = plots.draw_boxes(findings.rankings[0], findings, plots.LIGHT)
    axes = figure.axes[0]
    lines = [(line.get_xdata(), line.get_ydata()) for line in axes.lines]
    assert [list(x) for x, _ in lines] == [
        [7, 7], [5, 95], [50, 50], [48, 53], [50], [-95, -5], [-50, -50], [-52, -47], [-50],
    ]  # fmt: skip
    assert [(box.get_x(), box.get_width()) for box in axes.patches[::2]] == [(25, 50), (-75, 50)]
    assert [text.get_text() for text in axes.texts] == ["50.0", "\N{MINUS SIGN}50.0", "failed"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b", "c"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the best is on top"


def test_curves_show_the_numbers(folder):
    findings = read_findings(folder)
    ranking = findings.rankings[1]
    figure = plots.draw_curves(ranking, findings, plots.LIGHT)
    axes = figure.axes[0]
    assert len(axes.lines) == len(axes.collections) == 3
    for line, entry in zip(axes.lines, ranking.entries, strict=True):
        assert entry.curve and line.get_ydata().tolist() == entry.curve["mean"]
        assert line.get_label() == findings.label(entry.explainer)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [line.get_label() for line in axes.lines]
    # An explainer has the same colour in each plot, and each has its own look.
    boxes = plots.draw_boxes(ranking, findings, plots.LIGHT).axes[0]
    assert [to_rgb(line.get_color()) for line in boxes.lines[::4]] == [to_rgb(line.get_color()) for line in axes.lines]
    assert axes.lines[[entry.explainer for entry in ranking.entries].index("inherent")].get_color() == "#b2182b"


def test_as_many_explainers_as_there_are_look_different(tmp_path):
    findings = findings_of(tmp_path, {name: found([1], 1, 1) for name in ("inherent", *map(str, range(13)))})
    looks = [plots._look(name, findings, plots.LIGHT) for name in findings.results["explainers"]]
    assert len({(color, str(dashes)) for color, dashes in looks}) == 14


def test_maps_are_in_their_places(folder):
    findings = read_findings(folder)
    figure = plots.draw_grid(findings, plots.LIGHT)
    assert len(figure.axes) == 4 * (1 + 3)
    places = [axes.get_position() for axes in figure.axes]
    assert places[0].y0 > places[4].y0 and places[0].x0 == places[4].x0 < places[1].x0
    frames = [tuple(axes.patches[0].get_xy()) for axes in figure.axes[:4]]
    side = findings.grid["image"].shape[-1] / 2
    assert frames == [(-0.5, -0.5), (side - 0.5, -0.5), (-0.5, side - 0.5), (side - 0.5, side - 0.5)]
    assert [axes.get_title() for axes in figure.axes[:4]] == ["0", "1", "2", "3"]
    # An explainer's maps share one scale: equal contributions have equal colours.
    shown = np.stack([axes.images[0].get_array() for axes in figure.axes[4:8]])
    maps, strongest = findings.grid["maps_inherent"], np.abs(findings.grid["maps_inherent"]).argmax()
    assert shown.reshape(-1, 3)[strongest].tolist() in ([5, 48, 97], [103, 0, 31])
    weak = np.abs(maps) < 0.01 * np.abs(maps).max()
    assert shown[weak].min() > 225, "weak contributions are almost white in every map"


@pytest.mark.filterwarnings("ignore:no installed font has")  # then squares are drawn, which fit as well
@pytest.mark.parametrize(
    ("theme", "text"),
    [(plots.LIGHT, LONG), (plots.DARK, LONG), (plots.LIGHT, "大熊猫" * 20)],
    ids=["light", "dark", "wide"],
)
def test_labels_are_never_cut(folder, theme, text):
    findings = read_findings(folder)
    for explainer in findings.results["explainers"].values():
        explainer["label"] = text
    findings.results["label_names"] = [text] * 10
    for ranking in findings.rankings:
        object.__setattr__(ranking, "unit", text)
        for entry in ranking.entries:
            entry.curve and entry.curve.update(x_label=text, y_label=text)
    for name, figure in plots.draw_plots(findings, theme).items():
        file = io.BytesIO()
        figure.savefig(file, format="png")
        pixels = np.asarray(Image.open(file).convert("RGB"))
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (edge == np.rint(255 * np.array(to_rgb(theme.paper)))).all(), f"{name}: ink on the edge"
        inches = np.array(pixels.shape[1::-1]) / figure.dpi
        assert (inches <= (plots.PAGE + 0.2, plots.PAGE_HEIGHT + 2)).all(), name
        labels = [label for axes in figure.axes for label in (axes.title, *axes.get_yticklabels(), *axes.texts)]
        for label in (*figure.texts, *labels):
            box = label.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= pixels.shape[1], (name, label.get_text())
