"""Converts an ordinary Flax NNX model into a quantized one, layer by layer."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

from flax import nnx

from fqt_jax.layer_types import LAYER_TYPES, float_layers, type_of
from fqt_jax.modules import Place
from fqt_jax.recipe import FULL_PRECISION, Recipe
from fqt_jax.sequential import fuse_sequences, fusion, one_sided
from fqt_jax.text import format_table

Rules = Sequence[tuple[str, Recipe]]


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
    """What became of each layer, in the order of the model; prints as a table."""

    COLUMNS: ClassVar[dict[str, Callable[[ConvertedLayer], str]]] = {
        "layer": lambda layer: layer.path,
        "kind": lambda layer: layer.kind,
        "kernel": lambda layer: "x".join(map(str, layer.shape)),
        "becomes": lambda layer: str(layer.recipe),
        "because": lambda layer: layer.reason,
        "fuses": lambda layer: layer.fuses,
    }

    def __str__(self) -> str:
        rows = [[cell(layer) for cell in self.COLUMNS.values()] for layer in self]
        return format_table(tuple(self.COLUMNS), rows, names=len(self.COLUMNS))


class Conversion(NamedTuple):
    """What :func:`quantize` returns: the quantized model and the table of its layers."""

    model: Any
    table: ConversionTable


def quantize(
    model: Any,
    recipe: Recipe,
    rules: Rules = (),
    *,
    implementation: str | None = None,
    rngs: nnx.Rngs | int = 0,
) -> Conversion:
    """Replaces the convolutions and dense layers of a model by quantized ones.

    The model that was passed stays as it is; parameters keep their names, shapes and values. For
    each layer the first pattern that matches its whole path decides. Where none does, these
    defaults hold: the first layer, the last dense layer (the classifier) and 1x1 convolutions
    (shortcuts) stay in full precision, as in the paper's code, and all others get ``recipe``.
    Every plain :class:`flax.nnx.Sequential` becomes a :class:`fqt_jax.Sequential`, in which runs of
    layers fuse; the table says for each layer whether it does.

    The sign of what ReLU leaves is always +1. Where ReLU, sigmoid or the like stands right before a
    quantized layer in a sequence, a warning says so. What a class calls one after another cannot be
    seen: :func:`fqt_jax.sign_balance` tells from a batch. The remedies are a threshold
    (:func:`fqt_jax.calibrate`), a norm between the two, or PReLU.

    Args:
      model: any Flax NNX module.
      recipe: what the layers are given that no pattern and no default decides.
      rules: pairs of a regular expression, matched against the whole path of a layer (names and
        list positions joined by ``/``, such as ``blocks/0/conv1``), and the recipe for it.
      implementation: name of the kernels' implementation for all layers; ``None`` picks the best.
      rngs: the streams that random rounding draws from, or a seed.

    Returns:
      ``(model, table)``: a new model, and what became of each layer; print it.

    Raises:
      ValueError: a pattern is malformed or matches no layer; a layer cannot be quantized (it is
        dilated, grouped, masked, not two-dimensional, not float32, or computes in a way of its
        own); or no layer is quantized although ``recipe`` is binary.

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
    # The order in which the model defines its layers tells the first from the rest; a clone has
    # forgotten it.
    places = float_layers(model)
    if not places:
        kinds = ", ".join(each.kind for each in LAYER_TYPES)
        raise ValueError(f"{type(model).__name__} has no layer that can be quantized ({kinds}).")
    decided = _decide(places, recipe, rules)
    if recipe.binary and not any(d.recipe.binary for d in decided):
        raise ValueError(
            "the rules and defaults leave every layer in full precision: name the layers to "
            f"quantize by a rule. Layers: {_names(places)}."
        )
    model = nnx.clone(model)
    streams = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
    for place, decision in zip(places, decided, strict=True):
        layer = place.of(model)
        obstacle = type_of(layer).obstacle(layer)
        if obstacle is None:
            new = type_of(layer).quantized(layer, decision.recipe, implementation, streams)
            model = place.put(model, new)
        elif decision.recipe.binary:
            raise ValueError(
                f"layer {place.path} cannot be quantized: {obstacle}. Keep it in float by the rule "
                f"({re.escape(place.path)!r}, FULL_PRECISION)."
            )
    model = fuse_sequences(model)
    _warn_of_constant_signs(one_sided(model))
    return Conversion(model, ConversionTable(_with_fusion(decided, fusion(model))))


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


def _with_fusion(decided: list[ConvertedLayer], found: dict[str, str]) -> list[ConvertedLayer]:
    layers = []
    for layer in decided:
        fuses = found.get(layer.path, "no: it stands in no Sequential")
        if not layer.recipe.binary and fuses != "yes":
            fuses = "-"
        layers.append(dataclasses.replace(layer, fuses=fuses))
    return layers


def _decide(places: list[Place], recipe: Recipe, rules: Rules) -> list[ConvertedLayer]:
    patterns = []
    for text, given in rules:
        if not isinstance(given, Recipe):
            raise TypeError(f"the rule {text!r} must give a Recipe; got {given!r}.")
        try:
            patterns.append((re.compile(text), given))
        except re.error as error:
            raise ValueError(f"the pattern {text!r} is malformed: {error}.") from None
        if not any(patterns[-1][0].fullmatch(place.path) for place in places):
            raise ValueError(f"the pattern {text!r} matches no layer. Layers: {_names(places)}.")
    dense = (place for place in reversed(places) if type_of(place.module).is_dense)
    classifier = next(dense, None)
    decided = []
    for place in places:
        layer = place.module
        float_reason = type_of(layer).float_reason(layer)
        choice, reason = recipe, "default"
        if place is places[0]:
            choice, reason = FULL_PRECISION, "first layer"
        elif place is classifier:
            choice, reason = FULL_PRECISION, "classifier"
        elif float_reason is not None:
            choice, reason = FULL_PRECISION, float_reason
        for pattern, given in patterns:
            if pattern.fullmatch(place.path):
                choice, reason = given, f"rule {pattern.pattern!r}"
                break
        shape = tuple(layer.kernel.shape)
        decided.append(ConvertedLayer(place.path, type_of(layer).kind, shape, choice, reason))
    return decided


def _names(places: list[Place]) -> str:
    return ", ".join(place.path or "''" for place in places)
