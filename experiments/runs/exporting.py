"""What stands in the file of a trained model besides its arrays, and the model that it is of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from experiments.cli import UserError
from experiments.data import Dataset
from experiments.data.images import to_rgb
from experiments.data.views import View, central, whole
from experiments.runs.config import RunConfig
from experiments.runs.kinds import kind_of
from experiments.runs.tasks import model_options
from fqt_jax.convert import quantize
from fqt_jax.models import create_model
from fqt_jax.recipe import QAT


def description(config: RunConfig, dataset: Dataset) -> dict[str, Any]:
    """All that tells how to build the model of a run, and what to feed it."""
    recipe = config.build_recipe()
    return {
        "model": model_options(config, dataset),
        # How gradients are quantized makes no difference to what is computed.
        "recipe": {name: getattr(recipe, name) for name in ("scale", "clip", "threshold")},
        **kind_of(dataset).description(dataset),
        "classes": class_names(dataset),
        "dataset": dataset.name,
    }


def class_names(dataset: Dataset) -> list[str]:
    """Those that the data set has, or its numbers."""
    names = getattr(dataset, "class_names", None)
    return list(names) if names else [str(label) for label in range(dataset.num_classes)]


def builder(about: dict[str, Any]) -> Callable[[], Any]:
    """A function that builds the quantized model of a description.

    Raises:
      UserError: the description is not one of a run.
    """
    try:
        model, recipe = dict(about["model"]), dataclasses.replace(QAT, **about["recipe"])
        tokens = about.get("tokens")
    except (KeyError, TypeError, ValueError):
        raise UserError(
            "the file does not say which model it is of: it was not written by experiments.export."
        ) from None

    example = None if tokens is None else jax.ShapeDtypeStruct((1, tokens), jnp.uint8)

    def build() -> Any:
        return quantize(create_model(rngs=nnx.Rngs(0), **model), recipe, example=example).model

    return build


def read_images(paths: list[Any], about: dict[str, Any]) -> np.ndarray:
    """Images as the model takes them, ``float32[N, H, W, C]``.

    Raises:
      UserError: a file is missing, or no image; or the model takes none.
    """
    if "image_size" not in about:
        raise UserError("the model takes text, and no images.")
    size = tuple(about["image_size"])
    view: View = central if about.get("view") == "central" else whole
    mean, std = (np.asarray(about[name], np.float32) for name in ("mean", "std"))
    rows = []
    for path in paths:
        try:
            with Image.open(path) as file:
                image = to_rgb(file).convert("L" if len(mean) == 1 else "RGB")
        except (OSError, SyntaxError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise UserError(f"{path}: {reason.rstrip('.')}.") from None
        rows.append(view(image, size)[..., : len(mean)])
    return (np.stack(rows).astype(np.float32) - mean) / std
