"""Where in a model it begins that a loss is not finite."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fqt_jax.checkpoints import nonfinite_arrays
from fqt_jax.tapping import Call, tapped
from fqt_jax.training import TrainState, merge_model


def origin(graphdef: Any, state: TrainState, images: jax.Array) -> str:
    """What in a training step's forward pass is the first that is not finite.

    Args:
      graphdef, state: the model before the step.
      images: the step's batch, as the model takes it.
    """
    wrong = nonfinite_arrays(state)
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return f"{wrong[0]}{more} was not finite before it"
    seen: list[str] = []

    def run(state: TrainState, images: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        found = []

        def observe(path: str, layer: Any, x: jax.Array, call: Call) -> jax.Array:
            y = call()
            seen.append(path)
            found.append((jnp.isfinite(x).all(), jnp.isfinite(y).all()))
            return y

        tapped(merge_model(graphdef, state), observe)(images)
        return found

    after = "before the first layer"
    for (before_is, after_is), path in zip(jax.jit(run)(state, images), seen, strict=True):
        if not before_is:
            return f"it began {after}"
        if not after_is:
            return f"it began in the layer {path}"
        after = f"after the layer {path}"
    return f"it began {after}, in the loss"
