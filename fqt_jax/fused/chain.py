r"""A chain of binary products, with norms, activations and pooling between them.

With hats for signs and ``*`` for the convolution, a product and its gradients are::

    y = alpha (x^ * w^) + bias                  forward: an exact integer product, then a scale
    g = alpha dL/dy                             backward: alpha is folded in before quantizing
    dL/dx^ = Q_sample(g) *^T w^                 groups are samples: the scale leaves the sum
    dL/dw^ = x^ * Q_channel(g)                  groups are output channels: likewise
    dL/dx = 1[|x| <= 1] dL/dx^                  straight-through, and the same for w

With a threshold and a spread for each channel the signs are those of ``u = (x - threshold) /
spread``, and the gradient that of ``u``, straight-through::

    dL/dx = 1[|u| <= 1] dL/dx^ / spread         dL/dthreshold = -sum over entries of dL/dx

(arXiv 2408.14267, sections 3 and 4.) No float activation is made between two integer products:
what stands there is a function of each integer sum ``z``, linear on either side of a kink
(:mod:`fqt_jax.kernels.transforms`). Its signs go into the next product, and backward evaluates it
again. What a chain keeps for the backward pass is, for each entry, two bits, and the integer sum
where computing it again from the bits takes many products.

The gradients of all parameters, of the weight scales and of the batch statistics follow from four
sums for each channel, through ordinary differentiation of the function's coefficients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fqt_jax import kernels
from fqt_jax.binarize import PackedBits
from fqt_jax.fused.float_conv import float_conv
from fqt_jax.fused.gaps import GapGradient, encode, function_of, gap_gradient
from fqt_jax.fused.parts import Chain, Gap, GapParams, Kept, Operands, Statistics
from fqt_jax.fused.product import encode_weights, finish_weights, product_gradients
from fqt_jax.kernels import Line, native
from fqt_jax.kernels.dispatch import routes
from fqt_jax.sharding import vary, varying_axes, varying_together

_FEW_PRODUCTS = 3 * 3 * 64
"""For each entry: so many are computed again in the time that some bytes of memory take."""


def run_chain(chain: Chain, operands: Operands) -> tuple[jax.Array, list[Statistics | None]]:
    """The output ``[N, H', W', O]``, and the batch statistics of each norm that takes them.

    Raises:
      ValueError: the residual has another shape than the output.
    """
    if operands.residual is not None:
        operands = operands._replace(residual=operands.residual.astype(jnp.float32))
    if chain.gaps[0] == Gap() and chain.first is None:
        chain, operands = _centred(chain, operands)
    return _run(chain, varying_together(operands))


def _centred(chain: Chain, operands: Operands) -> tuple[Chain, Operands]:
    """The same signs with the threshold of the first at zero.

    Where nothing else stands before them, nothing of ``x`` need be kept for that.
    """
    first = operands.params[0]
    if operands.x is None or first.threshold is None or first.spread is None:
        return chain, operands
    x = operands.x.astype(jnp.float32)
    threshold, spread = (
        a.astype(jnp.float32).reshape(1, 1, 1, -1) for a in (first.threshold, first.spread)
    )
    x = (x - threshold) / spread
    first = first._replace(threshold=None, spread=None)
    operands = operands._replace(x=x, params=[first, *operands.params[1:]])
    return chain._replace(x_dtype=x.dtype), operands


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(chain: Chain, operands: Operands) -> tuple[jax.Array, list[Statistics | None]]:
    return _run_fwd(chain, operands)[0]


def _run_fwd(
    chain: Chain, operands: Operands
) -> tuple[tuple[jax.Array, list[Statistics | None]], Kept]:
    implementation = chain.implementation
    assert operands.x is not None
    x = operands.x if _has_gradient(chain, operands.params, 0) else None
    kept = Kept(operands._replace(x=x, residual=None), [], [], [], [], [], [])
    statistics: list[Statistics | None] = []
    source = _source(chain, operands.x, operands.first)
    scale = vary(jnp.ones(source.shape[3], jnp.float32), varying_axes(source))
    nan_samples = None
    for i, gap in enumerate(chain.gaps):
        params, running = operands.params[i], operands.running[i]
        function, moments, of_batch = function_of(
            gap, params, scale, source, running, implementation
        )
        kept.moments.append(moments)
        kept.scales.append(scale if _has_gradient(chain, operands.params, i) else None)
        statistics.append(of_batch)
        if i == len(chain.links):
            assert isinstance(function, Line)  # layer norm stands before a product
            out = _output(chain, gap, source, function, nan_samples, operands.residual)
            return (out, statistics), kept
        signs, clip, nan = encode(gap, source, function, implementation)
        if i == 0:
            nan_samples = nan
        link = chain.links[i]
        w_signs, scale = encode_weights(link, operands.weights[i], implementation)
        # Signs would hide a NaN: it goes on as that of the scale.
        total = sum(map(jnp.sum, jax.tree.leaves(function)))
        scale = scale + jnp.where(jnp.isnan(total), jnp.float32(jnp.nan), 0.0)
        source = kernels.forward(signs, w_signs, link.window, implementation=implementation)
        is_needed = _has_gradient(chain, operands.params, i + 1)
        is_kept = is_needed and not _is_cheap(signs, w_signs, link.window, implementation)
        kept.sums.append(source if is_kept else None)
        kept.signs.append(signs)
        kept.clips.append(clip if link.recipe.clip else None)
        kept.w_signs.append(w_signs)
    raise AssertionError("a chain ends with what follows its last product")


def _source(chain: Chain, x: jax.Array, first: jax.Array | None) -> jax.Array:
    if chain.first is not None and first is not None:
        x = float_conv(x, first, chain.first.window, chain.implementation)
    return x.astype(jnp.float32)


def _output(
    chain: Chain,
    gap: Gap,
    source: jax.Array,
    line: Line,
    nan_samples: jax.Array | None,
    residual: jax.Array | None,
) -> jax.Array:
    shape = kernels.pooled_shape(source.shape, gap.pool)
    if residual is not None and residual.shape != shape:
        raise ValueError(
            f"residual must have the shape of the output, {shape}; got {residual.shape}."
        )
    out = kernels.activate(
        source, line, gap.pool, nan_samples, residual, implementation=chain.implementation
    )
    return out.astype(chain.dtype)


def _has_gradient(chain: Chain, params: list[GapParams], i: int) -> bool:
    """Whether a gap does anything to the gradient that passes it.

    The first does not where the signs of ``x`` itself go into a product, nor the last where the
    output is that of the last product as it is. Then nothing of their sources need be kept.
    """
    if chain.gaps[i] != Gap() or not chain.links:
        return True
    if i == 0:
        return chain.first is not None
    is_last = i == len(chain.links)
    return not is_last or params[i].bias is not None or chain.links[-1].recipe.scale != "none"


def _is_cheap(
    x: PackedBits, w: PackedBits, window: kernels.Window, implementation: str | None
) -> bool:
    """Whether the backward pass computes the sums of a product again, rather than keep them.

    Not where the processor has no fast way to them: twice would be a tenth of a VGG-16's step.
    """
    is_short = math.prod(w.shape[:-1]) <= _FEW_PRODUCTS
    return is_short and not _looks_up(x, w, window, implementation)


def _looks_up(
    x: PackedBits, w: PackedBits, window: kernels.Window, implementation: str | None
) -> bool:
    """Whether native kernels look a product up, rather than count its bits or take matrix tiles."""
    served = dict(routes("forward", implementation, (x, w), {"window": window}))
    if served.get(jax.default_backend()) != "native":
        return False
    x_shape = (x.words.shape[0], *x.shape)
    return native.product_form("forward", x_shape, w.shape[-1], window) == "look_up"


def _after(grads: Sequence[jax.Array], tree: Any) -> Any:
    """The same arrays, but not before there are the gradients of the layer above.

    Of two equal computations XLA makes one, whose result it keeps from the forward pass, a barrier
    between them or not. This one needs the gradients, and what they were made of is not needed any
    more. Where one is NaN all comes to nothing anyway.
    """
    firsts = [grad[0, 0, 0, 0] for grad in grads if grad.size]
    if not firsts:
        return tree
    is_nan = jnp.isnan(jnp.stack(firsts)).any()
    return jax.tree.map(lambda a: jnp.where(is_nan, jnp.zeros_like(a), a), tree)


def _run_bwd(chain: Chain, kept: Kept, cotangents: tuple[jax.Array, Any]) -> tuple[Operands]:
    d: jax.Array = cotangents[0].astype(jnp.float32)
    samples: jax.Array | None = None
    operands = kept.operands
    d_params: list[Any] = [jax.tree.map(jnp.zeros_like, p) for p in operands.params]
    d_weights: list[Any] = [None] * len(chain.links)
    made = [d]
    for i in reversed(range(1, len(chain.gaps))):
        link, w = chain.links[i - 1], operands.weights[i - 1]
        g, d_scale, bounds = d, jnp.zeros(d.shape[3], jnp.float32), None
        if _has_gradient(chain, operands.params, i):
            source = kept.sums[i - 1]
            if source is None:
                source = kernels.forward(
                    kept.signs[i - 1],
                    _after(made, kept.w_signs[i - 1]),
                    link.window,
                    implementation=chain.implementation,
                )
            g, d_params[i], d_scale, bounds = _gap_bwd(chain, kept, i, source, d, samples)
        d, samples, dw = product_gradients(
            link,
            g,
            kept.signs[i - 1],
            kept.w_signs[i - 1],
            kept.clips[i - 1],
            operands.seeds[i - 1],
            bounds,
            compact=i > 1 or operands.x is not None,
            implementation=chain.implementation,
        )
        made = [d, dw]
        d_weights[i - 1] = finish_weights(link, w, dw, d_scale, chain.implementation)
    d_x, d_first = d, None
    if operands.x is not None:
        again, source_vjp = jax.vjp(
            functools.partial(_source, chain), operands.x, _after(made, operands.first)
        )
        g, d_params[0], _, _ = _gap_bwd(chain, kept, 0, again, d, samples)
        d_x, d_first = source_vjp(g)
    d_x = d_x.astype(chain.x_dtype)
    no_running = jax.tree.map(jnp.zeros_like, operands.running)
    d_residual = cotangents[0].astype(jnp.float32) if chain.has_residual else None
    no_seeds: Any = None
    return (Operands(d_x, d_first, d_weights, d_params, no_running, no_seeds, d_residual),)


def _gap_bwd(
    chain: Chain,
    kept: Kept,
    i: int,
    source: jax.Array,
    d: jax.Array,
    samples: jax.Array | None,
) -> GapGradient:
    scale, operands = kept.scales[i], kept.operands
    assert scale is not None
    return gap_gradient(
        chain.gaps[i],
        operands.params[i],
        scale,
        source,
        operands.running[i],
        kept.moments[i],
        d,
        samples,
        chain.implementation,
        overwrites=i == 0 and chain.first is not None,  # which was computed again for this
    )


_run.defvjp(_run_fwd, _run_bwd)
