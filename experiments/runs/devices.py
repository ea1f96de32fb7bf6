"""The devices of a run, and what of its data goes to which."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from experiments import distributed
from experiments.cli import UserError
from experiments.runs.config import RunConfig
from fqt_jax.mesh import data_mesh, replicate, shard_batch


def mesh_of(config: RunConfig) -> jax.sharding.Mesh | None:
    """The mesh that a run's devices are; ``None`` for one device.

    Raises:
      UserError: there are fewer devices, they cannot share a batch evenly, or an option is about
        several and there is one.
    """
    there, processes = jax.device_count(), jax.process_count()
    wanted = config.devices
    if wanted is None:
        wanted = "all" if processes > 1 else 1
    count = there if wanted == "all" else int(wanted)
    if count > there:
        raise UserError(f"devices is {count}, but there are only {there}.{_virtual()}")
    if processes > 1 and count != there:
        raise UserError(
            f"devices must be all, or {there}, those of {processes} processes; got {count}."
        )
    if config.diagnose and processes > 1:
        raise UserError("diagnose is of one process: a gradient is looked at on one device.")
    if count == 1:
        for name in ("batch_statistics", "draw_from", "reduce"):
            if getattr(config, name) is not None:
                raise UserError(f"{name} has no effect on one device: it is of several.")
        return None
    if config.batch_size % count:
        raise UserError(
            f"batch_size must be a multiple of {count}, the number of devices, which share each "
            f"batch evenly; got {config.batch_size}."
        )
    return data_mesh(jax.devices() if count == there else jax.devices()[:count])


def _virtual() -> str:
    if jax.default_backend() != "cpu":
        return ""
    return " The environment variable JAX_NUM_CPU_DEVICES=N makes N of a CPU."


def placed(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Arrays whole on each device of a run."""
    return tree if mesh is None else replicate(tree, mesh)


def shared(batch: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """A batch shared out among the devices; of this process' share where there are several."""
    return jax.device_put(batch) if mesh is None else shard_batch(batch, mesh)


def shared_indices(indices: np.ndarray, mesh: jax.sharding.Mesh | None) -> Any:
    """Indices of a whole batch, shared out among the devices."""
    if not distributed.several():
        return indices
    return shared(np.split(indices, jax.process_count())[jax.process_index()], mesh)
