"""Which parts of a sequence of layers fuse, and why the others do not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fqt_jax.layers import QuantConv, QuantLayer, QuantLinear
from fqt_jax.norms import RowNorm
from fqt_jax.pooling import max_pool

Kind = Literal["product", "float product", "batch norm", "layer norm", "act", "pool", "other"]


class Part(NamedTuple):
    """One layer of a sequence.

    Attributes:
      layer: the layer.
      kind: what it is to a fused run.
      why: why it does not fuse, where it is of the kind ``"other"``.
    """

    layer: Any
    kind: Kind
    why: str = ""


class GapParts(NamedTuple):
    """What stands before, between and after products; places in the sequence, or ``None``."""

    norm: int | None = None
    act: int | None = None
    pool: int | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing."""
        return self == GapParts()

    @property
    def length(self) -> int:
        """Number of layers."""
        return sum(place is not None for place in self)


class Run(NamedTuple):
    """A stretch of a sequence that is computed in fused form.

    Attributes:
      start, stop: its places.
      first: place of a float convolution that begins it.
      gaps: what stands around the products, one more than there are of these.
      products: their places.
    """

    start: int
    stop: int
    first: int | None
    gaps: tuple[GapParts, ...]
    products: tuple[int, ...]


_FEW_CHANNELS = 16

_ACTIVATIONS: dict[Callable[..., Any], float] = {
    nnx.relu: 0.0,
    jax.nn.relu: 0.0,
    nnx.leaky_relu: 0.01,
    jax.nn.leaky_relu: 0.01,
    nnx.identity: 1.0,
}
"""Slopes of the functions that are linear on either side of zero."""

_RELUS = (nnx.relu, jax.nn.relu)

_NEVER_NEGATIVE = (
    *_RELUS,
    nnx.relu6,
    jax.nn.relu6,
    nnx.sigmoid,
    jax.nn.sigmoid,
    nnx.hard_sigmoid,
    jax.nn.hard_sigmoid,
    nnx.softplus,
    jax.nn.softplus,
    nnx.softmax,
    jax.nn.softmax,
    jnp.abs,
    jnp.square,
    jnp.exp,
)


def slope_of(act: Any) -> float | None:
    """The slope of an activation function for negative numbers; ``None`` if it has not one."""
    function, options = act, {}
    if isinstance(act, functools.partial):
        function, options = act.func, dict(act.keywords)
        if act.args or not options.keys() <= {"negative_slope"}:
            return None
    try:
        slope = _ACTIVATIONS.get(function)
    except TypeError:  # not hashable
        return None
    slope = options.get("negative_slope", slope) if slope is not None else None
    return slope if isinstance(slope, int | float) else None


def zero_is_below(act: Any) -> bool:
    """Whether the slope at zero is that of negative numbers; of JAX's ReLU it is."""
    return any(act is relu for relu in _RELUS)


def is_never_negative(act: Any) -> bool:
    """Whether an activation function is known to return no negative number."""
    function = act.func if isinstance(act, functools.partial) else act
    return any(function is each for each in _NEVER_NEGATIVE)


def pool_size(layer: Any) -> int | None:
    """The size of a square max-pooling whose windows do not overlap; ``None`` for all else."""
    if not isinstance(layer, functools.partial) or layer.func not in (nnx.max_pool, max_pool):
        return None
    options = dict(layer.keywords)
    if layer.func is max_pool:
        size = options.get("size", layer.args[0] if layer.args else None)
        return size if isinstance(size, int) and len(layer.args) + len(options) == 1 else None
    if layer.args or options.pop("padding", "VALID") != "VALID":
        return None
    window = tuple(options.pop("window_shape", ()))
    strides = tuple(options.pop("strides", None) or (1, 1))
    if options or len(window) != 2 or window != strides or window[0] != window[1]:
        return None
    return int(window[0])


def recognize(layer: Any) -> Part:
    """What a layer is to a fused run."""
    if isinstance(layer, QuantLayer):
        if layer.kernel.size == 0:
            return Part(layer, "other", "it has no weights")
        if type(layer) not in (QuantConv, QuantLinear):
            return Part(layer, "other", f"{type(layer).__name__} has behaviour of its own")
        if isinstance(layer, QuantConv) and layer.geometry.is_general:
            return Part(layer, "other", f"{layer.geometry.why_general} is computed in float")
        if isinstance(layer, QuantConv) and len(layer.kernel_size) != 2:
            return Part(layer, "other", "only convolutions of images fuse")
        if layer.recipe.weights == "float":
            return Part(layer, "other", "its weights are float")
        return Part(layer, "product" if layer.recipe.binary else "float product")
    if isinstance(layer, nnx.BatchNorm):
        why = _why_not_norm(layer)
        return Part(layer, "other", why) if why else Part(layer, "batch norm")
    if isinstance(layer, nnx.LayerNorm):
        why = _why_not_layer_norm(layer)
        return Part(layer, "other", why) if why else Part(layer, "layer norm")
    if type(layer) is nnx.PReLU or slope_of(layer) is not None:
        return Part(layer, "act")
    if pool_size(layer) is not None:
        return Part(layer, "pool")
    return Part(layer, "other", _why_not(layer))


def _why_not_norm(norm: nnx.BatchNorm) -> str:
    if type(norm) not in (nnx.BatchNorm, RowNorm):
        return f"{type(norm).__name__} is a subclass of BatchNorm with behaviour of its own"
    if norm.axis_index_groups is not None:
        return "its statistics are of groups of devices"
    if norm.axis != -1:
        return "it does not normalize the last axis"
    if norm.dtype not in (None, jnp.float32):
        return f"it computes in {jnp.dtype(norm.dtype).name}"
    return ""


def _why_not_layer_norm(norm: nnx.LayerNorm) -> str:
    if type(norm) is not nnx.LayerNorm:
        return f"{type(norm).__name__} is a subclass of LayerNorm with behaviour of its own"
    if norm.axis_name is not None:
        return "its statistics are of several devices"
    if any(axes not in (-1, (-1,), [-1]) for axes in (norm.reduction_axes, norm.feature_axes)):
        return "it does not normalize the last axis alone"
    if norm.dtype not in (None, jnp.float32):
        return f"it computes in {jnp.dtype(norm.dtype).name}"
    return ""


def _why_not(layer: Any) -> str:
    if isinstance(layer, nnx.Conv | nnx.Linear):
        return "it is not quantized"
    if isinstance(layer, nnx.PReLU):
        return "it is a subclass of PReLU with behaviour of its own"
    function = layer.func if isinstance(layer, functools.partial) else layer
    if function in (nnx.max_pool, max_pool):
        return "only square windows that neither overlap nor are padded fuse"
    if function in (nnx.avg_pool,):
        return "an average is not the maximum of a window"
    if isinstance(layer, nnx.Module):
        return f"{type(layer).__name__} is not one of the layers that fuse"
    name = getattr(function, "__name__", type(function).__name__)
    if name == "<lambda>":
        return "a lambda cannot be looked into; functools.partial can"
    return f"{name} is not linear on either side of one kink"


def is_cheap(layer: Any) -> bool:
    """Whether the backward pass computes a float convolution again, rather than keep its output.

    That of images is: its output has many times their channels, in float, and is the largest array
    by far that a binary network would keep.
    """
    shape = layer.kernel.shape
    return (
        isinstance(layer, QuantConv)
        and layer.bias is None
        and shape[:2] != (1, 1)
        and shape[2] < _FEW_CHANNELS
    )


def plan(parts: Sequence[Part]) -> list[Run | int]:
    """The sequence as fused runs and places of layers that are called as they are."""
    steps: list[Run | int] = []
    place = 0
    while place < len(parts):
        run = _read_run(parts, place)
        steps.append(place if run is None else run)
        place = place + 1 if run is None else run.stop
    return steps


def _read_run(parts: Sequence[Part], start: int) -> Run | None:
    """The longest fused run from a place on; ``None`` if there is none."""
    place, first = start, None
    follows_float = start > 0 and parts[start - 1].kind == "float product"
    if parts[start].kind == "float product":
        if not is_cheap(parts[start].layer):
            return None
        first, place = start, start + 1
    pools = first is not None or _next_product_is_conv(parts, place)
    gaps = [_read_gap(parts, place, pools)]
    place += gaps[0].length
    products: list[int] = []
    while place < len(parts) and parts[place].kind == "product":
        if products and not _go_together(parts[products[-1]].layer, parts[place].layer):
            break
        if (
            not products
            and first is not None
            and not _go_together(parts[first].layer, parts[place].layer)
        ):
            break
        products.append(place)
        pools = isinstance(parts[place].layer, QuantConv)
        gaps.append(_read_gap(parts, place + 1, pools))
        place += 1 + gaps[-1].length
    is_worth_it = bool(products) or (
        (first is not None or follows_float)
        and (gaps[0].norm is not None or gaps[0].act is not None)
    )
    if not is_worth_it:
        return None
    return Run(start, place, first, tuple(gaps), tuple(products))


def _next_product_is_conv(parts: Sequence[Part], place: int) -> bool:
    """Whether what is pooled here are images, as far as the layers around tell."""
    around = [part.layer for part in parts[place:] if part.kind.endswith("product")][:1]
    around += [part.layer for part in parts[:place] if part.kind.endswith("product")][-1:]
    return bool(around) and isinstance(around[0], QuantConv)


def _go_together(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one.implementation == other.implementation


def _read_gap(parts: Sequence[Part], start: int, pools: bool) -> GapParts:
    found: dict[str, int] = {}
    for place in range(start, len(parts)):
        kind = _GAP_KINDS.get(parts[place].kind)
        if kind is None or kind in found or "pool" in found:
            break
        if kind == "pool" and not pools:
            break
        found[kind] = place
    norm = found.get("norm")
    if norm is not None and parts[norm].kind == "layer norm":
        # Its statistics are those of a position, which only the signs after it are made with.
        after = start + len(found)
        if "pool" in found or after == len(parts) or parts[after].kind != "product":
            found = {kind: place for kind, place in found.items() if place < norm}
    return GapParts(**found)


_GAP_KINDS = {"batch norm": "norm", "layer norm": "norm", "act": "act", "pool": "pool"}
