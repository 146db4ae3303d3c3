"""Files and folders that several processes write: temporary names, locks, kills at every step."""

import os
import platform
import signal
import time
from pathlib import Path

import pytest
import timm
import torch

from helpers.processes import Program
from timm_coda import hub
from timm_coda.explanation import remove_leftovers, temporary_path
from timm_coda.hub import writing

MODELS = """
import os, signal, sys, timm, timm_coda, torch
from pathlib import Path

def model(value, num_classes=2):
    made = timm.create_model("coda_net_xs", num_classes=num_classes, rank=1)
    for weight in made.state_dict().values():
        weight.fill_(value)
    made.pretrained_cfg |= {"num_classes": num_classes, "label_names": [f"{value}-{i}" for i in range(num_classes)]}
    return made
"""


def saved_value(model) -> int:
    """The number that MODELS' `model` was made with, according to its weights and to its names, which must agree."""
    (value,) = {weight.flatten()[0].item() for weight in model.state_dict().values() if weight.numel()}
    assert all(weight.eq(value).all() for weight in model.state_dict().values())
    assert model.pretrained_cfg["label_names"] == [f"{int(value)}-{i}" for i in range(model.num_classes)]
    return int(value)


def python(code: str, *arguments, cwd: Path) -> Program:
    return Program(["-c", code, *map(str, arguments)], cwd=cwd, environment={**os.environ})


def end(program: Program, code: int = 0) -> str:
    out, err = program.communicate(timeout=60)
    assert program.returncode == code, (program.returncode, out, err)
    return out + err


KILLED = """
def save(folder, steps):
    "Save a model and die before the step after `steps`: a step is a call that changes the folder."
    left = [steps]
    def dying(function):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call
    for name in ("mkdir", "open", "rename", "replace", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    new.save_pretrained(folder)
    os._exit(0)

old, new = model(1), model(2, num_classes=int(sys.argv[2]))
if sys.argv[1] == "same names":
    old.pretrained_cfg["label_names"] = new.pretrained_cfg["label_names"]
steps, status = 0, None
while status != 0:
    if sys.argv[1] != "nothing":
        old.save_pretrained(f"{steps}")
    child = os.fork()
    if child == 0:
        save(f"{steps}", steps)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    steps += 1
print(steps)
"""


@pytest.mark.parametrize(
    ("before", "classes"), [("another model", 2), ("another model", 3), ("same names", 2), ("nothing", 2)]
)
def test_a_save_is_killed_at_every_step(tmp_path, before, classes):
    steps = int(end(python(MODELS + KILLED, before, classes, cwd=tmp_path)))
    assert steps > 8
    values = []
    for step in range(steps):
        folder = tmp_path / str(step)
        if before == "same names":  # only the weights change: timm alone finds a whole model
            found = timm.create_model(f"local-dir:{folder}", pretrained=True)
            (value,) = {weight.flatten()[0].item() for weight in found.state_dict().values() if weight.numel()}
            values.append(int(value))
            continue
        if (folder / "config.json").exists() and (folder / "model.safetensors").exists():
            assert saved_value(timm.create_model(f"local-dir:{folder}", pretrained=True)) in (1, 2)
        if before == "nothing" and not (folder / "config.json").exists() and not (folder / ".saved").exists():
            with pytest.raises(ValueError, match=r"no such file|not a model folder|cannot load"):
                hub.load_model(f"local-dir:{folder}")
            continue
        values.append(saved_value(hub.load_model(str(folder))))
        assert not (folder / ".saved").exists(), "finished by whoever loads it"
    assert values == sorted(values) and values[-1] == 2, "first the old model, then the new one"
    assert values[0] == (2 if before == "nothing" else 1)
    for step in range(steps):  # the next save works and leaves nothing behind
        model = hub.create_model("coda_net_xs", num_classes=2, model_args=["rank=1"])
        hub.save_model(model, tmp_path / str(step), label_names=["a", "b"])
        assert sorted(os.listdir(tmp_path / str(step))) == ["config.json", "model.safetensors"]


def test_two_processes_save_into_one_folder(tmp_path):
    """Both wait for each other, and whoever reads meanwhile finds a whole model."""
    code = """
import time
mine = model(int(sys.argv[1]))
for round in range(10):
    Path(f"{round}-{sys.argv[1]}").touch()
    while not (Path(f"{round}-1").exists() and Path(f"{round}-2").exists()):
        time.sleep(1e-4)
    for _ in range(3):
        mine.save_pretrained(f"folder-{round}")
"""
    both = [python(MODELS + code, number, cwd=tmp_path) for number in (1, 2)]
    read = 0
    while any(program.poll() is None for program in both):
        for folder in tmp_path.glob("folder-*"):
            if (folder / "config.json").exists():
                assert saved_value(hub.load_model(f"local-dir:{folder}")) in (1, 2)
                read += 1
    assert [end(program) for program in both] == ["", ""]
    assert read
    for folder in tmp_path.glob("folder-*"):
        assert saved_value(timm.create_model(f"local-dir:{folder}", pretrained=True)) in (1, 2)
        assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_a_lock_is_held_by_one_and_released_by_a_kill(tmp_path):
    """A worker that outlives the killed process, as those of a data loader do for seconds, does not hold the lock."""
    code = """
import os, time
from pathlib import Path
from timm_coda.hub import claimed
with claimed(Path("run")):
    if os.fork():
        Path("claimed").touch()
    time.sleep(60)
"""
    holder = python(code, cwd=tmp_path)
    try:
        while not (tmp_path / "claimed").exists():
            assert holder.poll() is None
        message = rf"another run writes into .*run \(process {holder.pid} on {platform.node()}\): choose another folder"
        with pytest.raises(hub.HubError, match=message), hub.claimed(tmp_path / "run"):
            pass
        with hub.claimed(tmp_path / "run", new=True) as other:
            assert other.name == "run-2"
        assert not other.exists(), "it was created here, and is empty"
        (tmp_path / "run/a.txt").touch()
        holder.kill()
        end(holder, -signal.SIGKILL)
        with hub.claimed(tmp_path / "run"):
            assert sorted(os.listdir(tmp_path / "run")) == [hub.RUNNING, "a.txt"]
        assert os.listdir(tmp_path / "run") == ["a.txt"]
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_a_lock_is_waited_for(tmp_path):
    code = """
import sys
from pathlib import Path
from timm_coda.hub.writing import locked
for _ in range(200):
    with locked(Path("lock")):
        number = int(Path("count").read_text())
        Path("count").write_text(str(number + 1))
"""
    (tmp_path / "count").write_text("0")
    for program in [python(code, cwd=tmp_path) for _ in range(3)]:
        end(program)
    assert (tmp_path / "count").read_text() == "600"
    assert os.listdir(tmp_path) == ["count"]


def test_new_folders_are_not_shared(tmp_path):
    code = """
import time
from pathlib import Path
from timm_coda.hub import claimed
while not Path("go").exists():
    pass
for _ in range(5):
    with claimed(Path("runs/net"), new=True) as folder:
        Path(folder, "mine").touch(exist_ok=False)
"""
    programs = [python(code, cwd=tmp_path) for _ in range(2)]
    (tmp_path / "go").touch()
    for program in programs:
        end(program)
    assert sorted(os.listdir(tmp_path / "runs")) == sorted(["net", *(f"net-{number}" for number in range(2, 11))])


def test_leftovers_of_killed_processes(tmp_path):
    gone = int(end(python("import os; print(os.getpid())", cwd=tmp_path)))
    mine, other = temporary_path(tmp_path, ".npz"), temporary_path(tmp_path)
    dead = [mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{gone}-")), tmp_path / f"{other.name}0"]
    dead[1] = other.with_name(other.name.replace(f"-{os.getpid()}-", f"-{gone}-"))
    elsewhere = tmp_path / f".saving-00000000-{gone}-00000000.png"
    old = tmp_path / ".saving-00000000-1-00000000"
    for file in (mine, dead[0], elsewhere):
        file.touch()
    for folder in (other, dead[1], old):
        folder.mkdir()
        (folder / "weights").touch()
    for path in (old / "weights", old):
        os.utime(path, (time.time() - 90_000,) * 2)
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {mine, other, elsewhere}


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    (tmp_path / "a.npz").write_text("old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*a\.npz'") as error,
        hub.replacing(tmp_path / "a.npz"),
    ):
        pass
    assert error.value.errno == 28
    with pytest.raises(hub.SaveError, match=r"a\.npz could not be written: .*No space left"):
        hub.write_text(tmp_path / "a.npz", "new")
    assert os.listdir(tmp_path) == ["a.npz"] and (tmp_path / "a.npz").read_text() == "old"


def test_where_files_cannot_be_locked(tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(writing.fcntl, "flock", unsupported)
    with hub.claimed(tmp_path / "run"), hub.claimed(tmp_path / "run"):
        assert os.listdir(tmp_path / "run") == []


def test_a_push_uploads_one_model(tmp_path):
    """What `push_folder` uploads is a picture of the folder: a save in between changes nothing in it."""
    from timm_coda.hub.folder import unchanging

    make = {"num_classes": 2, "model_args": ["rank=1"]}
    hub.save_model(hub.create_model("coda_net_xs", **make), tmp_path / "a", label_names=["a", "b"])
    before = {name: (tmp_path / "a" / name).read_bytes() for name in ("config.json", "model.safetensors")}
    with unchanging(tmp_path / "a", ["config.json", "model.safetensors", "summary.json"]) as still:
        hub.save_model(hub.create_model("coda_net_xs", **make), tmp_path / "a", label_names=["c", "d"])
        assert {path.name: path.read_bytes() for path in still.iterdir()} == before
    assert torch.is_tensor(next(hub.load_model(str(tmp_path / "a")).parameters()))
    assert sorted(os.listdir(tmp_path / "a")) == ["config.json", "model.safetensors"]
