"""Data sets as arrays in memory: two that come with Python packages, and the paper's six."""

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
