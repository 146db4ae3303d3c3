"""Tests of runs with two processes against runs with one, streamed or not, killed or not."""

import json
import os

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from helpers import relative_error
from helpers.processes import start_together
from helpers.train_cases import QUIET, SMALL, assert_same_run, finish, image_file, kill, start, wait_for_state

SHARED = [*SMALL, *QUIET, "--epochs", 2, "--hflip", 0.5]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """Write images of three colours as three parquet files for training; one of their row groups of 7 is broken."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
    for name, count in (("train-0", 64), ("train-1", 64), ("train-2", 64), ("test", 21)):
        images = [{"bytes": image_file(rng, row % 3), "path": None} for row in range(count)]
        columns = {"image": images, "label": [row % 3 for row in range(count)]}
        table = datasets.Dataset.from_dict(columns, features=features).data.table
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=7)
    file = folder / "train-1.parquet"
    pixels = pq.read_metadata(file).row_group(3).column(0)
    content, begin = bytearray(file.read_bytes()), pixels.dictionary_page_offset or pixels.data_page_offset
    content[begin : begin + pixels.total_compressed_size] = bytes(pixels.total_compressed_size)
    file.write_bytes(content)
    return str(folder)


@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["files", "streaming"])
def test_two_processes_are_one_with_twice_the_accumulation(colours, shards, tmp_path, streaming):
    """Also, two processes that are killed resume bit for bit as if they had not been."""
    source = ["--data", shards, "--streaming", 32, "--batch-size", 4] if streaming else ["--data", colours]
    # Options that draw random numbers in each process: Mixup, the penalty's other classes.
    source += ["--map-penalty", 0.5] if streaming else ["--epochs", 3, "--batch-size", 6, "--mixup", 0.2]
    options = [*SHARED, *source, "--save-every", 2, "--workers", 1 if streaming else 0]
    one = start(*options, "--grad-accum", 2, "--output", "one", cwd=tmp_path)
    finish(one)
    finish(start(*options, "--output", "two", cwd=tmp_path, processes=2))
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    assert [summary["processes"] for summary in summaries] == [1, 2]
    assert summaries[0]["curve"][-1][0] == summaries[1]["curve"][-1][0] > 15
    assert summaries[0]["skipped"] == summaries[1]["skipped"] and bool(summaries[0]["skipped"]) == streaming
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, weight in weights[0].items():
        assert relative_error(weights[1][name], weight) < 1e-5, name

    # Without --output, the main process chooses the folder for both.
    killed = tmp_path / "runs/coda_net_xs"
    run = start(*options, cwd=tmp_path, processes=2)
    wait_for_state(run, killed, 4)
    kill(run)
    out = finish(start("--resume", killed, "--workers", 0, cwd=tmp_path, processes=2))
    assert f"resuming {killed} after update" in out and os.listdir(tmp_path / "runs") == ["coda_net_xs"]
    assert_same_run(tmp_path / "two", killed)


def test_a_streaming_run_that_is_killed_goes_on_bit_for_bit(shards, tmp_path):
    options = [*SHARED, "--data", shards, "--streaming", 32, "--batch-size", 8, "--save-every", 3, "--workers", 1]
    finish(start(*options, "--output", "whole", cwd=tmp_path))
    run = start(*options, "--output", "killed", cwd=tmp_path)
    wait_for_state(run, tmp_path / "killed", 7)
    kill(run)
    out = finish(start("--resume", "killed", "--workers", 0, cwd=tmp_path))
    assert "resuming killed after update" in out
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_processes_test_the_same_buffers(tmp_path):
    """Running means of batch norm, which each process updates with its own images: the first one's are saved."""
    code = """
import torch
from accelerate import Accelerator
from timm_coda.training import losses

accelerator = Accelerator(cpu=True)
norm = torch.nn.BatchNorm1d(3)
norm.running_mean += accelerator.process_index
norm.num_batches_tracked += 5 + accelerator.process_index
losses.share_buffers(norm)
print(norm.running_mean.tolist(), norm.num_batches_tracked.item())
"""
    for count in (1, 2):
        programs = start_together(count, ["-c", code], cwd=tmp_path)
        ends = [program.communicate(timeout=60) for program in programs]
        assert [out for out, _ in ends] == ["[0.0, 0.0, 0.0] 5\n"] * count, ends
