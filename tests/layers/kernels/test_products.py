"""The products of the CPU backend: equal with either library, and measured once."""

import os
import platform
import re
import subprocess
import sys

import pytest
import torch

from helpers import relative_error
from timm_coda.layers.kernels import products


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_product_of_any_layout(dtype, onednn, monkeypatch):
    monkeypatch.setattr(products, "_prefers_onednn", lambda: onednn)
    torch.manual_seed(0)
    left, right = torch.randn(37, 19).to(dtype), torch.randn(19, 23).to(dtype)
    exact = left.double() @ right.double()
    bound = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for one in (left, left.t().contiguous().t()):
        for other in (right, right.t().contiguous().t()):
            assert relative_error(products.product(one, other), exact) < bound
            out = torch.empty(37, 23, dtype=dtype)
            assert products.product(one, other, out) is out
            assert relative_error(out, exact) < bound
            total = torch.ones(37, 23, dtype=torch.promote_types(dtype, torch.float32))
            assert products.add_product(total, one, other) is total
            assert relative_error(total, exact + 1) < bound


@pytest.mark.parametrize(
    ("vendor", "capability", "mkl", "expected"),
    [
        ("vendor_id\t: AuthenticAMD", "AVX512", True, True),
        ("vendor_id\t: AuthenticAMD", "AVX2", True, False),
        ("vendor_id\t: GenuineIntel", "AVX512", True, False),
        ("", "DEFAULT", False, True),  # ARM
    ],
)
def test_the_choice_follows_from_the_cpu(vendor, capability, mkl, expected, monkeypatch):
    monkeypatch.setattr(products, "_HAS_ONEDNN", True)
    monkeypatch.setattr(products, "_cpu_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert products._prefers_onednn.__wrapped__() is expected


def test_vendor():
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        assert re.fullmatch(r"vendor_id\s*: \w+", products._cpu_vendor())


def test_slowdown_is_relative_to_float32(monkeypatch):
    products.cpu_slowdown.cache_clear()
    monkeypatch.setattr(products, "_fastest", lambda *runs: [3.0, 2.0])
    assert products.cpu_slowdown(torch.bfloat16) == 1.5
    products.cpu_slowdown.cache_clear()


HIDDEN = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}  # of PyTorch, instructions for bfloat16

EMULATED = """
import torch, timm_coda
dau, bcos = timm_coda.DAUConv2d(2, 3, 3, rank=2), timm_coda.BcosConv2d(2, 3, 3)
x = torch.rand(1, 2, 5, 5)
dau(x), bcos(x)
print("float32 is silent", flush=True)
with torch.autocast("cpu", torch.bfloat16):
    {first}(x), {first}(x)
dau.bfloat16()(x.bfloat16()), bcos.bfloat16()(x.bfloat16())
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these variables are for x86")
@pytest.mark.parametrize("first", ["dau", "bcos"])
def test_emulated_bfloat16_warns_once(first):
    program = [sys.executable, "-c", EMULATED.format(first=first)]
    run = subprocess.run(program, env=os.environ | HIDDEN, stdout=-1, stderr=subprocess.STDOUT, text=True, check=True)
    before, after = run.stdout.split("float32 is silent")
    assert not before
    warning = r"UserWarning: this CPU has no bfloat16 instructions: products take (\d+) times as long as in float32"
    assert int(re.findall(warning, after)[0]) > 2 and after.count("UserWarning") == 1


def test_fastest_of_alternating_rounds():
    calls = []
    seconds = products._fastest(lambda: calls.append("a"), lambda: calls.append("b"), rounds=2, enough=9)
    assert "".join(calls) == "ababab" and all(0 <= each < 1 for each in seconds)
