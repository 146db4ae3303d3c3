"""Geometry shared by the matrix-product backends: convert patches of a convolution to rows of a matrix and back."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Geometry", "as_rows", "geometry", "memory_format", "output_size"]


class Geometry(NamedTuple):
    """Positions of patches, and the order of a patch's K numbers: (c, kh, kw), or (kh, kw, c) if `channels_last`."""

    batch: int
    rows: int
    columns: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    channels_last: bool

    @property
    def positions(self) -> int:
        return self.batch * self.rows * self.columns

    def padded(self, x: Tensor) -> Tensor:
        """Pad and permute (B, C, H, W) to contiguous (B, H + 2ph, W + 2pw, C)."""
        x = x.permute(0, 2, 3, 1)
        if self.padding != (0, 0):
            x = F.pad(x, (0, 0, self.padding[1], self.padding[1], self.padding[0], self.padding[0]))
        return x.contiguous()

    def padded_zeros(self, like: Tensor) -> Tensor:
        batch, channels, height, width = like.shape
        return like.new_zeros(batch, height + 2 * self.padding[0], width + 2 * self.padding[1], channels)

    def cropped(self, padded: Tensor, like: Tensor) -> Tensor:
        """Undo `padded`, in the memory format of `like`."""
        top, left = self.padding
        inner = padded[:, top : top + like.shape[2], left : left + like.shape[3]]
        return inner.permute(0, 3, 1, 2).clone(memory_format=memory_format(like))

    def windows(self, padded: Tensor) -> Tensor:
        """Return all patches as a view of the padded image: (B, H', W', then K as three axes)."""
        image, row, column, channel = padded.stride()
        (sh, sw), (dh, dw) = self.stride, self.dilation
        view = padded.as_strided(
            (self.batch, self.rows, self.columns, *self.kernel, padded.shape[3]),
            (image, row * sh, column * sw, row * dh, column * dw, channel),
        )
        return view if self.channels_last else view.permute(0, 1, 2, 5, 3, 4)

    def patches(self, x: Tensor) -> Tensor:
        """Copy the patches of an image (B, C, H, W) to a matrix (N, K)."""
        windows = self.windows(self.padded(x))
        return windows.reshape(self.positions, math.prod(windows.shape[3:]))

    def fold(self, target: Tensor, patches: Tensor) -> None:
        """Add patches (n, K) to the padded image through `target`, a part of its `windows`."""
        patches = patches.view(target.shape)
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                # One kernel offset at a time, because these views have no overlapping elements.
                at = (..., i, j, slice(None)) if self.channels_last else (..., i, j)
                target[at].add_(patches[at])

    def blocks(self, size: int) -> Iterator[tuple[tuple[slice, slice], slice]]:
        """Yield blocks of about `size` positions: (images, rows) in `windows`, and their range in flat order."""
        area = self.rows * self.columns
        if area <= size:
            step = size // area
            for i in range(0, self.batch, step):
                end = min(i + step, self.batch)
                yield (slice(i, end), slice(None)), slice(i * area, end * area)
        else:
            step = max(size // self.columns, 1)
            for i in range(self.batch):
                for row in range(0, self.rows, step):
                    end = min(row + step, self.rows)
                    flat = slice(i * area + row * self.columns, i * area + end * self.columns)
                    yield (slice(i, i + 1), slice(row, end)), flat

    def flat(self, weight: Tensor) -> Tensor:
        """Reshape (N, C, kh, kw) to (N, K), with a copy only if it is stored in another order."""
        return (weight.permute(0, 2, 3, 1) if self.channels_last else weight).reshape(weight.shape[0], -1)

    def unflat(self, weight: Tensor, channels: int) -> Tensor:
        """Undo `flat`; the result is contiguous, with the strides of a new parameter."""
        if self.channels_last:
            weight = weight.reshape(-1, *self.kernel, channels).permute(0, 3, 1, 2)
        # Flat first: `contiguous` keeps the strides of axes with one element, and DDP warns about them.
        return weight.contiguous().flatten().view(-1, channels, *self.kernel)


def output_size(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Return the rows and columns of a convolution's output."""
    rows, columns = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    return rows, columns


def geometry(x: Tensor, up: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Geometry:
    """Return the geometry of a convolution, with the faster order of a patch's numbers.

    Patches are copied ten times as fast in channels_last order. This is worth copying weights that are stored otherwise
    if there are more positions than rows of `up`.
    """
    rows, columns = output_size(x, up.shape[2:], stride, padding, dilation)
    channels_last = up.is_contiguous(memory_format=torch.channels_last) or x.shape[0] * rows * columns > up.shape[0]
    kernel, step, pad, spread = ((int(a), int(b)) for a, b in (up.shape[2:], stride, padding, dilation))
    return Geometry(x.shape[0], rows, columns, kernel, step, pad, spread, channels_last)


def as_rows(y: Tensor) -> Tensor:
    """Convert (B, D, H', W') to contiguous (N, D)."""
    return y.permute(0, 2, 3, 1).reshape(-1, y.shape[1]).contiguous()


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format for an output that belongs to the input `x`."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
