"""Optimizers, on Optax, with a learning rate for the head and one for the rest."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fqt_jax import kernels
from fqt_jax.tree import leaf_name


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer with a rate for the head and one for the rest.

    The defaults are those of arXiv 2408.14267, section 5: Adam with 1e-3 for the head and 1e-5 for
    the rest, or SGD of momentum 0.9 with 1e-3 and 1e-4; weight decay 1e-5, added to the gradient;
    cosine decay to zero.

    Args:
      name: ``"adam"``, ``"sgd"``, or any Optax optimizer that takes a learning rate.
      learning_rate: of all parameters but the head's; ``None`` for the default.
      head_learning_rate: of the parameters of the head; ``None`` for the default, or
        ``learning_rate`` if that is given.
      weight_decay: factor of the parameter that is added to its gradient.
      momentum: of SGD.
      schedule: ``"cosine"``, to zero over the run, or ``"constant"``.
      head: regular expression that matches the names of the head's parameters, such as
        ``head.kernel``.

    Raises:
      ValueError: an unknown name or schedule, or a number out of range.

    Example:
      >>> OptimizerConfig().rates()
      (1e-05, 0.001)
      >>> OptimizerConfig(learning_rate=1e-3).rates()
      (0.001, 0.001)
    """

    name: str = "adam"
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    weight_decay: float = 1e-5
    momentum: float = 0.9
    schedule: str = "cosine"
    head: str = r"head\..*"

    def __post_init__(self) -> None:
        known = self.name in ("adam", "sgd") or _takes_learning_rate(self.name)
        if not known:
            raise ValueError(
                f"unknown optimizer {self.name!r}; use 'adam', 'sgd' or the name of an Optax "
                "optimizer that takes a learning rate."
            )
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule must be 'cosine' or 'constant'; got {self.schedule!r}.")
        for field in ("learning_rate", "head_learning_rate"):
            rate = getattr(self, field)
            if rate is not None and not 0 <= rate < float("inf"):
                raise ValueError(f"{field} must be a number from 0 on; got {rate}.")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be a number from 0 on; got {self.weight_decay}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1); got {self.momentum}.")

    def rates(self) -> tuple[float, float]:
        """Learning rates of the rest and of the head, with the defaults filled in."""
        rest, head = (1e-4, 1e-3) if self.name == "sgd" else (1e-5, 1e-3)
        if self.learning_rate is not None:
            rest = head = self.learning_rate
        return rest, head if self.head_learning_rate is None else self.head_learning_rate

    def build(self, params: Any, total_steps: int) -> optax.GradientTransformation:
        """The Optax optimizer for ``params`` over ``total_steps`` steps.

        The rates are values in the optimizer's state, not constants in the compiled step, so one
        compiled step serves every rate; see :meth:`set_rates`.

        Raises:
          ValueError: no parameter's path matches ``head`` although its rate differs.
        """
        rest, head = self.rates()
        whole = self._transform({"learning_rate": rest}, total_steps)
        if rest == head:
            return whole
        labels = jax.tree_util.tree_map_with_path(
            lambda path, _: "head" if re.fullmatch(self.head, leaf_name(path)) else "rest", params
        )
        if "head" not in jax.tree.leaves(labels):
            raise ValueError(f"no parameter's path matches the head's pattern {self.head!r}.")
        of_head = self._transform({"head_learning_rate": head}, total_steps)
        return optax.partition({"rest": whole, "head": of_head}, labels)

    def set_rates(self, opt_state: Any) -> Any:
        """The state with the rates of this configuration in place of those it was built with.

        Args:
          opt_state: state of an optimizer of :meth:`build`, of a configuration that differs from
            this one in its rates alone.

        Raises:
          KeyError: the head has a rate of its own here and none there.

        Example:
          >>> import jax.numpy as jnp
          >>> params = {"w": jnp.ones(2)}
          >>> optimizer = OptimizerConfig("sgd", 1.0, momentum=0, weight_decay=0).build(params, 9)
          >>> state = OptimizerConfig("sgd", 0.5).set_rates(optimizer.init(params))
          >>> float(optax.tree.get(state, "learning_rate"))
          0.5
        """
        rest, head = self.rates()
        rates = {"learning_rate": jnp.float32(rest)}
        if rest != head:
            rates["head_learning_rate"] = jnp.float32(head)
        return optax.tree.set(opt_state, **rates)

    def _transform(self, rates: dict[str, float], total_steps: int) -> optax.GradientTransformation:
        """The optimizer of some parameters; ``rates`` has its rate, by its name in the state."""

        def build(learning_rate: Any) -> optax.GradientTransformation:
            schedule = learning_rate
            if self.schedule == "cosine":
                schedule = optax.cosine_decay_schedule(learning_rate, max(1, total_steps))
            if self.name == "sgd":
                return optax.sgd(schedule, momentum=self.momentum or None)
            if self.name == "adam":
                return adam(schedule)
            return getattr(optax, self.name)(schedule)

        def build_head(head_learning_rate: Any) -> optax.GradientTransformation:
            return build(head_learning_rate)

        factory = build if "learning_rate" in rates else build_head
        optimizer = optax.inject_hyperparams(factory)(**rates)
        if self.weight_decay == 0:
            return optimizer
        return optax.chain(optax.add_decayed_weights(self.weight_decay), optimizer)


def adam(
    learning_rate: optax.ScalarOrSchedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """:func:`optax.adam`, its moments on :func:`scale_by_adam`.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.

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
        scale_by_adam(b1, b2, eps),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
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
        inverse1, inverse2 = (1 / (1 - jnp.float32(decay) ** count) for decay in (b1, b2))
        numbers = (1 - b1, b1, 1 - b2, b2, inverse1, inverse2, eps)
        factors = jnp.stack([jnp.asarray(number, jnp.float32) for number in numbers])
        grads, treedef = jax.tree.flatten(updates)
        moments = (jax.tree.leaves(state.mu), jax.tree.leaves(state.nu))
        results = [kernels.adam(*each, factors) for each in zip(grads, *moments, strict=True)]
        direction, mu, nu = (jax.tree.unflatten(treedef, [r[i] for r in results]) for i in range(3))
        return direction, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(plain.init, update)


def _takes_learning_rate(name: str) -> bool:
    function = getattr(optax, name, None)
    if not inspect.isfunction(function) or name.startswith("_"):
        return False
    parameters = inspect.signature(function).parameters
    return next(iter(parameters), None) == "learning_rate"
