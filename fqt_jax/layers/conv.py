"""Convolution under a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fqt_jax.functional import conv, product
from fqt_jax.kernels.contract import Window
from fqt_jax.layers.base import BIAS_INIT, KERNEL_INIT, Initializer, QuantLayer, laid_out
from fqt_jax.recipe import FQT1, Recipe
from fqt_jax.windows import Padding, explicit_padding, per_axis, resolve_window


class QuantConv(QuantLayer):
    """Convolution under a recipe, as a module.

    That of images, or of sequences, is :func:`fqt_jax.conv`, on packed bits. Where it is dilated,
    grouped, padded in a circle or by reflection, or of three dimensions, it is
    :func:`fqt_jax.product`, in float.

    Its parameters ``kernel`` and ``bias`` are float, with the names and shapes of those of
    :class:`flax.nnx.Conv`, so checkpoints of the two interchange. With the scale learned there is
    ``scale`` besides; with a threshold there are ``threshold``, a parameter where it is learned,
    and ``spread``, which :func:`fqt_jax.calibrate` sets. A recipe that rounds at random draws a
    fresh key in each call from the stream ``rounding``, whose counter is part of the module's
    state.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: the window's size along each spatial axis; one number stands for two axes.
      strides: one number, or one for each axis.
      padding: as in :class:`flax.nnx.Conv`.
      input_dilation, kernel_dilation: one number, or one for each axis.
      feature_group_count: the number of groups that the features are divided into.
      use_bias: whether a bias is added.
      recipe: what is quantized and how.
      dtype: type that the input is cast to, and so that of the output; ``None`` leaves it.
      kernel_init, bias_init: initializers of the parameters.
      implementation: name of the kernels' implementation; ``None`` picks the best one.
      rngs: streams ``params`` and, for recipes that round at random, ``rounding``.

    Raises:
      ValueError: a size is not positive, or strides, padding, dilations and groups do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import fqt_jax as fqt
      >>> layer = fqt.QuantConv(8, 16, 3, strides=2, recipe=fqt.FQT1, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((4, 6, 6, 8))).shape
      (4, 3, 3, 16)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        *,
        padding: Padding = "SAME",
        input_dilation: int | Sequence[int] = 1,
        kernel_dilation: int | Sequence[int] = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        recipe: Recipe | str = FQT1,
        dtype: Any = None,
        kernel_init: Initializer = KERNEL_INIT,
        bias_init: Initializer = BIAS_INIT,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        size = (kernel_size,) * 2 if isinstance(kernel_size, int) else tuple(kernel_size)
        if not 1 <= len(size) <= 3:
            raise ValueError(f"kernel_size must be one to three numbers; got {kernel_size!r}.")
        if feature_group_count < 1 or in_features % feature_group_count:
            raise ValueError(
                f"feature_group_count must divide the {in_features} channels of the input; "
                f"got {feature_group_count}."
            )
        super().__init__(
            (*size, in_features // feature_group_count, out_features),
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
        self.kernel_size = size
        self.geometry = ConvGeometry(
            per_axis("strides", strides, len(size)),
            explicit_padding(padding, size, dilation),
            per_axis("input_dilation", input_dilation, len(size)),
            dilation,
            feature_group_count,
        )

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer to ``x[..., *spatial, C]``; all leading axes together are the batch.

        ``out_sharding`` lays the output out over a mesh of explicit axes, as for
        :class:`flax.nnx.Conv`.
        """
        x, kernel, geometry = self._cast(x), self.kernel[...], self.geometry
        axes = kernel.ndim - 1
        batch = x.shape[:-axes]
        x = x.reshape(-1, *x.shape[-axes:])
        operands = self._operands("bias")
        if geometry.is_general:
            y = product(x, kernel, geometry, **operands)
        else:
            strides, padding = geometry.strides, geometry.padding
            if axes == 2:
                x, kernel, strides = x[:, None], kernel[None], (1, *strides)
                padding = padding if isinstance(padding, str) else ((0, 0), *padding)
            operands["implementation"] = self.implementation
            y = conv(x, kernel, strides=strides, padding=padding, **operands)
            y = y[:, 0] if axes == 2 else y
        return laid_out(y.reshape(*batch, *y.shape[1:]), out_sharding)


@dataclasses.dataclass(frozen=True)
class ConvGeometry:
    """All of a convolution but its operands; calling it computes it in float.

    Attributes:
      strides, input_dilation, kernel_dilation: for each spatial axis.
      padding: ``"SAME"``, ``"VALID"``, ``"CIRCULAR"``, ``"REFLECT"``, or ``(before, after)`` for
        each axis.
      groups: of features.
    """

    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int

    @property
    def is_general(self) -> bool:
        """Whether the integer kernels have no form for it."""
        return bool(self.why_general)

    @property
    def why_general(self) -> str:
        """Why the integer kernels have no form for it; empty where they have."""
        if len(self.strides) > 2:
            return f"a convolution of {len(self.strides)} dimensions"
        if self.groups != 1:
            return "a grouped convolution"
        if {*self.input_dilation, *self.kernel_dilation} != {1}:
            return "a dilated convolution"
        return f"{self.padding} padding" if self.padding in ("CIRCULAR", "REFLECT") else ""

    def window(self, kernel_size: Sequence[int], size: tuple[int, int]) -> Window | None:
        """The window over an image of this height and width; that of a sequence has one row.

        ``None`` where the integer kernels have no form for it.
        """
        if self.is_general:
            return None
        strides, padding = self.strides, self.padding
        if len(kernel_size) == 1:
            strides, kernel_size = (1, *strides), (1, *kernel_size)
            padding = padding if isinstance(padding, str) else ((0, 0), *padding)
        return resolve_window(kernel_size, size, strides, padding)

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The convolution of ``x[N, *spatial, C]`` with ``w[*window, C // groups, O]``."""
        padding = self.padding
        if padding in ("CIRCULAR", "REFLECT"):
            spans = (
                (k - 1) * d + 1 for k, d in zip(w.shape[:-2], self.kernel_dilation, strict=True)
            )
            pads = ((0, 0), *(((k - 1) // 2, k // 2) for k in spans), (0, 0))
            x = jnp.pad(x, pads, mode="wrap" if padding == "CIRCULAR" else "reflect")
            padding = "VALID"
        n = w.ndim
        images, kernel = (0, n - 1, *range(1, n - 1)), (n - 1, n - 2, *range(n - 2))
        numbers = lax.ConvDimensionNumbers(images, kernel, images)
        return lax.conv_general_dilated(
            x,
            w,
            self.strides,
            padding,
            self.input_dilation,
            self.kernel_dilation,
            numbers,
            self.groups,
            precision=lax.Precision.HIGHEST,
        )
