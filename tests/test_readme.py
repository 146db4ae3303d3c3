"""Every code block of the README runs as printed, in a copy of the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.hub_server import HubServer

BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def commands() -> list[str]:
    return [line for kind, code in BLOCKS if kind == "bash" for line in code.splitlines()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a clone holds, without the tests' own leftovers."""
    folder = tmp_path_factory.mktemp("readme") / "clone"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", "*.egg-info", ".venv"))
    return folder


def run(command: list[str], folder: Path, **variables: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder)} | (variables or {"HF_HUB_OFFLINE": "1"})
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_commands_are_known():
    assert [command.split(" --")[0] for command in commands()] == [
        "pip install -e '.[viz]'",
        "python train.py",
        "pip install -e '.[test]'",
        "python -m pytest",
        "timm-coda explain explanation.png",
        "timm-coda explain photos/ clip.mp4",
        "timm-coda explain photo.jpg",
        "timm-coda demo",
        "timm-coda demo",
        "timm-coda evaluate",
        "python train.py",
        "accelerate launch",
        "python train.py",
        "python train.py",
        "python train.py",
        "python path/to/timm/train.py path/to/images",
        "hf auth login",
        "timm-coda push runs/coda_net_xs.digits me/digits",
        "timm-coda push runs/coda_net_xs.digits me/digits",
        "timm-coda export local-dir:runs/coda_net_xs.digits",
    ]
    assert "explain-every" in run([sys.executable, "train.py", "--help"], ROOT)


def test_first_command_then_push_then_every_python_block(clone, tmp_path):
    said = run([sys.executable, "train.py"], clone)
    output = clone / "runs/coda_net_xs.digits"
    assert "accuracy" in said
    assert json.loads((output / "summary.json").read_text())["accuracy"] >= 0.97
    assert (output / "explanation.png").read_bytes().startswith(b"\x89PNG")
    code = "\n".join(code for kind, code in BLOCKS if kind == "python")
    with HubServer() as server:  # in place of the Hub
        variables = server.environment(tmp_path / "home", token="hf_me")
        for line in commands():
            if line.startswith("timm-coda push"):
                said = run([sys.executable, "-m", "timm_coda", *line.split()[1:]], clone, **variables)
                assert "model.safetensors" in said
        assert len(server.repos["me/digits"].branches["main"]) == 2
        run([sys.executable, "-W", "error", "-c", code], clone, **variables)
    (export,) = [line.split()[1:] for line in commands() if line.startswith("timm-coda export")]
    assert "contributions" in run([sys.executable, "-m", "timm_coda", *export], clone)
    assert (clone / "explanation.png").read_bytes().startswith(b"\x89PNG")
    explain = next(line.split()[1:] for line in commands() if line.startswith("timm-coda explain"))
    assert "1 of 1 explained" in run([sys.executable, "-m", "timm_coda", *explain], clone)
