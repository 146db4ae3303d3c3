"""Grid localisation of the inherent maps: time and memory, compared with other ways to compute these maps.

`python -m pytest -m slow -rP -n0 tests/evaluate/test_speed.py` prints the measurements.
"""

import os
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch

from helpers import relative_error
from timm_coda.evaluate import Subject
from timm_coda.evaluate.localisation import GridLocalisation
from timm_coda.layers.functional import use_backend

GRID, TARGETS = 3, 9


def make_subject():
    """5,000 noise images of 32 x 32 pixels with logits as if they were recognised: enough for 500 grids."""
    torch.manual_seed(0)
    model = timm.create_model("coda_net_xs.cifar10").eval()
    images, labels = torch.rand(5000, 3, 32, 32), np.arange(5000) % 10
    logits = np.where(np.arange(10) == labels[:, None], 5.0, -5.0)
    return Subject(model, lambda numbers: images[list(numbers)], labels, logits, count=10)


@pytest.mark.slow
def test_against_a_forward_and_backward_for_each_target():
    subject = make_subject()
    model, metric = subject.model, GridLocalisation(grids=2, size=GRID)
    images, targets = metric.make(subject, metric.choose(subject)[:1])

    def together():
        return model.explain(images, targets).contributions

    def one_by_one(backend: str):
        with use_backend(backend):
            return torch.cat([model.explain(images, targets[:, t]).contributions for t in range(TARGETS)])[None]

    def gradients():  # for comparison: of the logit itself, without frozen dynamics
        x = model.encoding(images).requires_grad_()
        with use_backend("torch"):
            return [torch.autograd.grad(model(x)[0, goal], x)[0] for goal in targets[0].tolist()]

    ways = {
        "explain(), 9 targets at once": together,
        "published formulation, 9 x": lambda: one_by_one("reference"),
        "plain convolutions, 9 x": lambda: one_by_one("torch"),
        "plain convolutions, true gradient, 9 x": gradients,
    }
    assert relative_error(together(), one_by_one("reference")) < 1e-4
    seconds = {name: [] for name in ways}
    for _ in range(3):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    ours = seconds["explain(), 9 targets at once"]
    # Printed, not asserted: times depend on the machine and its load.
    for name, times in seconds.items():
        ratio = statistics.median(t / o for t, o in zip(times, ours, strict=True))
        print(f"{name:40}{statistics.median(times):8.2f} s of CPU a grid, {ratio:5.1f} x")


_MEMORY = """
import resource
import test_speed as here
from timm_coda.evaluate.explainers import make_explainer
subject, explainer = here.make_subject(), make_explainer("inherent")
for grids in (14, 210):
    assert here.GridLocalisation(grids, here.GRID)(subject, explainer).values.shape == (grids, here.TARGETS)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_grids():
    """Measured in a separate process, so that nothing else affects the peak."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", _MEMORY], env=environment, check=True, capture_output=True, text=True)
    few, many = map(float, run.stdout.split())
    print(f"14 grids: peak memory {few:.0f} MiB; 210 grids: {many:.0f} MiB")
    assert many - few < 50, "maps of 196 more grids would be 62 MiB, their weights 370"
