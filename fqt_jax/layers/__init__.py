"""Quantized layers as Flax NNX modules."""

from fqt_jax.layers.base import QuantLayer as QuantLayer
from fqt_jax.layers.conv import ConvGeometry as ConvGeometry
from fqt_jax.layers.conv import QuantConv as QuantConv
from fqt_jax.layers.conv_transpose import QuantConvTranspose as QuantConvTranspose
from fqt_jax.layers.dense import QuantEinsum as QuantEinsum
from fqt_jax.layers.dense import QuantLinear as QuantLinear
from fqt_jax.layers.dense import QuantLinearGeneral as QuantLinearGeneral
