"""What passes through a model's layers: shapes, and gradients.

A tap adds zeros to a layer's output; the gradient with respect to those zeros is the gradient of
the output.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fqt_jax.kernels.contract import Window
from fqt_jax.layer_types import quantized_layers, type_of
from fqt_jax.recipe import FULL_PRECISION, Recipe
from fqt_jax.tapping import Call, tapped

LossesOf = Callable[[jax.Array, jax.Array], jax.Array]
"""``(outputs, labels) -> losses``, one for each sample."""


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """A layer and the shapes that pass through it, as one product sees them.

    Attributes:
      path: where it stands in the model, names joined by ``/``.
      recipe: what it quantizes.
      kernel: shape of its weights.
      input, output: ``(N, H, W, C)``; height and width of a dense layer are one.
      terms: how many products each entry of the output sums.
      window: of the product; ``None`` for a layer that cannot be quantized.
      is_inside: whether the model calls it inside of a loop, such as ``nnx.scan``, or another
        transformation; then it is listed once, with the shapes of one step.
    """

    path: str
    recipe: Recipe
    kernel: tuple[int, ...]
    input: tuple[int, int, int, int]
    output: tuple[int, int, int, int]
    terms: int
    window: Window | None
    is_inside: bool = False

    @property
    def products(self) -> int:
        """Multiply-adds of its forward pass."""
        return math.prod(self.output) * self.terms

    @classmethod
    def of(cls, path: str, layer: Any, x: jax.Array, y: jax.Array) -> LayerShape:
        """Of a layer that maps ``x`` to ``y``."""
        kind = type_of(layer)
        n, height, width, channels = kind.input_images(layer, x).shape
        samples, rows, columns, out_channels = kind.output_images(layer, y).shape
        served = isinstance(layer, kind.quantized_type) or kind.obstacle(layer) is None
        return cls(
            path,
            getattr(layer, "recipe", FULL_PRECISION),
            tuple(layer.kernel.shape),
            (n, height, width, channels),
            (samples, rows, columns, out_channels),
            kind.terms(layer),
            kind.window(layer, (height, width)) if served else None,
        )


@dataclasses.dataclass(frozen=True)
class LayerGradient:
    r"""What a quantized layer's backward pass is given, and what becomes of its weights' gradient.

    Attributes:
      path: where the layer stands in the model.
      recipe: what it quantizes.
      g: ``float32[N, H', W', O]``: what is quantized, :math:`g = \alpha\, \partial L/\partial y`,
        in one backward pass. It carries the noise of the quantized layers above: where those
        pruned samples, most of its samples are nearly zero.
      exact_g: the same in a backward pass in float.
      noise: root of the mean of :math:`\lVert \hat d - d \rVert^2` over backward passes with
        draws of their own, for the quantized gradient :math:`\hat d` of the layer's weights and
        the float one :math:`d`; noise of the layers above included.
      signal: norm of :math:`d`.
    """

    path: str
    recipe: Recipe
    g: jax.Array
    exact_g: jax.Array
    noise: float
    signal: float

    @property
    def noise_to_signal(self) -> float:
        """``noise / signal``: at most 1000, and 0 for a gradient of zero."""
        return noise_to_signal(self.noise, self.signal)


def noise_to_signal(noise: float, signal: float) -> float:
    """``noise / signal``, kept finite: at most 1000, and 0 without noise."""
    if noise == 0:
        return 0.0
    return min(1e3, noise / signal) if signal else 1e3


def layer_shapes(model: nnx.Module, x: jax.Array | jax.ShapeDtypeStruct) -> list[LayerShape]:
    """The convolutions and dense layers of a model, in the order in which they are called.

    Args:
      model: any Flax NNX module that maps a batch to one array.
      x: a batch, or its shape and type; nothing is computed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import fqt_jax as fqt
      >>> from fqt_jax.models import VGG
      >>> net = VGG(((8, 8),), num_classes=10, in_features=1, rngs=nnx.Rngs(0))
      >>> model, _ = fqt.quantize(net, fqt.FQT1)
      >>> for layer in layer_shapes(model, jax.ShapeDtypeStruct((4, 6, 6, 1), jnp.float32)):
      ...     print(layer.path, layer.recipe.binary, layer.kernel, layer.output)
      features/layers/0 False (3, 3, 1, 8) (4, 6, 6, 8)
      features/layers/3 True (3, 3, 8, 8) (4, 6, 6, 8)
      head False (8, 10) (4, 1, 1, 10)
    """
    graphdef, state = nnx.split(model)
    found: list[LayerShape] = []

    def observe(path: str, layer: Any, x: jax.Array, call: Call) -> jax.Array:
        y = call()
        found.append(LayerShape.of(path, layer, x, y))
        return y

    def inside(path: str, layer: Any, x: jax.Array, call: Call) -> jax.Array:
        y = call()
        shape = dataclasses.replace(LayerShape.of(path, layer, x, y), is_inside=True)
        if shape not in found:  # a loop may be traced several times
            found.append(shape)
        return y

    def run(state: Any, x: jax.Array) -> jax.Array:
        return tapped(nnx.merge(graphdef, state, copy=True), observe, inside)(x)

    jax.eval_shape(run, state, x)
    return found


def seen_layers(model: nnx.Module, x: jax.Array | jax.ShapeDtypeStruct) -> list[LayerShape]:
    """The quantized layers, where :func:`layer_gradients` can see the gradients of all of them.

    Raises:
      ValueError: there is none, one is called more than once, or inside of a loop.
    """
    shapes = [shape for shape in layer_shapes(model, x) if shape.recipe.binary]
    paths = [shape.path for shape in shapes]
    if not paths:
        raise ValueError(f"{type(model).__name__} has no quantized layer: see fqt_jax.quantize.")
    repeated = sorted({path for path in paths if paths.count(path) > 1})
    if repeated:
        raise ValueError(f"layers that are called more than once: {', '.join(repeated)}.")
    inside = [shape.path for shape in shapes if shape.is_inside]
    if inside:
        raise ValueError(
            f"layers whose gradients cannot be seen, inside of a loop: {', '.join(inside)}."
        )
    return shapes


def layer_gradients(
    model: nnx.Module,
    x: jax.Array,
    labels: jax.Array,
    *,
    key: jax.Array,
    passes: int = 8,
    losses_of: LossesOf = optax.softmax_cross_entropy_with_integer_labels,
) -> dict[str, LayerGradient]:
    """Gradients of each quantized layer of a model on a batch, from real backward passes.

    The model itself stays as it is. The first call for a model and a shape compiles two backward
    passes, quantized and in float; later calls reuse them, whatever the parameters are.

    Args:
      model: a model with layers that :func:`fqt_jax.quantize` converted.
      x: the batch, as the model takes it.
      labels: ``int[N]``.
      key: JAX random key of rounding and pruning.
      passes: quantized backward passes, each with its own draws, over which ``noise`` is
        measured; at least 1.
      losses_of: ``(logits, labels) -> losses``; the loss is their mean. A function defined once,
        since a new one is compiled anew.

    Returns:
      The gradients by the layers' paths, in the order in which the layers are called.

    Raises:
      ValueError: the model has no quantized layer, a quantized layer is called more than once or
        inside of a loop, or ``passes`` is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import fqt_jax as fqt
      >>> model = fqt.QuantLinear(8, 4, recipe=fqt.FQT1, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (16, 8))
      >>> labels = jnp.arange(16) % 4
      >>> [layer] = layer_gradients(model, x, labels, key=jax.random.key(1)).values()
      >>> layer.g.shape, layer.noise > 0
      ((16, 1, 1, 4), True)
    """
    if passes < 1:
        raise ValueError(f"passes must be at least 1; got {passes}.")
    shapes = seen_layers(model, x)
    graphdef, params, others = nnx.split(model, nnx.Param, ...)
    keys = jax.random.split(key, passes)
    results = _backward(graphdef, params, others, x, labels, keys, losses_of)
    found = {}
    for shape in shapes:
        g, exact_g, noise, signal = results[shape.path]
        found[shape.path] = LayerGradient(
            shape.path, shape.recipe, g, exact_g, float(noise), float(signal)
        )
    return found


@functools.partial(jax.jit, static_argnames=("graphdef", "losses_of"))
def _backward(
    graphdef: Any,
    params: Any,
    others: Any,
    x: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
    losses_of: LossesOf,
) -> dict[str, tuple[jax.Array, ...]]:
    """For each quantized layer: ``g`` of the last pass, exact ``g``, noise, signal."""
    model = nnx.merge(graphdef, params, others, copy=True)
    layers = _binary_layers(model)
    kernels = {path: layer.kernel[...] for path, layer in layers.items()}
    shapes: dict[str, Any] = {}

    def objective(
        kernels: dict[str, Any], taps: dict[str, Any], key: jax.Array, exact: bool
    ) -> jax.Array:
        model = nnx.merge(graphdef, params, others, copy=True)
        for path, layer in _binary_layers(model).items():
            layer.kernel[...] = kernels[path]
            if exact:
                layer.recipe = dataclasses.replace(layer.recipe, gradient=None)
        nnx.reseed(model, rounding=key)
        model.train()

        def observe(path: str, layer: Any, x: jax.Array, call: Call) -> jax.Array:
            y = call()
            if path not in kernels:
                return y
            shapes.setdefault(path, jax.ShapeDtypeStruct(y.shape, y.dtype))
            return y + taps[path] if path in taps else y

        return jnp.mean(losses_of(tapped(model, observe)(x), labels))

    jax.eval_shape(lambda: objective(kernels, {}, keys[0], True))
    taps = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    gradients = jax.grad(objective, argnums=(0, 1))
    exact_kernel, exact_output = gradients(kernels, taps, keys[0], True)

    def one_pass(carry: Any, key: jax.Array) -> tuple[Any, None]:
        squares, _ = carry
        kernel_grads, output_grads = gradients(kernels, taps, key, False)
        return (
            jax.tree.map(
                lambda total, a, b: total + jnp.sum(jnp.square(a - b)),
                squares,
                kernel_grads,
                exact_kernel,
            ),
            output_grads,
        ), None

    none_yet = jax.tree.map(lambda k: jnp.zeros((), k.dtype), kernels)
    (squares, output_grads), _ = jax.lax.scan(one_pass, (none_yet, taps), keys)
    result: dict[str, tuple[jax.Array, ...]] = {}
    for path, layer in layers.items():
        g, exact_g = (
            type_of(layer).output_images(layer, grads[path]).astype(jnp.float32) * _scale(layer)
            for grads in (output_grads, exact_output)
        )
        noise = jnp.sqrt(squares[path] / keys.shape[0])
        result[path] = (g, exact_g, noise, jnp.linalg.norm(exact_kernel[path].reshape(-1)))
    return result


def _scale(layer: Any) -> jax.Array:
    """The weight scale, which is folded into the gradient before it is quantized."""
    if layer.recipe.scale == "none" or not layer.recipe.binary_weights:
        return jnp.ones((1, 1, 1, 1), jnp.float32)
    scale = type_of(layer).mean_abs(layer) if layer.scale is None else layer.scale[...]
    return scale.astype(jnp.float32).reshape(1, 1, 1, -1)


def _binary_layers(model: nnx.Module) -> dict[str, Any]:
    places = quantized_layers(model)
    return {place.path: place.module for place in places if place.module.recipe.binary}
