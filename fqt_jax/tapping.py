"""Taps: what stands in a layer's place for the length of one trace, and sees what passes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from flax.nnx.tracers import TraceState

from fqt_jax.layer_types import all_layers

Call = Callable[[], jax.Array]

Observe = Callable[[str, Any, jax.Array, Call], jax.Array]
"""``(path, layer, x, call) -> y``, in place of the layer; ``call()`` calls it."""


def tapped(model: nnx.Module, observe: Observe, inside: Observe | None = None) -> Any:
    """The model with a tap in the place of each layer that can be quantized, or was.

    ``model`` itself is changed. Nothing that holds a tap fuses.

    Args:
      model: the model.
      observe: sees what passes.
      inside: in its place for layers that the model calls inside of a loop or another
        transformation, such as ``nnx.scan``: it must keep none of the arrays that it sees. With
        none, such a call is a ``ValueError``.
    """
    trace = TraceState()

    def see(path: str, layer: Any, x: jax.Array, call: Call) -> jax.Array:
        if trace.is_valid():
            return observe(path, layer, x, call)
        if inside is not None:
            return inside(path, layer, x, call)
        raise ValueError(
            f"layer {path} is called inside of a loop, such as nnx.scan, or another "
            "transformation: what passes it cannot be seen."
        )

    for place in all_layers(model):
        model = place.put(model, _Tap(place.module, functools.partial(see, place.path)))
    return model


class LayerCall(NamedTuple):
    """A call of a layer.

    Attributes:
      path: where the layer stands in the model.
      shape: of its output.
      is_inside: whether it is inside of a loop or another transformation, such as ``nnx.scan``;
        then it stands for calls of which nobody knows the number.
    """

    path: str
    shape: tuple[int, ...]
    is_inside: bool


def layer_calls(model: nnx.Module, example: Any) -> tuple[list[LayerCall], Any]:
    """The calls of a model's layers in their order, and the shapes and types of its outputs.

    Nothing is computed.

    Args:
      model: the model; it stays as it is.
      example: what it is called with, or the shape and type of that; a tuple is several arguments.
    """
    graphdef, state = nnx.split(model)
    inputs = example if isinstance(example, tuple) else (example,)
    calls: list[LayerCall] = []

    def see(is_inside: bool, path: str, layer: Any, x: jax.Array, call: Call) -> jax.Array:
        y = call()
        calls.append(LayerCall(path, y.shape, is_inside))
        return y

    def run(state: Any, inputs: tuple[Any, ...]) -> Any:
        observe, inside = (functools.partial(see, is_inside) for is_inside in (False, True))
        return tapped(nnx.merge(graphdef, state, copy=True), observe, inside)(*inputs)

    return calls, jax.eval_shape(run, state, inputs)


class _Tap(nnx.Module):
    def __init__(self, layer: Any, observe: Callable[[Any, jax.Array, Call], jax.Array]):
        self.layer = layer
        self._observe = observe
        # It takes what the layer takes: nnx.Sequential asks, and passes nothing else.
        self.__signature__ = inspect.signature(layer)

    def __getattr__(self, name: str) -> Any:
        """What is asked of the layer, such as the shape of its weights."""
        if name == "layer" or name.startswith("_"):  # not there yet, or asked for by Flax
            raise AttributeError(name)
        return getattr(self.layer, name)

    def __call__(self, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        return self._observe(self.layer, x, lambda: self.layer(x, *args, **options))
