"""Matrix products under a recipe, written in three ways."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from fqt_jax.binarize import weight_scale
from fqt_jax.functional import dense
from fqt_jax.layers.base import BIAS_INIT, KERNEL_INIT, Initializer, QuantLayer, laid_out
from fqt_jax.recipe import FQT1, Recipe


class QuantLinear(QuantLayer):
    """Dense layer under a recipe: :func:`fqt_jax.dense` as a module.

    The counterpart of :class:`flax.nnx.Linear`; see :class:`QuantConv` for the arguments and the
    random stream.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import fqt_jax as fqt
      >>> layer = fqt.QuantLinear(8, 4, recipe=fqt.QAT, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 5, 8))).shape
      (2, 5, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        recipe: Recipe | str = FQT1,
        dtype: Any = None,
        kernel_init: Initializer = KERNEL_INIT,
        bias_init: Initializer = BIAS_INIT,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            (in_features, out_features),
            in_features,
            (out_features,) if use_bias else None,
            recipe=recipe,
            dtype=dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            implementation=implementation,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer to ``x[..., C]``.

        ``out_sharding`` lays the output out over a mesh of explicit axes, as for
        :class:`flax.nnx.Linear`.
        """
        operands = self._operands("bias")
        y = dense(self._cast(x), self.kernel[...], implementation=self.implementation, **operands)
        return laid_out(y, out_sharding)


class QuantLinearGeneral(QuantLayer):
    """Dense layer over several axes under a recipe: :func:`fqt_jax.dense` as a module.

    The counterpart of :class:`flax.nnx.LinearGeneral`, without batch axes; see :class:`QuantConv`
    for the other arguments and the random stream. All axes that are summed over together are the
    channels of the input, all other axes the samples.

    Args:
      in_features: sizes of the axes that are summed over.
      out_features: sizes of the axes that take their place, at the end.
      axis: the axes that are summed over.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import fqt_jax as fqt
      >>> layer = fqt.QuantLinearGeneral(8, (2, 4), recipe=fqt.QAT, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((3, 5, 8))).shape
      (3, 5, 2, 4)
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        axis: int | Sequence[int] = -1,
        use_bias: bool = True,
        recipe: Recipe | str = FQT1,
        dtype: Any = None,
        kernel_init: Initializer = KERNEL_INIT,
        bias_init: Initializer = BIAS_INIT,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        ins, outs, axes = map(_as_tuple, (in_features, out_features, axis))
        if len(ins) != len(axes):
            raise ValueError(f"axis must name {len(ins)} axes, as in_features does; got {axis!r}.")
        super().__init__(
            (*ins, *outs),
            math.prod(ins),
            outs if use_bias else None,
            recipe=recipe,
            dtype=dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            implementation=implementation,
            rngs=rngs,
            scale_of=lambda w: weight_scale(w.reshape(math.prod(ins), math.prod(outs))),
        )
        self.in_features, self.out_features, self.axis = ins, outs, axes

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Sums over the axes of the layer; the new ones come last."""
        ins, outs = math.prod(self.in_features), self.out_features
        axes = [axis % x.ndim for axis in self.axis]
        rest = [axis for axis in range(x.ndim) if axis not in axes]
        x = self._cast(x).transpose(*rest, *axes)
        batch = x.shape[: len(rest)]
        y = dense(
            x.reshape(*batch, ins),
            self.kernel[...].reshape(ins, math.prod(outs)),
            bias=None if self.bias is None else self.bias[...].reshape(-1),
            implementation=self.implementation,
            **self._operands(),
        )
        return laid_out(y.reshape(*batch, *outs), out_sharding)


class QuantEinsum(QuantLayer):
    """Matrix product in Einstein's notation under a recipe: :func:`fqt_jax.dense` as a module.

    The counterpart of :class:`flax.nnx.Einsum`, for strings that stand for a matrix product: each
    axis of the weights is either summed over, or comes from them alone. See :class:`QuantConv` for
    the other arguments and the random stream. All axes that are summed over together are the
    channels of the input, its other axes the samples.

    Args:
      einsum_str: such as ``"...d,dhk->...hk"``.
      kernel_shape, bias_shape: shapes of the parameters; ``None`` for no bias.

    Raises:
      ValueError: the string stands for something else.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import fqt_jax as fqt
      >>> string, shape = "btd,hdk->bhtk", (2, 8, 4)
      >>> layer = fqt.QuantEinsum(string, shape, recipe=fqt.QAT, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((3, 5, 8))).shape
      (3, 2, 5, 4)
    """

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Sequence[int],
        bias_shape: Sequence[int] | None = None,
        *,
        recipe: Recipe | str = FQT1,
        dtype: Any = None,
        kernel_init: Initializer = KERNEL_INIT,
        bias_init: Initializer = BIAS_INIT,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        parsed = MatrixProduct.of(einsum_str)
        if len(parsed.w) != len(kernel_shape):
            raise ValueError(f"kernel_shape must have the axes {parsed.w!r}; got {kernel_shape}.")
        sizes = dict(zip(parsed.w, kernel_shape, strict=True))
        ins = math.prod(sizes[label] for label in parsed.summed)
        super().__init__(
            tuple(kernel_shape),
            ins,
            None if bias_shape is None else tuple(bias_shape),
            recipe=recipe,
            dtype=dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            implementation=implementation,
            rngs=rngs,
            scale_of=lambda w: weight_scale(parsed.matrix(w).reshape(ins, -1)),
        )
        self.parsed = parsed

    def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer to an input of the axes that the string names."""
        parsed = self.parsed
        labels, out = parsed.resolved(x.ndim)
        rows = [label for label in labels if label not in parsed.summed]
        x = self._cast(x).transpose(*(labels.index(a) for a in (*rows, *parsed.summed)))
        w = parsed.matrix(self.kernel[...])
        outs = w.shape[len(parsed.summed) :]
        batch = x.shape[: len(rows)]
        ins = math.prod(x.shape[len(rows) :])
        y = dense(
            x.reshape(*batch, ins),
            w.reshape(ins, math.prod(outs)),
            implementation=self.implementation,
            **self._operands(),
        ).reshape(*batch, *outs)
        order = [*rows, *parsed.new]
        y = y.transpose(*(order.index(label) for label in out))
        if self.bias is not None:
            sizes = dict(zip(order, (*batch, *outs), strict=True))
            shape = [sizes[label] if label in parsed.new else 1 for label in out]
            y = y + self.bias[...].reshape(shape).astype(y.dtype)
        return laid_out(y, out_sharding)


class MatrixProduct(NamedTuple):
    """A string of Einstein's notation that stands for a matrix product.

    Attributes:
      x, w, out: the labels of input, weights and output; an ellipsis is ``"."``.
      summed: labels of input and weights that are summed over, in the order of the weights.
      new: labels that come from the weights, in their order.
    """

    x: str
    w: str
    out: str
    summed: str
    new: str

    @classmethod
    def of(cls, text: str) -> MatrixProduct:
        """Reads a string.

        Raises:
          ValueError: it does not stand for a matrix product of an input and weights.
        """
        operands, arrow, out = text.replace(" ", "").replace("...", ".").partition("->")
        x, comma, w = operands.partition(",")
        why = ""
        if not arrow or not comma or "," in w:
            why = "it must be of the form 'input,kernel->output'"
        elif any(len(set(part)) != len(part) for part in (x, w, out)):
            why = "an axis occurs twice"
        elif "." in w:
            why = "the kernel has an ellipsis"
        elif set(x) & set(w) & set(out):
            why = "the kernel has batch axes"
        elif (set(x) ^ set(w)) != set(out):
            why = "an axis of one operand is summed by itself"
        elif not set(x) & set(w):
            why = "nothing is summed over"
        if why:
            raise ValueError(f"{text!r} is no matrix product: {why}.")
        summed = "".join(label for label in w if label in x)
        return cls(x, w, out, summed, "".join(label for label in w if label not in x))

    def matrix(self, w: jax.Array) -> jax.Array:
        """The weights with what is summed first, then what is new."""
        return w.transpose(*(self.w.index(label) for label in self.summed + self.new))

    def resolved(self, ndim: int) -> tuple[list[str], list[str]]:
        """Labels of the axes of an input and of its output, those of an ellipsis numbered.

        Raises:
          ValueError: the input has another number of axes.
        """
        more = ndim - (len(self.x) - self.x.count("."))
        if more < 0 or (more and "." not in self.x):
            raise ValueError(f"the input must have the axes {self.x!r}; it has {ndim} axes.")
        dots = [str(i) for i in range(more)]
        expanded = ([*part] for part in (self.x, self.out))
        first, second = (
            [label for each in part for label in (dots if each == "." else [each])]
            for part in expanded
        )
        return first, second


def _as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
