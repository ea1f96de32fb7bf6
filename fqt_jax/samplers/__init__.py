"""Samplers: which groups of a gradient are kept, and with what weight.

============== ======================== ======== ============================= =====================
sampler        number kept              unbiased probability                   a kept group's weight
============== ======================== ======== ============================= =====================
``systematic`` exactly k                yes      water-filled importance       ``1 / p``
``bernoulli``  random, k on average     yes      water-filled importance       ``1 / p``
``uniform``    exactly k                yes      ``k / n``                     ``n / k``
``topk``       exactly k                no       1 for the k largest, else 0   1
============== ======================== ======== ============================= =====================

To add one: derive from :class:`Sampler` in a file here, and name it in :data:`SAMPLERS`. Recipes,
theory, diagnostics and the experiments' options follow. A sampler that is not named here can be
given to a :class:`fqt_jax.GradientQuantizer` as an object.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from fqt_jax.samplers.base import Sampler as Sampler
from fqt_jax.samplers.bernoulli import Bernoulli as Bernoulli
from fqt_jax.samplers.probabilities import keep_probabilities as keep_probabilities
from fqt_jax.samplers.systematic import Systematic as Systematic
from fqt_jax.samplers.topk import TopK as TopK
from fqt_jax.samplers.uniform import Uniform as Uniform
from fqt_jax.selection import Selection as Selection

SAMPLERS: dict[str, Sampler] = {
    str(sampler): sampler for sampler in (Systematic(), Bernoulli(), Uniform(), TopK())
}
"""The samplers that have a name."""

# A type checker cannot follow the table; what reads types at run time, such as a command line, can.
if TYPE_CHECKING:
    SamplerName = str
else:
    SamplerName = Literal[tuple(SAMPLERS)]


def as_sampler(value: Sampler | SamplerName) -> Sampler:
    """The sampler itself, or the one of that name.

    Raises:
      ValueError: no sampler has that name.
      TypeError: the sampler cannot be told from others by value, which recipes are: it has
        attributes that are no fields of a frozen dataclass, or that cannot be hashed.

    Example:
      >>> as_sampler("topk")
      TopK()
    """
    if isinstance(value, str) and value in SAMPLERS:
        return SAMPLERS[value]
    if not isinstance(value, Sampler):
        names = ", ".join(map(repr, SAMPLERS))
        raise ValueError(f"sampler must be one of {names}, or a Sampler; got {value!r}.")
    others = sorted(vars(value).keys() - {field.name for field in dataclasses.fields(value)})
    if others:
        raise TypeError(
            f"the sampler {type(value).__name__} must be a frozen dataclass, since recipes are "
            f"compared by value: {', '.join(others)} would not count."
        )
    try:
        hash(value)
    except TypeError as error:
        raise TypeError(f"the sampler {value} cannot be hashed: {error}.") from None
    return value
