"""The compiled steps of a run: classification of images that lie on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import Dataset, Split
from experiments.data.augment import augment, normalize
from experiments.runs.config import RunConfig
from fqt_jax.steps import GatheredEvalStep, GatheredTrainStep
from fqt_jax.training import (
    CrossEntropy,
    TrainState,
    gather_on_device,
    make_eval_step,
    make_train_step,
)

METRICS = ("accuracy",)
"""What the steps sum besides the loss."""

Data = dict[str, jax.Array]
"""``"image"``, as bytes, and ``"label"``."""


def on_device(split: Split) -> Data:
    """A split as the steps take it."""
    return {"image": jnp.asarray(split.images), "label": jnp.asarray(split.labels)}


def build_train_step(
    config: RunConfig,
    dataset: Dataset,
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    *,
    flip: bool = False,
    pad: int = 0,
) -> GatheredTrainStep:
    """The training step of a run: ``step(state, data, indices, key) -> (state, loss)``.

    Args:
      config: decides label smoothing and the estimator.
      dataset: its statistics normalize images.
      graphdef: structure of the model.
      optimizer: the optimizer.
      flip, pad: of :func:`experiments.data.augment.augment`.
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
    return gather_on_device(step)


def training_images(dataset: Dataset, *, flip: bool, pad: int) -> Callable[[Data, jax.Array], Data]:
    """``(batch, key) -> batch``: what a training step does to images before the model."""

    def preprocess(batch: Data, key: jax.Array) -> Data:
        images = augment(batch["image"], key, flip=flip, pad=pad)
        return batch | {"image": normalize(images, dataset.mean, dataset.std)}

    return preprocess


def build_eval_step(dataset: Dataset, graphdef: Any) -> GatheredEvalStep:
    """The evaluation step, without label smoothing."""
    loss = CrossEntropy(dataset.num_classes)

    def preprocess(batch: Data) -> Data:
        return batch | {"image": normalize(batch["image"], dataset.mean, dataset.std)}

    metrics = {"accuracy": loss.accuracy}
    step = make_eval_step(graphdef, loss=loss, metrics=metrics, preprocess=preprocess)
    return gather_on_device(step)


def evaluate(
    step: GatheredEvalStep, state: TrainState, data: Data, batch_size: int
) -> dict[str, float]:
    """Mean loss and accuracy on a split, in batches of one size."""
    n, sums = len(data["label"]), None
    for start in range(0, n, batch_size):
        indices = np.arange(start, start + batch_size, dtype=np.int32)
        sums = step(state, sums, data, np.where(indices < n, indices, np.int32(-1)))
    if sums is None:
        raise ValueError("the split is empty.")
    return sums.means()
