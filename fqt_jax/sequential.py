"""A sequence of layers that fuses what can be fused, and explains the rest."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fqt_jax.fused import (
    Chain,
    Gap,
    GapParams,
    Link,
    Operands,
    Running,
    Weights,
    run_chain,
)
from fqt_jax.fused.recognize import (
    GapParts,
    Part,
    Run,
    is_never_negative,
    plan,
    pool_size,
    recognize,
    slope_of,
    zero_is_below,
)
from fqt_jax.layer_types import type_of
from fqt_jax.layers import QuantLayer
from fqt_jax.modules import find_modules
from fqt_jax.norms import RowNorm
from fqt_jax.rounding import seeds_from_key
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
        parts = [part for _, part in _parts(self)]
        steps = plan(parts)
        is_added = residual is None
        output: Any = super().__call__(*args, **kwargs) if not steps else None
        for number, step in enumerate(steps):
            if isinstance(step, Run) and _fits(parts, step, args, kwargs):
                added = residual if number == len(steps) - 1 else None
                is_added = is_added or added is not None
                output = _run_fused(args[0], parts, step, added)
            else:
                places = range(step.start, step.stop) if isinstance(step, Run) else (step,)
                stretch = nnx.Sequential(*(parts[place].layer for place in places))
                output = stretch(*args, rngs=rngs, **kwargs)
            args, kwargs = _arguments(output)
        return output if is_added else _add(output, residual)

    def explain(self) -> Explanation:
        """What fuses, and why the rest does not; print it."""
        named = _parts(self)
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
        for name, part in _parts(place.module):
            if part.kind == "product" and source and part.layer.recipe.threshold == "zero":
                found.setdefault("/".join([*map(str, place.keys), name]), source)
            if is_never_negative(part.layer):
                source = _name(part.layer)
            elif part.kind != "pool" and not isinstance(part.layer, nnx.Dropout):
                source = ""
    return found


def _parts(sequence: nnx.Sequential, prefix: str = "") -> list[tuple[str, Part]]:
    """The layers with their places; those of a sequence in it take its place."""
    parts: list[tuple[str, Part]] = []
    for number, layer in enumerate(sequence.layers):
        name = f"{prefix}layers/{number}"
        if type(layer) is Sequential:
            parts += _parts(layer, f"{name}/")
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
    return "no quantized layer stands before or after it"


def _arguments(output: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a layer returned, as arguments of the next."""
    if isinstance(output, tuple):
        return output, {}
    return ((), output) if isinstance(output, dict) else ((output,), {})


def _add(output: jax.Array, residual: jax.Array | None) -> jax.Array:
    if residual is None or residual.shape != output.shape:
        shape = None if residual is None else residual.shape
        raise ValueError(
            f"residual must have the shape of the output, {output.shape}; got {shape}."
        )
    return output + residual


def _fits(parts: Sequence[Part], run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a run can be computed in fused form for these arguments.

    What does not is called layer by layer, and refused there if it is wrong.
    """
    if len(args) != 1 or kwargs or not isinstance(args[0], jax.Array):
        return False
    x = args[0]
    products = [parts[place].layer for place in (run.first, *run.products) if place is not None]
    is_dense = bool(products) and type_of(products[0]).is_dense
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.size == 0:
        return False
    if not is_dense and x.ndim < (3 if products else 4):
        return False
    if products and x.shape[-1] != products[0].kernel.shape[-2]:
        return False
    norms = [parts[gap.norm].layer for gap in run.gaps if gap.norm is not None]
    return all(norm.use_running_average is not None for norm in norms)


def _run_fused(
    x: jax.Array, parts: Sequence[Part], run: Run, residual: jax.Array | None
) -> jax.Array:
    """Computes a run, and updates the statistics of its norms."""
    layers = [part.layer for part in parts]
    products = [layers[place] for place in run.products]
    first = None if run.first is None else layers[run.first]
    is_dense = bool(products) and type_of(products[0]).is_dense
    batch = x.shape[: -1 if is_dense else -3]
    rows = _as_images(x, is_dense)
    size = (rows.shape[1], rows.shape[2])
    first_link = None
    if first is not None:
        first_link, size = _link(first, size)
    links = []
    for gap, layer in zip(run.gaps, products, strict=False):
        pool = 1 if gap.pool is None else _pool(layers[gap.pool])
        link, size = _link(layer, (size[0] // pool, size[1] // pool))
        links.append(link)
    chain = Chain(
        gaps=tuple(_gap(layers, gap) for gap in run.gaps),
        links=tuple(links),
        first=first_link,
        x_dtype=x.dtype,
        dtype=_dtype(x.dtype, layers[run.start : run.stop]),
        has_residual=residual is not None,
        implementation=(products or [first])[0].implementation if products or first else None,
    )
    operands = Operands(
        rows,
        first=None if first is None else _kernel(first),
        weights=[Weights(_kernel(layer), _value(layer.scale)) for layer in products],
        params=[
            _params(layers, gap, before, after)
            for gap, before, after in zip(
                run.gaps, [None, *products], [*products, None], strict=True
            )
        ],
        running=[_running(layers, gap, len(rows)) for gap in run.gaps],
        seeds=[
            None if layer.rounding is None else seeds_from_key(layer.rounding(), 4)
            for layer in products
        ],
        residual=None if residual is None else _as_images(residual, is_dense),
    )
    out, statistics = run_chain(chain, operands)
    for gap, of_batch in zip(run.gaps, statistics, strict=True):
        if of_batch is not None and gap.norm is not None:
            norm = layers[gap.norm]
            for old, new in zip((norm.mean, norm.var), of_batch, strict=True):
                new = lax.stop_gradient(new)
                old[...] = norm.momentum * old[...] + (1 - norm.momentum) * new
    if is_dense:
        return out.reshape(*batch, out.shape[-1])
    return out.reshape(*batch, *out.shape[1:])


def _as_images(a: jax.Array, is_dense: bool) -> jax.Array:
    """``[N, H, W, C]``; all leading axes together are the samples, those of a row one position."""
    return a.reshape(-1, 1, 1, a.shape[-1]) if is_dense else a.reshape(-1, *a.shape[-3:])


def _kernel(layer: Any) -> jax.Array:
    """A dense layer is a convolution of one position with a 1x1 window."""
    kernel = layer.kernel[...]
    return kernel.reshape(1, 1, *kernel.shape) if kernel.ndim == 2 else kernel


def _value(variable: Any) -> jax.Array | None:
    return None if variable is None else variable[...]


def _link(layer: Any, size: tuple[int, int]) -> tuple[Link, tuple[int, int]]:
    """A product, and the size of its output."""
    window = type_of(layer).window(layer, size)
    assert window is not None  # others are not recognized
    return Link(layer.recipe, window), window.output_size(size)


def _pool(layer: Any) -> int:
    size = pool_size(layer)
    assert size is not None
    return size


def _gap(layers: Sequence[Any], gap: GapParts) -> Gap:
    norm: Any = None if gap.norm is None else layers[gap.norm]
    act: Any = None if gap.act is None else layers[gap.act]
    act_first = gap.norm is not None and gap.act is not None and gap.act < gap.norm
    return Gap(
        has_norm=norm is not None,
        order="act_norm" if act_first else "norm_act",
        pool=1 if gap.pool is None else _pool(layers[gap.pool]),
        slope=1.0 if act is None else slope_of(act),
        zero_is_below=act is not None and zero_is_below(act),
        epsilon=0.0 if norm is None else float(norm.epsilon),
        uses_running=norm is not None and bool(norm.use_running_average),
    )


def _params(layers: Sequence[Any], gap: GapParts, before: Any, after: Any) -> GapParams:
    """The parameters of a gap, the bias of the layer before it, the threshold of the one after."""
    norm: Any = None if gap.norm is None else layers[gap.norm]
    act: Any = None if gap.act is None else layers[gap.act]
    return GapParams(
        bias=None if before is None else _value(before.bias),
        gamma=None if norm is None else _value(norm.scale),
        beta=None if norm is None else _value(norm.bias),
        slope=act.negative_slope[...] if isinstance(act, nnx.PReLU) else None,
        threshold=None if after is None else _value(after.threshold),
        spread=None if after is None else _value(after.spread),
    )


def _running(layers: Sequence[Any], gap: GapParts, n: int) -> Running | None:
    norm: Any = None if gap.norm is None else layers[gap.norm]
    if norm is None:
        return None
    weights = norm.weights[...] if isinstance(norm, RowNorm) else None
    if weights is not None and len(weights) != n:
        weights = jnp.repeat(weights, n // len(weights))  # positions of a row are rows here
    return Running(norm.mean[...], norm.var[...], weights)


def _dtype(dtype: Any, layers: Sequence[Callable[..., Any]]) -> Any:
    """The type that the layers, called in turn, would return."""
    for layer in layers:
        if isinstance(layer, QuantLayer):
            dtype = layer.dtype or dtype
        if isinstance(layer, nnx.BatchNorm | nnx.PReLU):
            held = [layer.mean, layer.scale, layer.bias] if isinstance(layer, nnx.BatchNorm) else []
            types = [variable.dtype for variable in held if variable is not None]
            dtype = layer.dtype or jnp.result_type(dtype, *types)
    return jnp.dtype(dtype)
