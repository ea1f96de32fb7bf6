"""What a model takes from data before it trains: thresholds of signs, statistics of norms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fqt_jax.layer_types import quantized_layers, type_of
from fqt_jax.modules import find_modules
from fqt_jax.recipe import FULL_PRECISION
from fqt_jax.tapping import Call, tapped
from fqt_jax.text import format_table

_ROUNDING = 1e-6
"""A deviation below this part of the mean is float rounding, not signal."""


class LayerSigns(NamedTuple):
    """The signs that one quantized layer takes.

    Attributes:
      path: where it stands in the model.
      positive: the part of them that is +1.
      one_sided: the number of input channels whose signs are all the same.
      channels: the number of input channels.
    """

    path: str
    positive: float
    one_sided: int
    channels: int


class SignTable(tuple[LayerSigns, ...]):
    """The signs of each quantized layer, in the order of the calls; prints as a table."""

    def __str__(self) -> str:
        rows = [
            (each.path, f"{each.positive:.1%}", f"{each.one_sided} of {each.channels}")
            for each in self
        ]
        return format_table(("layer", "+1", "channels of one sign"), rows, names=1)


def sign_balance(model: Any, *inputs: Any, **options: Any) -> SignTable:
    """How the signs of a batch fall in each quantized layer.

    A channel whose signs are all the same says nothing. Behind ReLU that is every channel, unless
    the recipe has a threshold. The model stays as it is.

    Args:
      model: a model with layers that :func:`fqt_jax.quantize` converted.
      *inputs, **options: what it is called with.

    Raises:
      ValueError: the model has no quantized layer, or calls one inside of a loop.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import fqt_jax as fqt
      >>> model = nnx.Sequential(nnx.relu, fqt.QuantLinear(8, 4, rngs=nnx.Rngs(0)))
      >>> print(sign_balance(model, jax.random.normal(jax.random.key(0), (16, 8))))
      layer     +1      channels of one sign
      --------------------------------------
      layers/1  100.0%                8 of 8
    """
    paths = _binary_layers(model)
    if not paths:
        raise ValueError(f"{type(model).__name__} has no quantized layer: see fqt_jax.quantize.")
    return _observed(model, (), inputs, options)[1]


def calibrate(model: Any, *inputs: Any, **options: Any) -> SignTable:
    r"""Sets the thresholds of a model's signs from a batch, in place.

    For each channel of each quantized layer whose recipe has a threshold, over all entries of what
    the layer is given,

    .. math:: \mathrm{threshold}_c = \mathrm{mean}\,(x_c), \qquad
       \mathrm{spread}_c = \mathrm{deviation}\,(x_c),

    so that its signs are those of a batch norm without parameters, frozen. The mean lies between
    the zeros and the rest of what ReLU leaves, where a median may be a zero. One pass through the
    model calibrates all layers, each on what the calibrated ones before it make of the batch. A
    channel that is constant gets a spread of 1.

    Args:
      model: a model with layers that :func:`fqt_jax.quantize` converted. Norms take the statistics
        that they take in a call now: those of the batch in training mode.
      *inputs, **options: what it is called with: a batch of training data.

    Returns:
      The signs of all quantized layers, thresholds included; print it.

    Raises:
      ValueError: no layer has a threshold, the batch is empty, a layer is given NaN or infinity, or
        is called inside of a loop.

    Example:
      >>> import dataclasses
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import fqt_jax as fqt
      >>> recipe = dataclasses.replace(fqt.FQT1, threshold="calibrated")
      >>> model = nnx.Sequential(nnx.relu, fqt.QuantLinear(8, 4, recipe=recipe, rngs=nnx.Rngs(0)))
      >>> print(calibrate(model, jax.random.normal(jax.random.key(0), (16, 8))))
      layer        +1  channels of one sign
      -------------------------------------
      layers/1  35.2%                0 of 8

    References:
      XNOR-Net (arXiv 1603.05279, section 3.2) has a batch norm before each sign.
    """
    layers = {
        path: layer for path, layer in _binary_layers(model).items() if layer.spread is not None
    }
    if not layers:
        raise ValueError(
            "no layer has a threshold: quantize with "
            "dataclasses.replace(recipe, threshold='calibrated') or 'learned'."
        )
    if any(leaf.size == 0 for leaf in jax.tree.leaves(inputs) if isinstance(leaf, jax.Array)):
        raise ValueError("the batch is empty: thresholds need samples.")
    found, table = _observed(model, tuple(layers), inputs, options)
    for path, (mean, spread) in found.items():
        if not np.isfinite(mean).all() or not np.isfinite(spread).all():
            raise ValueError(f"layer {path} is given NaN or infinity.")
    for path, (mean, spread) in found.items():
        layers[path].threshold[...] = mean
        layers[path].spread[...] = spread
    return table


def calibrate_norms(model: Any, batches: Iterable[Any]) -> None:
    """Sets the running statistics of a model's batch norms from batches, in place.

    A model whose weights were trained in float has statistics of float activations; its quantized
    form makes others. Each norm gets mean and variance of all batches together; of batches of
    different sizes each counts the same.

    Args:
      model: any Flax NNX module.
      batches: what the model is called with, one after another; a tuple is several arguments.

    Raises:
      ValueError: the model has no batch norm, there is no batch, or statistics come out as NaN or
        infinity.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> calibrate_norms(norm, [jnp.array([[0.0], [2.0]]), jnp.array([[4.0], [6.0]])])
      >>> norm.mean[...], norm.var[...]
      (Array([3.], dtype=float32), Array([5.], dtype=float32))
    """
    norms = {place.path: place.module for place in find_modules(model, nnx.BatchNorm)}
    if not norms:
        raise ValueError(f"{type(model).__name__} has no batch norm.")
    graphdef, state = nnx.split(model)

    @jax.jit
    def statistics(state: Any, inputs: tuple[Any, ...]) -> dict[str, tuple[jax.Array, jax.Array]]:
        clone: Any = nnx.merge(graphdef, state, copy=True)
        clone.train()
        found = {place.path: place.module for place in find_modules(clone, nnx.BatchNorm)}
        for norm in found.values():
            norm.momentum = 0.0  # what remains is the batch's
        clone(*inputs)
        return {path: (norm.mean[...], norm.var[...]) for path, norm in found.items()}

    means: dict[str, list[Any]] = {path: [] for path in norms}
    squares: dict[str, list[Any]] = {path: [] for path in norms}
    for batch in batches:
        found = statistics(state, batch if isinstance(batch, tuple) else (batch,))
        for path, (mean, var) in jax.tree.map(lambda a: np.asarray(a, np.float64), found).items():
            means[path].append(mean)
            squares[path].append(var + mean**2)
    if not next(iter(means.values())):
        raise ValueError("there is no batch to take statistics from.")
    results = {}
    for path in norms:
        mean = np.mean(means[path], axis=0)
        results[path] = mean, np.maximum(np.mean(squares[path], axis=0) - mean**2, 0.0)
        if not np.isfinite(results[path]).all():
            raise ValueError(f"the statistics of the norm {path} come out as NaN or infinity.")
    for path, norm in norms.items():
        for old, new in zip((norm.mean, norm.var), results[path], strict=True):
            old[...] = jnp.asarray(new, old.dtype)


def _binary_layers(model: Any) -> dict[str, Any]:
    places = quantized_layers(model)
    return {place.path: place.module for place in places if place.module.recipe.binary}


def _observed(
    model: Any, calibrated: tuple[str, ...], inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], SignTable]:
    """Threshold and spread of the layers that are calibrated, and the signs of all.

    Of a layer that is called several times, the means over its calls.
    """
    graphdef, state = nnx.split(model)
    order: list[str] = []

    @jax.jit
    def run(state: Any, inputs: tuple[Any, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
        clone = nnx.merge(graphdef, state, copy=True)
        calls: dict[str, list[Any]] = {path: [] for path in calibrated}
        signs: dict[str, list[jax.Array]] = {}

        def observe(path: str, layer: Any, x: jax.Array, call: Call) -> jax.Array:
            if not getattr(layer, "recipe", FULL_PRECISION).binary:
                return call()
            images = type_of(layer).input_images(layer, x)
            rows = images.reshape(-1, images.shape[-1]).astype(jnp.float32)
            threshold = jnp.zeros(rows.shape[1]) if layer.spread is None else layer.threshold[...]
            if path in calls:
                calls[path].append(_statistics(rows))
                threshold, spread = (
                    jnp.mean(jnp.stack(a), axis=0) for a in zip(*calls[path], strict=True)
                )
                layer.threshold[...], layer.spread[...] = threshold, spread
            signs.setdefault(path, []).append(jnp.mean(rows >= threshold.reshape(1, -1), axis=0))
            return call()

        tapped(clone, observe)(*inputs, **options)
        order[:] = signs
        means = {
            path: tuple(jnp.mean(jnp.stack(a), axis=0) for a in zip(*each, strict=True))
            for path, each in calls.items()
            if each
        }
        return means, {path: jnp.mean(jnp.stack(parts), axis=0) for path, parts in signs.items()}

    found, positive = jax.tree.map(np.asarray, run(state, inputs))
    rows = []
    for path in order:
        part = positive[path]
        one_sided = int(((part == 0) | (part == 1)).sum())
        rows.append(LayerSigns(path, float(part.mean()), one_sided, len(part)))
    return found, SignTable(rows)


def _statistics(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and deviation of each channel; 1 for the deviation of a constant."""
    mean = jnp.mean(rows, axis=0)
    deviation = jnp.sqrt(jnp.mean(jnp.square(rows - mean.reshape(1, -1)), axis=0))
    is_constant = deviation <= jnp.float32(_ROUNDING) * jnp.abs(mean)
    return mean, jnp.where(is_constant, jnp.float32(1), deviation)
