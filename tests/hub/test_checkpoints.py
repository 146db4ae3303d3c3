"""Loading published weights: the authors' format, failing downloads, other classes and colours, and `convert`.

Downloads come from a small local server, whose links look like the authors': all end in /download.
"""

import http.server
import json
import os
import pickle
import socket
import threading
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import golden
import timm_coda
from helpers import relative_error
from timm_coda import cli, hub
from timm_coda.hub import checkpoints
from timm_coda.models import coda_net

SMALL = {"rank": 2}


def authors_weights(model, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights with the keys and shapes of the authors' checkpoints."""
    random = torch.Generator().manual_seed(seed)
    layers = [module for module in model.modules() if isinstance(module, timm_coda.DAUConv2d)]
    weights = {}
    for i, layer in enumerate(layers):
        seen, units = layer.up.bias[0].numel(), layer.out_channels
        name = f"{i}.weight_mod.weighting_f"
        weights[f"{name}.0.weight"] = torch.randn(layer.down.weight.shape, generator=random)
        weights[f"{name}.1.weight"] = torch.randn(seen * units, layer.rank, 1, 1, generator=random)
        weights[f"{name}.1.bias"] = torch.randn(seen * units, generator=random)
    return weights


def assert_converted(model, authors) -> None:
    """Compare single indices: row k D + d of the authors' second map is input k of unit d."""
    layers = [module for module in model.modules() if isinstance(module, timm_coda.DAUConv2d)]
    assert len(layers) * 3 == len(authors)
    for i, layer in enumerate(layers):
        down, up, bias = (authors[f"{i}.weight_mod.weighting_f.{part}"] for part in ("0.weight", "1.weight", "1.bias"))
        assert torch.equal(layer.down.weight, down)
        units, (channels, rows, columns) = layer.out_channels, layer.up.bias.shape[1:]
        for d, j, c, h, w in ((0, 0, 0, 0, 0), (units - 1, 1, channels - 1, rows - 1, 0), (1, 0, 2, 0, columns - 1)):
            k = (c * rows + h) * columns + w
            assert layer.up.weight[d * layer.rank + j, c, h, w] == up[k * units + d, j, 0, 0]
            assert layer.up.bias[d, c, h, w] == bias[k * units + d]


@pytest.mark.parametrize("case", golden.CODA_NETS)
def test_golden_numbers_through_the_command(case, tmp_path, capsys):
    name, arguments = golden.CODA_NETS[case]
    published = {f"module.{key}": value for key, value in golden.state_dict(case).items()}
    torch.save({"state_dict": published, "epoch": 200}, tmp_path / "authors.pt")
    more = [f"{key}={value}" for key, value in arguments.items()]
    more = ["--model-args", *more] if more else []
    assert cli.main(["convert", f"{tmp_path}/authors.pt", "--model", name, "--output", f"{tmp_path}/out", *more]) == 0
    model = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).double().eval()
    explanation = model.explain(golden.inputs(case), golden.targets(case))
    bias = model.logits.bias
    assert relative_error(explanation.logits - bias, golden.logits(case) - bias) < 1e-9
    assert golden.error(case, "contributions", explanation.contributions) < 1e-9


@pytest.mark.parametrize("suffix", [".pt", ".pth.tar", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapping", [None, "state_dict", "model"])
def test_authors_format_however_it_is_wrapped(wrapping, prefix, suffix, tmp_path):
    weights = authors_weights(timm.create_model("coda_net_s", **SMALL))
    checkpoint = {prefix + key: value for key, value in weights.items()}
    plain = timm.create_model("coda_net_s", **SMALL)
    wrapped = checkpoint if wrapping is None else {wrapping: checkpoint, "epoch": 3}
    plain.load_state_dict(coda_net.checkpoint_filter_fn(wrapped, plain))
    assert_converted(plain, weights)
    assert set(wrapped) == (set(checkpoint) if wrapping is None else {wrapping, "epoch"}), "the caller's is untouched"
    if suffix == ".safetensors" and wrapping:
        return
    file = tmp_path / f"checkpoint{suffix}"
    if suffix == ".safetensors":
        save_file(checkpoint, file)
    else:
        torch.save(wrapped, file, _use_new_zipfile_serialization=suffix == ".pt")
    overlay = {"file": str(file)}
    model = timm.create_model("coda_net_s", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
    assert_converted(model, weights)


class Server(http.server.ThreadingHTTPServer):
    """Send `files[path]`: 404 if it is missing, and only the first half if the path is in `broken`."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.broken: set[str] = set()
        self.requests: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler):
                self.requests.append(handler.path)
                body = self.files.get(handler.path.split("?")[0])
                if body is None:
                    return handler.send_error(404)
                handler.send_response(200)
                handler.send_header("Content-Length", str(len(body)))
                handler.end_headers()
                handler.wfile.write(body[: len(body) // 2] if handler.path in self.broken else body)

            def log_message(handler, *args):
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    def url(self, token: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/index.php/s/{token}/download"

    def put(self, token: str, content, *, broken: bool = False, folder: Path) -> str:
        if not isinstance(content, bytes):
            torch.save(content, folder / "content")
            content = (folder / "content").read_bytes()
            (folder / "content").unlink()
        path = f"/index.php/s/{token}/download"
        self.files[path] = content
        self.broken |= {path} if broken else set()
        return self.url(token)


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    checkpoints._note_licence.cache_clear()
    return tmp_path / "torch" / "checkpoints"


def create(name: str, url: str, **arguments):
    """Create a pretrained model with its tag's own configuration, except for the link."""
    overlay = {"url": (url, timm.get_pretrained_cfg_value(name, "url")[1])}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **SMALL | arguments)


def test_download_of_the_authors_weights(server, cache, tmp_path, caplog):
    layout = timm.create_model("coda_net_s", **SMALL)
    names = [name for name in timm.list_pretrained("coda_net_*") if ".mpi_" in name]
    links = {name: timm.get_pretrained_cfg_value(name, "url") for name in names}
    assert len({url for url, _ in links.values()}) == len({file for _, file in links.values()}) == len(names) == 7
    weights = {}
    for seed, name in enumerate(("coda_net_s.mpi_t10_cifar10", "coda_net_s.mpi_t50_cifar10")):
        weights[name] = authors_weights(layout, seed)
        url = server.put(f"token{seed}", weights[name], folder=tmp_path)
        for _ in range(2):  # the second time from the cache
            model = create(name, url)
            assert_converted(model, weights[name])
            assert f"mpi_t{model.logits.temperature:g}_cifar10" in name
            assert model.pretrained_cfg["license"] == "non-commercial-research"
    assert len(server.requests) == 2
    assert sorted(os.listdir(cache)) == [f"{name}.pt" for name in sorted(weights)]
    notes = [record.message for record in caplog.records if "non-commercial" in record.message]
    assert [note.split(":")[0] for note in notes] == list(weights), "once each"

    (cache / f"{name}.pt").write_bytes(b"half a file")
    assert_converted(create(name, url), weights[name])
    assert len(server.requests) == 3, "a damaged copy is replaced"
    elsewhere = tmp_path / "elsewhere"
    create(name, url, cache_dir=elsewhere)
    assert os.listdir(elsewhere) == [f"{name}.pt"]
    tuned = create(name, url, num_classes=3, in_chans=1)
    assert tuned(torch.rand(1, 1, 8, 8)).shape == (1, 3)
    assert relative_error(tuned.stages[1][0].up.weight, model.stages[1][0].up.weight) == 0
    folder = hub.save_model(tuned, tmp_path / "tuned")
    text = (folder / "config.json").read_text()
    assert json.loads(text)["pretrained_cfg"]["license"] == "non-commercial-research"
    assert str(tmp_path) not in text and "127.0.0.1" not in text


class Harm:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


PAGE = b"<!DOCTYPE html><html><title>Share not found</title>" + bytes(10_000)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gone", r"HTTP Error 404"),
        ("no network", r"cannot download http://127\.0\.0\.1:\d+/.*refused"),
        ("dropped", r"the connection broke after [\d,]+ of [\d,]+ bytes"),
        ("page", r"is a web page, not a checkpoint"),
        ("code", r"holds more than weights \((posix|os)\.mkdir\).*was not loaded"),
        ("noise", r"cannot be read as a checkpoint"),
        ("no weights", r"holds more than weights: epoch is 3"),
        ("empty", r"holds no weights"),
        (
            "other network",
            r"missing: stages\.0\.0\.down\.weight, .* and 25 more; only in the checkpoint: 0\.conv\.weight\.",
        ),
    ],
)
def test_downloads_that_fail(kind, message, server, cache, tmp_path):
    weights = authors_weights(timm.create_model("coda_net_s", **SMALL))
    content = {
        "dropped": weights,
        "page": PAGE,
        "code": {"state_dict": weights, "more": Harm(tmp_path / "harm")},
        "noise": b"PK\x03\x04 noise" * 99,
        "no weights": {"epoch": 3},
        "empty": {},
        "other network": {"0.conv.weight": torch.ones(3)},
    }
    if kind in content:
        server.put("token", content[kind], broken=kind == "dropped", folder=tmp_path)
    url = server.url("token")
    if kind == "no network":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}/download"
    with pytest.raises(checkpoints.ConvertError, match=message) as error:
        create("coda_net_s.mpi_t1000_cifar10", url)
    assert not (tmp_path / "harm").exists()
    if kind != "other network":  # that file is complete, so it stays in the cache
        assert url in str(error.value)
        assert "timm-coda convert FILE --model coda_net_s.mpi_t1000_cifar10 --output FOLDER" in str(error.value)
        assert "\n" not in str(error.value)
        assert os.listdir(cache) == [], "nothing is left behind"


@pytest.mark.parametrize("name", ["bcos_resnet18", "vit_tiny_patch16_bcos_224.v2_in1k", "bcos_vgg11"])
def test_a_plain_link_without_a_network(name, cache):
    """Links that timm would download itself name the file and what to do, like the authors' share."""
    model = timm.get_pretrained_cfg(name)
    end = model.url.rsplit("/", 1)[1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/{end}"
    with pytest.raises(hub.HubError) as error:
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"url": url})
    full = f"{name.split('.')[0]}.v2_in1k"
    assert str(error.value) == (
        f"{full}: cannot download {url}: [Errno 111] Connection refused; if you have the file, convert it: timm-coda "
        f"convert FILE --model {full} --output FOLDER, or load it with pretrained_cfg_overlay={{'file': FILE}}"
    )
    assert os.listdir(cache) == []


def test_every_download_is_our_own(cache, monkeypatch):
    """Each network with a link is asked for through `fetch`, whose errors say what to do; none through timm."""
    asked = []

    def no_network(url, filename, cache_dir):
        asked.append(url)
        raise checkpoints.ConvertError("no network")

    monkeypatch.setattr(checkpoints, "fetch", no_network)
    names = [name for name in timm.list_models(["coda*", "*bcos*"]) if timm.get_pretrained_cfg_value(name, "url")]
    for name in names:
        with pytest.raises(hub.HubError, match="no network; if you have the file, convert it"):
            timm.create_model(name, pretrained=True)
    assert len(asked) == len(names) > 20


def test_a_plain_link_is_cached_where_timm_caches_it(server, cache, tmp_path, caplog):
    weights = authors_weights(timm.create_model("coda_net_s", **SMALL))
    url = server.put("token", weights, folder=tmp_path) + "?file=mine.pt"
    for _ in range(2):
        overlay = {"url": url, "license": "apache-2.0"}
        assert_converted(
            timm.create_model("coda_net_s", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL), weights
        )
    assert len(server.requests) == 1 and os.listdir(cache) == ["download"]
    assert not [record for record in caplog.records if "icence" in record.message]


def test_an_interrupted_download_leaves_nothing_behind(server, cache, tmp_path, monkeypatch):
    url = server.put("token", authors_weights(timm.create_model("coda_net_s", **SMALL)), folder=tmp_path)

    def interrupt(source, target):
        target.write(source.read(99))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints.shutil, "copyfileobj", interrupt)
        create("coda_net_s.mpi_t1000_cifar10", url)
    assert os.listdir(cache) == []


def test_checkpoints_that_do_not_fit(tmp_path):
    small = timm.create_model("coda_net_s", **SMALL)
    weights = authors_weights(small)
    with pytest.raises(checkpoints.ConvertError) as error:
        coda_net.checkpoint_filter_fn(weights, timm.create_model("coda_net_s", rank=3))
    said = str(error.value)
    assert "size mismatch: stages.0.0.down.weight [2, 6, 3, 3] in the checkpoint, [3, 6, 3, 3] in the model, " in said
    assert said.count("in the model") == 2 and "and 16 more" in said
    with pytest.raises(checkpoints.ConvertError, match=r"missing: stages\.2\.1\.up\.weight, stages\.2\.1\.up\.bias\."):
        coda_net.checkpoint_filter_fn({k: v for k, v in weights.items() if not k.startswith("6.") or "0.w" in k}, small)
    with pytest.raises(checkpoints.ConvertError, match=r"^9\.weight_mod\S* is not one of the 9 layers"):
        coda_net.checkpoint_filter_fn(weights | {"9.weight_mod.weighting_f.1.bias": torch.ones(9)}, small)
    with pytest.raises(checkpoints.ConvertError, match=r"^3\.weight_mod\S*, \[5\], does not fit the rest"):
        coda_net.checkpoint_filter_fn(weights | {"3.weight_mod.weighting_f.1.bias": torch.ones(5)}, small)
    torch.save(weights, tmp_path / "ten.pt")
    overlay = {"file": str(tmp_path / "ten.pt"), "num_classes": 4}  # the wrong number is detected
    with pytest.raises(checkpoints.ConvertError, match=r"size mismatch: head\.up\.weight \[20, .* \[8, "):
        timm.create_model("coda_net_s", pretrained=True, num_classes=4, pretrained_cfg_overlay=overlay, **SMALL)


def run(*words, code: int = 0, capsys) -> str:
    assert cli.main(["convert", *map(str, words)]) == code
    captured = capsys.readouterr()
    assert code == 0 or (captured.err.startswith("timm-coda: error: ") and captured.err.count("\n") == 1)
    return captured.err if code else captured.out


def test_command_from_a_link(server, tmp_path, capsys):
    weights = authors_weights(timm.create_model("coda_net_s", **SMALL))
    url = server.put("token", weights, folder=tmp_path)
    output = tmp_path / "a" / "model"
    said = run(
        url, "--model", "coda_net_s.mpi_t500_cifar10", "--output", output, "--model-args", "rank=2", capsys=capsys
    )
    assert "27 tensors, " in said and "10 classes; licence: non-commercial-research" in said
    assert f'"local-dir:{output}"' in said
    assert sorted(os.listdir(output)) == ["config.json", "model.safetensors"]
    config = json.loads((output / "config.json").read_text())
    assert config["label_names"][:2] == ["airplane", "automobile"]
    assert config["pretrained_cfg"]["license"] == "non-commercial-research"
    model = timm.create_model(f"local-dir:{output}", pretrained=True)
    assert_converted(model, weights)
    assert model.logits.temperature == 500
    server.files["/model.safetensors"] = (output / "model.safetensors").read_bytes()
    safe = f"http://127.0.0.1:{server.server_port}/model.safetensors?a=b"
    base = ["--model", "coda_net_s.mpi_t500_cifar10", "--model-args", "rank=2"]
    run(safe, *base, "--output", tmp_path / "again", capsys=capsys)
    assert_converted(timm.create_model(f"local-dir:{tmp_path}/again", pretrained=True), weights)
    url = server.put("page", PAGE, folder=tmp_path)
    error = run(url, *base, "--output", tmp_path / "page", code=2, capsys=capsys)
    assert f"the response of {url} is not a checkpoint: it is a web page" in error


def test_command_with_ones_own_classes(tmp_path, capsys):
    small = timm.create_model("coda_net_s", num_classes=3, **SMALL)
    torch.save(authors_weights(small), tmp_path / "mine.pt")
    (tmp_path / "names.txt").write_text("cat\ndog\nsea eel\n")
    base = [tmp_path / "mine.pt", "--model", "coda_net_s.cifar10", "--model-args", "rank=2"]
    for names, folder in ((["cat", "dog", "sea eel"], "a"), ([tmp_path / "names.txt"], "b"), ([], "c")):
        more = ["--label-names", *names] if names else []
        run(*base, "--num-classes", 3, *more, "--output", tmp_path / folder, capsys=capsys)
        model = timm.create_model(f"local-dir:{tmp_path / folder}", pretrained=True)
        assert model.pretrained_cfg.get("label_names") == (["cat", "dog", "sea eel"] if names else None)
        assert_converted(model, torch.load(tmp_path / "mine.pt"))
    errors = {
        r"size mismatch: head.up.weight [6, ": ["--output", tmp_path / "d"],
        r"2 label names for 3 classes": ["--num-classes", 3, "--label-names", "cat", "dog"],
        r"is in use: choose another folder": ["--num-classes", 3, "--output", tmp_path / "a"],
    }
    for message, more in errors.items():
        more = more if "--output" in more else [*more, "--output", tmp_path / "d"]
        assert message in run(*base, *more, code=2, capsys=capsys)
    assert not (tmp_path / "d").exists()


def test_command_overwrites_only_what_it_is_told_to(tmp_path, capsys):
    model = timm.create_model("coda_net_xs", **SMALL)
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    folder, file = tmp_path / "folder", tmp_path / "half.safetensors"
    folder.mkdir()
    (folder / "thesis.txt").write_text("ten years")
    base = [tmp_path / "mine.safetensors", "--model", "coda_net_xs", "--model-args", "rank=2", "--output"]
    assert "is in use" in run(*base, folder, code=2, capsys=capsys)
    run(*base, folder, "--overwrite", capsys=capsys)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "thesis.txt"]
    assert "half.safetensors, 0." in run(*base, file, "--half", capsys=capsys)
    assert "is in use" in run(*base, file, code=2, capsys=capsys)
    run(*base, file, "--half", "--overwrite", capsys=capsys)
    for name, value in load_file(file).items():
        assert value.dtype == torch.float16 and relative_error(value, model.state_dict()[name]) < 1e-3
    assert "is in use" in run(*base, tmp_path / "mine.safetensors", code=2, capsys=capsys)
    assert os.listdir(tmp_path / "folder") and not list(tmp_path.glob(".saving*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.pt", "--model", "coda_net_s"], "nowhere.pt cannot be read as a checkpoint: "),
        (["page.pt", "--model", "coda_net_s"], "page.pt is a web page"),
        (["page.pt", "--model", "coda_net_t"], "timm has no model 'coda_net_t'"),
        (["page.pt", "--model", "coda_net_s.mars"], "cannot create the model coda_net_s.mars: Invalid pretrained tag"),
        (["page.pt", "--model", "test_resnet"], "test_resnet is not a timm_coda model"),
        (["ftp://a/b.pt", "--model", "coda_net_s"], "ftp://a/b.pt: only https:// and http://"),
        (["cut.safetensors", "--model", "coda_net_s"], "cut.safetensors cannot be read as a checkpoint"),
        (["harm.pt", "--model", "coda_net_s"], "mkdir), and loading these would run code in it"),
        (["old_harm.pt", "--model", "coda_net_s"], "mkdir), and loading these would run code in it"),
        (["harm.pickle", "--model", "coda_net_s"], "and loading these would run code in it"),
        (["empty.pt", "--model", "coda_net_s"], "empty.pt is empty"),
    ],
)
def test_command_errors(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("page.pt").write_bytes(PAGE)
    save_file({"weight": torch.ones(999)}, "whole.safetensors")
    Path("cut.safetensors").write_bytes(Path("whole.safetensors").read_bytes()[:999])
    harm = {"state_dict": Harm(tmp_path / "harm")}
    torch.save(harm, "harm.pt")
    torch.save(harm, "old_harm.pt", _use_new_zipfile_serialization=False)
    Path("harm.pickle").write_bytes(pickle.dumps(harm, protocol=2))
    Path("empty.pt").touch()
    error = run(*words, "--output", "out", code=2, capsys=capsys)
    assert message in error
    assert not Path("harm").exists() and not Path("out").exists()
