"""Model folders: what timm and transformers make of them, and what is left when the disk is full."""

import json
import os

import pytest
import timm
import torch

import timm_coda  # noqa: F401
from timm_coda import hub


def tiny(**kwargs) -> torch.nn.Module:
    return timm.create_model("coda_net_xs.digits", **{"num_classes": 3, "rank": 2, **kwargs}).eval()


def test_a_saved_folder_is_the_same_model_bit_for_bit(tmp_path):
    model = tiny(logit_temperature=70.0, in_chans=1)
    names = ["cat", "dog", "eel"]
    folder = hub.save_model(model, tmp_path / "a" / "b", label_names=names, data_config={"input_size": (1, 12, 20)})
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.rand(2, 1, 12, 20)
    assert torch.equal(again(images), model(images))
    assert torch.equal(again.explain(images).contributions, model.explain(images).contributions)
    assert again.pretrained_cfg["label_names"] == names
    assert timm.data.resolve_model_data_config(again)["input_size"] == (1, 12, 20)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_classes"] == 3 and "num_classes" not in config["model_args"]
    assert config["model_args"]["rank"] == 2 and config["model_args"]["logit_temperature"] == 70.0
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_transformers_reads_the_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny()
    hub.save_model(model, tmp_path, label_names=["cat", "dog", "eel"])
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(wrapped(images).logits, model(images))
    assert wrapped.config.id2label == {0: "cat", 1: "dog", 2: "eel"}


def test_a_model_that_cannot_be_saved_leaves_the_old_one(tmp_path, monkeypatch):
    model, images = tiny(), torch.rand(1, 3, 16, 16)
    hub.save_model(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(timm.models._hub, "save_config_for_hf", full_disk)  # after the weights are written
        with pytest.raises(hub.SaveError, match=r"could not be saved.*No space left"):
            hub.save_model(tiny(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), model(images))


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
        ("coda_net_xxs", [], r"no model 'coda_net_xxs'; there is .*coda_net_xs"),
        ("zzzzzzzz", [], r"there is coda_net_l"),
        ("coda_net_xs.mars", [], r"cannot make the model coda_net_xs.mars"),
        ("coda_net_xs", ["rnak=2"], r"rnak=2.*unexpected keyword argument 'rnak'"),
        ("coda_net_xs", ["rank"], r"model argument 'rank': expected NAME=VALUE"),
        ("coda_net_xs", ["num_classes=2"], r"num_classes=2: the data set says it, 4"),
        ("local-dir:/nowhere", [], r"cannot make the model local-dir:/nowhere.*config.json"),
    ],
)
def test_models_that_cannot_be_made(name, model_args, message):
    with pytest.raises(hub.HubError, match=message):
        hub.create_model(name, num_classes=4, model_args=model_args)


def test_weights_of_another_architecture(tmp_path):
    hub.save_model(tiny(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["rank"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(hub.HubError, match=r"size mismatch"):
        hub.create_model(f"local-dir:{tmp_path}", num_classes=3, pretrained=True)
