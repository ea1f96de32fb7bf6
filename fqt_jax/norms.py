"""Batch norm on rows that were drawn from a batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


class RowNorm(nnx.BatchNorm):
    r"""Batch norm of drawn rows: the statistics of the whole batch, and their gradient as well.

    ``mean`` and ``var`` hold the whole batch's statistics, which are the values that normalize. For
    the gradient they are functions of the rows: means in which row ``i`` counts
    :math:`\omega_i / k`, where :math:`\omega_i = k m_i / (n p_i)` for ``k`` rows of ``n``
    samples. Over the draws, such a mean is that of the batch, so what flows through the statistics
    is estimated along with the rest of the gradient.

    Attributes:
      weights: ``omega``, ``float32[k]``.
    """

    weights: nnx.Variable[jax.Array]

    @classmethod
    def take_over(cls, norm: nnx.BatchNorm, weights: jax.Array) -> None:
        """Makes a norm one of drawn rows, in place: whoever holds it holds this from now on.

        Args:
          norm: a plain batch norm over all axes but the last, whose statistics are the batch's.
          weights: ``omega``.
        """
        norm.use_running_average = True
        norm.__class__ = cls
        norm.weights = nnx.Variable(weights)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> jax.Array:
        """Normalizes the rows ``x[k, ..., C]``."""
        axes = tuple(range(x.ndim - 1))
        mean, var = self.mean[...], self.var[...]
        weights = self.weights[...].reshape(-1, *(1,) * (x.ndim - 1))
        d = x.astype(jnp.float32) - mean
        mean = with_gradient_of(mean, jnp.mean(weights * d, axes))
        var = with_gradient_of(var, jnp.mean(weights * jnp.square(d), axes))
        y = (x.astype(jnp.float32) - mean) * lax.rsqrt(var + jnp.float32(self.epsilon))
        if self.scale is not None:
            y = y * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(self.dtype or x.dtype)


def with_gradient_of(value: jax.Array, other: jax.Array) -> jax.Array:
    """``value``, with the gradient of ``other``."""
    return lax.stop_gradient(value) + (other - lax.stop_gradient(other))
