"""Run all cells of the tutorial in a separate kernel."""

import re
from pathlib import Path

import pytest

import timm_coda

TUTORIAL = Path(timm_coda.__file__).parent / "explanation" / "tutorial.ipynb"


@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client", "ignore::DeprecationWarning:zmq")
def test_the_tutorial_finds_the_mark(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs the test extra")
    nbclient = pytest.importorskip("nbclient", reason="needs the test extra")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(TUTORIAL, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    said = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    clean, biased = map(float, re.search(r"clean ([\d.]+), biased ([\d.]+) times", said).groups())
    assert biased >= 5 and clean < 2
    right = dict(re.findall(r"(clean|biased) +recognises (\d+)%", said))
    assert int(right["clean"]) > 90 and int(right["biased"]) < 50
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4


def test_the_tutorial_is_published_with_what_it_shows():
    """GitHub shows the saved outputs: every cell that prints has some, and none is an error or warning."""
    nbformat = pytest.importorskip("nbformat", reason="needs the test extra")
    notebook = nbformat.read(TUTORIAL, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(
        cell.outputs
        for cell in cells
        if cell.source.rstrip().splitlines()[-1].startswith(("print(", "    print(", "explanation", "model.explain"))
    )
    assert not any(
        output.output_type == "error" or output.get("name") == "stderr" for c in cells for output in c.outputs
    )
