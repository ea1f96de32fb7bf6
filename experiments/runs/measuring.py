"""What experiments share that measure a model on one batch: images in memory, or text."""

from __future__ import annotations

from experiments.data import Dataset
from experiments.runs import tasks
from experiments.runs.config import RunConfig
from experiments.runs.kinds import Kind, kind_named, kind_of


def drop_image_size(config: RunConfig) -> None:
    """Takes the default size of images back where the data are text, which has none."""
    if _is_text(config):
        object.__setattr__(config, "image_size", None)


def load_in_memory(config: RunConfig) -> tuple[Dataset, Kind]:
    """The data set of a run and its kind.

    Raises:
      DataError: the data are missing or damaged.
      UserError: an option would stream images.
    """
    dataset = tasks.load_dataset(config, any_data=_is_text(config))
    return dataset, kind_of(dataset)


def _is_text(config: RunConfig) -> bool:
    return kind_named(config.dataset).samples == "sequences"
