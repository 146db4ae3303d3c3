"""hub_configs/<arch>.<tag>/: one folder per tag, with the configuration and card that the package writes, and a recipe.

After a change of default_cfgs or of the card's text, this command rewrites every config.json and card.md:

    PYTHONPATH=tests python tests/hub/test_hub_configs.py
"""

import functools
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml

from helpers import ROOT
from timm_coda import hub
from timm_coda.explanation import Classes
from timm_coda.hub.folder import model_config
from timm_coda.training import options

FOLDERS = ROOT / "hub_configs"
MODELS = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("timm_coda.")]
TAGS = [name for model in MODELS for name in timm.list_models(f"{model}.*", include_tags=True)]


@functools.cache
def meta_model(name: str):
    """A model without data in its tensors, but with the config of its tag. Do not change it: it is shared."""
    model = timm.create_model(name, device="meta")
    known = timm.get_pretrained_cfg(name)
    assert known
    model.pretrained_cfg = known.to_dict()
    return model


def config_of(name: str) -> str:
    """The text of config.json as written by `hub.save_model`."""
    return json.dumps(model_config(meta_model(name)), indent=2) + "\n"


def test_a_folder_for_each_tag():
    families = {timm.model_entrypoint(name).__module__ for name in MODELS}
    configs = [item for family in families for item in sys.modules[family].default_cfgs.items()]
    assert set(TAGS) == {f"{name}.{tag}" for name, cfg in configs for tag in cfg.tags if tag}
    assert set(TAGS) == {path.name for path in FOLDERS.iterdir() if path.is_dir()}


@pytest.mark.parametrize("name", TAGS)
def test_config_is_what_the_package_saves(name):
    expected = config_of(name)
    assert (FOLDERS / name / "config.json").read_text() == expected, f"run python {Path(__file__).relative_to(ROOT)}"
    assert str(ROOT) not in expected
    model = timm.create_model(f"local-dir:{FOLDERS / name}", device="meta")
    same = meta_model(name)
    assert str(model) == str(same)  # layers, temperature
    shapes = [{key: value.shape for key, value in net.state_dict().items()} for net in (model, same)]
    assert shapes[0] == shapes[1]
    for key in ("tag", "license", "input_size", "description"):
        assert json.dumps(model.pretrained_cfg.get(key)) == json.dumps(same.pretrained_cfg.get(key)), key
    assert (
        Classes.of_config(json.loads(expected), same.num_classes).names
        == Classes.of_config(same.pretrained_cfg | {"tag": None}, same.num_classes).names
    )


@pytest.mark.parametrize("name", TAGS)
def test_card_is_what_the_package_writes(name):
    card = hub.card_of_folder(FOLDERS / name, None)
    assert (FOLDERS / name / "card.md").read_text() == card, f"run python {Path(__file__).relative_to(ROOT)}"
    known = timm.get_pretrained_cfg(name)
    assert known and card.startswith("---\nlibrary_name: timm\n")
    if known.has_weights:
        assert "import timm_coda  # registers the architecture" in card and f'create_model("{name}"' in card
    else:
        assert (
            f"To train them, in a clone of timm_coda:\n\n```bash\npython train.py --config hub_configs/{name}/" in card
        )
    assert ("non-commercial" in card) == (".mpi_" in name)


@pytest.fixture(scope="module")
def train_module():
    spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", TAGS)
def test_recipe_is_what_train_py_takes(name, train_module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = FOLDERS / name / "recipe.yaml"
    args = options.parse_options(train_module.make_parser(), ["--config", str(file)], train_module.DEFAULT_RECIPE)
    assert options.default_output(args) == Path("runs") / name
    assert f"python train.py --config hub_configs/{name}/recipe.yaml" in file.read_text()
    # The recipe trains new weights: with the tag of the authors' weights they would get the authors' licence.
    tag = timm.get_pretrained_cfg_value(args.model, "tag")
    assert args.model == name or (".mpi_" in name and not tag.startswith("mpi_"))
    for option, value in yaml.safe_load(file.read_text()).items():
        if option not in ("data", "model-args"):
            assert getattr(args, option.replace("-", "_")) == value, option
    with torch.device("meta"):
        model = hub.create_model(args.model, num_classes=args.num_classes or 10, model_args=args.model_args)
    config = hub.resolve_input_data_config(model, {"img_size": args.img_size, "crop_pct": args.crop_pct})
    published = timm.create_model(name, num_classes=model.num_classes, device="meta")
    assert str(model) == str(published)  # layers, temperature
    assert config["input_size"] == published.pretrained_cfg["input_size"]


if __name__ == "__main__":
    for tag in TAGS:
        (FOLDERS / tag / "config.json").write_text(config_of(tag), encoding="utf-8")
        (FOLDERS / tag / "card.md").write_text(hub.card_of_folder(FOLDERS / tag, None), encoding="utf-8")
