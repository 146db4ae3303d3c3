"""Compare time and memory of a model that explains itself with an ordinary timm model: a B-cos ResNet and a ResNet.

Both are measured side by side: each round runs every operation of both models once, in random order. Ratios are
computed within each round; reported are their medians over rounds. An explanation is compared with the forward pass of
the ordinary model.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import timm
import torch
from torch import Tensor
from tqdm import tqdm

from ..hub import create_model, environment
from .macs import seconds_in_rounds
from .measurement import DTYPES, BenchmarkError, Setup, conditions, model_operation, spread
from .memory import extra_memory, peak_of

__all__ = ["compare"]

_SIDES = ("", "against_")


class _Pair:
    """Both models and the images that both are run on."""

    def __init__(self, setup: Setup, against: str) -> None:
        config = timm.get_pretrained_cfg(setup.model) if timm.is_model(setup.model) else None
        classes = setup.num_classes or (config.num_classes if config else 1000)
        torch.manual_seed(setup.seed)
        layout = torch.channels_last if setup.channels_last else torch.contiguous_format
        where = {"device": setup.device, "dtype": DTYPES[setup.dtypes[0]], "memory_format": layout}
        models: list[Any] = [
            create_model(setup.model, num_classes=classes, model_args=setup.model_args).to(**where),
            create_model(against, num_classes=classes).to(**where),
        ]
        self.models: dict[str, Any] = dict(zip(_SIDES, models, strict=True))
        size = setup.img_size or models[0].pretrained_cfg["input_size"][-1]
        self.images: Tensor = torch.rand(setup.batch_size, models[0].in_chans, size, size).to(**where)
        self.targets = min(classes, 10)

    def operation(self, name: str, side: str, *, keep_gradients: bool = False) -> Callable[[], object]:
        if side and name.startswith("explain"):
            name = "forward"
        return model_operation(name, self.models[side], self.images, self.targets, keep_gradients=keep_gradients)


def compare(setup: Setup, against: str) -> dict[str, Any]:
    """Measure both models and return a JSON-serialisable report.

    Each row has `seconds` and `against_seconds` (seconds per batch), and `ratio`, the first divided by the second. Each
    of them has `median`, the quartiles `low` and `high`, and `samples`, one per round. `extra_bytes` and
    `against_extra_bytes` are as in `benchmark.measure`.

    Args:
        setup: the model to measure; one dtype, no layers, no compilation; its backends are ignored
        against: name of the ordinary model in timm's registry

    Raises:
        BenchmarkError: the setup has several dtypes, layers or compilation.
        ValueError: a model is unknown.
    """
    if len(setup.dtypes) != 1 or setup.layers or setup.compile:
        raise BenchmarkError(
            f"dtypes={setup.dtypes}, layers={setup.layers}, compile={setup.compile}: comparing with {against} needs "
            "one dtype, without layers and compile"
        )
    with conditions(setup):
        pair = _Pair(setup, against)
        runs = {(name, side): pair.operation(name, side) for name in setup.operations for side in _SIDES}
        samples = seconds_in_rounds(runs, setup.repeats, setup.seed, setup.device)
        rows = [_row(name, samples) for name in setup.operations]
        for row in tqdm(rows, "memory", disable=None, leave=False):
            if setup.memory:
                row |= _extra_memory(setup, against, pair, row["operation"])
        machine = environment()
    return {
        "setup": asdict(setup),
        "against": against,
        "image": list(pair.images.shape[1:]),
        "classes": pair.models[""].num_classes,
        "environment": machine,
        "rows": rows,
    }


def _row(name: str, samples: dict[tuple[str, str], list[float]]) -> dict[str, Any]:
    ours, theirs = (samples[name, side] for side in _SIDES)
    ratio = spread([a / b for a, b in zip(ours, theirs, strict=True)])
    return {"operation": name, "seconds": spread(ours), "against_seconds": spread(theirs), "ratio": ratio}


def _extra_memory(setup: Setup, against: str, pair: _Pair, operation: str) -> dict[str, Any]:
    found = {}
    for side in _SIDES:
        how = {"operation": operation, "side": side}
        order = {"setup": asdict(setup), "against": against, **how}
        memory = extra_memory(setup.device, functools.partial(_peak, pair, setup.device, **how), _peak_of_pair, **order)
        found |= {side + name: value for name, value in memory.items()}
    return found


def _peak_of_pair(setup: dict[str, Any], against: str, operation: str, side: str) -> int:
    return _peak(_Pair(Setup(**setup), against), setup["device"], operation, side)


def _peak(pair: _Pair, device: str, operation: str, side: str) -> int:
    return peak_of(pair.operation(operation, side, keep_gradients=True), pair.models[side], device)
