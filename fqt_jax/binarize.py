"""Signs: their straight-through gradient, the weight scale, and bits packed into words."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

WORD_BITS = 32


def check_float(name: str, x: Any) -> None:
    """Raises ``TypeError`` unless ``x`` is an array of a floating-point type."""
    dtype = getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        kind = type(x).__name__ if dtype is None else str(dtype)
        raise TypeError(f"{name} must be a floating-point array; got {kind}.")


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sign(x: jax.Array, clip: bool) -> jax.Array:
    sign = jnp.where(x >= 0, jnp.ones_like(x), -jnp.ones_like(x))
    return jnp.where(jnp.isnan(x), x, sign)


@_sign.defjvp
def _sign_jvp(clip: bool, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return _sign(x, clip), jnp.where(jnp.abs(x) <= 1, dx, jnp.zeros_like(dx)) if clip else dx


def binarize(x: jax.Array, *, clip: bool = True) -> jax.Array:
    r"""Sign of ``x`` with a straight-through gradient.

    .. math:: \mathrm{sign}(x) = \begin{cases}+1 & x \ge 0\\ -1 & x < 0\end{cases}, \qquad
       \frac{\partial\, \mathrm{sign}(x)}{\partial x} := \mathbb{1}[|x| \le 1]

    Note that ``sign(0) = sign(-0.0) = +1``, unlike :func:`jax.numpy.sign`. NaN stays NaN.

    Args:
      x: floating-point array of any shape.
      clip: whether the gradient is cut to zero outside [-1, 1]; otherwise it is 1 everywhere.

    Returns:
      An array like ``x`` whose entries are +1 and -1.

    Raises:
      TypeError: ``x`` is not a floating-point array.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fqt_jax import binarize
      >>> binarize(jnp.array([-2.0, -0.5, 0.0, 3.0]))
      Array([-1., -1.,  1.,  1.], dtype=float32)
      >>> jax.grad(lambda x: binarize(x).sum())(jnp.array([-2.0, -0.5, 0.0, 3.0]))
      Array([0., 1., 1., 0.], dtype=float32)

    References:
      Courbariaux et al., Binarized Neural Networks, arXiv 1602.02830, section 1.3.
    """
    check_float("x", x)
    return _sign(x, clip)


def weight_scale(w: jax.Array) -> jax.Array:
    r"""Scale of each output channel, :math:`\alpha_o = \mathrm{mean}_i\, |w_{i o}|`.

    Args:
      w: weights whose last axis is the output channel.

    Returns:
      ``alpha``, of shape ``w.shape[-1:]``. It is the least-squares scale of ``sign(w)``
      (XNOR-Net, arXiv 1603.05279, equation 6).

    Example:
      >>> weight_scale(jnp.array([[1.0, -2.0], [-3.0, 2.0]]))
      Array([2., 2.], dtype=float32)
    """
    check_float("w", w)
    return jnp.mean(jnp.abs(w), axis=tuple(range(w.ndim - 1)))


# Calls of their own in a program, by which a translation that has no use for words finds them.


@functools.partial(jax.jit, static_argnums=1)
def pack_bits(bits: jax.Array, batch_ndim: int) -> jax.Array:
    """The words of :class:`PackedBits` from ``bool[*batch, *shape]``."""
    batch, length = bits.shape[:batch_ndim], math.prod(bits.shape[batch_ndim:])
    n_words = -(-length // WORD_BITS)
    flat = bits.reshape(*batch, length)
    pad = n_words * WORD_BITS - length
    if pad:
        flat = jnp.pad(flat, [(0, 0)] * batch_ndim + [(0, pad)])
    lanes = flat.reshape(*batch, n_words, WORD_BITS).astype(jnp.uint32)
    shifts = jnp.arange(WORD_BITS, dtype=jnp.uint32)
    shifts = shifts.reshape((1,) * (batch_ndim + 1) + (WORD_BITS,))
    return jnp.sum(lanes << shifts, axis=-1, dtype=jnp.uint32)


@functools.partial(jax.jit, static_argnums=1)
def unpack_bits(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``bool[*batch, *shape]`` from the words of :class:`PackedBits`."""
    shifts = jnp.arange(WORD_BITS, dtype=jnp.uint32)
    shifts = shifts.reshape((1,) * words.ndim + (WORD_BITS,))
    bits = ((words[..., None] >> shifts) & 1).astype(jnp.bool_)
    batch = words.shape[:-1]
    flat = bits.reshape(*batch, words.shape[-1] * WORD_BITS)
    return flat[..., : math.prod(shape)].reshape(*batch, *shape)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["words"], meta_fields=["shape"])
@dataclasses.dataclass(frozen=True)
class PackedBits:
    """Bits packed into 32-bit words, row by row.

    The leading axes of ``words`` are batch axes. The trailing axes of the logical array, of shape
    ``shape``, are flattened in C order; bit ``i`` stands in word ``i // 32`` at position
    ``i % 32``.
    Unused bits of the last word are zero, so that::

        words.dtype == uint32
        words.shape[-1] == ceil(prod(shape) / 32)

    Attributes:
      words: ``uint32[*batch, ceil(prod(shape) / 32)]``.
      shape: the logical trailing shape; static.

    Example:
      >>> import jax.numpy as jnp
      >>> from fqt_jax import PackedBits
      >>> packed = PackedBits.pack(jnp.array([[True, False, True]]))
      >>> packed.words, packed.shape
      (Array([[5]], dtype=uint32), (3,))
      >>> packed.unpack()
      Array([[ True, False,  True]], dtype=bool)
    """

    words: jax.Array
    shape: tuple[int, ...]

    @classmethod
    def pack(cls, bits: jax.Array, *, batch_ndim: int = 1) -> PackedBits:
        """Packs a boolean array whose first ``batch_ndim`` axes are batch axes."""
        if bits.dtype != jnp.bool_:
            raise TypeError(f"bits must be a boolean array; got {bits.dtype}.")
        if bits.ndim < batch_ndim:
            raise ValueError(f"bits of shape {bits.shape} have fewer than {batch_ndim} batch axes.")
        return cls(pack_bits(bits, batch_ndim), bits.shape[batch_ndim:])

    def unpack(self) -> jax.Array:
        """The boolean array ``bool[*batch, *shape]``."""
        return unpack_bits(self.words, self.shape)

    def signs(self, dtype: Any = jnp.float32) -> jax.Array:
        """The array of +1 (bit set) and -1 (bit clear)."""
        one = jnp.ones((), dtype)
        return jnp.where(self.unpack(), one, -one)

    @property
    def nbytes(self) -> int:
        """Bytes that the words take."""
        return self.words.size * self.words.dtype.itemsize
