"""The `timm-coda` command line: output, help and errors."""

import importlib.metadata
import json
import shlex
import subprocess
import sys

import pytest

import timm_coda
from timm_coda import benchmark, cli
from timm_coda.benchmark import macs, measurement

SMALL = ["benchmark", "coda_net_xs", "--model-args", "rank=2", "--img-size", "8", "--batch-size", "2", "--repeats", "2"]


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "timm_coda", *words], capture_output=True, text=True)


def test_benchmark(tmp_path):
    output = tmp_path / "report.json"
    words = [*SMALL, "--operations", "forward", "train", "--no-memory", "--layers", "--output", str(output)]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    table, _, last = done.stdout.rstrip().rpartition("\n")
    assert last == f"all numbers are in {output}"
    assert max(map(len, table.splitlines())) <= 80
    lines = [line.split() for line in done.stdout.splitlines()]
    for backend in ("cpu", "reference"):
        for operation in ("forward", "train"):
            assert [backend, operation] in [words[:2] for words in lines]
    assert ["stages.2.2"] in [words[:1] for words in lines]
    report = json.loads(output.read_text())
    assert report["command"] == shlex.join(["timm-coda", *words])
    assert report["setup"]["operations"] == ["forward", "train"]
    assert len(report["rows"]) == 4
    assert list(tmp_path.iterdir()) == [output], "no temporary files are left"


def test_table_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(measurement, "SAMPLE_SECONDS", 1e-3)
    monkeypatch.setattr(macs, "SAMPLE_SECONDS", 1e-3)
    monkeypatch.setattr(measurement, "free_memory", lambda device: 1e6)
    monkeypatch.setattr(sys, "executable", "false")  # the process that measures memory fails
    assert cli.main([*SMALL, "--operations", "explain"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert max(map(len, table)) <= 80
    assert any(line.startswith("reference explain     not run: needs about") for line in table)
    assert any(line.endswith("extra memory unknown: failed") for line in table)


def test_comparison_with_an_ordinary_model(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(macs, "SAMPLE_SECONDS", 1e-3)
    output = tmp_path / "report.json"
    words = ["benchmark", "bcos_resnet18", "--against", "resnet18", "--batch-size", "2", "--img-size", "32"]
    assert cli.main([*words, "--repeats", "2", "--num-classes", "5", "--no-memory", "--output", str(output)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert max(map(len, table[:-1])) <= 80
    assert table[0] == "bcos_resnet18 against resnet18, 5 classes"
    rows = json.loads(output.read_text())["rows"]
    assert [row["operation"] for row in rows] == ["forward", "train", "explain", "explain-all"]
    assert [line.split()[0] for line in table[6:10]] == [row["operation"] for row in rows]
    assert cli.main([*words, "--layers"]) == 2
    assert "comparing with resnet18 needs one dtype" in capsys.readouterr().err


def test_version_and_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for words, said in (
        (["--version"], f"timm_coda {timm_coda.__version__}"),
        (["--help"], "benchmark"),
        (["benchmark", "--help"], "timm-coda benchmark coda_net_s"),
        (["explain", "--help"], "timm-coda explain photo.jpg --model coda_net_xs.digits"),
        (["convert", "--help"], "timm-coda convert cifar.pt --model coda_net_s.mpi_t1000_cifar10 "),
        (["evaluate", "--help"], "occlusion_N"),
        (["push", "--help"], "timm-coda push runs/coda_net_xs.digits me/digits"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 0
        out = capsys.readouterr().out
        assert said in out
        assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["coda_net_t"], "no model 'coda_net_t': did you mean coda_net_"),
        (["resnet18"], "ResNet has no dynamic alignment layer"),
        (["coda_net_s.mnist"], "no pretrained configuration of coda_net_s.mnist"),
        (["coda_net_xs", "--batch-size", "0"], "batch_size=0: must be at least 1"),
        (["coda_net_xs", "--img-size", "2"], "resize it to at least 4x4"),
        (["coda_net_xs", "--model-args", "rank"], "'rank': expected NAME=VALUE"),
        (["coda_net_xs", "--device", "tpu"], "device='tpu': choose cpu or cuda"),
        (["coda_net_xs", "--backend", "gpu"], "unknown value 'gpu', choose from"),
        (["coda_net_xs", "--output", "/no/such/folder/x.json"], "/no/such/folder/x.json: cannot be written"),
    ],
)
def test_errors(words, message, capsys):
    assert cli.main(["benchmark", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("timm-coda: error: ")
    assert error.count("\n") == 1


def test_commands_that_read_no_datasets_work_without_the_library(monkeypatch, capsys):
    parts = ("timm_coda.data", "timm_coda.evaluate")
    for name in [name for name in sys.modules if name.startswith(parts)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("", "explain", "demo", "benchmark", "convert", "push", "export"):
        with pytest.raises(SystemExit) as stop:
            cli.main([*name.split(), "--help"])
        assert stop.value.code == 0, name
    assert cli.main(["benchmark", "coda_net_t"]) == 2
    assert "no model 'coda_net_t'" in capsys.readouterr().err
    for words in (["--help"], ["--model", "coda_net_xs.digits", "--data", "digits", "--output", "none"]):
        assert cli.main(["evaluate", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("timm-coda: error: ") and error.endswith("pip install datasets\n")
        assert error.count("\n") == 1


def test_no_command_and_unknown_options():
    for words in ([], ["fly"], ["benchmark"], ["benchmark", "coda_net_xs", "--operations", "fly"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 2


def test_interrupt_is_quiet(monkeypatch, capsys):
    def interrupted(setup):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "measure", interrupted)
    assert cli.main(SMALL) == 130
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_installed_command():
    commands = importlib.metadata.entry_points(group="console_scripts", name="timm-coda")
    assert [command.load() for command in commands] == [cli.main]
