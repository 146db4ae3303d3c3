"""Tests of reports on how time grows with batch and image size; speed itself is not tested."""

import json

import pytest
import torch

from timm_coda import cli
from timm_coda.benchmark import macs, measurement, scaling
from timm_coda.benchmark.measurement import BenchmarkError, Setup
from timm_coda.layers import functional

SMALL = {"model": "coda_net_xs", "model_args": ("rank=2",), "img_size": 8, "repeats": 3}


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(macs, "SAMPLE_SECONDS", 1e-3)


def test_cases():
    assert [*scaling.cases(64, 32)] == [
        *((64, 32), (16, 32), (4, 32), (1, 32)),
        *((16, 64), (4, 64), (1, 64)),
        *((4, 128), (1, 128)),
    ]
    assert [*scaling.cases(6, 8)] == [(6, 8), (1, 8), (1, 16)]
    assert [*scaling.cases(3, 8)] == [(3, 8), (1, 8)]


def test_report():
    before = torch.get_num_threads(), torch.random.get_rng_state(), functional._backend
    setup = Setup(**SMALL, batch_size=4, operations=("forward", "explain"), dtypes=("float32", "bfloat16"), threads=1)
    report = scaling.measure_scaling(setup)
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert functional._backend == before[2]
    assert (report["backend"], report["classes"]) == ("cpu", 10)
    assert "1 thread" in report["environment"]["cpu"]
    rows = {(r["dtype"], r["operation"], r["batch_size"], r["img_size"]): r for r in report["rows"]}
    cases = [(4, 8), (1, 8), (1, 16)]
    assert set(rows) == {(d, o, *case) for d in setup.dtypes for o in setup.operations for case in cases}
    for (dtype, operation, batch, size), row in rows.items():
        own, first = (r["seconds"]["samples"] for r in (row, rows[dtype, operation, 4, 8]))
        assert len(own) == 3
        work = batch * size**2 / (4 * 8**2)
        expected = [a / b / work for a, b in zip(own, first, strict=True)]
        assert row["relative"]["samples"] == pytest.approx(expected), "ratios are per round"


def test_what_is_run(monkeypatch):
    seen = []
    monkeypatch.setattr(scaling, "model_operation", lambda name, model, x, targets: lambda: seen.append((name, x)))
    scaling.measure_scaling(Setup(**SMALL, batch_size=4, operations=("train",), dtypes=("bfloat16",)))
    assert {(name, x.dtype, tuple(x.shape)) for name, x in seen} == {
        ("train", torch.bfloat16, shape) for shape in ((4, 3, 8, 8), (1, 3, 8, 8), (1, 3, 16, 16))
    }


def test_how_many_targets(monkeypatch):
    seen = []
    monkeypatch.setattr(measurement, "explain", lambda model, images, top: seen.append((len(images), top)))
    setup = Setup(**SMALL, batch_size=2, operations=("explain", "explain-all"))
    assert len(scaling.measure_scaling(setup)["rows"]) == 4
    assert set(seen) == {(2, 1), (1, 1), (2, 10), (1, 10)}


@pytest.mark.parametrize("options", [{"backends": ("reference",)}, {"backends": ("cpu", "torch")}, {"layers": True}])
def test_what_it_is_not_for(options):
    with pytest.raises(BenchmarkError, match="needs one backend other than the published formulation"):
        scaling.measure_scaling(Setup(**SMALL, **options))


def test_images_that_a_model_does_not_take(monkeypatch):
    def fixed(name, model, images, targets):
        return lambda: torch.zeros(8, 8) + images[0, 0]

    monkeypatch.setattr(scaling, "model_operation", fixed)
    with pytest.raises(BenchmarkError, match="coda_net_xs on images larger than 8 pixels: The size of tensor a"):
        scaling.measure_scaling(Setup(**SMALL, batch_size=4))


def test_table(capsys, tmp_path):
    words = ["benchmark", "coda_net_xs", "--model-args", "rank=2", "--img-size", "8", "--batch-size", "4", "--scaling"]
    output = tmp_path / "report.json"
    assert cli.main([*words, "--repeats", "2", "--operations", "forward", "explain", "--output", str(output)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert max(map(len, table[:-1])) <= 80
    assert table[0] == "coda_net_xs rank=2, 10 classes, backend cpu"
    assert table[4:6] == ["", "forward, float32"]
    assert [line.split()[:2] for line in table[7:10]] == [["8", "4"], ["8", "1"], ["16", "1"]]
    assert table[7].split()[-1] == "1"
    assert len(json.loads(output.read_text())["rows"]) == 6
    with pytest.raises(SystemExit):
        cli.main([*words, "--against", "resnet18"])
    assert "not allowed with argument" in capsys.readouterr().err
