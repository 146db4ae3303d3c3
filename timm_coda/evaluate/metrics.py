"""The metrics of `timm-coda evaluate` by name."""

from .base import EvaluationError, Metric
from .localisation import GridLocalisation
from .perturbation import IDSDS, Removal
from .sanity import ContrastiveLocalisation, NoiseSensitivity, Randomisation, Sparseness

__all__ = ["DEFAULT_METRICS", "METRICS", "make_metric"]

_FILLS = {"zeros": ("zeros", "zero in all encoded channels"), "mean": ("mean colour", "the image's mean colour")}


def _removals() -> list[Removal]:
    metrics = []
    for fill, (short, long) in _FILLS.items():
        for most_first in (False, True):
            order = "most" if most_first else "least"
            about = (
                f"Up to 25 % of the pixels become {long}, those with the {order} evidence for the true class first; "
                f"mean probability of the class over all steps, which should {'fall' if most_first else 'stay high'} "
                "(CoDA-Nets, CVPR 2021; 128 steps, of 2 pixels on images of 32 x 32 pixels)."
            )
            label = f"Removal, {order} first, {short}"
            metrics.append(Removal(f"removal_{order}_{fill}", label, about, most_first, fill, last=0.25, steps=128))
    return metrics


_32_STEPS = "in 32 steps; mean probability of the true class over all steps (Petsiuk et al. 2018; Hesse et al. 2024)."
_DELETION = f"All pixels become zero in all encoded channels, those with the most evidence first, {_32_STEPS}"
_INSERTION = f"All pixels are inserted into an image of zeros, those with the most evidence first, {_32_STEPS}"
_GIVEN: list[Metric] = [
    *_removals(),
    Removal("deletion", "Deletion", _DELETION, True, "zeros", last=1.0, steps=32),
    Removal("insertion", "Insertion", _INSERTION, True, "zeros", last=1.0, steps=32, insert=True),
    IDSDS(),
    NoiseSensitivity(),
    Randomisation(order="cascading"),
    Randomisation(order="independent"),
    Randomisation(order="cascading", similarity="ssim"),
    Randomisation(order="independent", similarity="ssim"),
    Sparseness(),
]
# In the order used by tables and figures.
METRICS = (
    *("grid_localisation", "grid_localisation_0.99", "contrastive_localisation"),
    *(metric.name for metric in _GIVEN),
)
# Those in the papers; the others together take as long again.
DEFAULT_METRICS = ("grid_localisation", "removal_least_zeros", "deletion", "insertion", "idsds")


def make_metric(name: str, *, grids: int = 500, grid_size: int = 3) -> Metric:
    """Create a metric by name.

    Args:
        name: one of METRICS
        grids: maximum number of grids, for metrics on grids
        grid_size: cells per side of a grid

    Raises:
        EvaluationError: the name is unknown.
    """
    on_grids: list[Metric] = [GridLocalisation(grids, grid_size, confidence) for confidence in (0.5, 0.99)]
    on_grids.append(ContrastiveLocalisation(grids=grids, size=grid_size))
    known = {metric.name: metric for metric in on_grids + _GIVEN}
    if name not in known:
        raise EvaluationError(f"unknown metric {name!r}: choose {', '.join(METRICS)}")
    return known[name]
