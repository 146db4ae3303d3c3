"""timm's own tests/test_models.py, unchanged, on the models of this package.

The file is in timm's source distribution and not in its wheel, so that pip downloads it once for each version of timm:
into a folder of the user's cache, or TIMM_SUITE_CACHE. TIMM_TESTS names a folder that has it already.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import timm
from filelock import FileLock

CACHE = Path(os.environ.get("TIMM_SUITE_CACHE") or Path.home() / ".cache/timm_suite")
MARKERS = ("base", "cfg", "cfg_nonstd", "features", "forward", "backward", "fxforward", "fxbackward", "torchscript")
TESTS = ("test_models.py", "conftest.py")  # the second since timm 1.0.24


def tests_folder() -> Path:
    """The folder of timm's tests, for the version of timm that is installed. Skips where it cannot be downloaded."""
    if given := os.environ.get("TIMM_TESTS"):
        return Path(given)
    folder = CACHE / f"timm-{timm.__version__}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / ".lock"):  # several test processes
        if not (folder / TESTS[0]).exists():
            _download(folder)
    return folder


def _download(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm"]
        done = subprocess.run([*pip, "-d", temporary, f"timm=={timm.__version__}"], capture_output=True, text=True)
        archives = list(Path(temporary).glob("timm-*.tar.gz"))
        if not archives:
            reason = (done.stderr.strip().splitlines() or ["no source distribution"])[-1]
            pytest.skip(f"timm's tests cannot be downloaded ({reason}): connect, or set TIMM_TESTS to their folder")
        with tarfile.open(archives[0]) as archive:
            members = {f"timm-{timm.__version__}/tests/{name}": name for name in reversed(TESTS)}
            found = [(member, name) for member, name in members.items() if member in archive.getnames()]
            for member, name in found:
                file = archive.extractfile(member)
                assert file is not None
                Path(temporary, name).write_bytes(file.read())
        folder.mkdir(exist_ok=True)
        for _, name in found:
            os.replace(Path(temporary, name), folder / name)


def run_timm_suite(models: str, *options: str, home: Path | None = None, skips: bool = False) -> None:
    """Run timm's tests on the models of a pattern; none may fail, and none skip unless `skips`.

    Args:
        models: pattern of model names, such as "coda*"
        options: of pytest
        home: weights that timm would download are looked for in `home`/hub/checkpoints first
        skips: tests may be skipped
    """
    source = tests_folder()
    with tempfile.TemporaryDirectory() as temporary:
        for name in TESTS:  # a copy, so that the folder above them does not hide the timm that is installed
            if (source / name).exists():
                Path(temporary, name).write_bytes((source / name).read_bytes())
        Path(temporary, "pytest.ini").write_text("[pytest]\nmarkers =\n" + "".join(f"    {m}\n" for m in MARKERS))
        environment = os.environ | {"TIMM_SUITE_MODELS": models, "PYTHONPATH": str(Path(__file__).parent)}
        environment |= {"TORCH_HOME": str(home)} if home else {}
        command = ["-m", "pytest", "-p", "timm_suite_plugin", "-p", "no:cacheprovider", "-q", "-rs"]
        command = [sys.executable, *command, TESTS[0], *options]
        run = subprocess.run(command, cwd=temporary, env=environment, capture_output=True, text=True)
    shown = "\n".join(line for line in run.stdout.splitlines() if line.startswith(("E ", "FAILED", "ERROR", "SKIPPED")))
    assert run.returncode == 0, shown + run.stdout[-500:] + run.stderr[-2000:]
    assert skips or "skipped" not in run.stdout.splitlines()[-1], run.stdout[-2000:]
