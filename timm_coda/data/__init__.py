"""Labelled image datasets (Hugging Face Hub, parquet files, image folders, built-in digits) as batches for training."""

from importlib.util import find_spec

if find_spec("datasets") is None:
    raise ImportError("labelled images are read by the package datasets: pip install datasets")

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
from .description import data_changes, describe_data
from .labels import DataError
from .loading import make_train_loader
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
    "data_changes",
    "derive_seed",
    "describe_data",
    "load_data",
    "load_stream",
    "make_train_loader",
]
