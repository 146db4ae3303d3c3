"""Example images, as PNG files that a visitor can choose."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..images import ImageError, read_image

_SIDE = 1024  # pixels; larger than the input of any model here


@dataclass(frozen=True)
class Examples:
    """Image files, for models that have all of these classes; without classes, for every model."""

    paths: Sequence[Path]
    classes: frozenset[str] = frozenset()

    def fitting(self, names: Sequence[str]) -> Sequence[Path]:
        """Return the files for a model with these class names."""
        return self.paths if self.classes <= set(names) else []


def digit_examples(folder: Path) -> Examples:
    """Write one handwritten digit of each class, from the package's test images, into a folder."""
    from ..data import load_data

    split = load_data("digits").test
    paths = []
    for label in range(10):
        index = next(i for i in range(len(split)) if split.labels[i] == label)
        paths.append(folder / f"digit {label}.png")
        split.image(index).save(paths[-1])
    return Examples(paths, frozenset(map(str, range(10))))


def folder_examples(source: Path, folder: Path) -> Examples:
    """Write the images of a folder into another folder, large ones downsampled.

    Raises:
        ImageError: the folder does not exist or has no readable image.
    """
    if not source.is_dir():
        raise ImageError(f"{source}: the folder of example images does not exist")
    paths = []
    for path in sorted(source.iterdir()):
        try:
            image = read_image(path)
        except ImageError:
            continue
        image.thumbnail((_SIDE, _SIDE))
        paths.append(folder / f"{path.stem}.png")
        image.save(paths[-1])
    if not paths:
        raise ImageError(f"{source}: no readable image in this folder: use a folder of PNG or JPEG files")
    return Examples(paths)
