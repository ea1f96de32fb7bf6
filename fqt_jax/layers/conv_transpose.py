"""Transposed convolution under a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax import lax

from fqt_jax.functional import product
from fqt_jax.layers.base import BIAS_INIT, KERNEL_INIT, Initializer, QuantLayer
from fqt_jax.recipe import FQT1, Recipe
from fqt_jax.windows import Padding, explicit_padding, per_axis


class QuantConvTranspose(QuantLayer):
    """Transposed convolution under a recipe: :func:`fqt_jax.product`, in float, as a module.

    The counterpart of :class:`flax.nnx.ConvTranspose`, with its arguments; see :class:`QuantConv`
    for the parameters and the random stream.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import fqt_jax as fqt
      >>> layer = fqt.QuantConvTranspose(8, 16, (2, 2), strides=2, recipe=fqt.QAT, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((4, 6, 6, 8))).shape
      (4, 12, 12, 16)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        *,
        padding: Padding = "SAME",
        kernel_dilation: int | Sequence[int] = 1,
        use_bias: bool = True,
        recipe: Recipe | str = FQT1,
        dtype: Any = None,
        kernel_init: Initializer = KERNEL_INIT,
        bias_init: Initializer = BIAS_INIT,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        size = (kernel_size,) * 2 if isinstance(kernel_size, int) else tuple(kernel_size)
        super().__init__(
            (*size, in_features, out_features),
            in_features,
            (out_features,) if use_bias else None,
            recipe=recipe,
            dtype=dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            implementation=implementation,
            rngs=rngs,
        )
        dilation = per_axis("kernel_dilation", kernel_dilation, len(size))
        pads = explicit_padding(padding, size, dilation)
        if pads in ("CIRCULAR", "REFLECT"):
            raise ValueError(f"padding must be 'SAME', 'VALID' or numbers; got {padding!r}.")
        self.kernel_size = size
        self.geometry = TransposeGeometry(per_axis("strides", strides, len(size)), pads, dilation)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to ``x[..., *spatial, C]``; all leading axes together are the batch."""
        x, kernel = self._cast(x), self.kernel[...]
        axes = kernel.ndim - 1
        batch = x.shape[:-axes]
        x = x.reshape(-1, *x.shape[-axes:])
        y = product(x, kernel, self.geometry, **self._operands("bias"))
        return y.reshape(*batch, *y.shape[1:])


@dataclasses.dataclass(frozen=True)
class TransposeGeometry:
    """All of a transposed convolution but its operands; calling it computes it in float.

    Attributes:
      strides, kernel_dilation: for each spatial axis.
      padding: ``"SAME"``, ``"VALID"``, or ``(before, after)`` for each axis.
    """

    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    kernel_dilation: tuple[int, ...]

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """That of ``x[N, *spatial, C]`` with ``w[*window, C, O]``."""
        return lax.conv_transpose(
            x,
            w,
            self.strides,
            self.padding,
            rhs_dilation=self.kernel_dilation,
            precision=lax.Precision.HIGHEST,
        )
