"""The compiled steps of a run, on data on the device or streamed to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from experiments.data import Dataset, Streamed
from experiments.runs.config import RunConfig
from experiments.runs.kinds import Preprocess, kind_of
from fqt_jax.exchange import Exchange, Mean
from fqt_jax.training import (
    CrossEntropy,
    TrainState,
    gather_on_device,
    make_eval_step,
    make_train_step,
)

Step = Callable[..., Any]
"""A step of :mod:`fqt_jax.steps`, which takes one of :class:`experiments.runs.batches.Batches`."""

_IN_FLIGHT = 8


def build_train_step(
    config: RunConfig,
    dataset: Dataset,
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    *,
    augments: bool = False,
    mesh: Mesh | None = None,
    exchange: Exchange = Mean(),
) -> Step:
    """The training step of a run: ``step(state, *batch, key) -> (state, loss)``.

    ``batch`` is one of :class:`experiments.runs.batches.Batches`: ``data, indices`` of a data set
    that is held on the device, or the images themselves.

    Args:
      config: decides label smoothing, augmentation and the estimator.
      dataset: its statistics normalize images.
      graphdef: structure of the model.
      optimizer: the optimizer.
      augments: whether images are augmented; a stream has its own augmentation.
      mesh, exchange: the devices, where there are several, and how they reduce gradients.
    """
    kind, loss = kind_of(dataset), CrossEntropy(dataset.num_classes, config.label_smoothing)
    step = make_train_step(
        graphdef,
        optimizer,
        loss=loss,
        estimator=config.build_estimator(),
        metrics=kind.metrics_of(loss),
        preprocess=kind.training(config, dataset) if augments else _without_key(dataset),
        mesh=mesh,
        statistics=config.batch_statistics or "synchronized",
        exchange=exchange,
    )
    return step if isinstance(dataset.train, Streamed) else gather_on_device(step)


def _without_key(dataset: Dataset) -> Preprocess | None:
    preprocess = kind_of(dataset).evaluation(dataset)
    return None if preprocess is None else lambda batch, key: preprocess(batch)


def build_eval_step(dataset: Dataset, graphdef: Any, mesh: Mesh | None = None) -> Step:
    """The evaluation step, without label smoothing: ``step(state, sums, *batch) -> sums``."""
    kind, loss = kind_of(dataset), CrossEntropy(dataset.num_classes)
    step = make_eval_step(
        graphdef,
        loss=loss,
        metrics=kind.metrics_of(loss),
        preprocess=kind.evaluation(dataset),
        mesh=mesh,
    )
    return step if isinstance(dataset.train, Streamed) else gather_on_device(step)


def evaluate(step: Step, state: TrainState, batches: Iterable[tuple[Any, ...]]) -> dict[str, float]:
    """Mean loss and metrics over batches of one size."""
    sums = None
    for number, batch in enumerate(batches):
        sums = step(state, sums, *batch)
        if number % _IN_FLIGHT == 0:  # so that not all of a stream piles up on the device
            jax.block_until_ready(sums)
    if sums is None:
        raise ValueError("the split is empty.")
    return sums.means()
