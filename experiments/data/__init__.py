"""Data sets, in memory or streamed: embedded, of tensorflow-datasets, a user's own, or text."""

from experiments.data.batches import epoch_order
from experiments.data.catalog import DATASETS, load
from experiments.data.dataset import DataError, Dataset, Examples, Split
from experiments.data.streamed import Streamed
from experiments.data.text import Sequences

__all__ = [
    "DATASETS",
    "DataError",
    "Dataset",
    "Examples",
    "Sequences",
    "Split",
    "Streamed",
    "epoch_order",
    "load",
]
