"""Model cards contain all known facts and leave out the unknown ones."""

import json

import pytest
import timm
from huggingface_hub import ModelCard

import timm_coda
from timm_coda import hub
from timm_coda.hub import card, folder

CONFIG = {
    "architecture": "coda_net_xs",
    "num_classes": 3,
    "label_names": ["cat", "dog", "eel"],
    "pretrained_cfg": {
        "input_size": [3, 16, 16],
        "license": "apache-2.0",
        "paper_name": "A paper",
        "paper_ids": "arXiv:2104.00032",
    },
}
SUMMARY = {
    "command": "train.py --data me/animals --epochs 3",
    "epoch": 2,
    "accuracy": 0.98765432,
    "loss": 0.12345,
    "seconds": 4000.0,
    "options": {"data": ["me/animals"]},
    "hub_data_set": "me/animals",
    "parameters": 2034960,
    "processes": 2,
    "training_images": 1347,
    "test_images": 450,
    "environment": {"timm_coda": "0.1.0", "torch": "2.15.0", "commit": "abc1234", "cpu": "Z80", "gpus": "Voodoo 2"},
    "history": [{}, {}, {}],
    "skipped": {"image 3": "broken"},
    "localisation": {"grid 3x3": 0.91234, "chance": 0.11},
    "evaluation": {"command": "timm-coda evaluate --model mine", "scores": {"removal": [0.91234, 0.9, 0.92]}},
}


def make(config=CONFIG, **more) -> ModelCard:
    return card.make_card(config, repo_id="me/animals-net", **more)


def test_a_config_alone():
    made = make()
    assert made.data.to_dict() == {
        "library_name": "timm",
        "license": "apache-2.0",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "transformers", "timm_coda"],
    }
    assert made.text.startswith("\n# animals-net\n")
    assert "[*A paper*](https://arxiv.org/abs/2104.00032)" in made.text and "3 classes: cat, dog, eel" in made.text
    code = made.text.index("import timm_coda"), made.text.index('timm.create_model("hf-hub:me/animals-net"')
    assert code[0] < code[1] < made.text.index("model.explain(image)") < made.text.index("from transformers import")
    for unknown in ("Measured", "How it was", "accuracy", "explanation.png)", "None", "localis"):
        assert unknown not in made.text
    assert str(make()) == str(ModelCard(str(made))), "the Hub reads it as it was written"


def test_what_was_measured():
    made = make(summary=SUMMARY, picture="explanation.png")
    data = made.data.to_dict()
    assert data["datasets"] == ["me/animals"] and data["metrics"] == ["accuracy"]
    [result] = made.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", 0.987654, "me/animals")
    assert data["model-index"][0]["name"] == "animals-net"
    for said in (
        "](explanation.png)",
        "| accuracy | 98.77% of 450 test images of me/animals |",
        "| loss on the same images | 0.1235 |",
        "| localisation, grid 3x3 | 0.9123 |",
        "| localisation, chance | 0.11 |",
        "| removal | 0.912 (95 % interval 0.900 to 0.920) |",
        "```bash\ntimm-coda evaluate --model mine\n```",
        "Epoch 2 of 3 was kept because it was the best on these test images",
        "- data: 1,347 images of me/animals\n",
        "- images that could not be read: 1,",
        "- parameters: 2,034,960\n",
        "- time: 67 min on Voodoo 2, 2 processes\n",
        "- commit of timm_coda: `abc1234`\n",
        "- versions: timm_coda 0.1.0, torch 2.15.0\n",
        "python train.py --data me/animals --epochs 3\n",
    ):
        assert said in made.text, said
    assert "| localisation | 0.5 |" in make(summary={"localisation": 0.5}).text


def test_data_of_this_machine_is_no_data_set_of_the_hub():
    made = make(summary=SUMMARY | {"options": {"data": ["/home/me/pets/"]}, "hub_data_set": None})
    assert "datasets" not in made.data.to_dict()
    assert "450 test images of pets |" in made.text and "/home/me" not in made.text.replace(SUMMARY["command"], "")


def test_a_licence_with_conditions():
    source = CONFIG["pretrained_cfg"] | {
        "license": "Non-commercial research",
        "description": "Weights of the authors",
        "origin_url": "https://example.org/weights",
        "notes": ("Ask them for more.",),
    }
    made = make(CONFIG | {"pretrained_cfg": source})
    data = made.data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "non-commercial-research")
    assert data["license_link"] == "https://example.org/weights"
    assert "About the weights of `coda_net_xs`: Weights of the authors." in made.text
    said = "Weights: Non-commercial research. They come from https://example.org/weights. Ask them for more. The code"
    assert said in made.text
    tuned = {"options": {"pretrained": True, "model": "coda_net_xs.old", "data": ["digits"]}}
    tuned_text = make(CONFIG | {"pretrained_cfg": source}, summary=tuned).text
    assert "Fine-tuned from `coda_net_xs.old`." in tuned_text and "They were fine-tuned from https://" in tuned_text
    scratch = {"options": {"pretrained": False, "model": "coda_net_xs.old", "data": ["digits"]}}
    made = make(CONFIG | {"pretrained_cfg": source}, summary=scratch)
    assert not {"authors", "Licence", "example.org", "Fine-tuned"} & set(made.text.replace(".", " ").split())
    assert "license" not in made.data.to_dict(), "other weights had one"
    made = make(CONFIG | {"pretrained_cfg": source}, summary=scratch, license="MIT")
    assert made.data.license == "mit" and "Weights: MIT. The code" in made.text
    del source["license"], source["origin_url"], source["notes"]
    made = make(CONFIG | {"pretrained_cfg": source})
    assert "license" not in made.data.to_dict() and "Licence" not in made.text


def test_other_architectures_do_not_claim_to_explain():
    made = make({"architecture": "resnet18", "num_classes": 2, "pretrained_cfg": {"input_size": [3, 64, 64]}})
    assert "explain" not in made.text and "timm_coda" not in str(made)
    assert "2 classes\n" in made.text and "images of 64 x 64 pixels" in made.text


def test_a_model_and_its_folder_have_the_same_card(tmp_path):
    model = timm.create_model("coda_net_xs.digits", rank=2, num_classes=3)
    model.save_pretrained(tmp_path)
    assert isinstance(model, timm_coda.HubMixin)
    written = hub.card_of_folder(tmp_path, "me/x")
    assert written == str(model.generate_model_card(repo_id="me/x"))
    weights = hub.weights_fingerprint(model)
    (tmp_path / "summary.json").write_text(json.dumps({"accuracy": 0.5, "weights": weights}))
    (tmp_path / "explanation.png").write_bytes(b"picture")
    written = hub.card_of_folder(tmp_path, "me/x")
    assert "50.00%" in written and "](explanation.png)" in written
    (tmp_path / "summary.json").write_text(json.dumps({"accuracy": "good", "weights": weights}))
    with pytest.raises(folder.HubError, match=r"cannot make a model card from .*summary\.json"):
        hub.card_of_folder(tmp_path, "me/x")
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(folder.HubError, match=r"summary\.json is not JSON"):
        hub.card_of_folder(tmp_path, "me/x")
