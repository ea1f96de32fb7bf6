"""Means over many batches, as running sums on the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Metric = Callable[[Any, Any], Any]
"""``(outputs, batch) -> values``: one number a sample, ``[N]``, whose mean over the samples is
wanted; or a pair ``(sums, counts)`` of such, where the mean is that of all sums over all counts,
such as right tokens over tokens."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sums", "counts"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Metrics:
    """Running sums of the loss and the metrics.

    Whole numbers are summed exactly up to ``2^24``.

    Attributes:
      sums: by name, ``float32``.
      counts: what each is a mean over, ``float32``.

    Example:
      >>> import jax.numpy as jnp
      >>> metrics = Metrics.zero().add({"loss": jnp.array([1.0, 2.0])})
      >>> metrics.add({"loss": jnp.array([3.0])}).means()
      {'loss': 2.0}
    """

    sums: dict[str, jax.Array]
    counts: dict[str, jax.Array]

    @classmethod
    def zero(cls, metrics: Iterable[str] = ()) -> Metrics:
        """Sums over no samples, of the loss and of metrics by their names."""
        names = ("loss", *check_names(metrics))
        sums, counts = ({name: jnp.zeros((), jnp.float32) for name in names} for _ in range(2))
        return cls(sums, counts)

    def add(self, values: Mapping[str, Any], valid: jax.Array | None = None) -> Metrics:
        """The sums with those of a batch added.

        Args:
          values: by name, what a :data:`Metric` gives.
          valid: ``bool[N]``; samples where it is false count for nothing.

        Raises:
          ValueError: these are not the metrics that are summed.
        """
        if set(values) != set(self.sums):
            raise ValueError(
                f"the running sums are of {', '.join(sorted(self.sums))}, the step's metrics "
                f"{', '.join(sorted(values))}: give the same metrics to both."
            )
        sums, counts = {}, {}
        for name, value in values.items():
            value, count = value if isinstance(value, tuple) else (value, jnp.ones_like(value))
            sums[name] = self.sums[name] + _sum(value, valid)
            counts[name] = self.counts[name] + _sum(count, valid)
        return Metrics(sums, counts)

    def means(self) -> dict[str, float]:
        """The means as Python numbers; waits for the device.

        A pair whose counts are all zero gives NaN.

        Raises:
          ValueError: no sample was counted.
        """
        sums, counts = jax.device_get((self.sums, self.counts))
        if not counts["loss"]:
            raise ValueError("there is no mean of no samples: none was counted since the start.")
        return {
            name: float(sums[name]) / float(counts[name]) if counts[name] else float("nan")
            for name in sorted(sums, key=lambda name: (name != "loss", name))
        }


def check_names(metrics: Iterable[str]) -> tuple[str, ...]:
    """The names of metrics.

    Raises:
      ValueError: a name is ``"loss"``, which is always there, or a string stands for the names.
    """
    if isinstance(metrics, str):
        raise ValueError(f"metrics must be their names, such as ({metrics!r},); got {metrics!r}.")
    names = tuple(metrics)
    if "loss" in names:
        raise ValueError("a metric cannot be called 'loss': the loss's own mean has that name.")
    return names


def check_per_sample(what: str, value: Any, n: int) -> jax.Array:
    """``value``, if it is one number a sample.

    Raises:
      ValueError: it is not of the shape ``[n]``.
    """
    shape = jnp.shape(value)
    if shape != (n,):
        hint = ": leave out the mean over the samples" if shape == () else ""
        raise ValueError(
            f"{what} must give one number for each of the {n} samples, of shape ({n},); got shape "
            f"{shape}{hint}."
        )
    return jnp.asarray(value)


def evaluate_metrics(
    metrics: Mapping[str, Metric], outputs: Any, batch: Any, n: int
) -> dict[str, Any]:
    """The values of all metrics on a batch of ``n`` samples, by name.

    Raises:
      ValueError: a metric gives something else than one number a sample, or a pair of such.
    """
    values: dict[str, Any] = {}
    for name, metric in metrics.items():
        value, what = metric(outputs, batch), f"the metric {name!r}"
        if isinstance(value, tuple):
            if len(value) != 2:
                raise ValueError(f"{what} must give values or (sums, counts); got {len(value)}.")
            values[name] = tuple(check_per_sample(what, part, n) for part in value)
        else:
            values[name] = check_per_sample(what, value, n)
    return values


def _sum(values: jax.Array, valid: jax.Array | None) -> jax.Array:
    values = values.astype(jnp.float32)
    if valid is not None:
        values = jnp.where(valid, values, jnp.float32(0))
    return jnp.sum(values)
