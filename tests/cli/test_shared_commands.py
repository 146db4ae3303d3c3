"""`timm-coda evaluate` and `explain` in several processes: what one process writes, also after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.processes import Program, start_together
from timm_coda import data

MAIN = "import sys; from timm_coda.cli import main; sys.exit(main(sys.argv[1:]))"
EVALUATE = ["evaluate", "--model", "coda_net_xs.digits", "--data", "digits", "--grids", "3", "--grid-size", "2"]
EVALUATE += ["--images", "5", "--batch-size", "2", "--explainers", "inherent", "deeplift", "--metrics"]
EVALUATE += ["grid_localisation", "deletion", "idsds", "noise_sensitivity", "randomisation_cascading"]
EVALUATE += ["randomisation_independent", "sparseness", "contrastive_localisation", "--output"]
EXPORT = ["export", "any", "--format", "onnx", "--output", "x.pt"]  # refused before a model is loaded
# Not in the launcher's way: no question, no warning, a free port.
LAUNCH = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH += ["--main_process_port", "0"]


def run(count: int, words: list[str], cwd: Path, code: int = 0) -> list[str]:
    """Run a command in processes; return what each printed."""
    programs = start_together(count, ["-c", MAIN, *words], cwd=cwd)
    ends = [program.communicate(timeout=120) for program in programs]
    assert [program.returncode for program in programs] == [code] + [0] * (count - 1), ends
    return [out + err for out, err in ends]


def stop(programs: list[Program], number: signal.Signals) -> list[str]:
    for program in programs:
        program.send_signal(number)
    ends = [program.communicate(timeout=60) for program in programs]
    return [out + err for out, err in ends]


def wait(programs: list[Program], done) -> None:
    limit = time.monotonic() + 60
    while not done() and time.monotonic() < limit and all(program.poll() is None for program in programs):
        time.sleep(0.005)
    assert done(), [program.communicate() for program in programs if program.poll() is not None]


def arrays(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npy":
        return {"": np.load(path)}
    with np.load(path) as found:
        return {name: found[name] for name in found.files if name != "seconds"}


def assert_same_evaluation(one: Path, other: Path) -> None:
    """Assert that all numbers are equal to the last digit, and all files the same, times aside."""
    files = [{path.relative_to(root) for path in root.rglob("*") if path.is_file()} for root in (one, other)]
    assert files[0] == files[1]
    for file in files[0]:
        if file.suffix in (".npz", ".npy"):
            pair = [arrays(root / file) for root in (one, other)]
            assert pair[0].keys() == pair[1].keys(), file
            assert all(np.array_equal(pair[0][name], pair[1][name]) for name in pair[0]), file
    results = [json.loads((root / "results.json").read_text()) for root in (one, other)]
    for root, result in zip((one, other), results, strict=True):
        del result["seconds"], result["command"]
        result["metrics"] = metrics_of(root)
    assert results[0] == results[1]


def metrics_of(folder: Path) -> dict[str, Any]:
    """The metrics in a folder's results, times aside."""
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    for entry in (entry for metric in metrics.values() for entry in metric["explainers"].values()):
        entry.pop("seconds", None)
    return metrics


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    run(1, [*EVALUATE, "one"], folder)
    return folder / "one"


def test_launched_by_accelerate(evaluated, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, "--num_processes", "2", "-m", "timm_coda"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    few = ["--explainers", "inherent", "--metrics", "grid_localisation", "deletion"]
    done = subprocess.run(
        [*command, *EVALUATE, "two", *few], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("two/results.json: every number") == 1, "only one process prints"
    for metric, found in metrics_of(tmp_path / "two").items():
        assert found["explainers"] == {"inherent": metrics_of(evaluated)[metric]["explainers"]["inherent"]}


def test_a_killed_evaluation_goes_on_with_another_number(evaluated, tmp_path):
    killed = start_together(3, ["-c", MAIN, *EVALUATE, "killed"], cwd=tmp_path)
    parts = tmp_path / "killed/parts"
    wait(killed, lambda: len(list(parts.glob("[!.]*.*.npz"))) >= 2)
    stop(killed, signal.SIGKILL)
    done = {path: path.stat().st_mtime_ns for path in parts.glob("[!.]*.npz")}
    assert len(done) >= 3 and not (tmp_path / "killed/results.json").exists()
    run(2, [*EVALUATE, "killed"], tmp_path)
    assert all(path.stat().st_mtime_ns == time for path, time in done.items()), "finished work is not repeated"
    assert_same_evaluation(evaluated, tmp_path / "killed")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Eleven digits, one of them damaged, and a film if PyAV is installed."""
    folder = tmp_path_factory.mktemp("photos")
    digits = [data.load_data("digits").test.image(index) for index in range(11)]
    for index, digit in enumerate(digits):
        digit.save(folder / f"{index:02}.png")
    (folder / "04.png").write_text("no image")
    try:
        import av
    except ImportError:
        return folder
    with av.open(str(folder / "05-film.mp4"), "w") as container:
        stream = container.add_stream("h264", rate=25)
        stream.width = stream.height = 64
        for digit in digits[:3]:
            container.mux(stream.encode(av.VideoFrame.from_image(digit.resize((64, 64)))))
        container.mux(stream.encode(None))
    return folder


def contents(folder: Path) -> dict[str, bytes | list[bytes]]:
    """Files and what is in them, but of a film only its table (two runs of the encoder differ), and lines sorted."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    found: dict[str, bytes | list[bytes]] = {
        name: b"" if name.endswith(".mp4") else content for name, content in files.items()
    }
    return found | {".explain.jsonl": sorted(files[".explain.jsonl"].splitlines())}


def test_explain(photos, tmp_path):
    """A damaged image is skipped, and a film explained by the first process."""
    words = ["explain", str(photos), "--model", "coda_net_xs.digits", "--batch-size", "2", "--output"]
    (said,) = run(1, [*words, "one"], tmp_path, code=1)
    whole = contents(tmp_path / "one")
    assert {"table.csv", "contact_sheet.png", ".explain.jsonl", "00.npz"} <= whole.keys()
    first, second, third = run(3, [*words, "three"], tmp_path, code=1)
    assert contents(tmp_path / "three") == whole
    assert sorted(first.splitlines()) == sorted(said.replace(": one\n", ": three\n").splitlines())
    for rank, other in ((1, second), (2, third)):
        words_of_film = f"process {rank} of 3: videos are not shared: process 0 explains them\n"
        assert other == (words_of_film if (photos / "05-film.mp4").exists() else "")

    # Stopped by Ctrl-C, then killed: what each process did is known to the next ones, of another number.
    out, done = tmp_path / "stopped", {}
    for number, count in ((signal.SIGINT, 2), (signal.SIGKILL, 3)):
        programs = start_together(count, ["-c", MAIN, *words, "stopped"], cwd=tmp_path)
        before = len(list(out.glob("[!.]*.npz")))
        wait(programs, lambda before=before: len(list(out.glob("[!.]*.npz"))) >= before + 2)
        ends = stop(programs, number)
        if number == signal.SIGINT:
            assert "run the same command to go on" in ends[0] and "Traceback" not in "".join(ends)
            assert [program.returncode for program in programs] == [130] + [0] * (count - 1)
        kept = [line for file in out.glob(".explain*.jsonl") for line in file.read_text().splitlines()]
        entries = [json.loads(line) for line in kept if '"files"' in line and line.endswith("}")]
        done = {name: (out / name).stat().st_mtime_ns for entry in entries for name in entry["files"]}
    assert done
    run(2, [*words, "stopped"], tmp_path, code=1)
    assert all((out / name).stat().st_mtime_ns == time for name, time in done.items()), "not explained again"
    assert contents(out) == whole


def test_errors_are_printed_once_and_end_all(photos, tmp_path):
    explain = ["explain", str(photos / "00.png"), "--model", "coda_net_xs.digits", "--output"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    for words, message, others in (
        ([*explain, "mine"], "timm-coda: error: mine: not a new or empty folder", ""),
        ([*EVALUATE, "mine"], "timm-coda: error: mine exists, but is not an evaluation", ""),
        (["evaluate", "--nope"], "the following arguments are required", ""),
        (
            ["export", "any", "--format", "onnx", "--output", "x.pt"],
            "use --output x.onnx",
            "process 1 of 2: this command is not shared: process 0 does it\n",
        ),
    ):
        first, second = run(2, words, tmp_path, code=2)
        assert first.count(message) == 1, first
        assert second == others
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]


def test_a_launch_of_one_process_says_so(tmp_path):
    """Without --multi_gpu, Accelerate starts one process on a CPU, whatever --num_processes is."""
    command = "import os; os.environ |= {'ACCELERATE_MIXED_PRECISION': 'no', 'MASTER_PORT': '29500'}; " + MAIN
    program = Program(
        ["-c", command, *EXPORT],
        cwd=tmp_path,
        environment={**os.environ},
    )
    _, said = program.communicate(timeout=60)
    assert said.startswith("note: Accelerate started one process: for several, add --multi_gpu, also on a CPU\n")
