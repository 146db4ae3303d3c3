"""Load labelled image datasets from the Hub, parquet files, image folders or the package itself, as torch batches.

`load_data` finds the splits, columns and class names, and checks every label. `ImageDataset` and `collate` turn a split
into batches that depend only on a seed: not on the number of worker processes, the global random state, or whether the
run was interrupted. An image that cannot be read is reported and skipped.
"""

import contextlib
import functools
import io
import multiprocessing.util
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import datasets
import numpy as np
import PIL.Image
import torch
from timm.data.transforms_factory import create_transform
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ..explanation import Classes, ClassesError, listed
from ..images import read_image
from .folder import EVAL_NAMES, TRAIN_NAMES
from .labels import DataError, check_several, encode_labels, missing_classes
from .sources import choose_split, columns_of, encoded_images, find_columns, find_splits, unused_splits


@dataclass(frozen=True)
class Split:
    """One split of a dataset: encoded images, with a checked class number for each."""

    name: str
    rows: datasets.Dataset  # one column of encoded images
    column: str
    indices: np.ndarray  # (n,) row numbers of the images in `rows`
    labels: np.ndarray  # (n,) class numbers
    origin: tuple[str, ...] = ()  # the parquet files of `rows`, or the folder of the class folders, or unknown

    def __len__(self) -> int:
        return len(self.indices)

    def describe(self, index: int) -> str:
        """Describe an image so that the user can find it: its split, row and, where known, file."""
        row = int(self.indices[index])
        path = (self.rows[row][self.column] or {}).get("path")
        return f"{self.name} row {row}" + (f" ({path})" if path else "")

    def image(self, index: int) -> PIL.Image.Image:
        """Decode an image to RGB. Raises `DataError` or `ImageError` if that is impossible."""
        return decode(self.rows[int(self.indices[index])][self.column])


@dataclass(frozen=True)
class ImageData:
    """A labelled image dataset: a split to train on, a split to evaluate on, and the class names."""

    train: Any  # a Split, or a StreamedSplit (streaming.py)
    test: Split
    image_column: str
    label_column: str
    label_names: tuple[str, ...]
    notes: tuple[str, ...]  # choices that the user should know about
    label_kind: str = "declared"  # see `labels.LabelTable.kind`
    account: dict[str, Any] = field(default_factory=dict)  # of an image folder: what is used, and what not and why

    def held_out(self, count: int) -> "ImageData":
        """Return this dataset with `count` training images as the split to evaluate on, about as many of each class.

        They are the same each time.

        Raises:
            DataError: The training images are streamed, or no more than `count`.
        """
        if not isinstance(self.train, Split):
            raise DataError("--hold-out cannot be used with --streaming: give a validation split with --test-split")
        if count >= len(self.train):
            raise DataError(f"--hold-out {count}: there are only {len(self.train)} training images; hold out fewer")
        train, held = _divide(self.train, count / len(self.train), 0)
        note = (
            f"{len(held):,} training images are held out and decide which epoch is the best (--hold-out); the "
            f"{len(self.test):,} {self.test.name} images are used once, at the end"
        )
        return replace(self, train=train, test=held, notes=(*self.notes, note))

    def matched(self, classes: Classes) -> "ImageData":
        """Return this dataset with the class numbers and names of a model, whose classes are found by name.

        Integer labels that are no names of the model's classes are their numbers.

        Raises:
            DataError: A class is not one of the model's, or nobody knows the names of the model's classes.
        """
        own, count, notes = self.label_names, len(classes), ()
        numbers: tuple[int, ...] | None = None
        try:
            numbers = classes.match(own) if classes.labels else None
        except ClassesError as error:
            if self.label_kind not in ("numbers", "ids"):
                raise DataError(f"{error}: use images of these classes only, or another model") from error
        if numbers is None and self.label_kind in ("numbers", "ids"):
            numbers = tuple(map(int, own))
            if max(numbers, default=0) >= count:
                raise DataError(f"the label {max(numbers)} is no class of the model: they are 0 to {count - 1}")
            notes = ("integer labels are taken as the numbers of the model's classes",) if classes.labels else ()
        if numbers is None:
            raise DataError(
                f"nobody has named the model's {count} classes, so {listed(own)} cannot be found among them: save it "
                "with names, model.save_pretrained(FOLDER, label_names=[...])"
            )
        if len(own) < count:
            notes += (f"the images are of {len(own)} of the model's {count} classes",)
        renumber = np.asarray(numbers)
        train, test = (replace(split, labels=renumber[split.labels]) for split in (self.train, self.test))
        return replace(self, train=train, test=test, label_names=classes.names, notes=self.notes + notes)


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
    training: bool = True,
) -> ImageData:
    """Load a labelled image dataset.

    In an image folder, links are followed, and hidden files are ignored. Files without ending are used if they begin
    like an image. An empty class folder is not a class; one whose files cannot be used is an error. What is not used is
    listed in the notes. Class names are compared in Unicode's composed form (NFC).

    Integer labels are class numbers if they are all of 0, 1, ..., n - 1, or if `num_classes` is given. Others are
    numbered in their order, and the classes named after them.

    Args:
        source: `"digits"` (included in the package), a dataset id on the Hugging Face Hub, or local data: parquet
            files, a glob pattern for them, a folder of them with `train` and `test` (or `validation`) in their names,
            or a folder of images with one folder per class, inside `train/` and `test/` if there are two splits.
        subset: Configuration of a Hub dataset.
        image_column: Column of images; by default the only one, or the one named `image`.
        label_column: Column of labels: integers, strings or booleans. By default the only one of type ClassLabel, else
            the one named `label`, `labels`, `class`, `category` or `target`.
        train_split: Split to train on; by default the one named `train`. In an image folder, any subfolder.
        test_split: Split to evaluate on; by default one named `validation` or `test`. In an image folder, any
            subfolder.
        val_fraction: If there is no split to evaluate on, hold out this share of every class of the training split, the
            same images each time.
        seed: Seed for choosing the images to hold out.
        num_classes: Number of classes; by default the dataset's.
        training: Whether the data will be trained on. If not, one class is enough, and without a split to train on the
            split to evaluate on is also given as `train`.

    Raises:
        DataError: The dataset is empty, cannot be found or read, its columns or splits are ambiguous, a label is not a
            class, or there is only one class to train on.
    """
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    splits = find_splits([os.fspath(item) for item in sources], subset, (train_split, test_split))
    notes = list(splits.notes)
    train_name = choose_split(splits.names, train_split, TRAIN_NAMES, "--train-split")
    usual = [name for name in EVAL_NAMES if name != train_name]
    test_name = choose_split(splits.names, test_split, usual, "--test-split")
    if train_name is None and not training:
        train_name = test_name
    if train_name is None:
        if len(splits.names) > 1:
            raise DataError(f"no split is named train, only {listed(splits.names)}: choose one with --train-split")
        train_name = next(iter(splits.names))
        test_name = test_name if test_split else None
        if train_name in EVAL_NAMES:
            notes.append(f"the only split is {train_name}: its images are trained on")
    read = {name: splits.read(name) for name in dict.fromkeys((train_name, test_name)) if name is not None}
    for name, rows in read.items():
        if len(rows) == 0:
            raise DataError(f"the {name} split of {listed(sources)} is empty: there is nothing to learn from")
    train_rows = read[train_name]
    image_column, label_column = find_columns(train_rows.features, image_column, label_column)
    if test_name is not None and not {image_column, label_column} <= set(read[test_name].features):
        raise DataError(
            f"the {test_name} split lacks {image_column} or {label_column}; {columns_of(read[test_name].features)}"
        )

    labels, classes = encode_labels(train_rows, label_column, train_name, None, num_classes)
    images, origins = encoded_images(train_rows, image_column), splits.origins
    train = Split(train_name, images, image_column, np.arange(len(labels)), labels, origins.get(train_name, ()))
    hint = splits.folder.hint(train_name) if splits.folder else ""
    if training:
        check_several(labels, classes.names, hint)
    elif hint:
        notes.append(f"{classes.names[0]} is the only class; {hint}")
    if test_name is not None:
        labels, _ = encode_labels(read[test_name], label_column, test_name, classes, num_classes)
        images = encoded_images(read[test_name], image_column)
        test = Split(test_name, images, image_column, np.arange(len(labels)), labels, origins.get(test_name, ()))
    else:
        train, test = _divide(train, val_fraction, seed)
        notes.append(
            f"no validation or test split: {len(test)} of {len(train) + len(test)} training images are held out "
            f"(--val-fraction {val_fraction}, the same images each time)"
        )
    notes += [classes.note, missing_classes(test.labels, classes, test.name)]
    account = {}
    if splits.folder is None:
        notes.append(unused_splits(splits.names, read))
    else:
        splits.folder.finish()
        notes += splits.folder.account.notes()
        account = splits.folder.account.facts()
    return ImageData(
        train,
        test,
        image_column,
        label_column,
        classes.padded(num_classes),
        tuple(note for note in notes if note),
        classes.kind,
        account,
    )


def decode(encoded: dict[str, Any] | None) -> PIL.Image.Image:
    """Decode the `bytes`, or the file at `path`, to RGB. Raises `DataError` or `ImageError` if that is impossible."""
    if encoded is None or (encoded["bytes"] is None and encoded["path"] is None):
        raise DataError("this row has no image")
    source = encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"])
    return read_image(source, name="", max_pixels=None)


class Skipped(NamedTuple):
    """An image that could not be read."""

    name: str
    reason: str


class Batch(NamedTuple):
    """A batch without the images that could not be read: `images` (B, C, H, W) and `labels` (B,); B may be 0."""

    images: torch.Tensor
    labels: torch.Tensor
    skipped: list[Skipped]


class ImageDataset(Dataset):
    """A split as a torch dataset of `(image, label)`, or `Skipped` if the image cannot be read.

    The random numbers of a transform depend only on (seed, epoch, index). The global random state of Python, NumPy and
    torch does not change. The index is an int, or a pair (epoch, index) from an order (`loading.py`).

    Args:
        split: The images.
        transform: From a PIL image to a tensor (C, H, W).
        seed: Seed of the transform; None if it is not random.
    """

    def __init__(self, split: Any, transform: Callable[[PIL.Image.Image], torch.Tensor], *, seed: int | None = None):
        self.split, self.transform, self.seed = split, transform, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[torch.Tensor, int] | Skipped:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        try:
            image = self.split.image(index)
        except Exception as error:  # decoders raise almost any exception for broken images
            return Skipped(self.split.describe(index), f"{type(error).__name__}: {error}")
        return self.change(image, epoch, index), int(self.split.labels[index])

    def change(self, image: PIL.Image.Image, epoch: int, index: int) -> torch.Tensor:
        """Return the transformed image (C, H, W)."""
        with contextlib.nullcontext() if self.seed is None else fixed_randomness(self.seed, epoch, index):
            return self.transform(image)

    def examples(self, count: int) -> Batch:
        """Return at most `count` readable images, from as many classes as possible, the same on every call."""
        seen: dict[int, int] = {}
        ranks = []  # for each image, the number of images of its class before it
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


def collate(samples: Sequence[tuple[torch.Tensor, int] | Skipped]) -> Batch:
    """Collate the images that could be read into a batch, and list the others."""
    skipped = [sample for sample in samples if isinstance(sample, Skipped)]
    read = [sample for sample in samples if not isinstance(sample, Skipped)]
    images = torch.stack([image for image, _ in read]) if read else torch.empty(0)
    return Batch(images, torch.tensor([label for _, label in read], dtype=torch.long), skipped)


def create_loader(dataset: Dataset, *, batch_size: int = 1, workers: int, order: Any = None) -> DataLoader:
    """Create a loader of `Batch`es: of `batch_size` consecutive images, or as an `order` (`loading.py`) yields them."""
    ending = multiprocessing.Event() if workers else None
    if ending is not None:  # set before multiprocessing terminates the workers at exit, see _handle_signals
        multiprocessing.util.Finalize(None, ending.set, exitpriority=0)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        batch_sampler=order,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=collate,
        worker_init_fn=functools.partial(_handle_signals, ending),
        pin_memory=torch.cuda.is_available(),
    )


def _handle_signals(ending: Any, worker: int) -> None:
    # Both signals reach every process of a run, but only the main one handles them. When that one exits, however,
    # multiprocessing sends SIGTERM to the workers that are left and waits until they end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0) if ending.is_set() else None)


def check_images(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Check that a model accepts images (B, C, H, W) from a dataset. Leaves the model in eval mode.

    Raises:
        DataError: There are no images, a model with explanations gets values outside [0, 1], or the model rejects them.
    """
    if len(images) == 0:
        raise DataError("none of the test images can be read")
    low, high = images.min().item(), images.max().item()
    if hasattr(model, "explain") and (low < -0.001 or high > 1.001):
        raise DataError(
            f"image values range from {low:.2f} to {high:.2f}, but {type(model).__name__} needs [0, 1]: mean/std "
            "normalisation is the likely cause; the model's config must have mean 0 and std 1"
        )
    try:
        with torch.no_grad():
            model.eval()(images)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        shape = "x".join(map(str, images.shape[1:]))
        raise DataError(f"the model does not accept images of shape {shape}: {error}") from error


def derive_seed(*key: int) -> int:
    """Mix non-negative ints into one seed below 2**32."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@contextlib.contextmanager
def fixed_randomness(*key: int) -> Iterator[None]:
    """Seed Python, NumPy and torch (CPU) from non-negative ints, and restore their random states at the end."""
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
    """Create timm's training and evaluation transforms, from a PIL image to a tensor (C, H, W).

    Args:
        config: timm's data configuration (`timm.data.resolve_model_data_config`). With mean 0 and std 1 the images
            stay in [0, 1], as the models of this package require.
        crop_padding: Shift images by up to this many pixels (pad with black, crop).
        scale: Area of a random crop, as a share of the image.
        ratio: Aspect ratio of a random crop.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        color_jitter: Strength of changes in brightness, contrast and saturation.
        auto_augment: timm's policy string, such as `rand-m9-mstd0.5`.
        erase: Probability of erasing a rectangle to black (noise would leave [0, 1]).
    """
    train = create_transform(
        **config,
        is_training=True,
        scale=scale,
        ratio=ratio,
        hflip=hflip,
        vflip=vflip,
        color_jitter=color_jitter or None,  # type: ignore[arg-type]  # timm: None disables it
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


def _divide(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Hold out the same share of every class; the same seed holds out the same images."""
    order = np.random.default_rng(seed).permutation(len(split))
    order = order[np.argsort(split.labels[order], kind="stable")]
    count = np.arange(len(split) + 1) * fraction + 1e-9  # rounding must not lose an image
    held = np.floor(count[1:]) > np.floor(count[:-1])  # every (1/fraction)-th image, sorted by class
    if held.all() or not held.any():
        raise DataError(
            f"--val-fraction {fraction} splits {len(split)} images into {(~held).sum()} to train on and {held.sum()} "
            "to evaluate on: neither may be 0"
        )
    parts = []
    for name, rows in ((split.name, np.sort(order[~held])), ("validation", np.sort(order[held]))):
        parts.append(replace(split, name=name, indices=split.indices[rows], labels=split.labels[rows]))
    return parts[0], parts[1]
