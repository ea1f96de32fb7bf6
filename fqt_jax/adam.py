"""Adam whose moments one loop of the native kernels updates in place."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fqt_jax import kernels


def adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    freeze_after: int | None = None,
) -> optax.GradientTransformation:
    """:func:`optax.adam`, its moments on :func:`scale_by_adam`.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      freeze_after: steps after which the second moment stays as it is, as in 1-bit Adam
        (:class:`fqt_jax.exchange.Signs`); ``None`` for never.

    Returns:
      A transformation whose state has the structure of :func:`optax.adam`'s.

    Example:
      >>> import jax.numpy as jnp
      >>> optimizer = adam(0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = optimizer.update(jnp.array([3.0, -0.5]), optimizer.init(params))
      >>> [round(float(u), 3) for u in updates]  # the rate against the sign of the gradient
      [-0.1, 0.1]
    """
    return optax.chain(
        scale_by_adam(b1, b2, eps, freeze_after=freeze_after),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, freeze_after: int | None = None
) -> optax.GradientTransformation:
    r""":func:`optax.scale_by_adam` that goes over memory once on CPUs.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
       v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
       u = \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    (Kingma and Ba, arXiv 1412.6980.) XLA's CPU compiler makes several loops of these and copies
    the moments between them, which costs a seventh of a binary network's whole step. One loop of
    the native kernels updates each in place. The two differ by rounding.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      freeze_after: steps after which :math:`v` and its correction stay as they are; ``None`` for
        never.

    Returns:
      A transformation with Optax's state, :class:`optax.ScaleByAdamState`.

    Raises:
      ValueError: a decay is outside [0, 1), or ``eps`` is negative.
    """
    for name, decay in (("b1", b1), ("b2", b2)):
        if not 0 <= decay < 1:
            raise ValueError(f"{name} must be in [0, 1); got {decay}.")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be a number from 0 on; got {eps}.")
    plain = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        count = optax.safe_increment(state.count)
        of_second: Any = count
        new: Any = 1 - b2
        kept: Any = b2
        if freeze_after is not None:
            of_second = jnp.minimum(count, freeze_after)
            new, kept = (jnp.where(count > freeze_after, a, b) for a, b in ((0.0, new), (1.0, b2)))
        inverse1 = 1 / (1 - jnp.float32(b1) ** count)
        inverse2 = 1 / (1 - jnp.float32(b2) ** of_second)
        numbers = (1 - b1, b1, new, kept, inverse1, inverse2, eps)
        factors = jnp.stack([jnp.asarray(number, jnp.float32) for number in numbers])
        grads, treedef = jax.tree.flatten(updates)
        moments = (jax.tree.leaves(state.mu), jax.tree.leaves(state.nu))
        results = [kernels.adam(*each, factors) for each in zip(grads, *moments, strict=True)]
        direction, mu, nu = (jax.tree.unflatten(treedef, [r[i] for r in results]) for i in range(3))
        return direction, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(plain.init, update)
