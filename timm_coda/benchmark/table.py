"""Format benchmark reports as text tables, 80 columns wide."""

from typing import Any

__all__ = ["benchmark_table", "comparison_table", "scaling_table"]


def benchmark_table(report: dict[str, Any]) -> str:
    """Format a report of `benchmark.measure`."""
    setup, environment, macs = report["setup"], report["environment"], report["macs_an_image"]["model"]
    size, machine = "x".join(map(str, report["image"])), "gpus" if setup["device"] == "cuda" else "cpu"
    options = [word for word in ("channels_last", "compile") if setup[word]]
    counts = [f"{macs[name] / 1e6:.4g} {name}" for name in setup["operations"]]
    lines = [
        " ".join([setup["model"], *setup["model_args"]]) + f", {report['classes']} classes",
        ", ".join([f"batches of {setup['batch_size']} images {size}", *options]),
        f"{setup['device']}: {environment[machine]}",
        f"million multiply-accumulates per image: {', '.join(counts)}",
        f"{setup['repeats']} rounds: median (quartiles)",
    ]
    for dtype, rates in report["gemm_macs_per_second"].items():
        unit, name = (1e12, "TFLOP/s") if rates["mm"]["median"] > 5e11 else (1e9, "GFLOP/s")
        reached = [f"{kind} {_with_quartiles(rate, 2 / unit)}" for kind, rate in rates.items()]
        lines.append("")
        if dtype in report["emulated"]:
            factor = report["cpu_slowdown"][dtype]
            lines.append(f"{dtype} is emulated: this CPU takes {factor:.0f} times as long as in float32")
        lines.append(f"{dtype}; GEMM in {name}: {', '.join(reached)}")
        lines.append(_row("backend", "operation", "ms/batch", "images/s", "x published", "GEMM", "+ MB"))
        for row in (row for row in report["rows"] if row["dtype"] == dtype):
            lines.append(_benchmark_row(row))
            if "memory_missing" in row:
                lines.append(f"{'':21} extra memory unknown: {row['memory_missing']}"[:80])
        counts = report["macs_an_image"]
        lines += _layer_table([row for row in report["layers"] if row["dtype"] == dtype], counts)
    return "\n".join(lines)


def comparison_table(report: dict[str, Any]) -> str:
    """Format a report of `comparison.compare`."""
    setup, environment = report["setup"], report["environment"]
    machine = "gpus" if setup["device"] == "cuda" else "cpu"
    size = "x".join(map(str, report["image"]))
    lines = [
        f"{' '.join([setup['model'], *setup['model_args']])} against {report['against']}, {report['classes']} classes",
        f"batches of {setup['batch_size']} images {size}, {setup['dtypes'][0]}",
        f"{setup['device']}: {environment[machine]}",
        f"{setup['repeats']} rounds: median (quartiles)",
        "",
        _comparison_row("operation", "ms/batch", "ordinary", "x ordinary", "+ MB", "x"),
    ]
    for row in report["rows"]:
        numbers = [_with_quartiles(row[name], 1000) for name in ("seconds", "against_seconds")]
        ours, theirs = (row.get(f"{side}extra_bytes") for side in ("", "against_"))
        memory = ["-", "-"]
        if ours is not None and theirs is not None:
            memory = [_short(ours / 1e6), _short(ours / theirs) if theirs else "-"]
        lines.append(_comparison_row(row["operation"], *numbers, _with_quartiles(row["ratio"], digits=2), *memory))
    return "\n".join(lines)


def scaling_table(report: dict[str, Any]) -> str:
    """Format a report of `scaling.measure_scaling`."""
    setup, environment, rows = report["setup"], report["environment"], report["rows"]
    machine = "gpus" if setup["device"] == "cuda" else "cpu"
    lines = [
        f"{' '.join([setup['model'], *setup['model_args']])}, {report['classes']} classes, backend {report['backend']}",
        f"{setup['device']}: {environment[machine]}",
        f"{setup['repeats']} rounds: median (quartiles)",
        f"relative: time per image and pixel, 1 for batches of {setup['batch_size']} images {rows[0]['img_size']} px",
    ]
    for dtype, name in dict.fromkeys((row["dtype"], row["operation"]) for row in rows):
        mine = [row for row in rows if (row["dtype"], row["operation"]) == (dtype, name)]
        lines += ["", f"{name}, {dtype}", _scaling_row("px", "images", "ms/batch", "images/s", "relative")]
        for row in mine:
            numbers = _with_quartiles(row["seconds"], 1000), _short(row["batch_size"] / row["seconds"]["median"])
            relative = "1" if row is mine[0] else _with_quartiles(row["relative"], digits=2)
            lines.append(_scaling_row(str(row["img_size"]), str(row["batch_size"]), *numbers, relative))
    return "\n".join(lines)


def _scaling_row(*words: str) -> str:
    return "{:>6} {:>7} {:>22} {:>9} {:>20}".format(*words)


def _comparison_row(*words: str) -> str:
    return "{:11} {:>18} {:>18} {:>16} {:>6} {:>5}".format(*words)


def _row(*words: str) -> str:
    return "{:9} {:11} {:>19} {:>8} {:>16} {:>5} {:>6}".format(*words)


def _benchmark_row(row: dict[str, Any]) -> str:
    if "missing" in row:
        return f"{row['backend']:9} {row['operation']:11} not run: {row['missing']}"[:80]
    published = row["times_published"].get(row["dtype"])
    return _row(
        row["backend"],
        row["operation"],
        _with_quartiles(row["seconds"], 1000),
        _short(row["images_per_second"]["median"]),
        "1" if row["backend"] == "reference" else _with_quartiles(published, digits=2) if published else "-",
        f"{row['gemm_fraction']['median']:.0%}",
        _short(row["extra_bytes"] / 1e6) if "extra_bytes" in row else "-",
    )


def _layer_table(rows: list[dict[str, Any]], counts: dict[str, dict[str, int]]) -> list[str]:
    """Format the times of layers alone: for each backend, one line per layer."""
    lines = []
    for backend in dict.fromkeys(row["backend"] for row in rows):
        mine = [row for row in rows if row["backend"] == backend]
        operations = list(dict.fromkeys(row["operation"] for row in mine))
        lines += ["", f"layers alone, {backend}: forward MMAC per image; ms, share of all layers' ms, GEMM"]
        lines.append(f"{'layer':12}{'MMAC':>8}" + "".join(f"{name:>20}" for name in operations))
        total = {name: sum(_milliseconds(row) for row in mine if row["operation"] == name) for name in operations}
        for layer in dict.fromkeys(row["layer"] for row in mine):
            line = f"{layer:12}{_short(counts[layer]['forward'] / 1e6):>8}"
            for row in (row for row in mine if row["layer"] == layer):
                time = _milliseconds(row)
                words = (
                    "not run"
                    if not time
                    else (
                        f"{_short(time):>8} {time / total[row['operation']]:5.0%} {row['gemm_fraction']['median']:5.0%}"
                    )
                )
                line += f"{words:>20}"
            lines.append(line)
    return lines


def _milliseconds(row: dict[str, Any]) -> float:
    return 0 if "missing" in row else 1000 * row["seconds"]["median"]


def _with_quartiles(spread: dict[str, float], unit: float = 1, digits: int = 3) -> str:
    median, low, high = (_short(unit * spread[name], digits) for name in ("median", "low", "high"))
    return f"{median} ({low}-{high})"


def _short(number: float, digits: int = 3) -> str:
    """Format as an integer from 100, with 3 significant digits from 1, else with `digits` significant digits."""
    return f"{number:.0f}" if number >= 99.95 else f"{number:#.3g}" if number >= 1 else f"{number:.{digits}g}"
