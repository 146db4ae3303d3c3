"""Upload and download with the real client and a local Hub server: complete, interrupted, rejected and damaged."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import ModelCard, constants, file_download
from PIL import Image
from safetensors.torch import load_file

from helpers import ROOT
from helpers.hub_server import HubServer
from timm_coda import CodaNet, cli, hub
from timm_coda.hub import remote
from timm_coda.training import runs

# httpx2 warns about a call in huggingface_hub
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
NAMES = ["cat", "dog", "eel"]
NEVER = 100  # number of faults: more than any client retries


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A folder as left by train.py: a model and its results, and files that must not be uploaded."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = timm.create_model("coda_net_xs.digits", num_classes=3, rank=2, logit_temperature=20.0)
    model.save_pretrained(folder, label_names=NAMES, data_config={"input_size": (3, 12, 12), "crop_pct": 0.9})
    summary = {"command": "train.py", "accuracy": 0.875, "test_images": 8, "options": {"data": ["digits"]}}
    summary["weights"] = hub.weights_fingerprint(model)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "recipe.yaml").write_text("epochs: 1\n")
    Image.new("RGB", (20, 10), "red").save(folder / "explanation.png")
    (folder / "checkpoints").mkdir()
    for name in ("checkpoints/optimizer.bin", "notes.txt", "old.pkl"):
        (folder / name).write_bytes(b"mine")
    return folder


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A local Hub for this process. `time.sleep` does nothing, so that retries take no time."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)  # before 1.0
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "hf_ada")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server
        close = getattr(huggingface_hub, "close_session", None) or huggingface_hub.utils.reset_sessions  # before 1.0
        close()


def push(*words: object) -> int:
    return cli.main(["push", *map(str, words)])


def start(code: str, environment: dict[str, str], *words: object) -> str:
    """Run Python code in a new process; return its stdout."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    variables |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *(["-c", code] if code else []), *map(str, words)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


LOAD_EVERYWHERE = """
import sys
import timm, timm_coda, torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

repo, picture, result = sys.argv[1:]
image = Image.open(picture)
network = timm.create_model(f"hf-hub:{repo}", pretrained=True).eval()
config = timm.data.resolve_model_data_config(network)
x = timm.data.create_transform(**config, is_training=False)(image)[None]
again = timm_coda.CodaNet.from_pretrained(repo)
auto = AutoModelForImageClassification.from_pretrained(repo).eval()
processed = AutoImageProcessor.from_pretrained(repo)(image)["pixel_values"]
classify = pipeline("image-classification", model=repo)
with torch.inference_mode():
    logits = {"timm": network(x), "from_pretrained": again(x), "auto": auto(x).logits}
    logits["processor"] = auto(processed).logits
scores = {row["label"]: row["score"] for row in classify(image, function_to_apply="none", top_k=3)}
logits["pipeline"] = torch.tensor([[scores[name] for name in network.pretrained_cfg["label_names"]]])
explanation = network.explain(image)
torch.save({"x": x, "logits": logits, "contributions": explanation.contributions,
            "residual": explanation.residual, "names": explanation.label_names,
            "auto_names": [auto.config.id2label[i] for i in range(3)]}, result)
"""


def test_push_then_load_everywhere_then_offline(run_folder, tmp_path):
    pytest.importorskip("transformers")
    picture = tmp_path / "image.png"
    Image.linear_gradient("L").convert("RGB").save(picture)
    with HubServer() as server:
        said = start("", server.environment(tmp_path / "pusher"), "-m", "timm_coda", "push", run_folder, "ada/pets")
        assert 'timm.create_model("hf-hub:ada/pets", pretrained=True)' in said
        words = ["ada/pets", picture]
        start(LOAD_EVERYWHERE, server.environment(tmp_path / "home", token=None), *words, tmp_path / "online.pt")
    offline = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.endpoint, "HF_HUB_OFFLINE": "1"}
    start(LOAD_EVERYWHERE, offline, *words, tmp_path / "offline.pt")

    model = CodaNet.from_pretrained(run_folder)
    for name in ("online.pt", "offline.pt"):
        seen = torch.load(tmp_path / name, weights_only=True)
        assert seen["x"].shape == (1, 3, 12, 12)
        with torch.inference_mode():
            expected = model(seen["x"])
        assert expected.std() > 0
        for route, logits in seen["logits"].items():
            assert torch.equal(logits, expected), (name, route)
        assert list(seen["names"]) == seen["auto_names"] == NAMES
        assert torch.equal(seen["contributions"], model.explain(seen["x"]).contributions)
        assert seen["residual"].abs().max() < 1e-5 * expected.abs().max()


def test_what_a_push_uploads(server, run_folder, capsys):
    assert push(run_folder, "pets", "--message", "First try", "--private", "--license", "mit") == 0
    said = capsys.readouterr().out
    repo, commit = server.repos["ada/pets"], server.head("ada/pets")
    assert repo.private and [made.title for made in repo.branches["main"]] == ["initial commit", "First try"]
    uploaded = {"config.json", "model.safetensors", "README.md", "explanation.png", "summary.json", "recipe.yaml"}
    assert set(commit.files) - {".gitattributes"} == uploaded
    for name in uploaded - {"README.md"}:
        assert commit.files[name].content == (run_folder / name).read_bytes()
    card = ModelCard(commit.files["README.md"].content.decode())
    assert card.data.eval_results[0].metric_value == 0.875
    assert (
        card.data.license == "mit"
        and "](explanation.png)" in card.text
        and 'create_model("hf-hub:ada/pets"' in card.text
    )
    assert f"{server.endpoint}/ada/pets/commit/{commit.oid}" in said and "model.safetensors" in said
    assert not (run_folder / "README.md").exists(), "nothing is left in the folder"

    assert push(run_folder, "ada/pets", "--license", "mit") == 0, "again"
    assert server.head("ada/pets") is commit, "nothing changed, so there is no new commit"


def test_a_model_pushes_itself_and_comes_back(server):
    model = timm.create_model("coda_net_xs.digits", num_classes=3, rank=2).eval()
    commit = model.push_to_hub("ada/tiny", label_names=NAMES)
    assert commit.oid == server.head("ada/tiny").oid
    assert set(server.head("ada/tiny").files) == {".gitattributes", "config.json", "model.safetensors", "README.md"}
    images = torch.rand(2, 3, 16, 16)
    for again in (CodaNet.from_pretrained("ada/tiny"), timm.create_model("hf-hub:ada/tiny", pretrained=True).eval()):
        assert torch.equal(again(images), model(images)) and again.pretrained_cfg["label_names"] == NAMES
    assert CodaNet.from_pretrained("ada/tiny", num_classes=5, local_files_only=True)(images).shape == (2, 5)
    features = timm.create_model("hf-hub:ada/tiny", pretrained=True, features_only=True).eval()(images)
    assert torch.equal(features[-1], model.forward_features(images))
    first = commit.oid
    timm.create_model("coda_net_xs.digits", num_classes=3, rank=2).push_to_hub("ada/tiny", commit_message="Second")
    assert torch.equal(CodaNet.from_pretrained("ada/tiny", revision=first)(images), model(images))
    assert not torch.equal(CodaNet.from_pretrained("ada/tiny")(images), model(images))


def test_branches_and_pull_requests(server, run_folder):
    server.add_repo("ada/pets")
    before = server.head("ada/pets")
    server.add_commit("ada/pets", "next", "a branch", dict(before.files))
    assert push(run_folder, "ada/pets", "--revision", "next") == 0
    hub.push_folder(run_folder, "ada/pets", create_pr=True)
    assert server.head("ada/pets") is before
    for branch in ("next", "refs/pr/1"):
        assert "model.safetensors" in server.head("ada/pets", branch).files
    assert isinstance(CodaNet.from_pretrained("ada/pets", revision="next"), CodaNet)
    server.fail("POST", "/commit/", "lost")
    with pytest.raises(hub.HubError, match="cannot be reached for ada/pets"):
        hub.push_folder(run_folder, "ada/pets", create_pr=True)
    assert "refs/pr/3" not in server.repos["ada/pets"].branches, "no second request for one that was opened already"


@pytest.mark.parametrize("kind", ["drop", "lost", 503])
@pytest.mark.parametrize(
    ("method", "route"),
    [
        ("GET", "whoami"),
        ("POST", "create"),
        ("POST", "preupload"),
        ("POST", "batch"),
        ("PUT", "/lfs/"),
        ("POST", "/commit/"),
    ],
    ids=lambda value: value.strip("/"),
)
def test_what_passes_is_tried_again(server, run_folder, caplog, method, route, kind):
    server.fail(method, route, kind)
    assert push(run_folder, "ada/pets") == 0
    assert any(word in caplog.text.lower() for word in ("trying again", "retrying")), "somebody says so"
    assert [commit.title for commit in server.repos["ada/pets"].branches["main"]] == ["initial commit", "Upload model"]
    assert len(server.head("ada/pets").files) == 7


@pytest.mark.parametrize("route", ["preupload", "/lfs/", "/commit/"])
def test_what_does_not_pass_changes_nothing_and_goes_on_later(server, run_folder, capsys, route):
    server.add_repo("ada/pets", {"README.md": b"old"})
    before = server.head("ada/pets")
    server.fail("PUT" if route == "/lfs/" else "POST", route, 503, times=NEVER)
    assert push(run_folder, "ada/pets") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"timm-coda: error: the Hub ({server.endpoint}) cannot be reached for ada/pets")
    # huggingface_hub before 1.0 drops the Hub's message for an upload of weights.
    assert ("503 switched on in the test" in error or "503 Serv" in error) and "again later" in error
    assert server.head("ada/pets") is before

    server.faults.clear()
    uploads = server.count("PUT", "/lfs/")
    assert push(run_folder, "ada/pets") == 0
    assert server.count("PUT", "/lfs/") - uploads == (0 if route == "/commit/" else 2), (
        "what is there is not sent again"
    )
    assert [commit.title for commit in server.repos["ada/pets"].branches["main"]][1:] == ["Upload model"]


@pytest.mark.parametrize(
    ("words", "token", "message"),
    [
        (["ada/pets"], "hf_wrong-token", "does not accept the token hf_wro... for ada/pets (401 "),
        (["ada/pets"], None, "ada/pets: the token for the Hub"),
        (["bob/pets"], "hf_ada", "the token hf_ada... has no permission for this on bob/pets (403 You don't have the"),
        (["bob/taken"], "hf_ada", "the token hf_ada... has no permission for this on bob/taken (403 You don't have"),
        (["ada/pets", "--revision", "v9"], "hf_ada", "ada/pets has no revision 'v9': create it with `hf repos branc"),
        (["a/b/c"], "hf_ada", "'a/b/c' is not a valid repository id: Repo id must be in the form"),
        (["ada/pets!"], "hf_ada", "'ada/pets!' is not a valid repository id: Repo id must use alphanumeric"),
        (["ada/a--b"], "hf_ada", "'ada/a--b' is not a valid repository id: Cannot have -- or .."),
    ],
)
def test_refusals_are_one_line(server, run_folder, capsys, monkeypatch, words, token, message):
    server.add_repo("bob/taken")
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    assert push(run_folder, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("timm-coda: error: ") and message in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert "hf_wrong-token" not in error, "a secret is not printed whole"
    assert len(server.repos["bob/taken"].branches["main"]) == 1


def test_a_name_that_is_in_use(server, run_folder, capsys):
    server.fail("POST", "/commit/", 409, times=NEVER)
    assert push(run_folder, "ada/pets") == 2
    assert "reports that ada/pets is taken or in use (409 switched on" in capsys.readouterr().err


def test_bad_folders_are_not_pushed(server, run_folder, tmp_path, capsys):
    config = json.loads((run_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"label_names": NAMES[:2]}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert push(tmp_path, "ada/pets") == 2
    assert "2 label names for 3 classes" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert push(tmp_path, "ada/pets") == 2
    assert "pytorch_model.bin is a pickle" in capsys.readouterr().err
    assert push(tmp_path / "nothing", "ada/pets") == 2
    assert "nothing is not a model folder: it has no config.json" in capsys.readouterr().err
    assert server.log == []


def test_dry_run_shows_the_card_and_needs_no_hub(run_folder, capsys, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push(run_folder, "me/pets", "--dry-run") == 0
    said = capsys.readouterr().out
    assert f"{(run_folder / 'model.safetensors').stat().st_size:,}  model.safetensors" in said
    assert "checkpoints" not in said and "notes.txt" not in said
    assert 'create_model("hf-hub:me/pets"' in said and "87.50% of 8 test images" in said


def test_a_card_of_ones_own_stays(server, run_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((run_folder / name).read_bytes())
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert push(tmp_path, "ada/pets") == 0
    assert server.head("ada/pets").files["README.md"].content.endswith(b"# Mine\n")


def test_downloads_that_break_off_or_are_damaged(server, run_folder, caplog, tmp_path):
    hub.push_folder(run_folder, "ada/pets")
    weights, model = "resolve/.*/model.safetensors", CodaNet.from_pretrained(run_folder)
    images = torch.rand(2, 3, 12, 12)
    for number, kind in enumerate(("drop", 503, "damage")):
        caplog.clear()
        server.fail("HEAD" if kind == 503 else "GET", weights, kind)
        again = CodaNet.from_pretrained("ada/pets", cache_dir=tmp_path / str(number))
        assert torch.equal(again(images), model(images)), kind
    assert "ada/pets: model.safetensors is damaged (wrong checksum); downloading it again" in caplog.text

    server.fail("GET", weights, "damage", times=2)
    with pytest.raises(hub.HubError, match=r"model\.safetensors was damaged in both downloads \(wrong checksum\)"):
        CodaNet.from_pretrained("ada/pets", cache_dir=tmp_path / "damaged")
    kept = [path for path in (tmp_path / "damaged").rglob("*") if path.is_file() and path.stat().st_size > 100_000]
    assert kept == [], "nor would timm alone find it"
    again = CodaNet.from_pretrained("ada/pets", cache_dir=tmp_path / "damaged")
    assert torch.equal(again(images), model(images))


def test_a_push_between_config_and_weights(server, run_folder, monkeypatch):
    hub.push_folder(run_folder, "ada/pets")
    other = timm.create_model("coda_net_xs.digits", num_classes=2, rank=3)
    download = remote.hf_hub_download

    def slow_download(repo_id, name, **options):
        path = download(repo_id, name, **options)
        if name == "config.json" and len(server.repos["ada/pets"].branches["main"]) == 2:
            other.push_to_hub("ada/pets")
        return path

    monkeypatch.setattr(remote, "hf_hub_download", slow_download)
    assert CodaNet.from_pretrained("ada/pets").num_classes == 3
    assert CodaNet.from_pretrained("ada/pets").num_classes == 2


def test_models_that_are_not_there(server, run_folder, monkeypatch, tmp_path):
    server.add_repo("bob/secret", {"config.json": b"{}"}, private=True)
    server.add_repo("bob/gated", {"config.json": b"{}"})
    server.repos["bob/gated"].gated = True
    config = (run_folder / "config.json").read_bytes()
    server.add_repo("ada/pickle", {"config.json": config, "pytorch_model.bin": b"\x80\x02."})
    for name, options, message in (
        ("ada/none", {}, r"has no model 'ada/none'; if it is private, the token cannot access it"),
        ("bob/secret", {}, r"has no model 'bob/secret'; if it is private"),
        ("bob/gated", {}, r"bob/gated is gated \(403 .*: ask for access at http"),
        ("ada/pickle", {}, r"ada/pickle has no model\.safetensors; pickles such as pytorch_model\.bin can run code"),
        ("ada/pickle", {"revision": "v9"}, r"ada/pickle has no revision 'v9'"),
        ("ada/pickle", {"token": "hf_wrong"}, r"does not accept the token hf_wro\.\.\. for ada/pickle"),
        ("ada/pickle", {"local_files_only": True, "cache_dir": tmp_path / "empty"}, r"ada/pickle is not in the cache"),
    ):
        with pytest.raises(hub.HubError, match=message) as caught:
            CodaNet.from_pretrained(name, **options)
        assert "\n" not in str(caught.value)
    server.fail("HEAD", "config.json", 503, times=NEVER)
    with pytest.raises(hub.HubError, match=r"cannot be reached for ada/none, or responds with errors \(503 Serv"):
        CodaNet.from_pretrained("ada/none")


def test_without_a_network_the_error_says_what_to_do(server, run_folder, monkeypatch):
    hub.push_folder(run_folder, "ada/pets")
    server.fail("HEAD", "model.safetensors", 503, times=NEVER)  # timm has read config.json by then
    server.fail("HEAD", "pytorch_model.bin", 503, times=NEVER)
    remedy = r"put config\.json and model\.safetensors from another machine into a folder, and load local-dir:FOLDER"
    message = rf"cannot be reached for ada/pets, or responds with errors \(503 .*; or {remedy}$"
    overlay = {"pretrained_cfg_overlay": {"hf_hub_id": "ada/pets"}}
    for load in (
        lambda: timm.create_model("hf-hub:ada/pets", pretrained=True),
        lambda: timm.create_model("coda_net_xs", pretrained=True, **overlay),
        lambda: hub.load_model("hf-hub:ada/pets"),
        lambda: hub.create_model("hf-hub:ada/pets", num_classes=3, pretrained=True),
        lambda: CodaNet.from_pretrained("ada/pets"),
    ):
        with pytest.raises(hub.HubError, match=message):
            load()
    server.fail("HEAD", "config.json", 503, times=NEVER)
    with pytest.raises(hub.HubError, match=rf"^cannot load hf-hub:ada/pets: .*{message}"):
        hub.load_model("hf-hub:ada/pets")
    with pytest.raises(hub.HubError, match=r"timm has no model 'nothing'"):
        hub.load_model("nothing")


def test_a_full_disk_is_not_the_hubs_fault(server, run_folder, monkeypatch):
    hub.push_folder(run_folder, "ada/pets")

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote, "hf_hub_download", full_disk)
    with pytest.raises(hub.HubError, match=r"^ada/pets: \[Errno 28\] No space left on device$"):
        CodaNet.from_pretrained("ada/pets")


def test_train_publishes(server, tmp_path):
    options = ["--epochs", 1, "--model-args", "rank=2", "--explain-every", 0, "--output", tmp_path / "out"]
    said = start("", server.environment(tmp_path / "home"), ROOT / "train.py", *options, "--push-to-hub", "digits")
    commit = server.head("ada/digits")
    assert f"published: {server.endpoint}/ada/digits/commit/{commit.oid}" in said
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    card = ModelCard(commit.files["README.md"].content.decode())
    assert card.data.eval_results[0].metric_value == round(summary["accuracy"], 6)
    assert f"--output {tmp_path}/out --push-to-hub digits" in card.text and "recipe.yaml" in commit.files
    assert ("- commit of timm_coda: `" in card.text) == (ROOT / ".git").exists()
    assert (tmp_path / "out/recipe.yaml").read_text().count("push") == 0, "it belongs to the command, not to the run"


def test_a_run_that_cannot_be_published_stays_and_says_how(server, run_folder, capsys):
    server.fail("POST", "/commit/", 503, times=NEVER)
    later = f"the model was saved in {run_folder}, but not uploaded; retry with: timm-coda push {run_folder} ada/x: the"
    with pytest.raises(hub.HubError) as caught:
        runs.publish(run_folder, "ada/x")
    assert str(caught.value).startswith(later)
    runs.publish(run_folder, None)
    assert capsys.readouterr().out == ""
    with pytest.raises(hub.HubError, match="hf_wro"):
        hub.check_access("ada/x", token="hf_wrong")


def results_of(folder) -> set[str]:
    return {"summary.json", "explanation.png", "recipe.yaml"} & set(hub.files_to_push(folder, "ada/tiny"))


def test_results_of_other_weights_are_left_out(run_folder, tmp_path, capsys, caplog):
    """Saving another model into a finished run's folder leaves the old accuracy and figure there."""
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    everything = {"summary.json", "explanation.png", "recipe.yaml"}
    model = timm.create_model("coda_net_xs.digits", num_classes=3, rank=2, logit_temperature=20.0)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    images = torch.rand(1, 3, 12, 12)
    assert results_of(folder) == everything, "the figure is the user's own, and the summary fits"
    drawn = {"weights": hub.weights_fingerprint(model), "label_names": NAMES, "true_labels": [0]}
    runs.save_picture(model.eval().explain(images), folder / "explanation.png", **drawn)
    assert results_of(folder) == everything
    model.save_pretrained(folder, label_names=["ant", "bee", "cow"])  # the same weights
    assert results_of(folder) == everything and not caplog.text

    other = timm.create_model("coda_net_xs.digits", num_classes=5, rank=2)
    other.save_pretrained(folder, label_names=list("vwxyz"))
    assert results_of(folder) == set() and "left out: explanation.png, recipe.yaml, summary.json in" in caplog.text
    assert cli.main(["push", str(folder), "ada/tiny", "--dry-run"]) == 0
    card = capsys.readouterr().out
    assert "5 classes: v, w, x, y, z" in card and "87.5" not in card and "](explanation.png)" not in card

    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"weights": hub.weights_fingerprint(other)}))
    assert results_of(folder) == {"summary.json", "recipe.yaml"}, "the figure is of the first model"
    with torch.no_grad():
        next(other.parameters())[0] += 1e-6  # one more step of training
    other.save_pretrained(folder)
    assert results_of(folder) == set()


def test_fingerprints_of_weights(tmp_path):
    model = timm.create_model("bcos_resnet20", num_classes=2)
    found = hub.weights_fingerprint(model)
    model.save_pretrained(tmp_path)
    assert hub.weights_fingerprint(tmp_path / "model.safetensors") == found
    assert hub.weights_fingerprint(model.to(memory_format=torch.channels_last)) == found
    assert len({found, hub.weights_fingerprint(model.bfloat16()), hub.weights_fingerprint(model.half())}) == 3
