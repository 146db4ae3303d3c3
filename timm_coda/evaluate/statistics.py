"""Statistics of scores: quartiles, bootstrap confidence intervals, rank correlation."""

import numpy as np

from .base import Curve, Scores

__all__ = ["bootstrap_interval", "mean_curve", "spearman", "summarise"]

RESAMPLES = 2000
LEVEL = 0.95
_STATISTICS = {"mean": np.mean, "median": np.median}
_ENTRIES = 4_000_000  # resampled values at a time, 32 MB


def bootstrap_interval(values: np.ndarray, statistic: str, *, seed: int) -> tuple[float, float]:
    """Compute the 95 % bootstrap interval of a statistic: samples are drawn with replacement (percentile method).

    Args:
        values: (S,), or (S, M) where the M values of a row are drawn together
        statistic: 'mean' or 'median', over all values
        seed: seed of the draws
    """
    rows = values.reshape(len(values), -1)
    random, found = np.random.default_rng(seed), []
    step = max(1, _ENTRIES // rows.size)
    for start in range(0, RESAMPLES, step):
        drawn = random.integers(len(rows), size=(min(step, RESAMPLES - start), len(rows)))
        found.append(_STATISTICS[statistic](rows[drawn].reshape(len(drawn), -1), axis=1))
    low, high = np.quantile(np.concatenate(found), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_curve(curve: Curve, *, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute a curve's mean over samples, and the ends of its pointwise bootstrap interval, each (K,)."""
    count = len(curve.y)
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    low, high = np.quantile(times @ curve.y / count, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return curve.y.mean(0), low, high


def summarise(scores: Scores, statistic: str, *, seed: int) -> dict:
    """Summarise the scores of one explainer for results.json."""
    values = scores.values.reshape(-1)
    q25, median, q75 = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    entry = {
        "values": _short(values),
        "n": len(values),
        "mean": float(values.mean()),
        "median": median,
        "q25": q25,
        "q75": q75,
        "interval": list(bootstrap_interval(scores.values, statistic, seed=seed)),
        "curve": None,
    }
    if scores.curve is not None:
        mean, low, high = mean_curve(scores.curve, seed=seed)
        labels = {"x_label": scores.curve.x_label, "y_label": scores.curve.y_label}
        entry["curve"] = {"x": _short(scores.curve.x), **labels}
        entry["curve"] |= {"mean": _short(mean), "low": _short(low), "high": _short(high)}
    return entry


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the rank correlation (N,) of rows of a and b (N, K). Ties get their mean rank; 0 if a row is constant."""
    a, b = _ranks(a), _ranks(b)
    scale = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return (a * b).sum(1) / np.where(scale == 0, 1, scale)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Compute ranks within rows (N, K), minus their mean."""
    ranks = [np.searchsorted(np.sort(row), row, side) for row in values for side in ("left", "right")]
    return np.array(ranks).reshape(len(values), 2, -1).mean(1) - values.shape[1] / 2


def _short(values: np.ndarray) -> list[float]:
    """Round to six digits, the precision of float32, which reduces the file to a third."""
    return [float(f"{value:.6g}") for value in values.tolist()]
