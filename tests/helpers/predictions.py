"""What a GPU needs at least, by counting: seconds of each kernel of a CoDA-Net's layers, and memory of a training step.

usage: python -m helpers.predictions [coda_net_s] [BATCH=256] [PIXELS]    (in tests/)

The rates below are of an H200, as its maker and others give them; `first_run.py` measures those of the card at hand,
and prints what was measured beside what was predicted.
"""

import sys
from math import prod
from typing import NamedTuple

import timm
import torch

import timm_coda  # noqa: F401  # registers the models
from timm_coda.benchmark.macs import layer_calls

RATES = {"bfloat16": 790e12, "tf32": 395e12, "bytes": 4.3e12}


class Layer(NamedTuple):
    """Sizes of a layer: positions N, numbers of a patch K, units D, rank r, and numbers of its input."""

    name: str
    positions: int
    inputs: int
    units: int
    rank: int
    image: int
    first: bool


class Kernel(NamedTuple):
    """Operations (two per multiply-accumulate), their kind, and bytes read and written."""

    name: str
    operations: float
    kind: str
    traffic: float

    def seconds(self, rates: dict[str, float]) -> float:
        """Return the larger of the times for operations and traffic."""
        return max(self.operations / rates[self.kind], self.traffic / rates["bytes"])


def layers(model: torch.nn.Module, batch: int, size: int) -> list[Layer]:
    """Return the sizes of a CoDA-Net's layers."""
    found = []
    for number, call in enumerate(layer_calls(model, size)):
        down, _, bias = (tuple(weight.shape) for weight in call.layer.parameters())
        image = batch * prod(call.input_shape[1:])
        positions = batch * call.positions
        found.append(Layer(call.name, positions, prod(down[1:]), bias[0], down[0], image, number == 0))
    return found


def forward(layer: Layer) -> list[Kernel]:
    """Return the kernels of a forward pass in bfloat16."""
    _, n, k, d, r, image, _ = layer
    pairs = (r // 2 + 2) * r
    return [
        Kernel("patches", 0, "bfloat16", 2 * (3 * image + n * k)),  # padded, then copied
        Kernel("z and plain", 2 * n * k * (r + d), "bfloat16", 2 * n * k + 8 * n * (r + d)),
        Kernel("norm", 2 * n * pairs * d, "tf32", 4 * n * (r + d)),
        Kernel("contract", 2 * n * k * d * r, "bfloat16", 2 * n * k + n * (4 * r + 14 * d)),
    ]


def backward(layer: Layer) -> list[Kernel]:
    """Return the kernels of a backward pass in bfloat16."""
    _, n, k, d, r, image, first = layer
    large = 2 * n * k * d * r
    kernels = [
        Kernel("slopes", 0, "bfloat16", 18 * n * d),
        Kernel("patches", 0, "bfloat16", 2 * (3 * image + n * k)),
        Kernel("through norm", 2 * n * d * r * r, "bfloat16", n * (6 * d + 12 * r)),
        Kernel("code", large, "bfloat16", 2 * n * k + n * (4 * d + 8 * r)),
        Kernel("weight", large, "bfloat16", 2 * n * k + 4 * n * (d + r)),
        Kernel("weight of the norm", 2 * n * d * r * r, "bfloat16", n * (4 * d + 8 * r)),
        Kernel("small weights", 2 * n * k * (r + d), "bfloat16", 2 * n * k + 6 * n * (r + d)),
    ]
    if not first:
        kernels += [
            Kernel("base of data", 2 * n * k * (r + d), "bfloat16", 2 * n * k + 6 * n * (r + d)),
            Kernel("data", large, "bfloat16", 4 * n * k + 4 * n * (d + r)),
            Kernel("fold", 0, "bfloat16", 2 * (n * k + image)),
        ]
    return kernels


def training_memory(model: torch.nn.Module, batch: int, size: int) -> int:
    """Return the bytes of a training step in bfloat16, without weights and gradients.

    Saved of each layer: its input, z, num and s. Temporary in the backward pass of the largest: patches, the product's
    first summand and its result; alpha, beta and their neighbours. And the weights' copies in bfloat16.
    """
    sizes = layers(model, batch, size)
    saved = sum(2 * layer.image + layer.positions * (4 * layer.rank + 10 * layer.units) for layer in sizes)
    temporary = max(
        layer.positions * (6 * layer.inputs + 20 * layer.units + 12 * layer.rank) + 8 * layer.image for layer in sizes
    )
    return saved + temporary + 8 * sum(weight.numel() for weight in model.parameters())


def main(name: str = "coda_net_s", batch: str = "256", size: str = "") -> None:
    model = timm.create_model(name)
    pixels = int(size or model.pretrained_cfg["input_size"][-1])
    found = layers(model, int(batch), pixels)
    print(f"{name}, batch {batch}, {pixels} px, bfloat16; microseconds at {RATES}")
    totals = {}
    for layer in found:
        for direction, kernels in (("forward", forward(layer)), ("backward", backward(layer))):
            times = {kernel.name: 1e6 * kernel.seconds(RATES) for kernel in kernels}
            totals[direction] = totals.get(direction, 0) + sum(times.values())
            parts = ", ".join(f"{name} {time:.0f}" for name, time in times.items())
            print(f"{layer.name:12} {direction:8} {sum(times.values()):6.0f}: {parts}")
    products = sum(3 * 2 * layer.positions * layer.inputs * layer.units * layer.rank for layer in found)
    products -= sum(2 * layer.positions * layer.inputs * layer.units * layer.rank for layer in found if layer.first)
    step = sum(totals.values())
    print(f"forward {totals['forward'] / 1e3:.2f} ms, backward {totals['backward'] / 1e3:.2f} ms")
    print(f"large products alone {1e6 * products / RATES['bfloat16'] / 1e3:.2f} ms")
    print(f"images per second {int(batch) / step * 1e6:,.0f} without the optimiser")
    print(f"memory of a training step {training_memory(model, int(batch), pixels) / 2**30:.1f} GiB")


if __name__ == "__main__":
    main(*sys.argv[1:])
