"""Every code block of the README and of the packages' guides runs as printed, in a copy of the repository."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from helpers import ROOT
from helpers.hub_server import HubServer
from timm_coda.data import load_data

README = ROOT / "README.md"
GUIDES = [README, *sorted((ROOT / "timm_coda").glob("*/README.md"))]
# Commands that these tests do not run: the installation, and CI's own commands.
NOT_RUN = ("pip install -e '.[", "ruff check", "python -m pytest")


def blocks(guide: Path, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)


def commands(guide: Path) -> list[str]:
    lines = [line for block in blocks(guide, "bash") for line in block.splitlines()]
    return [line for line in lines if not line.startswith(NOT_RUN)]


def run(command: list[str], folder: Path, variables: dict[str, str]) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PYTHONPATH": str(folder), "PATH": path} | variables
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stdout[-3000:] + done.stderr[-3000:])
    return done.stdout


def serve(command: str, folder: Path) -> None:
    """Start a web page, and stop it as Ctrl-C does once it says where it is."""
    environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-m", "timm_coda", *command.split()[1:]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    server = subprocess.Popen(arguments, cwd=folder, env=environment, **pipes)
    assert server.stdout is not None
    assert server.stdout.readline().startswith("The page is at http://127.0.0.1:"), server.communicate()
    server.send_signal(signal.SIGINT)
    server.communicate(timeout=60)
    assert server.returncode == 0


def write_examples(folder: Path) -> None:
    """The files of users that the guides name: photos, a video, images in class folders, parquet files."""
    av = pytest.importorskip("av", reason="needs the video extra: pip install 'timm_coda[video]'")
    digits = load_data(["digits"])
    (folder / "photos").mkdir()
    for name, index in (("one", 0), ("two", 1)):
        digits.test.image(index).save(folder / "photos" / f"{name}.png")
    with av.open(str(folder / "clip.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=4)
        stream.width = stream.height = 32
        for index in range(4):
            frame = av.VideoFrame.from_image(digits.test.image(index).resize((32, 32)))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    for part, split, count in (("train", digits.train, 64), ("test", digits.test, 32)):
        for index in range(count):
            kind = "straight" if split.labels[index] in (1, 4, 7) else "round"
            (folder / "path/to/images" / part / kind).mkdir(parents=True, exist_ok=True)
            split.image(index).save(folder / "path/to/images" / part / kind / f"{index}.png")
        (folder / "path/to/parquet").mkdir(parents=True, exist_ok=True)
        table = pq.read_table(ROOT / f"timm_coda/data/digits/{part}.parquet").slice(0, count)
        pq.write_table(table, folder / f"path/to/parquet/{part}.parquet", row_group_size=16)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """What a clone of the repository holds, and a user's files; the README's first command has run in it."""
    folder = tmp_path_factory.mktemp("guides") / "clone"
    left = shutil.ignore_patterns(".git", "runs", "__pycache__", "*.egg-info", ".venv", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=left)
    write_examples(folder)
    (first,) = commands(README)
    assert first == "python train.py"
    assert "accuracy" in run(["bash", "-c", first], folder, {"HF_HUB_OFFLINE": "1"})
    return folder


def test_first_command(clone):
    output = clone / "runs/coda_net_xs.digits"
    assert json.loads((output / "summary.json").read_text())["accuracy"] >= 0.97
    assert (output / "explanation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.parent.name)
def test_every_block_runs(guide, clone, tmp_path):
    """Commands first, in their order, then the Python blocks, as one program."""
    with HubServer() as server:  # instead of the Hugging Face Hub
        variables = server.environment(tmp_path, token="hf_me") if "hf-hub:me" in guide.read_text() else {}
        variables = variables or {"HF_HUB_OFFLINE": "1"}
        for line in commands(guide) if guide != README else []:
            if line.startswith("timm-coda demo") and "--export" not in line:
                serve(line, clone)
            else:
                run(["bash", "-c", line], clone, variables)
        code = "\n".join(blocks(guide, "python"))
        run([sys.executable, "-W", "error", "-c", code], clone, variables)


def test_a_front_page_that_is_read():
    assert len(README.read_text().splitlines()) <= 180
    for guide in GUIDES:
        text = guide.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)\)", text):
            assert (guide.parent / target).exists(), f"{guide.relative_to(ROOT)} links {target}, which is not there"
        if guide != README:
            assert text.split("\n\n")[1].startswith("```bash\n"), f"{guide.relative_to(ROOT)} opens with a command"
