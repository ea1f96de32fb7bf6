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

from fqt_jax.kernels.contract import Window
from fqt_jax.layers import QuantConv, QuantLinear
from fqt_jax.modules import Place, find_modules
from fqt_jax.recipe import Recipe
from fqt_jax.windows import resolve_window


class LayerType(abc.ABC):
    """A type of layer, in float and quantized, and what is special about it.

    Layers of both types hold their weights as ``kernel``, whose last axis is that of the output
    channels, and map one array to one array. Quantized ones hold their :class:`fqt_jax.Recipe`
    as ``recipe`` and a learned scale as ``scale``.

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
        if any(
            jnp.dtype(d or jnp.float32) != jnp.float32 for d in (layer.dtype, layer.param_dtype)
        ):
            return "it does not compute in float32"
        for product in (lax.dot_general, lax.conv_general_dilated):
            if getattr(layer, product.__name__, product) is not product:
                return f"it has a {product.__name__} of its own"
        return None

    def float_reason(self, layer: Any) -> str | None:
        """Why a layer stays in float unless a rule says otherwise; ``None`` if it does not."""
        return None

    def quantized(
        self, layer: Any, recipe: Recipe, implementation: str | None, rngs: nnx.Rngs
    ) -> Any:
        """The quantized counterpart of a float layer, with the parameters of that layer.

        Args:
          layer: one without :meth:`obstacle`.
          recipe: what is quantized and how.
          implementation: name of the kernels' implementation; ``None`` picks the best.
          rngs: the streams that random rounding draws from.
        """
        new: Any = self.quantized_type(
            layer.in_features,
            layer.out_features,
            use_bias=layer.bias is not None,
            recipe=recipe,
            kernel_init=lambda *_: layer.kernel[...],
            implementation=implementation,
            rngs=rngs,
            **self.options(layer),
        )
        new.kernel, new.bias = layer.kernel, layer.bias
        return new

    @abc.abstractmethod
    def options(self, layer: Any) -> dict[str, Any]:
        """The options of a float layer that its quantized counterpart takes by the same names."""

    @abc.abstractmethod
    def as_images(self, layer: Any, a: jax.Array) -> jax.Array:
        """An input or output as the layer's product sees it, ``[N, H, W, C]``.

        All axes of the batch together are the samples.
        """

    @abc.abstractmethod
    def window(self, layer: Any, size: tuple[int, int]) -> Window:
        """The window of the layer's product, for an input image of this height and width.

        Args:
          layer: a quantized layer, or one without :meth:`obstacle`.
          size: ``(H, W)``.
        """

    def terms(self, layer: Any) -> int:
        """How many products each entry of the output sums, padding included."""
        return math.prod(layer.kernel.shape[:-1])


class Linear(LayerType):
    """Dense layers."""

    float_type = nnx.Linear
    quantized_type = QuantLinear
    is_dense = True

    def options(self, layer: Any) -> dict[str, Any]:
        """None."""
        return {}

    def as_images(self, layer: Any, a: jax.Array) -> jax.Array:
        """Images of one position."""
        return a.reshape(-1, 1, 1, a.shape[-1])

    def window(self, layer: Any, size: tuple[int, int]) -> Window:
        """One position."""
        return Window()


class Conv(LayerType):
    """Convolutions."""

    float_type = nnx.Conv
    quantized_type = QuantConv

    def obstacle(self, layer: Any) -> str | None:
        """What the binary convolution has no form for."""
        shared = super().obstacle(layer)
        if shared is not None:
            return shared
        if len(layer.kernel_size) != 2:
            return f"it is a {len(layer.kernel_size)}-dimensional convolution"
        if layer.feature_group_count != 1:
            return "its features are grouped"
        for dilation in (layer.kernel_dilation, layer.input_dilation):
            if dilation not in (None, 1) and (isinstance(dilation, int) or set(dilation) != {1}):
                return "it is dilated"
        if layer.mask is not None:
            return "it is masked"
        if isinstance(layer.padding, str) and layer.padding not in ("SAME", "VALID"):
            return f"its padding is {layer.padding}"
        return None

    def float_reason(self, layer: Any) -> str | None:
        """Shortcuts stay in float, as in the paper's code."""
        return "1x1 convolution" if set(layer.kernel.shape[:-2]) == {1} else None

    def options(self, layer: Any) -> dict[str, Any]:
        """The window."""
        strides = 1 if layer.strides is None else layer.strides
        return {"kernel_size": layer.kernel_size, "strides": strides, "padding": layer.padding}

    def as_images(self, layer: Any, a: jax.Array) -> jax.Array:
        """Images; of one row for one spatial axis, and with the first two of three joined."""
        *height, width, channels = a.shape[1 - layer.kernel.ndim :]
        return a.reshape(-1, math.prod(height), width, channels)

    def window(self, layer: Any, size: tuple[int, int]) -> Window:
        """The convolution's, with padding made explicit."""
        strides = 1 if layer.strides is None else layer.strides
        return resolve_window(layer.kernel.shape[:2], size, strides, layer.padding)


LAYER_TYPES: list[LayerType] = [Conv(), Linear()]
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
