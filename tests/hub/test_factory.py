"""Saving models to folders and loading them: with timm and transformers, damaged folders, and a full disk."""

import json
import os
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import timm_coda
from helpers import relative_error
from timm_coda import BcosResNet, CodaNet, hub
from timm_coda.errors import wrap_errors
from timm_coda.explanation import Classes
from timm_coda.hub import folder


def tiny(**kwargs) -> torch.nn.Module:
    return timm.create_model("coda_net_xs.digits", **{"num_classes": 3, "rank": 2, **kwargs}).eval()


@pytest.fixture
def saved(tmp_path):
    """A folder with a model of three named classes."""
    tiny().save_pretrained(tmp_path / "saved", label_names=["cat", "dog", "eel"])
    return tmp_path / "saved"


def change_config(path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def test_a_saved_folder_is_the_same_model_bit_for_bit(tmp_path):
    model = tiny(logit_temperature=70.0, in_chans=1)
    names = ["cat", "dog", "eel"]
    made = hub.save_model(model, tmp_path / "a" / "b", label_names=names, data_config={"input_size": (1, 12, 20)})
    assert sorted(os.listdir(made)) == ["config.json", "model.safetensors"]
    images = torch.rand(2, 1, 12, 20)
    for again in (timm.create_model(f"local-dir:{made}", pretrained=True).eval(), CodaNet.from_pretrained(made)):
        assert torch.equal(again(images), model(images))
        assert torch.equal(again.explain(images).contributions, model.explain(images).contributions)
        assert again.pretrained_cfg["label_names"] == names
        assert tuple(timm.data.resolve_model_data_config(again)["input_size"]) == (1, 12, 20)
    config = json.loads((made / "config.json").read_text())
    assert config["num_classes"] == 3 and "num_classes" not in config["model_args"]
    assert config["model_args"]["rank"] == 2 and config["model_args"]["logit_temperature"] == 70.0
    assert (made / "model.safetensors").stat().st_mode == (made / "config.json").stat().st_mode


def test_saving_what_was_loaded_keeps_the_names(saved, tmp_path):
    model = CodaNet.from_pretrained(saved)
    model.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()
    model.reset_classifier(2)
    model.save_pretrained(tmp_path / "other")
    assert "label_names" not in json.loads((tmp_path / "other/config.json").read_text())


def test_tied_weights_are_named(tmp_path):
    model: Any = tiny()
    model.stages[0][1].down.weight = model.stages[0][0].down.weight = torch.nn.Parameter(torch.rand(2, 6, 3, 3))
    with pytest.raises(hub.HubError, match=r"stages\.0\.0\.down\.weight and stages\.0\.1\.down\.weight are one tensor"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_any_memory_format_and_dtype(tmp_path):
    for model in (tiny().to(memory_format=torch.channels_last), tiny().bfloat16()):
        model.save_pretrained(tmp_path)
        assert torch.equal(
            load_file(tmp_path / "model.safetensors")["head.up.weight"], model.state_dict()["head.up.weight"]
        )


def test_transformers_reads_the_folder(saved):
    transformers = pytest.importorskip("transformers")
    model = CodaNet.from_pretrained(saved)
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(saved).eval()
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(wrapped(images).logits, model(images))
    assert wrapped.config.id2label == {0: "cat", 1: "dog", 2: "eel"}


def test_changes_while_loading(saved):
    with torch.no_grad():
        images = torch.rand(1, 3, 16, 16)
        model = CodaNet.from_pretrained(saved, num_classes=5, logit_temperature=3.0)
        assert model(images).shape == (1, 5) and model.logits.temperature == 3
        assert torch.equal(model.forward_features(images), CodaNet.from_pretrained(saved).forward_features(images))
    assert not model.training


def test_a_model_that_cannot_be_saved_leaves_the_old_one(tmp_path, monkeypatch):
    model, images = tiny(), torch.rand(1, 3, 16, 16)
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folder.shutil, "copymode", full_disk)  # after the weights are written
        with pytest.raises(hub.SaveError, match=r"could not be saved.*No space left"):
            tiny().save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), model(images))


def test_models_that_cannot_be_saved(tmp_path):
    with pytest.raises(hub.HubError, match="2 label names for 3 classes: give one per class"):
        tiny().save_pretrained(tmp_path, label_names=["cat", "dog"])
    by_hand = CodaNet((1, 1, 1), (4, 4, 4), (1, 1, 1), rank=2)
    with pytest.raises(hub.HubError, match=r"this CodaNet cannot be saved: create it with timm\.create_model"):
        by_hand.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_models_from_what_a_person_types(tmp_path):
    model = hub.create_model(
        "coda_net_xs", num_classes=4, model_args=["rank=2", "activation=l2", "logit_temperature=5"]
    )
    assert model.num_classes == 4 and model.logits.temperature == 5
    hub.save_model(model, tmp_path)
    again = hub.create_model(f"local-dir:{tmp_path}", num_classes=4, pretrained=True).eval()
    assert torch.equal(again(torch.ones(1, 3, 8, 8)), model.eval()(torch.ones(1, 3, 8, 8)))


@pytest.mark.parametrize(
    ("name", "model_args", "message"),
    [
        ("coda_net_xxs", [], r"no model 'coda_net_xxs': did you mean .*coda_net_xs"),
        ("zzzzzzzz", [], r"did you mean coda_net_l"),
        ("coda_net_xs.mars", [], r"cannot create the model coda_net_xs.mars"),
        ("coda_net_xs", ["rnak=2"], r"rnak=2.*unexpected keyword argument 'rnak'"),
        ("coda_net_xs", ["rank"], r"model argument 'rank': expected NAME=VALUE"),
        ("coda_net_xs", ["num_classes=2"], r"num_classes=2: leave it out, it is 4 here"),
        ("local-dir:/nowhere", [], r"cannot create the model local-dir:/nowhere.*config.json"),
    ],
)
def test_models_that_cannot_be_made(name, model_args, message):
    with pytest.raises(hub.HubError, match=message):
        hub.create_model(name, num_classes=4, model_args=model_args)


def test_weights_of_another_architecture(saved):
    change_config(saved, model_args={"rank": 3})
    with pytest.raises(hub.HubError, match=r"size mismatch"):
        hub.create_model(f"local-dir:{saved}", num_classes=3, pretrained=True)
    shapes = r"18 with another shape \(stages\.0\.0\.down\.weight \[2, 6, 3, 3\] instead of \[3, 6, 3, 3\], stages\.0\."
    with pytest.raises(hub.HubError, match=shapes):
        CodaNet.from_pretrained(saved)


def test_weights_that_are_not_all_there(saved):
    weights = load_file(saved / "model.safetensors")
    del weights["head.up.weight"], weights["stages.1.0.down.weight"]
    save_file(weights | {"head.extra": torch.zeros(1)}, saved / "model.safetensors")
    faults = r"2 missing \(stages\.1\.0\.down\.weight, head\.up\.weight\); 1 unexpected \(head\.extra\)"
    with pytest.raises(hub.HubError, match=faults):
        CodaNet.from_pretrained(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "coda_net_q"}, r"'coda_net_q', which is not registered in timm.*did you mean .*coda_net_"),
        ({"architecture": None}, r"names no architecture"),
        ({"num_classes": "three"}, r"num_classes 'three': expected an integer"),
        ({"label_names": ["cat", "dog"]}, r"2 label names for 3 classes"),
        ({"label_names": 3}, r"3 as label names for 3 classes"),
        ({"model_args": [1]}, r"has model_args \[1\]: expected a JSON object"),
        ({"pretrained_cfg": None}, r"has pretrained_cfg None: expected a JSON object"),
        ({"model_args": {"rank": 2, "shape": 1}}, r"cannot create coda_net_xs.*unexpected keyword argument 'shape'"),
        ({"num_classes": 4, "label_names": None}, r"head\.up\.weight \[6, .* instead of \[8, "),
    ],
)
def test_configs_that_are_wrong(saved, changes, message):
    change_config(saved, **changes)
    with pytest.raises(hub.HubError, match=message):
        CodaNet.from_pretrained(saved)


def test_files_that_are_broken(saved):
    whole = (saved / "model.safetensors").read_bytes()
    for part in (whole[:-100], whole[:5], b""):
        (saved / "model.safetensors").write_bytes(part)
        with pytest.raises(hub.HubError, match=r"model\.safetensors is not a safetensors file, or is cut off"):
            CodaNet.from_pretrained(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(hub.HubError, match=r"config\.json is not JSON"):
        CodaNet.from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(hub.HubError, match=r"saved is not a model folder: it has no config\.json"):
        CodaNet.from_pretrained(saved)


def test_names_of_no_model(tmp_path):
    for name in (tmp_path / "nowhere", "a/b/c", "./x", "~/x"):
        with pytest.raises(hub.HubError, match="is neither a folder nor a repository id on the Hub"):
            CodaNet.from_pretrained(name)
    with pytest.raises(hub.HubError, match=r"'me/a b' is not a valid repository id"):
        CodaNet.from_pretrained("me/a b")


class Payload:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_are_not_executed(saved, tmp_path):
    (saved / "model.safetensors").unlink()
    torch.save({"head.up.weight": Payload(tmp_path / "executed")}, saved / "pytorch_model.bin")
    with pytest.raises(hub.HubError, match=r"no model\.safetensors, and pytorch_model\.bin is a pickle, which can run"):
        CodaNet.from_pretrained(saved)
    with pytest.raises((RuntimeError, hub.HubError), match=r"weights_only=True blocked loading|not loaded"):
        timm.create_model(f"local-dir:{saved}", pretrained=True)
    assert not (tmp_path / "executed").exists()
    torch.load(saved / "pytorch_model.bin", weights_only=False)["head.up.weight"].close()
    assert (tmp_path / "executed").exists(), "it would have worked"


def test_bcos_models_too(tmp_path):
    model = timm.create_model("bcos_resnet18", num_classes=3).eval()
    model.save_pretrained(tmp_path, label_names=["cat", "dog", "eel"])
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(BcosResNet.from_pretrained(tmp_path)(images), model(images))
    with pytest.raises(hub.HubError, match="is a BcosResNet, not a CodaNet: load it with BcosResNet"):
        CodaNet.from_pretrained(tmp_path)


def test_arguments_of_timms_own_models_are_saved_or_missed(tmp_path):
    hub.save_model(timm.create_model("resnet10t", num_classes=2), tmp_path)
    model = timm.create_model("resnet10t", num_classes=2, stem_width=16).eval()
    if not hasattr(model, "_model_args"):  # timm before 1.0.31
        with pytest.raises(hub.HubError, match=r"does not record the arguments of its own models.*timm 1\.0\.31"):
            hub.save_model(model, tmp_path)
        assert hub.load_model(str(tmp_path)).conv1[0].out_channels == 24, "what was there is unchanged"
        return
    hub.save_model(model, tmp_path)
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(hub.load_model(str(tmp_path))(images), model(images))


def test_models_of_another_class(tmp_path):
    hub.save_model(timm.create_model("resnet10t", num_classes=2), tmp_path)
    with pytest.raises(hub.HubError, match="is a ResNet, not a CodaNet"):
        CodaNet.from_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    assert isinstance(timm_coda.HubMixin.from_pretrained(tmp_path), CodaNet)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("coda_net_xs", {"rank": 3}),  # three rows for each of the three classes, and three of `down`
        ("bcos_resnet20", {}),
        ("bcos_v1_conv9", {"channels": [6] * 8}),
        ("bcos_v1_resnet34", {}),
        ("vit_tiny_patch16_bcos_224", {"depth": 1, "img_size": 32}),
        ("bcosified", {"base": "convnext_atto"}),
        ("resnet18", {}),
    ],
)
def test_a_pretrained_classifier_is_kept_for_the_same_classes_only(tmp_path, name, args):
    names = ["ant", "bee", "cow"]
    model = timm.create_model(name, num_classes=3, **args)
    hub.save_model(model.eval(), tmp_path, label_names=names)
    images = torch.rand(2, 3, 32, 32)
    logits = model(images)

    def tuned(label_names, count=3):
        create = {"num_classes": count, "label_names": label_names, "pretrained": True}
        return hub.create_model(f"local-dir:{tmp_path}", **create).eval()

    assert torch.equal(tuned(names)(images), logits) and torch.equal(tuned([])(images), logits)
    assert relative_error(tuned(["cow", "ant", "bee"])(images), logits[:, [2, 0, 1]]) < 1e-6
    for other in (["ant", "zebra", "cow"], ["ant", "bee"], ["ant", "bee", "cow", "dog"]):
        new = tuned(other, len(other))
        found = new(images)
        assert found.shape == (2, len(other)) and new.num_classes == found.shape[1]
        assert not any(torch.equal(found[:, i], logits[:, j]) for i in range(found.shape[1]) for j in range(3))
        assert Classes.of(new).labels == ()
        head = new.get_classifier()
        kept = {id(parameter) for parameter in head.parameters()}
        before = dict(model.named_parameters())
        assert all(torch.equal(p, before[n]) for n, p in new.named_parameters() if id(p) not in kept)


def test_a_folder_does_not_shadow_a_registered_name(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    tiny().save_pretrained("coda_net_xs.digits", label_names=["cat", "dog", "eel"])
    assert Classes.of(hub.load_model("coda_net_xs.digits")).labels == tuple("0123456789")
    assert "for the folder of this name, write ./coda_net_xs.digits" in caplog.text
    for name in ("./coda_net_xs.digits", "local-dir:coda_net_xs.digits", str(tmp_path / "coda_net_xs.digits")):
        assert Classes.of(hub.load_model(name)).labels == ("cat", "dog", "eel")
    (tmp_path / "coda_net_xs.cifar10").mkdir()  # as in hub_configs, without a model
    caplog.clear()
    assert hub.load_model("coda_net_xs.cifar10").num_classes == 10 and not caplog.text
    tiny().save_pretrained("mine", label_names=["cat", "dog", "eel"])
    assert hub.load_model("mine").num_classes == 3


@pytest.mark.parametrize(
    ("entry", "value", "expected"),
    [
        ("input_size", [3, 16], "three positive integers: channels, height and width"),
        ("input_size", [3, 0, 16], "three positive integers: channels, height and width"),
        ("input_size", [3, 16.5, 16], "three positive integers: channels, height and width"),
        ("mean", "black", "numbers, one per colour channel"),
        ("std", [0, 0, 0], "positive numbers, one per colour channel"),
        ("crop_pct", 0, "a number above 0 and at most 1"),
        ("crop_pct", "all", "a number above 0 and at most 1"),
        ("interpolation", "cubic", "one of nearest, nearest-exact, bilinear, bicubic, box, hamming, lanczos"),
        ("num_classes", True, "an integer, at least 0"),
    ],
)
def test_wrong_entries_of_a_config_are_named(entry, value, expected, tmp_path):
    timm.create_model("coda_net_xs", num_classes=3, rank=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (config if entry == "num_classes" else config["pretrained_cfg"])[entry] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (
        hub.check_folder,
        lambda folder: hub.load_model(str(folder)),
        lambda folder: timm.create_model(f"local-dir:{folder}"),
        timm_coda.CodaNet.from_pretrained,
    ):
        with pytest.raises(hub.HubError) as error:
            load(tmp_path)
        assert f"has {entry} " in str(error.value) and str(error.value).endswith(f": expected {expected}")


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("\n"), KeyError()], ids=repr)
def test_a_reason_is_never_empty(error):
    with (
        pytest.raises(hub.HubError, match=f"^cannot load it: {type(error).__name__}$"),
        wrap_errors("cannot load it", hub.HubError),
    ):
        raise error
