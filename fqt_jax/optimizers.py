"""Optimizers, on Optax: rates for head and rest, their course, clipping, freezing, averaging."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fqt_jax.adam import adam as adam
from fqt_jax.adam import scale_by_adam as scale_by_adam
from fqt_jax.averaging import averaging
from fqt_jax.tree import leaf_name


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    r"""An optimizer with a rate for the head and one for the rest.

    The defaults are those of arXiv 2408.14267, section 5: Adam with 1e-3 for the head and 1e-5 for
    the rest, or SGD of momentum 0.9 with 1e-3 and 1e-4; weight decay 1e-5, added to the gradient;
    cosine decay to zero.

    Args:
      name: ``"adam"``, ``"sgd"``, or any Optax optimizer that takes a learning rate.
      learning_rate: of all parameters but the head's; ``None`` for the default.
      head_learning_rate: of the parameters of the head; ``None`` for the default, or
        ``learning_rate`` if that is given.
      weight_decay: factor of the parameter that is added to its gradient.
      momentum: of SGD; ``None`` for 0.9. No other optimizer takes it.
      schedule: ``"cosine"``, to zero over the run, or ``"constant"``.
      warmup: part of the run's steps, in [0, 1), over which the rates rise from 0 in a line; the
        schedule begins after it.
      cycles: how many cosines, of equal length, follow each other; each begins at the peak.
      clip_norm: the most that the global norm of the gradient may be, before weight decay is added;
        ``None`` for no limit. Frozen parameters do not count.
      ema_decay: if given, the state has the exponential moving average of the parameters too; see
        :func:`fqt_jax.averaging.averaged_parameters`.
      head: regular expression that matches the names of the head's parameters, such as
        ``head.kernel``.
      freeze: regular expression that matches the names of parameters that get no update and no
        weight decay, such as ``stem\..*``.
      second_moment_steps: steps after which Adam's second moment stays as it is, as 1-bit Adam's
        (:class:`fqt_jax.exchange.Signs`); ``None`` for never.

    Raises:
      ValueError: an unknown name or schedule, a number out of range, a pattern that is none, or an
        option that has no effect on this optimizer or schedule.

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
    momentum: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.0
    cycles: int = 1
    clip_norm: float | None = None
    ema_decay: float | None = None
    head: str = r"head\..*"
    freeze: str | None = None
    second_moment_steps: int | None = None

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
        if self.momentum is not None:
            if self.name != "sgd":
                raise ValueError(f"momentum has no effect on {self.name}: it is of sgd.")
            if not 0 <= self.momentum < 1:
                raise ValueError(f"momentum must be in [0, 1); got {self.momentum}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1); got {self.warmup}.")
        if isinstance(self.cycles, bool) or not isinstance(self.cycles, int) or self.cycles < 1:
            raise ValueError(f"cycles must be a whole number from 1 on; got {self.cycles}.")
        if self.cycles > 1 and self.schedule == "constant":
            raise ValueError("cycles have no effect on a constant schedule: they are of cosines.")
        if self.clip_norm is not None and not 0 < self.clip_norm < float("inf"):
            raise ValueError(f"clip_norm must be a positive number; got {self.clip_norm}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in (0, 1); got {self.ema_decay}.")
        if self.second_moment_steps is not None and self.name != "adam":
            raise ValueError(f"second_moment_steps has no effect on {self.name}: it is of adam.")
        for field in ("head", "freeze"):
            try:
                re.compile(getattr(self, field) or "")
            except re.error as error:
                raise ValueError(
                    f"{field} must be a regular expression; {getattr(self, field)!r} is none: "
                    f"{error}."
                ) from None

    def rates(self) -> tuple[float, float]:
        """Learning rates of the rest and of the head, with the defaults filled in."""
        rest, head = (1e-4, 1e-3) if self.name == "sgd" else (1e-5, 1e-3)
        if self.learning_rate is not None:
            rest = head = self.learning_rate
        return rest, head if self.head_learning_rate is None else self.head_learning_rate

    def momentum_or_default(self) -> float | None:
        """The momentum of SGD, with the default filled in; ``None`` for another optimizer."""
        return 0.9 if self.name == "sgd" and self.momentum is None else self.momentum

    def labels(self, params: Any) -> Any:
        """What becomes of each parameter: ``"rest"``, ``"head"`` or ``"frozen"``.

        Raises:
          ValueError: no parameter's name matches ``freeze``, or all do; or none matches ``head``
            although its rate differs.

        Example:
          >>> config = OptimizerConfig(freeze="stem.*")
          >>> config.labels({"stem": {"kernel": 1.0}, "body": 1.0, "head": {"bias": 1.0}})
          {'body': 'rest', 'head': {'bias': 'head'}, 'stem': {'kernel': 'frozen'}}
        """
        rest, head = self.rates()
        names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        heads = {name for name in names if rest != head and re.fullmatch(self.head, name)}
        if rest != head and not heads:
            raise ValueError(f"no parameter's path matches the head's pattern {self.head!r}.")
        frozen: set[str] = set()
        if self.freeze is not None:
            frozen = {name for name in names if re.fullmatch(self.freeze, name)}
            if not frozen or len(frozen) == len(names):
                whom = "all parameters are matched" if frozen else "no parameter is matched"
                raise ValueError(
                    f"{whom} by freeze={self.freeze!r}; there are {_shortened(names)}."
                )
        found = ["frozen" if n in frozen else "head" if n in heads else "rest" for n in names]
        return jax.tree.unflatten(jax.tree.structure(params), found)

    def build(self, params: Any, total_steps: int) -> optax.GradientTransformation:
        """The Optax optimizer for ``params`` over ``total_steps`` steps.

        The rates are values in the optimizer's state, not constants in the compiled step, so one
        compiled step serves every rate; see :meth:`set_rates`.

        Raises:
          ValueError: as :meth:`labels`.
        """
        rest, head = self.rates()
        labels = self.labels(params)
        optimizer = self._transform({"learning_rate": rest}, total_steps)
        if rest != head or self.freeze is not None:
            parts = {"rest": optimizer}
            if rest != head:
                parts["head"] = self._transform({"head_learning_rate": head}, total_steps)
            if self.freeze is not None:
                parts["frozen"] = optax.set_to_zero()
            optimizer = optax.partition(parts, labels)
        if self.clip_norm is not None:
            trained = jax.tree.map(lambda label: label != "frozen", labels)
            clip = optax.masked(optax.clip_by_global_norm(self.clip_norm), trained)
            optimizer = optax.chain(clip, optimizer)
        return optimizer if self.ema_decay is None else averaging(optimizer, self.ema_decay)

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
            schedule = self._course(learning_rate, total_steps)
            if self.name == "sgd":
                return optax.sgd(schedule, momentum=self.momentum_or_default() or None)
            if self.name == "adam":
                return adam(schedule, freeze_after=self.second_moment_steps)
            return getattr(optax, self.name)(schedule)

        def build_head(head_learning_rate: Any) -> optax.GradientTransformation:
            return build(head_learning_rate)

        factory = build if "learning_rate" in rates else build_head
        optimizer = optax.inject_hyperparams(factory)(**rates)
        if self.weight_decay == 0:
            return optimizer
        return optax.chain(optax.add_decayed_weights(self.weight_decay), optimizer)

    def _course(self, peak: Any, total_steps: int) -> Any:
        """The learning rate by the number of steps taken."""
        rising = round(self.warmup * total_steps)
        length = max(1, round((total_steps - rising) / self.cycles))
        course = peak
        if self.schedule == "cosine":
            cosine = optax.cosine_decay_schedule(peak, length)
            course = cosine if self.cycles == 1 else lambda count: cosine(count % length)
        if not rising:
            return course
        after = course if callable(course) else optax.constant_schedule(peak)
        return optax.join_schedules([optax.linear_schedule(0.0, peak, rising), after], [rising])


def _shortened(names: list[str], most: int = 6) -> str:
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def _takes_learning_rate(name: str) -> bool:
    function = getattr(optax, name, None)
    if not inspect.isfunction(function) or name.startswith("_"):
        return False
    parameters = inspect.signature(function).parameters
    return next(iter(parameters), None) == "learning_rate"
