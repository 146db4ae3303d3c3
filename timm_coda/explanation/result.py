"""What an explanation is: numbers that sum to the decision, and the pictures, tables and files made of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import figures, notebook

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

__all__ = ["Explanation", "concatenate"]


@dataclass(frozen=True, repr=False)
class Explanation:
    """What a model decided for a batch of images and where that came from.

    `value = bias + contributions.sum((-2, -1)) + residual`, exactly. Indexing and iteration give explanations of a
    part of the batch, the batch axis kept. Tensors are detached, on the model's device, float32 or better but for
    `logits`.
    """

    images: Tensor
    """Colours the model saw, in [0, 1], (B, C, H, W)."""
    logits: Tensor
    """(B, classes)"""
    prediction: Tensor
    """Class of the largest logit, (B,)."""
    target: Tensor
    """Explained class, (B,), or T classes an image, (B, T)."""
    value: Tensor
    """What is explained, shaped as `target`: the target's logit, its difference to `versus`, or a unit's output."""
    contributions: Tensor
    """Signed share of each position in `value`, in its unit (logits), (B, H, W) or (B, T, H, W)."""
    weights: Tensor
    """The dynamic linear map W, (B, channels, H, W) or (B, T, channels, H, W); contributions = (W * input).sum."""
    bias: float
    """The part of `value` that no input has a share in."""
    versus: Tensor | None = None
    """Class the target is contrasted with, shaped as `target`."""
    layer: str | None = None
    """Layer whose output (without a unit) or whose unit (with one) is explained."""
    unit: tuple[int, ...] | None = None
    """Explained unit of `layer`: (channel,), summed over positions, or (channel, row, column)."""
    label_names: tuple[str, ...] | None = None

    @property
    def residual(self) -> Tensor:
        """What the contributions leave unexplained, as `value`: rounding, or what a position embedding contributes."""
        return self.value - self.bias - self.contributions.sum((-2, -1))

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> "Explanation":
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"image {index} of an explanation of {len(self)}")
            index = slice(index, index + 1 or None)
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v[index] for k, v in parts.items() if isinstance(v, Tensor)})

    def __iter__(self) -> Iterator["Explanation"]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        shown = {"target": self.target, "value": self.value, "versus": self.versus}
        parts = [f"{k}={[round(x, 4) for x in v.flatten()[:8].tolist()]}" for k, v in shown.items() if v is not None]
        where = f" of {self.layer}" if self.layer else ""
        maps = "x".join(map(str, self.contributions.shape))
        return f"Explanation({len(self)} images, {maps} contributions{where}, {', '.join(parts)}, bias={self.bias:.4f})"

    def rgba(self, **kwargs: Any) -> "np.ndarray":
        """Colour pictures of the weights of positive contributions, see `figures.rgba`."""
        return figures.rgba(self.weights, contributions=self.contributions, **kwargs)

    def heatmap(self, **kwargs: Any) -> "np.ndarray":
        """Signed heat maps, red for and blue against, see `figures.heatmap`."""
        return figures.heatmap(self.contributions, **kwargs)

    def overlay(self, **kwargs: Any) -> "np.ndarray":
        """Heat maps over the images, see `figures.overlay`."""
        return figures.overlay(self.images, self.contributions, **kwargs)

    def plot(self, **kwargs: Any) -> "Figure":
        """Figure of images, predictions and maps with their numbers, see `figures.figure`."""
        shown: dict[str, Any] = {"contributions": self.contributions, "bias": self.bias}
        if self.unit is None and self.versus is None:
            shown |= {"logits": self.logits, "targets": self.target, "label_names": self.label_names}
        else:
            shown |= {"values": self.value, "titles": self._titles(kwargs.pop("label_names", self.label_names))}
        return figures.figure(self.images, **shown | kwargs)

    def _titles(self, label_names: Sequence[str] | None) -> list[list[str]]:
        """(B, T) headings: a class, one class in contrast with another, or a unit of a layer."""
        if self.unit is not None:
            return [[f"{self.layer} {', '.join(map(str, self.unit))}"]] * len(self)
        names = [f"class {i}" for i in range(self.logits.shape[1])] if label_names is None else label_names
        targets: list[list[int]] = self.target.reshape(len(self), -1).tolist()
        if self.versus is None:
            return [[names[a] for a in row] for row in targets]
        others = self.versus.reshape(len(self), -1).tolist()
        return [
            [f"{names[a]}, not {names[b]}" for a, b in zip(row, other, strict=True)]
            for row, other in zip(targets, others, strict=True)
        ]

    def arrays(self) -> "dict[str, np.ndarray]":
        """Every number as a NumPy array under its field's name, and `residual`; 16-bit floats become 32-bit ones."""
        import numpy as np

        found = {f.name: getattr(self, f.name) for f in fields(self)} | {"residual": self.residual}
        floats = (torch.bfloat16, torch.float16)
        for name, value in found.items():
            if isinstance(value, Tensor):
                found[name] = (value.float() if value.dtype in floats else value).cpu().numpy()
        return {name: np.asarray(value) for name, value in found.items() if value is not None}

    def save(self, path: str | Path, **kwargs: Any) -> None:
        """Write the figure (.png, .svg, .pdf; `kwargs` as `plot`) or the arrays (.npz), whole or not at all."""
        if Path(path).suffix.lower() != ".npz":
            figures.save_figure(self.plot(**kwargs), path)
        elif kwargs:
            raise TypeError(f"{', '.join(kwargs)}: for a figure alone, {path} takes the arrays as they are")
        else:
            figures.save_arrays(self.arrays(), path)

    def _repr_html_(self) -> str:
        return notebook.html(self._repr_png_(), self._rows(), total=len(self))

    def _rows(self) -> list[list[str]]:
        """The cells of the notebook's table, one row a class of the first images, see `notebook.HEADINGS`."""
        count = min(len(self), notebook.MAX_IMAGES)
        part = self[:count]
        names = part.label_names or [f"class {i}" for i in range(part.logits.shape[1])]
        titles = part._titles(part.label_names)
        probabilities = torch.sigmoid(part.logits.float())
        maps = part.contributions.double().reshape(count, -1, *part.contributions.shape[-2:])
        sums = maps.clamp(min=0).sum((-2, -1)), maps.clamp(max=0).sum((-2, -1))
        values, residuals = part.value.reshape(count, -1), part.residual.reshape(count, -1)
        rows = []
        for i, best in enumerate(part.prediction.tolist()):
            for t, title in enumerate(titles[i]):
                numbers = [values[i, t].item(), part.bias, sums[0][i, t].item(), sums[1][i, t].item()]
                written = [f"{number:+.2f}" for number in numbers]
                prediction = f"{names[best]} ({probabilities[i, best].item():.2f})"
                rows.append([str(i), prediction, title, *written, f"{residuals[i, t].item():.1g}"])
        return rows

    def _repr_png_(self) -> bytes | None:
        stream = BytesIO()
        try:
            self.plot().savefig(stream, dpi=100)
        except ImportError:  # without the viz extra a notebook shows the text
            return None
        return stream.getvalue()


def concatenate(parts: Sequence[Explanation]) -> Explanation:
    """Explanations of parts of a batch, in one."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    joined = {
        f.name: torch.cat([getattr(part, f.name) for part in parts])
        for f in fields(first)
        if isinstance(getattr(first, f.name), Tensor)
    }
    return replace(first, **joined)
