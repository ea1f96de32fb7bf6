"""The inference form of a quantized model: packed signs, and everything between them folded.

A run of layers that fuses becomes its packed weights and, for each place between two products, the
six coefficients of the function that norm, activation, scale, bias and threshold come to, or the
twelve around a layer norm. Other
quantized layers keep their form, with packed weights. The kernels are those of training, so that
the outputs are the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fqt_jax import kernels
from fqt_jax.assemble import (
    as_images,
    dtype_of,
    gap_of,
    kernel_of,
    params_of,
    running_of,
)
from fqt_jax.binarize import PackedBits, weight_scale
from fqt_jax.fused import Gap, GapParams, Link, Running, Weights, float_conv
from fqt_jax.fused.gaps import Function, encode
from fqt_jax.fused.line import line_of, normed_of
from fqt_jax.fused.product import encode_weights
from fqt_jax.fused.recognize import GapParts, Part, Run, plan, recognize
from fqt_jax.kernels import Line, Normed, Window
from fqt_jax.layer_types import quantized_layers, type_of
from fqt_jax.layers import ConvGeometry, QuantConv, QuantLayer, QuantLinear
from fqt_jax.modules import find_modules
from fqt_jax.recipe import QAT
from fqt_jax.sequential import Sequential, add_residual, arguments_of, parts_of


class Packed(nnx.Variable[jax.Array]):
    """Signs in words of 32 bits."""


class FrozenRun(nnx.Module):
    """A stretch of layers in fused form, as of a model that no longer learns.

    Attributes:
      words: of the weights of each product.
      lines: the six coefficients of each gap, ``float32[6, C]`` (:class:`fqt_jax.kernels.Line`), or
        the twelve around a layer norm (:class:`fqt_jax.kernels.Normed`).
      first: weights of a float convolution that begins it.
      threshold, spread: of the first signs, where nothing else stands before them.
    """

    def __init__(self, parts: Sequence[Part], run: Run):
        layers = [part.layer for part in parts]
        products = [layers[place] for place in run.products]
        first = None if run.first is None else layers[run.first]
        self.implementation = (products or [first])[0].implementation if products or first else None
        self.is_dense = bool(products) and type_of(products[0]).is_dense
        self.dtype = dtype_of(jnp.float32, layers[run.start : run.stop])
        self.first = None if first is None else nnx.Param(kernel_of(first))
        self.geometries = tuple(_geometry(layer) for layer in products)
        self.first_geometry = None if first is None else _geometry(first)
        self.gaps = tuple(gap_of(layers, gap) for gap in run.gaps)
        self.shapes: tuple[tuple[int, ...], ...] = ()
        lines, words = [], []
        centre: tuple[jax.Array | None, jax.Array | None] = (None, None)
        scale: jax.Array | None = None
        for i, (gap, static) in enumerate(zip(run.gaps, self.gaps, strict=True)):
            before = products[i - 1] if i else None
            after = products[i] if i < len(products) else None
            params = params_of(layers, gap, before, after)
            if scale is None:
                scale = jnp.ones(_channels(parts, run), jnp.float32)
                if static == Gap() and first is None and after is not None:
                    centre = params.threshold, params.spread
                    params = params._replace(threshold=None, spread=None)
            function = _function(static, params, scale, running_of(layers, gap, 1))
            lines.append(nnx.Param(jnp.stack(jax.tree.leaves(function))))
            if after is not None:
                kernel = kernel_of(after)
                learned = None if after.scale is None else after.scale[...]
                link = Link(after.recipe, Window())
                bits, scale = _encoded(link, Weights(kernel, learned), self.implementation)
                words.append(Packed(bits.words))
                self.shapes = (*self.shapes, bits.shape)
        self.lines, self.words = nnx.List(lines), nnx.List(words)
        self.threshold, self.spread = (
            None if a is None else nnx.Param(a.astype(jnp.float32)) for a in centre
        )

    def __call__(
        self, x: jax.Array, out_sharding: Any = None, *, residual: jax.Array | None = None
    ) -> jax.Array:
        """What the layers returned, and the residual besides."""
        batch = x.shape[: -1 if self.is_dense else -3]
        rows = as_images(x, self.is_dense)
        if self.first is not None and self.first_geometry is not None:
            geometry, size = self.first_geometry
            window = _window(geometry, size, (rows.shape[1], rows.shape[2]))
            rows = float_conv(rows, self.first[...], window, self.implementation)
        source = rows.astype(jnp.float32)
        if self.threshold is not None and self.spread is not None:
            each = (a[...].reshape(1, 1, 1, -1) for a in (self.threshold, self.spread))
            source = (source - next(each)) / next(each)
        nan_samples = None
        for i, (geometry, size) in enumerate(self.geometries):
            function = _function_of(self.lines[i][...])
            signs, _, nan = encode(self.gaps[i], source, function, self.implementation)
            nan_samples = nan if i == 0 else nan_samples
            weights = PackedBits(self.words[i][...], self.shapes[i])
            window = _window(geometry, size, (signs.shape[0], signs.shape[1]))
            source = kernels.forward(signs, weights, window, implementation=self.implementation)
        added = None if residual is None else as_images(residual, self.is_dense)
        out = kernels.activate(
            source,
            Line(*self.lines[-1][...]),
            self.gaps[-1].pool,
            nan_samples,
            None if added is None else added.astype(jnp.float32),
            implementation=self.implementation,
        ).astype(self.dtype)
        return out.reshape(*batch, *out.shape[3 if self.is_dense else 1 :])


class FrozenLayer(nnx.Module):
    """A quantized layer that does not fuse, with packed weights.

    Attributes:
      layer: the layer, without weights.
      words: of its weights.
      scale: of its weights, for each output channel.
    """

    def __init__(self, layer: Any):
        kind, kernel = type_of(layer), layer.kernel[...]
        lead = kernel.shape[: kernel.ndim - kind.kernel_ndim(layer)]
        bits = PackedBits.pack(kernel >= 0, batch_ndim=len(lead))
        self.words, self.shape = Packed(bits.words), bits.shape
        scale = None
        if layer.recipe.learns_scale:
            scale = layer.scale[...]
        elif layer.recipe.scale == "mean_abs":
            scale = _mean_abs(layer)
        self.scale = None if scale is None else nnx.Param(scale)
        # Not None: a later kernel must be data again.
        layer.kernel, layer.scale, layer.rounding = nnx.data(None), nnx.data(None), nnx.data(None)
        layer.recipe = dataclasses.replace(
            QAT,
            scale="none" if scale is None else "learned",
            threshold=layer.recipe.threshold,
        )
        self.layer = layer

    def __call__(self, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        """What the layer returned."""
        layer = nnx.clone(self.layer)
        layer.kernel = nnx.Param(PackedBits(self.words[...], self.shape).signs())
        layer.scale = None if self.scale is None else nnx.Param(self.scale[...])
        y: jax.Array = layer(x, *args, **options)
        return y


class FrozenSequential(nnx.Module):
    """The steps of a :class:`fqt_jax.Sequential`, each a :class:`FrozenRun` or called as it is."""

    def __init__(self, sequence: Sequential):
        parts = [part for _, part in parts_of(sequence)]
        self.layers = nnx.List(
            [
                FrozenRun(parts, step) if isinstance(step, Run) else parts[step].layer
                for step in plan(parts)
            ]
        )

    def __call__(
        self,
        *args: Any,
        residual: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
        **kwargs: Any,
    ) -> Any:
        """Applies the steps in turn."""
        output: Any = nnx.Sequential()(*args, **kwargs) if not self.layers else None
        for number, step in enumerate(self.layers):
            is_last = number == len(self.layers) - 1
            if isinstance(step, FrozenRun):
                output = step(*args, residual=residual if is_last else None, **kwargs)
            else:
                output = nnx.Sequential(step)(*args, rngs=rngs, **kwargs)
            args, kwargs = arguments_of(output)
        if residual is None or isinstance(self.layers[-1], FrozenRun):
            return output
        return add_residual(output, residual)


def freeze(model: Any) -> Any:
    """A model in its inference form; the model that was passed stays as it is.

    Norms take their running statistics. Nothing of the form learns.

    Args:
      model: a model with layers that :func:`fqt_jax.quantize` converted.

    Raises:
      ValueError: the model has no quantized layer, or one with float weights, or a parameter is
        NaN or infinite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import fqt_jax as fqt
      >>> from fqt_jax.models import VGG
      >>> net = VGG(((8, 8),), num_classes=10, in_features=1, rngs=nnx.Rngs(0))
      >>> model, _ = fqt.quantize(net, fqt.FQT1)
      >>> x = jax.random.normal(jax.random.key(0), (4, 6, 6, 1))
      >>> frozen = freeze(model)
      >>> model.eval()
      >>> call = nnx.jit(lambda model, x: model(x))
      >>> bool((call(frozen, x) == call(model, x)).all())
      True
    """
    places = quantized_layers(model)
    if not any(place.module.recipe.binary for place in places):
        raise ValueError(f"{type(model).__name__} has no quantized layer: see fqt_jax.quantize.")
    unfinished = [p.path for p in places if p.module.recipe.weights == "float"]
    if unfinished:
        raise ValueError(
            f"{unfinished[0]} has binary activations but float weights, the first of two steps: "
            "train on with a recipe of binary weights before freezing."
        )
    _check_finite(model)
    model = nnx.clone(model)
    model.eval()
    while places := find_modules(model, Sequential):
        # From the outside in: a sequence inside another is part of it.
        model = places[0].put(model, FrozenSequential(places[0].module))
    for place in quantized_layers(model):
        if place.module.recipe.binary:
            model = place.put(model, _frozen_layer(place.module))
    return model


def _frozen_layer(layer: Any) -> Any:
    part = recognize(layer)
    if part.kind == "product" and layer.kernel.ndim == type_of(layer).kernel_ndim(layer):
        return FrozenRun([part], Run(0, 1, None, (GapParts(), GapParts()), (0,)))
    return FrozenLayer(layer)


def _check_finite(model: Any) -> None:
    for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        value = variable[...]
        if jnp.issubdtype(value.dtype, jnp.floating) and not bool(jnp.isfinite(value).all()):
            name = "/".join(map(str, path))
            raise ValueError(f"{name} holds NaN or infinity: such a model cannot be frozen.")


def _geometry(layer: QuantLayer) -> tuple[ConvGeometry | None, tuple[int, ...]]:
    if isinstance(layer, QuantConv):
        return layer.geometry, layer.kernel_size
    assert isinstance(layer, QuantLinear)
    return None, (1, 1)


def _window(
    geometry: ConvGeometry | None, kernel_size: tuple[int, ...], size: tuple[int, int]
) -> Window:
    window = Window() if geometry is None else geometry.window(kernel_size, size)
    assert window is not None  # others are not recognized
    return window


def _channels(parts: Sequence[Part], run: Run) -> int:
    """Those of the source of a run's first gap."""
    if run.first is None and run.products:
        return int(parts[run.products[0]].layer.kernel.shape[-2])
    # Without a product the run follows a float layer, or begins with one.
    place = run.start - 1 if run.first is None else run.first
    return int(parts[place].layer.kernel.shape[-1])


# Compiled as in a step of the model: operation by operation they would round differently.


@functools.partial(jax.jit, static_argnums=0)
def _function(gap: Gap, params: GapParams, scale: jax.Array, running: Running | None) -> Function:
    if gap.norm == "layer":
        return normed_of(gap, params, scale)
    return line_of(gap, params, scale, None, running)[0]


def _function_of(rows: jax.Array) -> Function:
    """The coefficients, as they were stacked."""
    return (
        Line(*rows) if len(rows) == len(Line._fields) else Normed(Line(*rows[:6]), Line(*rows[6:]))
    )


@functools.partial(jax.jit, static_argnums=(0, 2))
def _encoded(
    link: Link, weights: Weights, implementation: str | None
) -> tuple[PackedBits, jax.Array]:
    return encode_weights(link, weights, implementation)


def _mean_abs(layer: Any) -> jax.Array:
    """The scale of a layer's weights, or of each of stacked layers, as its product computes it."""
    kind, kernel = type_of(layer), layer.kernel[...].astype(jnp.float32)
    lead = kernel.shape[: kernel.ndim - kind.kernel_ndim(layer)]
    link, scales = Link(QAT, Window()), []
    for one in kernel.reshape(-1, *kernel.shape[len(lead) :]):
        if kind.window(layer, (1, 1)) is None:
            scales.append(jax.jit(weight_scale)(one))
        else:
            matrix = kind.matrix(layer, one)[None, None]
            scales.append(_encoded(link, Weights(matrix), layer.implementation)[1])
    return jnp.stack(scales).reshape(*lead, -1)
