"""Fonts for the characters that DejaVu Sans lacks. The tests bring the font: it does not matter what is installed."""

import io
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from timm_coda.explanation import Page, drawable, font_families, fonts
from timm_coda.gallery.legend import draw_legend

CAT = "\N{CJK UNIFIED IDEOGRAPH-732B}"
OWN = "\U000f1234"  # for private use: in no other font
NOWHERE = "\U0010fffd"


@pytest.fixture(autouse=True)
def as_before():
    """Forget what was found and said, before and after; matplotlib's list of fonts is as before."""
    listed = list(font_manager.fontManager.ttflist)
    forget()
    yield
    font_manager.fontManager.ttflist[:] = listed
    forget()


def forget():
    for function in (fonts._family, fonts._faces, fonts._codes, fonts._add_new_fonts):
        function.cache_clear()
    fonts._said.clear()


@pytest.fixture
def tiny(tmp_path) -> Path:
    """The file of a font with two characters, both of them a black triangle."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((900, 0), (0, 900)):
        pen.lineTo(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "triangle"])
    builder.setupCharacterMap({ord(CAT): "triangle", ord(OWN): "triangle"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "triangle": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "triangle": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Zzz Tiny", "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    builder.save(tmp_path / "tiny.ttf")
    return tmp_path / "tiny.ttf"


def in_figure(text: str, **style) -> np.ndarray:
    page = Page(1, 0.3)
    page.text(0.1, 0.2, text, **style)
    stream = io.BytesIO()
    page.figure.savefig(stream, format="png")
    return np.asarray(Image.open(stream).convert("L"))


def in_legend(text: str) -> np.ndarray:
    return draw_legend(np.full((480, 640, 3), 90, np.uint8), text, 0.5, 0.25)


@pytest.mark.filterwarnings("ignore:no installed font has")
def test_a_font_that_has_the_character_draws_it(tiny, caplog):
    without = [in_figure(OWN), in_figure(OWN, weight="bold"), in_legend(f"{OWN}, not a")]
    assert font_families(OWN) == ["DejaVu Sans"]
    font_manager.fontManager.addfont(tiny)
    assert font_families(f"a{OWN}b") == ["DejaVu Sans", "Zzz Tiny"]
    assert drawable(OWN) == OWN
    drawn = [in_figure(OWN), in_figure(OWN, weight="bold"), in_legend(f"{OWN}, not a")]
    for before, after in zip(without, drawn, strict=True):
        assert not np.array_equal(before, after)
    black = drawn[0] < 100
    assert 0.3 < black.sum() / np.ptp(np.nonzero(black), axis=1).prod() < 0.7, "half a square"
    page = Page(1, 1)
    for suffix in ("svg", "pdf"):
        page.text(0, 0.5, f"a{OWN}")
        page.figure.savefig(io.BytesIO(), format=suffix)


def test_plain_text_is_in_dejavu_sans():
    assert font_families("a, ä, я, …, ✓, \N{MINUS SIGN}") == ["DejaVu Sans"]
    assert fonts.font_runs("täl\n")[0][1].endswith("DejaVuSans.ttf")


def test_settings_of_matplotlib_choose_the_font(tiny):
    font_manager.fontManager.addfont(tiny)
    for settings in ({"font.family": ["Zzz Tiny"]}, {"font.sans-serif": ["Not Installed", "Zzz Tiny"]}):
        with matplotlib.rc_context(settings):
            assert font_families(CAT) == ["DejaVu Sans", "Zzz Tiny"]
            ((part, file, index),) = fonts.font_runs(CAT)
            assert (part, Path(file), index) == (CAT, tiny, 0)


def test_a_font_installed_after_matplotlib_made_its_list(tiny, monkeypatch):
    monkeypatch.setattr(font_manager, "X11FontDirectories", [str(tiny.parent)])
    assert font_families(OWN) == ["DejaVu Sans", "Zzz Tiny"]


def test_what_no_font_has_is_said_once():
    with pytest.warns(
        UserWarning, match=r"^no installed font has U\+10FFFD, U\+DCFF: drawn as □.*install a font"
    ) as said:
        in_figure(f"a{NOWHERE}b\udcff", weight="bold")
        assert drawable(f"a{NOWHERE}b\udcff") == "a□b□"
        in_legend(NOWHERE)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(in_figure(NOWHERE), in_figure("□"))


def test_invisible_characters_need_no_font():
    assert drawable("a\U000e0041b") == "ab"  # a tag
