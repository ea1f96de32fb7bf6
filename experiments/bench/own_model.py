"""What fusion is worth in a model of one's own: three forms of one network, side by side.

    python -m experiments.bench.own_model

The library's small VGG, a plain ``nnx.Sequential`` of the same layers, and a class that calls them
one by one, each quantized by ``fqt_jax.quantize`` and trained by FQT1 with Adam.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import fqt_jax as fqt
from experiments import cli
from experiments.show.formats import Table
from fqt_jax.models import VGGSmall
from fqt_jax.optimizers import adam
from fqt_jax.training import CrossEntropy, create_state, make_train_step

_CHANNELS = ((32, 32), (64, 64), (128, 128))


@dataclasses.dataclass(frozen=True)
class OwnModelConfig:
    """What is measured."""

    batch_size: int = 64
    """Images in a step."""
    image_size: int = 32
    """Height and width of the images."""
    repeats: int = 15
    """Steps of each form, which take turns; the median counts."""

    def __post_init__(self) -> None:
        for name, lowest in (("batch_size", 1), ("image_size", 8), ("repeats", 1)):
            if getattr(self, name) < lowest:
                raise cli.UserError(f"{name} must be at least {lowest}; got {getattr(self, name)}.")


def _layers(rngs: nnx.Rngs) -> list[Any]:
    layers: list[Any] = []
    inputs = 3
    for stage in _CHANNELS:
        for outputs in stage:
            layers += [
                nnx.Conv(inputs, outputs, (3, 3), use_bias=False, rngs=rngs),
                nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs),
                nnx.PReLU(0.25),
            ]
            inputs = outputs
        layers.append(functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2)))
    return [*layers, functools.partial(jnp.mean, axis=(1, 2)), nnx.Linear(inputs, 10, rngs=rngs)]


class _CalledInTurn(nnx.Module):
    """The layers, called one by one."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List(_layers(rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


FORMS: dict[str, Callable[[nnx.Rngs], Any]] = {
    "fqt_jax.models.VGGSmall": lambda rngs: VGGSmall(num_classes=10, rngs=rngs),
    "nnx.Sequential": lambda rngs: nnx.Sequential(*_layers(rngs)),
    "a class, layer by layer": _CalledInTurn,
}
"""The forms by name."""


def measure(config: OwnModelConfig) -> dict[str, tuple[float, float]]:
    """Milliseconds of a step, and MiB of its temporaries, of each form."""
    size = config.image_size
    batch = {
        "image": jax.random.normal(jax.random.key(0), (config.batch_size, size, size, 3)),
        "label": jnp.arange(config.batch_size) % 10,
    }
    optimizer, key = adam(1e-3), jax.random.key(1)
    steps: dict[str, Any] = {}
    states: dict[str, Any] = {}
    memory: dict[str, float] = {}
    times: dict[str, list[float]] = {}
    for name, build in FORMS.items():
        model, _ = fqt.quantize(build(nnx.Rngs(0)), fqt.FQT1)
        graphdef, states[name] = create_state(model, optimizer)
        train = make_train_step(graphdef, optimizer, loss=CrossEntropy(num_classes=10))
        compiled = train.jitted.lower(states[name], batch, key).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        steps[name], times[name] = compiled, []
    for _ in range(config.repeats + 1):
        for name, compiled in steps.items():
            began = time.perf_counter()
            states[name], loss = compiled(states[name], batch, key)
            loss.block_until_ready()
            jax.block_until_ready(states[name])
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: (statistics.median(times[name][1:]), memory[name]) for name in FORMS}


def main(config: OwnModelConfig) -> None:
    """Runs the experiment."""
    rows = [[name, f"{ms:.1f}", f"{mib:.1f}"] for name, (ms, mib) in measure(config).items()]
    title = (
        f"Step of FQT1 with Adam, batch {config.batch_size}, {config.image_size}x"
        f"{config.image_size}; median of {config.repeats}"
    )
    print(Table(title, ["model", "step, ms", "temporaries, MiB"], rows))


if __name__ == "__main__":
    cli.run(main, OwnModelConfig)
