"""Results of an evaluation: read from its output folder, ranked, and summarised in words."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .base import EvaluationError


@dataclass(frozen=True)
class Entry:
    """Result of one explainer in one metric."""

    explainer: str
    value: float  # the metric's statistic, a mean or a median
    interval: tuple[float, float]  # its 95 % bootstrap interval
    values: np.ndarray  # (samples,), without missing values
    curve: dict[str, Any] | None

    def overlaps(self, other: "Entry") -> bool:
        """Return whether the two intervals overlap."""
        return self.interval[0] <= other.interval[1] and other.interval[0] <= self.interval[1]


@dataclass(frozen=True)
class Ranking:
    """All entries of one metric, best first, and the failed explainers with the reasons."""

    name: str
    label: str
    about: str
    unit: str
    statistic: str
    higher_is_better: bool
    baseline: dict[str, Any] | None
    entries: list[Entry]
    failed: dict[str, str]

    def entry(self, explainer: str) -> Entry | None:
        """Return the entry of an explainer; None if it has none."""
        return next((entry for entry in self.entries if entry.explainer == explainer), None)


@dataclass(frozen=True)
class Findings:
    """Contents of `results.json` and of the example arrays beside it.

    `examples` has images (n, 3, H, W), labels (n,), predictions (n,), probabilities (n,), and maps (n, H, W) of each
    explainer that did not fail, as maps_NAME. `grid` has image (3, H, W), labels (c * c,) row by row, and maps
    (c * c, H, W), one for each label. Each is empty if the evaluation did not write it.
    """

    results: dict[str, Any]
    rankings: list[Ranking]
    examples: dict[str, np.ndarray]
    grid: dict[str, np.ndarray]

    def label(self, explainer: str) -> str:
        """Return the label of an explainer."""
        return self.results["explainers"][explainer]["label"]

    def class_name(self, index: int) -> str:
        return str(self.results["label_names"][int(index)])

    def maps(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the maps in `examples` or `grid` by explainer, in the order of the evaluation's explainers."""
        names = self.results["explainers"]
        return {name: arrays[f"maps_{name}"] for name in names if f"maps_{name}" in arrays}


def read_findings(folder: Path) -> Findings:
    """Read the output folder of `timm-coda evaluate`.

    Raises:
        EvaluationError: The folder has no results, or they cannot be read.
    """
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise EvaluationError(f"{folder} has no results.json: first run timm-coda evaluate --output {folder}")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        rankings = [_ranking(name, entry) for name, entry in results["metrics"].items()]
        examples, grid = (_arrays(path.parent / "arrays" / name) for name in ("examples.npz", "grid.npz"))
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read ({type(error).__name__}: {error}): evaluate again") from error
    return Findings(results, rankings, examples, grid)


def number(value: float) -> str:
    """Format with three significant digits, at most three decimals, a true minus sign; exponents only for extremes."""
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    shown = f"{value:.{max(0, min(digits, 3))}f}" if 1e-3 <= abs(value) < 1e6 else f"{value:.2e}"
    return shown.replace("-", "\N{MINUS SIGN}")


def interval(bounds: tuple[float, float]) -> str:
    return f"{number(bounds[0])} to {number(bounds[1])}"


def in_words(ranking: Ranking, findings: Findings) -> str:
    """Describe which explainer is first in a metric, its margin, and whether the order may be chance."""
    if not ranking.entries:
        return "Every explainer failed."
    first, *others = ranking.entries
    label, word = findings.label, ranking.statistic
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
            "The intervals overlap: their order may be chance."
            if first.overlaps(second)
            else "The intervals lie apart."
        )
    if ranking.baseline:
        level = ranking.baseline["value"]
        beaten = first.interval[0] > level if ranking.higher_is_better else first.interval[1] < level
        verdict = "clearly better" if beaten else "not clearly better"
        text += f" The baseline, {ranking.baseline['label']}, is at {number(level)}: the first is {verdict}."
    return text


def headline(findings: Findings, explainer: str) -> str:
    """Describe in how many metrics an explainer is first, and in how many of them the intervals do not overlap."""
    compared = [ranking for ranking in findings.rankings if len(ranking.entries) > 1 and ranking.entry(explainer)]
    first = [ranking for ranking in compared if ranking.entries[0].explainer == explainer]
    clear = [ranking for ranking in first if not ranking.entries[0].overlaps(ranking.entries[1])]
    if not compared:
        return ""
    count = f"{len(first)} of {len(compared)} metric{'s' if len(compared) > 1 else ''}"
    name = findings.label(explainer)
    if not first:
        return f"{name} is first in none of {len(compared)} metric{'s' if len(compared) > 1 else ''}."
    if not clear:
        return f"{name} is first in {count}, but its interval overlaps with that of the second."
    which = "" if len(first) == 1 else " in all of them" if len(clear) == len(first) else f" in {len(clear)} of them"
    return f"{name} is first in {count},{which} with an interval apart from that of the second."


def _ranking(name: str, entry: dict[str, Any]) -> Ranking:
    entries, failed = [], {}
    for explainer, found in entry["explainers"].items():
        value = found.get(entry["statistic"])
        if "error" in found:
            failed[explainer] = found["error"]
        elif value is None or not math.isfinite(value):
            failed[explainer] = "no sample gave a number"
        else:
            values = np.array(found["values"], dtype=np.float64).ravel()  # null becomes NaN
            low, high = found["interval"]
            entries.append(Entry(explainer, value, (low, high), values[np.isfinite(values)], found["curve"]))
    higher = entry["higher_is_better"]
    entries.sort(key=lambda entry: -entry.value if higher else entry.value)
    about = {key: entry[key] for key in ("label", "about", "unit", "statistic", "higher_is_better", "baseline")}
    return Ranking(name=name, entries=entries, failed=failed, **about)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as file:
        return dict(file)
