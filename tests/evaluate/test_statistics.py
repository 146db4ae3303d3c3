"""Bootstrap intervals and rank correlation: comparison with SciPy, and known properties."""

import numpy as np
import pytest
import scipy.stats

from timm_coda.evaluate import Curve, Scores
from timm_coda.evaluate.statistics import bootstrap_interval, mean_curve, spearman, summarise


def test_intervals_against_scipy():
    values = np.random.default_rng(0).gamma(2.0, size=200)
    for statistic in (np.mean, np.median):
        theirs = scipy.stats.bootstrap((values,), statistic, n_resamples=2000, method="percentile", rng=1)
        ours = bootstrap_interval(values, statistic.__name__, seed=42)
        width = theirs.confidence_interval.high - theirs.confidence_interval.low
        assert ours[0] < statistic(values) < ours[1]
        assert np.abs(np.subtract(ours, theirs.confidence_interval)).max() < 0.1 * width
    assert ours == bootstrap_interval(values, "median", seed=42)
    assert ours != bootstrap_interval(values, "median", seed=43)


def test_intervals_draw_what_belongs_together():
    grids = np.repeat(np.random.default_rng(0).normal(size=(50, 1)), 9, axis=1)  # nine equal values per row
    together = bootstrap_interval(grids, "mean", seed=0)
    alone = bootstrap_interval(grids.reshape(-1), "mean", seed=0)
    assert together[1] - together[0] > 2.5 * (alone[1] - alone[0])
    assert bootstrap_interval(np.ones(1), "median", seed=0) == (1, 1)


def test_how_often_an_interval_is_right():
    random = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        low, high = bootstrap_interval(random.normal(size=60), "mean", seed=trial)
        inside += low < 0 < high
    assert 180 <= inside <= 198


def test_curve():
    y = np.random.default_rng(0).normal(size=(40, 3)) * [0, 1, 2] + [5, 6, 7]
    mean, low, high = mean_curve(Curve(np.arange(3), y, "x", "y"), seed=0)
    assert mean == pytest.approx(y.mean(0))
    assert (low[0], high[0]) == pytest.approx((5, 5))
    for k in (1, 2):
        assert np.abs(np.subtract(bootstrap_interval(y[:, k], "mean", seed=1), (low[k], high[k]))).max() < 0.1


def test_spearman_against_scipy():
    random = np.random.default_rng(0)
    a, b = random.integers(0, 6, size=(5, 16)).astype(float), random.normal(size=(5, 16))
    theirs = [scipy.stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert spearman(a, b) == pytest.approx(theirs)
    assert spearman(np.ones((1, 4)), np.arange(4.0)[None]).tolist() == [0]


def test_summary():
    scores = Scores(
        np.array([[1.0, 2], [3, 4]]), Curve(np.array([0, 0.5]), np.array([[1.0, 0], [0.5, 0.25]]), "x", "y")
    )
    entry = summarise(scores, "median", seed=0)
    assert entry["values"] == [1, 2, 3, 4]
    assert (entry["n"], entry["mean"], entry["median"], entry["q25"], entry["q75"]) == (4, 2.5, 2.5, 1.75, 3.25)
    assert entry["interval"] == [1.5, 3.5]
    assert entry["curve"]["mean"] == [0.75, 0.125]
    assert (entry["curve"]["x_label"], entry["curve"]["y_label"]) == ("x", "y")
