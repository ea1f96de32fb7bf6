"""Writes the model of a run to one file.

    python -m experiments.export runs/finetune-digits --out digits.safetensors
    python -m experiments.export runs/finetune-digits --out digits.onnx

A .safetensors file holds a bit for each binary weight, and what python -m experiments.predict needs
to feed it. A .onnx file is of standard operators, for other runtimes; it takes normalized images
[N, H, W, C]. Before a file is kept it must compute what the run's model does on test images: bit
for bit, or to rounding in ONNX and where there are no native kernels.
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import numpy as np
import tyro
from flax import nnx

from experiments import cli
from experiments.data.dataset import import_extra
from experiments.runs import exporting, folders, tasks
from experiments.runs.config import RunConfig
from experiments.runs.finetuning import FinetuneConfig
from experiments.runs.kinds import kind_of
from experiments.runs.pretraining import PretrainConfig
from experiments.runs.saved_config import config_from_json
from fqt_jax import export
from fqt_jax.checkpoints import load_parameters, read_metadata
from fqt_jax.kernels import native
from fqt_jax.models import TOKEN_MODELS

_KINDS: dict[str, type[RunConfig]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
_NO_ONNX = (*TOKEN_MODELS, "lstm", "gru")
_CHECKED = 32


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What is written, and where."""

    run: tyro.conf.Positional[pathlib.Path]
    """The folder of a run, or a checkpoint in it."""
    out: pathlib.Path
    """The file; it must not exist."""

    def __post_init__(self) -> None:
        if self.out.suffix not in (".safetensors", ".onnx"):
            raise cli.UserError(f"out must end in .safetensors or .onnx; got {self.out}.")
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
    if not options.build_recipe().binary_weights:
        raise cli.UserError(
            f"{config.run} has float weights, the first of two steps: fine-tune it with binary "
            "weights first."
        )
    if config.out.suffix == ".onnx" and options.model in _NO_ONNX:
        raise cli.UserError(
            f"{options.model} cannot be written as .onnx: that takes images, and has no loops."
        )
    dataset = tasks.load_dataset(options)
    if isinstance(options, FinetuneConfig) and options.weights is not None:
        dataset = tasks.normalized_for(dataset, options.weights)
    model = tasks.build_task(options, dataset, None).model
    load_parameters(checkpoint, model)
    model.eval()
    about = exporting.description(options, dataset)
    kind = kind_of(dataset)
    inputs = kind.first(dataset, dataset.test, _CHECKED)
    expected = np.asarray(nnx.jit(lambda model, x: model(x))(model, inputs))
    try:
        if config.out.suffix == ".onnx":
            size = export.to_onnx(model, config.out, ("B", *inputs.shape[1:]), about)
            found = _run_onnx(config.out, np.asarray(inputs))
            is_same = np.allclose(found, expected, rtol=1e-3, atol=1e-3)
            how = "to rounding"
        else:
            size = export.save(model, config.out, about)
            loaded = export.load(config.out, exporting.builder(about))
            found = np.asarray(export.inference(loaded)(inputs))
            is_same, how = np.array_equal(found, expected), "bit for bit"
            if not is_same and native.unavailable() is not None:
                # XLA alone fuses the two programs as it likes, and rounds accordingly.
                is_same, how = np.allclose(found, expected, rtol=1e-5, atol=1e-5), "to rounding"
        if not is_same:
            raise RuntimeError(f"{config.out} does not compute what the model of the run does.")
    except BaseException:
        config.out.unlink(missing_ok=True)
        raise
    held = jax.tree.leaves(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    floats = sum(4 * array.size for array in held)
    print(
        f"{config.out}: {size / 1024:.1f} KiB, 1/{floats / size:.1f} of {floats / 1024:.1f} KiB in "
        f"float; the same logits, {how}, on {len(inputs)} test {kind.samples}"
    )


def _run_onnx(path: pathlib.Path, images: np.ndarray) -> np.ndarray:
    session = import_extra("onnxruntime", "onnx").InferenceSession(path)
    return np.asarray(session.run(None, {session.get_inputs()[0].name: np.asarray(images)})[0])


if __name__ == "__main__":
    cli.run(main, ExportConfig)
