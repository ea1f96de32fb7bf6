"""A sequence of layers that fuses what can be fused, and explains the rest."""

from __future__ import annotations

import collections
import functools
from typing import Any, NamedTuple

import jax
from flax import nnx

from fqt_jax.assemble import fits, run_fused
from fqt_jax.fused.recognize import Part, Run, is_never_negative, plan, recognize
from fqt_jax.modules import find_modules
from fqt_jax.recipe import FULL_PRECISION
from fqt_jax.text import format_table


class Explained(NamedTuple):
    """What becomes of one layer of a :class:`Sequential`.

    Attributes:
      place: where it stands, such as ``layers/3``.
      layer: what it is.
      run: the number of the fused run that it belongs to, from 1 on; ``None`` if it is called.
      why: why it does not fuse; empty where it does.
    """

    place: str
    layer: str
    run: int | None
    why: str


class Explanation(tuple[Explained, ...]):
    """What becomes of each layer of a :class:`Sequential`; prints as a table."""

    def __str__(self) -> str:
        rows = [
            (each.place, each.layer, f"run {each.run}" if each.run else "called", each.why)
            for each in self
        ]
        return format_table(("part", "layer", "fuses", "because"), rows, names=4)


class Sequential(nnx.Sequential):
    """Layers in a sequence, like :class:`flax.nnx.Sequential`, in fused form where they can be.

    Between two integer products no float activation is made, and what waits for the backward pass
    is two bits and one integer sum for each entry (:mod:`fqt_jax.fused.chain`). Runs of these fuse:

    * :class:`~fqt_jax.QuantConv` or :class:`~fqt_jax.QuantLinear` of a binary recipe, with or
      without bias;
    * between, before and after them :class:`flax.nnx.BatchNorm`, with batch or running statistics,
      and an activation of two slopes, in either order: :class:`flax.nnx.PReLU`,
      :func:`flax.nnx.relu`, :func:`flax.nnx.leaky_relu`, :func:`flax.nnx.identity`;
    * then ``functools.partial(nnx.max_pool, window_shape=(k, k), strides=(k, k))``;
    * :class:`flax.nnx.LayerNorm` in place of batch norm, over the last axis, where a product
      follows and there is no pooling;
    * a float convolution of images that begins it.

    Whatever else stands in the sequence is simply called. :meth:`explain` says what fuses, and why
    the rest does not. The two forms differ by float rounding, and so, now and then, in a sign or a
    code at the edge.

    :func:`fqt_jax.quantize` makes this of every :class:`flax.nnx.Sequential`.

    Args:
      *layers: modules and functions.

    Example:
      >>> import functools
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import fqt_jax as fqt
      >>> rngs = nnx.Rngs(0)
      >>> net = fqt.Sequential(
      ...     fqt.QuantConv(8, 16, 3, rngs=rngs),
      ...     nnx.BatchNorm(16, rngs=rngs),
      ...     nnx.relu,
      ...     functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2)),
      ...     fqt.QuantConv(16, 16, 3, rngs=rngs),
      ...     nnx.gelu,
      ... )
      >>> net(jnp.ones((2, 8, 8, 8))).shape
      (2, 4, 4, 16)
      >>> print(net.explain())
      part      layer      fuses   because
      --------------------------------------------------------------------------
      layers/0  QuantConv  run 1
      layers/1  BatchNorm  run 1
      layers/2  relu       run 1
      layers/3  max_pool   run 1
      layers/4  QuantConv  run 1
      layers/5  gelu       called  gelu is not linear on either side of one kink
    """

    def __call__(
        self,
        *args: Any,
        residual: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
        **kwargs: Any,
    ) -> Any:
        """Applies the layers in turn.

        Args:
          *args, **kwargs: of the first layer; those of each further one are what the one before it
            returned, as for :class:`flax.nnx.Sequential`.
          residual: added to the output, of its shape: a block's shortcut.
          rngs: given to every layer that takes ``rngs``.

        Raises:
          ValueError: the residual has another shape than the output, or a layer refuses.
        """
        parts = [part for _, part in parts_of(self)]
        steps = plan(parts)
        is_added = residual is None
        output: Any = super().__call__(*args, **kwargs) if not steps else None
        for number, step in enumerate(steps):
            if isinstance(step, Run) and fits(parts, step, args, kwargs):
                added = residual if number == len(steps) - 1 else None
                is_added = is_added or added is not None
                output = run_fused(args[0], parts, step, added)
            else:
                places = range(step.start, step.stop) if isinstance(step, Run) else (step,)
                stretch = nnx.Sequential(*(parts[place].layer for place in places))
                output = stretch(*args, rngs=rngs, **kwargs)
            args, kwargs = arguments_of(output)
        return output if is_added else add_residual(output, residual)

    def explain(self) -> Explanation:
        """What fuses, and why the rest does not; print it."""
        named = parts_of(self)
        parts = [part for _, part in named]
        rows, number = [], 0
        for step in plan(parts):
            is_run = isinstance(step, Run)
            number += is_run
            for place in range(step.start, step.stop) if isinstance(step, Run) else (step,):
                name, part = named[place]
                why = "" if is_run else part.why or _why_alone(part)
                rows.append(Explained(name, _name(part.layer), number if is_run else None, why))
        return Explanation(rows)


def fuse_sequences(model: Any) -> Any:
    """Makes a :class:`Sequential` of every plain :class:`flax.nnx.Sequential`, in place.

    Returns:
      The model; the new sequence where it is one itself.
    """
    for place in reversed(find_modules(model, nnx.Sequential)):  # those inside others first
        if type(place.module) is nnx.Sequential:
            model = place.put(model, Sequential(*place.module.layers))
    return model


def fusion(model: Any) -> dict[str, str]:
    """Whether each layer in a :class:`Sequential` fuses, by its path: ``"yes"``, ``"alone"`` where
    nothing beside it does, or ``"no"`` and why.
    """
    found: dict[str, str] = {}
    for place in find_modules(model, Sequential):
        rows = place.module.explain()
        lengths = collections.Counter(row.run for row in rows)
        for row in rows:
            words = f"no: {row.why}"
            if row.run is not None:
                words = "yes" if lengths[row.run] > 1 else "alone"
            found.setdefault("/".join([*map(str, place.keys), row.place]), words)
    return found


def one_sided(model: Any) -> dict[str, str]:
    """The layers in a :class:`Sequential` whose signs are all the same, by their path, and the name
    of the function that returns no negative number before them.
    """
    found: dict[str, str] = {}
    for place in find_modules(model, Sequential):
        source = ""
        for name, part in parts_of(place.module):
            recipe = getattr(part.layer, "recipe", FULL_PRECISION)
            sees_signs = part.kind == "product" or recipe.weights == "float"
            if sees_signs and source and recipe.threshold == "zero":
                found.setdefault("/".join([*map(str, place.keys), name]), source)
            if is_never_negative(part.layer):
                source = _name(part.layer)
            elif part.kind != "pool" and not isinstance(part.layer, nnx.Dropout):
                source = ""
    return found


def parts_of(sequence: nnx.Sequential, prefix: str = "") -> list[tuple[str, Part]]:
    """The layers with their places; those of a sequence in it take its place."""
    parts: list[tuple[str, Part]] = []
    for number, layer in enumerate(sequence.layers):
        name = f"{prefix}layers/{number}"
        if type(layer) is Sequential:
            parts += parts_of(layer, f"{name}/")
        else:
            parts.append((name, recognize(layer)))
    return parts


def _name(layer: Any) -> str:
    if isinstance(layer, nnx.Module):
        return type(layer).__name__
    function = layer.func if isinstance(layer, functools.partial) else layer
    return getattr(function, "__name__", type(function).__name__)


def _why_alone(part: Part) -> str:
    if part.kind == "float product":
        return "its recipe is float"
    if part.kind == "layer norm":
        return "no quantized layer follows it"
    return "no quantized layer stands before or after it"


def arguments_of(output: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a layer returned, as arguments of the next."""
    if isinstance(output, tuple):
        return output, {}
    return ((), output) if isinstance(output, dict) else ((output,), {})


def add_residual(output: jax.Array, residual: jax.Array | None) -> jax.Array:
    """The output and the residual, which must have its shape."""
    if residual is None or residual.shape != output.shape:
        shape = None if residual is None else residual.shape
        raise ValueError(
            f"residual must have the shape of the output, {output.shape}; got {shape}."
        )
    return output + residual
