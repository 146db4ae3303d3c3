"""Run as a script: train.py with a network (NaN logits) and a tracker that fail on purpose."""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import GeneralTracker, on_main_process, register_tracker_class
from timm.models import register_model

from timm_coda.models.coda_net import CodaNet, coda_net_xs

ROOT = Path(__file__).parents[2]


@register_model
def coda_net_with_gaps(pretrained: bool = False, **kwargs: Any) -> CodaNet:
    """Return coda_net_xs with NaN logits in the training steps listed in GAPS, only in the process GAP_RANK."""
    model = coda_net_xs(pretrained, **kwargs)
    gaps = [int(step) for step in os.environ["GAPS"].split()]
    steps = 0

    def spoil(module: Any, images: Any, logits: torch.Tensor) -> torch.Tensor | None:
        nonlocal steps
        if not module.training:
            return None
        steps += 1
        here = os.environ.get("RANK", "0") == os.environ.get("GAP_RANK", "0")
        return logits * float("nan") if here and steps in gaps else None

    model.register_forward_hook(spoil)
    return model


class Unplugged(GeneralTracker):
    """A tracker that fails after the second message, as if its server were unreachable."""

    name = "unplugged"
    requires_logging_directory = False

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self.messages = 0

    @property
    def tracker(self) -> "Unplugged":
        return self

    def store_init_configuration(self, values: dict) -> None: ...

    @on_main_process
    def log(self, values: dict, step: int | None = None) -> None:
        self.messages += 1
        if self.messages > 2:
            raise ConnectionError("the server is gone")


if __name__ == "__main__":
    register_tracker_class(Unplugged)
    sys.argv[0] = str(ROOT / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
