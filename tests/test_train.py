"""End-to-end tests of train.py: finished, killed, stopped, with a full disk, with bad input."""

import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import GeneralTracker, on_main_process
from safetensors.torch import load_file

import timm_coda  # noqa: F401
from helpers import relative_error
from helpers.train_cases import (
    QUIET,
    ROOT,
    SMALL,
    assert_equal,
    assert_same_run,
    finish,
    image_file,
    start,
    wait_for_state,
)
from timm_coda import data, hub
from timm_coda.training import states


@pytest.fixture(scope="module")
def train_module():
    spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train(train_module, monkeypatch, tmp_path):
    """Return a function that runs train.py's main() in this process with given options and returns the exit code."""
    monkeypatch.chdir(tmp_path)
    interrupt = signal.getsignal(signal.SIGINT)

    def run(*options) -> int:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
        return train_module.main()

    yield run
    signal.signal(signal.SIGINT, interrupt)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_a_whole_run(train, colours, tmp_path, capsys):
    options = ["--data", colours, "--output", "out", "--epochs", 3, "--explain-every", 2, *SMALL, "--sched", "cosine"]
    options += ["--keep", 2]
    assert train(*options, "--explain-images", 4) == 0
    out = capsys.readouterr().out
    assert "72 training and 21 test images of 3 classes" in out
    summary = json.loads(Path("out/summary.json").read_text())
    assert [epoch["epoch"] for epoch in summary["history"]] == [1, 2, 3]
    assert summary["accuracy"] == max(epoch["accuracy"] for epoch in summary["history"]) > 0.6
    assert summary["history"][-1]["train_loss"] < summary["history"][0]["train_loss"]
    assert summary["curve"][-1][0] == 27 and summary["label_names"] == ["blue", "green", "red"]
    assert summary["command"].startswith("train.py --data") and summary["environment"]["torch"] == torch.__version__
    assert summary["options"]["lr"] == 0.003 and summary["parameters"] > 0 and summary["skipped"] == {}
    assert summary["files"] == {"used": {"train": 72, "test": 21}, "links": 0, "left_out": {}}
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert (summary["device"], summary["mixed_precision"]) == (device.type, "no")
    files = {str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file()}
    state = "checkpoints/epoch-00003-batch-0000000/"
    ranked = sorted(summary["history"], key=lambda epoch: (-epoch["accuracy"], epoch["loss"]))
    kept = [f"best/epoch-{epoch['epoch']:04}" for epoch in ranked[:2]]
    assert_equal(*(load_file(Path("out", folder, "model.safetensors")) for folder in (kept[0], "")))
    assert files - {f"{folder}/{name}" for folder in kept for name in ("config.json", "model.safetensors")} == {
        "config.json", "model.safetensors", "recipe.yaml", "summary.json", "explanation.png",
        "explanations/epoch-0002.png", state + "model.safetensors", state + "optimizer.bin", state + "record.json",
        state + "random_states_0.pkl",
    }  # fmt: skip
    assert tuple(timm.create_model("local-dir:out", pretrained=True).pretrained_cfg["input_size"]) == (3, 8, 8)

    # The same command fails with a message, resuming finds nothing to do, and the recipe reproduces the run.
    assert train(*options) == 2
    assert "--output out is in use" in capsys.readouterr().err
    assert train("--resume", "out") == 0
    assert "out is finished" in capsys.readouterr().out
    assert train("--config", "out/recipe.yaml", "--output", "again") == 0
    assert_same_run(Path("out"), Path("again"))
    assert train(*options, "--overwrite", "--seed", 1) == 0
    assert json.loads(Path("out/summary.json").read_text())["curve"] != summary["curve"]


def test_held_out_images_choose_the_epoch(train, colours, capsys):
    """The test images are used once, at the end; their accuracy is the run's, and the card's."""
    options = ["--data", colours, "--epochs", 2, *SMALL, *QUIET, "--eval-explanations", 2]
    assert train(*options, "--hold-out", 24, "--output", "out") == 0
    out = capsys.readouterr().out
    assert "48 training and 24 validation images of 3 classes" in out
    assert "24 training images are held out and decide which epoch is the best (--hold-out); the 21 test images" in out
    summary = json.loads(Path("out/summary.json").read_text())
    best = max(summary["history"], key=lambda epoch: (epoch["accuracy"], -epoch["loss"]))
    assert summary["validation"] == {"loss": best["loss"], "accuracy": best["accuracy"], "images": 24}
    assert (summary["training_images"], summary["test_images"]) == (48, 21)
    model, test = timm.create_model("local-dir:out", pretrained=True).eval(), data.load_data(colours).test
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = torch.stack([transform(test.image(place)) for place in range(21)])
    with torch.no_grad():
        right = (model(images).argmax(1) == torch.from_numpy(test.labels)).float().mean()
    assert abs(summary["accuracy"] - float(right)) < 1e-6
    assert f"accuracy {summary['accuracy']:.4f} of the test images, {best['accuracy']:.4f} of those held out" in out
    card = hub.card_of_folder("out", "me/colours")
    assert f"| accuracy | {summary['accuracy']:.2%} of 21 test images" in card
    assert f"Epoch {summary['epoch']} of 2 was chosen by 24 training images held out" in card
    assert "best on these test images" not in card


def test_a_compiled_run_is_the_usual_one(train, colours):
    """Up to rounding, with the usual names of weights; it can be resumed."""
    options = ["--data", colours, "--epochs", 2, *SMALL, *QUIET]
    assert train(*options, "--output", "usual") == 0
    assert train(*options, "--output", "compiled", "--compile") == 0
    usual, compiled = (load_file(f"{name}/model.safetensors") for name in ("usual", "compiled"))
    assert usual.keys() == compiled.keys()
    for name, weight in usual.items():
        assert relative_error(compiled[name], weight) < 1e-2, name
    whole = json.loads(Path("compiled/summary.json").read_text())
    Path("compiled/summary.json").unlink()  # as if it had been killed before its last words
    assert train("--resume", "compiled") == 0
    assert json.loads(Path("compiled/summary.json").read_text())["history"] == whole["history"]
    assert_equal(load_file("compiled/model.safetensors"), compiled)


def test_compiling_where_that_is_impossible(train, colours, capsys, monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/no/compiler",))
    torch._dynamo.reset()
    assert train("--data", colours, *SMALL, *QUIET, "--compile", "--epochs", 1, "--output", "out") == 2
    assert "train.py: error: --compile: " in capsys.readouterr().err


def test_every_way_to_learn_at_once(train, colours):
    """Each option that affects learning changes the loss or the weights, and the run still finishes."""
    base = ["--data", colours, "--epochs", 1, *SMALL, *QUIET]
    ways = {
        "plain": [],
        "ce": ["--loss", "ce", "--smoothing", 0.1],
        "mixed": ["--mixup", 0.4, "--cutmix", 1.0, "--smoothing", 0.1],
        "bf16": ["--mixed-precision", "bf16"],
        "uniform": ["--loss", "bce-uniform"],
        "clipped": ["--clip-grad", 0.01, "--opt", "sgd"],
        "clipped units": ["--agc", 0.01, "--opt", "sgd"],
        "average": ["--ema", 0.9],
        "accumulated": ["--grad-accum", 4],
        "sparse": ["--map-penalty", 3],
        "recomputed": ["--grad-checkpointing"],
        "on the device": ["--data-on-device"],
        "changed": ["--scale", 0.5, 1, "--ratio", 0.9, 1.1, "--color-jitter", 0.2, "--erase", 0.5, "--hflip", 0],
    }
    losses, updates = {}, {}
    for name, options in ways.items():
        assert train(*base, "--output", name, *options) == 0, name
        summary = json.loads(Path(name, "summary.json").read_text())
        losses[name], updates[name] = summary["train_loss"], summary["curve"][-1][0]
    assert len(set(losses.values())) == len(ways) - 2
    assert losses["average"] == losses["plain"] == losses["recomputed"]
    assert abs(losses["sparse"] - losses["plain"]) > 1e-4
    assert updates == dict.fromkeys(ways, 9) | {"accumulated": 3}
    state = states.find_states("average/checkpoints")[-1]
    weights, average = load_file(state / "model.safetensors"), load_file("average/model.safetensors")
    assert not torch.equal(weights["head.up.weight"], average["head.up.weight"]), "averaged weights are published"
    plain = states.find_states("plain/checkpoints")[-1]
    assert_equal(load_file(plain / "model.safetensors"), load_file("plain/model.safetensors"))


def test_a_model_that_cannot_explain_itself(train, colours, capsys):
    options = ["--model", "test_resnet", "--img-size", 32, "--batch-size", 8, "--workers", 0, "--epochs", 1]
    assert train("--data", colours, "--output", "out", *options) == 0
    assert "note: ResNet cannot explain itself" in capsys.readouterr().out
    assert not Path("out/explanation.png").exists()
    assert timm.create_model("local-dir:out", pretrained=True).num_classes == 3


def test_the_same_seed_gives_the_same_weights_whatever_the_workers(train, colours):
    base = ["--data", colours, "--epochs", 2, *SMALL, *QUIET, "--hflip", 0.5, "--scale", 0.5, 1, "--mixup", 0.2]
    assert train(*base, "--output", "one") == 0
    torch.rand(5), np.random.rand(5)
    assert train(*base, "--output", "two", "--workers", 2) == 0
    assert_same_run(Path("one"), Path("two"))


def test_workers_that_are_spawned(train, colours, tmp_path):
    """As on macOS and Windows: each worker is a new interpreter, which imports train.py but must not run it."""
    code = "import multiprocessing; multiprocessing.set_start_method('spawn'); open('started', 'a').write('x')"
    (tmp_path / "sitecustomize.py").write_text(code)
    base = ["--data", colours, "--epochs", 1, *SMALL, *QUIET]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    run = start(*base, "--output", "two", "--workers", 1, cwd=tmp_path, environment={"PYTHONPATH": path}, fresh=True)
    assert train(*base, "--output", "one") == 0
    finish(run)
    assert len(Path("started").read_text()) >= 3, "the program, and a worker for each split"
    assert_same_run(Path("one"), Path("two"))


def test_killed_and_resumed_is_as_never_killed(colours, tmp_path):
    """SIGKILL twice, at random moments between and during saves; the number of workers differs before and after."""
    options = ["--data", colours, *SMALL, *QUIET, "--epochs", 5, "--save-every", 1, "--log-every", 4, "--grad-accum", 2]
    options += ["--mixup", 0.3, "--ema", 0.9, "--sched", "cosine", "--warmup-epochs", 1, "--opt", "adamw"]
    whole = start(*options, "--output", "whole", cwd=tmp_path)
    killed = start(*options, "--output", "killed", "--workers", 1, cwd=tmp_path)
    moments = sorted(int.from_bytes(os.urandom(2), "big") % 22 + 1 for _ in range(2))
    for moment in moments:
        wait_for_state(killed, tmp_path / "killed", moment)
        time.sleep(int.from_bytes(os.urandom(1), "big") / 5000)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        assert killed.returncode == -signal.SIGKILL
        killed = start("--resume", "killed", "--workers", 0, cwd=tmp_path)
    out, err = killed.communicate(timeout=120)
    assert killed.returncode == 0 and "resuming killed after update" in out, (moments, err)
    _, err = whole.communicate(timeout=120)
    assert whole.returncode == 0, err
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").rglob(".saving*"))


def test_two_runs_do_not_share_a_folder(train, colours, tmp_path, capsys):
    """Without --output, runs that start together get folders of their own; a folder in use is refused to all others."""
    options = ["--data", colours, *SMALL, *QUIET]
    both = [start(*options, "--epochs", 2, "--lr", 0.001 * (1 + number), cwd=tmp_path) for number in range(2)]
    printed = [finish(run) for run in both]
    assert sorted(os.listdir("runs")) == ["coda_net_xs", "coda_net_xs-2"]
    for folder in Path("runs").iterdir():
        summary = json.loads((folder / "summary.json").read_text())
        (number,) = [number for number, said in enumerate(printed) if f"results go to {folder}\n" in said]
        assert summary["options"]["lr"] == 0.001 * (1 + number)
        assert yaml.safe_load((folder / "recipe.yaml").read_text())["lr"] == summary["options"]["lr"]

    run = start(*options, "--epochs", 99, "--output", "run", "--workers", 1, cwd=tmp_path)
    wait_for_state(run, tmp_path / "run", 1)
    before = (tmp_path / "run/recipe.yaml").read_bytes()
    for words in (["--resume", "run"], [*options, "--output", "run", "--overwrite"], [*options, "--output", "run"]):
        capsys.readouterr()
        assert train(*words) == 2
        assert f"train.py: error: another run writes into run (process {run.pid} on " in capsys.readouterr().err
    assert (tmp_path / "run/recipe.yaml").read_bytes() == before
    run.kill()
    run.communicate()
    assert train("--resume", "run", "--epochs", 98) == 2, "free at once, although the killed run's worker may live on"
    assert "cannot resume with changed options" in capsys.readouterr().err


def test_stopped_then_a_full_disk_then_resumed(colours, tmp_path):
    options = ["--data", colours, *SMALL, *QUIET, "--epochs", 8]
    whole = start(*options, "--output", "whole", cwd=tmp_path)
    run = start(*options, "--output", "run", "--save-every", 1, cwd=tmp_path)
    wait_for_state(run, tmp_path / "run", 10)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and not err
    assert out.splitlines()[-1] == "stopped and saved; resume with: python train.py --resume run"
    before = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    assert tmp_path / "run/model.safetensors" in before

    # No file may exceed 20 kB, as if the disk became full while the weights are written.
    limit = resource.RLIMIT_FSIZE, (20_000, 20_000)
    run = start("--resume", "run", cwd=tmp_path, preexec_fn=lambda: resource.setrlimit(*limit))
    out, err = run.communicate(timeout=60)
    assert run.returncode == 1, err
    assert "Traceback" not in err and "could not be saved" in err and "File too large" in err
    after = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    assert after == before

    run = start("--resume", "run", cwd=tmp_path)
    for process in (run, whole):
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_resuming_with_other_options(train, colours, capsys, tmp_path):
    options = ["--data", colours, *SMALL, *QUIET, "--epochs", 2, "--output", "out"]
    assert train(*options, "--resume", "auto") == 0  # nothing to resume: starts
    os.remove("out/summary.json")  # as if killed just before the end
    assert train(*options, "--resume", "auto", "--workers", 1) == 0
    os.remove("out/summary.json")
    capsys.readouterr()
    assert train("--resume", "out", "--lr", 1, "--batch-size", 4) == 2
    assert "with changed options, restore them: batch_size was 8, is 4; lr was 0.003, is 1.0" in capsys.readouterr().err
    (states.find_states("out/checkpoints")[-1] / "model.safetensors").write_bytes(b"broken")
    assert train("--resume", "out") == 2
    assert "cannot be read" in capsys.readouterr().err


def write_folders(names: Sequence[str], *, train_images: int = 8) -> None:
    """Write an image folder with these classes, always with the same images."""
    shutil.rmtree("in", ignore_errors=True)
    for split, count in (("train", train_images), ("test", 4)):
        rng = np.random.default_rng(0)
        for label, name in enumerate(names):
            Path("in", split, name).mkdir(parents=True)
            for number in range(count):
                Path("in", split, name, f"{number}.png").write_bytes(image_file(rng, label % 3))


def test_resuming_with_other_data(train, capsys):
    write_folders(["ant", "bee", "cow"])
    assert train("--data", "in", *SMALL, *QUIET, "--epochs", 1, "--output", "out") == 0
    os.remove("out/summary.json")  # as if killed just before the end
    for names, count, said in (
        (["ant", "bee", "dog"], 8, "class 'cow' is now 'dog'"),
        (["ant", "bee", "cow"], 4, "training images were 24, are 12"),
        (["ant", "bee", "cow", "dog"], 8, "classes new: 'dog'; training images were 24, are 32"),
    ):
        write_folders(names, train_images=count)
        assert train("--resume", "out") == 2
        error = capsys.readouterr().err
        assert f"cannot resume with changed data: {said}" in error
        assert error.endswith("start a new run from the weights so far: --model local-dir:out --pretrained\n")
    write_folders(["ant", "bee", "cow"])
    assert train("--resume", "out") == 0


def test_a_pretrained_classifier_of_other_classes_is_replaced(train, capsys):
    """The README promises a new classifier, unless the dataset has the classes of the pretrained one."""
    write_folders(["ant", "bee"])
    options = ["--data", "in", *SMALL, *QUIET, "--epochs", 1, "--lr", 0]
    assert train(*options, "--output", "first", "--lr", 0.003) == 0
    weights = load_file("first/model.safetensors")
    capsys.readouterr()
    options[options.index("coda_net_xs")] = "local-dir:first"
    for names, said in (
        (["ant", "bee"], "the pretrained classifier is kept: its classes are the same"),
        (["ant", "zebra"], "the classifier is new: the pretrained one is for 2 other classes, ant, bee"),
    ):
        write_folders(names)
        assert train(*options, "--pretrained", "--output", said[:16]) == 0
        assert f"note: {said}\n" in capsys.readouterr().out
        assert said in json.loads(Path(said[:16], "summary.json").read_text())["notes"]
        tuned = load_file(f"{said[:16]}/model.safetensors")
        same = {name for name, value in tuned.items() if torch.equal(value, weights[name])}
        assert same == {name for name in weights if "kept" in said or not name.startswith("head.")}


def test_broken_images_do_not_stop_a_run(train, colours, tmp_path, capsys):
    rng = np.random.default_rng(1)
    rows = {"image": [], "label": []}
    for row in range(24):
        whole = image_file(rng, row % 3)
        rows["image"].append({"bytes": whole if row >= 9 else whole[:60], "path": f"{row}.png"})
        rows["label"].append(row % 3)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
    for name in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(f"{name}.parquet")
    # Of the batches of two images, some have one readable image and some none. Mixup needs pairs.
    options = [
        "--data",
        "train.parquet",
        "test.parquet",
        *SMALL,
        *QUIET,
        "--batch-size",
        2,
        "--epochs",
        2,
        "--mixup",
        0.1,
    ]
    assert train(*options, "--output", "out") == 0
    summary = json.loads(Path("out/summary.json").read_text())
    assert sorted(summary["skipped"]) == sorted(f"{s} row {r} ({r}.png)" for s in ("train", "test") for r in range(9))
    assert all("Error" in reason for reason in summary["skipped"].values())
    assert all(np.isfinite(loss) for _, loss in summary["curve"])
    out = capsys.readouterr().out
    assert out.count("skipped train row 3 (3.png)") == 1
    assert "18 images could not be read" in out


def test_a_loss_that_is_no_number(train, colours, capsys):
    options = ["--data", colours, *SMALL, *QUIET, "--output", "out", "--opt", "sgd", "--lr", "1e38", "--epochs", 2]
    assert train(*options, "--save-every", 1) == 1
    err = capsys.readouterr().err
    assert "the loss is nan at update" in err and "--lr" in err and "--clip-grad" in err
    assert not Path("out/summary.json").exists() and not states.find_states("out/checkpoints")


def test_trackers_get_numbers_and_pictures(train, colours):
    from accelerate.tracking import register_tracker_class  # not in the lowest version

    calls = []

    class Notebook(GeneralTracker):
        name = "notebook"
        requires_logging_directory = False

        def __init__(self, run_name: str):
            super().__init__()

        @property
        def tracker(self):
            return calls

        @on_main_process
        def store_init_configuration(self, values):
            calls.append(("options", values, None))

        @on_main_process
        def log(self, values, step=None):
            calls.append(("numbers", values, step))

        @on_main_process
        def log_images(self, values, step=None):
            calls.append(("pictures", values, step))

    register_tracker_class(Notebook)
    options = ["--data", colours, *SMALL, "--explain-images", 1, "--explain-every", 1, "--epochs", 1, "--output", "out"]
    assert train(*options, "--report-to", "notebook") == 0
    kinds = [kind for kind, _, _ in calls]
    assert kinds[0] == "options" and calls[0][1]["lr"] == "0.003"
    numbers = {name: step for kind, values, step in calls if kind == "numbers" for name in values}
    assert numbers == dict.fromkeys(("train_loss", "train_accuracy", "lr", "test_loss", "test_accuracy"), 9)
    pictures = [values["explanation"] for kind, values, _ in calls if kind == "pictures"]
    assert len(pictures) == 2 and pictures[0].ndim == 4 and pictures[0].dtype == np.uint8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "/nowhere/at/all"], "nothing found at '/nowhere/at/all'"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml"),
        (["--model", "coda_net_xss"], "timm has no model 'coda_net_xss': did you mean"),
        (["--model-args", "temperature=3"], "temperature=3: .*unexpected keyword"),
        (["--img-size", "2"], "the model does not accept images of shape 3x2x2"),
        (["--num-classes", "2"], "has the label 'red' .* the 2 classes are numbered 0 to 1"),
        (["--label-column", "colour"], "--label-column colour: no such column"),
        (["--batch-size", "100"], "--batch-size 100 x 1 processes exceeds 72 images"),
        (["--opt", "adamantium"], "--opt.*adamantium"),
        (["--interpolation", "cubist"], "--interpolation.*cubist"),
        (["--auto-augment", "rand-x9"], "--crop-pct or an augmentation"),
        (["--data-on-device", "--erase", "0.5"], "--data-on-device only shifts and flips .* or leave out --erase 0.5"),
        (["--hold-out", "72"], "--hold-out 72: there are only 72 training images"),
        (["--streaming"], "nothing found at .*: no parquet file"),
        (["--map-penalty", "1", "--mixup", "0.1"], "--map-penalty: it needs one class per image"),
        (["--report-to", "tensorboad"], "--report-to tensorboad"),
        (["--resume", "nowhere"], "--resume nowhere: no run found"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input(train, colours, capsys, options, message):
    base = [] if {"--config", "--resume"} & set(options) else ["--data", colours, *SMALL, *QUIET]
    base += [] if "--resume" in options else ["--output", "out", "--epochs", "1"]
    assert train(*base, *options) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert err.startswith("train.py: error: ")
    assert re.search(message, err), err
    assert not Path("out").exists(), "nothing is written before the input has been checked"


def test_images_outside_the_models_range(train, colours, capsys):
    model = timm.create_model("coda_net_xs", num_classes=3, rank=2)
    hub.save_model(model, "normalised", data_config={"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3})
    assert train("--data", colours, "--model", "local-dir:normalised", "--output", "out", "--workers", 0) == 2
    assert "image values range from -1.00 to" in capsys.readouterr().err


@pytest.mark.parametrize("launched", [False, True], ids=["option", "launcher"])
def test_float16_on_a_cpu(train, colours, capsys, monkeypatch, launched):
    """Accelerate would train in float32 without a word."""
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    options = [] if launched else ["--mixed-precision", "fp16"]
    assert train("--data", colours, *SMALL, *QUIET, "--output", "out", *options) == 2
    assert "--mixed-precision fp16 is not supported on a cpu: use bf16 or no" in capsys.readouterr().err
    assert not Path("out").exists()


def test_the_summary_has_the_precision_that_the_launcher_chose(train, colours, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert train("--data", colours, *SMALL, *QUIET, "--epochs", 1, "--output", "out") == 0
    assert json.loads(Path("out/summary.json").read_text())["mixed_precision"] == "bf16"


@pytest.mark.parametrize(
    ("option", "least"), [("--batch-size", 1), ("--epochs", 1), ("--seed", 0), ("--grad-accum", 1)]
)
def test_numbers_that_are_too_small(train, capsys, option, least):
    with pytest.raises(SystemExit, match="2"):
        train("--data", "digits", option, least - 1)
    assert f"argument {option}: must be at least {least}, not {least - 1}" in capsys.readouterr().err


def test_help_teaches(train, capsys):
    with pytest.raises(SystemExit, match="0"):
        train("--help")
    out = capsys.readouterr().out
    assert "python train.py --resume" in out
    assert "(default: 0.00025)" in " ".join(out.split())


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the variables are for x86")
def test_bf16_is_float32_on_a_cpu_without_such_instructions(colours, tmp_path):
    """The recipe's optimiser Muon, too, which orthogonalises in bfloat16."""
    hidden = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    options = ["--data", colours, *SMALL, *QUIET, "--epochs", 1, "--opt", "muon", "--output", "out"]
    run = start(*options, "--mixed-precision", "bf16", cwd=tmp_path, environment=hidden, fresh=True)
    out = finish(run)
    assert (
        "this CPU has no bfloat16 instructions (products take" in out and "training in float32 instead of bf16" in out
    )
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["mixed_precision"], summary["options"]["mixed_precision"]) == ("no", "bf16")
