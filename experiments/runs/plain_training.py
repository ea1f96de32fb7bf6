"""A short training run whose states can be looked at between epochs, for measurements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from experiments.data import Dataset, epoch_order
from experiments.runs.batches import on_device
from experiments.runs.config import RunConfig
from experiments.runs.kinds import kind_of
from experiments.runs.steps import build_train_step
from fqt_jax.training import TrainState, create_state, reset_metrics


def plain_epochs(
    config: RunConfig, dataset: Dataset, model: nnx.Module
) -> Iterator[tuple[int, Any, TrainState]]:
    """Trains without augmentation, and stops after each epoch for the caller.

    Yields:
      ``(epoch, graphdef, state)``, from epoch 0, before training, to the last. The state's running
      sums are those of the epoch. The state is donated to the next step: copy what has to last.
    """
    steps = len(dataset.train) // config.batch_size
    params = nnx.state(model, nnx.Param)
    optimizer = config.build_optimizer().build(params, steps * config.epochs)
    graphdef, state = create_state(model, optimizer, kind_of(dataset).metrics)
    step = build_train_step(config, dataset, graphdef, optimizer)
    data, labels = on_device(dataset, dataset.train), dataset.train.labels
    key = jax.random.key(config.seed)
    yield 0, graphdef, state
    for epoch in range(config.epochs):
        state = reset_metrics(state)
        order = epoch_order(
            len(labels),
            config.batch_size,
            config.seed,
            epoch,
            labels=labels if config.stratify else None,
        )
        for indices in order:
            state, _ = step(state, data, indices, key)
        yield epoch + 1, graphdef, state
