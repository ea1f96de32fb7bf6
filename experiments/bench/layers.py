"""Kernel by kernel: the time and the exactness of the integer products on a model's layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import machine
from experiments.bench.contenders import LayerShape, Setting, layers_of
from experiments.bench.steps import say, summarize, timed
from fqt_jax import kernels
from fqt_jax.binarize import PackedBits
from fqt_jax.convert import quantize
from fqt_jax.grouping import roundings
from fqt_jax.kernels import native
from fqt_jax.kernels.contract import UnsupportedError, Window
from fqt_jax.recipe import FQT1, QAT
from fqt_jax.rounding import seeds_from_key

PRODUCTS = ("forward", "input_grad", "weight_grad channels", "weight_grad shared")
"""Under FQT1; the weight gradient as pruned by channels (the paper) and by the shared samples."""

CHECKED = (*PRODUCTS, "input_grad float", "weight_grad float")
"""The same and the gradients that are not quantized, as QAT uses them."""

TOLERANCE = 2e-5
"""Of the largest entry of a group. A code that is off by one stands out more than that."""

_DOT_ENTRIES = 2**25
"""Entries of the larger operand of the fp32 product; a longer one is timed in part and scaled."""


@dataclasses.dataclass(frozen=True)
class Operands:
    """Random operands of a layer's products, with FQT1's draws for both ways of pruning."""

    layer: LayerShape
    x: PackedBits
    w: PackedBits
    g: jax.Array
    rounding: dict[str, Any]

    @classmethod
    def random(cls, layer: LayerShape, seed: int) -> Operands:
        """Signs and a gradient whose samples and channels differ in size, as in training."""
        rng = np.random.default_rng(seed)
        size = (*window_of(layer).size, layer.input[3], layer.output[3])
        scales = [np.exp(rng.standard_normal(n, np.float32)) for n in layer.output[::3]]
        normal = rng.standard_normal(layer.output, np.float32)
        g = jnp.asarray(normal * scales[0][:, None, None, None] * scales[1])
        seeds = seeds_from_key(jax.random.key(seed), 4)
        assert FQT1.gradient is not None
        for_input, for_channels = roundings(g, FQT1.gradient, seeds)
        _, for_shared = roundings(g, dataclasses.replace(FQT1.gradient, prune="shared"), seeds)
        return cls(
            layer,
            PackedBits.pack(jnp.asarray(rng.random(layer.input) < 0.5)),
            PackedBits.pack(jnp.asarray(rng.random(size) < 0.5), batch_ndim=0),
            g,
            {
                "input_grad": for_input,
                "weight_grad channels": for_channels,
                "weight_grad shared": for_shared,
            },
        )

    def on(self, device: jax.Device) -> Operands:
        """The same on a device."""
        x, w, g, rounding = jax.device_put((self.x, self.w, self.g, self.rounding), device)
        return Operands(self.layer, x, w, g, rounding)

    def product(self, name: str, implementation: str) -> Callable[[], jax.Array]:
        """One of :data:`CHECKED`, compiled, as a call that waits for its result.

        Raises:
          UnsupportedError: the implementation does not serve it.
        """
        window, size = window_of(self.layer), self.layer.input[1:3]
        rounding = self.rounding.get(name)
        operands: tuple[Any, ...] = (self.g, self.x, rounding)

        def weight_grad(g: Any, x: Any, rounding: Any) -> jax.Array:
            return kernels.weight_grad(g, x, rounding, window, implementation=implementation)

        def input_grad(g: Any, w: Any, rounding: Any) -> jax.Array:
            return kernels.input_grad(g, w, rounding, window, size, implementation=implementation)

        def forward(x: Any, w: Any) -> jax.Array:
            return kernels.forward(x, w, window, implementation=implementation)

        function: Callable[..., jax.Array] = weight_grad
        if name.startswith("input_grad"):
            function, operands = input_grad, (self.g, self.w, rounding)
        elif name == "forward":
            function, operands = forward, (self.x, self.w)
        compiled = jax.jit(function).lower(*operands).compile()
        return lambda: jax.block_until_ready(compiled(*operands))

    def native_form(self, name: str) -> str:
        """How the native kernels compute one of :data:`PRODUCTS`."""
        layer = self.layer
        return native.product_form(
            name.split()[0], layer.input, layer.output[3], window_of(layer), self.rounding.get(name)
        )


def window_of(layer: LayerShape) -> Window:
    """The window of a layer that can be quantized, as all of our models can."""
    assert layer.window is not None
    return layer.window


def quantized_layers(setting: Setting) -> list[tuple[LayerShape, int]]:
    """The distinct shapes among the layers that a recipe quantizes, and how often each occurs."""
    binary: set[str] = set()

    def convert() -> None:
        _, table = quantize(setting.create_model(), QAT, example=setting.example)
        binary.update(row.path for row in table if row.recipe.binary)

    jax.eval_shape(convert)
    found: dict[Any, tuple[LayerShape, int]] = {}
    for layer in layers_of(setting):
        if layer.path in binary:
            key = dataclasses.replace(layer, path="")
            first, count = found.get(key, (layer, 0))
            found[key] = (first, count + 1)
    return list(found.values())


def dot_shape(layer: LayerShape, product: str) -> tuple[int, int, int]:
    """``(m, k, n)`` of the matrix product with as many multiply-adds as a layer's product.

    That is the convolution's own by im2col, with the samples or the channels that FQT1 keeps.
    """
    assert FQT1.gradient is not None
    n, height, width, o = layer.output
    taps = layer.terms
    if product == "forward":
        return n * height * width, taps, o
    if product == "weight_grad channels":
        return taps, n * height * width, FQT1.gradient.kept(o)
    rows = FQT1.gradient.kept(n) * height * width
    return (rows, o, taps) if product == "input_grad" else (taps, rows, o)


def measure_layers(
    setting: Setting, implementations: Sequence[str], *, warmup: int, repeats: int
) -> dict[str, Any]:
    """Times each product of each distinct quantized layer, and an fp32 dot of the same size.

    Returns:
      ``layers``, a list with ``path``, ``shape``, ``count`` and, for each product,
      ``g_products``, ``dot`` (summary in ms), ``native_form`` (how ``native`` computed it, or
      ``None``) and by implementation a summary in ms, or the reason why it does not serve the case;
      ``totals`` over all layers; ``dot_rate``.
    """
    shapes = quantized_layers(setting)
    layers = []
    for i, (layer, count) in enumerate(shapes):
        text = _shape_text(layer)
        say(f"  {layer.path} {text} ({i + 1} of {len(shapes)})")
        operands = Operands.random(layer, i)
        entry: dict[str, Any] = {"path": layer.path, "shape": text, "count": count}
        entry["products"] = {
            name: _measure_product(operands, name, implementations, warmup, repeats)
            for name in PRODUCTS
        }
        layers.append(entry)
    return {
        "dot_rate": machine.dot_rate(),
        "layers": layers,
        "totals": layer_totals(layers, implementations),
    }


def _measure_product(
    operands: Operands, name: str, implementations: Sequence[str], warmup: int, repeats: int
) -> dict[str, Any]:
    m, k, n = dot_shape(operands.layer, name)
    dot, factor = _dot(m, k, n)
    runs: dict[str, Callable[[], Any]] = {"dot": dot}
    declined: dict[str, str] = {}
    for each in implementations:
        try:
            runs[each] = operands.product(name, each)
        except UnsupportedError as error:
            declined[each] = str(error)
    for _ in range(warmup):
        for run in runs.values():
            run()
    samples: dict[str, list[float]] = {each: [] for each in runs}
    for _ in range(repeats):
        for each, run in runs.items():
            samples[each].append(timed(run) * (factor if each == "dot" else 1.0))
    times = {each: summarize(s) for each, s in samples.items()}
    return {
        "g_products": m * k * n / 1e9,
        "dot": times.pop("dot"),
        "implementations": times,
        "declined": declined,
        "native_form": operands.native_form(name) if "native" in times else None,
    }


def _dot(m: int, k: int, n: int) -> tuple[Callable[[], Any], float]:
    """An fp32 matrix product, or a part of it whose operand is not too large, and the factor."""
    part_m, part_k = m, k
    if m >= k:
        part_m = min(m, max(1, _DOT_ENTRIES // k))
    else:
        part_k = min(k, max(1, _DOT_ENTRIES // m))
    factor = m * k / (part_m * part_k)
    # Values do not matter to the time, except that denormal numbers would.
    a, b = np.ones((part_m, part_k), np.float32), np.ones((part_k, n), np.float32)
    if jax.default_backend() == "cpu":
        out = np.empty((part_m, n), np.float32)
        return (lambda: np.dot(a, b, out=out)), factor
    compiled = jax.jit(lambda u, v: jax.lax.dot(u, v, precision="highest"))
    on_device = jax.device_put((a, b))
    return (lambda: compiled(*on_device).block_until_ready()), factor


def layer_totals(
    layers: Sequence[dict[str, Any]], implementations: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """For each product, ms over all layers (each as often as it occurs): of the dot and by name.

    An implementation that declined a layer has ``None``.
    """
    totals: dict[str, dict[str, Any]] = {}
    for name in PRODUCTS:
        entries = [(layer["products"][name], layer["count"]) for layer in layers]
        times: dict[str, float | None] = {}
        for each in implementations:
            if any(each in entry["declined"] for entry, _ in entries):
                times[each] = None
                continue
            times[each] = sum(c * e["implementations"][each]["median"] for e, c in entries)
        totals[name] = {
            "g_products": sum(c * e["g_products"] for e, c in entries),
            "dot": sum(c * e["dot"]["median"] for e, c in entries),
            "implementations": times,
        }
    return totals


def check(
    setting: Setting, implementations: Sequence[str], *, repeats: int
) -> Iterator[dict[str, Any]]:
    """Compares every product of every implementation with the ``xla`` reference on the CPU.

    Forward sums must be equal; gradients agree to :data:`TOLERANCE` of the largest entry of each
    sample (input) or output channel (weights), finer than one wrong code.

    Yields:
      for each implementation and product: ``exact`` (forward) or ``close``, ``difference``, the
      time in ms over all distinct layers and that of ``xla`` on the same device, and ``declined``,
      the reasons of layers that it does not serve.
    """
    shapes = [layer for layer, _ in quantized_layers(setting)]
    every = [Operands.random(layer, i) for i, layer in enumerate(shapes)]
    cpu = jax.local_devices(backend="cpu")[0]
    for name in CHECKED:
        expected = []
        for operands in every:
            with jax.default_device(cpu):
                on_cpu = operands.on(cpu)
                expected.append(np.asarray(on_cpu.product(name, "xla")()))
        reference = [_median_time(operands.product(name, "xla"), repeats) for operands in every]
        for each in implementations:
            result: dict[str, Any] = {"implementation": each, "product": name, "layers": 0}
            result |= {"difference": 0.0, "ms": 0.0, "xla_ms": 0.0, "declined": []}
            for operands, want, xla_ms in zip(every, expected, reference, strict=True):
                try:
                    run = operands.product(name, each)
                except UnsupportedError as error:
                    result["declined"].append(f"{operands.layer.path}: {error}")
                    continue
                result["layers"] += 1
                result["difference"] = max(
                    result["difference"], difference(np.asarray(run()), want, name)
                )
                result["ms"] += _median_time(run, repeats)
                result["xla_ms"] += xla_ms
            limit = 0.0 if name == "forward" else TOLERANCE
            result["ok"] = result["difference"] <= limit
            yield result


def difference(got: np.ndarray, want: np.ndarray, product: str) -> float:
    """Largest difference: absolute for sums, relative to the group's largest entry otherwise.

    Infinite where the type, the shape or a place that is not a number differs.
    """
    if got.dtype != want.dtype or got.shape != want.shape:
        return math.inf
    delta = np.abs(got.astype(np.float64) - want.astype(np.float64))
    if not np.isfinite(delta).all():
        return math.inf
    if product == "forward":
        return float(delta.max(initial=0.0))
    axes = (1, 2, 3) if product.startswith("input_grad") else (0, 1, 2)
    largest = np.abs(want).max(axes, keepdims=True).astype(np.float64)
    return float((delta / np.maximum(largest, np.finfo(np.float32).tiny)).max(initial=0.0))


def _median_time(run: Callable[[], Any], repeats: int) -> float:
    run()
    return float(np.median([timed(run) for _ in range(repeats)]))


def _shape_text(layer: LayerShape) -> str:
    (n, h, w, c), o = layer.input, layer.output[3]
    kh, kw = window_of(layer).size
    stride = window_of(layer).strides[0]
    return f"{n}x{h}x{w}x{c}, {kh}x{kw}" + (f"/{stride}" if stride > 1 else "") + f" to {o}"
