"""Labelled images in: data sets from the Hub, parquet files, image folders or the package itself, as torch batches.

`load_data` finds the splits, the columns and the class names, and checks every label. `ImageDataset`, `EpochSampler`
and `collate` turn a split into batches that depend on nothing but a seed: not on the number of worker processes, not
on the global random state, not on whether the run was interrupted. An image that cannot be read is reported, not fatal.
"""

import contextlib
import glob
import io
import os
import random
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

from .images import to_rgb

DIGITS = Path(__file__).parent / "digits"
# How a split is called, in the order in which we take one to evaluate on: validation before test, because the test
# labels of many data sets on the Hub are withheld (-1).
_TRAIN = ("train", "training")
_EVAL = ("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")


class DataError(ValueError):
    """A data set that cannot be used as it is; the message names what was seen and how to mend it."""


@dataclass(frozen=True)
class Split:
    """The images of one part of a data set, still encoded, with a checked class number for each."""

    name: str
    rows: datasets.Dataset  # one column, encoded images
    column: str
    indices: np.ndarray  # (n,) the split's rows
    labels: np.ndarray  # (n,) class numbers

    def __len__(self) -> int:
        return len(self.indices)

    def describe(self, index: int) -> str:
        """Name an image so that a person finds it again: its split, row and, where known, file."""
        row = int(self.indices[index])
        path = (self.rows[row][self.column] or {}).get("path")
        return f"{self.name} row {row}" + (f" ({path})" if path else "")

    def image(self, index: int) -> PIL.Image.Image:
        """Decode an image to RGB. Raises whatever the decoder raises where it cannot."""
        encoded = self.rows[int(self.indices[index])][self.column]
        if encoded is None or (encoded["bytes"] is None and encoded["path"] is None):
            raise DataError("there is no image in this row")
        with PIL.Image.open(encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"])) as image:
            image.load()
            return to_rgb(PIL.ImageOps.exif_transpose(image))


@dataclass(frozen=True)
class ImageData:
    """A labelled image data set: what to train on, what to evaluate on, and what the classes are called."""

    train: Split
    test: Split
    image_column: str
    label_column: str
    label_names: tuple[str, ...]
    notes: tuple[str, ...]  # decisions a person should know of


def load_data(
    source: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    subset: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    num_classes: int | None = None,
) -> ImageData:
    """Load a labelled image data set.

    Args:
        source: `"digits"` (ships with the package), a data set's id on the Hugging Face Hub, or on this machine:
            parquet files, a pattern for them, a folder of them with `train` and `test` (or `validation`) in their
            names, or a folder of images with a folder for each class, inside `train/` and `test/` where there are two
            parts.
        subset: Which configuration of a Hub data set.
        image_column: The column of images; by default the only one there is.
        label_column: The column of labels; by default the only one there is, or the one named `label`.
        train_split: The split to train on; by default the one called `train`.
        test_split: The split to evaluate on; by default one called `validation` or `test`.
        val_fraction: Without a split to evaluate on, this share of every class is taken from the training split, the
            same images each time.
        seed: Seed of that division.
        num_classes: The number of classes wanted; by default the data set's.

    Raises:
        DataError: The data set is empty, cannot be found or read, its columns are ambiguous, or a label is not a class.
    """
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    splits, notes = _find_splits([os.fspath(item) for item in sources], subset)
    train_name = _choose_split(splits, train_split, _TRAIN, "--train-split")
    if train_name is None:
        if len(splits) > 1:
            raise DataError(f"no split is called train; there are {_list(splits)}: name one with --train-split")
        train_name = next(iter(splits))
    test_name = _choose_split(splits, test_split, [name for name in _EVAL if name != train_name], "--test-split")
    train_rows = splits[train_name]
    test_rows = None if test_name is None else splits[test_name]
    for name, rows in ((train_name, train_rows), (test_name, test_rows)):
        if rows is not None and len(rows) == 0:
            raise DataError(f"the {name} split of {_list(sources)} is empty: there is nothing to learn from")
    image_column, label_column = _find_columns(train_rows.features, image_column, label_column)
    if test_rows is not None and not {image_column, label_column} <= set(test_rows.features):
        raise DataError(
            f"the {test_name} split lacks {image_column} or {label_column}; {_describe(test_rows.features)}"
        )

    labels, names = _encode_labels(train_rows, label_column, train_name, None, num_classes)
    images = _encoded_images(train_rows, image_column)
    train = Split(train_name, images, image_column, np.arange(len(labels)), labels)
    if test_rows is not None:
        test_labels, _ = _encode_labels(test_rows, label_column, str(test_name), names, num_classes)
        test_images = _encoded_images(test_rows, image_column)
        test = Split(str(test_name), test_images, image_column, np.arange(len(test_labels)), test_labels)
    else:
        train, test = _divide(train, val_fraction, seed)
        notes.append(
            f"no validation or test split: {len(test)} of {len(train) + len(test)} training images are held out "
            f"(--val-fraction {val_fraction}, the same images each time)"
        )
    if num_classes is not None:
        names = (names + tuple(str(number) for number in range(len(names), num_classes)))[:num_classes]
    return ImageData(train, test, image_column, label_column, names, tuple(notes))


class Skipped(NamedTuple):
    """An image that could not be read."""

    name: str
    reason: str


class Batch(NamedTuple):
    """A batch, smaller by the images that could not be read: `images` (B, C, H, W) and `labels` (B,); B may be 0."""

    images: torch.Tensor
    labels: torch.Tensor
    skipped: list[Skipped]


class ImageDataset(Dataset):
    """A split as a torch data set of `(image, label)`, or `Skipped` where the image cannot be read.

    A random transform draws from (seed, epoch, index) alone, and leaves Python's, NumPy's and torch's global random
    state as it found it. The index is an int, or the pair (epoch, index) that `EpochSampler` gives.

    Args:
        split: The images.
        transform: From a PIL image to a tensor (C, H, W).
        seed: Seed of the transform; None where it draws no random numbers.
    """

    def __init__(self, split: Split, transform: Callable[[PIL.Image.Image], torch.Tensor], *, seed: int | None = None):
        self.split, self.transform, self.seed = split, transform, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, int] | Skipped:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        try:
            image = self.split.image(index)
        except Exception as error:  # a decoder meets broken bytes with nearly any exception
            return Skipped(self.split.describe(index), f"{type(error).__name__}: {error}")
        if self.seed is None:
            return self.transform(image), int(self.split.labels[index])
        with fixed_randomness(self.seed, epoch, index):
            return self.transform(image), int(self.split.labels[index])

    def examples(self, count: int) -> Batch:
        """The first images that can be read, at most `count`, from as many classes as possible, always the same."""
        seen: dict[int, int] = {}
        ranks = []  # how many images of its class stand before an image
        for label in self.split.labels.tolist():
            ranks.append(seen.get(label, 0))
            seen[label] = ranks[-1] + 1
        samples: list[Any] = []
        for index in np.lexsort((self.split.labels, ranks)).tolist():
            if count == 0:
                break
            samples.append(self[index])
            count -= not isinstance(samples[-1], Skipped)
        return collate(samples)


class EpochSampler(Sampler):
    """Shuffled (epoch, index) pairs; the order is a function of (seed, epoch), and an epoch can start in its middle."""

    def __init__(self, length: int, *, seed: int):
        self.length, self.seed, self.epoch, self.start = length, seed, 0, 0

    def seek(self, epoch: int, start: int = 0) -> None:
        """Let the next iteration be the given epoch, without its first `start` samples."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.length - self.start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        return iter([(self.epoch, int(index)) for index in order[self.start :]])


def collate(samples: Sequence[tuple[torch.Tensor, int] | Skipped]) -> Batch:
    """Make a batch of the images that could be read, and a list of the others."""
    skipped = [sample for sample in samples if isinstance(sample, Skipped)]
    read = [sample for sample in samples if not isinstance(sample, Skipped)]
    images = torch.stack([image for image, _ in read]) if read else torch.empty(0)
    return Batch(images, torch.tensor([label for _, label in read], dtype=torch.long), skipped)


def create_loader(
    dataset: ImageDataset, *, batch_size: int, workers: int, sampler: Sampler | None = None
) -> DataLoader:
    """Make a loader of `Batch`es: in order, or in the sampler's order and then without a last, smaller batch."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=sampler is not None,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=collate,
        worker_init_fn=_ignore_interrupts,
        pin_memory=torch.cuda.is_available(),
    )


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; it is the main one's to see to


def check_images(model: torch.nn.Module, images: torch.Tensor) -> None:
    """See that a model takes images (B, C, H, W) as they come out of a data set; it is in eval mode afterwards.

    Raises:
        DataError: There are none, a model that explains gets values outside [0, 1], or the model rejects them.
    """
    if len(images) == 0:
        raise DataError("none of the images to test with can be read")
    low, high = images.min().item(), images.max().item()
    if hasattr(model, "explain") and (low < -0.001 or high > 1.001):
        raise DataError(
            f"images reach from {low:.2f} to {high:.2f}, but {type(model).__name__} wants [0, 1]: mean/std "
            "normalisation is the likely cause; the model's config must have mean 0 and std 1"
        )
    try:
        with torch.no_grad():
            model.eval()(images)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        shape = "x".join(map(str, images.shape[1:]))
        raise DataError(f"the model does not take images of shape {shape}: {error}") from error


def derive_seed(*key: int) -> int:
    """Mix non-negative ints into one seed below 2**32."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@contextlib.contextmanager
def fixed_randomness(*key: int) -> Iterator[None]:
    """Seed Python, NumPy and torch (on the CPU) from non-negative ints, and put back their states at the end."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    seed = derive_seed(*key)
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def create_transforms(
    config: dict[str, Any],
    *,
    crop_padding: int = 0,
    scale: tuple[float, float] = (1.0, 1.0),
    ratio: tuple[float, float] = (1.0, 1.0),
    hflip: float = 0.0,
    vflip: float = 0.0,
    color_jitter: float = 0.0,
    auto_augment: str | None = None,
    erase: float = 0.0,
) -> tuple[Callable, Callable]:
    """Make the training and the evaluation transform: timm's, from a PIL image to a tensor (C, H, W).

    Args:
        config: timm's data configuration (`timm.data.resolve_model_data_config`). With mean 0 and std 1 the images
            stay in [0, 1], which is what the models of this package want.
        crop_padding: Shift images by up to this many pixels (pad with black, crop).
        scale: Area of a random crop, as a share of the image.
        ratio: Aspect ratio of a random crop.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        color_jitter: Strength of changes in brightness, contrast and saturation.
        auto_augment: timm's policy string, such as `rand-m9-mstd0.5`.
        erase: Probability of erasing a rectangle, to black: noise would leave [0, 1].
    """
    train = create_transform(
        **config,
        is_training=True,
        scale=scale,
        ratio=ratio,
        hflip=hflip,
        vflip=vflip,
        color_jitter=color_jitter or None,  # type: ignore[arg-type]  # timm: None switches it off
        auto_augment=auto_augment,
        re_prob=erase,
        re_mode="const",
    )
    assert isinstance(train, transforms.Compose)
    if crop_padding:
        train.transforms.insert(1, transforms.RandomCrop(config["input_size"][-2:], padding=crop_padding))
    evaluate = create_transform(**config, is_training=False)
    if config["input_size"][0] == 1:
        grey = transforms.Grayscale(num_output_channels=1)
        return transforms.Compose([grey, train]), transforms.Compose([grey, evaluate])
    return train, evaluate  # type: ignore[return-value]


def _find_splits(sources: list[str], subset: str | None) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Find the splits of a data set, by name, and what to tell about how they were found."""
    if sources == ["digits"]:
        return {split: _read_in_memory([str(DIGITS / f"{split}.parquet")]) for split in ("train", "test")}, []
    files: dict[str, str] = {}  # path: the part of it that may name a split
    for source in sources:
        if os.path.isdir(source):
            found = sorted(str(path) for path in Path(source).rglob("*.parquet"))
            if not found and len(sources) == 1:
                return _read_image_folder(Path(source)), []
            files |= {file: os.path.relpath(file, source) for file in found}
        else:
            found = [source] if os.path.isfile(source) else sorted(glob.glob(source, recursive=True))
            files |= {file: os.path.basename(file) for file in found}
        if not found and (len(sources) > 1 or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source)):
            raise DataError(
                f"nothing is at {source!r}: no parquet file, no folder, and no file matches it as a pattern"
            )
    if not files:
        return _read_hub(sources[0], subset)
    for file in files:
        if not file.endswith(".parquet"):
            raise DataError(f"{file!r} is not a parquet file; give parquet files, a folder of images, or a Hub id")
    return _read_parquet(files)


def _read_hub(name: str, subset: str | None) -> tuple[dict[str, datasets.Dataset], list[str]]:
    try:
        return dict(datasets.load_dataset(name, subset)), []  # type: ignore[arg-type]
    except Exception as error:  # what can go wrong on the way to the Hub has no common base
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{name!r} is neither a file or folder here nor a data set that could be loaded from the Hugging Face Hub "
            f"({type(error).__name__}: {reason}); check the spelling, the connection and HF_HUB_OFFLINE"
        ) from error


def _read_parquet(files: dict[str, str]) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Read parquet files, divided into splits by their names."""
    by_split: dict[str, list[str]] = {}
    for file, name in files.items():
        words = re.findall(r"[a-z]+", name.lower().removesuffix(".parquet"))
        named = [word for word in words if word in _TRAIN + _EVAL]
        by_split.setdefault(named[-1] if named else "", []).append(file)
    if set(by_split) == {""}:
        by_split = {"train": by_split[""]}
    elif "" in by_split:
        raise DataError(f"{_list(by_split[''])} says neither train nor test in its name, unlike the other files")
    for split, paths in by_split.items():
        rows = 0
        for file in paths:
            try:
                rows += pq.read_metadata(file).num_rows
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{file!r} cannot be read as parquet: {error}") from error
        if rows == 0:  # of which `datasets` says only that an instruction corresponds to no data
            raise DataError(f"the {split} split is empty: no rows in {_list(paths)}")
    try:
        return dict(datasets.load_dataset("parquet", data_files=by_split)), []  # type: ignore[arg-type]
    except OSError as error:
        note = f"the cache of Hugging Face data sets cannot be written ({error}): the images are kept in memory"
        return {split: _read_in_memory(paths) for split, paths in by_split.items()}, [note]
    except Exception as error:
        reason = error.__cause__ or error
        raise DataError(f"{_list(files)} cannot be read as one data set: {reason}") from error


def _read_in_memory(files: list[str]) -> datasets.Dataset:
    """Read parquet files without the cache that `datasets` would write."""
    return datasets.Dataset(pa.concat_tables(pq.ParquetFile(file).read() for file in files))


def _read_image_folder(folder: Path) -> dict[str, datasets.Dataset]:
    """Read `[split/]class/**/image`; the class is the name of the folder."""
    parts = {path.name: path for path in _folders(folder) if path.name.lower() in _TRAIN + _EVAL}
    if not any(name.lower() in _TRAIN for name in parts):
        parts = {"train": folder}
    splits = {}
    endings = tuple(ending for ending, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN)
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    for name, part in parts.items():
        found = [(str(path), kind.name) for kind in _folders(part) for path in sorted(kind.rglob("*"))]
        found = [(path, kind) for path, kind in found if path.lower().endswith(endings)]
        if not found:
            raise DataError(
                f"no images in {str(part)!r}: expected a folder for each class with image files in it "
                f"({part.name}/cat/1.png), or *.parquet files"
            )
        columns = {"image": [path for path, _ in found], "label": [kind for _, kind in found]}
        splits[name] = datasets.Dataset.from_dict(columns, features=features)
    return splits


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _choose_split(splits: dict, wanted: str | None, usual: Sequence[str], flag: str) -> str | None:
    if wanted is not None:
        if wanted not in splits:
            raise DataError(f"{flag} {wanted}: there is no such split, only {_list(splits)}")
        return wanted
    lower = {name.lower(): name for name in splits}
    return next((lower[name] for name in usual if name in lower), None)


def _find_columns(features: datasets.Features, image: str | None, label: str | None) -> tuple[str, str]:
    """Find the columns of images and labels by their types; a name that was given wins."""
    for flag, name in (("--image-column", image), ("--label-column", label)):
        if name is not None and name not in features:
            raise DataError(f"{flag} {name}: there is no such column; {_describe(features)}")
    if image is None:
        candidates = [name for name, kind in features.items() if _is_image(kind)]
        image = _only(candidates, ("image", "img"), features, "images", "--image-column")
    if label is None:
        named = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        plain = [name for name, kind in features.items() if name != image and _is_label(kind)]
        label = _only(named or plain, ("label", "labels"), features, "labels", "--label-column")
    elif not isinstance(features[label], datasets.ClassLabel) and not _is_label(features[label]):
        raise DataError(f"--label-column {label}: labels must be whole numbers or strings; {_describe(features)}")
    return image, label


def _is_image(kind: Any) -> bool:
    # Parquet files written without the `datasets` library have the structure, or the bytes, without the type.
    bare = isinstance(kind, dict) and set(kind) == {"bytes", "path"}
    return isinstance(kind, datasets.Image) or bare or getattr(kind, "dtype", None) in ("binary", "large_binary")


def _is_label(kind: Any) -> bool:
    return isinstance(kind, datasets.Value) and re.fullmatch(r"u?int\d+|(large_)?string", kind.dtype) is not None


def _only(candidates: list[str], usual: Sequence[str], features: datasets.Features, what: str, flag: str) -> str:
    preferred = [name for name in candidates if name in usual]
    for choice in (candidates, preferred):
        if len(choice) == 1:
            return choice[0]
    found = f"{_list(candidates)} could all hold the {what}" if candidates else f"no column holds {what}"
    raise DataError(f"{found}; {_describe(features)}: name the right one with {flag}")


def _describe(features: datasets.Features) -> str:
    kinds = {name: getattr(kind, "dtype", None) or type(kind).__name__ for name, kind in features.items()}
    kinds |= {name: type(features[name]).__name__ for name in kinds if not isinstance(features[name], datasets.Value)}
    return "the columns are " + ", ".join(f"{name} ({kind})" for name, kind in kinds.items())


def _encoded_images(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    try:
        return rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise DataError(f"--image-column {column}: not a column of images; {_describe(rows.features)}") from error


def _encode_labels(
    rows: datasets.Dataset, column: str, split: str, names: tuple[str, ...] | None, num_classes: int | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Number the classes, from the training split (`names` is None), and check the label of every row."""
    kind = rows.features[column]
    table: pa.Table = rows.select_columns([column]).with_format("arrow")[:]
    values = table.column(column).to_pylist()
    for row, value in enumerate(values):
        if value is None:
            raise DataError(f"{split} row {row} has no label (column {column}): give it one or remove the row")
    if isinstance(kind, datasets.ClassLabel):
        own = tuple(kind.names)
        if names is not None and own != names:
            raise DataError(
                f"the classes of the {split} split, {_list(own)}, are not those of training, {_list(names)}"
            )
        numbers, names = values, own
    elif values and isinstance(values[0], str):
        names = tuple(sorted(set(values))) if names is None else names
        known = {name: number for number, name in enumerate(names)}
        for row, value in enumerate(values):
            if value not in known:
                raise DataError(f"{split} row {row} has the label {value!r}, which is not a class of training")
        numbers = [known[value] for value in values]
    else:
        names = tuple(str(number) for number in range(max(values) + 1)) if names is None else names
        numbers = values
    limit = len(names) if num_classes is None else num_classes
    for row, number in enumerate(numbers):
        if not 0 <= number < limit:
            raise DataError(
                f"{split} row {row} has the label {values[row]!r} (column {column}), but the {limit} classes are "
                f"numbered 0 to {limit - 1}: correct the row, or choose another split, column or --num-classes"
            )
    return np.asarray(numbers, dtype=np.int64), names


def _divide(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Hold out the same share of every class, always the same images for the same seed."""
    order = np.random.default_rng(seed).permutation(len(split))
    order = order[np.argsort(split.labels[order], kind="stable")]
    count = np.arange(len(split) + 1) * fraction
    held = np.floor(count[1:]) > np.floor(count[:-1])  # every 1/fraction-th of the images, in order of class
    if held.all() or not held.any():
        raise DataError(
            f"--val-fraction {fraction} divides {len(split)} images into {(~held).sum()} to train on and {held.sum()} "
            "to evaluate on: both must have some"
        )
    parts = []
    for name, rows in ((split.name, np.sort(order[~held])), ("validation", np.sort(order[held]))):
        parts.append(Split(name, split.rows, split.column, split.indices[rows], split.labels[rows]))
    return parts[0], parts[1]


def _list(names: Any) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
