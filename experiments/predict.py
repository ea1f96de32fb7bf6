"""Says what is in images, or continues a text, by a file that experiments.export wrote.

python -m experiments.predict digits.safetensors image1.png image2.jpg
python -m experiments.predict gpt.safetensors --prompt "The for statement"
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import cli
from experiments.data import text
from experiments.runs import exporting
from fqt_jax import export
from fqt_jax.generation import generate
from fqt_jax.text import format_table

_BATCH = 64
_TOP, _CHARACTERS, _TEMPERATURE, _SEED = 3, 400, 0.8, 0


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """The model, and the images or the text."""

    model: tyro.conf.Positional[pathlib.Path]
    """A file that experiments.export wrote."""
    images: tyro.conf.Positional[tuple[pathlib.Path, ...]] = ()
    """Images, in any form that Pillow reads."""
    top: int | None = None
    """How many classes are told of each image, the most probable first; the default is 3."""
    prompt: str | None = None
    """In place of images, a text that the model continues."""
    characters: int | None = None
    """How many characters it adds; the default is 400."""
    temperature: float | None = None
    """At 0 the most probable character follows; the higher, the more others do. The default is
    0.8."""
    seed: int | None = None
    """Decides which characters are drawn; the default is 0."""

    def __post_init__(self) -> None:
        if not self.images and self.prompt is None:
            raise cli.UserError("name at least one image, or give a --prompt.")
        if self.images and self.prompt is not None:
            raise cli.UserError("give either images, or a --prompt.")
        of_text = ("characters", "temperature", "seed")
        for name in of_text if self.prompt is None else ("top",):
            if getattr(self, name) is not None:
                kind = "images" if self.prompt is None else "text"
                raise cli.UserError(f"{name} has no effect on {kind}.")
        if self.prompt == "":
            raise cli.UserError("the prompt must have a character at least.")
        for name in ("top", "characters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise cli.UserError(f"{name} must be at least 1; got {value}.")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise cli.UserError(f"temperature must be from 0 on; got {self.temperature}.")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise cli.UserError(f"seed must be from 0 to {2**32 - 1}; got {self.seed}.")


def main(config: PredictConfig) -> None:
    """Runs the command."""
    about = export.describe(config.model)
    build = exporting.builder(about)
    if config.prompt is None:
        images = exporting.read_images(list(config.images), about)
        _classify(config, about, export.load(config.model, build), images)
        return
    if "tokens" not in about:
        raise cli.UserError("the model takes images, and no text.")
    print(config.prompt + _continued(config, about["tokens"], export.load(config.model, build)))


def _classify(config: PredictConfig, about: dict[str, Any], model: Any, images: np.ndarray) -> None:
    run = export.inference(model)
    logits = [run(images[i : i + _BATCH]) for i in range(0, len(images), _BATCH)]
    probabilities = np.asarray(jax.nn.softmax(np.concatenate(logits), axis=1))
    rows = []
    for path, each in zip(config.images, probabilities, strict=True):
        best = np.argsort(-each, kind="stable")[: config.top or _TOP]
        rows.append([str(path), *(f"{about['classes'][i]} {each[i]:.1%}" for i in best)])
    heads = ["image", *(f"{n + 1}." for n in range(len(rows[0]) - 1))]
    print(format_table(heads, rows, names=1))


def _continued(config: PredictConfig, length: int, model: Any) -> str:
    """What the model adds to the prompt."""
    tokens = generate(
        model,
        jnp.asarray(text.encode(config.prompt or ""))[None],
        config.characters or _CHARACTERS,
        length=length,
        key=jax.random.key(_SEED if config.seed is None else config.seed),
        temperature=_TEMPERATURE if config.temperature is None else config.temperature,
    )
    return text.decode(tokens[0])


if __name__ == "__main__":
    cli.run(main, PredictConfig)
