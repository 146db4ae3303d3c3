"""A small, real evaluation of the digits model in the format of `timm-coda evaluate`, to test code that reads it."""

import json
from pathlib import Path

import numpy as np
import timm
import torch

import timm_coda  # noqa: F401
from timm_coda import data, hub

SIDE = 2  # cells per side of a grid
EXPLAINERS = {"inherent": "Model-inherent", "gradient": "Gradient", "random": "Random"}


def explain(name: str, model, images: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """Return signed maps (N, H, W) for one target per image."""
    if name == "inherent":
        return model.explain(images, targets).contributions.numpy()
    if name == "gradient":
        images = images.clone().requires_grad_()
        chosen = model(images).gather(1, targets[:, None]).sum()
        return torch.autograd.grad(chosen, images)[0].sum(1).numpy()
    return np.random.default_rng(len(images)).normal(size=(len(images), *images.shape[2:])).astype(np.float32)


def localise(maps: np.ndarray) -> list[float]:
    """Return the share of positive evidence in each class's own cell: maps (SIDE * SIDE, H, W), cells row by row."""
    positive = np.maximum(maps, 0)
    cells = positive.reshape(len(maps), SIDE, maps.shape[1] // SIDE, SIDE, -1).sum((2, 4)).reshape(len(maps), -1)
    return (np.diagonal(cells) / cells.sum(1)).tolist()


def remove(model, images: torch.Tensor, targets: torch.Tensor, maps: np.ndarray, *, shares: list[float]) -> np.ndarray:
    """Return the target's probability (N, len(shares)) while the most important pixels become grey."""
    order = np.argsort(-maps.reshape(len(maps), -1), axis=1)
    found = []
    for share in shares:
        changed = images.clone().flatten(2)
        for image, pixels in zip(changed, order[:, : round(share * order.shape[1])], strict=True):
            image[:, pixels] = 0.5
        with torch.no_grad():
            logits = model(changed.view_as(images))
        found.append(logits.gather(1, targets[:, None])[:, 0].sigmoid().numpy())
    return np.stack(found, 1)


def summarise(values: list[float], statistic: str, curve: dict | None = None) -> dict:
    rng, array = np.random.default_rng(0), np.array(values)
    draws = getattr(np, statistic)(rng.choice(array, (500, len(array))), axis=1)
    q25, median, q75 = np.percentile(array, (25, 50, 75)).tolist()
    numbers = {"n": len(values), "mean": array.mean().item(), "median": median, "q25": q25, "q75": q75, "seconds": 0.1}
    return {"values": values, "interval": np.percentile(draws, (2.5, 97.5)).tolist(), "curve": curve, **numbers}


def write_evaluation(folder: Path, *, explainers=EXPLAINERS, explain=explain, count: int = 24) -> Path:
    """Evaluate on `count` test images, and add an explainer that failed."""
    model = timm.create_model("coda_net_xs.digits", pretrained=True).eval()
    source = data.load_data("digits")
    _, transform = data.create_transforms(timm.data.resolve_model_data_config(model))
    images, labels, _ = data.ImageDataset(source.test, transform).examples(count)
    with torch.no_grad():
        logits = model(images)
    predictions = logits.argmax(1)
    shares = [0, 0.05, 0.1, 0.2, 0.3, 0.4]
    localised: dict = {"kernel_shap": {"error": "ValueError: <b>3 channels</b> expected & 6 seen"}}
    deleted: dict = dict(localised)
    examples = {"images": images, "labels": labels, "predictions": predictions}
    examples["probabilities"] = logits.sigmoid().gather(1, predictions[:, None])[:, 0]
    examples = {name: tensor.numpy()[:4] for name, tensor in examples.items()}
    grid = {}
    by_class = [images[labels == c] for c in range(10)]
    sets = [torch.arange(4) + 2 * i for i in range(4)]
    pictures = [torch.cat([torch.cat([by_class[c][0] for c in s[i : i + 2]], 2) for i in (0, 2)], 1) for s in sets]
    for name in explainers:
        per_grid = [explain(name, model, p.expand(4, -1, -1, -1), s) for p, s in zip(pictures, sets, strict=True)]
        localised[name] = summarise([v for maps in per_grid for v in localise(maps)], "median")
        grid |= {"image": pictures[0].numpy(), "labels": sets[0].numpy(), f"maps_{name}": per_grid[0]}
        maps = explain(name, model, images, labels)
        curves = remove(model, images, labels, maps, shares=shares)
        low, high = np.percentile(curves, (25, 75), axis=0)
        curve = {"x": shares, "x_label": "share of pixels removed", "y_label": "probability of the class"}
        curve |= {"mean": curves.mean(0).tolist(), "low": low.tolist(), "high": high.tolist()}
        deleted[name] = summarise(curves.mean(1).tolist(), "mean", curve)
        examples[f"maps_{name}"] = maps[:4]
    metrics = {
        "grid_localisation": {
            "label": "Grid localisation",
            "about": "Pictures of 4 classes in a grid: how much of the positive evidence for a class is in its own?",
            "unit": "share of positive evidence in the right cell",
            "higher_is_better": True,
            "baseline": {"value": 1 / SIDE**2, "label": "uniform map"},
            "explainers": localised,
            "statistic": "median",
        },
        "pixel_removal": {
            "label": "Pixel removal, most important first",
            "about": "The pixels with the most evidence turn grey: how fast does the probability of the class fall?",
            "unit": "mean probability of the class while pixels are removed",
            "higher_is_better": False,
            "baseline": None,
            "explainers": deleted,
            "statistic": "mean",
        },
    }
    names = explainers | {"kernel_shap": "Kernel SHAP"}
    results = {
        "command": f"timm-coda evaluate --model coda_net_xs.digits --data digits --images {count} --output out",
        "model": "coda_net_xs.digits",
        "data": ["digits"],
        "seed": 42,
        "label_names": list(source.label_names),
        "environment": hub.environment(),
        "settings": {"grids": 4, "grid_size": SIDE, "images": count},
        "accuracy": (predictions == labels).float().mean().item(),
        "seconds": 1.5,
        "metrics": metrics,
        "explainers": {name: {"label": label, "about": f"About {label}."} for name, label in names.items()},
    }
    (folder / "arrays").mkdir(parents=True)
    np.savez(folder / "arrays/examples.npz", **examples)
    np.savez(folder / "arrays/grid.npz", **grid)
    (folder / "results.json").write_text(json.dumps(results))
    return folder
