"""Every code block of the README and of the packages' guides runs as printed, in a copy of the repository."""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image

from helpers import ROOT
from helpers.hub_server import HubServer
from helpers.processes import Program
from helpers.train_cases import finish, start, wait_for_state
from timm_coda.data import ImageDataset, collate, create_transforms, load_data

README = ROOT / "README.md"
GUIDES = [README, *sorted((ROOT / "timm_coda").glob("*/README.md"))]
OFFLINE = {"HF_HUB_OFFLINE": "1"}
# Commands that these tests do not run: the installation, and CI's own commands.
NOT_RUN = ("pip install -e '.[", "ruff check", "python -m pytest")


def blocks(guide: Path, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)


def commands(guide: Path) -> list[str]:
    lines = [line for block in blocks(guide, "bash") for line in block.splitlines()]
    return [line for line in lines if not line.startswith(NOT_RUN)]


def run(command: list[str], folder: Path, variables: dict[str, str]) -> str:
    """Run a command as a new process; what it printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PYTHONPATH": str(folder), "PATH": path} | variables
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stdout[-3000:] + done.stderr[-3000:])
    return done.stdout


def run_line(line: str, folder: Path) -> None:
    """Run a line of a shell block: in a shell, or as a fork of a process that has imported everything, see Program."""
    words = shlex.split(line)
    if words[0] == "timm-coda":
        words = ["-c", "import sys; from timm_coda.cli import main; sys.exit(main())", *words[1:]]
    elif words[:2] == ["python", "train.py"]:
        words = [str(folder / "train.py"), *words[2:]]
    else:
        run(["bash", "-c", line], folder, OFFLINE)
        return
    program = Program(words, cwd=folder, environment={**os.environ})
    out, err = program.communicate(timeout=300)
    assert program.returncode == 0, (line, out[-3000:] + err[-3000:])


def serve(command: str, folder: Path) -> None:
    """Start a web page, and stop it as Ctrl-C does once it says where it is."""
    environment = os.environ | {"PYTHONPATH": str(folder)} | OFFLINE
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
    # Two epochs instead of all: the whole run has a test under the slow marker.
    recipe = folder / "hub_configs/coda_net_xs.digits/recipe.yaml"
    words, changed = re.subn(r"(?m)^epochs: \d+$", "epochs: 2", recipe.read_text())
    assert changed == 1
    recipe.write_text(words)
    assert commands(README) == ["python train.py"]
    (folder / "home").write_text("a file: nothing can be written below it")
    home = {"HOME": str(folder / "home"), "HF_HOME": str(folder / "home/hf"), "MPLCONFIGDIR": str(folder / "runs/mpl")}
    (folder / "runs/output.txt").parent.mkdir()
    (folder / "runs/output.txt").write_text(run(["python", "train.py"], folder, OFFLINE | home))
    return folder


def test_first_command(clone):
    lines = (clone / "runs/output.txt").read_text().splitlines()
    assert len(lines) < 12, "one line per epoch, because the output is not a terminal"
    assert lines[-2:] == [
        "import timm, timm_coda",
        'model = timm.create_model("local-dir:runs/coda_net_xs.digits", pretrained=True).eval()',
    ]
    folder = clone / "runs/coda_net_xs.digits"
    summary = json.loads((folder / "summary.json").read_text())
    with Image.open(folder / "explanation.png") as figure:
        assert min(figure.size) > 200
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    test = load_data(["digits"]).test
    _, transform = create_transforms(timm.data.resolve_model_data_config(model))
    batch = collate([ImageDataset(test, transform)[index] for index in range(450)])
    with torch.no_grad():
        right = (model(batch.images).argmax(1) == batch.labels).float().mean().item()
    assert abs(summary["accuracy"] - right) < 1e-6 and right > 0.8
    assert model.pretrained_cfg["label_names"] == list("0123456789")


def test_two_runs_at_once_use_two_folders(clone, tmp_path):
    short = ["--epochs", 1, "--explain-images", 1, "--model-args", "rank=1"]
    runs = [start(*short, cwd=tmp_path)]
    wait_for_state(runs[0], tmp_path / "runs/coda_net_xs.digits", 0)
    runs.append(start(*short, cwd=tmp_path))
    for run, name in zip(runs, ("coda_net_xs.digits", "coda_net_xs.digits-2"), strict=True):
        assert f'"local-dir:runs/{name}"' in finish(run).splitlines()[-1]
        assert (tmp_path / "runs" / name / "summary.json").exists()


@pytest.mark.slow
def test_the_default_run_is_as_good_as_the_readme_says(tmp_path):
    finish(start(cwd=tmp_path))
    assert json.loads((tmp_path / "runs/coda_net_xs.digits/summary.json").read_text())["accuracy"] >= 0.98


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.parent.name)
def test_every_block_runs(guide, clone, tmp_path):
    """Commands first, in their order, then the Python blocks, as one program."""
    code = "\n".join(blocks(guide, "python"))
    if "hf-hub:me" in guide.read_text():
        with HubServer() as server:  # instead of the Hugging Face Hub
            variables = server.environment(tmp_path, token="hf_me")
            for line in commands(guide):
                run(["bash", "-c", line], clone, variables) if line.endswith("mit") else run_line(line, clone)
            run([sys.executable, "-W", "error", "-c", code], clone, variables)
        return
    for line in commands(guide) if guide != README else []:
        if line == "timm-coda demo":
            serve(line, clone)
        else:
            run_line(line, clone)
    code = f"import warnings; warnings.simplefilter('error')\n{code}"
    program = Program(["-c", code], cwd=clone, environment={**os.environ})
    out, err = program.communicate(timeout=300)
    assert program.returncode == 0, out[-3000:] + err[-3000:]


def test_a_front_page_that_is_read():
    assert len(README.read_text().splitlines()) <= 180
    for guide in GUIDES:
        text = guide.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)\)", text):
            assert (guide.parent / target).exists(), f"{guide.relative_to(ROOT)} links {target}, which is not there"
        if guide != README:
            assert text.split("\n\n")[1].startswith("```bash\n"), f"{guide.relative_to(ROOT)} opens with a command"


def test_the_long_description_links_nothing_that_packages_lack():
    """In a wheel and on a package index, pictures and guides of the repository would be dead links."""
    text = str(importlib.metadata.metadata("timm_coda").get_payload())  # as installed
    assert "[timm](https://github.com/huggingface/pytorch-image-models)" in text and "## Contributing" in text
    assert not re.findall(r"\]\((?!https?:|#)", text), "relative links"


def test_the_first_image_to_explain_is_in_a_clone():
    for guide in (README, ROOT / "timm_coda/explanation/README.md"):
        found = re.findall(r"timm-coda explain (\S+) --model", guide.read_text(encoding="utf-8"))
        assert found and (ROOT / found[0]).is_file(), f"{guide}: {found}"
