"""Diagnoses of the quantized gradients in the course of a training run."""

from __future__ import annotations

import base64
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import Dataset
from experiments.runs.config import RunConfig
from experiments.runs.kinds import kind_of
from experiments.show.gradients import plot_time
from fqt_jax import diagnostics
from fqt_jax.diagnostics.taps import seen_layers
from fqt_jax.training import TrainState, merge_model
from fqt_jax.tree import leaf_name

_SAMPLES = 64
_PASSES = 8

Signs = dict[str, np.ndarray]


class Diagnosis:
    """Diagnoses a run's model on one batch, before training and after each epoch.

    It changes nothing in the run, and resumes with it: what it remembers of the epoch's start, the
    signs of the weights, goes into the run's checkpoints.

    Args:
      config: the options of the run, whose recipe is binary.
      dataset: its data; the first training samples are the batch.
      graphdef, state: its model before training.
    """

    def __init__(self, config: RunConfig, dataset: Dataset, graphdef: Any, state: TrainState):
        inputs = kind_of(dataset).first(dataset, dataset.train, _SAMPLES)
        seen_layers(merge_model(graphdef, state), inputs)  # raises where it cannot see them all
        self._title = f"{config.dataset}, {config.model} x{config.width:g}, {config.variant}"
        self._warned = False
        self._signs = _signs(state)
        self._diagnose = functools.partial(
            diagnostics.diagnose,
            graphdef,
            images=inputs,
            labels=jnp.asarray(dataset.train.labels[:_SAMPLES]),
            key=jax.random.key(config.seed + 1),
            passes=_PASSES,
        )

    def after_epoch(self, state: TrainState) -> dict[str, float]:
        """What :func:`fqt_jax.diagnostics.diagnose` finds, sign flips of the epoch included."""
        signs = _signs(state)
        found: dict[str, float] = self._diagnose(state)
        for name, ratio in diagnostics.sign_flip_ratio(self._signs, signs).items():
            path = "/".join(name.split(".")[:-1])
            if f"{path}/gradient_norm" in found:
                found[f"{path}/sign_flip_ratio"] = ratio
        self._signs = signs
        return found

    def report(self, history: list[dict[str, Any]], folder: pathlib.Path) -> None:
        """Prints a line on the last epoch, a warning once, and draws ``diagnosis.png``."""
        found = history[-1]["diagnosis"]
        flips = [v for name, v in found.items() if name.endswith("/sign_flip_ratio")]
        print(
            f"  noise / signal of the quantized layers' gradient "
            f"{found['all/kernel_noise_to_signal']:.2f}, signs that flipped "
            f"{min(flips):.1%} to {max(flips):.1%}",
            flush=True,
        )
        warning = diagnostics.stall_warning(found)
        if warning and not self._warned:
            print(f"warning: {warning}", flush=True)
            self._warned = True
        plot_time(history, folder / "diagnosis.png", self._title)

    def to_json(self) -> dict[str, Any]:
        """What it remembers: one bit a weight."""
        return {
            name: {"shape": signs.shape, "bits": _base64(signs > 0)}
            for name, signs in self._signs.items()
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes up what :meth:`to_json` wrote."""
        for name, entry in saved.items():
            packed = np.frombuffer(base64.b64decode(entry["bits"]), np.uint8)
            bits = np.unpackbits(packed, count=int(np.prod(entry["shape"])))
            self._signs[name] = bits.reshape(entry["shape"]).astype(np.int8) * 2 - 1


def _base64(bits: np.ndarray) -> str:
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def _signs(state: TrainState) -> Signs:
    """The signs of the kernels, copied, since a step donates its state."""
    leaves = {leaf_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(state.params)}
    return {
        name: np.where(np.asarray(x) >= 0, 1, -1).astype(np.int8)
        for name, x in leaves.items()
        if name.endswith("kernel")
    }
