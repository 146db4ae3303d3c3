"""The result of an explanation: contributions that sum to a logit, and figures, tables and files made from them."""

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
    """A model's outputs for a batch of images, and the exact contribution of each position to them.

    `value = bias + contributions.sum((-2, -1)) + residual`, exactly. Indexing and iteration return explanations of
    parts of the batch; the batch axis is kept. Tensors are detached and on the model's device. They are float32 or
    better, except the `logits` of a bfloat16 model, which keep its dtype.
    """

    images: Tensor
    """Input colours in [0, 1], (B, C, H, W)."""
    logits: Tensor
    """(B, classes)"""
    prediction: Tensor
    """Class with the largest logit, (B,)."""
    target: Tensor
    """Explained class, (B,), or T classes per image, (B, T)."""
    value: Tensor
    """Explained output, shaped like `target`: the target's logit (minus that of `versus`), or a unit's output."""
    contributions: Tensor
    """Signed contribution of each position to `value`, in its unit (logits), (B, H, W) or (B, T, H, W)."""
    weights: Tensor
    """Dynamic linear map W, (B, C, H, W) or (B, T, C, H, W); contributions = (W * input).sum over the C channels."""
    bias: float
    """The part of `value` that does not depend on the input."""
    versus: Tensor | None = None
    """Class that the target is contrasted with, shaped like `target`."""
    layer: str | None = None
    """Layer whose output `weights` apply to (without `unit`), or layer of the explained unit; None for the pixels."""
    unit: tuple[int, ...] | None = None
    """Explained unit of `layer`: (channel,), at `position` or summed over positions, or (channel, row, column)."""
    position: Tensor | None = None
    """Row and column of the explained unit in each image, (B, 2); None for a sum over positions."""
    label_names: tuple[str, ...] | None = None
    """Name of each class."""

    @property
    def residual(self) -> Tensor:
        """The unexplained part of `value`, same shape: rounding errors and a position embedding's contribution."""
        return self.value - self.bias - self.contributions.sum((-2, -1))

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> "Explanation":
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"image index {index} is out of range: the explanation has {len(self)} images")
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
        """Render the weights of positive contributions in colour, see `figures.rgba`."""
        return figures.rgba(self.weights, contributions=self.contributions, **kwargs)

    def heatmap(self, **kwargs: Any) -> "np.ndarray":
        """Draw signed heat maps: red is evidence for, blue evidence against, see `figures.heatmap`."""
        return figures.heatmap(self.contributions, **kwargs)

    def overlay(self, **kwargs: Any) -> "np.ndarray":
        """Draw heat maps over the images, see `figures.overlay`."""
        return figures.overlay(self.images, self.contributions, **kwargs)

    def plot(self, **kwargs: Any) -> "Figure":
        """Draw a figure of images, predictions and maps with their numbers, see `figures.figure`."""
        shown: dict[str, Any] = {"contributions": self.contributions, "bias": self.bias}
        if self.unit is None and self.versus is None:
            shown |= {"logits": self.logits, "targets": self.target, "label_names": self.label_names}
        else:
            shown |= {"values": self.value, "titles": self._titles(kwargs.pop("label_names", self.label_names))}
        return figures.figure(self.images, **shown | kwargs)

    def _titles(self, label_names: Sequence[str] | None) -> list[list[str]]:
        """Headings of the maps, (B, T): a class, a contrast of two classes, or a unit of a layer."""
        if self.unit is not None:
            places = [[]] * len(self) if self.position is None else self.position.tolist()
            return [[f"{self.layer} {', '.join(map(str, [self.unit[0], *place]))}"] for place in places]
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
        """Convert all fields and `residual` to NumPy arrays by name; float16 and bfloat16 become float32."""
        import numpy as np

        found = {f.name: getattr(self, f.name) for f in fields(self)} | {"residual": self.residual}
        floats = (torch.bfloat16, torch.float16)
        for name, value in found.items():
            if isinstance(value, Tensor):
                found[name] = (value.float() if value.dtype in floats else value).cpu().numpy()
        return {name: np.asarray(value) for name, value in found.items() if value is not None}

    def save(self, path: str | Path, **kwargs: Any) -> None:
        """Write the figure (.png, .svg, .pdf) or the arrays (.npz) atomically.

        Args:
            path: file to write; missing folders are created
            kwargs: options of `plot`, only for a figure

        Raises:
            ValueError: another suffix.
            TypeError: options for an .npz file.
        """
        if Path(path).suffix.lower() != ".npz":
            figures.save_figure(self.plot(**kwargs), path)
        elif kwargs:
            raise TypeError(f"{', '.join(kwargs)}: only figures take options; omit them to write arrays to {path}")
        else:
            figures.save_arrays(self.arrays(), path)

    def _repr_html_(self) -> str:
        return notebook.html(self._repr_png_(), self._rows(), total=len(self))

    def _rows(self) -> list[list[str]]:
        """Cells of the notebook table: a row per class for each of the first images, see `notebook.HEADINGS`."""
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
        except ImportError:  # without the viz extra, a notebook shows only the table
            return None
        return stream.getvalue()


def concatenate(parts: Sequence[Explanation]) -> Explanation:
    """Concatenate explanations of parts of a batch into one."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    joined = {
        f.name: torch.cat([getattr(part, f.name) for part in parts])
        for f in fields(first)
        if isinstance(getattr(first, f.name), Tensor)
    }
    return replace(first, **joined)
