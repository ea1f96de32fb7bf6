r"""Convolutions in a chain, with norms, activations and pooling between them.

:func:`run_chain` computes what calling the modules in turn does. Where the convolutions are
quantized and the native kernels serve them, no float activation is ever made in between: what
stands between two integer products is a function of each integer sum ``z``, linear on either side
of a kink (:mod:`fqt_jax.kernels.transforms`). Its signs go into the next product, and backward
evaluates it again. What a chain keeps for the backward pass is, for each entry, two bits and the
integer sum. The output of a float convolution of images is not kept either, but computed again.

The gradients of all parameters, of the weight scales and of the batch statistics follow from four
sums for each channel, through ordinary differentiation of the function's coefficients.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from fqt_jax import functional, kernels
from fqt_jax.binarize import PackedBits
from fqt_jax.functional import resolve_window, serves_images
from fqt_jax.grouping import roundings
from fqt_jax.kernels import native, transforms
from fqt_jax.kernels.contract import Window
from fqt_jax.kernels.transforms import Flow, Line
from fqt_jax.layers import QuantConv
from fqt_jax.norms import RowNorm, with_gradient_of
from fqt_jax.pooling import max_pool
from fqt_jax.recipe import Recipe
from fqt_jax.rounding import seeds_from_key
from fqt_jax.sharding import vary, varying_axes, varying_together

Order = Literal["norm_act", "act_norm"]


class Between(NamedTuple):
    """What stands between two convolutions: a norm and an activation, either way round, and then
    max-pooling over ``pool x pool``. Calling it applies it.

    Attributes:
      norm: a :class:`flax.nnx.BatchNorm`, any other module, or ``None``.
      act: a :class:`flax.nnx.PReLU`, any other module, or ``None``.
      order: which of the two comes first.
      pool: size of the pooling windows, which do not overlap; a remainder is left out.
    """

    norm: Callable[..., Any] | None = None
    act: Callable[..., Any] | None = None
    order: Order = "norm_act"
    pool: int = 1

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies norm, activation and pooling to ``x[N, H, W, C]``."""
        steps = (self.norm, self.act) if self.order == "norm_act" else (self.act, self.norm)
        for step in steps:
            x = x if step is None else step(x)
        return max_pool(x, self.pool)


def run_chain(
    x: jax.Array,
    betweens: Sequence[Between],
    convs: Sequence[Callable[..., Any]],
    *,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Applies ``betweens[0]``, ``convs[0]``, ``betweens[1]``, ..., ``betweens[-1]``.

    Runs in fused form where every convolution is a :class:`~fqt_jax.QuantConv`, those of binary
    recipes without bias, every norm a plain :class:`flax.nnx.BatchNorm` and every activation a
    plain :class:`flax.nnx.PReLU`, in float32, and the native kernels are available. The two forms
    differ by float rounding, and so, now and then, in a sign or a code at the edge.

    Args:
      x: input, ``[N, H, W, C]``.
      betweens: one more than there are convolutions.
      convs: the convolutions.
      residual: added to the output, of its shape: a block's shortcut.

    Returns:
      The output of the last one, ``[N, H', W', C']``, plus the residual.

    Raises:
      ValueError: the numbers of ``betweens`` and ``convs`` do not fit, the residual has another
        shape than the output, or a layer refuses.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import fqt_jax as fqt
      >>> rngs = nnx.Rngs(0)
      >>> convs = [fqt.QuantConv(8, 8, 3, use_bias=False, rngs=rngs) for _ in range(2)]
      >>> norms = [nnx.BatchNorm(8, rngs=rngs) for _ in range(3)]
      >>> betweens = [fqt.Between(norm, nnx.PReLU()) for norm in norms]
      >>> fqt.run_chain(jnp.ones((2, 4, 4, 8)), betweens, convs).shape
      (2, 4, 4, 8)
    """
    if len(betweens) != len(convs) + 1:
        raise ValueError(
            f"{len(convs)} convolutions have {len(convs) + 1} places around them; got "
            f"{len(betweens)} betweens."
        )
    if not _can_fuse(x, betweens, convs, residual):
        x = betweens[0](x)
        for conv, between in zip(convs, betweens[1:], strict=True):
            x = between(conv(x))
        return x if residual is None else _add(x, residual)
    # Layers that a rule keeps in float part the chain.
    layers: Sequence[Any] = convs
    cuts = [-1, *(i for i, conv in enumerate(layers) if not conv.recipe.binary), len(layers)]
    for cut, end in itertools.pairwise(cuts):
        first = None
        if cut >= 0 and _is_cheap(layers[cut], x):
            first = layers[cut]
        elif cut >= 0:
            x = convs[cut](x)
        is_last = end == len(layers)
        x = _run_fused(
            x,
            first,
            betweens[cut + 1 : end + 1],
            convs[cut + 1 : end],
            residual if is_last else None,
        )
    return x


def _is_cheap(conv: Any, x: jax.Array) -> bool:
    """Whether the backward pass computes a float convolution again, rather than keep its output.

    That of images is: its output has many times their channels, in float, and is the largest array
    by far that a binary network would keep.
    """
    return conv.bias is None and serves_images(x, conv.kernel[...], conv.implementation)


def _check_residual(shape: tuple[int, ...], residual: jax.Array) -> None:
    if residual.shape != shape:
        raise ValueError(
            f"residual must have the shape of the output, {shape}; got {residual.shape}."
        )


def _add(x: jax.Array, residual: jax.Array) -> jax.Array:
    _check_residual(x.shape, residual)
    return x + residual


def _can_fuse(
    x: jax.Array,
    betweens: Sequence[Between],
    convs: Sequence[Any],
    residual: jax.Array | None,
) -> bool:
    def is_plain(layer: Any) -> bool:
        return isinstance(layer, QuantConv) and (
            not layer.recipe.binary
            or (
                layer.bias is None
                and layer.implementation in (None, "native")
                and layer.kernel.size > 0
            )
        )

    def is_linear(between: Between) -> bool:
        norm: Any = between.norm
        act = between.act
        plain_norm = norm is None or (
            type(norm) in (nnx.BatchNorm, RowNorm)
            and norm.scale is not None
            and norm.bias is not None
            and norm.axis_name is None
            and norm.axis == -1
            and norm.dtype in (None, jnp.float32)
        )
        return plain_norm and (act is None or type(act) is nnx.PReLU)

    return (
        native.unavailable() is None
        and x.ndim == 4
        and x.dtype == jnp.float32
        and x.size > 0
        and len(convs) > 0
        and all(map(is_plain, convs))
        and any(conv.implementation in (None, "native") for conv in convs)
        and all(map(is_linear, betweens))
        and (residual is None or residual.dtype == jnp.float32)
    )


class _Shape(NamedTuple):
    """What is static of a :class:`Between`."""

    order: Order
    pool: int
    has_norm: bool
    has_act: bool
    epsilon: float
    uses_running: bool  # statistics rather than those of the batch


class _Link(NamedTuple):
    """What is static of a convolution."""

    recipe: Recipe
    window: Window
    implementation: str | None


class _Static(NamedTuple):
    first: _Link | None  # a float convolution before all else
    shapes: tuple[_Shape, ...]
    links: tuple[_Link, ...]
    has_residual: bool


def _run_fused(
    x: jax.Array,
    first: Any,
    betweens: Sequence[Between],
    convs: Sequence[Any],
    residual: jax.Array | None,
) -> jax.Array:
    if first is None and not convs and betweens[0] == Between():
        return x if residual is None else _add(x, residual)
    links, weights, seeds = [], [], []
    size = (x.shape[1], x.shape[2])
    first_link = None
    if first is not None:
        first_link = _link_of(first, size)
        size = first_link.window.output_size(size)
    for between, conv in zip(betweens, convs, strict=False):
        size = (size[0] // between.pool, size[1] // between.pool)
        links.append(_link_of(conv, size))
        size = links[-1].window.output_size(size)
        scale = None if conv.scale is None else conv.scale[...]
        weights.append((conv.kernel[...], scale))
        seeds.append(None if conv.rounding is None else seeds_from_key(conv.rounding(), 4))
    shapes = tuple(_shape_of(between) for between in betweens)
    static = _Static(first_link, shapes, tuple(links), residual is not None)
    params = [_params_of(between) for between in betweens]
    running = [_running_of(between) for between in betweens]
    first_kernel = None if first is None else first.kernel[...]
    operands = _Operands(x, first_kernel, weights, params, running, seeds, residual)
    out, statistics = _fused(static, varying_together(operands))
    for between, shape, of_batch in zip(betweens, static.shapes, statistics, strict=True):
        if shape.has_norm and not shape.uses_running:
            norm: Any = between.norm
            for old, new in zip((norm.mean, norm.var), of_batch, strict=True):
                new = lax.stop_gradient(new)
                old[...] = norm.momentum * old[...] + (1 - norm.momentum) * new
    return out


def _link_of(layer: Any, size: tuple[int, int]) -> _Link:
    window = resolve_window(layer.kernel.shape[:2], size, layer.strides, layer.padding)
    return _Link(layer.recipe, window, layer.implementation)


def _shape_of(between: Between) -> _Shape:
    norm: Any = between.norm
    has_norm = norm is not None
    return _Shape(
        order=between.order,
        pool=between.pool,
        has_norm=has_norm,
        has_act=between.act is not None,
        epsilon=norm.epsilon if has_norm else 0.0,
        uses_running=has_norm and bool(norm.use_running_average),
    )


def _params_of(between: Between) -> dict[str, jax.Array]:
    params: dict[str, jax.Array] = {}
    if between.norm is not None:
        norm: Any = between.norm
        params.update(gamma=norm.scale[...], beta=norm.bias[...])
    if between.act is not None:
        act: Any = between.act
        params["slope"] = act.negative_slope[...]
    return params


class _Running(NamedTuple):
    """Statistics that a norm holds."""

    mean: jax.Array
    var: jax.Array
    weights: jax.Array | None  # of the rows that the gradient of the statistics goes to


def _running_of(between: Between) -> _Running | None:
    norm: Any = between.norm
    if norm is None:
        return None
    weights = norm.weights[...] if isinstance(norm, RowNorm) else None
    return _Running(norm.mean[...], norm.var[...], weights)


def _line(
    shape: _Shape,
    params: dict[str, jax.Array],
    scale: jax.Array,
    moments: jax.Array | None,
    running: _Running | None,
) -> tuple[Line, tuple[jax.Array, jax.Array] | None]:
    """The function's coefficients, and the statistics of the batch.

    With ``y = scale s``: ``prelu(gamma (y - mean) / deviation + beta)`` or, the other way round,
    ``gamma (prelu(y) - mean) / deviation + beta``.
    """
    one, zero = jnp.ones_like(scale), jnp.zeros_like(scale)
    slope = params["slope"] if shape.has_act else jnp.ones((), jnp.float32)
    act_first = shape.order == "act_norm" and shape.has_act
    # Slopes of the input of the norm, where s >= 0 and where it is not.
    up = down = scale
    if act_first:
        up = jnp.where(scale >= 0, scale, slope * scale)
        down = jnp.where(scale >= 0, slope * scale, scale)
    factor, offset, statistics = one, zero, None
    if shape.has_norm:
        assert running is not None
        mean, var = running.mean, running.var
        if moments is not None:
            rows_mean = up * moments[0] + down * moments[2]
            square = up * up * moments[1] + down * down * moments[3]
            if shape.uses_running:
                # The mean of (y - mean)^2, but for what does not depend on the rows.
                var = with_gradient_of(var, square - 2 * mean * rows_mean)
                mean = with_gradient_of(mean, rows_mean)
            else:
                mean = rows_mean
                var = jnp.maximum(square - mean * mean, jnp.float32(0))
                statistics = mean, var
        factor = params["gamma"] * lax.rsqrt(var + jnp.float32(shape.epsilon))
        offset = params["beta"] - factor * mean
    if act_first or not shape.has_act:
        return Line(one, zero, factor * up, offset, factor * down, offset), statistics
    above = factor * scale
    return Line(above, offset, above, offset, slope * above, slope * offset), statistics


class _Operands(NamedTuple):
    x: jax.Array
    first: jax.Array | None  # kernel of the float convolution before all else
    weights: Any
    params: Any
    running: Any
    seeds: Any
    residual: jax.Array | None


class _Residuals(NamedTuple):
    operands: _Operands  # without the residual: its gradient does not need it
    sums: list[jax.Array]  # of each convolution
    signs: list[PackedBits]  # of its input
    clips: list[PackedBits]
    w_signs: list[PackedBits]
    moments: list[jax.Array | None]  # of each source that a norm's batch statistics are of
    scales: list[jax.Array]  # of each source


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(static: _Static, operands: _Operands) -> tuple[jax.Array, list[Any]]:
    return _fused_fwd(static, operands)[0]


def _fused_fwd(
    static: _Static, operands: _Operands
) -> tuple[tuple[jax.Array, list[Any]], _Residuals]:
    x, first, weights, params, running, _, residual = operands
    kept = _Residuals(operands._replace(residual=None), [], [], [], [], [], [])
    statistics = []
    source = _first_source(static, x, first)
    scale = vary(jnp.ones(source.shape[3], jnp.float32), varying_axes(source))
    nan_samples = None
    for i, shape in enumerate(static.shapes):
        weights_of_rows = _weights_of_rows(running[i])
        needs_moments = shape.has_norm and (not shape.uses_running or weights_of_rows is not None)
        moments = transforms.moments(source, weights_of_rows) if needs_moments else None
        line, of_batch = _line(shape, params[i], scale, moments, running[i])
        kept.moments.append(moments)
        kept.scales.append(scale)
        statistics.append(of_batch)
        if i == len(static.links):
            if residual is not None:
                _check_residual(transforms.pooled_shape(source.shape, shape.pool), residual)
            out = transforms.activate(source, line, shape.pool, nan_samples, residual)
            return (out, statistics), kept
        signs, clip, nan = transforms.encode(source, line, shape.pool)
        if i == 0:
            nan_samples = nan
        signs, clip = checkpoint_name(signs, "fqt_signs"), checkpoint_name(clip, "fqt_clip")
        w_signs, scale = _weights(static.links[i].recipe, weights[i])
        # Signs would hide a NaN: it goes on as that of the scale.
        scale = scale + jnp.where(jnp.isnan(sum(map(jnp.sum, line))), jnp.float32(jnp.nan), 0.0)
        link = static.links[i]
        source = kernels.forward(signs, w_signs, link.window, implementation=link.implementation)
        source = checkpoint_name(source, "fqt_sums")
        kept.sums.append(source)
        kept.signs.append(signs)
        kept.clips.append(clip)
        kept.w_signs.append(w_signs)
    raise AssertionError("a chain ends with what follows its last convolution")


def _first_source(static: _Static, x: jax.Array, first: jax.Array | None) -> jax.Array:
    if static.first is None or first is None:
        return x
    recipe, window, implementation = static.first
    return functional.conv(
        x,
        first,
        recipe=recipe,
        strides=window.strides,
        padding=window.padding,
        implementation=implementation,
    )


def _weights_of_rows(running: _Running | None) -> jax.Array | None:
    return None if running is None else running.weights


def _weights(recipe: Recipe, weight: Any) -> tuple[PackedBits, jax.Array]:
    """Signs of the weights, and the scale of each channel; NaN where the weights have one."""
    w, learned = weight
    signs, mean_abs = transforms.encode_weights(w.astype(jnp.float32))
    if recipe.scale == "mean_abs":
        return signs, mean_abs
    scale = jnp.ones_like(mean_abs) if learned is None else learned.astype(jnp.float32)
    return signs, scale + jnp.where(jnp.isnan(mean_abs), jnp.float32(jnp.nan), jnp.float32(0))


def _fused_bwd(static: _Static, kept: _Residuals, cotangents: Any) -> tuple[_Operands]:
    d, samples = cotangents[0], None
    d_params: list[Any] = [None] * len(static.shapes)
    d_weights: list[Any] = [None] * len(static.links)
    for i in reversed(range(len(static.shapes))):
        shape = static.shapes[i]
        if i:
            source = kept.sums[i - 1]
        else:
            x, first = kept.operands.x, kept.operands.first
            if first is not None:
                # Of two equal computations XLA makes one, whose result it keeps from the forward
                # pass, a barrier between them or not. This one needs the gradient.
                first = jnp.where(jnp.isnan(d[0, 0, 0, 0]), jnp.float32(jnp.nan), first)
            source, source_vjp = jax.vjp(functools.partial(_first_source, static), x, first)
        moments = kept.moments[i]

        def line_of(params: Any, scale: Any, moments: Any, i: int = i) -> Line:
            return _line(static.shapes[i], params, scale, moments, kept.operands.running[i])[0]

        line, line_vjp = jax.vjp(line_of, kept.operands.params[i], kept.scales[i], moments)
        sums = transforms.gradient_sums(source, line, shape.pool, d, samples)
        no = jnp.zeros_like(sums[0])
        d_params[i], d_scale, d_moments = line_vjp(
            Line(no, no, p1=sums[1], q1=sums[0], p0=sums[3], q0=sums[2])
        )
        # Each moment is a mean over all entries of s, or of s^2, on one side.
        flow = Flow(no, no, no, no)
        if d_moments is not None:
            n = jnp.float32(source.size // source.shape[3])
            flow = Flow(
                2 * d_moments[1] / n, d_moments[0] / n, 2 * d_moments[3] / n, d_moments[2] / n
            )
        rows = _weights_of_rows(kept.operands.running[i])
        g, lo, hi = transforms.gradient(source, line, flow, shape.pool, d, samples, rows)
        if i == 0:
            d_weights = [tuple(pair) for pair in d_weights]
            no_running = jax.tree.map(jnp.zeros_like, kept.operands.running)
            d_residual = cotangents[0] if static.has_residual else None
            d_x, d_first = source_vjp(g)
            return (_Operands(d_x, d_first, d_weights, d_params, no_running, None, d_residual),)
        d, samples, d_weights[i - 1] = _conv_bwd(static.links[i - 1], kept, i - 1, g, lo, hi)
        d_weights[i - 1] = _add_scale_gradient(
            static.links[i - 1].recipe, kept.operands.weights[i - 1], d_weights[i - 1], d_scale
        )
    raise AssertionError("a chain starts with what precedes its first convolution")


def _conv_bwd(
    link: _Link, kept: _Residuals, i: int, g: jax.Array, lo: jax.Array, hi: jax.Array
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Gradient of the convolution's input, of the samples kept; those; gradient of its weights."""
    recipe = link.recipe
    for_input, for_weight = None, None
    if recipe.gradient is not None:
        for_input, for_weight = roundings(g, recipe.gradient, kept.operands.seeds[i], (lo, hi))
    signs = kept.signs[i]
    d = kernels.input_grad(
        g,
        kept.w_signs[i],
        for_input,
        link.window,
        (signs.shape[0], signs.shape[1]),
        mask=kept.clips[i] if recipe.clip else None,
        compact=True,
        implementation=link.implementation,
    )
    dw = kernels.weight_grad(g, signs, for_weight, link.window, implementation=link.implementation)
    selection = None if for_input is None else for_input.samples
    return d, None if selection is None else selection.indices, dw


def _add_scale_gradient(
    recipe: Recipe, weight: Any, dw: jax.Array, d_scale: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    w, learned = weight
    d_mean_abs = jnp.zeros_like(d_scale)
    if recipe.scale == "mean_abs":
        d_mean_abs = d_scale / jnp.float32(w.size // w.shape[-1])  # the scale is the mean of |w|
    if recipe.clip or recipe.scale == "mean_abs":
        dw = transforms.finish_weight_grad(dw, w.astype(jnp.float32), d_mean_abs, clip=recipe.clip)
    return dw.astype(w.dtype), None if learned is None else d_scale.astype(learned.dtype)


_fused.defvjp(_fused_fwd, _fused_bwd)
