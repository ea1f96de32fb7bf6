"""Statistics of the gradients that a quantized model trains with, layer by layer.

    python -m experiments.gradient_statistics --recipe fqt1 --epochs 4

Trains a small model and, before training and after each epoch, diagnoses it on one batch: ranges
of the groups over samples and over channels, noise-to-signal, sign flips; and at the start and the
end the error of one-bit gradients per tensor, per sample and by AGP with each sampler, measured
against the exact formula. Writes JSON lines and pictures.

    python -m experiments.gradient_statistics --dataset pydoc --model gpt_small --width 0.25 \
        --diagnosed-images 8 --batch-size 32 --draws 2 --precision 1

is about text. Where a layer's samples are tokens, or patches, the errors are told for whole
sequences, or images, as samples too.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import cli
from experiments.data import Dataset
from experiments.runs import folders, tasks
from experiments.runs.batches import gathered, on_device
from experiments.runs.config import RunConfig
from experiments.runs.measuring import drop_image_size, load_in_memory
from experiments.runs.plain_training import plain_epochs
from experiments.runs.steps import build_eval_step, evaluate
from experiments.show import gradients as gradient_pictures
from experiments.show.formats import Table, show
from fqt_jax import diagnostics
from fqt_jax.diagnostics.taps import seen_layers
from fqt_jax.training import TrainState, merge_model


@dataclasses.dataclass(frozen=True)
class StatisticsConfig(RunConfig):
    """A training run from random values, without augmentation, and what is measured in it."""

    dataset: str = "mnist5k"
    """Data set, as for experiments.finetune."""
    model: str = "vgg_small"
    """Model: vgg_small, vgg11, vgg13, vgg16, vgg19, resnet18, resnet34, resnet50, mobilenet,
    vit_small; gpt_small (text); or of torchvision's form with ReLU: resnet18_torch, vgg16_torch,
    vgg16_bn_torch and the like."""
    width: float = 0.5
    """Factor on the model's number of channels."""
    image_size: int | None = 16
    """Images are resized to this. It has no effect on text."""
    learning_rate: float | None = 2e-3
    """Learning rate."""
    epochs: int = 4
    """Passes over the training data."""
    diagnosed_images: int = 64
    """Images, or sequences of text, of the batch that is diagnosed."""
    passes: int = 16
    """Backward passes that the noise of the weights' gradient is measured over."""
    draws: int = 500
    """Draws, to begin with, that each error of a quantized gradient is measured over; 0 leaves this
    out."""
    precision: float = 0.02
    """Draws are added until the standard error is at most this part of the measured error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        drop_image_size(self)
        if self.resume is not None:
            raise cli.UserError("gradient_statistics cannot resume: choose a new folder.")
        if self.draws < 0 or self.draws == 1:
            raise cli.UserError(f"draws must be 0 or at least 2; got {self.draws}.")
        if not self.precision > 0:
            raise cli.UserError(f"precision must be positive; got {self.precision}.")
        if self.diagnosed_images < 2 or self.passes < 1:
            raise cli.UserError("diagnosed_images must be at least 2 and passes at least 1.")
        if self.build_recipe().binary is False:
            raise cli.UserError("the recipe must be binary: full precision quantizes no gradient.")


class Batch(NamedTuple):
    """What is diagnosed: inputs as the model takes them, labels, and the key of all draws."""

    inputs: jax.Array
    labels: jax.Array
    key: jax.Array


def main(config: StatisticsConfig) -> None:
    """Runs the experiment."""
    began = time.perf_counter()
    dataset, kind = load_in_memory(config)
    if max(config.batch_size, config.diagnosed_images) > len(dataset.train):
        raise cli.UserError(f"there are only {len(dataset.train)} training {kind.samples}.")
    task = tasks.build_task(config, dataset, None)
    n = config.diagnosed_images
    batch = Batch(
        kind.first(dataset, dataset.train, n),
        jnp.asarray(dataset.train.labels[:n]),
        jax.random.key(config.seed + 1),
    )
    seen_layers(task.model, batch.inputs)  # raises where it cannot see them all
    folder = folders.run_folder(config, "gradients")
    print(task.table)
    print(diagnostics.budget(task.model, batch.inputs))
    records, graphdef, states = [], None, {}
    with (folder / "statistics.jsonl").open("w") as file:
        for epoch, graphdef, state, found in _train(config, dataset, task.model, batch):
            records.append(found)
            file.write(json.dumps(found) + "\n")
            file.flush()
            print(_line(found, config.epochs), flush=True)
            if epoch in (0, config.epochs):
                states[epoch] = _groups(graphdef, state, batch, config.passes)
    warning = diagnostics.stall_warning(records[-1]["diagnosis"])
    if warning:
        print(f"warning: {warning}")
    rows = [
        row
        for epoch, layers in states.items()
        for row in (_errors(config, epoch, layers, batch.key) if config.draws else [])
    ]
    folders.write_json(folder / "errors.json", rows)
    label = f"{config.dataset}, {config.model} x{config.width:g}, {config.recipe}"
    label = f"{label}, n = {n} {kind.samples}"
    gradient_pictures.plot_groups(states, folder / "ranges.png", label)
    gradient_pictures.plot_lorenz(states, folder / "lorenz.png", label)
    gradient_pictures.plot_time(
        records, folder / "over_time.png", f"{label}, {config.passes} passes"
    )
    if rows:
        gradient_pictures.plot_errors(
            rows,
            folder / "errors.png",
            f"{label}, {config.draws} draws or more",
        )
        show([summary(rows)])
    print(f"{time.perf_counter() - began:.0f} seconds; written to {folder}")


def _train(
    config: StatisticsConfig, dataset: Dataset, model: nnx.Module, batch: Batch
) -> Iterator[tuple[int, Any, TrainState, dict[str, Any]]]:
    """Yields (epoch, graphdef, state, record), from epoch 0, before training, to the last."""
    step, previous = None, None
    held_out = on_device(dataset, dataset.validation)
    for epoch, graphdef, state in plain_epochs(config, dataset, model):
        if step is None:
            step = build_eval_step(dataset, graphdef)
        validation = evaluate(step, state, gathered(held_out, config.batch_size))
        trained = state.metrics.means() if epoch else None
        yield (
            epoch,
            graphdef,
            state,
            {
                "epoch": epoch,
                "train_loss": trained and trained["loss"],
                "train_accuracy": trained and trained["accuracy"],
                "validation_accuracy": validation["accuracy"],
                "diagnosis": diagnostics.diagnose(
                    graphdef, state, *batch, passes=config.passes, previous=previous
                ),
            },
        )
        previous = jax.tree.map(jnp.copy, state.params)


def _line(found: dict[str, Any], epochs: int) -> str:
    ratio = found["diagnosis"]["all/kernel_noise_to_signal"]
    loss = "" if found["train_loss"] is None else f"loss {found['train_loss']:.4f}, "
    return (
        f"epoch {found['epoch']}/{epochs}: {loss}validation accuracy "
        f"{found['validation_accuracy']:.1%}, noise-to-signal of all weights' gradient {ratio:.2f}"
    )


def _groups(
    graphdef: Any, state: TrainState, batch: Batch, passes: int
) -> dict[str, diagnostics.LayerGradient]:
    model = merge_model(graphdef, state)
    return diagnostics.layer_gradients(
        model, batch.inputs, batch.labels, key=batch.key, passes=passes
    )


def _errors(
    config: StatisticsConfig,
    epoch: int,
    layers: dict[str, diagnostics.LayerGradient],
    key: jax.Array,
) -> list[dict[str, Any]]:
    """Measured and predicted errors of each layer's exact gradient, as parts of its square."""
    rows = []
    # Where a prediction is itself an average over drawn outcomes, it must be as precise.
    selections = int(np.clip(256 * (0.02 / config.precision) ** 2, 256, 4096))
    for i, (path, layer) in enumerate(layers.items()):
        square = float(np.sum(np.asarray(layer.exact_g, np.float64) ** 2))
        if square == 0:
            continue
        compared = _compared(layer.exact_g, config.diagnosed_images)
        for j, (name, (g, quantization)) in enumerate(compared.items()):
            predicted = quantization.predicted(g, selections)
            draw_key = jax.random.fold_in(key, 1000 * (i + 1) + j)
            measured, draws = _measure(config, g, quantization, draw_key)
            rows.append(
                {
                    "epoch": epoch,
                    "layer": path,
                    "quantization": name,
                    "rounding": predicted.rounding / square,
                    "mask": predicted.mask / square,
                    "bias": predicted.bias / square,
                    "predicted": predicted.total / square,
                    "measured": measured.mean / square,
                    "standard_error": measured.standard_error / square,
                    "ratio": measured.mean / predicted.total,
                    "draws": draws,
                }
            )
    return rows


def _compared(g: jax.Array, inputs: int) -> dict[str, tuple[jax.Array, diagnostics.Quantization]]:
    """What to quantize, and how. Where samples are tokens, whole inputs are samples too."""
    found = {name: (g, each) for name, each in diagnostics.COMPARED.items()}
    if g.shape[0] > inputs and g.shape[0] % inputs == 0:
        whole = g.reshape(inputs, -1, 1, g.shape[-1])
        for name, each in diagnostics.COMPARED.items():
            if each.product == "input" and each.quantizer.groups != "tensor":
                found[f"{name}, whole inputs"] = (whole, each)
    return found


def _measure(
    config: StatisticsConfig,
    g: jax.Array,
    quantization: diagnostics.Quantization,
    key: jax.Array,
) -> tuple[diagnostics.MeasuredError, int]:
    """The measured error, to the precision that was asked for, and the number of draws it took."""
    first = diagnostics.measured_error(g, quantization, key, config.draws)
    target = config.precision * first.mean
    blocks = min(200, math.ceil((first.standard_error / target) ** 2)) if target else 1
    means, errors = [first.mean], [first.standard_error]
    for i in range(1, blocks):
        block_key = jax.random.fold_in(key, i)
        more = diagnostics.measured_error(g, quantization, block_key, config.draws)
        means.append(more.mean)
        errors.append(more.standard_error)
    error = float(np.sqrt(np.mean(np.square(errors)) / len(errors)))
    return diagnostics.MeasuredError(float(np.mean(means)), error), len(means) * config.draws


def summary(rows: list[dict[str, Any]]) -> Table:
    """For each quantization, how far measured errors are from predicted ones, over all layers."""
    cells = []
    for name in dict.fromkeys(row["quantization"] for row in rows):
        own = [row for row in rows if row["quantization"] == name]
        off = [row["ratio"] - 1 for row in own]
        worst = max(off, key=abs)
        error = np.mean([row["predicted"] for row in own])
        cells.append([name, f"{error:.3f}", f"{worst:+.2%}", f"{np.mean(off):+.2%}"])
    worst = max((row["ratio"] - 1 for row in rows), key=abs)
    layers = len({(row["epoch"], row["layer"]) for row in rows})
    return Table(
        "Errors of one-bit gradients; deviation: measured / predicted - 1",
        ["quantization", "error / |g|^2", "worst deviation", "mean deviation"],
        cells,
        [f"largest deviation of {len(rows)} ({layers} gradients): {worst:+.2%}"],
    )


if __name__ == "__main__":
    cli.run(main, StatisticsConfig)
