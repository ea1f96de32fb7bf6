"""Says what is in images, by a file that experiments.export wrote.

python -m experiments.predict digits.safetensors image1.png image2.jpg
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import numpy as np
import tyro

from experiments import cli
from experiments.runs import exporting
from fqt_jax import export
from fqt_jax.text import format_table

_BATCH = 64


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """The model, and the images."""

    model: tyro.conf.Positional[pathlib.Path]
    """A file that experiments.export wrote."""
    images: tyro.conf.Positional[tuple[pathlib.Path, ...]]
    """Images, in any form that Pillow reads."""
    top: int = 3
    """How many classes are told of each image, the most probable first."""

    def __post_init__(self) -> None:
        if not self.images:
            raise cli.UserError("name at least one image.")
        if self.top < 1:
            raise cli.UserError(f"top must be at least 1; got {self.top}.")


def main(config: PredictConfig) -> None:
    """Runs the command."""
    about = export.describe(config.model)
    build = exporting.builder(about)
    images = exporting.read_images(list(config.images), about)
    run = export.inference(export.load(config.model, build))
    logits = [run(images[i : i + _BATCH]) for i in range(0, len(images), _BATCH)]
    probabilities = np.asarray(jax.nn.softmax(np.concatenate(logits), axis=1))
    rows = []
    for path, each in zip(config.images, probabilities, strict=True):
        best = np.argsort(-each, kind="stable")[: config.top]
        rows.append([str(path), *(f"{about['classes'][i]} {each[i]:.1%}" for i in best)])
    heads = ["image", *(f"{n + 1}." for n in range(len(rows[0]) - 1))]
    print(format_table(heads, rows, names=1))


if __name__ == "__main__":
    cli.run(main, PredictConfig)
