"""Fine-tuning with common training pipelines, from digits 0-3 to digits 4-9, against training only the classifier."""

import copy
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import freeze
from torchvision.transforms.functional import to_tensor

import timm_coda
from helpers import ROOT, relative_error
from helpers.processes import Program
from timm_coda import data, hub

# timm's image folder leaves closing files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
EPOCHS = 3
CLASSES = 6
MARGIN = 0.15  # in accuracy; half of the observed difference
# Shared settings: images without augmentation; the network has a tenth of the shipped one's size
LEARNING = ["--batch-size", "32", "--lr", "0.01", "--sched", "cosine", "--warmup-epochs", "0.5"]
IMAGES = ["--img-size", "8", "--crop-padding", "0", "--hflip", "0", "--workers", "0"]


def run(script: str, *options: object) -> None:
    program = Program([str(ROOT / script), *map(str, options)], cwd=ROOT, environment={**os.environ})
    out, err = program.communicate(timeout=300)
    assert program.returncode == 0, out[-3000:] + err[-3000:]


def train(output: Path, *options: object) -> float:
    """Run train.py and return the test accuracy of the last epoch."""
    quiet = ["--explain-every", 0, "--explain-images", 2, "--output", output]
    run("train.py", *options, *LEARNING, *IMAGES, *quiet)
    return json.loads((output / "summary.json").read_text())["history"][-1]["accuracy"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Write the digits as two image folders: few/train/0/12.png, many/validation/9/3.png, ..."""
    root = tmp_path_factory.mktemp("digits")
    digits = data.load_data(["digits"])
    for part, split in (("train", digits.train), ("validation", digits.test)):
        for index, label in enumerate(split.labels.tolist()):
            folder = root / ("few" if label < 4 else "many") / part / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            split.image(index).save(folder / f"{index}.png")
    return {name: root / name for name in ("few", "many")}


@pytest.fixture(scope="module")
def pretrained(folders, tmp_path_factory) -> Path:
    """Train a network on digits 0 to 3; return its folder."""
    output = tmp_path_factory.mktemp("pretrained") / "few"
    model = ["--model", "coda_net_xs", "--model-args", "rank=4", "logit_temperature=100"]
    assert train(output, "--data", folders["few"], *model, "--epochs", 5) > 0.9
    return output


@pytest.fixture(scope="module")
def head_only(folders, pretrained, tmp_path_factory) -> float:
    """Return the accuracy on 4-9 of a new classifier on frozen features, with the same images, rate and epochs."""
    output = tmp_path_factory.mktemp("head") / "many"
    model = ["--model", f"local-dir:{pretrained}", "--pretrained", "--head-only"]
    accuracy = train(output, "--data", folders["many"], *model, "--epochs", EPOCHS)
    before, after = (timm.create_model(f"local-dir:{folder}", pretrained=True) for folder in (pretrained, output))
    assert all(torch.equal(a, b) for a, b in zip(before.stages.parameters(), after.stages.parameters(), strict=True))
    assert before.num_classes == 4 and after.num_classes == CLASSES
    return accuracy


@pytest.fixture(scope="module")
def digits(folders) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return training images (N, 3, 8, 8) and labels, test images and labels; digits 4 to 9 have labels 0 to 5."""
    parts = []
    for part in ("train", "validation"):
        files = sorted((folders["many"] / part).glob("*/*.png"))
        parts.append(torch.stack([to_tensor(Image.open(file)) for file in files]))
        parts.append(torch.tensor([int(file.parent.name) - 4 for file in files]))
    return tuple(parts)


def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return (model.eval()(images).argmax(1) == labels).float().mean().item()


def assert_explains(model: torch.nn.Module, images: torch.Tensor, reloaded: torch.nn.Module) -> None:
    """Check that maps sum to the logits, equal those of a reloaded model, and differ from input x gradient."""
    explanation = model.eval().explain(images)
    assert explanation.residual.abs().max() < 1e-4 * explanation.value.abs().max()
    weights, again = model.state_dict(), reloaded.eval().explain(images)
    assert all(torch.equal(weight, weights[name]) for name, weight in reloaded.state_dict().items())
    assert relative_error(again.logits, explanation.logits) < 1e-6  # rounding depends on memory alignment
    assert relative_error(again.contributions, explanation.contributions) < 1e-5
    encoded = model.encoding(images).requires_grad_()
    value = model(encoded).gather(1, explanation.target[:, None]).sum()
    assert relative_error(torch.autograd.grad(value, encoded)[0], explanation.weights) > 0.1


def test_our_train_script(folders, pretrained, head_only, digits, tmp_path):
    output = tmp_path / "many"
    model = ["--model", f"local-dir:{pretrained}", "--pretrained", "--num-classes", CLASSES]
    reached = train(output, "--data", folders["many"], *model, "--epochs", EPOCHS)
    print(f"head only {head_only:.3f}, all layers {reached:.3f}")
    assert reached > head_only + MARGIN
    tuned, again = (timm.create_model(f"local-dir:{output}", pretrained=True) for _ in range(2))
    assert tuned.num_classes == CLASSES and tuned.pretrained_cfg["label_names"] == list("456789")
    assert_explains(tuned, digits[2][:8], again)


def test_timms_train_script(folders, pretrained, head_only, digits, tmp_path):
    script = os.environ.get("TIMM_TRAIN_SCRIPT")
    if not script:
        pytest.skip(
            "timm's train.py is not in its package: download it from https://github.com/huggingface/pytorch-image-models/"
            f"tree/v{timm.__version__} and set TIMM_TRAIN_SCRIPT to its path"
        )
    model = ["--device-modules", "timm_coda", "--model", f"local-dir:{pretrained}", "--pretrained"]
    learning = ["--opt", "adam", "--lr", "0.01", "--warmup-epochs", 0, "--loss", "bce", "--smoothing", 0, "-b", 32]
    options = ["--num-classes", CLASSES, "--epochs", EPOCHS, "--no-aug", "--workers", 0, "--device", "cpu"]
    run(script, folders["many"], *model, *learning, *options, "--output", tmp_path, "--experiment", "many")
    tuned = timm.create_model(f"local-dir:{pretrained}", num_classes=CLASSES, pretrained=True)
    again = copy.deepcopy(tuned)
    for one in (tuned, again):
        timm.models.load_checkpoint(one, str(tmp_path / "many" / "last.pth.tar"))
    reached = accuracy(tuned, *digits[2:])
    print(f"head only {head_only:.3f}, timm's script {reached:.3f}")
    assert reached > head_only + MARGIN
    assert_explains(tuned, digits[2][:8], again)


# As timm's validate.py: arguments from the command line, no import of other packages, and nothing unless it is main.
VALIDATE = """
import argparse
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model
from timm.utils import accuracy

parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.add_argument("--model")
parser.add_argument("--pretrained", action="store_true")
parser.add_argument("--device", default="cuda")


def main():
    args = parser.parse_args()
    model = create_model(args.model, pretrained=args.pretrained, num_classes=None, in_chans=3, global_pool=None)
    config, device = resolve_data_config(vars(args), model=model), torch.device(args.device)
    images = create_dataset("", root=args.data, split="validation")
    names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    chosen = {name: config[name] for name in names}
    loader = create_loader(images, batch_size=512, num_workers=0, pin_memory=False, device=device, **chosen)
    with torch.no_grad():
        (batch, labels), = loader
        top1 = accuracy(model.eval()(batch), labels)[0]
    print(f" * Acc@1 {top1.item():.3f}")


if __name__ == "__main__":
    main()
"""


def test_timms_scripts_without_device_modules(folders, tmp_path):
    """The guide's command, with a stand-in for timm's validate.py, or the real one beside TIMM_TRAIN_SCRIPT."""
    guide = (ROOT / "timm_coda/training/README.md").read_text(encoding="utf-8")
    command = next(block for block in re.findall(r"\$ (python -c .*?)```", guide, re.DOTALL) if "validate.py" in block)
    script = tmp_path / "path/to/timm/validate.py"
    script.parent.mkdir(parents=True)
    given = Path(os.environ.get("TIMM_TRAIN_SCRIPT") or script).with_name("validate.py")
    script.write_text(given.read_text() if given.exists() else VALIDATE)
    shown = {"path/to/images/test": str(folders["few"]), "local-dir:runs/tuned": "coda_net_xs.digits"}
    for place, ours in shown.items():
        assert place in command
        command = command.replace(place, ours)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["python", "-c"] and words[2].startswith("import timm_coda")
    program = Program(words[1:], cwd=tmp_path, environment={**os.environ})
    out, err = program.communicate(timeout=300)
    assert program.returncode == 0, out + err
    top1 = re.search(r"\* Acc@1 ([\d.]+)", out + err)
    assert top1 and float(top1[1]) > 99, out + err  # digits 0 to 3 are classes 0 to 3 in both


def test_what_timms_train_script_is_made_of(folders, pretrained, head_only, digits, tmp_path):
    """Call the same functions in the same order: model, dataset, loader, layer decay, schedule, loss."""
    torch.manual_seed(0)
    always = {"in_chans": 3, "drop_rate": 0.0, "scriptable": False, "checkpoint_path": ""}  # the script's defaults
    always |= dict.fromkeys(("drop_path_rate", "drop_block_rate", "global_pool", "bn_momentum", "bn_eps"))
    model = timm.create_model(f"local-dir:{pretrained}", pretrained=True, num_classes=CLASSES, **always)
    config = resolve_data_config({}, model=model)
    assert [*config["mean"], *config["std"], *config["input_size"]] == [0, 0, 0, 1, 1, 1, 3, 8, 8]
    images = create_dataset("", root=str(folders["many"]), split="train", is_training=True, batch_size=32)
    chosen = {name: config[name] for name in ("input_size", "interpolation", "mean", "std", "crop_pct")}
    device = {"device": torch.device("cpu"), "num_workers": 0, "pin_memory": False}
    loader = create_loader(images, batch_size=32, is_training=True, no_aug=True, **chosen, **device)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.01, layer_decay=0.9)
    schedule, epochs = create_scheduler_v2(optimizer, "cosine", num_epochs=EPOCHS, warmup_epochs=0)
    loss_function = BinaryCrossEntropy(smoothing=0.0)
    for epoch in range(epochs):
        model.train()
        for batch, labels in loader:
            assert batch.min() >= 0 and 0.9 < batch.max() <= 1, "the prefetcher scales colours to the model's range"
            optimizer.zero_grad()
            loss_function(model(batch), labels).backward()
            optimizer.step()
        schedule.step(epoch + 1)
    reached = accuracy(model, *digits[2:])
    print(f"head only {head_only:.3f}, timm's functions {reached:.3f}")
    assert reached > head_only + MARGIN
    hub.save_model(model, tmp_path, label_names=list("456789"))
    assert_explains(model, digits[2][:8], timm.create_model(f"local-dir:{tmp_path}", pretrained=True))


def test_dropout_is_refused_not_swallowed():
    with pytest.raises(ValueError, match=r"drop_rate=0.1: a CodaNet has no dropout"):
        timm.create_model("coda_net_xs", drop_rate=0.1, device="meta")


def test_transformers_trainer(pretrained, head_only, digits, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.set_seed(0)
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(pretrained)
    wrapped.timm_model.reset_classifier(CLASSES)
    wrapped.config.update({"label_names": list("456789"), "id2label": dict(enumerate("456789"))})
    images, labels, test_images, test_labels = digits
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        learning_rate=1e-2,
        per_device_train_batch_size=32,
        num_train_epochs=EPOCHS,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=wrapped, args=arguments, train_dataset=rows)
    trainer.train()
    tuned = wrapped.timm_model
    reached = accuracy(tuned, test_images, test_labels)
    print(f"head only {head_only:.3f}, Trainer {reached:.3f}")
    assert reached > head_only + MARGIN
    trainer.save_model(tmp_path / "saved")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert again.config.id2label == wrapped.config.id2label
    assert_explains(tuned, test_images[:8], again.timm_model)
    explanation = timm_coda.explain(again, test_images[:2])  # finds the wrapped timm model
    assert torch.equal(explanation.logits, again(test_images[:2]).logits)
    hub.save_model(tuned, tmp_path / "timm", label_names=list("456789"))
    assert_explains(tuned, test_images[:8], timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True))


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, images, labels) -> None:
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model.train()(images), labels).backward()
    optimizer.step()


def test_layer_decay_groups_follow_the_depth(pretrained, digits):
    model = timm.create_model(f"local-dir:{pretrained}", pretrained=True)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    scales = {names[p].rsplit(".", 2)[0]: g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    layers = ["stages.0.0", "stages.0.1", *(f"stages.{s}.{i}" for s in (1, 2) for i in range(3)), "head"]
    assert [scales[layer] for layer in layers] == [0.5 ** (len(layers) - 1 - depth) for depth in range(len(layers))]
    assert set(scales) == set(layers)
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(model.parameters())
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}, "no parameter is exempt"


def test_frozen_stages_two_groups_and_a_new_head_explain(pretrained, digits, tmp_path):
    images, labels, test_images, _ = digits
    torch.manual_seed(0)
    model = timm.create_model(f"local-dir:{pretrained}", pretrained=True)
    stages = [p.detach().clone() for p in model.stages.parameters()]
    freeze(model, ["stages"], include_bn_running_stats=False)
    model.reset_classifier(CLASSES)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["head.down.weight", "head.up.weight", "head.up.bias"]
    head = [p.detach().clone() for p in model.head.parameters()]
    step(model, create_optimizer_v2(model, opt="adam", lr=1e-2), images[:32], labels[:32])
    assert all(torch.equal(a, b) for a, b in zip(stages, model.stages.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(head, model.head.parameters(), strict=True))

    model.requires_grad_(True)
    groups = [{"params": model.stages.parameters(), "lr": 1e-4}, {"params": model.head.parameters(), "lr": 1e-2}]
    optimizer = create_optimizer_v2(groups, opt="adam", lr=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer, images[:32], labels[:32])
    moved = [(a - b).abs().max().item() for a, b in zip(before, model.parameters(), strict=True)]
    assert max(moved[:-3]) < 2e-4 < min(moved[-3:]), "each group at its own rate"  # Adam's first step is lr

    hub.save_model(model, tmp_path, label_names=list("456789"))
    assert_explains(model, test_images[:8], timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
