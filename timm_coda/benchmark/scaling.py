"""Measure how a model's time grows with batch size and image size.

Batch sizes go from the largest down to 1, image sizes from the smallest up. Each round runs every operation once on
each of them, in random order. Ratios are computed within each round; reported are their medians over rounds.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from ..errors import wrap_errors
from ..hub import environment
from ..layers import use_backend
from .macs import seconds_in_rounds
from .measurement import PUBLISHED, BenchmarkError, Problem, Setup, conditions, model_operation, spread

__all__ = ["measure_scaling"]


def cases(batch_size: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield pairs (images, pixels per side), none with more pixels in total than the first.

    The side is 1, 2 and 4 times `size`; for each, the batch is divided by 4 until it is 1.
    """
    for factor in (1, 2, 4):
        batch = batch_size // factor**2
        while batch > 1:
            yield batch, size * factor
            batch = max(batch // 4, 1)
        if batch == 1:
            yield 1, size * factor


def measure_scaling(setup: Setup) -> dict[str, Any]:
    """Time the setup's operations on smaller batches and larger images too; return a JSON-serialisable report.

    Each row has `seconds` per batch, and `relative`: the time per image and pixel, divided by that of the setup's own
    batch and image size. Both have `median`, the quartiles `low` and `high`, and `samples`, one per round.

    Args:
        setup: its batch size is the largest, its image size the smallest; one backend besides the published
            formulation (which is ignored), no layers, no compilation

    Raises:
        BenchmarkError: the setup has several backends, layers or compilation, or the model rejects an image size.
        ValueError: the model is unknown.
    """
    backends = [name for name in setup.backends if name != PUBLISHED]
    if len(backends) != 1 or setup.layers or setup.compile:
        raise BenchmarkError(
            f"backends={setup.backends}, layers={setup.layers}, compile={setup.compile}: scaling needs one backend "
            "other than the published formulation, without layers and compile"
        )
    runs = {}
    with conditions(setup), use_backend(backends[0]):
        for dtype in setup.dtypes:
            problem = Problem(setup, dtype)
            smallest = problem.images.shape[-1]
            for batch, size in cases(setup.batch_size, smallest):
                images = problem.random(batch, problem.images.shape[1], size, size)
                for name in setup.operations:
                    runs[dtype, name, batch, size] = model_operation(name, problem.model, images, problem.targets)
        with wrap_errors(f"{setup.model} on images larger than {smallest} pixels", BenchmarkError):
            samples = seconds_in_rounds(runs, setup.repeats, setup.seed, setup.device)
        machine = environment()
    rows = []
    for (dtype, name, batch, size), own in samples.items():
        reference = samples[dtype, name, setup.batch_size, smallest]
        work = batch * size**2 / (setup.batch_size * smallest**2)
        row = {"dtype": dtype, "operation": name, "batch_size": batch, "img_size": size, "seconds": spread(own)}
        row["relative"] = spread([a / b / work for a, b in zip(own, reference, strict=True)])
        rows.append(row)
    return {
        "setup": asdict(setup),
        "backend": backends[0],
        "classes": problem.model.num_classes,
        "targets": problem.targets,
        "environment": machine,
        "rows": rows,
    }
