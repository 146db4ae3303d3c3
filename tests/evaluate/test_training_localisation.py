"""Grid localisation during training."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from safetensors.torch import load_file

import timm_coda  # noqa: F401
from helpers import ROOT
from helpers.processes import Program, start_together
from timm_coda import data
from timm_coda.evaluate.localisation import arrange, choose_grids
from timm_coda.evaluate.training import TrainingLocalisation
from timm_coda.hub.card import make_card


@pytest.fixture(scope="module")
def digits():
    """The shipped model with enough test images for a few grids."""
    model = timm.create_model("coda_net_xs.digits", pretrained=True).eval()
    _, transform = data.create_transforms(timm.data.resolve_model_data_config(model))
    test = data.load_data("digits").test
    return model, data.ImageDataset(replace(test, indices=test.indices[:70], labels=test.labels[:70]), transform)


def test_it_is_grid_localisation_of_the_models_maps(digits):
    model, dataset = digits
    images = torch.stack([dataset[i][0] for i in range(len(dataset))])
    with torch.no_grad():
        logits = model(images).numpy()
    grids = choose_grids(dataset.split.labels, logits, 50, 3, confidence=0.5, seed=42)
    shares = []
    for grid in grids:
        picture = arrange(images[grid][None], 3)
        labels = torch.from_numpy(dataset.split.labels[grid])[None]
        maps = model.explain(picture, labels).contributions[0].double().clamp(min=0).numpy()
        height, width = images.shape[2:]
        for cell, positive in enumerate(maps):
            row, column = cell // 3 * height, cell % 3 * width
            shares.append(positive[row : row + height, column : column + width].sum() / positive.sum())
    found = TrainingLocalisation(dataset, 10, every=2).after_epoch(model, 4)
    assert len(grids) >= 4
    assert found == {"localisation": pytest.approx(np.median(shares), rel=1e-5)}


def test_when_and_where_it_is_recorded(digits):
    model, dataset = digits
    localisation = TrainingLocalisation(dataset, 10, every=2)
    assert localisation.after_epoch(model, 3) == {}
    before, training = torch.get_rng_state(), [module.training for module in model.modules()]
    first = localisation.after_epoch(model.train(), 2)["localisation"]
    assert model.training and localisation.after_epoch(model.eval(), 2)["localisation"] == first
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == training
    assert localisation.at_end(model) == {"localisation": {"3 x 3 grids": first, "uniform map": 1 / 9}}
    never = TrainingLocalisation(dataset, 10, every=0)
    assert never.after_epoch(model, 2) == never.at_end(model) == {}


def test_no_number_is_said_once_and_stops_nothing(digits, capsys):
    _, dataset = digits
    localisation = TrainingLocalisation(dataset, 10, every=1)
    fresh = timm.create_model("coda_net_xs", num_classes=10, rank=2)
    assert localisation.after_epoch(fresh, 1) == localisation.after_epoch(fresh, 2) == {"localisation": None}
    assert localisation.at_end(fresh) == {"localisation": None}
    note = "note: no localisation: the model is not yet confident of 9 classes, which a grid needs"
    assert capsys.readouterr().out.split("\n") == [note, ""]

    other = timm.create_model("test_resnet", num_classes=10)
    assert localisation.after_epoch(other, 3) == {"localisation": None}
    with torch.no_grad():
        next(fresh.parameters()).fill_(float("nan"))
    assert TrainingLocalisation(dataset, 3, every=1).after_epoch(fresh, 1) == {"localisation": None}
    assert localisation.after_epoch(fresh, 4) == {"localisation": None}
    out = capsys.readouterr().out
    assert "ResNet cannot explain itself" in out and "there are 3 classes, but grids need 4" in out


@pytest.fixture(scope="module")
def patches(tmp_path_factory) -> Path:
    """A dataset of four classes that is easy to learn: noise with one bright corner."""
    folder, rng = tmp_path_factory.mktemp("patches"), np.random.default_rng(0)
    for split, count in (("train", 96), ("test", 24)):
        for row in range(count):
            pixels = rng.integers(0, 80, (8, 8, 3), dtype=np.uint8)
            y, x = divmod(row % 4, 2)
            pixels[4 * y : 4 * y + 4, 4 * x : 4 * x + 4] += 150
            path = folder / split / "abcd"[row % 4] / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(pixels).save(path)
    (folder / "test/a/broken.png").write_bytes(b"no image")
    return folder


def start(patches: Path, folder: Path, *options, processes: int = 1) -> subprocess.Popen | Program:
    """Start train.py on the patches."""
    command = [str(ROOT / "train.py"), "--data", str(patches), "--output", str(folder), "--epochs", "3"]
    command += ["--model", "coda_net_xs", "--model-args", "rank=2", "logit_temperature=20", "--img-size", "8"]
    command += ["--batch-size", str(8 // processes), "--workers", "0", "--lr", "0.01", "--hflip", "0"]
    command += ["--crop-padding", "0", "--explain-every", "0", *map(str, options)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    if processes == 1:
        return Program(command, cwd=patches, environment=environment)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [sys.executable, *launch, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_in_a_run(patches, tmp_path):
    """It is measured every two epochs and at the end, and does not change the trained weights."""
    without = start(patches, tmp_path / "without")
    measured = start(patches, tmp_path / "with", "--eval-explanations", 2)
    for process in (without, measured):
        out, err = process.communicate(timeout=150)
        assert process.returncode == 0, err
    lines = [line for line in out.splitlines() if line.startswith("epoch")]
    assert [", localisation 0." in line for line in lines] == [False, True, False]
    check_summary(tmp_path / "with")
    assert "localisation" not in (tmp_path / "without/summary.json").read_text()
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("without", "with")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


MEASURE = """
import json, sys
from dataclasses import replace
import timm, timm_coda, torch
from timm_coda import data
from timm_coda.evaluate import TrainingLocalisation
from timm_coda.hub import join_launch

torch.set_num_threads(1)
processes = join_launch()
model = timm.create_model("coda_net_xs.digits", pretrained=True).eval()
calls = []
model.register_forward_hook(lambda *_: calls.append(1))
_, transform = data.create_transforms(timm.data.resolve_model_data_config(model))
test = data.load_data("digits").test
dataset = data.ImageDataset(replace(test, indices=test.indices[:120], labels=test.labels[:120]), transform)
localisation = TrainingLocalisation(dataset, 10, every=1, processes=processes)
found = localisation.after_epoch(model, 1)["localisation"]
count = len(calls)
if processes.rank == 1:  # as if this process alone had no memory left
    model.register_forward_pre_hook(lambda *_: [][0])
lost = [localisation.after_epoch(model, epoch)["localisation"] for epoch in (2, 3)] if processes.count > 1 else None
print(json.dumps([found, count, lost]))
"""


def test_processes_share_a_measurement(tmp_path):
    """The score is that of one process; a failure in one of them gives None in all, and training goes on."""
    (one,), two = (
        [p.communicate(timeout=60) for p in start_together(n, ["-c", MEASURE], cwd=tmp_path)] for n in (1, 2)
    )
    score, count, _ = json.loads(one[0])
    shared = [json.loads(out.splitlines()[-1]) for out, _ in two]
    assert [found for found, _, _ in shared] == [score] * 2 and 0 < score < 1
    assert sum(calls for _, calls, _ in shared) <= count + 1 and min(calls for _, calls, _ in shared) > 1
    assert [lost for _, _, lost in shared] == [[None, None]] * 2
    assert [out.count("note: no localisation: IndexError") for out, _ in two] == [1, 0]


@pytest.mark.slow
def test_in_two_processes(patches, tmp_path):
    run = start(patches, tmp_path / "two", "--eval-explanations", 2, processes=2)
    _, err = run.communicate(timeout=150)
    assert run.returncode == 0, err
    check_summary(tmp_path / "two")


def check_summary(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert ["localisation" in epoch for epoch in summary["history"]] == [False, True, False]
    assert 0.25 < summary["history"][1]["localisation"] < 1
    assert 0.25 < summary["localisation"]["2 x 2 grids"] < 1 and summary["localisation"]["uniform map"] == 0.25
    card = make_card(json.loads((folder / "config.json").read_text()), repo_id="me/net", summary=summary)
    assert f"| localisation, 2 x 2 grids | {summary['localisation']['2 x 2 grids']:.4g} |" in card.text
