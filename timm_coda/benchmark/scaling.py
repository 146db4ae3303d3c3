"""How a model's time grows with the batch and with the image.

Batches from the largest down to one image, images from the smallest up: a round takes every operation on each of them
once, in random order, and a ratio is formed within a round before its median over the rounds is taken.
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
    """(images, pixels a side): quarters of the batch down to one, twice the side, never more pixels than at first."""
    for factor in (1, 2, 4):
        batch = batch_size // factor**2
        while batch > 1:
            yield batch, size * factor
            batch = max(batch // 4, 1)
        if batch == 1:
            yield 1, size * factor


def measure_scaling(setup: Setup) -> dict[str, Any]:
    """Time the setup's operations on smaller batches and larger images than its own, and report it as JSON knows it.

    Of every row: `seconds` of a batch, and `relative`, the time an image and pixel in parts of that in the setup's own
    batch and image size, each with `median`, the quartiles `low` and `high`, and `samples`, one a round.

    Args:
        setup: the largest batch and the smallest image; one backend besides the published formulation, no layers or
            compilation

    Raises:
        BenchmarkError: a setup of which part is not for this, or an image size that the model does not take.
        ValueError: no such model.
    """
    backends = [name for name in setup.backends if name != PUBLISHED]
    if len(backends) != 1 or setup.layers or setup.compile:
        raise BenchmarkError(
            f"backends={setup.backends}, layers={setup.layers}, compile={setup.compile}: how time grows is measured of "
            "whole models, uncompiled, with one backend that is not the published formulation"
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
