"""Tests of recipes, output folders and progress of runs."""

import argparse
import contextlib
import json
import math
import os
from pathlib import Path

import pytest
import timm
import torch

from timm_coda import hub
from timm_coda.hub.fingerprint import fingerprint_in_picture
from timm_coda.training import options, runs, states


def parse(*argv: str, default: Path = Path("none.yaml")) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("--config", "--output", "--model", "--resume"):
        parser.add_argument(name, nargs="?", const="auto", default={"--model": "net"}.get(name))
    parser.add_argument("--data", nargs="+", default=["digits"])
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--scale", type=float, nargs=2)
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--model-args", nargs="+", action="extend", default=[])
    return options.parse_options(parser, list(argv), default)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_defaults_then_the_recipe_then_the_command_line(folder):
    (folder / "recipe.yaml").write_text(
        "lr: 1e-3\nscale: [0.5, 1]\npretrained: false\nmodel_args: {rank: 2, bias: [1, 2], name: x}\ndata:\n"
    )
    args = parse("--config", "recipe.yaml")
    assert (args.lr, args.scale, args.pretrained, args.data) == (1e-3, [0.5, 1.0], False, ["digits"])
    assert args.model_args == ["rank=2", "bias=[1, 2]", "name=x"]
    args = parse("--config", "recipe.yaml", "--lr", "3", "--pretrained", "--model-args", "rank=4")
    assert (args.lr, args.pretrained, args.model_args[-1]) == (3.0, True, "rank=4")
    assert parse(default=folder / "recipe.yaml").lr == 1e-3
    assert parse("--data", "x", default=folder / "recipe.yaml").lr == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning-rate: 1", "unknown option 'learning-rate': choose from data, lr"),
        ("scales: 1", r"unknown option 'scales': did you mean scale\?"),
        ("output: x", "unknown option 'output'"),
        ("lr 1", "expected lines such as 'lr: 0.001', got 'lr 1'"),
        ("a: [", "not YAML"),
    ],
)
def test_recipes_that_cannot_be_read(folder, text, message):
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(states.RunError, match=f"--config bad.yaml: .*{message}"):
        parse("--config", "bad.yaml")


def test_a_wrong_value_in_a_recipe_names_the_option(folder, capsys):
    (folder / "bad.yaml").write_text("lr: fast")
    with pytest.raises(SystemExit, match="2"):
        parse("--config", "bad.yaml")
    assert "argument --lr: invalid float value: 'fast'" in capsys.readouterr().err


def claim(*argv: str) -> contextlib.AbstractContextManager:
    """What train.py does before it trains: parse options, claim the folder; yields the folder."""

    @contextlib.contextmanager
    def claimed():
        args = parse(*argv)
        vars(args).update(mixed_precision=None, grad_accum=1, report_to="none")
        with runs.started(args) as accelerator:
            assert accelerator.project_dir == args.output
            yield args.output

    return claimed()


def test_the_output_folder(folder):
    for name in ("runs/net", "runs/net-2"):
        with claim("--data", "x") as output:
            assert output == name
            Path(output, "recipe.yaml").touch()
    with claim("--data", "x") as output, claim("--data", "x") as other:
        assert (output, other) == ("runs/net-3", "runs/net-4"), "while the other run has written nothing yet"
    assert sorted(os.listdir("runs")) == ["net", "net-2"], "nothing is left of runs that failed before they started"
    (folder / "runs/mine").mkdir()
    with claim("--data", "x", "--output", "runs/mine") as output:  # empty
        assert output == "runs/mine"
    (folder / "runs/mine/mine.txt").write_text("")
    for words in ([], ["--resume"]):  # the folder has no run to resume
        with (
            pytest.raises(states.RunError, match=r"runs/mine is in use.*--resume runs/mine or --overwrite"),
            claim("--data", "x", "--output", "runs/mine", *words),
        ):
            pass
    with claim("--data", "x", "--output", "runs/mine", "--overwrite"):
        pass
    with claim("--data", "x", "--resume") as output:
        assert output == "runs/net"
    with (
        pytest.raises(states.RunError, match=r"mine\.txt is in use"),
        claim("--data", "x", "--output", "runs/mine/mine.txt"),
    ):
        pass
    assert os.listdir("runs/mine") == ["mine.txt"]


def test_overwriting_removes_only_what_a_run_writes(folder):
    (folder / "run/checkpoints/epoch-1").mkdir(parents=True)
    for name in ("mine.txt", "summary.json", "model.safetensors"):
        (folder / "run" / name).write_text("old")
    runs.start_folder(folder / "run", {"lr": 1e-5, "data": ["a b"], "seed": None})
    assert sorted(path.name for path in (folder / "run").iterdir()) == ["mine.txt", "recipe.yaml"]


def test_resuming_takes_the_recipe_of_the_run(folder):
    runs.start_folder(folder / "run", {"lr": 1e-5, "data": ["a b", "c"], "model": "net", "scale": None})
    args = parse("--resume", "run")
    assert (args.lr, args.data, args.output, args.config) == (1e-5, ["a b", "c"], "run", "run/recipe.yaml")
    with pytest.raises(states.RunError, match="--resume nowhere: no run found"):
        parse("--resume", "nowhere")
    with pytest.raises(states.RunError, match="--resume continues a run, but --overwrite deletes it"):
        parse("--resume", "run", "--overwrite")


def test_progress():
    progress = states.Progress()
    assert progress.add_point(6.0, 1, 3) == {"train_loss": 2.0, "train_accuracy": 1 / 3}
    assert progress.add_point(0.0, 1, 1) == {"train_loss": 1.5, "train_accuracy": 0.5}
    assert progress.add_point(0.0, 0, 0) == {"train_loss": 1.5, "train_accuracy": 0.5}  # only broken images
    assert progress.curve == [[0, 2.0], [0, 0.0]]
    assert progress.add_epoch({"loss": 1.0, "accuracy": 0.5})
    assert not progress.add_epoch({"loss": 1.0, "accuracy": 0.5})
    assert not progress.add_epoch({"loss": 0.1, "accuracy": 0.4})
    assert progress.add_epoch({"loss": 0.9, "accuracy": 0.5})
    assert progress.best["epoch"] == 4 and progress.totals == [0, 0, 0]
    for loss in (math.nan, math.inf):
        with pytest.raises(states.Diverged, match=r"the loss is (nan|inf) at update 0.*--lr"):
            progress.add_point(loss, 1, 1)


def test_skipped_images_are_named_once(capsys):
    progress = states.Progress()
    progress.skip([("train row 1", "broken")])
    progress.skip([("train row 1", "broken"), ("train row 2", "gone")])
    assert capsys.readouterr().out == "skipped train row 1: broken\nskipped train row 2: gone\n"
    assert progress.skipped == {"train row 1": "broken", "train row 2": "gone"}


def test_text_is_replaced_all_or_nothing(folder):
    (folder / "a.txt").write_text("old")
    with pytest.raises(hub.SaveError, match=r"a.txt could not be written"):
        hub.write_text(folder / "a.txt", "\ud800")  # no such character
    assert [path.name for path in folder.iterdir()] == ["a.txt"]
    assert (folder / "a.txt").read_text() == "old"


def test_environment():
    facts = hub.environment()
    assert facts["timm"] and facts["torch"] and " thread" in facts["cpu"]


def test_summary_names_only_data_sets_of_the_hub(folder):
    (folder / "pets").mkdir()
    progress = states.Progress(best={"accuracy": 0.5})
    for sources, expected in (
        (["digits"], None),
        (["me/animals"], "me/animals"),
        (["pets"], None),
        (["pe*"], None),
        (["a.parquet", "b.parquet"], None),
    ):
        runs.save_summary(folder, progress, {"options": {"data": sources}})
        assert json.loads((folder / "summary.json").read_text())["hub_data_set"] == expected


def test_the_best_models_are_kept(folder):
    accuracies, kept = [0.5, 0.7, 0.6, 0.7, 0.4], []
    for epoch in range(1, 6):
        history = [{"epoch": e, "accuracy": a, "loss": -e} for e, a in enumerate(accuracies[:epoch], 1)]
        states.keep_best(folder / "best", history, 2, lambda place: place.mkdir(parents=True))
        kept.append(sorted(int(place.name[-4:]) for place in (folder / "best").iterdir()))
    assert kept == [[1], [1, 2], [2, 3], [2, 4], [2, 4]]
    states.keep_best(folder / "none", history, 0, lambda place: place.mkdir())
    assert not (folder / "none").exists()


def test_a_picture_that_cannot_be_written_is_no_reason_to_stop(folder, capsys):
    model = timm.create_model("coda_net_xs.digits", pretrained=True).eval()
    explanation = model.explain(torch.rand(1, 3, 16, 16))
    (folder / "file").write_text("")
    places = [folder / "file/picture.png", folder / "picture.png"]
    saved = [
        runs.save_picture(explanation, place, weights="12ab", label_names="0123456789", true_labels=[3])
        for place in places
    ]
    assert saved == [False, True] and fingerprint_in_picture(places[1]) == "12ab"
    assert "could not write the figure" in capsys.readouterr().out
