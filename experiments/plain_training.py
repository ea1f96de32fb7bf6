"""A short training run whose states can be looked at between epochs, for measurements."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.config import RunConfig
from experiments.data import Dataset, epoch_order
from experiments.data.augment import normalize
from fqt_jax.training import TrainState, create_state, make_train_step, reset_metrics


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
    graphdef, state = create_state(model, optimizer)
    prepare = functools.partial(normalize, mean=dataset.mean, std=dataset.std)
    step = make_train_step(
        graphdef,
        optimizer,
        smoothing=config.label_smoothing,
        preprocess=lambda x, key: prepare(x),
        one_draw=config.build_one_draw(),
        stratify=config.stratify,
    )
    images, labels = jnp.asarray(dataset.train.images), jnp.asarray(dataset.train.labels)
    key = jax.random.key(config.seed)
    yield 0, graphdef, state
    for epoch in range(config.epochs):
        state = reset_metrics(state)
        for indices in epoch_order(len(labels), config.batch_size, config.seed, epoch):
            state, _ = step(state, images, labels, jnp.asarray(indices), key)
        yield epoch + 1, graphdef, state
