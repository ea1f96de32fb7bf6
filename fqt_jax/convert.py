"""Converts an ordinary Flax NNX model into a quantized one, layer by layer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from fqt_jax.layers import QuantConv, QuantLinear
from fqt_jax.recipe import FULL_PRECISION, Recipe

Rules = Sequence[tuple[str, Recipe]]


@dataclasses.dataclass(frozen=True)
class ConvertedLayer:
    """What became of one layer.

    Attributes:
      path: where it stands in the model, names joined by ``/``.
      kind: what it was, ``"Conv"`` or ``"Linear"``.
      shape: shape of its kernel.
      recipe: the recipe that it got.
      reason: the pattern or the default that decided.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    recipe: Recipe
    reason: str


class ConversionTable(tuple[ConvertedLayer, ...]):
    """What became of each layer, in the order of the model; prints as a table."""

    def __str__(self) -> str:
        rows = [("layer", "kind", "kernel", "becomes", "because")]
        for layer in self:
            shape = "x".join(map(str, layer.shape))
            rows.append((layer.path, layer.kind, shape, str(layer.recipe), layer.reason))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


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
        dilated, grouped, masked, not two-dimensional, or not float32); or no layer is quantized
        although ``recipe`` is binary.

    Example:
      >>> from flax import nnx
      >>> import fqt_jax as fqt
      >>> rngs = nnx.Rngs(0)
      >>> net = nnx.Sequential(*[nnx.Conv(c, d, (3, 3), rngs=rngs) for c, d in ((3, 8), (8, 16))])
      >>> quantized, table = fqt.quantize(net, fqt.FQT1)
      >>> print(table)
      layer     kind  kernel    becomes                                                because
      ----------------------------------------------------------------------------------------
      layers/0  Conv  3x3x3x8   float                                                  first layer
      layers/1  Conv  3x3x8x16  binary, 4-bit gradients of 25% (systematic, channels)  default
    """
    # The order in which the model defines its layers tells the first from the rest; a clone has
    # forgotten it.
    paths = [path for path, *_ in _layers(model)]
    if not paths:
        raise ValueError(f"{type(model).__name__} has no nnx.Conv and no nnx.Linear to quantize.")
    model = nnx.clone(model)
    sites = {path: site for path, *site in _layers(model)}
    decided = _decide([(path, sites[path][2]) for path in paths], recipe, rules)
    if recipe.binary and not any(d.recipe.binary for d in decided):
        raise ValueError(
            "the rules and defaults leave every layer in full precision: name the layers to "
            f"quantize by a rule. Layers: {', '.join(d.path for d in decided)}."
        )
    streams = nnx.Rngs(rngs) if isinstance(rngs, int) else rngs
    for decision in decided:
        path = decision.path
        parent, name, layer = sites[path]
        obstacle = _obstacle(layer)
        if obstacle is None:
            new = _quantized(layer, decision.recipe, implementation, streams)
            _set_child(parent, name, new)
        elif decision.recipe.binary:
            raise ValueError(
                f"layer {path} cannot be quantized: {obstacle}. Keep it in float by the rule "
                f"({re.escape(path)!r}, FULL_PRECISION)."
            )
    return Conversion(model, ConversionTable(decided))


def _decide(layers: list[tuple[str, Any]], recipe: Recipe, rules: Rules) -> list[ConvertedLayer]:
    patterns = []
    for text, given in rules:
        if not isinstance(given, Recipe):
            raise TypeError(f"the rule {text!r} must give a Recipe; got {given!r}.")
        try:
            patterns.append((re.compile(text), given))
        except re.error as error:
            raise ValueError(f"the pattern {text!r} is malformed: {error}.") from None
        if not any(patterns[-1][0].fullmatch(path) for path, _ in layers):
            raise ValueError(
                f"the pattern {text!r} matches no layer. "
                f"Layers: {', '.join(path for path, _ in layers)}."
            )
    last_linear = max((i for i, (_, m) in enumerate(layers) if _kind(m) == "Linear"), default=None)
    decided = []
    for i, (path, layer) in enumerate(layers):
        shape = layer.kernel.shape
        choice, reason = recipe, "default"
        if i == 0:
            choice, reason = FULL_PRECISION, "first layer"
        elif i == last_linear:
            choice, reason = FULL_PRECISION, "classifier"
        elif _kind(layer) == "Conv" and set(shape[:-2]) == {1}:
            choice, reason = FULL_PRECISION, "1x1 convolution"
        for pattern, given in patterns:
            if pattern.fullmatch(path):
                choice, reason = given, f"rule {pattern.pattern!r}"
                break
        decided.append(ConvertedLayer(path, _kind(layer), tuple(shape), choice, reason))
    return decided


def _layers(module: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, Any]]:
    """Yields (path, parent, name, layer) in the order in which the model defines its layers."""
    for name, child in _children(module):
        path = f"{prefix}{name}"
        if isinstance(child, nnx.Conv | nnx.Linear):
            yield path, module, name, child
        elif isinstance(child, nnx.Module):
            yield from _layers(child, f"{path}/")


def _children(module: Any) -> list[tuple[Any, Any]]:
    if isinstance(module, nnx.List):
        return list(enumerate(module))
    return [(name, child) for name, child in vars(module).items() if not name.startswith("_")]


def _set_child(parent: Any, name: Any, child: Any) -> None:
    if isinstance(parent, nnx.List):
        parent[name] = child
    else:
        setattr(parent, name, child)


def _kind(layer: Any) -> str:
    return "Conv" if isinstance(layer, nnx.Conv) else "Linear"


def _obstacle(layer: Any) -> str | None:
    """Why a layer has no quantized counterpart; ``None`` if it has one."""
    if type(layer) not in (nnx.Conv, nnx.Linear):
        return f"{type(layer).__name__} is a subclass with behaviour of its own"
    if any(jnp.dtype(d or jnp.float32) != jnp.float32 for d in (layer.dtype, layer.param_dtype)):
        return "it does not compute in float32"
    if isinstance(layer, nnx.Linear):
        return None
    if len(layer.kernel_size) != 2:
        return f"it is a {len(layer.kernel_size)}-dimensional convolution"
    if layer.feature_group_count != 1:
        return "its features are grouped"
    for dilation in (layer.kernel_dilation, layer.input_dilation):
        if dilation not in (None, 1) and (isinstance(dilation, int) or set(dilation) != {1}):
            return "it is dilated"
    if layer.mask is not None:
        return "it is masked"
    if isinstance(layer.padding, str) and layer.padding not in ("SAME", "VALID"):
        return f"its padding is {layer.padding}"
    return None


def _quantized(
    layer: Any, recipe: Recipe, implementation: str | None, rngs: nnx.Rngs
) -> QuantConv | QuantLinear:
    common: dict[str, Any] = {
        "use_bias": layer.bias is not None,
        "recipe": recipe,
        "kernel_init": lambda *_: layer.kernel[...],
        "implementation": implementation,
        "rngs": rngs,
    }
    new: QuantConv | QuantLinear
    if isinstance(layer, nnx.Conv):
        strides = 1 if layer.strides is None else layer.strides
        new = QuantConv(
            layer.in_features,
            layer.out_features,
            layer.kernel_size,
            strides,
            padding=layer.padding,
            **common,
        )
    else:
        new = QuantLinear(layer.in_features, layer.out_features, **common)
    new.kernel, new.bias = layer.kernel, layer.bias
    return new
