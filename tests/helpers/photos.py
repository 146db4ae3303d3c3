"""Photos that a phone turned: digits stored in all eight EXIF orientations."""

from pathlib import Path

import numpy as np
from PIL import Image

from timm_coda.data import load_data

# What a camera held in another way stores: the inverse of the turn that makes it upright.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
DIGITS = (0, 2, 3, 5, 7)


def turned(image: Image.Image, orientation: int) -> tuple[Image.Image, Image.Exif]:
    """Return the image as stored, and the EXIF data that say how to make it upright."""
    turn, exif = STORED[orientation], Image.Exif()
    exif[0x0112] = orientation
    return image if turn is None else image.transpose(turn), exif


def save_turned_digits(folder: Path) -> list[Path]:
    """Write five digits at 64 pixels, in all eight orientations, as DIGIT/ORIENTATION.jpg; return the 40 paths."""
    digits, paths = load_data("digits").test, []
    for digit in DIGITS:
        index = int(np.flatnonzero(digits.labels == digit)[0])
        upright = digits.image(index).resize((64, 64), Image.Resampling.BICUBIC)
        (folder / str(digit)).mkdir(parents=True)
        for orientation in STORED:
            paths.append(folder / str(digit) / f"{orientation}.jpg")
            stored, exif = turned(upright, orientation)
            stored.save(paths[-1], exif=exif, quality=95, subsampling=0)
    return paths
