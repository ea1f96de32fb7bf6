"""Which layers can be quantized, and all that depends on their type.

To add a type of layer: derive from :class:`LayerType`, and name it in :data:`LAYER_TYPES`.
Conversion, taps, budgets and the estimators of whole networks follow.
"""

from __future__ import annotations

import abc
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from fqt_jax.binarize import weight_scale
from fqt_jax.kernels.contract import Window
from fqt_jax.layers import (
    ConvGeometry,
    QuantConv,
    QuantConvTranspose,
    QuantEinsum,
    QuantLinear,
    QuantLinearGeneral,
)
from fqt_jax.layers.dense import MatrixProduct
from fqt_jax.modules import Place, find_modules
from fqt_jax.recipe import Recipe
from fqt_jax.windows import explicit_padding, per_axis


class LayerType(abc.ABC):
    """A type of layer, in float and quantized, and what is special about it.

    Layers of both types hold their weights as ``kernel`` and map one array to one array. Quantized
    ones hold their :class:`fqt_jax.Recipe` as ``recipe`` and a learned scale as ``scale``.

    Attributes:
      float_type, quantized_type: the two types.
      is_dense: whether the last one in a model is taken for its classifier.
    """

    float_type: ClassVar[type[nnx.Module]]
    quantized_type: ClassVar[type[nnx.Module]]
    is_dense: ClassVar[bool] = False

    @property
    def kind(self) -> str:
        """The float type's name."""
        return self.float_type.__name__

    def obstacle(self, layer: Any) -> str | None:
        """Why a float layer has no quantized counterpart; ``None`` if it has one."""
        if type(layer) is not self.float_type:
            return f"{type(layer).__name__} is a subclass with behaviour of its own"
        for product in (lax.dot_general, lax.conv_general_dilated, jnp.einsum):
            name = "einsum_op" if product is jnp.einsum else product.__name__
            if getattr(layer, name, None) not in (None, product):
                return f"it has a {name} of its own"
        if getattr(layer, "preferred_element_type", None) is not None:
            return "it has a preferred_element_type"
        if getattr(layer, "mask", None) is not None:
            return "it is masked"
        return None

    def float_reason(self, layer: Any) -> str | None:
        """Why a layer stays in float unless a rule says otherwise; ``None`` if it does not."""
        return None

    def why_slow(self, layer: Any) -> str:
        """What a float layer is that the integer kernels have no form for; empty if they have."""
        return ""

    def quantized(
        self, layer: Any, recipe: Recipe, implementation: str | None, rngs: nnx.Rngs
    ) -> Any:
        """The quantized counterpart of a float layer, with the parameters of that layer.

        Args:
          layer: one without :meth:`obstacle`. Its parameters may be those of several layers,
            stacked by ``nnx.vmap``; then so are those of the counterpart, and its streams.
          recipe: what is quantized and how.
          implementation: name of the kernels' implementation; ``None`` picks the best.
          rngs: the streams that random rounding draws from.
        """
        kernel = layer.kernel[...]
        stacked = kernel.shape[: kernel.ndim - self.kernel_ndim(layer)]
        first = kernel.reshape(-1, *kernel.shape[len(stacked) :])[:1]
        new: Any = self.build(
            layer,
            recipe=recipe,
            dtype=layer.dtype,
            kernel_init=lambda *_: first.reshape(kernel.shape[len(stacked) :]),
            implementation=implementation,
            rngs=rngs,
        )
        new.kernel, new.bias = layer.kernel, layer.bias
        if stacked:
            self._stack(new, stacked)
        return new

    @abc.abstractmethod
    def build(self, layer: Any, **options: Any) -> Any:
        """The quantized counterpart of a float layer, given what all types take."""

    def kernel_ndim(self, layer: Any) -> int:
        """The number of axes of the weights of one layer."""
        return 2

    @abc.abstractmethod
    def input_images(self, layer: Any, x: jax.Array) -> jax.Array:
        """An input as the layer's product sees it, ``[N, H, W, C]``.

        All axes of the batch together are the samples.
        """

    def output_images(self, layer: Any, y: jax.Array) -> jax.Array:
        """An output in the same way."""
        return self.input_images(layer, y)

    @abc.abstractmethod
    def window(self, layer: Any, size: tuple[int, int]) -> Window | None:
        """The window of the layer's product, for an input image of this height and width.

        ``None`` where the integer kernels have no form for the product.

        Args:
          layer: a quantized layer, or one without :meth:`obstacle`.
          size: ``(H, W)``.
        """

    def terms(self, layer: Any) -> int:
        """How many products each entry of the output sums, padding included."""
        return math.prod(layer.kernel.shape[:-1])

    def matrix(self, layer: Any, kernel: jax.Array) -> jax.Array:
        """The weights of a layer as ``[terms, O]``."""
        return kernel.reshape(-1, kernel.shape[-1])

    def mean_abs(self, layer: Any) -> jax.Array:
        """The scale of the weights that is not learned, ``[O]``."""
        return weight_scale(self.matrix(layer, layer.kernel[...]))

    def _stack(self, new: Any, lead: tuple[int, ...]) -> None:
        """Makes parameters and streams of one layer those of stacked layers."""
        n = math.prod(lead)
        if new.scale is not None and new.recipe.scale == "learned_from_one":
            new.scale = nnx.Param(jnp.broadcast_to(new.scale[...], (*lead, *new.scale.shape)))
        elif new.scale is not None:
            kernels = new.kernel[...].reshape(n, *new.kernel.shape[len(lead) :])

            def scale_of(kernel: jax.Array) -> jax.Array:
                new.kernel = nnx.Param(kernel)
                return self.mean_abs(new)

            stacked, scales = new.kernel, jnp.stack([scale_of(kernel) for kernel in kernels])
            new.kernel, new.scale = stacked, nnx.Param(scales.reshape(*lead, -1))
        for name in ("threshold", "spread"):
            value = getattr(new, name)
            if value is not None:
                stacked = jnp.broadcast_to(value[...], (*lead, *value.shape))
                setattr(new, name, type(value)(stacked))
        if new.rounding is not None:
            new.rounding.key = nnx.RngKey(
                jax.random.split(new.rounding.key[...], lead), tag="rounding"
            )
            new.rounding.count = nnx.RngCount(jnp.zeros(lead, jnp.uint32), tag="rounding")


class Linear(LayerType):
    """Dense layers."""

    float_type = nnx.Linear
    quantized_type = QuantLinear
    is_dense = True

    def build(self, layer: Any, **options: Any) -> Any:
        """Of the same features."""
        use_bias = layer.bias is not None
        return self.quantized_type(
            layer.in_features, layer.out_features, use_bias=use_bias, **options
        )

    def input_images(self, layer: Any, x: jax.Array) -> jax.Array:
        """Images of one position."""
        return x.reshape(-1, 1, 1, x.shape[-1])

    def window(self, layer: Any, size: tuple[int, int]) -> Window:
        """One position."""
        return Window()


class LinearGeneral(LayerType):
    """Dense layers over several axes; the projections of an attention are such."""

    float_type = nnx.LinearGeneral
    quantized_type = QuantLinearGeneral
    is_dense = True

    def obstacle(self, layer: Any) -> str | None:
        """Batch axes besides."""
        batched = "its kernel has batch axes" if layer.batch_axis else None
        return super().obstacle(layer) or batched

    def build(self, layer: Any, **options: Any) -> Any:
        """Over the same axes."""
        return QuantLinearGeneral(
            layer.in_features,
            layer.out_features,
            axis=layer.axis,
            use_bias=layer.bias is not None,
            **options,
        )

    def kernel_ndim(self, layer: Any) -> int:
        """As many as there are features in and out."""
        return len(layer.in_features) + len(layer.out_features)

    def input_images(self, layer: Any, x: jax.Array) -> jax.Array:
        """Images of one position."""
        axes = [axis % x.ndim for axis in layer.axis]
        rest = [axis for axis in range(x.ndim) if axis not in axes]
        return x.transpose(*rest, *axes).reshape(-1, 1, 1, math.prod(layer.in_features))

    def output_images(self, layer: Any, y: jax.Array) -> jax.Array:
        """Images of one position."""
        return y.reshape(-1, 1, 1, math.prod(layer.out_features))

    def window(self, layer: Any, size: tuple[int, int]) -> Window:
        """One position."""
        return Window()

    def terms(self, layer: Any) -> int:
        """The features of the input."""
        return math.prod(layer.in_features)

    def matrix(self, layer: Any, kernel: jax.Array) -> jax.Array:
        """All axes that are summed over as one, and all others."""
        return kernel.reshape(math.prod(layer.in_features), -1)


class Einsum(LayerType):
    """Matrix products in Einstein's notation."""

    float_type = nnx.Einsum
    quantized_type = QuantEinsum
    is_dense = True

    def obstacle(self, layer: Any) -> str | None:
        """Strings that stand for something else."""
        why = super().obstacle(layer)
        if why is None and layer.einsum_str is None:
            why = "its string is given in the call"
        if why is None:
            try:
                MatrixProduct.of(layer.einsum_str)
            except ValueError as error:
                why = str(error).rstrip(".")
        return why

    def build(self, layer: Any, **options: Any) -> Any:
        """With the same string."""
        bias_shape = None if layer.bias is None else layer.bias_shape
        return QuantEinsum(layer.einsum_str, layer.kernel_shape, bias_shape, **options)

    def kernel_ndim(self, layer: Any) -> int:
        """Those of the string."""
        return len(self._parsed(layer).w)

    def input_images(self, layer: Any, x: jax.Array) -> jax.Array:
        """Images of one position."""
        parsed = self._parsed(layer)
        labels, _ = parsed.resolved(x.ndim)
        rows = [label for label in labels if label not in parsed.summed]
        x = x.transpose(*(labels.index(label) for label in (*rows, *parsed.summed)))
        return x.reshape(-1, 1, 1, self.terms(layer))

    def output_images(self, layer: Any, y: jax.Array) -> jax.Array:
        """Images of one position."""
        parsed = self._parsed(layer)
        more = y.ndim - (len(parsed.out) - parsed.out.count("."))
        ndim = len(parsed.x) - parsed.x.count(".") + more
        labels, out = parsed.resolved(ndim)
        rows = [label for label in labels if label not in parsed.summed]
        y = y.transpose(*(out.index(label) for label in (*rows, *parsed.new)))
        return y.reshape(-1, 1, 1, layer.kernel.size // self.terms(layer))

    def window(self, layer: Any, size: tuple[int, int]) -> Window:
        """One position."""
        return Window()

    def terms(self, layer: Any) -> int:
        """The sizes of the axes that are summed over."""
        parsed = self._parsed(layer)
        shape = layer.kernel.shape[-len(parsed.w) :]
        return math.prod(n for label, n in zip(parsed.w, shape, strict=True) if label in parsed.x)

    def matrix(self, layer: Any, kernel: jax.Array) -> jax.Array:
        """All axes that are summed over as one, and all others."""
        return self._parsed(layer).matrix(kernel).reshape(self.terms(layer), -1)

    def _parsed(self, layer: Any) -> MatrixProduct:
        parsed: MatrixProduct | None = getattr(layer, "parsed", None)
        return parsed or MatrixProduct.of(layer.einsum_str)


class Conv(LayerType):
    """Convolutions of one to three dimensions, dilated and grouped ones too."""

    float_type = nnx.Conv
    quantized_type = QuantConv

    def float_reason(self, layer: Any) -> str | None:
        """Shortcuts stay in float, as in the paper's code."""
        return "1x1 convolution" if set(layer.kernel_size) == {1} else None

    def why_slow(self, layer: Any) -> str:
        """All but plain convolutions of images and of sequences."""
        return self._geometry(layer).why_general

    def build(self, layer: Any, **options: Any) -> Any:
        """Of the same geometry."""
        geometry = self._geometry(layer)
        return QuantConv(
            layer.in_features,
            layer.out_features,
            layer.kernel_size,
            geometry.strides,
            padding=geometry.padding,
            input_dilation=geometry.input_dilation,
            kernel_dilation=geometry.kernel_dilation,
            feature_group_count=geometry.groups,
            use_bias=layer.bias is not None,
            **options,
        )

    def kernel_ndim(self, layer: Any) -> int:
        """The window, and the channels of input and output."""
        return len(layer.kernel_size) + 2

    def input_images(self, layer: Any, x: jax.Array) -> jax.Array:
        """Images; of one row for one spatial axis, and with the first two of three joined."""
        *height, width, channels = x.shape[1 - layer.kernel.ndim :]
        return x.reshape(-1, math.prod(height), width, channels)

    def window(self, layer: Any, size: tuple[int, int]) -> Window | None:
        """The convolution's, with padding made explicit."""
        return self._geometry(layer).window(layer.kernel.shape[:-2], size)

    def _geometry(self, layer: Any) -> ConvGeometry:
        if isinstance(layer, QuantConv):
            return layer.geometry
        axes = len(layer.kernel_size)
        dilation = per_axis("kernel_dilation", layer.kernel_dilation, axes)
        return ConvGeometry(
            per_axis("strides", layer.strides, axes),
            explicit_padding(layer.padding, layer.kernel_size, dilation),
            per_axis("input_dilation", layer.input_dilation, axes),
            dilation,
            layer.feature_group_count,
        )


class ConvTranspose(LayerType):
    """Transposed convolutions."""

    float_type = nnx.ConvTranspose
    quantized_type = QuantConvTranspose

    def obstacle(self, layer: Any) -> str | None:
        """What has no counterpart."""
        why = super().obstacle(layer)
        if why is None and layer.transpose_kernel:
            why = "its kernel is transposed"
        if (
            why is None
            and isinstance(layer.padding, str)
            and layer.padding not in ("SAME", "VALID")
        ):
            why = f"its padding is {layer.padding}"
        return why

    def why_slow(self, layer: Any) -> str:
        """All."""
        return "a transposed convolution"

    def build(self, layer: Any, **options: Any) -> Any:
        """Of the same geometry."""
        axes = len(layer.kernel_size)
        return QuantConvTranspose(
            layer.in_features,
            layer.out_features,
            layer.kernel_size,
            per_axis("strides", layer.strides, axes),
            padding=layer.padding,
            kernel_dilation=per_axis("kernel_dilation", layer.kernel_dilation, axes),
            use_bias=layer.bias is not None,
            **options,
        )

    def kernel_ndim(self, layer: Any) -> int:
        """The window, and the channels of input and output."""
        return len(layer.kernel_size) + 2

    def input_images(self, layer: Any, x: jax.Array) -> jax.Array:
        """As those of a convolution."""
        *height, width, channels = x.shape[1 - layer.kernel.ndim :]
        return x.reshape(-1, math.prod(height), width, channels)

    def window(self, layer: Any, size: tuple[int, int]) -> None:
        """None."""


LAYER_TYPES: list[LayerType] = [Conv(), ConvTranspose(), Linear(), LinearGeneral(), Einsum()]
"""The types of layers that can be quantized."""


def type_of(layer: Any) -> LayerType:
    """The entry of :data:`LAYER_TYPES` for a layer, float or quantized.

    Raises:
      TypeError: there is none.
    """
    for each in LAYER_TYPES:
        if isinstance(layer, (each.float_type, each.quantized_type)):
            return each
    raise TypeError(f"{type(layer).__name__} is no layer that can be quantized.")


def float_layers(model: Any) -> list[Place]:
    """The layers of a model in float that have a quantized type."""
    return find_modules(model, tuple(each.float_type for each in LAYER_TYPES))


def quantized_layers(model: Any) -> list[Place]:
    """The layers of a model that were quantized, those in full precision included."""
    return find_modules(model, tuple(each.quantized_type for each in LAYER_TYPES))


def all_layers(model: Any) -> list[Place]:
    """The layers of a model of either kind."""
    kinds = [kind for each in LAYER_TYPES for kind in (each.float_type, each.quantized_type)]
    return find_modules(model, tuple(kinds))
