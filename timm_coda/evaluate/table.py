"""Format the results of an evaluation as text in 80 columns."""

import textwrap
from typing import Any

__all__ = ["results_table"]

_NAME, _CELL, _COLUMNS = 21, 18, 3  # column widths, and metrics side by side


def results_table(results: dict[str, Any]) -> str:
    """Format a table of explainers by metrics, three metrics side by side: statistic, 95 % interval and failures."""
    data = " ".join(results["data"])
    lines = [f"{results['model']} on {data}: accuracy {results['accuracy']:.1%}"]
    metrics = [metric for metric in results["metrics"].values() if "error" not in metric]
    for start in range(0, len(metrics), _COLUMNS):
        lines += ["", *_block(results, metrics[start : start + _COLUMNS])]
    lines += ["", "In brackets: 95 % bootstrap intervals; *: best."] if metrics else []
    failed = {name: metric["error"] for name, metric in results["metrics"].items() if "error" in metric}
    for name in results["explainers"]:
        errors = {metric["label"]: metric["explainers"][name].get("error") for metric in metrics}
        if len(set(errors.values())) == 1:
            errors = {"": next(iter(errors.values()))}
        failed |= {f"{name} {label}".rstrip(): error for label, error in errors.items() if error}
    for name, error in failed.items():
        lines += textwrap.wrap(f"{name}: {error}", 80, subsequent_indent="  ")
    return "\n".join(lines)


def _block(results: dict[str, Any], metrics: list[dict[str, Any]]) -> list[str]:
    heads = [_head(metric) for metric in metrics]
    height = max(map(len, heads))
    lines = [
        _row("", [head[i - height + len(head)] if i >= height - len(head) else "" for head in heads])
        for i in range(height)
    ]
    for name, explainer in results["explainers"].items():
        lines.append(_row(explainer["label"], [_cell(metric, name) for metric in metrics]))
    baselines = [metric["baseline"] for metric in metrics]
    for label in dict.fromkeys(baseline["label"] for baseline in baselines if baseline):
        lines.append(_row(label, [_number(b["value"]) if b and b["label"] == label else "" for b in baselines]))
    return lines


def _head(metric: dict[str, Any]) -> list[str]:
    count = max((entry.get("n", 0) for entry in metric["explainers"].values()), default=0)
    better = "higher is better" if metric["higher_is_better"] else "lower is better"
    return [*textwrap.wrap(metric["label"], _CELL), f"{metric['statistic']} of {count}", better]


def _cell(metric: dict[str, Any], name: str) -> str:
    entry, statistic = metric["explainers"][name], metric["statistic"]
    if "error" in entry:
        return "failed"
    found = [other[statistic] for other in metric["explainers"].values() if statistic in other]
    best = (max if metric["higher_is_better"] else min)(found)
    low, high = map(_number, entry["interval"])
    return f"{'*' if entry[statistic] == best else ''}{_number(entry[statistic])} ({low} {high})"


def _number(value: float) -> str:
    """Format with three decimals, without a leading zero."""
    if abs(value) < 0.9995:
        return f"{value:.3f}".replace("0.", ".", 1)
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.3g}"


def _row(name: str, cells: list[str]) -> str:
    first = f"{cells[0]:>{_CELL - max(0, len(name) - _NAME)}}"  # a long name extends into this cell
    return (f"{name:{_NAME}}" + " ".join([first, *(f"{cell:>{_CELL}}" for cell in cells[1:])])).rstrip()
