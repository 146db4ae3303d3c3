"""Exported files: equal to the eager model, and usable in a process without PyTorch."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from timm.utils.onnx import onnx_export

import timm_coda  # noqa: F401
from helpers import relative_error
from timm_coda import cli, export, hub, layers

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the export extra")

# Few layers, as time grows with them; a low temperature, so that the logits differ clearly from the bias.
SMALL = {"depths": (1, 1, 1), "channels": (8, 8, 8), "rank": 2, "logit_temperature": 5.0}
TINY = SMALL | {"strides": (1, 2, 2)}
MODELS = {
    "xs-squash": ("coda_net_xs", {"strides": (1, 2, 2)}, (13, 22)),
    "s-l2-grey": ("coda_net_s", {"strides": (1, 2, 2), "activation": "l2", "in_chans": 1}, 16),
    "l": ("coda_net_l", {"strides": (3, 2, 2)}, 61),  # strides that leave border pixels uncovered
}


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("name", MODELS)
def test_explanation_equals_eager(name, suffix, tmp_path):
    architecture, arguments, size = MODELS[name]
    model = timm.create_model(architecture, **SMALL | arguments).train()
    path = export.export_model(model, tmp_path / f"model{suffix}", explain=True, img_size=size)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    run, about = export._load(path)
    for count in (5, 1):  # neither is the traced example's batch size, 2
        images = torch.rand(count, *about["input_size"])
        target = torch.arange(count) % model.num_classes
        target[0] = export.PREDICTION
        outputs = run({"image": images, "target": target})
        expected = model.explain(images, torch.where(target < 0, model(images).argmax(1), target))
        assert relative_error(outputs["logits"] - expected.bias, expected.logits - expected.bias) < 1e-5
        assert relative_error(outputs["contributions"], expected.contributions) < 1e-5
        assert relative_error(outputs["weights"], expected.weights) < 1e-5
        value = outputs["logits"].gather(1, expected.target[:, None])[:, 0] - model.logits.bias
        assert relative_error(outputs["contributions"].sum((1, 2)), value) < 1e-5
    outputs = run({"image": images, "target": torch.tensor([model.num_classes])})
    assert outputs["contributions"].isnan().all() and outputs["logits"].isfinite().all()
    for count, targets in ((3, 1), (1, 3), (4, 3)):  # one target would be repeated for all images by `where`
        with pytest.raises(Exception, match=r"(?i)concat|mismatch|guard|expected"):
            run({"image": torch.rand(count, *about["input_size"]), "target": torch.zeros(targets, dtype=torch.int64)})
    differences = export.largest_differences(path, model)
    assert set(differences) == set(export.OUTPUTS) and 0 < max(differences.values()) < 1e-5


def bcos_net():
    first, last = layers.EncodedBcosConv2d(3, 4, 3, stride=2), layers.BcosConv2d(4, 3, 1, b=1.5, max_out=2)
    return torch.nn.Sequential(first, layers.DynamicGroupNorm2d(4), last, layers.GlobalPool("avg"))


def linear_units():
    return torch.nn.Sequential(layers.DAULinear(8, 6, rank=2), layers.BcosLinear(6, 3))


NETWORKS = {
    "coda": (lambda: timm.create_model("coda_net_xs", **TINY | {"logit_temperature": 1}), (3, 8, 8)),
    "bcos": (bcos_net, (3, 8, 8)),
    "linear": (linear_units, (8,)),
}


@pytest.mark.filterwarnings("ignore")  # both exporters warn of themselves
@pytest.mark.parametrize(
    ("kind", "dynamo"), [("coda", False), ("bcos", False), ("bcos", True), ("linear", False), ("linear", True)]
)
def test_pytorchs_own_onnx_exporters(kind, dynamo, tmp_path):
    torch.manual_seed(0)
    make, shape = NETWORKS[kind]
    model, x = make().eval(), torch.rand(2, *shape)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=dynamo, input_names=["x"], verbose=False)
    (outputs,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    assert relative_error(torch.from_numpy(outputs), model(x)) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
def test_timms_onnx_export_with_any_batch_size(dynamo, tmp_path):
    if dynamo and "ExportOptions" in onnx_export.__code__.co_names and not hasattr(torch.onnx, "ExportOptions"):
        pytest.skip("this timm calls what this PyTorch no longer has")
    torch.manual_seed(0)
    model, path = NETWORKS["coda"][0](), tmp_path / "model.onnx"
    onnx_export(model, str(path), torch.rand(2, 3, 8, 8), use_dynamo=dynamo)
    x = torch.rand(5, 3, 8, 8)
    (outputs,) = onnxruntime.InferenceSession(path).run(None, {"input0": x.numpy()})
    assert relative_error(torch.from_numpy(outputs), model(x)) < 1e-5


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", NETWORKS)
def test_pytorchs_own_export_has_only_its_own_operators(kind, strict):
    torch.manual_seed(0)
    make, shape = NETWORKS[kind]
    model, x = make().eval(), torch.rand(2, *shape)
    program = torch.export.export(model, (x,), strict=strict)
    code = [part.code for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    assert "torch.ops.aten" in code[0] and not any("timm_coda" in part for part in code)
    assert relative_error(program.module()(x), model(x)) < 1e-6


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_logits_of_a_bfloat16_model_in_float32(suffix, tmp_path):
    model = timm.create_model("coda_net_xs", **TINY).bfloat16().eval()
    path = export.export_model(model, tmp_path / f"model{suffix}", img_size=12)
    run, _ = export._load(path)
    images = torch.rand(3, 3, 12, 12)
    assert model.head.up.weight.dtype == torch.bfloat16
    bias = model.logits.bias
    assert relative_error(run({"image": images})["logits"] - bias, model.float()(images) - bias) < 1e-5


def test_verification_sees_other_weights(tmp_path):
    models = [timm.create_model("coda_net_xs", **TINY) for _ in range(2)]
    path = export.export_model(models[0], tmp_path / "model.pt2", explain=True, img_size=8)
    assert export.largest_differences(path, models[1])["contributions"] > 0.1
    models[0].head.up.bias.data[0] = torch.nan
    path = export.export_model(models[0], tmp_path / "model.pt2", img_size=8)
    assert export.largest_differences(path, models[1]) == {"logits": torch.inf}


SERVICE = """
import json, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
about = session.get_modelmeta().custom_metadata_map
inputs = np.load(sys.argv[2])
logits, contributions = session.run(["logits", "contributions"], dict(inputs))
np.savez(sys.argv[3], logits=logits, contributions=contributions)
print(json.dumps({"modules": [m for m in ("torch", "timm", "timm_coda") if m in sys.modules], **about}))
"""


def test_command_and_a_service_without_torch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("coda_net_xs.digits", **TINY, num_classes=3).eval()
    hub.save_model(model, "folder", label_names=["cat", "dog", "eel"])
    assert cli.main(["export", "local-dir:folder", "--output", "m.onnx", "--explain"]) == 0
    said = capsys.readouterr().out
    found = dict(re.findall(r"(\w+) +largest relative difference .* (\S+)\n", said))
    assert set(found) == set(export.OUTPUTS) and all(float(number) < 1e-5 for number in found.values())

    images, target = torch.rand(7, 3, 16, 16), torch.tensor([-1, 0, 1, 2, 0, 1, 2])
    np.savez("inputs.npz", image=images.numpy(), target=target.numpy())
    command = [sys.executable, "-c", SERVICE, "m.onnx", "inputs.npz", "outputs.npz"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    about = json.loads(done.stdout)
    assert about["modules"] == []
    assert json.loads(about["label_names"]) == ["cat", "dog", "eel"]
    assert json.loads(about["mean"]) == [0, 0, 0] and json.loads(about["std"]) == [1, 1, 1]
    assert json.loads(about["input_size"]) == [3, 16, 16] and about["license"] == "apache-2.0"
    outputs = np.load("outputs.npz")
    expected = model.explain(images, torch.where(target < 0, model(images).argmax(1), target))
    assert relative_error(outputs["logits"], expected.logits) < 1e-5
    assert relative_error(outputs["contributions"], expected.contributions) < 1e-5
    sums = torch.from_numpy(outputs["contributions"]).sum((1, 2))
    assert relative_error(sums + float(about["bias"]), expected.value) < 1e-5


def test_command_refuses_a_file_that_is_another_function(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "largest_differences", lambda *args: {"logits": 1e-7, "contributions": 2e-4})
    words = ["export", "coda_net_xs", "--no-pretrained", "--img-size", "8", "--output", str(tmp_path / "m.pt2")]
    assert cli.main(words) == 2
    assert "differs from the model by 1e-4 or more: do not use it" in capsys.readouterr().err


def test_the_onnx_file_names_its_opset_and_axes(tmp_path):
    onnx = pytest.importorskip("onnx")
    model = timm.create_model("coda_net_xs", **TINY)
    path = export.export_model(model, tmp_path / "m.onnx", explain=True, img_size=8)
    file = onnx.load(path)
    onnx.checker.check_model(file)
    assert [(entry.domain, entry.version) for entry in file.opset_import] == [("", export.OPSET)]
    session = onnxruntime.InferenceSession(path)
    shapes = {value.name: value.shape for value in session.get_inputs() + session.get_outputs()}
    assert shapes == {
        "image": ["batch", 3, 8, 8],
        "target": ["batch"],
        "logits": ["batch", 10],
        "contributions": ["batch", 8, 8],
        "weights": ["batch", 6, 8, 8],
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["coda_net_xs", "--no-pretrained", "--output", "m.pth"], "m.pth: must end in .onnx or .pt2"),
        (["coda_net_xs", "--no-pretrained", "--output", "m.pt2", "--format", "onnx"], "use --output m.onnx"),
        (["coda_net_xs", "--no-pretrained", "--output", "no/such/m.pt2"], "no/such: no such folder"),
        (["coda_net_xs", "--no-pretrained", "--output", "m.pt2", "--img-size", "2"], "resize it to at least 4x4"),
        (["coda_net_t", "--output", "m.pt2"], "timm has no model 'coda_net_t'"),
        (["resnet18", "--no-pretrained", "--explain", "--output", "m.pt2"], "no dynamic-linear layer"),
        (["local-dir:nowhere", "--output", "m.pt2"], "cannot load local-dir:nowhere"),
    ],
)
def test_errors(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("timm-coda: error: ")
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_classifier_is_refused(tmp_path):
    model = timm.create_model("coda_net_xs", rank=2, num_classes=0)
    with pytest.raises(ValueError, match=r"give it one with reset_classifier"):
        export.export_model(model, tmp_path / "m.pt2", explain=True, img_size=8)
