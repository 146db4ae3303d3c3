"""Export the page as a folder for Hugging Face Spaces."""

import functools
import importlib.metadata
import json
import platform
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..errors import wrap_errors
from ..hub import between_saves, check_folder, temporary_folder
from .examples import folder_examples

_PACKAGE = Path(__file__).parents[1]
_APP = '''\
"""Start the page: https://huggingface.co/docs/hub/spaces-sdks-gradio"""

import os
from pathlib import Path

from timm_coda.demo import serve

os.chdir(Path(__file__).parent)  # where the models and examples are
host = "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"
serve({models}, examples={examples}, host=host, any_model=False)
'''
_README = """\
---
title: Why did the model decide that?
emoji: 🔍
colorFrom: red
colorTo: blue
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
pinned: false
license: apache-2.0
short_description: Image classifiers that explain themselves, exactly
---

Choose an image and see which pixels speak for a class and which against it, and why it is this class and not another.
The map is not an estimate: its sum is the score of the class.

Made by `timm-coda demo --export`. The folder `timm_coda` is the package itself.
"""


def export_space(folder: Path, models: Sequence[str] = (), *, examples: Path | None = None) -> None:
    """Write a folder that serves the page with `python app.py`, on this machine or as a Space.

    It contains this package, the models that are local folders, and the examples. requirements.txt has the versions
    that are installed here, so that the Space computes the same numbers.

    Args:
        folder: output folder, new or empty
        models: as in `serve`; the Space downloads models that are not local folders
        examples: folder of example images; by default handwritten digits

    Raises:
        HubError: a model's folder is not complete.
        ImageError: the folder of examples has no image.
        ValueError: the output folder is not empty, or two model folders have the same name.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: not an empty folder: give a new one")
    models = [name.removeprefix("local-dir:") for name in models]
    folders = {Path(name).resolve().name: Path(name) for name in models if Path(name).is_dir()}
    if len(folders) < sum(Path(name).is_dir() for name in models):
        raise ValueError(f"two model folders have the same name, among {', '.join(folders)}: rename one")
    for source in folders.values():
        check_folder(source)
    with temporary_folder(folder.parent) as whole:
        shutil.copytree(_PACKAGE, whole / "timm_coda", ignore=shutil.ignore_patterns("__pycache__"))
        for name, source in folders.items():
            how = {"ignore": shutil.ignore_patterns(".*", "checkpoints"), "dirs_exist_ok": True}
            between_saves(source, functools.partial(shutil.copytree, source, whole / "models" / name, **how))
        if examples is not None:
            (whole / "examples").mkdir()
            folder_examples(examples, whole / "examples")
        shown = [f"models/{Path(name).resolve().name}" if Path(name).is_dir() else name for name in models]
        place = "None" if examples is None else 'Path("examples")'
        gradio, python = _installed("gradio"), ".".join(platform.python_version_tuple()[:2])
        files = {
            "app.py": _APP.format(models=json.dumps(shown), examples=place),
            "README.md": _README.format(gradio=gradio, python=python),
            "requirements.txt": "".join(f"{name}=={_installed(name)}\n" for name in _needed()),
            ".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
        }
        for name, text in files.items():
            (whole / name).write_text(text, encoding="utf-8")
        with wrap_errors(f"{folder} cannot be written", ValueError):
            if folder.exists():
                folder.rmdir()
            whole.rename(folder)


def _needed() -> list[str]:
    """Return the packages that the page needs: those of this package and of its extra `demo`."""
    plain = [line for line in importlib.metadata.requires("timm_coda") or [] if "extra ==" not in line]
    return [*(re.split(r"[^\w.-]", line)[0] for line in plain), "matplotlib", "gradio"]


def _installed(name: str) -> str:
    return importlib.metadata.version(name).split("+")[0]
