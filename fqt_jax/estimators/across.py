"""A draw of samples from the whole of a batch whose shards lie on several devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fqt_jax.batches import take
from fqt_jax.mesh import Axes
from fqt_jax.pruning import draw


def draw_across(
    importance: jax.Array, batch: Any, kept: Callable[[int], int], seed: jax.Array, axes: Axes
) -> tuple[jax.Array, Any]:
    """Draws from the batch of all devices, and shares what was drawn out evenly among them.

    How many of a shard's samples are drawn differs from step to step, and shapes must not. So the
    drawn rows move: each device lays its own into an array of all ``k``, zeros elsewhere, and a
    reduce-scatter adds the arrays up and leaves each device its part. Over the wire go, from each
    device, ``4 n`` bytes of importance and about ``k`` times the bytes of a sample.

    Args:
      importance: ``float32[n]`` of this shard's samples.
      batch: the shard.
      kept: how many samples are drawn of so many.
      seed: ``uint32[2]``; that of the first device counts.
      axes: of the mesh.

    Returns:
      ``(weights, rows)``: ``1 / p_i`` of the rows that this device goes on with, and those rows.
      Where ``k`` is no multiple of the devices, the last rows are there again, with the weight 0.
    """
    n, devices, here = importance.shape[0], lax.axis_size(axes), lax.axis_index(axes)
    of_all = lax.all_gather(importance, axes, tiled=True)
    k = kept(devices * n)
    drawn = draw(of_all, k, "systematic", lax.all_gather(seed, axes)[0])
    each = -(-k // devices)
    fill = each * devices - k
    indices = jnp.pad(drawn.indices, (0, fill), mode="edge")
    weights = jnp.pad(drawn.weights, (0, fill))
    place = indices - here * n
    is_mine = (place >= 0) & (place < n)
    mine = take(batch, jnp.clip(place, 0, n - 1))

    def moved(rows: jax.Array) -> jax.Array:
        is_mine_of = is_mine.reshape(-1, *[1] * (rows.ndim - 1))
        wire = _WIRE.get(rows.dtype.name, rows.dtype)
        laid = jnp.where(is_mine_of, rows, jnp.zeros_like(rows)).astype(wire)
        return lax.psum_scatter(laid, axes, tiled=True).astype(rows.dtype)

    return lax.dynamic_slice_in_dim(weights, here * each, each), jax.tree.map(moved, mine)


_WIRE = {"bool": jnp.uint8, "int16": jnp.int32, "uint16": jnp.uint32}
"""Types that not every library of collective operations adds up, and what goes in their place."""
