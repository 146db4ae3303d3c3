"""What the Triton kernels compile to for a GPU that need not be here: registers, spills, shared memory, instructions.

usage: python -m helpers.compiled_kernels [CAPABILITY=9.0] [RANKS=32,64] [BYTES=2] [--json]    (in tests/)
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from timm_coda.layers.kernels import dau_triton, tiles

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
KERNELS = ("contract", "code", "data", "weight", "norm")
# The arguments of each kernel in the dtype of its products; others are float32.
LOW = {
    "contract": {"p_ptr", "a_ptr", "y_ptr"},
    "code": {"p_ptr", "a_ptr"},
    "data": {"a_ptr", "base_ptr", "out_ptr"},
    "weight": {"right_ptr"},
    "norm": set(),
}


def compiled(problem: tiles.Problem, tile: tiles.Tile, capability: tuple[int, int]) -> dict[str, int]:
    """Compile a kernel with a tile, bfloat16 or float32; return numbers of the compiler's report."""
    kernel = getattr(dau_triton, f"_{problem.kernel}_kernel")
    values = {
        "RANK": problem.rank,
        "ACTIVATION": "squash",
        "PRECISION": "tf32" if problem.itemsize == 2 or problem.kernel == "norm" else "ieee",
        "BLOCK_N": tile.positions,
        "COLUMNS": tile.columns,
        "BLOCK_D": tile.columns,
        "BLOCK_K": max(problem.rank, 16) if problem.kernel == "norm" else tile.inputs,
    }
    names = kernel.arg_names
    low = "*bf16" if problem.itemsize == 2 else "*fp32"
    constants = {(names.index(name),): value for name, value in values.items() if name in names}
    types = {
        name: "constexpr"
        if (i,) in constants
        else "i32"
        if name.isupper()
        else low
        if name in LOW[problem.kernel]
        else "*fp32"
        for i, name in enumerate(names)
    }
    # Triton sees at a call which pointers and sizes are multiples of 16; wgmma and wide loads depend on it.
    whole = {"D": problem.units, "K": problem.inputs, "SPLIT": 64}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name.endswith("_ptr") or (name in whole and whole[name] % 16 == 0)
    }
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    source = ASTSource(kernel, types, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(built.asm["ptx"])
        file.flush()
        name = "sm_{}{}".format(*capability) + ("a" if capability[0] >= 9 else "")
        command = [PTXAS, "-v", f"--gpu-name={name}", file.name, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {
        "registers": r"Used (\d+) registers",
        "spilled": r"(\d+) bytes spill stores",
    }
    numbers = {name: int(re.search(pattern, report)[1]) for name, pattern in found.items()}
    numbers |= {"shared": built.metadata.shared}
    return numbers | {"wgmma": built.asm["ptx"].count("wgmma.mma_async"), "mma": built.asm["ptx"].count("mma.sync")}


def problems(kernel: str, rank: int, itemsize: int) -> tiles.Problem:
    """Return a problem of ordinary size."""
    inputs = (rank // 2 + 2) * rank if kernel == "norm" else 576
    return tiles.Problem(kernel, 64, rank, inputs, 4 if kernel == "norm" else itemsize)


def rows(capability: tuple[int, int], ranks: list[int], itemsize: int) -> Iterator[dict]:
    """Compile every kernel with every tile that a GPU can use."""
    for kernel in KERNELS:
        for rank in ranks:
            problem = problems(kernel, rank, itemsize)
            for tile in tiles.candidates(problem, capability):
                about = {"kernel": kernel, "rank": rank, "tile": "x".join(map(str, tile))}
                about |= {"most_shared": tiles._shared_memory(problem, tile)}
                yield about | compiled(problem, tile, capability)


def main(capability: str = "9.0", ranks: str = "32,64", itemsize: str = "2", form: str = "table") -> None:
    found = rows(tuple(map(int, capability.split("."))), [int(rank) for rank in ranks.split(",")], int(itemsize))
    if form == "--json":
        print(json.dumps(list(found)))
        return
    print("kernel     rank  tile               registers  spilled  shared KB  wgmma  mma")
    for row in found:
        print(
            "{kernel:9} {rank:5}  {tile:18} {registers:9} {spilled:8} {0:10.0f} {wgmma:6} {mma:4}".format(
                row["shared"] / 1024, **row
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
