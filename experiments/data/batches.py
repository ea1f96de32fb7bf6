"""The order of training examples, as a function of the epoch and at most their labels."""

from __future__ import annotations

import numpy as np

from experiments.data.dataset import DataError


def epoch_order(
    n: int,
    batch_size: int,
    seed: int,
    epoch: int,
    *,
    labels: np.ndarray | None = None,
    pieces: int = 1,
) -> np.ndarray:
    """Indices of an epoch's batches, the same whenever and wherever they are asked for.

    A run that resumes in epoch 7 sees the examples it would have seen without the pause. The
    permutation sorts raw words of PCG64, a stream NumPy promises never to change, unlike that of
    ``Generator.permutation``.

    Args:
      n: number of examples.
      batch_size: examples in a batch; the ``n % batch_size`` last ones of the permutation are
        left out of this epoch.
      seed: of the run, not negative.
      epoch: counted from 0.
      labels: ``[n]``; each batch is then laid out by label, in the order of the permutation where
        labels are equal. The systematic sampler takes evenly from any stretch of neighbours, so
        every class gets its share of the samples drawn, which lowers the noise of their sum and
        stays unbiased.
      pieces: into so many equal pieces a batch is cut for its devices; each is laid out by label,
        and has its share of every label.

    Returns:
      int32 ``[n // batch_size, batch_size]``, all entries distinct and in ``[0, n)``.

    Raises:
      DataError: fewer examples than one batch, a negative seed or epoch, not ``n`` labels, or
        pieces that cannot be equal.

    Example:
      >>> epoch_order(10, 4, seed=0, epoch=0).shape
      (2, 4)
      >>> labels = np.arange(10) % 3
      >>> labels[epoch_order(10, 4, seed=0, epoch=0, labels=labels)]
      array([[0, 1, 2, 2],
             [0, 0, 1, 1]])
      >>> labels[epoch_order(10, 4, seed=0, epoch=0, labels=labels, pieces=2)]
      array([[0, 2, 1, 2],
             [0, 1, 0, 1]])
      >>> epoch_order(3, 4, seed=0, epoch=0)
      Traceback (most recent call last):
        ...
      experiments.data.dataset.DataError: batch_size must lie between 1 and the number of examples,
        3; got 4.
    """
    if not 1 <= batch_size <= n:
        raise DataError(
            f"batch_size must lie between 1 and the number of examples, {n}; got {batch_size}."
        )
    if seed < 0 or epoch < 0:
        raise DataError(f"seed and epoch must not be negative; got {seed} and {epoch}.")
    words = np.random.PCG64([seed, epoch]).random_raw(n)
    steps = n // batch_size
    order = np.argsort(words, kind="stable")[: steps * batch_size]
    batches = order.astype(np.int32).reshape(steps, batch_size)
    if labels is None:
        return batches
    if labels.shape != (n,):
        raise DataError(f"labels must have the shape ({n},); got {labels.shape}.")
    by_label = np.argsort(labels[batches], axis=1, kind="stable")
    if batch_size % pieces:
        raise DataError(f"a batch of {batch_size} has no {pieces} equal pieces.")
    laid_out = np.take_along_axis(batches, by_label, axis=1)
    dealt = laid_out.reshape(steps, batch_size // pieces, pieces).swapaxes(1, 2)
    return np.ascontiguousarray(dealt).reshape(steps, batch_size)
