"""Self-attention as models of this library use it: float, and without an array of its weights."""

from __future__ import annotations

import functools
import math

import jax

from fqt_jax import kernels
from fqt_jax.binarize import check_float


def self_attention(
    qkv: jax.Array, *, is_causal: bool = False, implementation: str | None = None
) -> jax.Array:
    r"""Attention of the positions of a sequence to each other, in several heads.

    .. math:: y = \mathrm{softmax}\left(Q K^\top / \sqrt{D}\right) V

    The function of :func:`jax.nn.dot_product_attention`, of queries, keys and values in one array,
    as one product gives them. It is not quantized. On a CPU the native kernels go block by block,
    so that neither pass writes the ``T x T`` weights of a head; backward computes them again
    (as in FlashAttention, arXiv 2205.14135). Elsewhere it is JAX's own, and backward keeps as
    little.

    Args:
      qkv: queries, keys and values, ``[N, T, 3, H, D]``, floating point.
      is_causal: whether a position sees only those before it and itself.
      implementation: name of the kernels' implementation; ``None`` picks the best one.

    Returns:
      ``y``, ``[N, T, H, D]``, of the type of ``qkv``.

    Raises:
      TypeError: ``qkv`` is not a floating-point array.
      ValueError: ``qkv`` has other axes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fqt_jax as fqt
      >>> qkv = jax.random.normal(jax.random.key(0), (2, 5, 3, 4, 8))
      >>> y = fqt.self_attention(qkv, is_causal=True)
      >>> y.shape, bool(jnp.allclose(y[:, 0], qkv[:, 0, 2]))  # the first sees itself alone
      ((2, 5, 4, 8), True)
    """
    check_float("qkv", qkv)
    kernels.check_implementation(implementation)
    return _attention(is_causal, implementation, qkv)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(is_causal: bool, implementation: str | None, qkv: jax.Array) -> jax.Array:
    scale = _scale(qkv)
    return kernels.attention(qkv, scale, is_causal=is_causal, implementation=implementation)


def _scale(qkv: jax.Array) -> float:
    return 1 / math.sqrt(max(1, qkv.shape[-1]))


def _fwd(
    is_causal: bool, implementation: str | None, qkv: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _attention(is_causal, implementation, qkv), qkv


def _bwd(
    is_causal: bool, implementation: str | None, qkv: jax.Array, dy: jax.Array
) -> tuple[jax.Array]:
    scale = _scale(qkv)
    return (
        kernels.attention_grad(qkv, dy, scale, is_causal=is_causal, implementation=implementation),
    )


_attention.defvjp(_fwd, _bwd)
