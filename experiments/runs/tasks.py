"""What a run trains: its data, its model, and where the model starts."""

from __future__ import annotations

import dataclasses
import pathlib
import warnings
from typing import Any

from flax import nnx

from experiments.cli import UserError
from experiments.data import DataError, Dataset, Streamed, load
from experiments.runs.config import NO_PAD, NO_WORKERS, RunConfig
from experiments.runs.kinds import kind_named, kind_of
from fqt_jax.calibration import calibrate
from fqt_jax.checkpoints import load_parameters
from fqt_jax.convert import ConversionTable, quantize
from fqt_jax.kernels import check_implementation
from fqt_jax.models import create_model
from fqt_jax.weights import load as load_weights
from fqt_jax.weights import statistics

_CALIBRATED = 256
"""Training examples that thresholds start from."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What a run trains: the data, the model, and how it starts."""

    dataset: Dataset
    model: nnx.Module
    table: ConversionTable
    start: str


def check_freeze(config: RunConfig) -> None:
    """Checks that ``freeze`` matches parameters of the model, before any data are read.

    Raises:
      ValueError: it matches none, or all.
    """
    if config.freeze is None:
        return

    def build() -> Any:
        rngs = nnx.Rngs(0)
        model = create_model(
            config.model, num_classes=2, in_features=3, width=config.width, rngs=rngs
        )
        return quantize(model, config.build_recipe(), rngs=rngs).model

    with warnings.catch_warnings():  # they come again when the model itself is made
        warnings.simplefilter("ignore")
        model = nnx.eval_shape(build)
    config.build_optimizer().labels(nnx.state(model, nnx.Param))


def load_dataset(config: RunConfig, *, any_data: bool = True) -> Dataset:
    """The run's data set, held in memory or streamed.

    Args:
      config: the options.
      any_data: whether the experiment takes data of all kinds, and not images in memory alone.

    Raises:
      DataError: the data are missing or damaged.
      UserError: an option would have no effect, as the data are streamed, or as they are not.
    """
    if not any_data and kind_named(config.dataset).samples != "images":
        raise UserError(f"{config.dataset} is text: this experiment takes images.")
    if not any_data and (config.stream != "auto" or config.workers is not None):
        raise UserError("stream and workers have no effect here: all images are held in memory.")
    if not any_data and config.devices is not None:
        raise UserError("devices has no effect here: gradients are measured on one device.")
    dataset = load(
        config.dataset,
        image_size=config.image_size,
        validation_fraction=config.validation_fraction,
        data_dir=config.data_dir,
        limit=config.limit,
        stream=config.stream if any_data else "no",
    )
    streams = isinstance(dataset.train, Streamed)
    if streams and config.pad is not None:
        raise UserError(f"{config.dataset} is streamed, with random crops of its own: {NO_PAD}")
    if not streams and config.workers is not None:
        raise UserError(f"{config.dataset} is held in memory: {NO_WORKERS}")
    return dataset


def normalized_for(dataset: Dataset, weights: pathlib.Path) -> Dataset:
    """The same images, normalized as those that weights in a file were trained on.

    Raises:
      DataError: the images have no colours.
    """
    if dataset.channels != 3:
        raise DataError(f"{dataset.name} has grey images, and {weights} is of coloured ones.")
    return dataset.normalized(*statistics(weights))


def build_task(
    config: RunConfig,
    dataset: Dataset,
    checkpoint: pathlib.Path | None,
    weights: pathlib.Path | None = None,
) -> Task:
    """Builds the quantized model, from random values, a checkpoint, or weights of others.

    Raises:
      UserError, ValueError: an option does not fit.
      CheckpointError: the checkpoint is missing, damaged or of another model.
      WeightsError: the weights are.
    """
    # Before the model, whose making takes seconds.
    check_implementation(config.implementation)
    recipe, kind = config.build_recipe(), kind_of(dataset)
    float_model = create_model(**model_options(config, dataset), rngs=nnx.Rngs(config.seed))
    start = "random values"
    if weights is not None:
        loaded = load_weights(float_model, weights).table
        counts = f"{len(loaded.loaded)} loaded, {len(loaded.new)} new, {len(loaded.unused)} unused"
        start = f"{weights} ({counts})"
        for name, why in loaded.new:
            print(f"new: {name}: {why}")
    model, table = quantize(
        float_model,
        recipe,
        implementation=config.implementation,
        example=kind.example(config, dataset),
        budget=config.budget or "layer",
        rngs=nnx.Rngs(config.seed + 1),
    )
    if checkpoint is not None:  # into the quantized model: it may hold learned scales
        fresh = load_parameters(checkpoint, model, new_head="head")
        start = f"{checkpoint}" + (" with a new head" if fresh else "")
    if recipe.threshold != "zero":
        calibrate(model, kind.first(dataset, dataset.train, _CALIBRATED))
    return Task(dataset, model, table, start)


def model_options(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """What :func:`fqt_jax.models.create_model` builds a run's model from."""
    return {
        "name": config.model,
        "num_classes": dataset.num_classes,
        "width": config.width,
        **kind_of(dataset).model_options(config, dataset),
    }


def resolved(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """What the options that were left open became."""
    return {**config.filled_in(), **kind_of(dataset).resolved(config, dataset)}
