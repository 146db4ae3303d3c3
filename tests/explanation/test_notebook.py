"""HTML of an explanation in notebooks, and its arrays."""

import re
import sys
import xml.etree.ElementTree as ElementTree
from base64 import b64decode
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import timm
import torch
from PIL import Image


@pytest.fixture(scope="module")
def explanation():
    torch.manual_seed(0)
    model = timm.create_model("coda_net_xs.digits", pretrained=True).eval()
    return model.explain(torch.rand(10, 3, 16, 16), top=2)


def cells(html: str) -> list[list[str]]:
    """Rows of the table; fails if the HTML is not well-formed."""
    closed = re.sub("<img ([^>]*)>", r"<img \1/>", html)
    page = ElementTree.fromstring(f"<div>{closed}</div>")
    return [["".join(cell.itertext()) for cell in row] for row in page.iter("tr")]


def test_picture_and_numbers(explanation):
    html = explanation[:2]._repr_html_()
    assert len(html) < 200_000
    encoded = re.search(r'src="data:image/png;base64,([^"]+)"', html)
    assert encoded is not None
    with Image.open(BytesIO(b64decode(encoded[1]))) as picture:
        assert picture.format == "PNG" and picture.width > 400
    assert 'alt="Each image' in html
    heading, *rows = cells(html)
    assert heading == ["image", "prediction", "explained", "value", "bias", "for", "against", "residual"]
    assert [row[0] for row in rows] == ["0", "0", "1", "1"]
    for t in range(2):
        value, bias, positive, negative, residual = map(float, rows[t][3:])
        assert rows[t][2] == str(explanation.target[0, t].item())
        assert value == pytest.approx(explanation.value[0, t].item(), abs=0.006)
        assert value == pytest.approx(bias + positive + negative + residual, abs=0.025)


def test_names_are_escaped(explanation):
    names = ("<script>alert(1)</script>", "a & b", *"cdefghij")
    html = replace(explanation[:3], label_names=names)._repr_html_()
    assert "<script>" not in html
    shown = {row[2] for row in cells(html)[1:]}
    assert shown == {names[i] for i in explanation.target[:3].flatten().tolist()}


def test_contrasts_units_and_long_batches():
    model = timm.create_model("coda_net_xs.digits", pretrained=True).eval()
    images = torch.rand(9, 3, 16, 16)
    html = model.explain(images, 7, versus=1)._repr_html_()
    assert html.endswith("<p>first 8 of 9 images</p>")
    rows = cells(html.removesuffix("<p>first 8 of 9 images</p>"))
    assert len(rows) == 9 and {row[2] for row in rows[1:]} == {"7, not 1"}
    found = model.explain(images[:1], layer="stages.0.0", unit=3)
    assert cells(found._repr_html_())[1][2] == "stages.0.0 3"


def test_without_matplotlib(explanation, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    html = explanation._repr_html_()
    assert "<img" not in html and html.startswith("<table>")
    assert repr(explanation).startswith("Explanation(10 images")


def test_arrays(explanation, tmp_path):
    explanation.save(tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as arrays:
        assert set(arrays) == {
            *("images", "logits", "prediction", "target", "value", "contributions", "weights", "bias", "residual"),
            "label_names",
        }
        assert np.array_equal(arrays["contributions"], explanation.contributions.numpy())
        total = arrays["bias"] + arrays["contributions"].sum((-2, -1)) + arrays["residual"]
        assert np.allclose(total, arrays["value"], atol=1e-4)
    half = replace(explanation, logits=explanation.logits.bfloat16())
    assert half.arrays()["logits"].dtype == np.float32
    with pytest.raises(TypeError, match="max_rows: only figures take options"):
        explanation.save(tmp_path / "all.npz", max_rows=3)
