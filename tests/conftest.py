"""Settings of all tests, and a dataset that several of them train on."""

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also in subprocesses: pytest-xdist keeps every core busy

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the CUDA kernels, on small problems, in Python
torch.set_num_threads(1)  # the problems here are tiny


@pytest.fixture(scope="session")
def browser():
    """Chromium, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install 'timm_coda[test]'")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> str:
    """A dataset of three classes that is easy to learn: noise that is red, green or blue."""
    from helpers import train_cases  # not above: it imports Triton, which looks at TRITON_INTERPRET only then

    folder = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for split, count in (("train", 72), ("test", 21)):
        for row in range(count):
            name = ("red", "green", "blue")[row % 3]
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            (folder / split / name / f"{row:03}.png").write_bytes(train_cases.image_file(rng, row % 3))
    return str(folder)


# The files that take longest, from the longest: they start first, so that no process is left with one at the end.
LONG = [f"test_{name}.py" for name in ("guides", "bcosify", "train", "demo", "runner", "bcos_v2_cnns", "processes")]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
