"""Tests of runs that survive or end cleanly: signals, gradients that are not finite, a failing tracker."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.train_cases import QUIET, SMALL, assert_same_run, finish, signal_group, start, wait_for_state
from timm_coda.training import states

ODD = ["--model", "coda_net_with_gaps", "--report-to", "unplugged"]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_scheduler_stops_a_run(colours, tmp_path, processes):
    """SIGTERM to all processes, including workers: the run saves, exits with 0, and resumes as if never stopped."""
    options = ["--data", colours, *SMALL, *QUIET, "--epochs", 6, "--workers", 1]
    run = start(*options, "--output", "run", cwd=tmp_path, processes=processes)
    wait_for_state(run, tmp_path / "run", 1)
    signal_group(run, signal.SIGTERM)
    out, err = run.communicate(timeout=60)
    assert "stopped and saved; resume with: python train.py --resume run" in out.splitlines(), (out, err)
    assert run.returncode == 0 or processes > 1, err  # with several processes, the launcher reports the signal
    whole = start(*options, "--output", "whole", cwd=tmp_path, processes=processes)
    out = finish(start("--resume", "run", cwd=tmp_path, processes=processes))
    assert "resuming run after update" in out
    finish(whole)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_some_gradients_are_no_numbers_and_the_tracker_goes_away(colours, tmp_path):
    options = ["--data", colours, *SMALL, *QUIET, *ODD, "--epochs", 3, "--output", "run", "--log-every", 3]
    options += ["--mixed-precision", "bf16", "--grad-accum", 2]
    gaps = {"GAPS": "2 7 8 13"}  # steps; they belong to updates 1, 4 and 7 of 15 (an epoch has 9 steps, 5 updates)
    out = finish(start(*options, cwd=tmp_path, script="tests/helpers/odd_networks.py", environment=gaps))
    assert [line for line in out.splitlines() if "skipped update" in line] == [
        f"skipped update {update}: its gradient is not finite" for update in (1, 4, 7)
    ]
    assert out.count("the tracker unplugged failed, training continues without it: the server is gone") == 1
    assert "3 updates were skipped" in out
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["skipped_updates"] == 3 and summary["accuracy"] > 0.5
    assert [update for update, _ in summary["curve"]] == [3, 5, 6, 9, 10, 12, 15]
    optimizer = torch.load(states.find_states(tmp_path / "run/checkpoints")[-1] / "optimizer.bin")
    assert {int(state["step"]) for state in optimizer["state"].values()} == {12}


def test_no_gradient_is_a_number_any_more(colours, tmp_path):
    """The run stops after ten skipped updates in a row; the weights before them are saved and can be resumed."""
    options = ["--data", colours, *SMALL, *QUIET, *ODD, "--epochs", 3, "--output", "run", "--save-every", 1]
    gaps = {"GAPS": " ".join(map(str, range(12, 99)))}
    run = start(*options, cwd=tmp_path, script="tests/helpers/odd_networks.py", environment=gaps)
    out = finish(run, code=1)
    assert "the gradient was not finite 10 times in a row at update 21 (epoch 3): try a lower --lr" in out
    assert "Traceback" not in out
    state = states.find_states(tmp_path / "run/checkpoints")[-1]
    progress = json.loads((state / "record.json").read_text())["progress"]
    assert progress["update"] == 20 and progress["skipped_in_a_row"] == 9
    assert all(weight.isfinite().all() for weight in load_file(state / "model.safetensors").values())
    run = start("--resume", "run", cwd=tmp_path, script="tests/helpers/odd_networks.py", environment={"GAPS": ""})
    assert "9 updates were skipped" in finish(run)


@pytest.mark.slow
def test_one_process_has_a_gradient_that_is_no_number(colours, tmp_path):
    """The other process also skips the update: otherwise they would deadlock or have different weights."""
    options = ["--data", colours, *SMALL, *QUIET, "--model", "coda_net_with_gaps", "--epochs", 2, "--output", "run"]
    gaps = {"GAPS": "3", "GAP_RANK": "1"}
    out = finish(start(*options, cwd=tmp_path, script="tests/helpers/odd_networks.py", processes=2, environment=gaps))
    assert "skipped update 3: its gradient is not finite" in out
    assert json.loads((tmp_path / "run/summary.json").read_text())["skipped_updates"] == 1
    assert Path(tmp_path / "run/model.safetensors").exists()
