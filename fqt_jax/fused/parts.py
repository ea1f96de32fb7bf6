"""What a chain is made of: static descriptions, and the arrays that go with them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax

from fqt_jax.binarize import PackedBits
from fqt_jax.kernels.contract import Window
from fqt_jax.recipe import Recipe

Order = Literal["norm_act", "act_norm"]
Norm = Literal["batch", "layer"]


class Gap(NamedTuple):
    """What stands before, between and after products: a norm and an activation of two slopes,
    either way round, then max-pooling over windows that do not overlap. Static.

    Attributes:
      norm: batch norm, over samples and positions, or layer norm, over the channels of a position;
        ``None`` for none. Layer norm stands before products alone, and there is no pooling with it.
      order: which of norm and activation comes first.
      pool: size of the pooling windows; a remainder is left out.
      slope: of the activation where its input is negative; 1 for none, ``None`` for a parameter.
      zero_is_below: whether the slope at zero is that of negative numbers, as for ReLU.
      epsilon: of the norm.
      uses_running: whether batch norm takes its running statistics, not those of the batch.
      axes: of the mesh over whose devices batch norm takes its statistics; ``None`` for one's own.
    """

    norm: Norm | None = None
    order: Order = "norm_act"
    pool: int = 1
    slope: float | None = 1.0
    zero_is_below: bool = False
    epsilon: float = 0.0
    uses_running: bool = False
    axes: str | tuple[str, ...] | None = None


class GapParams(NamedTuple):
    """Parameters of a gap, each ``None`` where there is none.

    Attributes:
      bias: of the product before it, ``[O]``.
      gamma, beta: of the norm, ``[C]``.
      slope: of the activation where its input is negative, a scalar.
      threshold, spread: of the signs that the product after it takes, ``[C]``: those of
        ``(t - threshold) / spread``.
    """

    bias: jax.Array | None = None
    gamma: jax.Array | None = None
    beta: jax.Array | None = None
    slope: jax.Array | None = None
    threshold: jax.Array | None = None
    spread: jax.Array | None = None


class Running(NamedTuple):
    """Statistics that a batch norm holds.

    Attributes:
      mean, var: ``[C]``.
      weights: of the rows that the gradient of the statistics goes to, ``float32[N]``.
    """

    mean: jax.Array
    var: jax.Array
    weights: jax.Array | None = None


class Statistics(NamedTuple):
    """Mean and variance of a batch, ``float32[C]``."""

    mean: jax.Array
    var: jax.Array


class Link(NamedTuple):
    """A product. Static."""

    recipe: Recipe
    window: Window


class Chain(NamedTuple):
    """``gaps[0]``, ``links[0]``, ``gaps[1]``, ..., ``gaps[-1]``. Static.

    Attributes:
      gaps: one more than there are links.
      links: the binary products.
      first: a float convolution before all else, whose output is not kept but computed again.
      x_dtype: type of the input.
      dtype: type of the output.
      has_residual: whether something is added to the output.
      implementation: of the kernels.
    """

    gaps: tuple[Gap, ...]
    links: tuple[Link, ...]
    first: Link | None
    x_dtype: Any
    dtype: Any
    has_residual: bool
    implementation: str | None


class Weights(NamedTuple):
    """Parameters of a product: ``kernel[kh, kw, C, O]`` and the learned scale ``[O]``."""

    kernel: jax.Array
    scale: jax.Array | None = None


class Operands(NamedTuple):
    """The arrays of a chain; lists are in the order of its gaps or links."""

    x: jax.Array | None  # None once it has served
    first: jax.Array | None  # kernel of the float convolution before all else
    weights: list[Weights]
    params: list[GapParams]
    running: list[Running | None]
    seeds: list[list[jax.Array] | None]  # of each product that rounds its gradient
    residual: jax.Array | None = None  # added to the output, float32


class Kept(NamedTuple):
    """What waits for the backward pass; for each entry, two bits, and mostly an integer sum.

    Attributes:
      operands: without the residual, and without ``x`` where nothing after it needs it.
      sums: of each product, where what follows it needs them, and they are not computed again.
      signs, clips: of the input of each product; ``clips`` where the recipe cuts gradients off.
      w_signs: of the weights of each product.
      scales: of the input of each gap that does anything to a gradient.
      moments: of the input of each gap whose batch norm takes statistics of it.
    """

    operands: Operands
    sums: list[jax.Array | None]
    signs: list[PackedBits]
    clips: list[PackedBits | None]
    w_signs: list[PackedBits]
    scales: list[jax.Array | None]
    moments: list[Any]
