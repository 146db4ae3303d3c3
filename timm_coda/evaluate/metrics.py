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
                f"its mean probability on the way, which should {'fall' if most_first else 'stay'} (CoDA-Nets, CVPR "
                "2021; on images of 32 x 32 pixels every 2 pixels)."
            )
            label = f"Removal, {order} first, {short}"
            metrics.append(Removal(f"removal_{order}_{fill}", label, about, most_first, fill, last=0.25, steps=128))
    return metrics


_32_STEPS = "in 32 steps; the true class's mean probability on the way (Petsiuk et al. 2018; Hesse et al. 2024)."
_DELETION = f"All pixels become zero in all encoded channels, those with the most evidence first, {_32_STEPS}"
_INSERTION = f"All pixels come into an image of zeros, those with the most evidence first, {_32_STEPS}"
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
# In the order of tables and figures.
METRICS = (
    *("grid_localisation", "grid_localisation_0.99", "contrastive_localisation"),
    *(metric.name for metric in _GIVEN),
)
# What the papers show; the others take as long again.
DEFAULT_METRICS = ("grid_localisation", "removal_least_zeros", "deletion", "insertion", "idsds")


def make_metric(name: str, *, grids: int = 500, grid_size: int = 3) -> Metric:
    """A metric by its name.

    Args:
        name: one of METRICS
        grids: how many, at most, for metrics on grids
        grid_size: cells a side of a grid

    Raises:
        EvaluationError: an unknown name.
    """
    on_grids: list[Metric] = [GridLocalisation(grids, grid_size, confidence) for confidence in (0.5, 0.99)]
    on_grids.append(ContrastiveLocalisation(grids=grids, size=grid_size))
    known = {metric.name: metric for metric in on_grids + _GIVEN}
    if name not in known:
        raise EvaluationError(f"no metric {name!r}; there is {', '.join(METRICS)}")
    return known[name]
