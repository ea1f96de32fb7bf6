"""Converts an ordinary Flax NNX model into a quantized one, layer by layer."""

from __future__ import annotations

import collections
import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import linen, nnx

from fqt_jax.allocation import Budget, count_entries, share
from fqt_jax.layer_types import LAYER_TYPES, float_layers, quantized_layers, type_of
from fqt_jax.modules import Place, find_modules
from fqt_jax.recipe import FULL_PRECISION, Recipe, as_recipe
from fqt_jax.sequential import fuse_sequences, fusion, one_sided
from fqt_jax.tapping import LayerCall, layer_calls
from fqt_jax.text import format_table

Rules = Sequence[tuple[str, Recipe | str]]

_DEFAULT = "default"
"""The reason of a layer that no rule decides, and no rule of thumb."""


@dataclasses.dataclass(frozen=True)
class ConvertedLayer:
    """What became of one layer.

    Attributes:
      path: where it stands in the model, names joined by ``/``.
      kind: its type, such as ``"Conv"`` or ``"Linear"``.
      shape: shape of its kernel.
      recipe: the recipe that it got.
      reason: the pattern or the default that decided.
      fuses: whether it is computed in one with its neighbours, and why not
        (:class:`fqt_jax.Sequential`).
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    recipe: Recipe
    reason: str
    fuses: str = ""


class ConversionTable(tuple[ConvertedLayer, ...]):
    """What became of each layer, in the order of the model; prints as a table.

    Attributes:
      others: by their paths, the types of all other modules that hold parameters of their own,
        such as norms. They stay as they are.
    """

    others: dict[str, str]

    COLUMNS: ClassVar[dict[str, Callable[[ConvertedLayer], str]]] = {
        "layer": lambda layer: layer.path,
        "kind": lambda layer: layer.kind,
        "kernel": lambda layer: "x".join(map(str, layer.shape)),
        "becomes": lambda layer: str(layer.recipe),
        "because": lambda layer: layer.reason,
        "fuses": lambda layer: layer.fuses,
    }

    def __new__(
        cls, layers: Iterable[ConvertedLayer] = (), others: dict[str, str] | None = None
    ) -> ConversionTable:
        """The layers in order, and the other modules."""
        table = super().__new__(cls, tuple(layers))
        table.others = others or {}
        return table

    def __str__(self) -> str:
        rows = [[cell(layer) for cell in self.COLUMNS.values()] for layer in self]
        table = format_table(tuple(self.COLUMNS), rows, names=len(self.COLUMNS))
        if not self.others:
            return table
        counts = collections.Counter(self.others.values())
        return f"{table}\nas before: " + ", ".join(f"{n} {kind}" for kind, n in counts.items())


class Conversion(NamedTuple):
    """What :func:`quantize` returns: the quantized model and the table of its layers."""

    model: Any
    table: ConversionTable


def quantize(
    model: Any,
    recipe: Recipe | str,
    rules: Rules = (),
    *,
    example: Any = None,
    budget: Budget = "layer",
    unsupported: Literal["error", "float"] = "error",
    implementation: str | None = None,
    rngs: nnx.Rngs | int = 0,
) -> Conversion:
    """Replaces the convolutions and dense layers of a model by quantized ones.

    The model that was passed stays as it is; parameters keep their names, shapes and values. For
    each layer the first pattern that matches its whole path decides. Where none does, these
    defaults hold: the first layer, the last one and 1x1 convolutions (shortcuts) stay in full
    precision, as in the paper's code, and all others get ``recipe``. With an ``example`` first and
    last are those in use, the first where the model is given floats and no tokens, the last where
    its features are those of the output; without, the first that the model defines, and the last
    dense one (the classifier). Every plain :class:`flax.nnx.Sequential` becomes a
    :class:`fqt_jax.Sequential`, in which runs of layers fuse; the table says for each layer whether
    it does.

    Dense layers are :class:`flax.nnx.Linear`, :class:`flax.nnx.LinearGeneral`, and so the
    projections of :class:`flax.nnx.MultiHeadAttention`, and :class:`flax.nnx.Einsum` where it is a
    matrix product. Convolutions are :class:`flax.nnx.Conv` of one to three dimensions, dilated and
    grouped ones too, and :class:`flax.nnx.ConvTranspose`; what packed bits have no form for is
    computed in float, and the table says so. Layers stacked by :func:`flax.nnx.vmap`, to be run by
    :func:`flax.nnx.scan`, stay stacked.

    The sign of what ReLU leaves is always +1. Where ReLU, sigmoid or the like stands right before a
    quantized layer in a sequence, a warning says so. What a class calls one after another cannot be
    seen: :func:`fqt_jax.sign_balance` tells from a batch. The remedies are a threshold
    (:func:`fqt_jax.calibrate`), a norm between the two, or PReLU.

    Args:
      model: any Flax NNX module.
      recipe: what the layers are given that no pattern and no default decides; a
        :class:`fqt_jax.Recipe`, or the name of one.
      rules: pairs of a regular expression, matched against the whole path of a layer (names and
        list positions joined by ``/``, such as ``blocks/0/conv1``), and the recipe for it.
      example: what the model is called with, a batch or its shape and type, to tell the order in
        which its layers are used; a tuple is several arguments. Nothing is computed.
      budget: what spends the bits of ``recipe``. ``"layer"``: each layer keeps the same part of its
        gradient. ``"model"``: all that no rule decides spend as many bits together, and each as
        many as the others, so that small ones keep more and large ones less
        (:mod:`fqt_jax.allocation`). That helps deep networks whose layers differ in size. It takes
        an ``example``.
      unsupported: what happens to a layer that would be quantized but cannot be: an error, or it
        stays in float and the table says why. One that a rule quantizes is an error in any case.
      implementation: name of the kernels' implementation for all layers; ``None`` picks the best.
      rngs: the streams that random rounding draws from, or a seed.

    Returns:
      ``(model, table)``: a new model, and what became of each layer; print it.

    Raises:
      TypeError: the model is none of NNX, or abstract.
      ValueError: a pattern is malformed or matches no layer; a layer cannot be quantized (it is
        masked, a subclass, or computes in a way of its own); the model is quantized already; no
        layer is quantized although ``recipe`` is binary; or ``budget`` is ``"model"`` and there is
        no example, nothing is pruned, or a loop calls layers, so that none knows how often.

    Example:
      >>> from flax import nnx
      >>> import fqt_jax as fqt
      >>> rngs = nnx.Rngs(0)
      >>> net = nnx.Sequential(*[nnx.Conv(c, d, (3, 3), rngs=rngs) for c, d in ((3, 8), (8, 16))])
      >>> quantized, table = fqt.quantize(net, fqt.QAT)
      >>> print(table)
      layer     kind  kernel    becomes                  because      fuses
      ---------------------------------------------------------------------
      layers/0  Conv  3x3x3x8   float                    first layer  -
      layers/1  Conv  3x3x8x16  binary, float gradients  default      alone
    """
    recipe = as_recipe("recipe", recipe)
    if unsupported not in ("error", "float"):
        raise ValueError(f"unsupported must be 'error' or 'float'; got {unsupported!r}.")
    _check_budget(budget, recipe, example)
    _check_model(model)
    # The order in which the model defines its layers tells the first from the rest; a clone has
    # forgotten it.
    places = float_layers(model)
    others = _other_modules(model, places)
    if not places:
        kinds = ", ".join(each.kind for each in LAYER_TYPES)
        raise ValueError(f"{type(model).__name__} has no layer that can be quantized ({kinds}).")
    calls: list[LayerCall] = []
    ends = _defined_ends(places)
    if example is not None:
        calls, outputs = layer_calls(model, example)
        ends = _ends_in_use(calls, outputs, example)
    decided = _decide(places, recipe, rules, others, ends, unsupported)
    if budget == "model":
        decided = _shared(decided, count_entries(calls))
    if recipe.binary and not any(d.recipe.binary for d in decided):
        raise ValueError(
            "the rules and defaults leave every layer in full precision: name the layers to "
            f"quantize by a rule. Layers: {_names(places)}."
        )
    for place, decision in zip(places, decided, strict=True):
        obstacle = type_of(place.module).obstacle(place.module)
        if obstacle is not None and decision.recipe.binary:
            raise ValueError(
                f"layer {place.path} cannot be quantized: {obstacle}. Keep it in float by the rule "
                f"({re.escape(place.path)!r}, FULL_PRECISION), or all such layers by "
                "unsupported='float'."
            )
    model = nnx.clone(model)
    streams = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
    slow = {}
    for place, decision in zip(places, decided, strict=True):
        layer = place.of(model)
        kind = type_of(layer)
        if kind.obstacle(layer) is None:
            slow[place.path] = kind.why_slow(layer)
            new = kind.quantized(layer, decision.recipe, implementation, streams)
            model = place.put(model, new)
    model = fuse_sequences(model)
    _warn_of_constant_signs(one_sided(model))
    return Conversion(model, ConversionTable(_with_fusion(decided, fusion(model), slow), others))


def _check_budget(budget: str, recipe: Recipe, example: Any) -> None:
    if budget not in get_args(Budget):
        raise ValueError(f"budget must be 'layer' or 'model'; got {budget!r}.")
    if budget == "layer":
        return
    if example is None:
        raise ValueError(
            "budget='model' needs an example of what the model is called with: the entries of its "
            "layers are counted."
        )
    if not recipe.prunes:
        raise ValueError(f"budget='model' has no effect: the recipe prunes nothing ({recipe}).")


def _shared(decided: list[ConvertedLayer], entries: dict[str, int]) -> list[ConvertedLayer]:
    """The same layers with the bits of those that no rule decided shared out."""
    recipes = {layer.path: layer.recipe for layer in decided if layer.reason == _DEFAULT}
    shared = share(recipes, entries)
    if not shared:
        raise ValueError(
            "budget='model' has no effect: no layer in use gets the recipe by default; rules "
            "decide all that are quantized."
        )
    return [
        dataclasses.replace(layer, recipe=shared.get(layer.path, layer.recipe)) for layer in decided
    ]


def _check_model(model: Any) -> None:
    if isinstance(model, linen.Module):
        raise TypeError(
            f"{type(model).__name__} is a Linen module; quantize takes NNX modules "
            "(flax.nnx.bridge translates)."
        )
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a Flax NNX module; got {type(model).__name__}.")
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model))):
        raise TypeError(
            f"{type(model).__name__} is abstract: it has shapes in place of parameters."
        )
    done = [place.path for place in quantized_layers(model) if place.module.recipe.binary]
    if done:
        raise ValueError(
            f"{type(model).__name__} is quantized already: {', '.join(done[:3])}"
            f"{', ...' if len(done) > 3 else ''}. Quantize the float model."
        )


def _other_modules(model: Any, places: list[Place]) -> dict[str, str]:
    """The types of all modules that hold parameters and are none of the layers, by path."""
    layers = {id(place.module) for place in places}
    return {
        place.path: type(place.module).__name__
        for place in find_modules(model, nnx.Module)
        if id(place.module) not in layers
        and any(isinstance(value, nnx.Param) for value in vars(place.module).values())
    }


def _defined_ends(places: list[Place]) -> dict[str | None, str]:
    dense = (place.path for place in reversed(places) if type_of(place.module).is_dense)
    return {next(dense, None): "classifier", places[0].path: "first layer"}


def _ends_in_use(calls: list[LayerCall], outputs: Any, example: Any) -> dict[str | None, str]:
    """The paths of the first and of the last layer in use, and what they are.

    The first counts where the model is given floats, and not, say, tokens, which an embedding
    takes; the last where its features are those of an output, and not, say, those of an embedding
    that is used once more.
    """
    ends: dict[str | None, str] = {}
    if calls and any(leaf.shape[-1:] == calls[-1].shape[-1:] for leaf in jax.tree.leaves(outputs)):
        ends[calls[-1].path] = "last layer"
    if calls and any(
        jnp.issubdtype(leaf.dtype, jnp.floating)
        for leaf in jax.tree.leaves(example)
        if hasattr(leaf, "dtype")
    ):
        ends[calls[0].path] = "first layer"
    return ends


def _warn_of_constant_signs(layers: dict[str, str]) -> None:
    if not layers:
        return
    sources = " or ".join(dict.fromkeys(layers.values()))
    warnings.warn(
        f"every sign that {', '.join(layers)} will see is +1, since {sources} returns no negative "
        "number, and such a layer learns nothing. Use nnx.PReLU in its place, or quantize with "
        "dataclasses.replace(recipe, threshold='calibrated') or 'learned', and then call "
        "fqt_jax.calibrate(model, batch).",
        stacklevel=3,
    )


def _with_fusion(
    decided: list[ConvertedLayer], found: dict[str, str], slow: dict[str, str]
) -> list[ConvertedLayer]:
    layers = []
    for layer in decided:
        fuses = found.get(layer.path, "no: it stands in no Sequential")
        if slow.get(layer.path):
            fuses = f"no: {slow[layer.path]} is computed in float"
        if not layer.recipe.binary and fuses != "yes":
            fuses = "-"
        layers.append(dataclasses.replace(layer, fuses=fuses))
    return layers


def _decide(
    places: list[Place],
    recipe: Recipe,
    rules: Rules,
    others: dict[str, str],
    ends: dict[str | None, str],
    unsupported: str,
) -> list[ConvertedLayer]:
    patterns = []
    for text, given in rules:
        given = as_recipe(f"the recipe of the rule {text!r}", given)
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise ValueError(f"the pattern {text!r} is malformed: {error}.") from None
        if not any(pattern.fullmatch(place.path) for place in places):
            kinds = {kind for path, kind in others.items() if pattern.fullmatch(path)}
            instead = f", but {' and '.join(sorted(kinds))}" if kinds else ""
            raise ValueError(
                f"the pattern {text!r} matches no layer{instead}. Layers: {_names(places)}."
            )
        patterns.append((pattern, given))
    decided = []
    for place in places:
        layer, kind = place.module, type_of(place.module)
        obstacle, float_reason = kind.obstacle(layer), kind.float_reason(layer)
        choice, reason = recipe, _DEFAULT
        if place.path in ends:
            choice, reason = FULL_PRECISION, ends[place.path]
        elif float_reason is not None:
            choice, reason = FULL_PRECISION, float_reason
        elif obstacle is not None and unsupported == "float":
            choice, reason = FULL_PRECISION, obstacle
        for pattern, given in patterns:
            if pattern.fullmatch(place.path):
                choice, reason = given, f"rule {pattern.pattern!r}"
                break
        shape = tuple(layer.kernel.shape)
        decided.append(ConvertedLayer(place.path, kind.kind, shape, choice, reason))
    return decided


def _names(places: list[Place]) -> str:
    return ", ".join(place.path or "''" for place in places)
