"""Pretrained weights by tag: arguments of a tag, shipped weights, loading with other classes, colours or outputs."""

import copy
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from helpers import ROOT, cifar10_folder, relative_error
from timm_coda import data, hub
from timm_coda.hub import checkpoints

SMALL = {"rank": 2}


def test_tags_bring_their_temperature(tmp_path):
    for temperature in (10, 50, 100, 500, 1000, 5000):
        name = f"coda_net_s.mpi_t{temperature}_cifar10"
        assert timm.create_model(name, device="meta").logits.temperature == temperature
    assert timm.create_model("coda_net_l.mpi_t100000_imagenet100", device="meta").logits.temperature == 100_000
    name = "coda_net_s.mpi_t10_cifar10"
    assert timm.create_model(name, logit_temperature=7, device="meta").logits.temperature == 7
    for arguments, temperature in (({}, 10), ({"logit_temperature": 7.0}, 7)):
        folder = hub.save_model(timm.create_model(name, **SMALL, **arguments), tmp_path / str(temperature))
        config = json.loads((folder / "config.json").read_text())
        assert config["model_args"]["logit_temperature"] == temperature
        assert timm.create_model(f"local-dir:{folder}").logits.temperature == temperature


def test_default_tags_are_ours():
    for name, tag in (("xs", "digits"), ("s", "cifar10"), ("m", "tiny_imagenet"), ("l", "imagenet100")):
        config = timm.create_model(f"coda_net_{name}", device="meta").pretrained_cfg
        assert (config["tag"], config["license"]) == (tag, "apache-2.0")
    cifar, imagenet = (timm.get_pretrained_cfg_value(f"coda_net_{n}", "label_names") for n in ("s.cifar10", "l"))
    assert (len(cifar), cifar[0], cifar[9]) == (10, "airplane", "truck")
    assert (len(imagenet), imagenet[0], imagenet[99]) == (100, "n01440764", "n01855672")  # tench, goose


def test_weights_there_are_not_yet():
    for name in ("coda_net_s", "coda_net_s.cifar10", "coda_net_m"):
        with pytest.raises(
            hub.HubError, match=r"coda_net_[sm]\.\w+ has no weights yet .*train.py --config hub_configs/"
        ):
            timm.create_model(name, pretrained=True)


def test_weights_named_by_the_caller_replace_the_shipped_ones():
    def resolve(**overlay):
        return checkpoints.resolve_weights(
            "coda_net_xs", True, pretrained_cfg="digits", pretrained_cfg_overlay=overlay
        ).file

    assert resolve(hf_hub_id="me/mine") is None
    with pytest.raises(hub.HubError, match=r"cannot download http://127\.0\.0\.1:1/mine.pt"):
        resolve(url="http://127.0.0.1:1/mine.pt")
    assert resolve().endswith("digits.safetensors")


@pytest.fixture(scope="module")
def digits():
    return timm.create_model("coda_net_xs.digits", pretrained=True).eval()


@pytest.fixture(scope="module")
def test_set():
    return data.load_data(["digits"]).test


def test_float16(digits, test_set):
    """Sums inside the layers leave the range of float16."""
    _, transform = data.create_transforms(timm.data.resolve_model_data_config(digits))
    images = torch.stack([transform(test_set.image(i)) for i in range(len(test_set))])
    with torch.no_grad():
        expected = digits(images)
        found = copy.deepcopy(digits).half()(images.half())
        with torch.autocast("cpu", torch.float16):  # as in timm's validate.py --amp
            mixed = digits(images[:90])
    for logits, right in ((found, expected), (mixed, expected[:90])):
        assert torch.equal(logits.argmax(1), right.argmax(1))
        assert relative_error(logits - digits.logits.bias, right - digits.logits.bias) < 5e-4


def test_gradients_in_float16(digits, test_set):
    """As Accelerate trains on a GPU: autocast, and a loss scaled as by GradScaler."""
    _, transform = data.create_transforms(timm.data.resolve_model_data_config(digits))
    images = torch.stack([transform(test_set.image(i)) for i in range(8)])
    labels = (torch.as_tensor(test_set.labels[:8]) + 1) % 10  # wrong ones: the loss is large
    models = [copy.deepcopy(digits) for _ in range(2)]
    for model, low in zip(models, (False, True), strict=True):
        with torch.autocast("cpu", torch.float16, low):
            loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
        (2**12 * loss).backward()
    for (name, right), found in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert relative_error(found.grad, right.grad) < 5e-3, name


def accuracy(model, test_set, colours: int = 3) -> float:
    _, transform = data.create_transforms(timm.data.resolve_model_data_config(model) | {"input_size": (3, 16, 16)})
    images = torch.stack([transform(test_set.image(i)) for i in range(len(test_set))])[:, :1].expand(
        -1, colours, -1, -1
    )
    with torch.no_grad():
        return (model(images).argmax(1) == torch.as_tensor(test_set.labels)).double().mean().item()


def test_shipped_weights_anywhere_offline(tmp_path, digits, test_set):
    file = Path(digits.pretrained_cfg["file"])
    assert file.stat().st_size < 5e6
    assert {value.dtype for value in load_file(file).values()} == {torch.float16}
    assert digits.pretrained_cfg["hf_hub_id"] == "timm-coda/coda_net_xs.digits"
    assert accuracy(digits, test_set) == 449 / 450, "what the README says"
    code = "import timm, timm_coda, torch; m = timm.create_model('coda_net_xs', pretrained=True).eval()\n"
    code += "torch.save(m(torch.ones(1, 3, 16, 16)), 'logits.pt')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    environment |= {"PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment, check=True)
    assert relative_error(torch.load(tmp_path / "logits.pt"), digits(torch.ones(1, 3, 16, 16))) < 1e-5
    text = (hub.save_model(digits, tmp_path / "saved") / "config.json").read_text()
    assert str(file.parent) not in text


@pytest.fixture(scope="module")
def cifar10():
    return data.load_data([str(cifar10_folder())]).test


@pytest.mark.parametrize(("count", "tolerance"), [(500, 0.03), pytest.param(10_000, 0.001, marks=pytest.mark.slow)])
def test_shipped_weights_are_as_good_as_their_card_says(count, tolerance, cifar10):
    model = timm.create_model("coda_net_xs.cifar10", pretrained=True).eval()
    file = Path(model.pretrained_cfg["file"])
    assert file.stat().st_size < 5e6
    assert {value.dtype for value in load_file(file).values()} == {torch.float16}
    _, transform = data.create_transforms(timm.data.resolve_model_data_config(model))
    right = seen = 0
    for batch in data.create_loader(data.ImageDataset(cifar10, transform), batch_size=100, workers=0):
        with torch.no_grad():
            right += (model(batch.images).argmax(1) == batch.labels).sum().item()
        seen += len(batch.labels)
        if seen == count:
            break
    summary = json.loads((ROOT / "hub_configs/coda_net_xs.cifar10/summary.json").read_text())
    assert abs(right / seen - summary["accuracy"]) <= tolerance, right


def test_transformers_pipeline_names_the_digits(digits, test_set, tmp_path):
    transformers = pytest.importorskip("transformers")
    hub.save_model(digits, tmp_path, label_names=digits.pretrained_cfg["label_names"])
    pipeline = transformers.pipeline("image-classification", model=str(tmp_path), device="cpu")
    images = [test_set.image(index) for index in range(len(test_set))]
    answers = pipeline(images, top_k=1, batch_size=50)
    right = sum(answer[0]["label"] == str(label) for answer, label in zip(answers, test_set.labels, strict=True))
    assert right >= 0.95 * len(test_set)


@pytest.mark.parametrize("in_chans", [1, 2, 4, 6])
def test_other_colours_on_load(in_chans, digits, test_set, caplog):
    with caplog.at_level(logging.WARNING):
        model = timm.create_model("coda_net_xs.digits", pretrained=True, in_chans=in_chans).eval()
    assert not caplog.records
    assert torch.equal(model.stages[0][1].up.weight, digits.stages[0][1].up.weight)
    assert accuracy(model, test_set, in_chans) >= 0.95  # digits are grey


@pytest.mark.parametrize("in_chans", [1, 6])
def test_a_grey_image_gives_the_same_code_and_product(in_chans, digits):
    """z = B p and z^T A p do not change; only the norm of the weight sums other terms."""
    model = timm.create_model("coda_net_xs.digits", pretrained=True, in_chans=in_chans).double()
    grey = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    for weight in ("down", "up"):
        mine, source = (
            torch.nn.functional.conv2d(
                net.encoding(grey.expand(-1, net.in_chans, -1, -1)), getattr(net.stages[0][0], weight).weight.double()
            )
            for net in (model, digits)
        )
        assert relative_error(mine, source) < 1e-6


def test_colours_of_a_saved_folder_change_too(tmp_path, caplog):
    grey = timm.create_model("coda_net_xs.digits", in_chans=1, **SMALL).eval()
    folder = hub.save_model(grey, tmp_path)
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).in_chans == 1
    caplog.clear()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=3)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    weight, source = (net.stages[0][0].up.weight for net in (model, grey))
    for colour in range(3):
        assert relative_error(weight[:, [colour, 3 + colour]], source / 3) < 1e-6


def test_other_classes_on_load(digits):
    images = torch.rand(2, 3, 16, 16)
    features = digits.forward_features(images)
    torch.manual_seed(1)
    fresh = timm.create_model("coda_net_xs.digits", num_classes=4).head
    torch.manual_seed(1)
    model = timm.create_model("coda_net_xs.digits", pretrained=True, num_classes=4).eval()
    assert torch.equal(model.forward_features(images), features)
    assert model(images).shape == (2, 4)
    for name, value in fresh.state_dict().items():
        assert torch.equal(model.head.state_dict()[name], value), f"head.{name} is of ten classes"
    pooled = timm.create_model("coda_net_xs.digits", pretrained=True, num_classes=0).eval()
    assert torch.equal(pooled(images), features.sum((2, 3)))


def test_features_only_with_pretrained_weights(digits):
    images = torch.rand(2, 3, 16, 16)
    backbone = timm.create_model("coda_net_xs.digits", pretrained=True, features_only=True, out_indices=(0, 2)).eval()
    _, expected = digits.forward_intermediates(images, indices=[0, 2])
    for one, other in zip(backbone(images), expected, strict=True):
        assert torch.equal(one, other)
    assert backbone.feature_info.channels() == [16, 64]
