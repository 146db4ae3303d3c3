"""What the authors' own implementations compute, for weights that a rule makes, so that no weights are stored.

A case is `NAME.json` (input shape, and the name and shape of each weight in the published checkpoint format) and
`NAME.npz` (logits and targets in full; of contribution maps and dynamic weights, see `measure`). README.md says more.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from helpers import relative_error

FOLDER = Path(__file__).parent
SAMPLES = 4096

# Cases of CoDA-Nets: our model, its arguments.
CODA_NETS = {
    "coda_s_sq_t1000": ("coda_net_s", {}),
    "coda_s_l2_t1000": ("coda_net_s", {"activation": "l2"}),
    "coda_s_sq_rank8": ("coda_net_xs", {}),
    "coda_l_in100_60px": ("coda_net_l", {}),
}


def cases() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def _facts(case: str) -> dict:
    return json.loads((FOLDER / f"{case}.json").read_text())


def _random(salt: str, name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(f"{salt}:{name}".encode()))


def state_dict(case: str) -> dict[str, Tensor]:
    """The case's weights, float32 (num_batches_tracked int64), named and shaped as in published checkpoints."""
    facts, weights = _facts(case), {}
    for name, shape in facts["state_dict"].items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.zeros(shape, dtype=torch.int64)
            continue
        value = _random(facts["salt"], name).standard_normal(tuple(shape))
        if name.endswith("running_var"):
            value = 0.5 + np.abs(value)
        elif name.endswith("running_mean"):
            value *= 0.1
        elif len(shape) <= 1:
            value = 1 + 0.1 * value if name.endswith("weight") else 0.1 * value
        else:
            shift = facts["shift"]
            value += shift
            value /= np.sqrt((1 + shift) * np.prod(shape[1:]))
        weights[name] = torch.from_numpy(np.asarray(value, np.float32))
    return weights


def inputs(case: str) -> Tensor:
    """RGB images in [0, 1], (N, 3, H, W) float32; the networks see cat(rgb, 1 - rgb)."""
    facts = _facts(case)
    images = _random(facts["salt"], f"input:{case}").random(tuple(facts["input_shape"]))
    return torch.from_numpy(images.astype(np.float32))


def targets(case: str) -> Tensor:
    """The classes that are explained, the same of each image, (N, T)."""
    with np.load(FOLDER / f"{case}.npz") as data:
        return torch.from_numpy(data["targets"]).expand(_facts(case)["input_shape"][0], -1)


def logits(case: str) -> Tensor:
    """(N, classes) float64."""
    with np.load(FOLDER / f"{case}.npz") as data:
        return torch.from_numpy(data["logits"])


def measure(case: str, values: Tensor) -> dict[str, Tensor]:
    """What is stored of an array (..., H, W): numbers at `SAMPLES` random positions; sum and norm of each map."""
    flat = values.detach().double().flatten()
    count = min(SAMPLES, flat.numel())
    positions = _random(case, "positions").choice(flat.numel(), count, replace=False)
    maps = values.detach().double().flatten(-2)
    return {"samples": flat[torch.from_numpy(positions)], "sums": maps.sum(-1), "norms": maps.norm(dim=-1)}


def error(case: str, name: str, values: Tensor) -> float:
    """The largest relative error of samples, sums and norms of `values` against the authors'.

    Args:
        case: as in `cases()`
        name: 'contributions', (N, T, H, W), or 'weights', W(x) of the first image and target, (1, 1, 6, H, W)
        values: what our model computed
    """
    with np.load(FOLDER / f"{case}.npz") as data:
        expected = {key: torch.from_numpy(data[f"{name}_{key}"]) for key in ("samples", "sums", "norms")}
    return max(relative_error(value, expected[key]) for key, value in measure(case, values).items())
