"""Where in a model it begins that a loss is not finite."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fqt_jax.checkpoints import nonfinite_arrays
from fqt_jax.diagnostics.taps import layer_shapes
from fqt_jax.tapping import Call, tapped
from fqt_jax.training import TrainState, merge_model


def origin(graphdef: Any, state: TrainState, images: jax.Array) -> str:
    """What is the first that is not finite: in a step's forward pass, or in the update before it.

    An update breaks all layers below the one where it began, since gradients flow down.

    Args:
      graphdef, state: the model before the step.
      images: the step's batch, as the model takes it.
    """
    wrong = nonfinite_arrays(state)
    if wrong:
        paths = [shape.path for shape in layer_shapes(merge_model(graphdef, state), images)]
        for path in reversed(paths):
            if any(name.startswith(f"params.{path.replace('/', '.')}.") for name in wrong):
                return f"it began in the update before it, of the layer {path}"
        return f"it began in the update before it, of {wrong[0]}"
    seen: list[str] = []

    def run(state: TrainState, images: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        found = []

        def observe(path: str, layer: Any, x: jax.Array, call: Call) -> jax.Array:
            y = call()
            seen.append(path)
            found.append((jnp.isfinite(x).all(), jnp.isfinite(y).all()))
            return y

        tapped(merge_model(graphdef, state), observe, _not_seen)(images)
        return found

    after = "before the first layer"
    for (before_is, after_is), path in zip(jax.jit(run)(state, images), seen, strict=True):
        if not before_is:
            return f"it began {after}"
        if not after_is:
            return f"it began in the layer {path}"
        after = f"after the layer {path}"
    return f"it began {after}, in the loss"


def _not_seen(path: str, layer: Any, x: jax.Array, call: Call) -> jax.Array:
    """Of a layer inside of a loop: what comes after it tells."""
    return call()
