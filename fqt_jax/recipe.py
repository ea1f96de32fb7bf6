"""Recipes: what a layer quantizes, and how. All validation of those choices lives here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Literal, NamedTuple, get_args

from fqt_jax.grids import GRIDS, Grid
from fqt_jax.importance import IMPORTANCES, Importance
from fqt_jax.samplers import SAMPLERS, Sampler, SamplerName, as_sampler
from fqt_jax.selection import GroupAxis

Groups = Literal["sample_channel", "sample", "tensor"]
Prune = Literal["channels", "shared"]
Scale = Literal["mean_abs", "none", "learned", "learned_from_one"]
Threshold = Literal["zero", "calibrated", "learned"]
Weights = Literal["binary", "float"]

Product = Literal["input", "weight"]
"""The two products of a backward pass: the input gradient's and the weight gradient's."""


def _check_choice(field: str, value: object, choices: Collection[object]) -> None:
    if value not in choices:
        raise ValueError(f"{field} must be one of {', '.join(map(repr, choices))}; got {value!r}.")


class Grouping(NamedTuple):
    """How the gradient is taken apart for one of the two products.

    Attributes:
      pruned: the groups that are kept or dropped.
      scaled: the groups that are rounded on a scale of their own. Where these are not the pruned
        ones, the weights of what is kept are folded in before rounding.
      one_scale: whether the scale is that of the whole tensor instead, the same for all groups.
    """

    pruned: GroupAxis
    scaled: GroupAxis
    one_scale: bool


class _SamplerField:
    """A field that is given a sampler or its name, and holds the sampler."""

    def __get__(self, instance: object | None, owner: type) -> Sampler:
        return SAMPLERS["systematic"] if instance is None else instance.__dict__["sampler"]

    def __set__(self, instance: object, value: Sampler | SamplerName) -> None:
        instance.__dict__["sampler"] = as_sampler(value)


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
      sampler: which groups are kept: a :class:`fqt_jax.samplers.Sampler`, or the name of one
        (:data:`fqt_jax.samplers.SAMPLERS`). ``"systematic"``: exactly ``k``, with probability
        proportional to importance, unbiased. ``"bernoulli"``: the same probabilities, drawn
        independently, unbiased. ``"uniform"``: exactly ``k``, all equally likely, unbiased.
        ``"topk"``: the ``k`` groups with the largest entry, not rescaled, hence biased.
      importance: what a group's keep probability is proportional to: its ``"range"`` (the paper)
        or its Euclidean ``"norm"``. ``"uniform"`` and ``"topk"`` do not look at it.
      groups: the entries that share one scale. ``"sample_channel"``: samples for the input
        gradient, output channels for the weight gradient, so that both products are integer
        products (Sample Channel joint Quantization, section 4.2). ``"sample"``: samples for both;
        the weight gradient is then emulated in float. ``"tensor"``: one scale for everything.
      prune: which groups the weight gradient keeps. ``"channels"``: output channels, drawn anew
        (the paper). ``"shared"``: the samples already drawn for the input gradient, with
        their weights folded in before rounding.
      grid: where the levels of a group lie. ``"range"``: from its minimum to its maximum (the
        paper). ``"zero"``: as far, with one level at zero (:func:`fqt_jax.grids.zero_grid`), so
        that small entries are rounded with little noise. It takes at least 2 bits.

    Raises:
      ValueError: a field is outside the values listed above, ``groups="sample"`` would have to
        prune channels, or ``grid="zero"`` has one bit.
      TypeError: ``bits`` is not an ``int``, ``keep`` not a number, or the sampler has no value of
        its own to be compared by.

    Example:
      >>> import dataclasses
      >>> from fqt_jax import GradientQuantizer
      >>> GradientQuantizer(bits=4).bits_per_entry
      1.0
      >>> dataclasses.replace(GradientQuantizer(bits=4), keep=1.0).bits_per_entry
      4.0
      >>> print(GradientQuantizer(bits=4, sampler="topk", prune="shared"))
      4-bit gradients of 25% (topk, shared)
      >>> GradientQuantizer(bits=9)
      Traceback (most recent call last):
        ...
      ValueError: bits must be an integer from 1 to 8; got 9.
    """

    bits: int = 4
    keep: float | None = None
    sampler: _SamplerField = _SamplerField()
    importance: Importance = "range"
    groups: Groups = "sample_channel"
    prune: Prune = "channels"
    grid: Grid = "range"

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
        _check_choice("importance", self.importance, IMPORTANCES)
        _check_choice("groups", self.groups, get_args(Groups))
        _check_choice("prune", self.prune, get_args(Prune))
        _check_choice("grid", self.grid, GRIDS)
        if self.grid == "zero" and self.bits == 1:
            raise ValueError("grid='zero' needs at least 2 bits: one bit has two levels.")
        if self.groups == "sample" and self.prune == "channels" and self.keep_fraction < 1:
            raise ValueError(
                "groups='sample' prunes samples for both products: set prune='shared'."
            )

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

    def grouping(self, product: Product) -> Grouping:
        """What ``groups`` and ``prune`` come to for a product; nothing else reads the two."""
        by_channel = product == "weight" and self.groups != "sample"
        scaled: GroupAxis = "channels" if by_channel else "samples"
        pruned = "samples" if self.prune == "shared" else scaled
        return Grouping(pruned, scaled, one_scale=self.groups == "tensor")

    def kept_part(self, product: Product, *, samples: int, channels: int) -> float:
        """The part of the entries that is kept for a product, of gradients of this size.

        Example:
          >>> FQT1.gradient.kept_part("weight", samples=128, channels=10)
          0.3
        """
        n = samples if self.grouping(product).pruned == "samples" else channels
        return self.kept(n) / n if n else 1.0

    def __str__(self) -> str:
        text = f"{self.bits}-bit gradients"
        if self.groups != "sample_channel":
            text += f" per {self.groups}"
        if self.keep_fraction < 1:
            detail = [str(self.sampler), self.prune]
            if self.importance != "range":
                detail.append(f"by {self.importance}")
            text += f" of {self.keep_fraction:.0%} ({', '.join(detail)})"
        if self.grid != "range":
            text += f" with a level at {self.grid}"
        return text


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What one layer quantizes.

    Args:
      binary: whether weights and activations become signs. ``False`` leaves the layer in full
        precision, and every other field must then keep its default.
      gradient: how the gradient is quantized; ``None`` keeps it in float.
      scale: the weight scale: the mean of ``abs(w)`` over each output channel (XNOR-Net,
        arXiv 1603.05279), none, or a learned parameter per output channel, which starts at that
        mean (``"learned"``) or at 1 (``"learned_from_one"``).
      clip: whether the straight-through gradient of a sign is zero outside [-1, 1].
      threshold: where the signs of the layer's input change. ``"zero"``: at zero. ``"calibrated"``:
        at a value for each channel that :func:`fqt_jax.calibrate` takes from a batch.
        ``"learned"``: the same, and trained from there (RSign of ReActNet, arXiv 2003.03488,
        section 4.2).
      weights: ``"binary"``, or ``"float"``: only activations become signs, as in the first of the
        two steps in which Bi-Real Net and ReActNet are trained. Scale and gradient must then keep
        their defaults, and the layer is computed in float.

    Raises:
      ValueError: a field is outside its range, or contradicts ``binary=False`` or
        ``weights="float"``.

    Example:
      >>> import dataclasses
      >>> import fqt_jax as fqt
      >>> recipe = dataclasses.replace(fqt.FQT1, scale="learned")
      >>> print(recipe)
      binary, scale learned, 4-bit gradients of 25% (systematic, channels)
    """

    binary: bool = True
    gradient: GradientQuantizer | None = None
    scale: Scale = "mean_abs"
    clip: bool = True
    threshold: Threshold = "zero"
    weights: Weights = "binary"

    def __post_init__(self) -> None:
        for field in ("binary", "clip"):
            if not isinstance(getattr(self, field), bool):
                raise TypeError(f"{field} must be True or False; got {getattr(self, field)!r}.")
        if self.gradient is not None and not isinstance(self.gradient, GradientQuantizer):
            raise TypeError(f"gradient must be a GradientQuantizer or None; got {self.gradient!r}.")
        _check_choice("scale", self.scale, get_args(Scale))
        _check_choice("threshold", self.threshold, get_args(Threshold))
        _check_choice("weights", self.weights, get_args(Weights))
        if not self.binary:
            for other in dataclasses.fields(self)[1:]:
                if getattr(self, other.name) != other.default:
                    raise ValueError(
                        f"{other.name} has no meaning in a full-precision layer: leave it at "
                        f"{other.default!r} when binary=False."
                    )
        if self.weights == "float":
            for name, default in (("gradient", None), ("scale", "mean_abs")):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name} has no meaning where weights are float: leave it at {default!r}."
                    )

    @property
    def binary_weights(self) -> bool:
        """Whether the weights become signs, and not the activations alone."""
        return self.binary and self.weights == "binary"

    @property
    def learns_scale(self) -> bool:
        """Whether the weight scale is a parameter."""
        return self.scale in ("learned", "learned_from_one")

    @property
    def prunes(self) -> bool:
        """Whether it leaves out groups of the gradient."""
        return self.gradient is not None and self.gradient.keep_fraction < 1

    def unpruned(self) -> Recipe:
        """The same recipe with nothing pruned, for gradients of rows that were drawn already.

        Example:
          >>> FQT1.unpruned().gradient.bits_per_entry
          4.0
        """
        if self.gradient is None:
            return self
        return dataclasses.replace(self, gradient=dataclasses.replace(self.gradient, keep=1.0))

    def __str__(self) -> str:
        if not self.binary:
            return "float"
        words = ["binary" if self.binary_weights else "binary activations, float weights"]
        if self.scale != "mean_abs":
            words.append(f"scale {self.scale}")
        if not self.clip:
            words.append("no clip")
        if self.threshold != "zero":
            words.append(f"threshold {self.threshold}")
        words.append("float gradients" if self.gradient is None else str(self.gradient))
        return ", ".join(words)


FULL_PRECISION = Recipe(binary=False)
"""Nothing is quantized."""

QAT = Recipe()
"""Quantization-aware training: signs forward, float gradients."""

QAT_ACTIVATIONS = Recipe(weights="float")
"""Signs of activations, float weights: the first of two steps, of which ``QAT`` or a quantized
training is the second (Bi-Real Net, arXiv 1808.00278; ReActNet, arXiv 2003.03488)."""

PSQ1 = Recipe(gradient=GradientQuantizer(bits=1, keep=1.0, groups="sample"))
"""One bit per gradient entry, quantized per sample, nothing pruned: the paper's baseline."""

FQT1 = Recipe(gradient=GradientQuantizer(bits=4))
"""The paper's 1-bit fully quantized training: AGP keeps a quarter of the groups at 4 bits, SCQ."""

FQT1_PLUS = Recipe(gradient=GradientQuantizer(bits=4, prune="shared"))
"""The same bits, spent better: one draw of samples serves both gradients of a layer
(``docs/estimators.md``)."""

RECIPES: dict[str, Recipe] = {
    "full_precision": FULL_PRECISION,
    "qat": QAT,
    "qat_activations": QAT_ACTIVATIONS,
    "psq1": PSQ1,
    "fqt1": FQT1,
    "fqt1_plus": FQT1_PLUS,
}
"""The named recipes."""


def as_recipe(field: str, value: object) -> Recipe:
    """A recipe, or the one that a name stands for.

    Raises:
      TypeError: it is neither.
      ValueError: no recipe has that name.
    """
    if isinstance(value, str):
        return recipe_by_name(value)
    if isinstance(value, Recipe):
        return value
    raise TypeError(
        f"{field} must be a Recipe, such as fqt_jax.FQT1, or the name of one; got {value!r}."
    )


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
