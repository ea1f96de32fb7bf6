"""The compiled steps of a run: classification of images, on the device or streamed to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax

from experiments.data import Dataset, Streamed
from experiments.data.augment import augment, normalize
from experiments.runs.batches import Data
from experiments.runs.config import RunConfig
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

METRICS = ("accuracy",)
"""What the steps sum besides the loss."""


def build_train_step(
    config: RunConfig,
    dataset: Dataset,
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    *,
    flip: bool = False,
    pad: int = 0,
) -> Step:
    """The training step of a run: ``step(state, *batch, key) -> (state, loss)``.

    ``batch`` is one of :class:`experiments.runs.batches.Batches`: ``data, indices`` of a data set
    that is held on the device, or the images themselves.

    Args:
      config: decides label smoothing and the estimator.
      dataset: its statistics normalize images.
      graphdef: structure of the model.
      optimizer: the optimizer.
      flip, pad: of :func:`experiments.data.augment.augment`; a stream has its own augmentation.
    """
    loss = CrossEntropy(dataset.num_classes, config.label_smoothing)
    step = make_train_step(
        graphdef,
        optimizer,
        loss=loss,
        estimator=config.build_estimator(),
        metrics={"accuracy": loss.accuracy},
        preprocess=training_images(dataset, flip=flip, pad=pad),
    )
    return step if isinstance(dataset.train, Streamed) else gather_on_device(step)


def training_images(dataset: Dataset, *, flip: bool, pad: int) -> Callable[[Data, jax.Array], Data]:
    """``(batch, key) -> batch``: what a training step does to images before the model."""

    def preprocess(batch: Data, key: jax.Array) -> Data:
        images = augment(batch["image"], key, flip=flip, pad=pad)
        return batch | {"image": normalize(images, dataset.mean, dataset.std)}

    return preprocess


def build_eval_step(dataset: Dataset, graphdef: Any) -> Step:
    """The evaluation step, without label smoothing: ``step(state, sums, *batch) -> sums``."""
    loss = CrossEntropy(dataset.num_classes)

    def preprocess(batch: Data) -> Data:
        return batch | {"image": normalize(batch["image"], dataset.mean, dataset.std)}

    metrics = {"accuracy": loss.accuracy}
    step = make_eval_step(graphdef, loss=loss, metrics=metrics, preprocess=preprocess)
    return step if isinstance(dataset.train, Streamed) else gather_on_device(step)


def evaluate(step: Step, state: TrainState, batches: Iterable[tuple[Any, ...]]) -> dict[str, float]:
    """Mean loss and accuracy over batches of one size."""
    sums = None
    for number, batch in enumerate(batches):
        sums = step(state, sums, *batch)
        if number % _IN_FLIGHT == 0:  # so that not all of a stream piles up on the device
            jax.block_until_ready(sums)
    if sums is None:
        raise ValueError("the split is empty.")
    return sums.means()
