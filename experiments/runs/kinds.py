"""Kinds of data that a run trains on, images and text: all that depends on which it is."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from experiments.cli import UserError
from experiments.data import Dataset, Examples, Sequences, Streamed
from experiments.data.augment import augment, normalize
from experiments.data.text import NAMES as TEXTS
from fqt_jax.losses import CrossEntropy
from fqt_jax.metrics import Metric
from fqt_jax.models import TOKEN_MODELS, has_stem

if TYPE_CHECKING:
    from experiments.runs.config import RunConfig

Data = dict[str, jax.Array]
"""``"image"``, as bytes, or tokens as ``"x"``; and ``"label"``."""

Preprocess = Callable[[Data, jax.Array], Data]
"""``(batch, key) -> batch``: what a training step does to a batch before the model."""


class Kind(abc.ABC):
    """A kind of data. There is one object of each.

    Attributes:
      samples: what samples are called, more than one.
      pretrains: whether there is a pretraining on mnist5k, and weights of others.
      metrics: what steps sum besides the loss; methods of :class:`fqt_jax.training.CrossEntropy`.
      inputs: what the model's inputs are called in a batch.
    """

    samples: ClassVar[str]
    pretrains: ClassVar[bool]
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    inputs: ClassVar[str]

    def metrics_of(self, loss: CrossEntropy) -> Mapping[str, Metric]:
        """The metrics by name."""
        return {name: getattr(loss, name) for name in self.metrics}

    @abc.abstractmethod
    def check(self, config: RunConfig) -> None:
        """Checks a run's options, before data are read.

        Raises:
          UserError: the model is of another kind, or an option has no effect.
        """

    @abc.abstractmethod
    def training(self, config: RunConfig, dataset: Dataset) -> Preprocess | None:
        """What a training step does to a batch, augmentation included."""

    @abc.abstractmethod
    def evaluation(self, dataset: Dataset) -> Callable[[Data], Data] | None:
        """What an evaluation does to a batch, and training without augmentation."""

    @abc.abstractmethod
    def first(self, dataset: Dataset, examples: Examples, count: int) -> jax.Array:
        """The first examples of a split as the model takes them, at most ``count``."""

    @abc.abstractmethod
    def example(self, config: RunConfig, dataset: Dataset) -> jax.ShapeDtypeStruct | None:
        """What :func:`fqt_jax.quantize` is told that the model is called with."""

    @abc.abstractmethod
    def description(self, dataset: Dataset) -> dict[str, Any]:
        """What an exported model has to be fed."""

    @abc.abstractmethod
    def model_options(self, config: RunConfig, dataset: Dataset) -> dict[str, Any]:
        """What :func:`fqt_jax.models.create_model` needs besides classes and width."""

    @abc.abstractmethod
    def resolved(self, config: RunConfig, dataset: Dataset) -> dict[str, Any]:
        """What the options that are about this kind became, where they were left open."""


class Images(Kind):
    """Images, each with a class."""

    samples = "images"
    pretrains = True
    inputs = "image"

    def check(self, config: RunConfig) -> None:
        """Refuses models of text."""
        if config.model in TOKEN_MODELS:
            raise UserError(
                f"{config.model} takes text, and {config.dataset} has images: choose the data set "
                f"{' or '.join(TEXTS)}."
            )

    def training(self, config: RunConfig, dataset: Dataset) -> Preprocess:
        """Flips and crops, and normalization."""
        flip, pad = augmentation(config, dataset)

        def preprocess(batch: Data, key: jax.Array) -> Data:
            images = augment(batch["image"], key, flip=flip, pad=pad)
            return batch | {"image": normalize(images, dataset.mean, dataset.std)}

        return preprocess

    def evaluation(self, dataset: Dataset) -> Callable[[Data], Data]:
        """Normalization."""

        def preprocess(batch: Data) -> Data:
            return batch | {"image": normalize(batch["image"], dataset.mean, dataset.std)}

        return preprocess

    def first(self, dataset: Dataset, examples: Examples, count: int) -> jax.Array:
        """Normalized."""
        return normalize(jnp.asarray(examples.first(count)), dataset.mean, dataset.std)

    def example(self, config: RunConfig, dataset: Dataset) -> jax.ShapeDtypeStruct | None:
        """An image, where entries of layers are counted; telling the order takes a trace."""
        if config.budget != "model":
            return None
        return jax.ShapeDtypeStruct((1, *dataset.image_size, dataset.channels), jnp.float32)

    def description(self, dataset: Dataset) -> dict[str, Any]:
        """Size, view and normalization."""
        return {
            "image_size": list(dataset.image_size),
            "view": "central" if isinstance(dataset.train, Streamed) else "whole",
            "mean": dataset.mean.tolist(),
            "std": dataset.std.tolist(),
        }

    def model_options(self, config: RunConfig, dataset: Dataset) -> dict[str, Any]:
        """Channels, size and stem."""
        stem = config.stem
        if stem == "auto":
            stem = "imagenet" if min(dataset.image_size) >= 96 else "small"
        return {"in_features": dataset.channels, "image_size": dataset.image_size, "stem": stem}

    def resolved(self, config: RunConfig, dataset: Dataset) -> dict[str, Any]:
        """Size, stem, streaming and augmentation."""
        height, width = dataset.image_size
        streamed = isinstance(dataset.train, Streamed)
        return {
            "image_size": height if height == width else [height, width],
            "stem": self.model_options(config, dataset)["stem"]
            if has_stem(config.model)
            else config.stem,
            "stream": "yes" if streamed else "no",
            "flip": flips(config, dataset),
            "pad": None if streamed else augmentation(config, dataset)[1],
        }


class Text(Kind):
    """Sequences of tokens, of which the next is to be told."""

    samples = "sequences"
    pretrains = False
    metrics = ("accuracy", "bits")
    inputs = "x"

    _OF_IMAGES = ("image_size", "flip", "pad", "stem", "stream", "workers", "stratify")

    def check(self, config: RunConfig) -> None:
        """Refuses models of images, and their options."""
        if config.model not in TOKEN_MODELS:
            raise UserError(
                f"{config.model} takes images, and {config.dataset} is text: choose the model "
                f"{' or '.join(TOKEN_MODELS)}."
            )
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        for name in self._OF_IMAGES:
            if getattr(config, name) != defaults[name]:
                raise UserError(f"{name} has no effect on {config.dataset}, which is text.")

    def training(self, config: RunConfig, dataset: Dataset) -> None:
        """Nothing."""

    def evaluation(self, dataset: Dataset) -> None:
        """Nothing."""

    def first(self, dataset: Dataset, examples: Examples, count: int) -> jax.Array:
        """As they are."""
        return jnp.asarray(examples.first(count))

    def example(self, config: RunConfig, dataset: Dataset) -> jax.ShapeDtypeStruct:
        """A sequence: without, the first product would be taken for the first layer."""
        return jax.ShapeDtypeStruct((1, *dataset.train.shape), jnp.uint8)

    def description(self, dataset: Dataset) -> dict[str, Any]:
        """The number of tokens."""
        return {"tokens": dataset.train.shape[0]}

    def model_options(self, config: RunConfig, dataset: Dataset) -> dict[str, Any]:
        """None."""
        return {}

    def resolved(self, config: RunConfig, dataset: Dataset) -> dict[str, Any]:
        """None."""
        return {}


_IMAGES, _TEXT = Images(), Text()


def kind_named(dataset: str) -> Kind:
    """The kind of data of a data set's name, before it is read.

    Example:
      >>> kind_named("digits").samples, kind_named("pydoc").samples
      ('images', 'sequences')
    """
    return _TEXT if dataset in TEXTS else _IMAGES


def kind_of(dataset: Dataset) -> Kind:
    """The kind of data of a data set."""
    return _TEXT if isinstance(dataset.train, Sequences) else _IMAGES


def flips(config: RunConfig, dataset: Dataset) -> bool:
    """Whether to mirror training images: what was asked, or what suits the data."""
    return not _are_digits(dataset) if config.flip is None else config.flip


def augmentation(config: RunConfig, dataset: Dataset) -> tuple[bool, int]:
    """Whether the step mirrors images, and by how much it pads and crops them.

    Neither where they are streamed: what makes a stream does that.
    """
    if isinstance(dataset.train, Streamed):
        return False, 0
    if config.pad is not None:
        return flips(config, dataset), config.pad
    return flips(config, dataset), 0 if _are_digits(dataset) else min(dataset.image_size) // 8


def _are_digits(dataset: Dataset) -> bool:
    return dataset.name in ("digits", "mnist5k")
