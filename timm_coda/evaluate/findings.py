"""What an evaluation found: read from its output folder, ranked, and said in plain words."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Score:
    """What one explainer got in one metric."""

    explainer: str
    value: float  # the metric's statistic, a mean or a median
    interval: tuple[float, float]  # its 95 % bootstrap interval
    values: np.ndarray  # (samples,), without those that have no number
    curve: dict[str, Any] | None

    def overlaps(self, other: "Score") -> bool:
        """True if the two intervals have a number in common."""
        return self.interval[0] <= other.interval[1] and other.interval[0] <= self.interval[1]


@dataclass(frozen=True)
class Metric:
    """All scores of one metric, the best first, and the explainers that have none with the reason."""

    name: str
    label: str
    about: str
    unit: str
    statistic: str
    higher_is_better: bool
    baseline: dict[str, Any] | None
    scores: list[Score]
    failed: dict[str, str]

    def score(self, explainer: str) -> Score | None:
        """The score of an explainer; None if it has none."""
        return next((score for score in self.scores if score.explainer == explainer), None)


@dataclass(frozen=True)
class Findings:
    """`results.json` and the example arrays beside it.

    `examples` has images (n, 3, H, W), labels (n,), predictions (n,), probabilities (n,), and a map (n, H, W) for each
    explainer that did not fail, as maps_NAME; `grid` has image (3, H, W), labels (c * c,) row by row, and maps
    (c * c, H, W), one for each label. Either is empty where the evaluation wrote none.
    """

    results: dict[str, Any]
    metrics: list[Metric]
    examples: dict[str, np.ndarray]
    grid: dict[str, np.ndarray]

    def label(self, explainer: str) -> str:
        """How an explainer is called in texts."""
        return self.results["explainers"][explainer]["label"]

    def class_name(self, index: int) -> str:
        return str(self.results["label_names"][int(index)])

    def maps(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The maps in `examples` or `grid` by explainer, in the order in which the explainers were asked for."""
        names = self.results["explainers"]
        return {name: arrays[f"maps_{name}"] for name in names if f"maps_{name}" in arrays}


def read_findings(folder: Path) -> Findings:
    """Read the output folder of `timm-coda evaluate`.

    Raises:
        ValueError: There are no results in it, or they cannot be read.
    """
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no results.json: first run timm-coda evaluate --output {folder}")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        metrics = [_metric(name, entry) for name, entry in results["metrics"].items()]
        examples, grid = (_arrays(path.parent / "arrays" / name) for name in ("examples.npz", "grid.npz"))
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}): evaluate again") from error
    return Findings(results, metrics, examples, grid)


def number(value: float) -> str:
    """Three significant digits, but never an exponent for what a metric may give; a real minus sign."""
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    shown = f"{value:.{max(0, min(digits, 3))}f}" if 1e-3 <= abs(value) < 1e6 else f"{value:.2e}"
    return shown.replace("-", "\N{MINUS SIGN}")


def interval(bounds: tuple[float, float]) -> str:
    return f"{number(bounds[0])} to {number(bounds[1])}"


def in_words(metric: Metric, findings: Findings) -> str:
    """Who is first in a metric, by how much, and whether that could be chance."""
    if not metric.scores:
        return "Every explainer failed."
    first, *others = metric.scores
    label, word = findings.label, metric.statistic
    if not others:
        shown = f"{word} {number(first.value)}, 95 % interval {interval(first.interval)}"
        text = f"{label(first.explainer)} is the only one measured ({shown})."
    else:
        second = others[0]
        text = (
            f"{label(first.explainer)} is first ({word} {number(first.value)}, 95 % interval "
            f"{interval(first.interval)}), {label(second.explainer)} second ({number(second.value)}, "
            f"{interval(second.interval)}). "
        )
        text += (
            "The intervals overlap: the order of the two may be chance."
            if first.overlaps(second)
            else "The intervals do not overlap."
        )
    if metric.baseline:
        level = metric.baseline["value"]
        beaten = first.interval[0] > level if metric.higher_is_better else first.interval[1] < level
        where = "is worse" if beaten else "is not clearly worse"
        text += f" The baseline, {metric.baseline['label']}, {where} ({number(level)})."
    return text


def headline(findings: Findings, explainer: str) -> str:
    """In how many metrics an explainer is first, and in how many of them beyond doubt."""
    compared = [metric for metric in findings.metrics if len(metric.scores) > 1 and metric.score(explainer)]
    first = [metric for metric in compared if metric.scores[0].explainer == explainer]
    clear = [metric for metric in first if not metric.scores[0].overlaps(metric.scores[1])]
    if not compared:
        return ""
    count = f"{len(first)} of {len(compared)} metric{'s' if len(compared) > 1 else ''}"
    name = findings.label(explainer)
    if not first:
        return f"{name} is first in none of {len(compared)} metric{'s' if len(compared) > 1 else ''}."
    if len(first) == 1:
        doubt = "its interval does not overlap" if clear else "but its interval overlaps"
        return f"{name} is first in {count}; {doubt} with that of the second."
    which = "all" if len(clear) == len(first) else str(len(clear)) if clear else "none"
    return f"{name} is first in {count}; in {which} of them its interval does not overlap with that of the second."


def _metric(name: str, entry: dict[str, Any]) -> Metric:
    scores, failed = [], {}
    for explainer, found in entry["explainers"].items():
        value = found.get(entry["statistic"])
        if "error" in found:
            failed[explainer] = found["error"]
        elif value is None or not math.isfinite(value):
            failed[explainer] = "no sample gave a number"
        else:
            values = np.array(found["values"], dtype=np.float64)  # null becomes NaN
            low, high = found["interval"]
            scores.append(Score(explainer, value, (low, high), values[np.isfinite(values)], found["curve"]))
    higher = entry["higher_is_better"]
    scores.sort(key=lambda score: -score.value if higher else score.value)
    about = {key: entry[key] for key in ("label", "about", "unit", "statistic", "higher_is_better", "baseline")}
    return Metric(name=name, scores=scores, failed=failed, **about)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as file:
        return dict(file)
