"""Tests of MAC counts against numbers computed by hand, and of benchmark reports; speed itself is not tested."""

import importlib
import json
import math
import os
import sys

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import timm_coda
from timm_coda.benchmark import benchmark_table, macs, measurement, memory
from timm_coda.benchmark.measurement import BenchmarkError, Macs, Setup, count_macs, measure
from timm_coda.layers import functional

SMALL = {
    "model": "coda_net_xs",
    "model_args": ("rank=2",),
    "img_size": 8,
    "batch_size": 2,
    "repeats": 3,
    "memory": False,
}


@pytest.fixture
def fast(monkeypatch):
    """Shorten samples from a tenth of a second to a millisecond."""
    monkeypatch.setattr(measurement, "SAMPLE_SECONDS", 1e-3)
    monkeypatch.setattr(macs, "SAMPLE_SECONDS", 1e-3)


def test_counts_of_a_small_net():
    model = timm_coda.CodaNet((1, 1), (4, 5), (1, 2), (2, 3, 4), num_classes=3, in_chans=1)
    counts = count_macs(model, (6, 5))
    assert counts == {
        # 30 positions, K = 2 * 9, 4 units of rank 2
        "stages.0.0": Macs(down=1080, up=4320, bias=2160, quadratic=480, per_forward=288),
        # 3 * 3 positions, K = 4 * 9, 5 units of rank 3
        "stages.1.0": Macs(down=972, up=4860, bias=1620, quadratic=405, per_forward=1620),
        # 3 * 3 positions, K = 5, 3 units of rank 4
        "head": Macs(down=180, up=540, bias=135, quadratic=432, per_forward=240),
    }
    total = sum(counts.values(), Macs())
    assert total == Macs(down=2232, up=9720, bias=3915, quadratic=1317, per_forward=2148)
    assert total.forward == 2232 + 9720 + 3915 + 1317 == 17184
    assert total.train == 3 * 17184
    assert total.explain() == 17184 + 9720 + 3915
    assert total.explain(targets=10) == 17184 + 10 * (9720 + 3915)
    assert total.published == 2232 + 9720 + 3915
    assert total.counts(targets=10)["explain-all"] == total.explain(10)


@pytest.mark.parametrize(
    ("name", "size", "down", "up", "quadratic", "published"),
    [
        ("coda_net_s", 32, 24_444_928, 861_405_184, 187_170_816, 900_931_584),  # the authors' own count: 901 M
        ("coda_net_l", 240, 769_228_800, 39_911_424_000, 13_107_200_000, 40_999_219_200),  # 41.0 G
    ],
)
def test_counts_of_the_published_networks(name, size, down, up, quadratic, published):
    total = sum(count_macs(timm.create_model(name, device="meta"), size).values(), Macs())
    assert (total.down, total.up, total.quadratic, total.published) == (down, up, quadratic, published)


def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("coda_net_xs", {}, (12, 9)),
        ("coda_net_xs", {"in_chans": 1, "rank": 3, "num_classes": 4}, (8, 8)),
        ("coda_net_s", {"activation": "l2", "rank": 2}, (8, 10)),
    ],
)
def test_torchs_counter_agrees(name, arguments, size):
    """Two operations for each multiply-accumulate of each image, forward and backward."""
    model = timm.create_model(name, **arguments)
    counts = count_macs(model, size)
    total = sum(counts.values(), Macs())
    images = torch.rand(2, 2 * model.in_chans, *size, requires_grad=True)
    with torch.no_grad():
        assert flops(lambda: model(images)) == 2 * 2 * total.forward
    assert flops(lambda: model(images).sum().backward()) == 2 * 2 * total.train
    with timm_coda.explanation_mode(model):
        assert flops(lambda: model(images)[:, 0].sum().backward()) == 2 * 2 * total.explain()
    # In training the images need no gradient.
    first = counts["stages.0.0"]
    saved = first.down + first.up + first.bias
    assert flops(lambda: model(images.detach()).sum().backward()) == 2 * 2 * (total.train - saved)


def test_torchs_counter_on_linear_layers():
    layer = timm_coda.DAULinear(5, 3, rank=2)
    # 4 rows: z = B p, A p, b^T p, z^T G z
    macs = 4 * (2 * 5 + 3 * 2 * 5 + 3 * 5 + 3 * 2 * 2)
    assert flops(lambda: layer(torch.rand(2, 2, 5))) == 2 * macs


def test_torchs_counter_knows_the_cuda_operators_before_they_are_first_used():
    pytest.importorskip("triton", reason="needs Triton, which comes with CUDA builds of PyTorch")
    operators = {f"dau_conv2d_cuda{part}" for part in ("", "_data", "_backward")}
    assert operators <= {packet.__name__ for packet in flop_registry}


def test_counting_leaves_the_model_as_it_was():
    model = timm.create_model("coda_net_xs", rank=2).bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_macs(model, 8)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def test_counts_of_linear_and_repeated_layers():
    class Twice(nn.Module):
        in_chans = 1

        def __init__(self):
            super().__init__()
            self.dau = timm_coda.DAULinear(4, 4, rank=3)

        def forward(self, x):
            return self.dau(self.dau(x))

    # 10 positions of 4 inputs, twice
    once = Macs(down=120, up=480, bias=160, quadratic=360, per_forward=144)
    assert count_macs(Twice(), (10, 4))["dau"] == once + once


def test_nothing_to_count():
    with pytest.raises(ValueError, match="Linear has no dynamic alignment layer"):
        count_macs(nn.Linear(2, 2), 8)


def test_report(fast):
    backend, state = functional._backend, torch.get_rng_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        report = measure(Setup(**SMALL, dtypes=("float32", "bfloat16"), threads=1, seed=3))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert json.loads(json.dumps(report, allow_nan=False))["setup"]["seed"] == 3
    assert torch.equal(torch.get_rng_state(), state)
    assert functional._backend == backend
    assert f"{torch.backends.cpu.get_cpu_capability()}, 1 thread" in report["environment"]["cpu"]
    assert report["cpu_slowdown"]["float32"] > 0 and "float32" not in report["emulated"]
    slow = report | {"cpu_slowdown": {"bfloat16": 136.6}, "emulated": ["bfloat16"]}
    line = "bfloat16 is emulated: this CPU takes 137 times as long as in float32"
    assert line in benchmark_table(slow).splitlines() and "emulated" not in benchmark_table(slow | {"emulated": []})
    assert report["image"] == [3, 8, 8]

    rows = {(row["dtype"], row["backend"], row["operation"]): row for row in report["rows"]}
    wanted = [(d, b, o) for d in ("float32", "bfloat16") for b in ("cpu", "reference") for o in measurement.OPERATIONS]
    assert list(rows) == wanted
    counts = sum(count_macs(timm.create_model("coda_net_xs", rank=2), 8).values(), Macs())
    gemm = report["gemm_macs_per_second"]
    for (dtype, _, operation), row in rows.items():
        assert row["macs"] == 2 * counts.counts(10)[operation]
        samples = row["seconds"]["samples"]
        assert len(samples) == 3
        assert min(samples) > 0
        assert row["seconds"]["median"] == sorted(samples)[1]
        assert row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["images_per_second"]["samples"] == [2 / s for s in samples]
        rates = [max(rates) for rates in zip(*(g["samples"] for g in gemm[dtype].values()), strict=True)]
        assert row["gemm_fraction"]["samples"] == [row["macs"] / s / r for s, r in zip(samples, rates, strict=True)]
        for other in ("float32", "bfloat16"):
            published = rows[other, "reference", operation]["seconds"]["samples"]
            ratios = [p / s for p, s in zip(published, samples, strict=True)]
            assert row["times_published"][other]["samples"] == ratios, "a ratio is formed within a round"


@pytest.mark.parametrize("options", [{"channels_last": True}, {"num_classes": 1}], ids=["channels_last", "one_class"])
def test_layers(fast, options):
    report = measure(Setup(**SMALL, layers=True, backends=("torch",), **options))
    layers = [name for name in report["macs_an_image"] if name != "model"]
    assert layers == [f"stages.{s}.{i}" for s, n in enumerate((2, 3, 3)) for i in range(n)] + ["head"]
    assert {(row["layer"], row["operation"]) for row in report["layers"]} == {
        (layer, operation) for layer in layers for operation in ("forward", "train", "explain")
    }
    assert all(row["macs"] == 2 * report["macs_an_image"][row["layer"]][row["operation"]] for row in report["layers"])


def test_published_formulation_that_does_not_fit_says_so(fast, monkeypatch):
    monkeypatch.setattr(measurement, "free_memory", lambda device: 1e6)
    rows = measure(Setup(**SMALL, operations=("forward", "train")))["rows"]
    assert ["missing" in row for row in rows] == [False, False, True, True]
    assert rows[2]["missing"].endswith("GB, 0.0 GB are free")
    assert all(row["times_published"] == {} for row in rows[:2])
    with pytest.raises(BenchmarkError, match="nothing could be measured: needs about"):
        measure(Setup(**SMALL, backends=("reference",)))


def test_backend_that_fails_says_so(fast, monkeypatch):
    def full(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nand a long story")

    monkeypatch.setitem(functional.BACKENDS, "triton", full)
    rows = measure(Setup(**SMALL, operations=("forward",), backends=("triton", "cpu")))["rows"]
    assert rows[0]["missing"] == "DefaultCPUAllocator: can't allocate memory"
    assert "missing" not in rows[1]


@pytest.mark.skipif(not memory._CLEAR_REFS.exists(), reason="only Linux reports the peak of a call")
def test_peak_is_of_the_call_alone(tmp_path, monkeypatch):
    """In a process of its own, as always: here, what other tests freed could be allocated again without growth."""
    module = """
import torch
from timm_coda.benchmark import memory

def allocate(megabytes):
    return torch.ones(megabytes, 2**20, dtype=torch.uint8)

def measure():
    allocate(256)  # a peak before
    kept = allocate(64)
    return memory.peak_growth(lambda: allocate(128), "cpu")
"""
    (tmp_path / "allocations.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    measure = importlib.import_module("allocations").measure
    result = memory.extra_memory("cpu", peak=None, measure=measure)
    assert abs(result["extra_bytes"] / 2**20 - 128) < 8


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak includes the startup memory of libraries")
def test_memory_of_a_training_step(fast):
    how = {"repeats": 2, "operations": ("train",), "backends": ("reference",)}
    (row,) = measure(Setup(model="coda_net_xs", batch_size=4, img_size=32, **how))["rows"]
    weights = 4 * 4 * sum(count_macs(timm.create_model("coda_net_xs"), 32).values(), Macs()).bias
    assert 2 * weights < row["extra_bytes"] < 3 * weights, "raw and rescaled weights are retained for backward"


def test_memory_that_cannot_be_measured_says_so(fast, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    (row,) = measure(Setup(**{**SMALL, "memory": True}, operations=("forward",), backends=("cpu",)))["rows"]
    assert row["memory_missing"] == "failed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"repeats": 1}, "repeats=1: must be at least 2"),
        ({"img_size": -3}, "img_size=-3"),
        ({"threads": 0}, "threads=0"),
        ({"device": "mps"}, "device='mps': choose cpu or cuda"),
        ({"dtypes": ("int8",)}, "unknown value 'int8', choose from float32"),
        ({"dtypes": ()}, "dtypes: unknown value None"),
        ({"backends": ("gpu",)}, "unknown value 'gpu', choose from reference, torch"),
        ({"operations": ("fly",)}, "unknown value 'fly', choose from forward, train"),
        ({"model": "local-dir:somewhere"}, "give num_classes"),
    ],
)
def test_bad_setups(options, message):
    with pytest.raises(BenchmarkError, match=message):
        Setup(**{"model": "coda_net_xs", **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda():
    with pytest.raises(BenchmarkError, match="finds no CUDA device; choose cpu"):
        Setup(model="coda_net_xs", device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_report_on_cuda(fast):
    rows = measure(Setup(**{**SMALL, "memory": True}, device="cuda", dtypes=("float32", "bfloat16")))["rows"]
    assert all(row["extra_bytes"] > 0 for row in rows)


@pytest.mark.parametrize("name", ["coda_net_xs", "bcos_resnet18", "resnet18"])
def test_share_of_products_is_that_of_the_operations_counted(name, monkeypatch):
    """By PyTorch's own count for networks of convolutions, by ours for CoDA-Nets; a training step is three passes."""
    monkeypatch.setattr(macs.GemmRate, "best", property(lambda self: [1e9]))
    monkeypatch.setattr(macs.GemmRate, "sample", lambda self: None)
    model = timm.create_model(name, num_classes=3).eval()
    size = (model.in_chans if name == "coda_net_xs" else 3, 32, 24)
    share = macs.share_of_products(model, size, 7.0, dtype=torch.float32, device="cpu")
    if name == "coda_net_xs":
        right = sum(count_macs(model, (32, 24)).values(), Macs()).train
    else:
        right = 3 * flops(lambda: model(torch.rand(1, *size))) // 2
    assert math.isclose(share, 7 * right / 1e9)
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}


def test_share_of_products_of_a_real_rate():
    model = timm.create_model("coda_net_xs", rank=2)
    rates = [macs.share_of_products(model, (3, 8, 8), speed, dtype=torch.float32, device="cpu") for speed in (1, 1e3)]
    assert 0 < rates[0] < rates[1]
