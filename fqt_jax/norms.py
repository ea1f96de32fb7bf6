"""Batch norm on rows that were drawn from a batch."""

from __future__ import annotations

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

    @staticmethod
    def check(norm: nnx.BatchNorm, path: str) -> None:
        """Checks that a norm can be one of drawn rows.

        Raises:
          ValueError: it computes something else than a plain batch norm, over groups of devices, or
            with statistics of another shape, as one of stacked layers has.
        """
        reason = None
        if type(norm).__call__ is not nnx.BatchNorm.__call__:
            reason = f"{type(norm).__name__} is a subclass of nnx.BatchNorm with its own __call__"
        elif norm.axis_index_groups is not None:
            reason = "its statistics are of groups of devices (axis_index_groups)"
        elif not isinstance(norm.axis, int):
            reason = f"it has several feature axes, {norm.axis}"
        elif norm.mean.shape != (norm.num_features,):
            reason = f"its statistics have the shape {norm.mean.shape}, as those of stacked layers"
        if reason is not None:
            raise ValueError(
                f"OneDraw cannot handle the batch norm {path or 'that is the model'}: {reason}. "
                "Use FullBatch()."
            )

    @classmethod
    def take_over(cls, norm: nnx.BatchNorm, weights: jax.Array) -> None:
        """Makes a norm one of drawn rows, in place: whoever holds it holds this from now on.

        Args:
          norm: a norm that passes :meth:`check`, whose statistics are the batch's.
          weights: ``omega``.
        """
        norm.use_running_average = True
        norm.__class__ = cls
        norm.weights = nnx.Variable(weights)

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes the rows ``x``, whose first axis is that of the samples.

        Raises:
          ValueError: the first axis is that of the features, or there is a mask.
        """
        if use_running_average:
            return super().__call__(x, use_running_average=True)
        if mask is not None:
            raise ValueError("OneDraw cannot handle a batch norm with a mask. Use FullBatch().")
        features = self.axis % x.ndim
        if features == 0:
            raise ValueError("OneDraw needs samples, not a batch norm's features, along axis 0.")
        axes = tuple(axis for axis in range(x.ndim) if axis != features)

        def spread(values: jax.Array, axis: int) -> jax.Array:
            return values.reshape([-1 if i == axis else 1 for i in range(x.ndim)])

        rows, weights = x.astype(jnp.float32), spread(self.weights[...], 0)
        mean, var = self.mean[...], self.var[...]
        d = rows - spread(mean, features)
        of_rows = jnp.mean(weights * d, axes), jnp.mean(weights * jnp.square(d), axes)
        if self.axis_name is not None:  # those of all devices' rows
            of_rows = lax.pmean(of_rows, self.axis_name)
        mean, var = map(with_gradient_of, (mean, var), of_rows)
        deviation = lax.rsqrt(var + jnp.float32(self.epsilon))
        y = (rows - spread(mean, features)) * spread(deviation, features)
        dtypes = [x.dtype, self.mean.dtype]
        for parameter, combine in ((self.scale, jnp.multiply), (self.bias, jnp.add)):
            if parameter is not None:
                y = combine(y, spread(parameter[...].astype(jnp.float32), features))
                dtypes.append(parameter.dtype)
        return y.astype(self.dtype or jnp.result_type(*dtypes))


def with_gradient_of(value: jax.Array, other: jax.Array) -> jax.Array:
    """``value``, with the gradient of ``other``."""
    return lax.stop_gradient(value) + (other - lax.stop_gradient(other))
