"""Meshes of devices that share each batch out among them: what lies where.

Data parallelism, on JAX's own meshes: every device holds the whole training state and a share of
the samples of each batch, and :func:`fqt_jax.training.make_train_step` takes the mesh. All axes of
a mesh count as one, in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fqt_jax.batches import batch_size

Axes = str | tuple[str, ...]
"""Names of a mesh's axes, as collective operations take them."""


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with one axis, ``"data"``.

    Args:
      devices: the devices; the default is all of all processes. Those of one process lie side by
        side, so that the share of a process is one piece of the batch.

    Raises:
      ValueError: there are none.

    Example:
      >>> import jax
      >>> dict(data_mesh(jax.devices()[:1]).shape)
      {'data': 1}
    """
    found = jax.devices() if devices is None else devices
    if not len(found):
        raise ValueError("a mesh must have devices; got none.")
    ordered = sorted(found, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered), ("data",))


def axes_of(mesh: Mesh) -> Axes:
    """All axes of a mesh."""
    names = tuple(mesh.axis_names)
    return names[0] if len(names) == 1 else names


def whole(mesh: Mesh) -> NamedSharding:
    """Where an array lies that is whole on each device."""
    return NamedSharding(mesh, PartitionSpec())


def by_sample(mesh: Mesh) -> NamedSharding:
    """Where an array lies whose first axis is shared out among the devices."""
    return NamedSharding(mesh, PartitionSpec(tuple(mesh.axis_names)))


def check_shares(n: int, mesh: Mesh) -> None:
    """Checks that ``n`` samples can be shared out evenly.

    Raises:
      ValueError: they cannot.
    """
    if n % mesh.size:
        raise ValueError(
            f"a batch of {n} samples cannot be shared out evenly among {mesh.size} devices: its "
            f"size must be a multiple of {mesh.size}."
        )


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The same arrays, whole on each device of a mesh.

    With several processes, each gives the same values.

    Args:
      tree: a pytree of arrays, such as a training state; random keys may be among them.
      mesh: the mesh.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mesh = data_mesh(jax.devices()[:1])
      >>> replicate({"w": jnp.ones(3)}, mesh)["w"].sharding.is_fully_replicated
      True
    """
    return jax.tree.map(lambda a: _placed(a, whole(mesh)), tree)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """A batch shared out among the devices of a mesh by its first axis.

    With several processes, each gives its own share of the samples, which follow each other in
    the order of the processes; with one, that is the whole batch.

    Args:
      batch: any pytree of arrays with one entry a sample, on the host.
      mesh: the mesh.

    Raises:
      ValueError: the samples cannot be shared out evenly, or it is no batch.

    Example:
      >>> import jax, numpy as np
      >>> mesh = data_mesh(jax.devices()[:1])
      >>> shard_batch({"x": np.ones((4, 2))}, mesh)["x"].shape
      (4, 2)
    """
    processes = len({device.process_index for device in mesh.devices.flat})
    check_shares(batch_size(batch) * processes, mesh)
    return jax.tree.map(lambda a: _placed(a, by_sample(mesh)), batch)


def _placed(array: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = _placed(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_process_local_data(sharding, np.asarray(array))
