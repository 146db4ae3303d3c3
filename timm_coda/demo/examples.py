"""Example images, as PNG files that a visitor can choose."""

from pathlib import Path

from ..images import ImageError, read_image

_SIDE = 1024  # pixels; more than any model here looks at


def digit_examples(folder: Path) -> list[Path]:
    """Write one handwritten digit of each class, from the package's test images, into a folder."""
    from ..data import load_data

    split = load_data("digits").test
    paths = []
    for label in range(10):
        index = next(i for i in range(len(split)) if split.labels[i] == label)
        paths.append(folder / f"digit {label}.png")
        split.image(index).save(paths[-1])
    return paths


def folder_examples(source: Path, folder: Path) -> list[Path]:
    """Write the images of a folder, made smaller where they are large, into another.

    Raises:
        ImageError: there is no such folder or no image in it.
    """
    if not source.is_dir():
        raise ImageError(f"{source}: there is no such folder of example images")
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
        raise ImageError(f"{source}: no image in it that can be read: give a folder of PNG or JPEG files")
    return paths
