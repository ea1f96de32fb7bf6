"""Data sets as arrays in memory: embedded, of tensorflow-datasets, or a user's own."""

from experiments.data.batches import epoch_order
from experiments.data.catalog import DATASETS, load
from experiments.data.dataset import DataError, Dataset, Split

__all__ = [
    "DATASETS",
    "DataError",
    "Dataset",
    "Split",
    "epoch_order",
    "load",
]
