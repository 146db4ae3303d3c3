"""The legend drawn into images."""

import sys

import numpy as np
import pytest

from timm_coda.explanation import sheet
from timm_coda.gallery.legend import draw_legend

GREY = np.full((480, 640, 3), 90, np.uint8)


def changed(picture: np.ndarray) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of the region that is not grey."""
    rows, columns = np.nonzero((picture != 90).any(-1))
    return rows.min(), rows.max(), columns.min(), columns.max()


def test_it_stays_in_its_place():
    places = {changed(draw_legend(GREY, "cat", probability, 0.25)) for probability in (0, 0.5, 0.123, 1)}
    assert len(places) == 1
    top, bottom, left, right = places.pop()
    assert top > 240 and bottom < 480 and left < 20 and right < 400
    assert np.array_equal(GREY, np.full_like(GREY, 90)), "the picture itself is as it was"


def test_its_colors_are_those_of_the_evidence():
    drawn = draw_legend(GREY, "cat", 0.5, 0.25).astype(int)
    red, blue = (drawn[..., i] - drawn[..., 2 - i] for i in (0, 2))
    assert red.max() > 120 and blue.max() > 120
    assert np.nonzero(red > 120)[1].mean() > np.nonzero(blue > 120)[1].mean(), "against is left, for is right"


def test_long_captions_are_cut():
    short, long = (changed(draw_legend(GREY, caption, 0.5, 0.25)) for caption in ("cat", "a very long name " * 20))
    assert long[3] > short[3]
    assert long[3] < 639 and long[:3] == short[:3]


@pytest.mark.parametrize("shape", [(60, 640, 3), (480, 100, 3), (16, 16, 3)])
def test_small_pictures_have_none(shape):
    picture = np.full(shape, 90, np.uint8)
    assert np.array_equal(draw_legend(picture, "cat", 0.5, 0.25), picture)


def test_without_matplotlib(monkeypatch):
    sheet.letters.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'timm_coda\[viz\]'"):
        draw_legend(GREY, "cat", 0.5, 0.25)
