"""All diagnostics of a model on one batch, as a flat dictionary of numbers to be logged."""

from __future__ import annotations

import math
from typing import Any, get_args

import jax
import numpy as np
import optax

from fqt_jax.diagnostics.errors import Quantization
from fqt_jax.diagnostics.groups import effective_groups, group_ranges, sign_flip_ratio
from fqt_jax.diagnostics.taps import LayerGradient, LossesOf, layer_gradients, noise_to_signal
from fqt_jax.recipe import Product
from fqt_jax.training import TrainState, merge_model

STALL_NOISE_TO_SIGNAL = 3**-0.5
r"""Noise-to-signal ratio of a gradient past which quantized training was found less effective:
:math:`1/\sqrt 3 \approx 0.58`.

Chmiel et al. (arXiv 2505.19115) find, for training of language models in FP4, that quantized
training becomes less effective once the norm of the gradient falls below about :math:`\sqrt 3`
times the quantization noise, that is once signal over noise is below :math:`\sqrt 3`, or noise
over signal above its inverse.
"""


def diagnose(
    graphdef: Any,
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    *,
    passes: int = 8,
    previous: Any = None,
    losses_of: LossesOf = optax.softmax_cross_entropy_with_integer_labels,
) -> dict[str, float]:
    """Diagnoses each quantized layer on a batch; changes nothing.

    Call it, say, at the end of each epoch, with the same batch. The first call compiles.

    ================================ =============================================================
    ``PATH/...``                     meaning
    ================================ =============================================================
    ``gradient_norm``                norm of ``g``, what the layer quantizes
    ``samples``, ``channels``        number of groups of ``g``
    ``effective_samples``            effective number of groups by their ranges
    ``effective_channels``           (:func:`effective_groups`)
    ``input_noise_to_signal``        predicted ``|Q(g) - g| / |g|``, root mean square, of what the
                                     input gradient is computed from
    ``weight_noise_to_signal``       the same for the weight gradient
    ``exact_effective_samples``      the same of ``g`` in a float backward pass, which no layer
    ``exact_effective_channels``     above has pruned
    ``kernel_noise_to_signal``       of the weights' gradient itself, measured over ``passes``
                                     backward passes, noise of the layers above included
    ``past_stall_threshold``         1 if that exceeds :data:`STALL_NOISE_TO_SIGNAL`, else 0
    ``sign_flip_ratio``              part of the weights that changed sign since ``previous``
    ================================ =============================================================

    ``all/kernel_noise_to_signal`` and ``all/past_stall_threshold`` take the quantized layers'
    weights together as one gradient.

    Args:
      graphdef, state: the model in training (:func:`fqt_jax.training.create_state`).
      images: a batch as the model takes it, preprocessed.
      labels: ``int[N]``.
      key: JAX random key.
      passes: backward passes to measure noise over.
      previous: parameters to count sign flips from, ``state.params`` of an earlier time, copied
        since a training step donates its state; ``None`` leaves sign flips out.
      losses_of: ``(logits, labels) -> losses``.

    Returns:
      The numbers by name, all finite and ready for JSON.

    Raises:
      ValueError: the model has no quantized layer.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import fqt_jax as fqt
      >>> from fqt_jax.training import create_state
      >>> model = fqt.QuantLinear(8, 4, recipe=fqt.FQT1, rngs=nnx.Rngs(0))
      >>> graphdef, state = create_state(model, optax.sgd(0.1))
      >>> x = jax.random.normal(jax.random.key(0), (16, 8))
      >>> found = diagnose(graphdef, state, x, jnp.arange(16) % 4, jax.random.key(1))
      >>> found["all/past_stall_threshold"]
      1.0
    """
    model = merge_model(graphdef, state)
    layers = layer_gradients(model, images, labels, key=key, passes=passes, losses_of=losses_of)
    flips = {}
    if previous is not None:
        flips = sign_flip_ratio(previous, state.params)
    found: dict[str, float] = {}
    for path, layer in layers.items():
        entry = describe(layer)
        name = ".".join([*path.split("/"), "kernel"] if path else ["kernel"])
        if name in flips:
            entry["sign_flip_ratio"] = flips[name]
        found |= {f"{path}/{statistic}": value for statistic, value in entry.items()}
    noise = math.hypot(*(layer.noise for layer in layers.values()))
    signal = math.hypot(*(layer.signal for layer in layers.values()))
    whole = _threshold(noise_to_signal(noise, signal))
    return found | {f"all/{name}": value for name, value in whole.items()}


def describe(layer: LayerGradient) -> dict[str, float]:
    """The statistics of one layer, as in :func:`diagnose`."""
    g = np.asarray(layer.g, np.float64)
    norm = float(np.linalg.norm(g.reshape(-1)))
    entry = {"gradient_norm": norm}
    for name, axis in (("samples", 0), ("channels", 3)):
        entry[name] = float(g.shape[axis])
        entry[f"effective_{name}"] = effective_groups(group_ranges(g, axis))
        entry[f"exact_effective_{name}"] = effective_groups(group_ranges(layer.exact_g, axis))
    quantizer = layer.recipe.gradient
    for product in get_args(Product):
        error = 0.0
        if quantizer is not None:
            error = Quantization(quantizer, product).predicted(layer.g).total
        entry[f"{product}_noise_to_signal"] = math.sqrt(error) / norm if norm else 0.0
    return entry | _threshold(layer.noise_to_signal)


def _threshold(ratio: float) -> dict[str, float]:
    return {
        "kernel_noise_to_signal": ratio,
        "past_stall_threshold": float(ratio > STALL_NOISE_TO_SIGNAL),
    }


def stall_warning(found: dict[str, float]) -> str | None:
    """One line that names the layers past :data:`STALL_NOISE_TO_SIGNAL`; ``None`` if none is.

    Args:
      found: what :func:`diagnose` returned.

    Example:
      >>> print(stall_warning({"a/kernel_noise_to_signal": 2.0, "b/kernel_noise_to_signal": 0.1}))
      the noise of the weights' gradient exceeds 1/sqrt(3) of its norm, past which quantized
        training was found to be less effective (arXiv 2505.19115), in 1 of 2 layers: a (2)
    """
    suffix = "/kernel_noise_to_signal"
    ratios = {
        name.removesuffix(suffix): ratio
        for name, ratio in found.items()
        if name.endswith(suffix) and name != f"all{suffix}"
    }
    past = {path: ratio for path, ratio in ratios.items() if ratio > STALL_NOISE_TO_SIGNAL}
    if not past:
        return None
    names = ", ".join(f"{path} ({ratio:.2g})" for path, ratio in past.items())
    return (
        "the noise of the weights' gradient exceeds 1/sqrt(3) of its norm, past which quantized "
        "training was found to be less effective (arXiv 2505.19115), in "
        f"{len(past)} of {len(ratios)} layers: {names}"
    )
