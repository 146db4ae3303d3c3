"""Report of an evaluation as one HTML file: ranking, tables, plots, and maps side by side.

The file is self-contained: it needs no network, scripts or other files. The template engine escapes all texts, and a
content security policy blocks everything that is not in the file.
"""

import base64
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import PIL.Image

from ..explanation import color_limit, heatmap
from ..hub import write_text
from . import plots
from .findings import Findings, Ranking, headline, in_words, interval, number, read_findings

_CRISP = 128  # pixels; up to this size, images are shown with sharp pixels, as in `explanation.figure`


def write_report(folder: Path) -> Path:
    """Write `report.html` into the output folder of an evaluation atomically.

    Args:
        folder: The output folder of `timm-coda evaluate`.

    Raises:
        EvaluationError: The folder has no results.
        ImportError: matplotlib is missing.
    """
    findings = read_findings(folder)
    # StrictUndefined: a template name that is not defined here raises an error instead of rendering as nothing.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    path = Path(folder) / "report.html"
    write_text(path, template.render(_contents(findings)))
    return path


def _contents(findings: Findings) -> dict[str, Any]:
    """Return all values of the template, as strings, lists and mappings of strings."""
    results = findings.results
    best = findings.rankings[0].entries if findings.rankings else []
    order = dict.fromkeys([entry.explainer for entry in best] + list(results["explainers"]))
    return {
        "model": results["model"],
        "data": ", ".join(results["data"]),
        "accuracy": None if results["accuracy"] is None else f"{results['accuracy']:.2%}",
        "headline": headline(findings, "inherent"),
        "columns": [_column(ranking, findings) for ranking in findings.rankings],
        "rows": [{"label": findings.label(name), "cells": _cells(name, findings)} for name in order],
        "failures": _failures(findings),
        "metrics": _metrics(findings),
        "examples": _examples(findings),
        "grid": _grid(findings),
        "key": _picture(heatmap(np.linspace(-1, 1, 201)[None], limit=1)),
        "explainers": [(entry["label"], entry["about"]) for entry in results["explainers"].values()],
        "facts": _facts(results),
        "command": results["command"],
    }


def _column(ranking: Ranking, findings: Findings) -> dict[str, Any]:
    baseline = ranking.baseline
    return {
        "label": ranking.label,
        "statistic": ranking.statistic,
        "better": "more is better" if ranking.higher_is_better else "less is better",
        "words": in_words(ranking, findings),
        "baseline": None if baseline is None else {"label": baseline["label"], "value": number(baseline["value"])},
    }


def _cells(explainer: str, findings: Findings) -> list[dict[str, Any]]:
    """Return a cell for each metric: the value with its interval, or why it is missing."""
    cells = []
    for ranking in findings.rankings:
        entry = ranking.entry(explainer)
        first = entry is not None and entry is ranking.entries[0]
        value, bounds = ("", "") if entry is None else (number(entry.value), interval(entry.interval))
        note = "failed" if explainer in ranking.failed else "not measured"
        cells.append({"value": value, "interval": bounds, "first": first, "note": note})
    return cells


def _failures(findings: Findings) -> list[tuple[str, str, str]]:
    """Return failed explainers, the metrics they failed in, and the reason, grouped by reason."""
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for ranking in findings.rankings:
        for name, reason in ranking.failed.items():
            labels, metrics = found.setdefault(reason, ({}, {}))
            labels[findings.label(name)] = metrics[ranking.label] = None
    count = len(findings.rankings)
    return [
        (", ".join(labels), "every metric" if len(metrics) == count > 1 else ", ".join(metrics), reason)
        for reason, (labels, metrics) in found.items()
    ]


def _metrics(findings: Findings) -> list[dict[str, Any]]:
    metrics = []
    for ranking in findings.rankings:
        drawn = []
        if ranking.entries:
            shown = (f"{findings.label(entry.explainer)} {number(entry.value)}" for entry in ranking.entries)
            alt = f"Box plot of {ranking.label}; {ranking.statistic} of each explainer, the best first: "
            drawn.append(_plot(plots.draw_boxes, ranking, findings, alt + ", ".join(shown)))
        curves = [(findings.label(entry.explainer), entry.curve) for entry in ranking.entries if entry.curve]
        if curves:
            curve = curves[0][1]
            shown = (f"{label} {number(curve['mean'][-1])}" for label, curve in curves)
            alt = f"{curve['y_label']} against {curve['x_label']}; mean at {number(curve['x'][-1])}: "
            drawn.append(_plot(plots.draw_curves, ranking, findings, alt + ", ".join(shown)))
        metrics.append({"label": ranking.label, "about": ranking.about, "plots": drawn, "curves": bool(curves)})
    return metrics


def _plot(draw: Callable[..., Any], ranking: Ranking, findings: Findings, alt: str) -> dict[str, str]:
    """Draw a plot for light and for dark pages, with its alternative text."""
    drawn = {"alt": alt}
    for name, theme in (("light", plots.LIGHT), ("dark", plots.DARK)):
        file = BytesIO()
        draw(ranking, findings, theme).savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        drawn[name] = _uri(file.getvalue(), "image/svg+xml")
    return drawn


def _examples(findings: Findings) -> list[dict[str, Any]]:
    arrays = findings.examples
    shown = []
    for i, image in enumerate(arrays.get("images", ())):
        truth, guess = arrays["labels"][i], arrays["predictions"][i]
        maps = [
            {"label": findings.label(name), "picture": _picture(heatmap(found[i]))}
            for name, found in findings.maps(arrays).items()
        ]
        shown.append(
            {
                "image": _picture(_pixels(image)),
                "truth": findings.class_name(truth),
                "prediction": findings.class_name(guess),
                "probability": f"{arrays['probabilities'][i]:.2f}",
                "right": bool(truth == guess),
                "maps": maps,
            }
        )
    return shown


def _grid(findings: Findings) -> dict[str, Any] | None:
    arrays = findings.grid
    if not arrays:
        return None
    labels = arrays["labels"]
    side = round(len(labels) ** 0.5)
    cells = [{"row": i // side, "column": i % side, "name": findings.class_name(c)} for i, c in enumerate(labels)]
    rows = []
    for name, maps in findings.maps(arrays).items():
        limit = color_limit(maps)
        rows.append({"label": findings.label(name), "maps": [_picture(heatmap(m, limit=limit)) for m in maps]})
    return {"image": _picture(_pixels(arrays["image"])), "cells": cells, "rows": rows, "side": side}


def _facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Return seed, settings and versions, without unset ones."""
    settings = {name.replace("_", " "): value for name, value in results["settings"].items() if value is not None}
    facts = {"seed": results["seed"], **settings, "seconds": f"{results['seconds']:,.0f}", **results["environment"]}
    return [
        (name, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))
        for name, value in facts.items()
    ]


def _pixels(image: np.ndarray) -> np.ndarray:
    """Convert (3, H, W) in [0, 1] to uint8 (H, W, 3)."""
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8).transpose(1, 2, 0)


def _picture(pixels: np.ndarray) -> dict[str, Any]:
    """Encode uint8 (H, W, 3) as a PNG data URI, with its size and whether to show sharp pixels."""
    file = BytesIO()
    PIL.Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    height, width = pixels.shape[:2]
    uri = _uri(file.getvalue(), "image/png")
    return {"uri": uri, "width": width, "height": height, "crisp": max(width, height) <= _CRISP}


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
