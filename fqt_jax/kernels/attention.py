"""Self-attention, which stays float: here so that no array of the size of its weights is made."""

from __future__ import annotations

import jax

from fqt_jax.kernels.dispatch import dispatch


def attention(
    qkv: jax.Array, scale: float, *, is_causal: bool, implementation: str | None = None
) -> jax.Array:
    """What each position takes from others: ``softmax(scale Q K^T) V``, ``[N, T, H, D]``.

    Args:
      qkv: queries, keys and values, ``[N, T, 3, H, D]``, floating point.
      scale: of the products of queries and keys.
      is_causal: whether a position sees only those before it and itself.
      implementation: name of the implementation; ``None`` picks one.

    Raises:
      ValueError: ``qkv`` has other axes.
    """
    return dispatch(
        "attention",
        jax.ShapeDtypeStruct(_shape(qkv), qkv.dtype),
        qkv,
        scale=float(scale),
        is_causal=is_causal,
        implementation=implementation,
    )


def attention_grad(
    qkv: jax.Array,
    dy: jax.Array,
    scale: float,
    *,
    is_causal: bool,
    implementation: str | None = None,
) -> jax.Array:
    """The gradient of ``qkv``, from that of :func:`attention`'s result; sums are taken again.

    Raises:
      ValueError: the operands do not fit together.
    """
    if dy.shape != _shape(qkv) or dy.dtype != qkv.dtype:
        raise ValueError(
            f"dy must be {qkv.dtype}{list(_shape(qkv))}; got {dy.dtype}{list(dy.shape)}."
        )
    return dispatch(
        "attention_grad",
        jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
        qkv,
        dy,
        scale=float(scale),
        is_causal=is_causal,
        implementation=implementation,
    )


def _shape(qkv: jax.Array) -> tuple[int, ...]:
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be [N, T, 3, H, D]; got {list(qkv.shape)}.")
    n, length, _, heads, d = qkv.shape
    return n, length, heads, d
