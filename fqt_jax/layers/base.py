"""What quantized layers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fqt_jax.binarize import weight_scale
from fqt_jax.kernels import check_implementation
from fqt_jax.recipe import Recipe, as_recipe

Initializer = Callable[..., jax.Array]

KERNEL_INIT: Initializer = nnx.initializers.lecun_normal()
BIAS_INIT: Initializer = nnx.initializers.zeros_init()


class QuantLayer(nnx.Module):
    """What quantized layers share: ordinary float parameters, a recipe, and a stream of keys.

    Args:
      kernel_shape: shape of the weights.
      in_features: channels of the input, which thresholds are for.
      bias_shape: shape of the bias; ``None`` for none.
      recipe: what is quantized and how.
      dtype: type that the input is cast to, and so that of the output; ``None`` leaves it.
      kernel_init, bias_init, implementation, rngs: as in :class:`QuantConv`.
      scale_of: the mean of ``abs`` of the weights, where they are not ``[..., O]``.
    """

    def __init__(
        self,
        kernel_shape: tuple[int, ...],
        in_features: int,
        bias_shape: tuple[int, ...] | None,
        *,
        recipe: Recipe | str,
        dtype: Any = None,
        kernel_init: Initializer = KERNEL_INIT,
        bias_init: Initializer = BIAS_INIT,
        implementation: str | None = None,
        rngs: nnx.Rngs,
        scale_of: Callable[[jax.Array], jax.Array] = weight_scale,
    ):
        recipe = as_recipe("recipe", recipe)
        if min(kernel_shape, default=1) < 1:
            raise ValueError(f"features and kernel sizes must be positive; got {kernel_shape}.")
        check_implementation(implementation)
        self.kernel = nnx.Param(kernel_init(rngs.params(), kernel_shape, jnp.float32))
        self.bias = (
            nnx.Param(bias_init(rngs.params(), bias_shape, jnp.float32))
            if bias_shape is not None
            else None
        )
        scale = scale_of(self.kernel[...]) if recipe.learns_scale else None
        if scale is not None and recipe.scale == "learned_from_one":
            scale = jnp.ones_like(scale)
        self.scale = None if scale is None else nnx.Param(scale)
        # Signs change at zero until fqt_jax.calibrate has seen a batch.
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
        self.dtype = dtype
        self.implementation = implementation

    def _cast(self, x: jax.Array) -> jax.Array:
        return x if self.dtype is None else x.astype(self.dtype)

    def _operands(self, *names: str) -> dict[str, Any]:
        """What the functions of :mod:`fqt_jax.functional` are given by these names, and by all."""
        held = {name: getattr(self, name) for name in ("scale", "threshold", "spread", *names)}
        return {
            "key": None if self.rounding is None else self.rounding(),
            "recipe": self.recipe,
        } | {name: None if value is None else value[...] for name, value in held.items()}


def laid_out(y: jax.Array, out_sharding: Any) -> jax.Array:
    """``y``, laid out over a mesh of explicit axes where that is asked for."""
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)
