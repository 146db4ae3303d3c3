"""Helpers that run train.py in a separate process on a small dataset, and compare two runs."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers import ROOT
from helpers.processes import Program
from timm_coda.training import states

SMALL = ["--model", "coda_net_xs", "--model-args", "rank=2", "logit_temperature=20", "--img-size", "8"]
SMALL += ["--batch-size", "8", "--workers", "0", "--lr", "0.003", "--crop-padding", "1"]
QUIET = ["--explain-every", "0", "--explain-images", "2"]


def image_file(rng: np.random.Generator, label: int) -> bytes:
    pixels = rng.integers(0, 80, (8, 8, 3), dtype=np.uint8)
    pixels[:, :, label] += 150
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def start(
    *options,
    cwd: Path,
    script: str = "train.py",
    processes: int = 1,
    environment: dict[str, str] | None = None,
    fresh: bool = False,
    **more,
) -> subprocess.Popen | Program:
    """Start train.py in a session of its own: one process, or several launched by Accelerate.

    `fresh` starts a new interpreter, for variables that libraries read when they are imported; `more` is for Popen.
    """
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | (environment or {})
    command = [str(ROOT / script), *map(str, options)]
    if processes == 1 and not fresh and not more:
        return Program(command, cwd=cwd, environment=environment)
    if processes > 1:
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command = [*launch, "--main_process_port", "0", *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen([sys.executable, *command], cwd=cwd, env=environment, **pipes, **more)


def finish(run: subprocess.Popen | Program, code: int = 0) -> str:
    """Wait until a run ends, check its exit code, and return what it printed."""
    out, err = run.communicate(timeout=180)
    assert run.returncode == code, (run.returncode, out, err)
    return out + err


def signal_group(run: subprocess.Popen | Program, number: signal.Signals) -> None:
    """Send a signal to a run and its child processes, as a terminal or a scheduler does."""
    os.killpg(run.pid, number)


def kill(run: subprocess.Popen | Program) -> None:
    """Kill a run and all its child processes, including those in other process groups."""
    for process in (*psutil.Process(run.pid).children(recursive=True), run):
        process.kill()
    run.communicate()


def wait_for_state(run: subprocess.Popen | Program, folder: Path, update: int) -> None:
    """Wait until a checkpoint of this update or a later one exists."""
    limit = time.monotonic() + 60
    while time.monotonic() < limit and run.poll() is None:
        for state in states.find_states(folder / "checkpoints"):
            try:
                if json.loads((state / "record.json").read_text())["progress"]["update"] >= update:
                    return
            except FileNotFoundError:  # just deleted
                pass
        time.sleep(0.005)
    raise AssertionError(f"no checkpoint of update {update}: {run.communicate()}")


def assert_same_run(one: Path, other: Path) -> None:
    """Assert that curves, weights, optimiser states, averages and published models are equal bit for bit."""
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    assert summaries[0]["curve"] == summaries[1]["curve"]
    for epochs in zip(*(summary["history"] for summary in summaries), strict=True):
        first, second = ({k: v for k, v in epoch.items() if k != "images_per_second"} for epoch in epochs)
        assert first == second
    saved = [states.find_states(folder / "checkpoints") for folder in (one, other)]
    assert [state.name for state in saved[0]] == [state.name for state in saved[1]]
    for file in ("model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl"):
        paths = [state[-1] / file for state in saved]
        assert paths[0].exists() == paths[1].exists()
        if paths[0].exists():
            assert_equal(*(load_file(path) if path.suffix == ".safetensors" else torch.load(path) for path in paths))
    assert_equal(*(load_file(folder / "model.safetensors") for folder in (one, other)))


def assert_equal(one, other) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    else:
        assert one == other
