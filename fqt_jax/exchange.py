r"""How the devices of a mesh bring their gradients together: as floats, or as packed signs.

An exchange is an object with two methods (:class:`Exchange`). :class:`Mean` is an all-reduce of
floats. :class:`Signs` sends a sign for each entry and keeps what that leaves out for the next step,
as 1-bit Adam does (arXiv 2102.02888): with ``m`` the momentum, ``e`` and ``f`` the errors kept,

.. math::
   m_i = \beta m + (1 - \beta) g_i, \quad
   c_i = C(m_i + e_i), \quad e_i \leftarrow m_i + e_i - c_i, \quad
   m \leftarrow C\Big(\frac1n \sum_i c_i + f\Big), \quad
   f \leftarrow \frac1n \sum_i c_i + f - m,

where :math:`C` replaces each block of entries by their signs times the mean of their sizes. Each
device adds up one part of the vector for all: signs go there by an all-to-all and come back by an
all-gather, an eighth of a byte an entry each way, where an all-reduce of floats sends eight bytes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from fqt_jax.mesh import Axes


class Exchange(Protocol):
    """Anything with these methods; they run inside of a step."""

    def init(self, params: Any, devices: int) -> Any:
        """What each device keeps, along a first axis of ``devices``; ``()`` for nothing."""

    def reduce(self, grads: Any, state: Any, step: jax.Array, axes: Axes) -> tuple[Any, Any]:
        """The gradients that all devices go on with, and what this one keeps.

        Args:
          grads: this device's.
          state: its part of what is kept, with a first axis of 1.
          step: how many steps were taken before.
          axes: of the mesh.
        """


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean of all devices' gradients, as floats: an all-reduce."""

    def init(self, params: Any, devices: int) -> Any:
        """Nothing."""
        return ()

    def reduce(self, grads: Any, state: Any, step: jax.Array, axes: Axes) -> tuple[Any, Any]:
        """See :meth:`Exchange.reduce`."""
        return lax.pmean(grads, axes), state


class SignsState(NamedTuple):
    """What :class:`Signs` keeps, ``float32[devices, ...]``.

    Attributes:
      momentum: ``m``, the same on all devices.
      error: ``e``, what this device's signs left out.
      error_of_part: ``f``, what the signs of the part that this device adds up left out.
    """

    momentum: jax.Array
    error: jax.Array
    error_of_part: jax.Array


@dataclasses.dataclass(frozen=True)
class Signs:
    """Packed signs of the momentum, with error feedback, after a warm-up of floats.

    The gradient given to the optimizer is the one that makes a first moment of decay ``momentum``
    the exchanged ``m``: :math:`(m_t - \\beta m_{t-1}) / (1 - \\beta)`. Its entries are far noisier
    than a gradient's, so Adam's second moment must not follow them: it has to be frozen when the
    warm-up ends (:func:`fqt_jax.adam.adam`, ``freeze_after=warmup``). Errors come late, by some
    steps: rates that fall to zero train as with floats, a constant one near the highest that floats
    bear does not.

    Args:
      warmup: steps of floats first, in which the second moment settles.
      momentum: ``beta``, that of the optimizer's first moment.
      block: entries that share one size, a multiple of 8: it costs ``32 / block`` bits an entry.

    Raises:
      ValueError: an argument is out of range.
    """

    warmup: int
    momentum: float = 0.9
    block: int = 2048

    def __post_init__(self) -> None:
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int) or self.warmup < 1:
            raise ValueError(f"warmup must be a whole number from 1 on; got {self.warmup!r}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1); got {self.momentum}.")
        if self.block < 8 or self.block % 8:
            raise ValueError(f"block must be a multiple of 8; got {self.block}.")

    def init(self, params: Any, devices: int) -> SignsState:
        """Zeros."""
        n = sum(leaf.size for leaf in jax.tree.leaves(params))
        part = -(-n // (devices * self.block)) * self.block
        # Apart from each other: a step gives its state away, so nothing in it may be twice.
        momentum, error = (jnp.zeros((devices, devices * part), jnp.float32) for _ in range(2))
        return SignsState(momentum, error, jnp.zeros((devices, part), jnp.float32))

    def moved(self, state: SignsState, params: Any, devices: int) -> SignsState:
        """What is kept, for another number of devices.

        The mean of the devices' errors is what will reach the parameters, and stays as it is.
        """
        new = self.init(params, devices)
        size = new.error.shape[1]

        def fit(vector: jax.Array) -> jax.Array:
            return jnp.pad(vector[:size], (0, max(0, size - len(vector))))

        error = jnp.tile(fit(state.error.mean(axis=0)), (devices, 1))
        part = fit(state.error_of_part.reshape(-1)).reshape(devices, -1)
        return SignsState(jnp.tile(fit(state.momentum[0]), (devices, 1)), error, part)

    def reduce(
        self, grads: Any, state: SignsState, step: jax.Array, axes: Axes
    ) -> tuple[Any, SignsState]:
        """See :meth:`Exchange.reduce`."""
        own, unravel = ravel_pytree(grads)
        n, beta = own.size, jnp.float32(self.momentum)
        kept = SignsState(*(leaf[0] for leaf in state))
        size, part = kept.error.size, kept.error_of_part.size
        own = jnp.pad(own.astype(jnp.float32), (0, size - n))
        is_entry = jnp.arange(size) < n

        def as_floats() -> SignsState:
            mean = lax.pmean(own, axes)
            return kept._replace(momentum=beta * kept.momentum + (1 - beta) * mean)

        def as_signs() -> SignsState:
            mine = beta * kept.momentum + (1 - beta) * own + kept.error
            signs, sizes = self._packed(mine, is_entry)
            error = jnp.where(is_entry, mine - self._unpacked(signs, sizes), 0)
            devices = size // part

            def to_parts(a: jax.Array) -> jax.Array:
                return lax.all_to_all(a.reshape(devices, -1), axes, 0, 0)

            of_all = jax.vmap(self._unpacked)(to_parts(signs), to_parts(sizes))
            begin = lax.axis_index(axes) * part
            is_entry_of_part = lax.dynamic_slice_in_dim(is_entry, begin, part)
            together = jnp.mean(of_all, axis=0) + kept.error_of_part
            signs, sizes = self._packed(together, is_entry_of_part)
            left = jnp.where(is_entry_of_part, together - self._unpacked(signs, sizes), 0)
            signs, sizes = (lax.all_gather(a, axes, tiled=True) for a in (signs, sizes))
            momentum = jnp.where(is_entry, self._unpacked(signs, sizes), 0)
            return SignsState(momentum, error, left)

        new = lax.cond(step < self.warmup, as_floats, as_signs)
        mean = (new.momentum - beta * kept.momentum) / (1 - beta)
        return unravel(mean[:n]), SignsState(*(leaf[None] for leaf in new))

    def _packed(self, values: jax.Array, is_entry: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Signs, ``uint8[n / 8]``, and the mean size of each block's entries."""
        values, counted = (a.reshape(-1, self.block) for a in (values, is_entry))
        sizes = jnp.sum(jnp.abs(values), axis=1, where=counted)
        sizes = sizes / jnp.maximum(1, jnp.sum(counted, axis=1)).astype(jnp.float32)
        return jnp.packbits(values.reshape(-1) >= 0), sizes

    def _unpacked(self, signs: jax.Array, sizes: jax.Array) -> jax.Array:
        bits = jnp.unpackbits(signs).reshape(-1, self.block)
        return jnp.where(bits == 1, sizes[:, None], -sizes[:, None]).reshape(-1)
