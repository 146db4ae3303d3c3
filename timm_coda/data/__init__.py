"""Labelled image datasets (Hugging Face Hub, parquet files, image folders, built-in digits) as batches for training."""

from .datasets import (
    Batch,
    ImageData,
    ImageDataset,
    Skipped,
    Split,
    check_images,
    collate,
    create_loader,
    create_transforms,
    derive_seed,
    load_data,
)
from .loading import make_train_loader
from .sources import DataError
from .streaming import load_stream

__all__ = [
    "Batch",
    "DataError",
    "ImageData",
    "ImageDataset",
    "Skipped",
    "Split",
    "check_images",
    "collate",
    "create_loader",
    "create_transforms",
    "derive_seed",
    "load_data",
    "load_stream",
    "make_train_loader",
]
