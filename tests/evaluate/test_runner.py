"""`timm-coda evaluate`: complete, resumed after a kill, and with wrong input."""

import json
import os
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch

from helpers.evaluate_cases import Linear, make_subject
from helpers.processes import Program
from timm_coda import cli, hub
from timm_coda.data import DataError, load_data
from timm_coda.evaluate import Explainer, explainers, runner
from timm_coda.evaluate.explainers import EXPLAINERS
from timm_coda.evaluate.metrics import make_metric
from timm_coda.evaluate.perturbation import IDSDS
from timm_coda.explanation import Classes

DIGITS = ["evaluate", "--model", "coda_net_xs.digits", "--data", "digits"]


def without_times(results: dict) -> dict:
    """Results without the entries that may differ between two equal runs."""
    metrics = json.loads(json.dumps(results["metrics"]))
    for metric in metrics.values():
        for entry in metric["explainers"].values():
            entry.pop("seconds", None)
    return {key: value for key, value in results.items() if key not in ("seconds", "command")} | {"metrics": metrics}


def test_all_explainers(tmp_path, capsys, monkeypatch):
    for name, value in (("_SAMPLES", 30), ("_MASKS", 30), ("_STEPS", 3)):
        monkeypatch.setattr(explainers, name, value)
    monkeypatch.setattr(runner, "_EXAMPLES", 2)
    words = [*DIGITS, "--grids", "2", "--grid-size", "2", "--images", "3", "--output", str(tmp_path / "a")]
    words += ["--metrics", "grid_localisation", "deletion", "idsds"]
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    table = captured.out.splitlines()
    assert max(map(len, table[:-2])) <= 80
    assert "Model-inherent" in (tmp_path / "a/report.html").read_text()
    assert table[0] == "coda_net_xs.digits on digits: accuracy 99.8%"
    assert captured.err == "", "no progress bar if stderr is not a terminal"
    assert any(line.startswith("deeplift: DeepLIFT has no rule") for line in table)
    results = json.loads((tmp_path / "a/results.json").read_text())
    assert list(results["explainers"]) == list(EXPLAINERS)
    assert results["data"] == ["digits"]
    assert results["settings"]["grids"] == 2
    for name, metric in results["metrics"].items():
        failed = {e for e, entry in metric["explainers"].items() if "error" in entry}
        assert failed == {"deeplift", "guided_backprop"}
        for entry in metric["explainers"].values():
            if "error" not in entry:
                assert entry["n"] == len(entry["values"]) == (8 if "grid" in name else 3)
                assert entry["interval"][0] <= entry[metric["statistic"]] <= entry["interval"][1]
                assert (entry["curve"] is not None) == (name == "deletion")
    assert results["metrics"]["grid_localisation"]["baseline"] == {"value": 0.25, "label": "uniform map"}
    examples = dict(np.load(tmp_path / "a/arrays/examples.npz"))
    assert examples["images"].shape == (2, 3, 16, 16)
    assert examples["images"].dtype == np.float32
    assert examples["labels"].tolist() == [0, 1]
    assert examples["predictions"].shape == examples["probabilities"].shape == (2,)
    grid = dict(np.load(tmp_path / "a/arrays/grid.npz"))
    assert grid["image"].shape == (3, 32, 32)
    made = {f"maps_{name}" for name in EXPLAINERS if name not in ("deeplift", "guided_backprop")}
    assert {key for key in examples if key.startswith("maps_")} == made == {key for key in grid if key[:5] == "maps_"}
    assert all(examples[key].shape == (2, 16, 16) and grid[key].shape == (4, 32, 32) for key in made)
    model = timm.create_model("coda_net_xs.digits", pretrained=True).eval()
    maps = model.explain(torch.from_numpy(examples["images"]), examples["labels"]).contributions
    assert np.allclose(examples["maps_inherent"], maps, rtol=1e-3, atol=1e-4)


def finished(folder: Path) -> int:
    return len(list((folder / "parts").glob("[!.]*.*.npz")))


def test_killed_it_goes_on(tmp_path):
    words = [*DIGITS, "--grids", "4", "--grid-size", "2", "--images", "4", "--metrics", "grid_localisation", "deletion"]
    words += ["idsds", "--explainers", "inherent", "random", "gradient", "grad_cam", "--output"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for number, at, code in ((signal.SIGINT, 1, 130), (signal.SIGKILL, 4, -9)):
        process = evaluating([*words, str(killed)], tmp_path)
        while finished(killed) < at and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code, said
        assert number != signal.SIGINT or said.endswith(f"{killed}: run the same command to resume\n")
    done = {path: path.stat().st_mtime_ns for path in (killed / "parts").glob("[!.]*.npz")}
    assert 4 <= finished(killed) < 12
    assert not (killed / "results.json").exists()
    for folder in (killed, whole):
        assert cli.main([*words, str(folder)]) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in done.items()), "finished work is not repeated"
    resumed, uninterrupted = (json.loads((folder / "results.json").read_text()) for folder in (killed, whole))
    assert without_times(resumed) == without_times(uninterrupted)
    assert resumed["metrics"]["idsds"]["explainers"]["inherent"]["n"] == 4
    for name in ("examples.npz", "grid.npz"):
        one, other = (dict(np.load(folder / "arrays" / name)) for folder in (killed, whole))
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)


def test_two_evaluations_do_not_share_a_folder(tmp_path, capsys):
    words = [*DIGITS, "--explainers", "random", "--metrics", "idsds", "--images", "4", "--output", str(tmp_path / "a")]
    for more in ([], ["--overwrite"]):
        with hub.claimed(tmp_path / "a"):
            assert cli.main([*words, *more]) == 2
            assert os.listdir(tmp_path / "a") == [hub.RUNNING]
        assert f"another run writes into {tmp_path}/a (process {os.getpid()} on " in capsys.readouterr().err
    both = [evaluating(words, tmp_path) for _ in range(2)]
    ends = [(process.communicate(timeout=60)[1], process.returncode) for process in both]
    for said, code in ends:
        assert code == 0 or (code == 2 and "another run writes into" in said), said
    assert json.loads((tmp_path / "a/results.json").read_text())["metrics"]["idsds"]["explainers"]["random"]["n"] == 4
    assert not list((tmp_path / "a").rglob(".*"))


def evaluating(words: list[str], cwd: Path) -> Program:
    command = "import sys; from timm_coda.cli import main; sys.exit(main())"
    return Program(["-c", command, *words], cwd=cwd, environment={**os.environ})


def test_going_on_with_something_else(tmp_path, capsys):
    words = [*DIGITS, "--explainers", "random", "--metrics", "idsds", "--images", "4", "--output", str(tmp_path / "a")]
    assert cli.main(words) == 0
    results = (tmp_path / "a/results.json").read_text()
    assert cli.main([*words, "--seed", "1", "--grids", "5"]) == 2
    error = capsys.readouterr().err
    assert (
        "other settings or data (grids was 500, is 5; seed was 42, is 1): use another --output, or --overwrite" in error
    )
    assert (tmp_path / "a/results.json").read_text() == results
    # More explainers belong to the same evaluation, and the batch size does not change values.
    assert cli.main([*words, "--explainers", "random", "inherent", "--batch-size", "3"]) == 0
    more = json.loads((tmp_path / "a/results.json").read_text())["metrics"]["idsds"]["explainers"]
    assert more["random"] == json.loads(results)["metrics"]["idsds"]["explainers"]["random"]
    assert "values" in more["inherent"]
    assert cli.main([*words, "--seed", "1", "--overwrite"]) == 0
    assert json.loads((tmp_path / "a/results.json").read_text())["seed"] == 1
    capsys.readouterr()
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.tex").touch()
    assert cli.main([*words[:-1], str(tmp_path / "b"), "--overwrite"]) == 2
    assert "exists, but is not an evaluation: use a new or empty --output" in capsys.readouterr().err
    assert (tmp_path / "b/thesis.tex").exists()


def test_bad_input(tmp_path, capsys):
    words = [*DIGITS, "--explainers", "random", "--output", str(tmp_path / "a")]
    assert cli.main([*words, "--metrics", "grid_localisation", "--grid-size", "4"]) == 1, "there are ten digits"
    assert "images of 10 classes with p > 0.5, but a grid of 4 x 4 needs 16" in capsys.readouterr().out.replace(
        "\n  ", " "
    )
    results = json.loads((tmp_path / "a/results.json").read_text())
    assert "needs 16" in results["metrics"]["grid_localisation"]["error"]
    assert not (tmp_path / "a/arrays/grid.npz").exists()
    for more, message in (
        (["--metrics", "accuracy"], "unknown metric 'accuracy': choose grid_localisation,"),
        (["--explainers", "shap"], "unknown explainer 'shap': choose inherent,"),
        (["--model", "coda_net_t"], "no model 'coda_net_t'"),
        (["--data", "/nowhere"], "nothing found at '/nowhere'"),
        (["--test-split", "dev"], "--test-split dev: no such split"),
    ):
        assert cli.main([*words, "--output", str(tmp_path / "b"), *more]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "b").exists()
    hub.save_model(timm.create_model("test_resnet", num_classes=10), tmp_path / "plain")
    assert cli.main([*words, "--model", str(tmp_path / "plain")]) == 2
    assert "ResNet cannot explain itself: use a timm_coda model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*words, "--grids", "0"])


def test_retrained_model_is_another(tmp_path, capsys):
    model = timm.create_model("coda_net_xs.digits", pretrained=True)
    hub.save_model(model, tmp_path / "model")
    words = ["evaluate", "--model", str(tmp_path / "model"), "--data", "digits", "--output", str(tmp_path / "a")]
    words += ["--explainers", "random", "--metrics", "idsds", "--images", "4"]
    assert cli.main(words) == 0
    model.head.down.weight.data *= 1.01
    hub.save_model(model, tmp_path / "model")
    assert cli.main(words) == 2
    assert "other settings or data (weights was '" in capsys.readouterr().err


def test_what_fails_is_tried_again(tmp_path):
    torch.manual_seed(0)
    subject = make_subject(Linear(torch.rand(2, 3, 4, 4)), torch.rand(3, 3, 4, 4), [0, 1, 0])
    calls = []

    def method(model, images, targets):
        calls.append(len(images))
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return torch.rand(*targets.shape, 4, 4)

    shaky = Explainer("shaky", "Shaky", "Fails once.", method)
    steady = Explainer("steady", "Steady", "", lambda model, images, targets: torch.rand(*targets.shape, 4, 4))
    metrics = [IDSDS(), make_metric("grid_localisation", grids=2, grid_size=3)]
    runner.open_folder(tmp_path / "a", {})
    facts = {"model": "linear", "data": ["noise"]}
    first = runner.evaluate(subject, [shaky, steady], metrics, tmp_path / "a", facts=facts)["metrics"]
    assert first["idsds"]["explainers"]["shaky"] == {"error": "RuntimeError: out of memory"}
    assert first["idsds"]["explainers"]["steady"]["n"] == 3
    assert "needs 9" in first["grid_localisation"]["error"]
    second = runner.evaluate(subject, [shaky, steady], metrics, tmp_path / "a", facts=facts)["metrics"]
    assert second["idsds"]["explainers"]["shaky"]["n"] == 3
    assert second["idsds"]["explainers"]["steady"] == first["idsds"]["explainers"]["steady"]


def test_bcos_network(tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model("bcos_resnet18", num_classes=10)
    hub.save_model(model, tmp_path / "model", label_names=list("0123456789"))
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["pretrained_cfg"] |= {"input_size": [3, 32, 32]}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    words = [
        "evaluate",
        "--model",
        str(tmp_path / "model"),
        "--data",
        "digits",
        "--images",
        "2",
        "--metrics",
        "deletion",
    ]
    words += ["--explainers", "inherent", "grad_cam", "random", "--output", str(tmp_path / "a")]
    assert cli.main(words) == 0
    results = json.loads((tmp_path / "a/results.json").read_text())
    entries = results["metrics"]["deletion"]["explainers"]
    assert all(entry["n"] == 2 and len(entry["curve"]["x"]) == 33 for entry in entries.values())


def test_a_device_that_is_not_there(tmp_path, capsys):
    assert cli.main([*DIGITS, "--output", str(tmp_path / "a"), "--device", "tpu"]) == 2
    assert "--device tpu: choose cpu or cuda" in capsys.readouterr().err


def image_folder(root: Path, names: dict[int, str], count: int = 6) -> Path:
    """Write digits of the given classes into folders with these names."""
    test = load_data(["digits"]).test
    for digit, name in names.items():
        (root / name).mkdir(parents=True)
        for number in np.flatnonzero(test.labels == digit)[:count]:
            test.image(number).save(root / name / f"{number}.png")
    return root


def evaluated(data: Path, output: Path, model: str = "coda_net_xs.digits") -> dict:
    words = ["evaluate", "--model", model, "--data", str(data), "--explainers", "inherent", "--metrics", "idsds"]
    assert cli.main([*words, "--images", "2", "--test-split", "all", "--output", str(output)]) == 0
    return json.loads((output / "results.json").read_text())


def test_classes_of_a_dataset_are_found_by_name(tmp_path, capsys):
    """Image folders number their classes in alphabetical order, whatever the model's are."""
    names = {3: "3", 5: "5", 8: "8"}
    subset = evaluated(image_folder(tmp_path / "in/all", names).parent, tmp_path / "a")
    assert subset["accuracy"] == 1 and subset["label_names"] == list("0123456789")
    assert "the images are of 3 of the model's 10 classes" in capsys.readouterr().out

    model = timm.create_model("coda_net_xs.digits", pretrained=True)
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    hub.save_model(model, tmp_path / "words", label_names=words)
    mixed = image_folder(tmp_path / "words_in/all", dict(enumerate(words)), count=2).parent
    assert evaluated(mixed, tmp_path / "b", str(tmp_path / "words"))["accuracy"] == 1
    capsys.readouterr()

    image_folder(tmp_path / "in/all", {9: "ten"})
    words = ["evaluate", "--model", "coda_net_xs.digits", "--data", str(tmp_path / "in"), "--test-split", "all"]
    assert cli.main([*words, "--output", str(tmp_path / "c")]) == 2
    assert "ten is not among the model's 10 classes: 0, 1, 2" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    hub.save_model(timm.create_model("coda_net_xs", num_classes=4, rank=2), tmp_path / "unnamed")
    words[2] = str(tmp_path / "unnamed")
    assert cli.main([*words, "--output", str(tmp_path / "c")]) == 2
    assert "nobody has named the model's 4 classes, so 3, 5, 8, ten cannot be found" in capsys.readouterr().err


def test_integer_labels_are_class_numbers_of_the_model(tmp_path):
    test = load_data(["digits"]).test
    chosen = np.flatnonzero((test.labels == 3) | (test.labels == 8))[:12]
    rows = {"image": [test.image(number) for number in chosen], "label": test.labels[chosen].tolist()}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "test.parquet")
    model = timm.create_model("coda_net_xs.digits", pretrained=True)
    hub.save_model(model, tmp_path / "words", label_names=[f"digit {number}" for number in range(10)])
    words = [
        "--data",
        str(tmp_path / "test.parquet"),
        "--explainers",
        "inherent",
        "--metrics",
        "idsds",
        "--images",
        "2",
    ]
    for model in ("coda_net_xs.digits", str(tmp_path / "words")):
        output = tmp_path / Path(model).name
        output = output.with_name(f"{output.name}-out")
        assert cli.main(["evaluate", "--model", model, *words, "--output", str(output)]) == 0
        assert json.loads((output / "results.json").read_text())["accuracy"] == 1
    with pytest.raises(DataError, match="the label 8 is no class of the model: they are 0 to 7"):
        load_data([str(tmp_path / "test.parquet")], training=False).matched(Classes.unnamed(8))


def test_an_evaluation_is_of_its_images(tmp_path, capsys):
    """Finished parts are of the images that there were, so others are another evaluation."""
    folder = image_folder(tmp_path / "in/all", {3: "3", 5: "5"})
    results = evaluated(folder.parent, tmp_path / "out")
    assert results["dataset"]["test"]["images"] == 12 and len(results["weights"]) == 16
    words = ["evaluate", "--model", "coda_net_xs.digits", "--data", str(folder.parent), "--test-split", "all"]
    words += ["--explainers", "inherent", "--metrics", "idsds", "--images", "2", "--output", str(tmp_path / "out")]
    first = sorted((folder / "3").iterdir())[0]
    new = folder / "5" / "new.png"
    for change, said in (
        (lambda: new.write_bytes(first.read_bytes()), "test images were 12, are 13"),
        (first.unlink, "labels of test images changed: 5 '3' (were 6), 7 '5' (were 6)"),
        (lambda: new.rename(folder / "3" / "new.png"), "test images changed"),
        (lambda: (folder / "3").rename(folder / "8"), "class '3' is now '8'"),
    ):
        change()
        assert cli.main(words) == 2
        error = capsys.readouterr().err
        assert said in error and error.endswith("use another --output, or --overwrite\n")
    assert cli.main([*words, "--overwrite"]) == 0
