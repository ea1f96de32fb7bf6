"""Quantized layers as Flax NNX modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fqt_jax.binarize import weight_scale
from fqt_jax.functional import conv, dense
from fqt_jax.kernels import check_implementation
from fqt_jax.recipe import FQT1, Recipe
from fqt_jax.windows import Padding

Initializer = Callable[..., jax.Array]

_KERNEL_INIT: Initializer = nnx.initializers.lecun_normal()
_BIAS_INIT: Initializer = nnx.initializers.zeros_init()


class _QuantLayer(nnx.Module):
    """What both layers share: ordinary float parameters, a recipe, and a stream of keys."""

    def __init__(
        self,
        kernel_shape: tuple[int, ...],
        *,
        use_bias: bool,
        recipe: Recipe,
        kernel_init: Initializer,
        bias_init: Initializer,
        implementation: str | None,
        rngs: nnx.Rngs,
    ):
        if min(kernel_shape) < 1:
            raise ValueError(f"features and kernel sizes must be positive; got {kernel_shape}.")
        check_implementation(implementation)
        out_features = kernel_shape[-1]
        self.kernel = nnx.Param(kernel_init(rngs.params(), kernel_shape, jnp.float32))
        self.bias = (
            nnx.Param(bias_init(rngs.params(), (out_features,), jnp.float32)) if use_bias else None
        )
        # Starts at the mean of abs(w), the scale that the unlearned recipes use.
        self.scale = (
            nnx.Param(weight_scale(self.kernel[...])) if recipe.scale == "learned" else None
        )
        # Signs change at zero until fqt_jax.calibrate has seen a batch.
        in_features = kernel_shape[-2]
        held = {"calibrated": nnx.BatchStat, "learned": nnx.Param}.get(recipe.threshold)
        self.threshold = None if held is None else held(jnp.zeros(in_features, jnp.float32))
        self.spread = None if held is None else nnx.BatchStat(jnp.ones(in_features, jnp.float32))
        # A stream of its own name, whatever stream its key came from: nnx.reseed finds it.
        self.rounding = (
            nnx.RngStream(rngs["rounding"](), tag="rounding")
            if recipe.gradient is not None
            else None
        )
        self.recipe = recipe
        self.implementation = implementation

    def _operands(self) -> dict[str, Any]:
        held = {name: getattr(self, name) for name in ("scale", "bias", "threshold", "spread")}
        return {
            "key": None if self.rounding is None else self.rounding(),
            "recipe": self.recipe,
            "implementation": self.implementation,
        } | {name: None if value is None else value[...] for name, value in held.items()}


class QuantConv(_QuantLayer):
    """Two-dimensional convolution under a recipe: :func:`fqt_jax.conv` as a module.

    Its parameters ``kernel`` and ``bias`` are float, with the names and shapes of those of
    :class:`flax.nnx.Conv`, so checkpoints of the two interchange. With the scale learned there is
    ``scale`` besides; with a threshold there are ``threshold``, a parameter where it is learned,
    and ``spread``, which :func:`fqt_jax.calibrate` sets. A recipe that rounds at random draws a
    fresh key in each call from the stream ``rounding``, whose counter is part of the module's
    state.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: one number, or ``(height, width)``.
      strides: one number, or ``(down, across)``.
      padding: as in :func:`fqt_jax.conv`.
      use_bias: whether a bias is added.
      recipe: what is quantized and how.
      kernel_init, bias_init: initializers of the parameters.
      implementation: name of the kernels' implementation; ``None`` picks the best one.
      rngs: streams ``params`` and, for recipes that round at random, ``rounding``.

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
        use_bias: bool = True,
        recipe: Recipe = FQT1,
        kernel_init: Initializer = _KERNEL_INIT,
        bias_init: Initializer = _BIAS_INIT,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        size = (kernel_size,) * 2 if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(size) != 2:
            raise ValueError(f"kernel_size must be one or two numbers; got {kernel_size!r}.")
        super().__init__(
            (*size, in_features, out_features),
            use_bias=use_bias,
            recipe=recipe,
            kernel_init=kernel_init,
            bias_init=bias_init,
            implementation=implementation,
            rngs=rngs,
        )
        self.strides = strides if isinstance(strides, int) else (strides[0], strides[-1])
        self.padding = padding

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer to ``x[..., H, W, C]``; all leading axes together are the batch.

        ``out_sharding`` lays the output out over a mesh of explicit axes, as for
        :class:`flax.nnx.Conv`.
        """
        batch = x.shape[:-3]
        x = x.reshape(-1, *x.shape[-3:])
        kernel = self.kernel[...]
        y = conv(x, kernel, strides=self.strides, padding=self.padding, **self._operands())
        return _laid_out(y.reshape(*batch, *y.shape[1:]), out_sharding)


class QuantLinear(_QuantLayer):
    """Dense layer under a recipe: :func:`fqt_jax.dense` as a module.

    The counterpart of :class:`flax.nnx.Linear`; see :class:`QuantConv` for the arguments and the
    random stream.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import fqt_jax as fqt
      >>> layer = fqt.QuantLinear(8, 4, recipe=fqt.QAT, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 5, 8))).shape
      (2, 5, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        recipe: Recipe = FQT1,
        kernel_init: Initializer = _KERNEL_INIT,
        bias_init: Initializer = _BIAS_INIT,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            (in_features, out_features),
            use_bias=use_bias,
            recipe=recipe,
            kernel_init=kernel_init,
            bias_init=bias_init,
            implementation=implementation,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer to ``x[..., C]``.

        ``out_sharding`` lays the output out over a mesh of explicit axes, as for
        :class:`flax.nnx.Linear`.
        """
        return _laid_out(dense(x, self.kernel[...], **self._operands()), out_sharding)


def _laid_out(y: jax.Array, out_sharding: Any) -> jax.Array:
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)
