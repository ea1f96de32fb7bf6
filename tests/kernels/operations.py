"""Every operation of the kernels once, on small operands, and who implements it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fqt_jax import PackedBits, Selection, kernels
from fqt_jax.kernels import Flow, Line, Normed, Rounding, Window, dispatch

SAME = Window((3, 3), (1, 1), ((1, 1), (1, 1)))
N, SIZE, C, O = 3, (4, 5), 3, 5  # noqa: E741
POOL = 2
EPSILON = 1e-5

OPERATIONS: dict[str, Callable[..., Any]] = {
    "forward": lambda x, w, **to: kernels.forward(x, w, SAME, **to),
    "input_grad": lambda g, w, r, mask, **to: kernels.input_grad(
        g, w, r, SAME, SIZE, mask=mask, **to
    ),
    "weight_grad": lambda g, x, r, **to: kernels.weight_grad(g, x, r, SAME, **to),
    "moments": kernels.moments,
    "encode": lambda s, line, **to: kernels.encode(s, line, POOL, **to),
    "activate": lambda s, line, *more, **to: kernels.activate(s, line, POOL, *more, **to),
    "gradient_sums": lambda s, line, *more, **to: kernels.gradient_sums(s, line, POOL, *more, **to),
    "gradient": lambda s, line, flow, *more, **to: kernels.gradient(
        s, line, flow, POOL, *more, **to
    ),
    "encode_normed": lambda s, normed, **to: kernels.encode_normed(s, normed, EPSILON, **to),
    "gradient_normed": lambda s, normed, *more, **to: kernels.gradient_normed(
        s, normed, EPSILON, *more, **to
    ),
    "encode_weights": kernels.encode_weights,
    "finish_weight_grad": lambda *of, **to: kernels.finish_weight_grad(*of, clip=True, **to),
    "float_conv": lambda x, w, **to: kernels.float_conv(x, w, SAME, **to),
    "float_conv_input_grad": lambda g, w, **to: kernels.float_conv_input_grad(
        g, w, SAME, SIZE, **to
    ),
    "float_conv_weight_grad": lambda x, g, **to: kernels.float_conv_weight_grad(x, g, SAME, **to),
    "adam": kernels.adam,
    "water_filling": lambda r, **to: kernels.water_filling(r, 2, **to),
    "systematic": lambda p, seed, **to: kernels.systematic(p, 2, seed, **to),
    "attention": lambda qkv, **to: kernels.attention(qkv, 0.5, is_causal=True, **to),
    "attention_grad": lambda qkv, dy, **to: kernels.attention_grad(
        qkv, dy, 0.5, is_causal=True, **to
    ),
}
"""Functions of an operation's operands, and of ``implementation``."""


def implementations(operation: str) -> list[str]:
    """The implementations that are available here and have a kernel of their own."""
    reference = dispatch._IMPLEMENTATIONS["xla"].kernels[operation]
    return [
        name
        for name, state in kernels.implementations().items()
        if state == "available"
        and (name == "xla" or dispatch._IMPLEMENTATIONS[name].kernels[operation] is not reference)
    ]


def each_of(*operations: str) -> list[str]:
    """Those that implement any of some operations."""
    found = [name for operation in operations for name in implementations(operation)]
    return sorted(set(found), key=list(kernels.implementations()).index)


def operands(operation: str, seed: int = 0) -> tuple[Any, ...]:
    """Operands of an operation; their shapes do not depend on the seed."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def signs(*shape: int, batch_ndim: int) -> PackedBits:
        return PackedBits.pack(jnp.asarray(rng.integers(0, 2, shape) > 0), batch_ndim=batch_ndim)

    def selection(n: int, k: int) -> Selection:
        kept = np.sort(rng.choice(n, k, replace=False))
        weights = jnp.asarray(rng.uniform(1, 2, k), jnp.float32)
        return Selection(jnp.asarray(kept, jnp.int32), weights, n)

    def rounding(groups: Any) -> Rounding:
        samples, seed = selection(N, 2), jnp.asarray(rng.integers(0, 2**32, 2), jnp.uint32)
        size = 2 if groups == "samples" else O
        lo, span = jnp.full(size, -4, jnp.float32), jnp.full(size, 8, jnp.float32)
        return Rounding(lo, span, seed, samples, None, 4, groups)

    x, w, g = (
        signs(N, *SIZE, C, batch_ndim=1),
        signs(3, 3, C, O, batch_ndim=0),
        normal(N, *SIZE, O),
    )
    float_x, float_w = normal(N, *SIZE, C), normal(3, 3, C, O)
    source = jnp.asarray(rng.integers(-40, 40, (N, *SIZE, C)), jnp.int16)
    line, flow = Line(*normal(6, C)), Flow(*normal(4, C))
    weights, pooled = jnp.abs(normal(N)), (SIZE[0] // POOL, SIZE[1] // POOL, C)
    d, samples = normal(2, *pooled), selection(N, 2).indices
    factors = jnp.asarray([0.1, 0.9, 0.001, 0.999, 10, 1000, 1e-8], jnp.float32)
    return {
        "forward": (x, w),
        "input_grad": (g, w, rounding("samples"), signs(N, *SIZE, C, batch_ndim=1)),
        "weight_grad": (g, x, rounding("channels")),
        "moments": (source, (line.s, line.t), weights),
        "encode": (source, line),
        "activate": (source, line, normal(N), normal(N, *pooled)),
        "gradient_sums": (source, line, d, samples),
        "gradient": (source, line, flow, d, samples, weights),
        "encode_normed": (source, Normed(line, Line(*normal(6, C)))),
        "gradient_normed": (
            source,
            Normed(line, Line(*normal(6, C))),
            normal(2, *SIZE, C),
            samples,
        ),
        "encode_weights": (float_w,),
        "finish_weight_grad": (normal(3, 3, C, O), float_w, normal(O)),
        "float_conv": (float_x, float_w),
        "float_conv_input_grad": (g, float_w),
        "float_conv_weight_grad": (float_x, g),
        "attention": (normal(2, 4, 3, 2, 5),),
        "attention_grad": (normal(2, 4, 3, 2, 5), normal(2, 4, 2, 5)),
        "water_filling": (jnp.abs(normal(7)),),
        "systematic": (
            jnp.asarray(rng.dirichlet(np.ones(7)) * 2, jnp.float32),
            jnp.asarray(rng.integers(0, 2**32, 2), jnp.uint32),
        ),
        "adam": (normal(4, 5), normal(4, 5), jnp.abs(normal(4, 5)), factors),
    }[operation]
