r"""Bounds on the average regret under a noisy, unbiased gradient.

Common to all of them (``docs/theory.md``, section 5): losses :math:`f_1, \dots, f_T` that are
convex and fixed in advance, over a box :math:`K = \prod_i [\ell_i, \ell_i + D_i]`; in step ``t``
the optimizer is given :math:`\hat g_t` with :math:`\mathrm{E}[\hat g_t \mid \theta_t] =
\nabla f_t(\theta_t) =: g_t`. The average regret is

.. math:: \frac{1}{T} \mathrm{E}\left[\sum_t f_t(\theta_t)\right]
   - \min_{\theta \in K} \frac{1}{T} \sum_t f_t(\theta) .
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

Schedule = Literal["constant", "inverse_sqrt"]


def sgd_regret_bound(
    sigma: float,
    *,
    gradient: float,
    diameter: float,
    learning_rate: float,
    steps: int,
    schedule: Schedule = "constant",
) -> float:
    r"""Projected SGD: grows as :math:`\sigma^2` at a learning rate that does not know sigma.

    .. math:: \frac{1}{\sqrt T} \left(\frac{D^2}{2 \eta} + c\, \eta\, (G^2 + \sigma^2)\right)

    with :math:`c = 1/2` for steps :math:`\eta / \sqrt T` (``"constant"``) and :math:`c = 1` for
    steps :math:`\eta / \sqrt t` (``"inverse_sqrt"``). After Zinkevich (ICML 2003).

    Assumes, besides what the module states: :math:`\mathrm{E} \lVert g_t \rVert_2^2 \le G^2` and
    :math:`\mathrm{E} \lVert \hat g_t - g_t \rVert_2^2 \le \sigma^2`, for each t with
    ``"inverse_sqrt"``, and on average over t is enough with ``"constant"``. Any convex set will do,
    with its Euclidean diameter; with ``"constant"`` its largest distance from the start.

    Args:
      sigma: noise, over all coordinates together.
      gradient: G.
      diameter: D, the Euclidean diameter of K.
      learning_rate: eta.
      steps: T.
      schedule: how the step size goes over the steps.

    Raises:
      ValueError: a number is out of range, or the schedule unknown.

    Example:
      >>> options = dict(gradient=1.0, diameter=1.0, learning_rate=1.0, steps=100)
      >>> [round(sgd_regret_bound(sigma, **options), 3) for sigma in (0.0, 10.0, 100.0)]
      [0.1, 5.1, 500.1]
    """
    _check(learning_rate, steps)
    _check_not_negative(sigma=sigma, gradient=gradient, diameter=diameter)
    if schedule not in ("constant", "inverse_sqrt"):
        raise ValueError(f"schedule must be 'constant' or 'inverse_sqrt'; got {schedule!r}.")
    factor = 0.5 if schedule == "constant" else 1.0
    start = diameter**2 / (2 * learning_rate)
    return (start + factor * learning_rate * (gradient**2 + sigma**2)) / math.sqrt(steps)


def tuned_sgd_regret_bound(sigma: float, *, gradient: float, diameter: float, steps: int) -> float:
    r"""Projected SGD at the best constant step for a sigma that is known: linear in sigma again.

    .. math:: D \sqrt{G^2 + \sigma^2} / \sqrt{T}
       \qquad\text{at}\quad \eta = D / \sqrt{G^2 + \sigma^2}

    The square in :func:`sgd_regret_bound` is thus the price of not knowing sigma, which Adam's
    normalization does not pay.

    Example:
      >>> tuned_sgd_regret_bound(100.0, gradient=0.0, diameter=1.0, steps=100)
      10.0
    """
    _check(1.0, steps)
    _check_not_negative(sigma=sigma, gradient=gradient, diameter=diameter)
    return diameter * math.hypot(gradient, sigma) / math.sqrt(steps)


def amsgrad_regret_bound(
    sigma: npt.ArrayLike,
    *,
    gradient: npt.ArrayLike,
    width: npt.ArrayLike,
    learning_rate: float,
    steps: int,
    beta1: float = 0.9,
    epsilon: float = 1e-8,
) -> float:
    r"""AMSGrad with projection, horizon known: grows as sigma, from second moments alone.

    .. math:: \frac{1}{\sqrt T} \sum_i \left[h_i \left(\frac{D_i^2}{2 \alpha}
       + \frac{1 + \beta_1}{1 - \beta_1} \sqrt{e}\, \alpha
       + \frac{\beta_1}{\sqrt{1 - \beta_1}} D_i\right)
       + \frac{D_i^2 \epsilon}{2 \alpha}\right],
       \qquad h_i = \sqrt{G_i^2 + \sigma_i^2}

    for steps :math:`\alpha / \sqrt T` and :math:`\beta_2 = 1 - 1/T`. The algorithm is AMSGrad
    (Reddi et al., ICLR 2018, algorithm 2): Adam without bias correction, dividing by the root of
    the largest second moment so far, :math:`\sqrt{\hat v_t} + \epsilon`, and projecting onto K. For
    plain Adam there is no such bound: its published proof has a gap, and there are convex problems
    on which its regret does not vanish (the same paper).

    Assumes, besides what the module states, for each coordinate i, on average over t:
    :math:`\mathrm{E}\, g_{t,i}^2 \le G_i^2` and
    :math:`\mathrm{E} (\hat g_{t,i} - g_{t,i})^2 \le \sigma_i^2`.

    Args:
      sigma: noise of each coordinate, ``[d]``. This and the next two broadcast together: give at
        least one of them for each coordinate, since the bound is a sum over those given.
      gradient: ``G``, ``[d]``.
      width: ``D``, the widths of the box, ``[d]``.
      learning_rate: alpha.
      steps: T, at least 2.
      beta1: of the first moment, in [0, 1).
      epsilon: added to the root of the second moment.

    Raises:
      ValueError: a number is out of range.

    Example:
      >>> options = dict(gradient=1.0, width=1.0, learning_rate=1.0, steps=100, beta1=0.0)
      >>> [round(amsgrad_regret_bound(sigma, **options), 3) for sigma in (0.0, 10.0, 100.0)]
      [0.215, 2.159, 21.488]
    """
    _check(learning_rate, steps, fewest=2)
    _check_beta(beta1)
    sigma, gradient, width = _coordinates(sigma, gradient, width)
    h = np.hypot(gradient, sigma)
    later = (1 + beta1) / (1 - beta1) * math.sqrt(math.e) * learning_rate
    last = beta1 / math.sqrt(1 - beta1) * width
    start = width**2 / (2 * learning_rate)
    return float(np.sum(h * (start + later + last) + start * epsilon)) / math.sqrt(steps)


def amsgrad_bounded_noise_regret_bound(
    sigma: npt.ArrayLike,
    *,
    gradient: npt.ArrayLike,
    width: npt.ArrayLike,
    learning_rate: float,
    steps: int,
    largest_noise: npt.ArrayLike,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> float:
    r"""AMSGrad with projection, any beta2 and steps :math:`\alpha / \sqrt t`: bounded noise.

    .. math:: \frac{1}{\sqrt T} \sum_i \left[\frac{D_i^2 (G_i + M_i + \epsilon)}{2 \alpha}
       + \frac{1 + \beta_1}{1 - \beta_1} \frac{\alpha\, h_i}{\sqrt{1 - \beta_2}}
       + \frac{\beta_1}{1 - \beta_1} \frac{D_i h_i}{\sqrt{T}}\right],
       \qquad h_i = \sqrt{G_i^2 + \sigma_i^2}

    Assumes, besides what the module states, for each coordinate i and step t:
    :math:`|g_{t,i}| \le G_i`, :math:`\mathrm{E} (\hat g_{t,i} - g_{t,i})^2 \le \sigma_i^2`, and
    :math:`|\hat g_{t,i} - g_{t,i}| \le M_i` always, as there is for rounding and pruning: the
    largest second moment so far is not held by a variance. Linear in sigma where :math:`M_i` is a
    multiple of :math:`\sigma_i`.

    Args:
      sigma, gradient, width, learning_rate, steps, beta1, epsilon: as there; T from 1 on.
      largest_noise: ``M``, ``[d]``.
      beta2: of the second moment, in [0, 1).

    Raises:
      ValueError: a number is out of range.

    Example:
      >>> options = dict(gradient=1.0, width=1.0, learning_rate=0.1, steps=10_000, beta1=0.0)
      >>> [round(amsgrad_bounded_noise_regret_bound(s, largest_noise=s, **options), 2)
      ...  for s in (0.0, 10.0, 100.0)]
      [0.08, 0.87, 8.21]
    """
    _check(learning_rate, steps)
    _check_beta(beta1)
    _check_beta(beta2)
    sigma, gradient, width, largest = _coordinates(sigma, gradient, width, largest_noise)
    h = np.hypot(gradient, sigma)
    start = width**2 / (2 * learning_rate) * (gradient + largest + epsilon)
    later = (1 + beta1) / (1 - beta1) * learning_rate * h / math.sqrt(1 - beta2)
    last = beta1 / (1 - beta1) * width * h / math.sqrt(steps)
    return float(np.sum(start + later + last)) / math.sqrt(steps)


def _coordinates(*values: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], ...]:
    arrays = [np.asarray(value, np.float64) for value in values]
    if any(np.any(~(a >= 0)) for a in arrays):
        raise ValueError("sigma, gradient, width and largest_noise must not be negative.")
    return np.broadcast_arrays(*arrays)


def _check(learning_rate: float, steps: int, fewest: int = 1) -> None:
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive; got {learning_rate}.")
    if not steps >= fewest:
        raise ValueError(f"steps must be at least {fewest}; got {steps}.")


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative; got {value}.")


def _check_beta(beta: float) -> None:
    if not 0 <= beta < 1:
        raise ValueError(f"beta1 and beta2 must be in [0, 1); got {beta}.")
