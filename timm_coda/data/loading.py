"""Order the training images and put their batches on the device.

An epoch's order depends only on the seed and the epoch. Its batches are distributed to the processes in turn, so n
processes, or one process that accumulates n steps, use the same images for an update. An epoch can start at any batch.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import PIL.Image
import torch
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState
from torch import Tensor

from .datasets import Batch, DataError, ImageDataset, Split, create_loader, create_transforms
from .streaming import StreamedDataset, StreamedSplit, StreamOrder

__all__ = ["DeviceImages", "EpochOrder", "Order", "TrainLoader", "make_train_loader"]


class Order(Protocol):
    """The batches of one process in an epoch; each batch is a list of dataset indices."""

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch."""
        ...

    def seek(self, epoch: int, batch: int) -> None:
        """Make the next iteration start at this batch of this epoch."""
        ...

    def __iter__(self) -> Iterator[list[Any]]: ...


class EpochOrder:
    """Batches of shuffled (epoch, index) pairs; the last, smaller batch is dropped.

    Args:
        length: number of images in the dataset
        batch_size: images per batch
        seed: seed of the shuffling
        process, processes: index of this process and number of processes; each gets every `processes`-th batch
    """

    def __init__(self, length: int, *, batch_size: int, seed: int, process: int = 0, processes: int = 1) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.process, self.processes = process, processes
        self.epoch, self.batch = 0, 0

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.processes)

    def seek(self, epoch: int, batch: int) -> None:
        """See `Order.seek`."""
        self.epoch, self.batch = epoch, batch

    def indices(self) -> np.ndarray:
        """Return the dataset indices of the epoch's batches from the next one on, (batches, batch size)."""
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        whole = order[: len(self) * self.processes * self.batch_size].reshape(-1, self.processes, self.batch_size)
        return whole[self.batch :, self.process]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.indices():
            yield [(self.epoch, int(index)) for index in batch]


class TrainLoader(DataLoaderStateMixin):
    """Batches of an order on the device, on a GPU in channels_last order, in which its convolutions are faster.

    Tells Accelerate which batch is the last one, for gradient accumulation.

    Args:
        order: the indices of each batch
        batches: yields the batches of `order`, such as `create_loader(dataset, order=order, ...)`
        device: device to move the batches to
    """

    def __init__(self, order: Order, batches: Iterable[Batch], device: torch.device) -> None:
        self.order, self.batches, self.device = order, batches, device
        self.format = torch.channels_last if device.type == "cuda" else torch.preserve_format
        self.gradient_state = GradientState()

    def __len__(self) -> int:
        return len(self.order)

    def from_batch(self, epoch: int, batch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, starting at number `batch`."""
        self.order.seek(epoch, batch)
        self.begin()
        try:
            for images, labels, skipped in self.batches:
                batch += 1
                self.end_of_dataloader = batch == len(self)
                images = images.to(self.device, non_blocking=True, memory_format=self.format)
                labels = labels.to(self.device, non_blocking=True)
                yield Batch(images, labels, skipped)
        finally:
            self.end()


class DeviceImages:
    """A small dataset, decoded once and kept on the device, which shifts and flips a whole batch at a time.

    Shift and flip depend only on seed, epoch and index. Iterating yields the batches of the order.

    Args:
        dataset: a dataset whose transform is deterministic and gives colours in [0, 1]
        order: an order of (epoch, index) pairs; its `length` is set to the number of readable images
        workers: number of decoding processes
        device: device that stores the images, as 8-bit colours
        crop_padding: maximum shift in pixels; the uncovered border is black
        hflip: probability of a horizontal flip
        mean, std: normalisation of the colours, for a model that needs it

    Raises:
        DataError: No image can be read.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        order: EpochOrder,
        *,
        workers: int,
        device: torch.device,
        crop_padding: int,
        hflip: float,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        parts, labels, self.skipped = [], [], []
        for batch in create_loader(dataset, batch_size=256, workers=workers):
            if len(batch.labels):
                parts.append((batch.images * 255).round().byte())
            labels.append(batch.labels)
            self.skipped += batch.skipped
        if not parts:
            raise DataError("none of the images to train on can be read")
        images = torch.cat(parts)
        self.size = images.shape[-2:]
        self.images = torch.nn.functional.pad(images, [crop_padding] * 4).to(device)
        self.labels = torch.cat(labels).to(device)
        self.order, self.crop_padding, self.hflip = order, crop_padding, hflip
        order.length = len(self.labels)
        self.mean, self.std = (torch.tensor(value, device=device).view(-1, 1, 1) for value in (mean, std))

    def __iter__(self) -> Iterator[Batch]:
        # The whole epoch's at once: a batch waits for nothing from the CPU.
        device, skipped = self.images.device, self.skipped
        draws = np.random.default_rng((self.order.seed, self.order.epoch, 1)).random((len(self.labels), 3))
        shifts = torch.from_numpy((draws[:, :2] * (2 * self.crop_padding + 1)).astype(np.int64)).to(device)
        flips = torch.from_numpy(draws[:, 2] < self.hflip).to(device)
        for index in torch.from_numpy(self.order.indices()).to(device):
            yield Batch(self._change(index, shifts[index], flips[index]), self.labels[index], skipped)
            skipped = []

    def _change(self, index: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
        """Return the images at `index` (B,), cut out `shift` (B, 2) pixels down and right, flipped where `flip`."""
        height, width = self.size
        windows = self.images.unfold(2, height, 1).unfold(3, width, 1)  # (N, C, 2p+1, 2p+1, H, W), a view
        images = windows[index, :, shift[:, 0], shift[:, 1]]
        images = torch.where(flip[:, None, None, None], images.flip(3), images)
        return (images.float() / 255 - self.mean) / self.std


def make_train_loader(
    split: Split | StreamedSplit,
    transform: Callable[[PIL.Image.Image], Tensor],
    *,
    config: dict[str, Any],
    changes: dict[str, Any],
    batch_size: int,
    seed: int,
    workers: int,
    streaming: int | None,
    data_on_device: bool,
    process: int,
    processes: int,
    device: torch.device,
) -> TrainLoader:
    """Create the loader of a training run.

    Args:
        split: split to train on; a `StreamedSplit` for streaming
        transform: training transform, made by `data.create_transforms(config, **changes)`
        config, changes: the arguments of that call
        batch_size, seed, process, processes: as for `EpochOrder`
        workers: number of decoding processes
        streaming: number of images in the shuffle buffers
        data_on_device: keep all images on the device (`DeviceImages`)
        device: device to move the batches to

    Raises:
        DataError: `data_on_device` is combined with streaming or with changes other than shifts and flips.
    """
    dealt = {"batch_size": batch_size, "seed": seed, "process": process, "processes": processes}
    if isinstance(split, StreamedSplit):
        if data_on_device:
            raise DataError("--streaming cannot hold all images, as --data-on-device does: give only one of them")
        stream = StreamOrder(split, buffer=streaming or 1, **dealt)
        dataset = StreamedDataset(split, transform, seed=seed)
        return TrainLoader(stream, create_loader(dataset, order=stream, workers=workers), device)
    order = EpochOrder(len(split), **dealt)
    if not data_on_device:
        dataset = ImageDataset(split, transform, seed=seed)
        return TrainLoader(order, create_loader(dataset, order=order, workers=workers), device)
    moves = {name: changes[name] for name in ("crop_padding", "hflip")}
    still = {"scale": [1, 1], "ratio": [1, 1], "color_jitter": 0, "auto_augment": None, "erase": 0}
    other = [name for name, value in still.items() if changes[name] != value]
    if other:
        wanted = ", ".join(f"--{name.replace('_', '-')} {changes[name]}" for name in other)
        raise DataError(f"--data-on-device only shifts and flips images: leave it out, or leave out {wanted}")
    channels = config["input_size"][0]
    plain, _ = create_transforms({**config, "mean": (0.0,) * channels, "std": (1.0,) * channels})
    colours = {"mean": config["mean"], "std": config["std"]}
    images = DeviceImages(ImageDataset(split, plain), order, workers=workers, device=device, **moves, **colours)
    return TrainLoader(order, images, device)
