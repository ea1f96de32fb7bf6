"""Recipes: what a layer quantizes, and how. All validation of those choices lives here."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

Sampler = Literal["systematic", "bernoulli", "topk", "uniform"]
Importance = Literal["range", "norm"]
Groups = Literal["sample_channel", "sample", "tensor"]
Prune = Literal["channels", "shared"]
Scale = Literal["mean_abs", "none", "learned"]


def _check_choice(field: str, value: object, allowed: object) -> None:
    choices = get_args(allowed)
    if value not in choices:
        raise ValueError(f"{field} must be one of {', '.join(map(repr, choices))}; got {value!r}.")


@dataclasses.dataclass(frozen=True)
class GradientQuantizer:
    r"""How the gradient of a quantized layer's output is pruned and rounded.

    Of :math:`n` groups, :math:`k = \max(1, \mathrm{round}(\mathrm{keep} \cdot n))` are kept, and
    every entry of a kept group is rounded stochastically to ``bits`` bits. One entry costs
    ``bits * keep`` bits on average, which is exactly one bit when ``keep`` is left at ``1 / bits``
    (Activation Gradient Pruning, arXiv 2408.14267, section 4.1).

    Args:
      bits: width of a code, 1 to 8.
      keep: fraction of the groups that is kept, in (0, 1]. ``None`` means ``1 / bits``.
      sampler: which groups are kept. ``"systematic"``: exactly ``k``, with probability
        proportional to importance, unbiased. ``"bernoulli"``: the same probabilities, drawn
        independently, unbiased. ``"topk"``: the ``k`` groups with the largest entry, not rescaled,
        hence biased. ``"uniform"``: exactly ``k``, all equally likely, unbiased.
      importance: what a group's keep probability is proportional to: its ``"range"`` (the paper)
        or its Euclidean ``"norm"``. Only ``"systematic"`` and ``"bernoulli"`` look at it.
      groups: the entries that share one scale. ``"sample_channel"``: samples for the input
        gradient, output channels for the weight gradient, so that both products are integer
        products (Sample Channel joint Quantization, section 4.2). ``"sample"``: samples for both;
        the weight gradient is then emulated in float. ``"tensor"``: one scale for everything.

    Raises:
      ValueError: a field is outside the values listed above.
      TypeError: ``bits`` is not an ``int`` or ``keep`` not a number.

    Example:
      >>> import dataclasses
      >>> from fqt_jax import GradientQuantizer
      >>> GradientQuantizer(bits=4).bits_per_entry
      1.0
      >>> dataclasses.replace(GradientQuantizer(bits=4), keep=1.0).bits_per_entry
      4.0
      >>> GradientQuantizer(bits=9)
      Traceback (most recent call last):
        ...
      ValueError: bits must be an integer from 1 to 8; got 9.
    """

    bits: int = 4
    keep: float | None = None
    sampler: Sampler = "systematic"
    importance: Importance = "range"
    groups: Groups = "sample_channel"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int):
            raise TypeError(f"bits must be an integer from 1 to 8; got {self.bits!r}.")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be an integer from 1 to 8; got {self.bits}.")
        if self.keep is not None:
            if isinstance(self.keep, bool) or not isinstance(self.keep, int | float):
                raise TypeError(f"keep must be a number in (0, 1] or None; got {self.keep!r}.")
            if not 0 < self.keep <= 1:
                raise ValueError(f"keep must be a number in (0, 1] or None; got {self.keep}.")
        _check_choice("sampler", self.sampler, Sampler)
        _check_choice("importance", self.importance, Importance)
        _check_choice("groups", self.groups, Groups)

    @property
    def keep_fraction(self) -> float:
        """``keep``, or ``1 / bits`` where it was left open."""
        return 1 / self.bits if self.keep is None else float(self.keep)

    @property
    def bits_per_entry(self) -> float:
        """Average cost of one gradient entry, in bits."""
        return self.bits * self.keep_fraction

    def kept(self, n: int) -> int:
        """Number of groups kept out of ``n``: ``max(1, round(keep * n))``, and 0 out of 0."""
        return min(n, max(1, math.floor(self.keep_fraction * n + 0.5)))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What one layer quantizes.

    Args:
      binary: whether weights and activations become signs. ``False`` leaves the layer in full
        precision, and every other field must then keep its default.
      gradient: how the gradient is quantized; ``None`` keeps it in float.
      prune: which groups the weight gradient keeps. ``"channels"``: output channels, drawn anew
        (the paper). ``"shared"``: the samples already drawn for the input gradient, with
        their weights folded in before rounding.
      scale: the weight scale: the mean of ``abs(w)`` over each output channel (XNOR-Net,
        arXiv 1603.05279), none, or a learned parameter per output channel.
      clip: whether the straight-through gradient of a sign is zero outside [-1, 1].

    Raises:
      ValueError: a field is outside its range, or contradicts ``binary=False``.

    Example:
      >>> import dataclasses
      >>> import fqt_jax as fqt
      >>> recipe = dataclasses.replace(fqt.FQT1, prune="shared")
      >>> recipe.gradient.bits, recipe.gradient.keep_fraction
      (4, 0.25)
    """

    binary: bool = True
    gradient: GradientQuantizer | None = None
    prune: Prune = "channels"
    scale: Scale = "mean_abs"
    clip: bool = True

    def __post_init__(self) -> None:
        for field in ("binary", "clip"):
            if not isinstance(getattr(self, field), bool):
                raise TypeError(f"{field} must be True or False; got {getattr(self, field)!r}.")
        if self.gradient is not None and not isinstance(self.gradient, GradientQuantizer):
            raise TypeError(f"gradient must be a GradientQuantizer or None; got {self.gradient!r}.")
        _check_choice("prune", self.prune, Prune)
        _check_choice("scale", self.scale, Scale)
        if (
            self.gradient is not None
            and self.gradient.groups == "sample"
            and self.gradient.keep_fraction < 1
            and self.prune == "channels"
        ):
            raise ValueError(
                "gradient.groups='sample' prunes samples for both products: set prune='shared'."
            )
        if not self.binary:
            for other in dataclasses.fields(self)[1:]:
                if getattr(self, other.name) != other.default:
                    raise ValueError(
                        f"{other.name} has no meaning in a full-precision layer: leave it at "
                        f"{other.default!r} when binary=False."
                    )

    def unpruned(self) -> Recipe:
        """The same recipe with nothing pruned, for gradients of rows that were drawn already.

        Example:
          >>> FQT1.unpruned().gradient.bits_per_entry
          4.0
        """
        if self.gradient is None:
            return self
        return dataclasses.replace(self, gradient=dataclasses.replace(self.gradient, keep=1.0))


FULL_PRECISION = Recipe(binary=False)
"""Nothing is quantized."""

QAT = Recipe()
"""Quantization-aware training: signs forward, float gradients."""

PSQ1 = Recipe(gradient=GradientQuantizer(bits=1, keep=1.0, groups="sample"))
"""One bit per gradient entry, quantized per sample, nothing pruned: the paper's baseline."""

FQT1 = Recipe(gradient=GradientQuantizer(bits=4))
"""The paper's 1-bit fully quantized training: AGP keeps a quarter of the groups at 4 bits, SCQ."""

FQT1_PLUS = Recipe(gradient=GradientQuantizer(bits=4), prune="shared")
"""The same bits, spent better: one draw of samples serves both gradients of a layer
(``docs/estimators.md``)."""

RECIPES: dict[str, Recipe] = {
    "full_precision": FULL_PRECISION,
    "qat": QAT,
    "psq1": PSQ1,
    "fqt1": FQT1,
    "fqt1_plus": FQT1_PLUS,
}
"""The named recipes."""


def recipe_by_name(name: str) -> Recipe:
    """Looks up a named recipe; case and ``-`` against ``_`` do not matter.

    Raises:
      ValueError: no recipe has that name.

    Example:
      >>> recipe_by_name("FQT1") is FQT1
      True
    """
    try:
        return RECIPES[name.lower().replace("-", "_")]
    except KeyError:
        raise ValueError(f"unknown recipe {name!r}; known recipes: {', '.join(RECIPES)}.") from None
