"""The HTML report: its contents, and its behaviour in a real browser."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from helpers.evaluation_folder import write_evaluation
from timm_coda.evaluate import EvaluationError
from timm_coda.evaluate.report import write_report

HOSTILE = """<script>window.owned = 1</script>"><img src=x onerror="window.owned = 1"> '{{ 7 * 7 }}'"""


class Parsed(HTMLParser):
    """Tags with their attributes, and all text with whitespace collapsed."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_evaluation(tmp_path_factory.mktemp("report") / "out")


@pytest.fixture(scope="module")
def report(folder) -> Path:
    return write_report(folder)


@pytest.fixture
def visit(browser):
    """A function that opens a file in a window of a width in CSS pixels; requests and errors fail the test."""
    contexts, faults = [], []

    def open_page(path: Path, *, width: int = 1280, dark: bool = False):
        scheme = "dark" if dark else "light"
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda r: r.url == path.as_uri() or r.url.startswith("data:") or faults.append(r.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def roles(page) -> list[tuple[str, str]]:
    """Role and name of every node that a screen reader reads."""
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]


def changed(folder: Path, target: Path, change) -> Path:
    """Copy an evaluation and change its results."""
    shutil.copytree(folder, target)
    results = json.loads((target / "results.json").read_text())
    change(results)
    (target / "results.json").write_text(json.dumps(results))
    return target


def test_all_is_in_it(folder, report):
    page, results = Parsed(report), json.loads((folder / "results.json").read_text())
    assert report == folder / "report.html"
    for metric in results["metrics"].values():
        assert metric["label"] in page.text and metric["about"] in page.text
    for explainer in results["explainers"].values():
        assert explainer["label"] in page.text and explainer["about"] in page.text
    assert results["command"] in page.text
    for fact in ("seed 42", "grid size 2", f"torch {results['environment']['torch']}"):
        assert fact in page.text
    assert "Kernel SHAP (every metric): ValueError: <b>3 channels" in page.text
    found = results["metrics"]["grid_localisation"]["explainers"]["inherent"]
    assert f"{found['median']:.3f}" in page.text and f"{found['interval'][0]:.3f} to" in page.text
    # 3 plots, 2 colour keys (examples and grid), 4 examples and 4 grid classes, each with the image and 3 maps.
    assert sum(tag == "img" for tag, _ in page.tags) == 3 + 2 + 4 * 4 + 4 * 4
    assert not list(folder.glob(".saving*"))


def test_it_needs_nothing_from_outside(report):
    for tag, attributes in Parsed(report).tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name in ("src", "srcset", "href", "action"):
            assert attributes.get(name, "#").startswith(("data:image/", "#")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
        if tag == "img":
            assert attributes["alt"]
    links = [attributes["href"][1:] for tag, attributes in Parsed(report).tags if tag == "a"]
    assert set(links) <= {attributes.get("id") for _, attributes in Parsed(report).tags}


def test_an_evaluation_without_maps_curves_accuracy_or_success(folder, tmp_path):
    def change(results):
        results["accuracy"] = None
        for metric in results["metrics"].values():
            metric["explainers"] = {"inherent": {"error": "ValueError: NaN maps"}}

    target = changed(folder, tmp_path / "out", change)
    shutil.rmtree(target / "arrays")
    page = Parsed(write_report(target))
    assert "Every explainer failed." in page.text and "accuracy" not in page.text
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert "not measured" in page.text, "explainers without an entry"


def test_no_results(tmp_path):
    with pytest.raises(EvaluationError, match=r"has no results\.json: first run timm-coda evaluate --output"):
        write_report(tmp_path)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_in_a_browser(report, visit, width, dark):
    page = visit(report, width=width, dark=dark)
    pictures = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
    assert len(pictures) == 37 and all(pictures)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "only tables scroll sideways"
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(23, 25, 28)" if dark else "rgb(255, 255, 255)")
    plots = page.evaluate("[...document.querySelectorAll('picture')].map(p => [p.children[0].srcset, p.children[1]"
                             ".currentSrc])")  # fmt: skip
    assert [dark_plot == shown for dark_plot, shown in plots] == [dark] * 3


@pytest.mark.parametrize("dark", [False, True])
def test_its_texts_stand_out(report, visit, dark):
    """Each text has a WCAG contrast of at least 4.5 to 1 with its background."""
    contrasts = visit(report, dark=dark).evaluate("""(() => {
        const light = color => color.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255).map(
            v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce(
            (sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0.05)
        const behind = node => {
            const color = getComputedStyle(node).backgroundColor
            return color == 'rgba(0, 0, 0, 0)' ? behind(node.parentElement) : color
        }
        return [...document.body.querySelectorAll('*')].filter(
            n => [...n.childNodes].some(c => c.nodeType == 3 && c.data.trim())).map(n => {
                const pair = [light(getComputedStyle(n).color), light(behind(n))].sort()
                return [n.textContent.slice(0, 30), Math.max(...pair) / Math.min(...pair)]
            })
    })()""")
    assert len(contrasts) > 50 and not [pair for pair in contrasts if pair[1] < 4.5]


def test_for_keyboards_and_screen_readers(report, visit):
    page = visit(report, width=390)
    heard = roles(page)
    kinds = [role for role, _ in heard]
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert kinds.count(landmark) == 1, landmark
    regions = [name for role, name in heard if role == "region"]
    assert {"Summary", "Numbers", "Metrics", "Examples", "Grid", "Explainers", "How it was made"} <= set(regions)
    columns = {name for role, name in heard if role == "columnheader"}
    assert "Grid localisation median, more is better" in columns and "Explainer" in columns
    assert {"Model-inherent", "Kernel SHAP", "Baseline"} <= {name for role, name in heard if role == "rowheader"}
    images = [name for role, name in heard if role == "image"]
    assert "Model-inherent: evidence for 1 in image 2" in images and "Gradient: evidence for 3" in images
    assert any(name.startswith("Box plot of Grid localisation; median of each explainer") for name in images)
    # The first tab stop skips the table of contents; scrolling tables are reachable by keyboard.
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the content"
    stops = page.evaluate("[...document.querySelectorAll('.scroll')].map(n => n.tabIndex)")
    assert stops == [0, 0]


def test_names_cannot_run(folder, visit, tmp_path):
    def change(results):
        results["label_names"] = [f"{HOSTILE}{i}" for i in range(10)]
        results |= {"model": HOSTILE, "data": [HOSTILE], "command": HOSTILE, "settings": {HOSTILE: [HOSTILE]}}
        for explainer in results["explainers"].values():
            explainer |= {"label": HOSTILE, "about": HOSTILE}
        for metric in results["metrics"].values():
            metric |= {"label": HOSTILE, "about": HOSTILE, "unit": HOSTILE}
            metric["baseline"] = {"value": 0.2, "label": HOSTILE}
            metric["explainers"]["kernel_shap"] = {"error": HOSTILE}

    report = write_report(changed(folder, tmp_path / "out", change))
    parsed = Parsed(report)
    assert "script" not in {tag for tag, _ in parsed.tags} and HOSTILE in parsed.text
    assert not [attributes for _, attributes in parsed.tags if "onerror" in attributes]
    # The texts must be harmless without the policy that forbids scripts, so remove it.
    text = report.read_text(encoding="utf-8")
    assert text.count("Content-Security-Policy") == 1
    report.write_text(text.replace("Content-Security-Policy", "x"), encoding="utf-8")
    page = visit(report, width=390)
    assert page.evaluate("typeof window.owned") == "undefined"
    assert page.evaluate("document.title") == f"Explanations of {HOSTILE}, measured"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "long names are wrapped"
