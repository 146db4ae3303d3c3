"""Generate model cards, the pages of models on the Hugging Face Hub, from a config and measured results.

Unknown facts are left out.
"""

import re
from collections.abc import Mapping
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..explanation import Classes

CARD, PICTURE, SUMMARY, RECIPE = "README.md", "explanation.png", "summary.json", "recipe.yaml"
_HUB_LICENSES = {  # Hub identifiers of common model licences; any other becomes "other" with a `license_name`
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0"),
    *("cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "openrail", "unlicense"),
}
_OF_WEIGHTS = ("license", "description", "origin_url", "notes")


def make_card(
    config: Mapping[str, Any],
    *,
    repo_id: str | None = None,
    summary: Mapping[str, Any] | None = None,
    picture: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """Generate the model card of a model in timm's format.

    Args:
        config: The content of its `config.json`.
        repo_id: Its id on the Hub, `USER/NAME`; None for a tag in timm's registry.
        summary: The results of train.py, the content of its `summary.json`. Two more entries are read if present:
            `localisation`, a number or a mapping from names to numbers; and `evaluation`, with the `command` that was
            run and its `scores`, a mapping from names to (score, low, high), low to high being the 95 % interval.
        picture: File name of a figure of explanations next to the card.
        license: Licence of the weights, such as `"mit"`; by default the config's. If the summary says that the weights
            were trained from scratch, the config's licence and description belong to other weights and are left out.
    """
    summary = summary or {}
    source = dict(config.get("pretrained_cfg", {}))
    name = repo_id.split("/")[-1] if repo_id else f"{config['architecture']}.{source['tag']}"
    if repo_id and summary.get("options", {}).get("pretrained") is False:  # the config describes other weights
        source = {key: value for key, value in source.items() if key not in _OF_WEIGHTS}
    if license:
        source["license"] = license
    sections = [
        f"# {name}",
        _what_it_is(config, source, summary),
        f"![Images, class probabilities, and the evidence for and against the likeliest classes]({picture})"
        if picture
        else "",
        _usage(f"hf-hub:{repo_id}", explains=_explains(config)) if repo_id else _usage_of_tag(name),
        _in_transformers(repo_id, explains=_explains(config)) if repo_id else "",
        _measured(summary),
        _training(summary),
        _license(source, summary),
    ]
    text = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{_metadata(name, source, summary, explains=_explains(config)).to_yaml()}\n---\n\n{text}\n")


def _metadata(name: str, source: Mapping[str, Any], summary: Mapping[str, Any], *, explains: bool) -> ModelCardData:
    data_set, results = summary.get("hub_data_set"), None
    if "accuracy" in summary:
        value = round(summary["accuracy"], 6)
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=data_set or _data_name(summary),
                dataset_name=_data_name(summary),
                metric_type="accuracy",
                metric_value=value,
            )
        ]
    license = str(source.get("license", "")).lower()
    other = bool(license) and license not in _HUB_LICENSES
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transformers", *(["timm_coda"] if explains else [])],
        license="other" if other else license or None,
        license_name=re.sub(r"[^a-z0-9.]+", "-", license).strip("-") if other else None,
        license_link=source.get("origin_url") if other else None,
        datasets=[data_set] if data_set else None,
        metrics=["accuracy"] if results else None,
        model_name=name if results else None,
        eval_results=results,
    )


def _what_it_is(config: Mapping[str, Any], source: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    if _explains(config):
        lines = [
            f"An image classifier with exact explanations: `{config['architecture']}`, a timm model from timm_coda. "
            "Its logits are `W(x)·x + b`, so `W(x) * x` is the exact contribution of each pixel."
        ]
    else:
        lines = [f"An image classifier: `{config['architecture']}` of timm."]
    if _is_tuned(summary) and not (start := str(summary["options"].get("model", "local-dir:"))).startswith(
        "local-dir:"
    ):
        lines.append(f"Fine-tuned from `{start}`.")
    if "description" in source:
        tag = f".{source['tag']}" if source.get("tag") else ""
        lines.append(f"About the weights of `{config['architecture']}{tag}`: {source['description'].rstrip('.')}.")
    paper, ids = source.get("paper_name"), source.get("paper_ids") or ()
    links = [f"https://arxiv.org/abs/{i.split(':')[1]}" for i in ([ids] if isinstance(ids, str) else ids) if ":" in i]
    if paper:
        lines.append(f"Paper: [*{paper}*]({links[0]})." if links else f"Paper: *{paper}*.")
    facts = []
    classes = config.get("num_classes")
    names = Classes.of_config({**source, **config, "tag": None}, classes or 0)
    few = names.names[:10]
    if few != names.labels[:10]:  # descriptions, such as "tench, Tinca tinca"
        few = tuple(name.split(", ")[0] for name in few)
    if classes is not None:
        some = f": {', '.join(few)}{', ...' if len(names) > 10 else ''}" if names.labels else ""
        facts.append(f"- {classes} classes{some}")
    if size := source.get("input_size"):
        facts.append(f"- images of {size[1]} x {size[2]} pixels{', colours in [0, 1]' if _explains(config) else ''}")
    return "\n\n".join([" ".join(lines), "\n".join(facts)]).strip()


_IMPORT = "import timm_coda  # registers the architecture, so it comes before {}\n"


def _usage_of_tag(name: str) -> str:
    known = timm.get_pretrained_cfg(name)
    if known and known.has_weights:
        return _usage(name, explains=True)
    recipe = f"python train.py --config hub_configs/{name}/{RECIPE}"
    return f"## Train it\n\nThere are no weights yet. To train them, in a clone of timm_coda:\n\n```bash\n{recipe}\n```"


def _usage(name: str, *, explains: bool) -> str:
    ours = _IMPORT.format("create_model") if explains else ""
    explanation = """
explanation = model.explain(image)  # of the predicted class; or explain(image, target=3)
explanation.contributions  # (1, H, W), signed, in logits; their sum plus the bias is the logit
explanation.save("explanation.png")"""
    logits = """
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image)[None])"""
    return f"""\
## Use it

```python
import timm
{ours}from PIL import Image

image = Image.open("image.png")
model = timm.create_model("{name}", pretrained=True).eval(){explanation if explains else logits}
```"""


def _in_transformers(repo_id: str, *, explains: bool) -> str:
    ours = _IMPORT.format("pipeline") if explains else ""
    return f"""\
In transformers:

```python
{ours}from transformers import pipeline

pipeline("image-classification", model="{repo_id}")("image.png")
```"""


def _explains(config: Mapping[str, Any]) -> bool:
    """Return True for this package's models."""
    name = config["architecture"].split(".")[0]
    return timm.is_model(name) and timm.model_entrypoint(name).__module__.split(".")[0] == __name__.split(".")[0]


def _measured(summary: Mapping[str, Any]) -> str:
    rows = []
    if "accuracy" in summary:
        count = f"{summary['test_images']:,} test images" if "test_images" in summary else "the test images"
        rows.append(f"| accuracy | {summary['accuracy']:.2%} of {count} of {_data_name(summary)} |")
    if "loss" in summary:
        rows.append(f"| loss on the same images | {summary['loss']:.4f} |")
    found = summary.get("localisation")
    scores = found.items() if isinstance(found, Mapping) else [("", found)]
    for name, score in scores:
        if isinstance(score, (int, float)) and not isinstance(score, bool):
            rows.append(f"| {f'localisation, {name}' if name else 'localisation'} | {score:.4g} |")
    if not rows:
        return ""
    evaluation = summary.get("evaluation", {})
    for name, (score, low, high) in evaluation.get("scores", {}).items():
        rows.append(f"| {name} | {score:.3f} (95 % interval {low:.3f} to {high:.3f}) |")
    lines = ["## Measured", "", "| | |", "| --- | --- |", *rows]
    if "validation" in summary:
        held, epochs = summary["validation"], len(summary.get("history", ()))
        chosen = f"Epoch {summary['epoch']} of {epochs} was chosen by {held['images']:,} training images held out from "
        lines += ["", chosen + f"training ({held['accuracy']:.2%} of them); the test images were used once, for this."]
    elif (epochs := len(summary.get("history", ()))) > 1:
        note = f"Epoch {summary['epoch']} of {epochs} was kept because it was the best on these test images, so expect "
        lines += ["", note + "slightly worse results on new ones."]
    if evaluation:
        lines += ["", "The explanations were evaluated with", "", f"```bash\n{evaluation['command']}\n```"]
    return "\n".join(lines)


def _training(summary: Mapping[str, Any]) -> str:
    options, environment = summary.get("options", {}), summary.get("environment", {})
    lines = []
    if "data" in options:
        count = f"{summary['training_images']:,} images of " if "training_images" in summary else ""
        which = ", handwritten, from UCI, CC BY 4.0; they ship with timm_coda" if options["data"] == ["digits"] else ""
        lines.append(f"- data: {count}{_data_name(summary)}{which}")
    if skipped := len(summary.get("skipped", ())):
        lines.append(f"- images that could not be read: {skipped}, named in `{SUMMARY}`")
    if "parameters" in summary:
        lines.append(f"- parameters: {summary['parameters']:,}")
    if "seconds" in summary:
        gpus = environment.get("gpus", "none")
        machine = environment.get("cpu") if gpus == "none" else gpus
        where = f" on {machine}" if machine else ""
        processes = f", {summary['processes']} processes" if summary.get("processes", 1) > 1 else ""
        lines.append(f"- time: {_duration(summary['seconds'])}{where}{processes}")
    if "commit" in environment:
        lines.append(f"- commit of timm_coda: `{environment['commit']}`")
    packages = [f"{name} {environment[name]}" for name in ("timm_coda", "torch", "timm") if name in environment]
    if packages:
        lines.append(f"- versions: {', '.join(packages)}")
    if "command" in summary:
        command = summary["command"]
        command = f"python {command}" if command.startswith("train.py") else command
        lines.append(f"\n```bash\n{command}\n```\n\nAll options and results are in `{SUMMARY}`.")
    return "\n".join(["## How it was trained", "", *lines]) if lines else ""


def _license(source: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    lines = [f"Weights: {source['license']}."] if "license" in source else []
    if "origin_url" in source:
        lines.append(f"They {'were fine-tuned' if _is_tuned(summary) else 'come'} from {source['origin_url']}.")
    notes = source.get("notes") or ()
    lines += [notes] if isinstance(notes, str) else notes
    if "license" in source:
        lines.append("The code, timm_coda, is Apache-2.0.")
    return "## Licence\n\n" + " ".join(lines) if lines else ""


def _is_tuned(summary: Mapping[str, Any]) -> bool:
    return bool(summary.get("options", {}).get("pretrained"))


def _data_name(summary: Mapping[str, Any]) -> str:
    """Return the dataset's name, without local folders."""
    sources = summary.get("options", {}).get("data", [])
    if list(sources) == ["digits"]:
        return "digits"
    if summary.get("hub_data_set"):
        return summary["hub_data_set"]
    names = [re.split(r"[/\\]", str(source).rstrip("/\\"))[-1] for source in sources]
    return ", ".join(names) or "unnamed data"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
