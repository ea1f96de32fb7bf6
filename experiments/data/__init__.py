"""Data sets, in memory or streamed: embedded, of tensorflow-datasets, or a user's own."""

from experiments.data.batches import epoch_order
from experiments.data.catalog import DATASETS, load
from experiments.data.dataset import DataError, Dataset, Examples, Split
from experiments.data.streamed import Streamed

__all__ = [
    "DATASETS",
    "DataError",
    "Dataset",
    "Examples",
    "Split",
    "Streamed",
    "epoch_order",
    "load",
]
