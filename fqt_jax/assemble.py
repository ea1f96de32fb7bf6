"""A stretch of layers as a chain: what the layers hold, put together for the fused form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
from fqt_jax.fused.recognize import GapParts, Part, Run, pool_size, slope_of, zero_is_below
from fqt_jax.layer_types import type_of
from fqt_jax.layers import QuantLayer
from fqt_jax.norms import RowNorm
from fqt_jax.rounding import seeds_from_key


def fits(parts: Sequence[Part], run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
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
    return all(getattr(norm, "use_running_average", False) is not None for norm in norms)


def run_fused(
    x: jax.Array, parts: Sequence[Part], run: Run, residual: jax.Array | None
) -> jax.Array:
    """Computes a run, and updates the statistics of its norms."""
    layers = [part.layer for part in parts]
    products = [layers[place] for place in run.products]
    first = None if run.first is None else layers[run.first]
    is_dense = bool(products) and type_of(products[0]).is_dense
    batch = x.shape[: -1 if is_dense else -3]
    rows = as_images(x, is_dense)
    size = (rows.shape[1], rows.shape[2])
    first_link = None
    if first is not None:
        first_link, size = link_of(first, size)
    links = []
    for gap, layer in zip(run.gaps, products, strict=False):
        pool = 1 if gap.pool is None else pool_of(layers[gap.pool])
        link, size = link_of(layer, (size[0] // pool, size[1] // pool))
        links.append(link)
    chain = Chain(
        gaps=tuple(gap_of(layers, gap) for gap in run.gaps),
        links=tuple(links),
        first=first_link,
        x_dtype=x.dtype,
        dtype=dtype_of(x.dtype, layers[run.start : run.stop]),
        has_residual=residual is not None,
        implementation=(products or [first])[0].implementation if products or first else None,
    )
    operands = Operands(
        rows,
        first=None if first is None else kernel_of(first),
        weights=[Weights(kernel_of(layer), _value(layer.scale)) for layer in products],
        params=[
            params_of(layers, gap, before, after)
            for gap, before, after in zip(
                run.gaps, [None, *products], [*products, None], strict=True
            )
        ],
        running=[running_of(layers, gap, len(rows)) for gap in run.gaps],
        seeds=[
            None if layer.rounding is None else seeds_from_key(layer.rounding(), 4)
            for layer in products
        ],
        residual=None if residual is None else as_images(residual, is_dense),
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


def as_images(a: jax.Array, is_dense: bool) -> jax.Array:
    """``[N, H, W, C]``; all leading axes together are the samples, those of a row one position."""
    return a.reshape(-1, 1, 1, a.shape[-1]) if is_dense else a.reshape(-1, *a.shape[-3:])


def kernel_of(layer: Any) -> jax.Array:
    """A dense layer is a convolution of one position with a 1x1 window."""
    kernel = layer.kernel[...]
    return kernel.reshape(1, 1, *kernel.shape) if kernel.ndim == 2 else kernel


def _value(variable: Any) -> jax.Array | None:
    return None if variable is None else variable[...]


def link_of(layer: Any, size: tuple[int, int]) -> tuple[Link, tuple[int, int]]:
    """A product, and the size of its output."""
    window = type_of(layer).window(layer, size)
    assert window is not None  # others are not recognized
    return Link(layer.recipe, window), window.output_size(size)


def pool_of(layer: Any) -> int:
    """The size of the windows of a pooling."""
    size = pool_size(layer)
    assert size is not None
    return size


def gap_of(layers: Sequence[Any], gap: GapParts) -> Gap:
    """What stands around products, without its parameters."""
    norm: Any = None if gap.norm is None else layers[gap.norm]
    act: Any = None if gap.act is None else layers[gap.act]
    act_first = gap.norm is not None and gap.act is not None and gap.act < gap.norm
    return Gap(
        norm=None if norm is None else ("layer" if isinstance(norm, nnx.LayerNorm) else "batch"),
        order="act_norm" if act_first else "norm_act",
        pool=1 if gap.pool is None else pool_of(layers[gap.pool]),
        slope=1.0 if act is None else slope_of(act),
        zero_is_below=act is not None and zero_is_below(act),
        epsilon=0.0 if norm is None else float(norm.epsilon),
        uses_running=isinstance(norm, nnx.BatchNorm) and bool(norm.use_running_average),
        axes=norm.axis_name if isinstance(norm, nnx.BatchNorm) else None,
    )


def params_of(layers: Sequence[Any], gap: GapParts, before: Any, after: Any) -> GapParams:
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


def running_of(layers: Sequence[Any], gap: GapParts, n: int) -> Running | None:
    """The statistics that a gap's batch norm holds, for a batch of ``n`` rows."""
    norm: Any = None if gap.norm is None else layers[gap.norm]
    if not isinstance(norm, nnx.BatchNorm):
        return None
    weights = norm.weights[...] if isinstance(norm, RowNorm) else None
    if weights is not None and len(weights) != n:
        weights = jnp.repeat(weights, n // len(weights))  # positions of a row are rows here
    return Running(norm.mean[...], norm.var[...], weights)


def dtype_of(dtype: Any, layers: Sequence[Callable[..., Any]]) -> Any:
    """The type that the layers, called in turn, would return."""
    for layer in layers:
        if isinstance(layer, QuantLayer):
            dtype = layer.dtype or dtype
        if isinstance(layer, nnx.BatchNorm | nnx.LayerNorm | nnx.PReLU):
            held = [] if isinstance(layer, nnx.PReLU) else [layer.scale, layer.bias]
            held += [layer.mean] if isinstance(layer, nnx.BatchNorm) else []
            types = [variable.dtype for variable in held if variable is not None]
            dtype = layer.dtype or jnp.result_type(dtype, *types)
    return jnp.dtype(dtype)
