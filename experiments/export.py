"""Writes the model of a run to one file of packed signs.

    python -m experiments.export runs/finetune-digits --out digits.safetensors

The file holds a bit for each binary weight, and what python -m experiments.predict needs to feed
it. Before it is kept it must compute what the run's model does, bit for bit, on test images.
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import numpy as np
import tyro
from flax import nnx

from experiments import cli
from experiments.data.augment import normalize
from experiments.runs import exporting, folders, tasks
from experiments.runs.config import RunConfig
from experiments.runs.finetuning import FinetuneConfig
from experiments.runs.pretraining import PretrainConfig
from experiments.runs.saved_config import config_from_json
from fqt_jax import export
from fqt_jax.checkpoints import load_parameters, read_metadata

_KINDS: dict[str, type[RunConfig]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
_CHECKED = 32


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What is written, and where."""

    run: tyro.conf.Positional[pathlib.Path]
    """The folder of a run, or a checkpoint in it."""
    out: pathlib.Path
    """The file; it must not exist."""

    def __post_init__(self) -> None:
        if self.out.suffix != ".safetensors":
            raise cli.UserError(f"out must end in .safetensors; got {self.out}.")
        if self.out.exists():
            raise cli.UserError(f"{self.out} exists already: choose another name.")
        if not self.out.absolute().parent.is_dir():
            raise cli.UserError(f"{self.out.parent} is no folder.")


def main(config: ExportConfig) -> None:
    """Runs the command."""
    checkpoint = folders.checkpoint_at(config.run)
    metadata = read_metadata(checkpoint)
    options = config_from_json(_KINDS[metadata["experiment"]], metadata["config"])
    if not options.build_recipe().binary:
        raise cli.UserError(f"{config.run} is in full precision: it has no signs to pack.")
    dataset = tasks.load_dataset(options)
    if isinstance(options, FinetuneConfig) and options.weights is not None:
        dataset = tasks.normalized_for(dataset, options.weights)
    model = tasks.build_task(options, dataset, None).model
    load_parameters(checkpoint, model)
    model.eval()
    about = exporting.description(options, dataset)
    size = export.save(model, config.out, about)
    try:
        images = normalize(dataset.test.first(_CHECKED), dataset.mean, dataset.std)
        loaded = export.load(config.out, exporting.builder(about))
        expected = nnx.jit(lambda model, x: model(x))(model, images)
        if not np.array_equal(export.inference(loaded)(images), expected):
            raise RuntimeError(f"{config.out} does not compute what the model of the run does.")
    except BaseException:
        config.out.unlink()
        raise
    held = jax.tree.leaves(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    floats = sum(4 * array.size for array in held)
    print(
        f"{config.out}: {size / 1024:.1f} KiB, 1/{floats / size:.1f} of {floats / 1024:.1f} KiB in "
        f"float; the same logits, bit for bit, on {len(images)} test images"
    )


if __name__ == "__main__":
    cli.run(main, ExportConfig)
