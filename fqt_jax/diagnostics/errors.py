"""The error of the quantized gradient, measured with the library's own rounding and pruning."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fqt_jax.grouping import roundings
from fqt_jax.kernels.contract import Rounding
from fqt_jax.kernels.scaling import kept_values, quantized
from fqt_jax.recipe import GradientQuantizer, Product
from fqt_jax.rounding import seeds_from_key
from fqt_jax.samplers import SAMPLERS
from fqt_jax.theory.variance import GradientError, gradient_error


class Quantization(NamedTuple):
    """How a gradient is quantized for one of the two products.

    Attributes:
      quantizer: bits, keep, sampler, importance, groups, prune.
      product: ``"input"`` or ``"weight"``.
    """

    quantizer: GradientQuantizer
    product: Product = "input"

    def predicted(self, g: jax.Array, selections: int = 256) -> GradientError:
        """:func:`fqt_jax.theory.gradient_error` of ``g``."""
        return gradient_error(
            np.asarray(g), self.quantizer, product=self.product, selections=selections
        )


def _compared() -> dict[str, Quantization]:
    table = {
        "per_tensor": Quantization(GradientQuantizer(1, 1.0, groups="tensor")),
        "psq": Quantization(GradientQuantizer(1, 1.0, groups="sample")),
        "per_channel": Quantization(GradientQuantizer(1, 1.0), "weight"),
    }
    for sampler in SAMPLERS:
        agp = GradientQuantizer(4, sampler=sampler)
        table[f"agp_{sampler}/samples"] = Quantization(agp)
        table[f"agp_{sampler}/channels"] = Quantization(agp, "weight")
        shared = dataclasses.replace(agp, prune="shared")
        table[f"agp_{sampler}/shared"] = Quantization(shared, "weight")
    return table


COMPARED: dict[str, Quantization] = _compared()
"""Quantizations of one bit an entry: per tensor, per sample (PSQ), per channel, and AGP at 4 bits
with each sampler over samples, over channels, and over samples shared by the weight gradient."""


class MeasuredError(NamedTuple):
    """Mean of ``|Q(g) - g|^2`` over independent draws, and the standard error of that mean."""

    mean: float
    standard_error: float


def quantized_gradient(g: jax.Array, quantization: Quantization, key: jax.Array) -> jax.Array:
    """One draw of the quantized gradient ``Q(g)``, in float, zero where it was dropped.

    It is what the library's products see, codes and weights included.

    Args:
      g: ``float32[N, H, W, O]``.
      quantization: how it is quantized.
      key: JAX random key.

    Example:
      >>> import jax
      >>> g = jax.random.normal(jax.random.key(0), (8, 2, 2, 4))
      >>> q = quantized_gradient(g, COMPARED["agp_systematic/samples"], jax.random.key(1))
      >>> int((abs(q).max(axis=(1, 2, 3)) > 0).sum())  # a quarter of the samples
      2
    """
    return quantized(g, _rounding(g, quantization, key))


def measured_error(
    g: jax.Array, quantization: Quantization, key: jax.Array, draws: int = 1000
) -> MeasuredError:
    r"""Measures :math:`\mathrm{E} \lVert Q(g) - g \rVert^2` over ``draws`` draws.

    For the unbiased samplers this is the variance, :func:`fqt_jax.theory.gradient_error`. Only the
    quantization runs, none of the products.

    Args:
      g: ``float32[N, H, W, O]``.
      quantization: how it is quantized.
      key: JAX random key.
      draws: number of draws, at least 2.

    Raises:
      ValueError: ``draws`` is less than 2.

    Example:
      >>> import jax
      >>> g = jax.random.normal(jax.random.key(0), (8, 2, 2, 4))
      >>> psq = COMPARED["psq"]
      >>> measured = measured_error(g, psq, jax.random.key(1), draws=4000)
      >>> abs(measured.mean / psq.predicted(g).total - 1) < 0.03
      True
    """
    if draws < 2:
        raise ValueError(f"draws must be at least 2; got {draws}.")
    # Relative to the largest entry: squares of small gradients would underflow.
    largest = float(jnp.max(jnp.abs(g))) if g.size else 0.0
    if largest == 0:
        return MeasuredError(0.0, 0.0)
    keys = jax.random.split(key, draws)
    errors = np.asarray(_squared_errors(g, keys, quantization), np.float64) * largest**2
    return MeasuredError(float(errors.mean()), float(errors.std(ddof=1) / draws**0.5))


@functools.partial(jax.jit, static_argnames="quantization")
def _squared_errors(g: jax.Array, keys: jax.Array, quantization: Quantization) -> jax.Array:
    inverse = 1 / jnp.max(jnp.abs(g))
    squares = jnp.square(g * inverse)

    def one(key: jax.Array) -> jax.Array:
        rounding = _rounding(g, quantization, key)
        values, samples = kept_values(g, rounding), rounding.samples
        kept, own, axis = g, samples or rounding.channels, 0 if samples is not None else 3
        dropped = jnp.float32(0)
        if own is not None:
            kept = jnp.take(g, own.indices, axis=axis)
            by_group = jnp.sum(squares, axis=tuple(a for a in range(4) if a != axis))
            used = own.expand() != 0
            dropped = jnp.sum(jnp.where(used, jnp.float32(0), by_group))
            shape = tuple(-1 if a == axis else 1 for a in range(4))
            # A slot of weight zero is a dropped group, counted there.
            kept = jnp.where((own.weights != 0).reshape(shape), kept, jnp.float32(0))
        return dropped + jnp.sum(jnp.square((values - kept) * inverse))

    return jax.lax.map(one, keys)


def _rounding(g: jax.Array, quantization: Quantization, key: jax.Array) -> Rounding:
    for_input, for_weight = roundings(g, quantization.quantizer, seeds_from_key(key, 4))
    return for_input if quantization.product == "input" else for_weight
