"""Losses: what a training step takes as one, and Optax's for classification with checked labels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fqt_jax.batches import Part, default_labels
from fqt_jax.binarize import check_float

Loss = Callable[[Any, Any], jax.Array]
"""``(outputs, batch) -> losses``: one number a sample, ``[N]``, of that sample alone.

A loss that holds for some values only may have a method ``check(batch, wait)`` besides, which
raises for others. Steps call it before they start, for it cannot raise while they run: with
``wait=False`` for each batch, when it must not look at arrays on the device, since that would wait
for them; with ``wait=True`` once for a whole data set on the device."""


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    r"""Optax's softmax cross-entropy with labels that are whole numbers, which are checked.

    .. math:: -\sum_c q_c \log \mathrm{softmax}(z)_c, \qquad
       q = (1 - \epsilon)\, e_{label} + \epsilon / C

    A sample may have one label, or many, as a text has one for each of its tokens: its loss is then
    their mean.

    A label that is out of range is an error where it can be seen before a step, in arrays on the
    host and in a data set that :func:`fqt_jax.training.gather_on_device` is given. Elsewhere its
    sample's loss is NaN, and so is the gradient.

    Args:
      num_classes: ``C``, the number of logits.
      smoothing: ``epsilon``, in [0, 1).
      labels: where in a batch the labels ``int[N, ...]`` are.

    Raises:
      ValueError: ``num_classes`` is less than 1 or ``smoothing`` outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> loss = CrossEntropy(4, smoothing=0.1)
      >>> batch = {"image": jnp.zeros((1, 8, 8, 3)), "label": jnp.array([2])}
      >>> [round(float(x), 3) for x in loss(jnp.zeros((1, 4)), batch)]
      [1.386]
      >>> loss.accuracy(jnp.array([[0.0, 0.0, 1.0, 0.0]]), batch)
      Array([ True], dtype=bool)
      >>> loss.check({"label": np.array([0, 4, -1])})
      Traceback (most recent call last):
        ...
      ValueError: labels must lie in 0..3 for 4 classes; the batch has labels from -1 to 4.
    """

    num_classes: int
    smoothing: float = 0.0
    labels: Part = default_labels

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1; got {self.num_classes}.")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1); got {self.smoothing}.")

    def __call__(self, outputs: jax.Array, batch: Any) -> jax.Array:
        """The loss of each sample, ``[N]``, in nats.

        Raises:
          TypeError: the outputs are not floating-point or the labels not whole numbers.
          ValueError: the outputs are not ``[N, ..., C]`` where the labels are ``[N, ...]``.
        """
        labels = self._labels(outputs, batch)
        if self.smoothing:
            targets = jax.nn.one_hot(labels, self.num_classes, dtype=outputs.dtype)
            losses = optax.softmax_cross_entropy(
                outputs, optax.smooth_labels(targets, self.smoothing)
            )
        else:
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        valid = (labels >= 0) & (labels < self.num_classes)
        # A factor, so that the gradient is NaN with the loss: else the sample would be left out
        # without a word.
        return _of_sample(losses * jnp.where(valid, 1.0, jnp.nan).astype(losses.dtype))

    def accuracy(self, outputs: jax.Array, batch: Any) -> jax.Array:
        """Whether the largest output of each sample is that of its label, ``bool[N]``.

        Of samples with many labels, the part of them for which it is, ``float32[N]``.
        """
        labels = self._labels(outputs, batch)
        return _of_sample(jnp.argmax(outputs, axis=-1).astype(labels.dtype) == labels)

    def bits(self, outputs: jax.Array, batch: Any) -> jax.Array:
        """What each label costs in bits, on average over those of a sample, ``[N]``.

        That is the loss without label smoothing, over ``log(2)``: bits per character, of text.
        """
        return dataclasses.replace(self, smoothing=0.0)(outputs, batch) / math.log(2)

    def check(self, batch: Any, wait: bool = True) -> None:
        """Checks the range of the labels in a batch or in a whole data set.

        Args:
          batch: any batch that has labels.
          wait: whether to look at labels that are on the device, which waits for them.

        Raises:
          ValueError: a label is out of range.
        """
        labels = self.labels(batch)
        if isinstance(labels, jax.core.Tracer) or (isinstance(labels, jax.Array) and not wait):
            return
        if np.size(labels) == 0:
            return  # an error of its own
        lowest, highest = int(np.min(labels)), int(np.max(labels))
        if lowest < 0 or highest >= self.num_classes:
            raise ValueError(
                f"labels must lie in 0..{self.num_classes - 1} for {self.num_classes} classes; "
                f"the batch has labels from {lowest} to {highest}."
            )

    def _labels(self, outputs: jax.Array, batch: Any) -> jax.Array:
        check_float("the outputs", outputs)
        labels = jnp.asarray(self.labels(batch))
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise TypeError(f"labels must be whole numbers; got {labels.dtype}.")
        expected = (*labels.shape, self.num_classes)
        if labels.ndim < 1 or outputs.shape != expected:
            raise ValueError(
                f"the outputs must be [N, {self.num_classes}] and the labels [N], or both with "
                f"more axes between; got {list(outputs.shape)} and {list(labels.shape)}."
            )
        return labels


def _of_sample(values: jax.Array) -> jax.Array:
    """The mean over all axes but the first, where there are others."""
    return values if values.ndim == 1 else jnp.mean(values, axis=tuple(range(1, values.ndim)))
