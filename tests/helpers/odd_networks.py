"""A program: train.py, its options, and a network or tracker that fails on purpose."""

import os
import runpy
import sys
from typing import Any

import torch
from accelerate.tracking import GeneralTracker, on_main_process, register_tracker_class
from timm.models import register_model

from helpers import ROOT
from timm_coda.models.coda_net import CodaNet, coda_net_xs


@register_model
def coda_net_with_gaps(pretrained: bool = False, **kwargs: Any) -> CodaNet:
    """coda_net_xs, with NaN logits in the training steps of GAPS, in the process of GAP_RANK only."""
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
    """A tracker whose server goes away after the second message."""

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
