"""Self-attention in plain XLA: JAX's own."""

from __future__ import annotations

import functools

import jax


def attention(qkv: jax.Array, *, scale: float, is_causal: bool, platform: str) -> jax.Array:
    """See :func:`fqt_jax.kernels.attention`."""
    if qkv.size == 0:
        return qkv[:, :, 0]
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=is_causal)


def attention_grad(
    qkv: jax.Array, dy: jax.Array, *, scale: float, is_causal: bool, platform: str
) -> jax.Array:
    """See :func:`fqt_jax.kernels.attention_grad`."""
    run = functools.partial(attention, scale=scale, is_causal=is_causal, platform=platform)
    (d_qkv,) = jax.vjp(run, qkv)[1](dy)
    return d_qkv
