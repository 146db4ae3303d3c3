"""Run an evaluation in small units of work, each saved when done, so that a killed evaluation can be resumed."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import resolve_model_data_config
from tqdm import tqdm

from ..data import ImageData, ImageDataset, create_transforms, data_changes, describe_data, load_data
from ..explanation import Classes
from ..hub import (
    ALONE,
    RUNNING,
    Processes,
    __version__,
    claimed,
    environment,
    load_model,
    replacing,
    temporary_folder,
    weights_fingerprint,
    write_text,
)
from .base import Curve, EvaluationError, Explainer, ExplainerError, Metric, Scores, Subject
from .localisation import GridLocalisation
from .statistics import summarise
from .subject import make_subject, predict

__all__ = ["Setup", "evaluate", "open_folder", "run"]

RESULTS, PARTS, ARRAYS, REPORT = "results.json", "parts", "arrays", "report.html"
_FREE = {"batch_size", "device"}  # may differ when an evaluation is resumed: they change values only by rounding
_EXAMPLES = 8  # images, each of another class, whose maps the report shows side by side


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Model, data and settings of an evaluation; `timm-coda evaluate --help` explains each."""

    model: str
    data: tuple[str, ...]
    subset: str | None = None
    test_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    grids: int = 500
    grid_size: int = 3
    images: int = 1024
    seed: int = 42
    batch_size: int = 64
    device: str = "cpu"


def run(
    setup: Setup,
    explainers: Sequence[Explainer],
    metrics: Sequence[Metric],
    folder: Path,
    *,
    command: str,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Load model and data, then call `evaluate` and return its results.

    Args:
        setup: model, data and settings
        explainers, metrics: created with the settings in `setup`
        folder: output folder; an evaluation in it with the same setup is resumed
        command: command line to show to readers
        overwrite: delete the evaluation in the folder and start again
        say: called with notes for the user
        processes: the processes that share the work; the first one writes all files except examples of maps

    Raises:
        EvaluationError: the model cannot explain itself or does not fit the data, or the folder has other content.
        DataError: the data cannot be used.
        HubError: the model cannot be loaded, or another process evaluates into the folder.
    """
    model, data, settings = processes.in_turn(lambda: _load(setup))
    with processes.held_by_first(claimed(folder)):
        processes.first(lambda: open_folder(folder, settings, overwrite=overwrite))
        for note in data.notes:
            say(note)
        _, transform = create_transforms(resolve_model_data_config(model))
        images = ImageDataset(data.test, transform)
        model = model.to(setup.device)
        found = processes.first(lambda: kept(folder / PARTS / "predictions.npz"))
        if found is None:
            readable, logits, unread = predict(model, images, setup.batch_size, processes)
            found = {
                "readable": readable,
                "logits": logits,
                "unread": np.array([": ".join(one) for one in unread], str),
            }
            processes.first(partial(keep, folder / PARTS / "predictions.npz", found))
        for reason in found["unread"].tolist():
            say(f"skipped {reason}")
        subject = make_subject(
            model,
            images,
            found["readable"],
            found["logits"],
            count=setup.images,
            label_names=data.label_names,
            batch_size=setup.batch_size,
            seed=setup.seed,
            processes=processes,
        )
        facts = {"command": command, "model": setup.model, "data": list(setup.data), "settings": asdict(setup)}
        facts |= {name: settings[name] for name in ("weights", "dataset")} | {"notes": list(data.notes)}
        return evaluate(subject, explainers, metrics, folder, facts=facts)


def _load(setup: Setup) -> tuple[Any, ImageData, dict[str, Any]]:
    """Return the model, the data, and the settings with the hashes of both."""
    model = load_model(setup.model)
    if not hasattr(model, "explain"):
        raise EvaluationError(f"{type(model).__name__} cannot explain itself: use a timm_coda model")
    data = load_data(
        setup.data,
        subset=setup.subset,
        test_split=setup.test_split,
        image_column=setup.image_column,
        label_column=setup.label_column,
        training=False,
    )
    settings = {key: value for key, value in asdict(setup).items() if key not in _FREE}
    settings |= {"data": list(setup.data), "weights": weights_fingerprint(model), "timm_coda": __version__}
    settings["dataset"] = describe_data(data, ["test"])
    return model, data.matched(Classes.of(model)), settings


def open_folder(folder: Path, settings: dict[str, Any], *, overwrite: bool = False) -> None:
    """Create the folder of an evaluation, or check that its evaluation has the same settings.

    Raises:
        EvaluationError: the folder has an evaluation with other settings, data or weights, or other content.
    """
    record = folder / PARTS / "settings.json"
    if overwrite and record.exists():
        with temporary_folder(folder) as old:  # deleted at the end
            for path in (folder / name for name in (RESULTS, ARRAYS, REPORT, PARTS)):  # what says so is moved last
                if path.exists():
                    path.rename(old / path.name)
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        changed = [
            f"{key} was {before.get(key)!r}, is {now!r}"
            for key, now in settings.items()
            if key != "dataset" and before.get(key) != now
        ]
        changed += data_changes(before["dataset"], settings["dataset"]) if "dataset" in before else []
        if changed:
            raise EvaluationError(
                f"{folder} has an evaluation with other settings or data ({'; '.join(changed)}): use another "
                "--output, or --overwrite"
            )
    elif folder.exists() and (not folder.is_dir() or any(path.name != RUNNING for path in folder.iterdir())):
        raise EvaluationError(f"{folder} exists, but is not an evaluation: use a new or empty --output")
    else:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_text(record, json.dumps(settings, indent=1) + "\n")


def evaluate(
    subject: Subject,
    explainers: Sequence[Explainer],
    metrics: Sequence[Metric],
    folder: Path,
    *,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Score every explainer by every metric, and write `results.json` and `arrays/`.

    If an explainer fails, its error is recorded and the others continue; the next run tries it again.

    Args:
        subject: the model and its images
        explainers, metrics: in the order of tables and figures
        folder: as created by `open_folder`; finished units of work are saved in its `parts`
        facts: further entries of `results.json`

    Returns:
        The contents of `results.json`.
    """
    parts = folder / PARTS
    subject = replace(subject, folder=parts)
    found: dict[str, Any] = {metric.name: _describe(metric, subject) for metric in metrics}
    seconds = 0.0
    units = [(metric, explainer) for metric in metrics for explainer in explainers]
    with tqdm(units, desc="evaluation", disable=None, ncols=80, leave=False) as bar:
        for metric, explainer in bar:
            entries = found[metric.name]["explainers"]
            path = parts / f"{metric.name}.{explainer.name}.npz"
            part = subject.processes.first(partial(kept, path))
            if part is None:
                part = _score(subject, metric, explainer, found[metric.name].get("error"))
                if "error" in part:
                    entries[explainer.name] = {"error": part["error"]}
                    if part.get("hopeless"):
                        found[metric.name]["error"] = part["error"]
                    continue
                subject.processes.first(partial(keep, path, part))
            entries[explainer.name] = summarise(_as_scores(part), metric.statistic, seed=subject.seed)
            entries[explainer.name]["seconds"] = float(part["seconds"])
            seconds += float(part["seconds"])
    _write_examples(subject, explainers, metrics, folder)
    results = {
        **facts,
        "seed": subject.seed,
        "label_names": list(subject.label_names),
        "environment": environment(),
        "accuracy": float((subject.logits.argmax(1) == subject.labels).mean()),
        "seconds": seconds,
        "metrics": found,
        "explainers": {
            explainer.name: {"label": explainer.label, "about": explainer.about} for explainer in explainers
        },
    }
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    subject.processes.first(lambda: write_text(folder / RESULTS, text))
    return results


def _describe(metric: Metric, subject: Subject) -> dict[str, Any]:
    keys = ("label", "about", "unit", "higher_is_better", "statistic")
    entry = {key: getattr(metric, key) for key in keys}
    baseline = metric.baseline(subject)
    entry["baseline"] = None if baseline is None else {"value": baseline.value, "label": baseline.label}
    return {**entry, "explainers": {}}


def _score(subject: Subject, metric: Metric, explainer: Explainer, error: str | None) -> dict[str, Any]:
    """Run a unit of work; return the arrays to save, or its error."""
    if error is not None:
        return {"error": error}
    start = time.perf_counter()
    try:
        scores = subject.processes.together(lambda: metric(subject, explainer))
        if not np.isfinite(scores.values).all():
            raise ValueError(f"{metric.name} gives NaN or infinite scores")
    except OSError:  # such as a full disk: not a failure of the explainer
        raise
    except EvaluationError as failure:
        return {"error": str(failure), "hopeless": True}
    except ExplainerError as failure:
        return {"error": str(failure)}
    except Exception as failure:  # a library's method may fail on a model with any error
        return {"error": f"{type(failure).__name__}: {failure}"[:400]}
    part: dict[str, Any] = {"values": scores.values, "seconds": time.perf_counter() - start}
    if scores.curve is not None:
        curve = scores.curve
        part |= {"x": curve.x, "y": curve.y, "x_label": curve.x_label, "y_label": curve.y_label}
    return part


def _as_scores(part: dict[str, Any]) -> Scores:
    if "x" not in part:
        return Scores(part["values"])
    return Scores(part["values"], Curve(part["x"], part["y"], str(part["x_label"]), str(part["y_label"])))


def _write_examples(subject: Subject, explainers: Sequence[Explainer], metrics: Sequence[Metric], folder: Path) -> None:
    """Write maps of the first image of some classes (`arrays/examples.npz`) and the first grid (`arrays/grid.npz`)."""
    first = np.unique(subject.labels, return_index=True)[1][:_EXAMPLES]
    images, labels = subject.load(first.tolist()), subject.labels[first]
    logits = subject.logits[first]
    examples = {"images": images.numpy(), "labels": labels, "predictions": logits.argmax(1)}
    examples["probabilities"] = torch.from_numpy(logits.max(1)).sigmoid().numpy()
    grids = {}
    for metric in metrics:
        if isinstance(metric, GridLocalisation) and not grids:
            try:
                image, classes = metric.make(subject, metric.choose(subject)[:1])
            except EvaluationError:  # the table already has this error
                continue
            grids = {"image": image[0].numpy(), "labels": classes[0].numpy()}

    def explain(explainer: Explainer) -> dict[str, np.ndarray]:
        path = folder / PARTS / f"examples.{explainer.name}.npz"
        part = kept(path) or {}
        try:
            if "maps" not in part:
                part["maps"] = explainer(subject.model, images, torch.from_numpy(labels)).numpy()
                keep(path, part)
            if grids and "grid" not in part:
                image, classes = torch.from_numpy(grids["image"]), torch.from_numpy(grids["labels"])
                part["grid"] = explainer(subject.model, image[None], classes[None])[0].numpy()
                keep(path, part)
        except OSError:
            raise
        except Exception:  # the table has this error, if a metric needed the same maps
            return {}
        return part

    def write(parts: list[dict[str, np.ndarray]]) -> None:
        for explainer, part in zip(explainers, parts, strict=True):
            if part:
                examples[f"maps_{explainer.name}"] = part["maps"]
            if part and grids:
                grids[f"maps_{explainer.name}"] = part["grid"]
        (folder / ARRAYS).mkdir(exist_ok=True)
        keep(folder / ARRAYS / "examples.npz", examples)
        if grids:
            keep(folder / ARRAYS / "grid.npz", grids)

    subject.processes.share(explainers, explain, join=write)


def keep(path: Path, arrays: dict[str, Any]) -> None:
    """Write an .npz file atomically."""
    with replacing(path) as stream:
        np.savez(stream, **arrays)


def kept(path: Path) -> dict[str, np.ndarray] | None:
    """Load the arrays that `keep` saved; None if there is no file."""
    if not path.exists():
        return None
    with np.load(path) as arrays:
        return dict(arrays)
