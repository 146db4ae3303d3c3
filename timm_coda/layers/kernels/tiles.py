"""Tile sizes of the Triton kernels: a default for any GPU, timed ones for GPUs that were at hand, and the timing.

A tile changes the order of sums, and with it the last bits of a result. Therefore nothing is timed unless asked for:
with TIMM_CODA_TUNE=1 in the environment, each kernel is timed with every tile when it first meets a problem, and
`found` holds the fastest. `tiles.json`, beside this file, holds what was found on the GPUs that it names.
"""

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

__all__ = ["Problem", "Tile", "candidates", "choose", "found", "launch"]

T = TypeVar("T")


class Tile(NamedTuple):
    """What one program computes at a time."""

    positions: int
    columns: int
    """(unit, rank) pairs; a kernel takes at least one unit. Of `norm`: units."""
    inputs: int
    """Of the K numbers of a patch."""
    warps: int
    stages: int
    """Steps whose operands are in shared memory at once."""


class Problem(NamedTuple):
    """What a tile is chosen for: a kernel, its sizes, and the bytes of a number in its products."""

    kernel: str
    units: int
    rank: int
    inputs: int
    itemsize: int


# The usual one comes first. By the compiler's reports for compute capabilities 8.0, 8.9 and 9.0, those of 2 bytes spill
# no register to memory and compile to wgmma on the last; those of 4 bytes spill at most 12 bytes a thread.
_TILES = {
    (2, "contract"): [(128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (64, 64, 64, 4, 3)],
    (2, "code"): [(128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (64, 64, 64, 4, 3)],
    (2, "data"): [(128, 64, 64, 8, 3), (64, 64, 64, 4, 3)],
    (2, "weight"): [(64, 128, 128, 8, 3), (64, 128, 64, 8, 3), (64, 64, 64, 8, 3), (32, 64, 64, 4, 2)],
    (4, "contract"): [(128, 128, 32, 8, 3), (64, 128, 32, 4, 3), (64, 64, 32, 4, 3)],
    (4, "code"): [(32, 64, 32, 8, 3)],
    (4, "data"): [(64, 64, 32, 8, 3), (32, 64, 64, 8, 3)],
    (4, "weight"): [(32, 128, 64, 8, 3), (32, 64, 64, 8, 3)],
    (4, "norm"): [(64, 64, 0, 8, 2), (64, 32, 0, 8, 2)],
}
# Only the registers and the shared memory of compute capability 9.0 suffice for these.
_LARGE_TILES = {
    (2, "code"): [(128, 256, 64, 8, 3)],
    (2, "data"): [(128, 64, 128, 8, 3), (128, 128, 128, 8, 3)],
    (2, "weight"): [(64, 256, 128, 8, 3)],
}
# A unit of rank 128 or 256 is a tile by itself.
_TILES_OF_HIGH_RANK = {
    (2, "contract"): [(64, 128, 64, 8, 3), (32, 128, 64, 8, 3)],
    (2, "code"): [(32, 128, 64, 8, 3)],
    (2, "data"): [(32, 128, 64, 8, 2)],
    (2, "weight"): [(32, 128, 64, 8, 2), (16, 128, 64, 8, 2)],
    (4, "contract"): [(64, 128, 32, 8, 3), (32, 128, 32, 8, 3)],
    (4, "code"): [(16, 128, 32, 8, 3)],
    (4, "data"): [(32, 128, 32, 8, 2)],
    (4, "weight"): [(32, 128, 32, 8, 2)],
    (4, "norm"): [(32, 32, 0, 8, 1)],
}

found: dict[Problem, Tile] = {}
"""The fastest tiles, as timed in this process."""


def candidates(problem: Problem, capability: tuple[int, int]) -> list[Tile]:
    """Return the tiles that a GPU of a compute capability can use, the usual one first."""
    at = problem.itemsize, problem.kernel
    if problem.rank > 64:
        return [Tile(*sizes) for sizes in _TILES_OF_HIGH_RANK[at]]
    large = capability[0] == 9 and at in _LARGE_TILES
    tiles = [Tile(*sizes) for sizes in _TILES[at] + (_LARGE_TILES[at] if large else [])]
    return [tile for tile in tiles if _shared_memory(problem, tile) <= _most_shared_memory(capability)]


def _shared_memory(problem: Problem, tile: Tile) -> int:
    """Return an upper bound of the bytes of shared memory that a tile needs: for what each stage loads."""
    columns = max(tile.columns, problem.rank)
    if problem.kernel == "norm":
        numbers = max(problem.rank, 16) * (tile.positions + tile.columns) * tile.stages
    elif problem.kernel == "data":
        numbers = columns * (tile.positions + tile.inputs * tile.stages)
    elif problem.kernel == "weight":
        units = columns // problem.rank
        codes = 4 * tile.positions * (problem.rank + units) * tile.stages  # z and alpha, float32
        return codes + problem.itemsize * tile.positions * (tile.inputs * tile.stages + columns)
    else:
        numbers = tile.inputs * (tile.positions + columns) * tile.stages
    return problem.itemsize * numbers


def _most_shared_memory(capability: tuple[int, int]) -> int:
    """Return the bytes of shared memory that a program may have (CUDA C++ Programming Guide, compute capabilities)."""
    kilobytes = {(7, 0): 96, (7, 5): 64, (8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
    return 1024 * kilobytes.get(capability, 99)


def choose(problem: Problem, device: torch.device) -> Tile:
    """Return the tile for a problem: as found in this process, as found before on such a GPU, or the default."""
    capability = _capability(device)
    return found.get(problem) or _known(capability).get(problem) or candidates(problem, capability)[0]


def launch(problem: Problem, device: torch.device, run: Callable[[Tile], T]) -> T:
    """Run a kernel with the tile for a problem; with TIMM_CODA_TUNE=1, time all tiles first if it is a new one."""
    if os.environ.get("TIMM_CODA_TUNE") == "1" and device.type == "cuda" and problem not in found:
        from triton.testing import do_bench

        tiles = candidates(problem, _capability(device))
        times: list[Any] = [
            do_bench(lambda tile=tile: run(tile), warmup=2, rep=8, return_mode="median") for tile in tiles
        ]
        found[problem] = tiles[times.index(min(times))]
    return run(choose(problem, device))


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)  # the interpreter's


@cache
def _known(capability: tuple[int, int]) -> dict[Problem, Tile]:
    file = Path(__file__).with_name("tiles.json")
    if not file.exists():
        return {}
    rows = json.loads(file.read_text()).get(".".join(map(str, capability)), [])
    return {Problem(*problem): Tile(*tile) for problem, tile in rows}
