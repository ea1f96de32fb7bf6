"""Batches: any pytree whose leaves share their first axis, one entry a sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fqt_jax.tree import leaf_name

Part = Callable[[Any], Any]
"""``batch -> part``: where in a batch something is."""

INPUT_NAMES = ("image", "x", "inputs")
"""Entries of a dictionary that :func:`default_inputs` knows."""
LABEL_NAMES = ("label", "y", "labels")
"""Entries of a dictionary that :func:`default_labels` knows."""


class Padded(NamedTuple):
    """A batch of which some samples only fill it up to its size; see :func:`pad_batch`.

    Attributes:
      batch: the batch.
      valid: ``bool[N]``, false for a sample that counts for nothing.
    """

    batch: Any
    valid: Any


def batch_size(batch: Any) -> int:
    """The number of samples in a batch.

    Raises:
      ValueError: the batch has no arrays, no samples, or its arrays differ in their first axis.

    Example:
      >>> import numpy as np
      >>> batch_size({"image": np.zeros((4, 8, 8, 3)), "label": np.zeros(4, int)})
      4
      >>> batch_size({"image": np.zeros((4, 8, 8, 3)), "label": np.zeros(3, int)})
      Traceback (most recent call last):
        ...
      ValueError: the arrays of a batch must be equally long: image has 4 entries, label 3.
    """
    named = [(leaf_name(p) or "it", x) for p, x in jax.tree_util.tree_leaves_with_path(batch)]
    if not named:
        raise ValueError(f"a batch must hold arrays; got {batch!r}.")
    for name, leaf in named:
        if not np.ndim(leaf):
            raise ValueError(
                f"the arrays of a batch need an axis for the samples: {name} has none."
            )
    first, *rest = [(name, np.shape(leaf)[0]) for name, leaf in named]
    for name, length in rest:
        if length != first[1]:
            raise ValueError(
                f"the arrays of a batch must be equally long: {first[0]} has {first[1]} entries, "
                f"{name} {length}."
            )
    if first[1] == 0:
        raise ValueError("the batch is empty: it has no samples.")
    return first[1]


def take(batch: Any, indices: jax.Array) -> Any:
    """The samples at ``indices``."""
    return jax.tree.map(lambda a: jnp.take(a, indices, axis=0), batch)


def pad_batch(batch: Any, size: int) -> Padded:
    """Fills a shorter batch up with copies of its last sample, which then count for nothing.

    For the last batch of an evaluation, so that it needs no compilation of its own.

    Args:
      batch: of at most ``size`` samples, on the host or on the device.
      size: the number of samples in a whole batch.

    Raises:
      ValueError: the batch is empty or longer than ``size``, or not a batch.

    Example:
      >>> import numpy as np
      >>> padded = pad_batch({"x": np.array([1.0, 2.0])}, 4)
      >>> padded.batch["x"], padded.valid
      (array([1., 2., 2., 2.]), array([ True,  True, False, False]))
    """
    n = batch_size(batch)
    if n > size:
        raise ValueError(f"the batch has {n} samples, more than the {size} it is to be padded to.")
    rows = np.minimum(np.arange(size), n - 1)
    return Padded(jax.tree.map(lambda a: a[rows], batch), np.arange(size) < n)


def default_inputs(batch: Any) -> Any:
    """What a model is called with, unless said otherwise.

    The first entry of a tuple or list such as ``(x, y)``; of a dictionary the entry ``"image"``,
    ``"x"`` or ``"inputs"``, one of which must be there; or the batch itself where it is an array.

    Raises:
      ValueError: the batch has no such entry, or a dictionary several.

    Example:
      >>> default_inputs(("images", "labels")), default_inputs({"x": 1, "y": 2})
      ('images', 1)
      >>> default_inputs({"tokens": 1, "label": 2})
      Traceback (most recent call last):
        ...
      ValueError: the batch has none of 'image', 'x', 'inputs', but 'tokens', 'label': say where
        the model's input is by inputs=lambda batch: ...
    """
    return _find(batch, 0, INPUT_NAMES, "the model's input is by inputs=")


def default_labels(batch: Any) -> Any:
    """The labels in a batch, unless said otherwise.

    The second entry of a tuple or list such as ``(x, y)``; of a dictionary the entry ``"label"``,
    ``"y"`` or ``"labels"``, one of which must be there.

    Raises:
      ValueError: the batch has no such entry, or a dictionary several.

    Example:
      >>> default_labels(("images", "labels")), default_labels({"x": 1, "y": 2})
      ('labels', 2)
    """
    return _find(batch, 1, LABEL_NAMES, "the labels are by labels=")


def _find(batch: Any, position: int, names: tuple[str, ...], how: str) -> Any:
    say = f"say where {how}lambda batch: ..."
    if isinstance(batch, Mapping):
        found = [name for name in names if name in batch]
        if len(found) == 1:
            return batch[found[0]]
        wanted = ", ".join(map(repr, names))
        has = ", ".join(map(repr, found or batch))
        problem = f"several of {wanted}: {has}" if found else f"none of {wanted}, but {has}"
        raise ValueError(f"the batch has {problem}: {say}")
    if isinstance(batch, tuple | list):
        if len(batch) > position:
            return batch[position]
        raise ValueError(f"the batch has only {len(batch)} entries: {say}")
    if position == 0 and isinstance(batch, jax.Array | np.ndarray):
        return batch
    raise ValueError(f"the batch is a {type(batch).__name__}: {say}")
