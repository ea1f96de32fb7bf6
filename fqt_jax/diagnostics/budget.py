"""What a model costs under its recipes: bits an entry, and bytes that backward keeps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, get_args

import jax
from flax import nnx

from fqt_jax.diagnostics.taps import LayerShape, layer_shapes
from fqt_jax.kernels.contract import sum_dtype
from fqt_jax.recipe import Product
from fqt_jax.text import format_table

_FLOAT_BITS = 32


@dataclasses.dataclass(frozen=True)
class LayerBudget:
    """The cost of one layer in one training step.

    Bits of gradients count the codes alone; each kept group adds its minimum and range, and its
    index and weight where groups are pruned, 8 or 16 bytes.

    Attributes:
      path: where the layer stands in the model.
      weights: number of weights, without the bias.
      weight_bits: of a weight in the products.
      activations: number of entries of the layer's input.
      activation_bits: of an entry of the input in the products.
      input_gradient_bits: of an entry of the output's gradient on the way to the input, on
        average.
      weight_gradient_bits: the same on the way to the weights.
      saved_bytes: what the layer keeps from forward for backward: bits of the signs, of the clip
        mask, and the integer sums that the scale's gradient needs; or the input in float.
      float_saved_bytes: the same for the layer in float.
    """

    path: str
    weights: int
    weight_bits: int
    activations: int
    activation_bits: int
    input_gradient_bits: float
    weight_gradient_bits: float
    saved_bytes: int
    float_saved_bytes: int


class Budget(tuple[LayerBudget, ...]):
    """The cost of each layer, in the order in which they are called; prints as a table.

    Activations, norms and pooling between the layers keep what they keep in float and are not
    counted.
    """

    @property
    def weight_bytes(self) -> int:
        """All weights as they are stored for use: signs bit by bit, the rest in float."""
        return sum(math.ceil(layer.weights * layer.weight_bits / 8) for layer in self)

    @property
    def saved_bytes(self) -> int:
        """What all layers together keep for backward."""
        return sum(layer.saved_bytes for layer in self)

    @property
    def float_saved_bytes(self) -> int:
        """What all layers would keep in float."""
        return sum(layer.float_saved_bytes for layer in self)

    COLUMNS: ClassVar[dict[str, Callable[[LayerBudget], str]]] = {
        "layer": lambda layer: layer.path or "(model)",
        "weights": lambda layer: f"{layer.weights:,}",
        "weight bits": lambda layer: str(layer.weight_bits),
        "inputs": lambda layer: f"{layer.activations:,}",
        "input bits": lambda layer: str(layer.activation_bits),
        "gradient bits": lambda layer: (
            f"{layer.input_gradient_bits:.3g} / {layer.weight_gradient_bits:.3g}"
        ),
        "kept, KiB": lambda layer: (
            f"{layer.saved_bytes / 1024:.1f} of {layer.float_saved_bytes / 1024:.1f}"
        ),
    }

    def __str__(self) -> str:
        rows = [[cell(layer) for cell in self.COLUMNS.values()] for layer in self]
        table = format_table(tuple(self.COLUMNS), rows)
        total = (
            f"weights {self.weight_bytes / 1024:.1f} KiB "
            f"(float: {4 * sum(layer.weights for layer in self) / 1024:.1f}), kept for backward "
            f"{self.saved_bytes / 1024:.1f} KiB (float: {self.float_saved_bytes / 1024:.1f})"
        )
        return f"{table}\n{total}"


def budget(model: nnx.Module, x: jax.Array | jax.ShapeDtypeStruct) -> Budget:
    """Bits and bytes of a model's convolutions and dense layers on a batch.

    Args:
      model: any Flax NNX model; layers that are not quantized count in float.
      x: a batch, or its shape and type; nothing is computed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import fqt_jax as fqt
      >>> from fqt_jax.models import VGG
      >>> net = VGG(((8, 8),), num_classes=10, in_features=1, rngs=nnx.Rngs(0))
      >>> model, _ = fqt.quantize(net, fqt.FQT1)
      >>> print(budget(model, jax.ShapeDtypeStruct((4, 6, 6, 1), jnp.float32)))
      layer              weights  weight bits  inputs  input bits  gradient bits   kept, KiB
      --------------------------------------------------------------------------------------
      features/layers/0       72           32     144          32        32 / 32  0.6 of 0.6
      features/layers/3      576            1   1,152           1          1 / 1  2.5 of 4.5
      head                    80           32      32          32        32 / 32  0.1 of 0.1
      weights 0.7 KiB (float: 2.8), kept for backward 3.2 KiB (float: 5.2)
    """
    return Budget(_layer_budget(layer) for layer in layer_shapes(model, x))


def _layer_budget(layer: LayerShape) -> LayerBudget:
    recipe = layer.recipe
    n, _, _, o = layer.output
    entries = math.prod(layer.input)
    as_float = entries * _FLOAT_BITS // 8
    saved, weight_bits = as_float, _FLOAT_BITS
    if recipe.binary and not recipe.binary_weights:
        saved += entries if recipe.clip else 0  # signs in float, the mask as bytes
    elif recipe.binary:
        weight_bits = 1
        # Packed sample by sample, in words of 32.
        words = 4 * n * math.ceil(math.prod(layer.input[1:]) / 32)
        saved = words * (2 if recipe.clip else 1)
        if recipe.scale != "none":
            saved += math.prod(layer.output) * sum_dtype(layer.terms).itemsize
    quantizer = recipe.gradient
    to_input = to_weight = float(_FLOAT_BITS)
    if quantizer is not None:
        to_input, to_weight = (
            quantizer.bits * quantizer.kept_part(product, samples=n, channels=o)
            for product in get_args(Product)
        )
    counts: dict[str, Any] = {
        "weights": math.prod(layer.kernel),
        "weight_bits": weight_bits,
        "activations": entries,
        "activation_bits": 1 if recipe.binary else _FLOAT_BITS,
    }
    return LayerBudget(
        layer.path,
        **counts,
        input_gradient_bits=to_input,
        weight_gradient_bits=to_weight,
        saved_bytes=saved,
        float_saved_bytes=as_float,
    )
