"""Options that the training experiments share, with their checks."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, ClassVar, Literal

from experiments.cli import UserError
from experiments.data.catalog import Stream
from experiments.runs.kinds import kind_named
from experiments.runs.ranges import check_numbers
from fqt_jax.allocation import Budget
from fqt_jax.estimators import Estimator, FullBatch, OneDraw
from fqt_jax.estimators.one_draw import Scope
from fqt_jax.exchange import Exchange, Mean, Signs
from fqt_jax.grids import Grid
from fqt_jax.kernels import check_implementation
from fqt_jax.models import MODELS, has_stem
from fqt_jax.optimizers import OptimizerConfig
from fqt_jax.recipe import (
    Groups,
    Importance,
    Prune,
    Recipe,
    SamplerName,
    Scale,
    Threshold,
    recipe_by_name,
)
from fqt_jax.shards import Statistics

NO_PAD = "pad has no effect."
NO_WORKERS = "workers have no effect."


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run. Where a field is left open, the default of its place holds."""

    dataset: str = "digits"
    """Data set: mnist5k and digits are embedded, and pydoc, which is text; cifar10, cifar100,
    oxford_flowers102, oxford_iiit_pet, cars196, caltech_birds2011 and any other image
    classification set are read as prepared by tensorflow-datasets; folder and npz are your own
    images, at data-dir."""

    model: str = "resnet18"
    """Model: vgg_small, vgg11, vgg13, vgg16, vgg19, resnet18, resnet34, resnet50, mobilenet;
    vit_small, lstm and gru (images as sequences of patches or rows); gpt_small (text); or of
    torchvision's form with ReLU: resnet18_torch, vgg16_torch, vgg16_bn_torch and the like, and
    resnet50_keras."""
    width: float = 0.25
    """Factor on the model's number of channels."""
    stem: Literal["auto", "small", "imagenet"] = "auto"
    """Stem of a ResNet, MobileNet or ViT; auto: imagenet for images of 96 pixels and more."""

    recipe: str = "fqt1"
    """Recipe: full_precision, qat, psq1, fqt1 or fqt1_plus, or qat_activations, with float weights,
    the first of two steps. The next thirteen change parts of it."""
    bits: int | None = None
    """Bits of a gradient code, 1 to 8."""
    keep: float | None = None
    """Fraction of the gradient's groups that is kept, in (0, 1]."""
    sampler: SamplerName | None = None
    """How the kept groups are drawn."""
    importance: Importance | None = None
    """What a group's keep probability is proportional to."""
    groups: Groups | None = None
    """The entries that share one scale."""
    prune: Prune | None = None
    """What the weight gradient keeps."""
    grid: Grid | None = None
    """Where the levels of a group lie: on its range, or with one at zero."""
    budget: Budget | None = None
    """What spends the bits of gradients: each layer, or the model as a whole, whose small layers
    then keep more of theirs and its large ones less."""
    scale: Scale | None = None
    """The weights' scale: their mean, none, or learned, from that mean or from 1 on."""
    clip: bool | None = None
    """Whether the straight-through gradient is zero outside [-1, 1]."""
    threshold: Threshold | None = None
    """Where the signs of activations change; the default is at zero."""
    one_draw: bool = False
    """Prune once for the whole network, at the loss, in place of once in each layer."""
    stratify: bool = False
    """Lay each batch out by label, so that draws of samples take evenly from every class."""

    optimizer: str = "adam"
    """adam, sgd, or any Optax optimizer that takes a learning rate."""
    learning_rate: float | None = None
    """Learning rate; the default is the paper's, 1e-5 (sgd: 1e-4) and 1e-3 for the head."""
    head_learning_rate: float | None = None
    """Learning rate of the head; as learning-rate where only that is given."""
    weight_decay: float = 1e-5
    """Weight decay, added to the gradient."""
    momentum: float | None = None
    """Momentum of sgd; the default is 0.9."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate over the run."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate rises from 0 in a line, before its schedule."""
    cosine_epochs: int | None = None
    """Epochs of a cosine, after which the next begins at the full rate; the default is all."""
    clip_norm: float | None = None
    """The most that the norm of the whole gradient may be; the default is no limit."""
    ema_decay: float | None = None
    """Evaluate, and export, the exponential moving average of the parameters, with this decay."""
    freeze: str | None = None
    """Regular expression: parameters with names that it matches whole stay as they are."""

    epochs: int = 60
    """Passes over the training data."""
    patience: int | None = None
    """Stop when so many epochs in a row bring no better validation accuracy, and go back to the
    best; the default is to train to the end."""
    batch_size: int = 128
    """Images, or sequences of text, in a step."""
    label_smoothing: float = 0.0
    """Label smoothing, in [0, 1)."""
    image_size: int | None = None
    """Images are resized to this; the default is the data set's."""
    flip: bool | None = None
    """Random horizontal flips; the default is yes, but no for digits."""
    pad: int | None = None
    """Pad by this and crop at random; the default is an eighth of the image, but 0 for digits."""
    validation_fraction: float = 0.1
    """Part of the training data held out for validation, in (0, 1)."""
    limit: int | None = None
    """Use at most this many training images or sequences."""
    stream: Stream = "auto"
    """Whether images are decoded while it trains, cropped and resized at random; auto: where the
    files of the training images hold more than 2 GiB once they are decoded."""
    workers: int | None = None
    """Processes that decode streamed images; the default, 0, is threads of this process."""
    data_dir: pathlib.Path | None = None
    """Where tensorflow-datasets keeps its data; of folder the folder, which has one folder for each
    class (in train, val and test, or split by content); of npz the file."""

    diagnose: bool = False
    """After each epoch, measure noise, heterogeneity and sign flips of each layer's gradient."""

    test_each_epoch: bool = False
    """Measure the accuracy on the test images after each epoch too, for curves over time."""
    log: Literal["tensorboard", "wandb"] | None = None
    """Besides metrics.jsonl, write the metrics for TensorBoard or Weights & Biases."""
    save_minutes: float | None = None
    """Save within an epoch too, when so many minutes have passed since the last time."""

    devices: int | Literal["all"] | None = None
    """Devices that share each batch: a number, or all, of all processes; the default is one, and
    with several processes all. Batch size, rates and epochs mean the same on any number."""
    batch_statistics: Statistics | None = None
    """What batch norms take on several devices: synchronized, the whole batch's statistics, which
    is the default, or local, each device's own."""
    draw_from: Scope | None = None
    """What one-draw draws from on several devices: each one's shard, which is the default, or the
    whole batch."""

    reduce: Literal["floats", "signs"] | None = None
    """How several devices bring their gradients together: as floats, which is the default, or as
    packed signs with error feedback, as 1-bit Adam does."""
    reduce_warmup: float = 0.15
    """Part of the run's steps that takes floats first, while Adam's second moment settles."""

    seed: int = 0
    """Decides initialization, order, augmentation and rounding."""
    implementation: str | None = None
    """The kernels' implementation; the default is the best that serves."""
    out: pathlib.Path | None = None
    """Run folder, which must not exist; the default is a new one under runs/."""
    resume: pathlib.Path | None = None
    """Continue the run in this folder, with the options it was started with."""

    FROM_FILE: ClassVar[bool] = True
    """Options may be read from a file; see :func:`experiments.cli.parse`."""

    NOT_COMPILED: ClassVar[tuple[str, ...]] = (
        "seed",
        "learning_rate",
        "head_learning_rate",
        "diagnose",
        "test_each_epoch",
        "patience",
        "log",
        "save_minutes",
        "workers",
    )
    """Options that are values in a training step, not constants of its program."""

    OF_THE_CALL: ClassVar[tuple[str, ...]] = (
        "out",
        "resume",
        "coordinator",
        "processes",
        "process",
    )
    """Options that say where a run is kept and who runs it: they are not the run's."""

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise UserError(f"unknown model {self.model!r}; known models: {', '.join(MODELS)}.")
        check_numbers(self)
        kind_named(self.dataset).check(self)
        if self.stem != "auto" and not has_stem(self.model):
            raise UserError(
                f"stem has no effect on {self.model}: it is of ResNet, MobileNet and ViT."
            )
        if self.stream == "yes" and self.pad is not None:
            raise UserError(f"stream has random crops of its own: {NO_PAD}")
        if self.stream == "no" and self.workers is not None:
            raise UserError(f"stream is no: {NO_WORKERS}")
        if self.draw_from is not None and not self.one_draw:
            raise UserError("draw_from has no effect without one-draw.")
        if self.draw_from == "batch" and self.batch_statistics == "local":
            raise UserError("draw_from batch needs synchronized batch-statistics, not local ones.")
        if self.reduce != "signs" and self.reduce_warmup != 0.15:
            raise UserError("reduce_warmup has no effect: reduce is not signs.")
        if self.reduce == "signs":
            if self.optimizer != "adam":
                raise UserError(f"reduce signs is of the optimizer adam; got {self.optimizer}.")
            if self.clip_norm is not None:
                raise UserError("reduce signs and clip_norm cannot be combined.")
        if self.out is not None and self.resume is not None:
            raise UserError("give either out, for a new run, or resume, for one that exists.")
        try:  # now, before any data are read and any folder is made
            self.build_recipe()
            self.build_estimator()
            self.build_optimizer()
            check_implementation(self.implementation)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from None
        if self.diagnose and not self.build_recipe().binary:
            raise UserError(f"diagnose needs a binary recipe; {self.recipe!r} is not.")

    def check_batch(self, samples: int) -> None:
        """Checks that so many training samples make a batch.

        Raises:
          UserError: they do not.
        """
        if self.batch_size > samples:
            raise UserError(
                f"batch_size is {self.batch_size}, but {self.dataset} has only {samples} training "
                f"{kind_named(self.dataset).samples}."
            )

    def build_recipe(self) -> Recipe:
        """The named recipe with the parts that were changed."""
        recipe = recipe_by_name(self.recipe)
        of_gradient = _given(
            self, ("bits", "keep", "sampler", "importance", "groups", "prune", "grid")
        )
        if of_gradient:
            if recipe.gradient is None:
                raise UserError(
                    f"the recipe {self.recipe!r} does not quantize gradients: "
                    f"{', '.join(of_gradient)} cannot be set."
                )
            gradient = dataclasses.replace(recipe.gradient, **of_gradient)
            recipe = dataclasses.replace(recipe, gradient=gradient)
        self._check_pruning(recipe)
        return dataclasses.replace(recipe, **_given(self, ("scale", "clip", "threshold")))

    def _check_pruning(self, recipe: Recipe) -> None:
        """Checks that layers prune, where an option is about how they do."""
        for name in _given(self, ("sampler", "importance", "budget")):
            if self.one_draw or not recipe.prunes:
                why = "one_draw draws by the loss" if self.one_draw else "nothing is pruned"
                raise UserError(f"{name} has no effect: {why}.")

    def build_estimator(self) -> Estimator:
        """The step's estimator: with one draw, of the fraction that the recipe keeps."""
        if not self.one_draw:
            return FullBatch()
        recipe = self.build_recipe()
        if recipe.gradient is None or not recipe.prunes:
            raise UserError(f"the recipe {self.recipe!r} prunes nothing: one_draw cannot be set.")
        return OneDraw(keep=recipe.gradient.keep_fraction, scope=self.draw_from or "shard")

    @property
    def variant(self) -> str:
        """The recipe's name with the parts that were changed, such as ``fqt1:bits=2``."""
        changes = _given(self, RECIPE_PARTS)
        changes = {
            name: value for name, value in changes.items() if value is not False or name == "clip"
        }
        text = ",".join(f"{name}={value}" for name, value in changes.items())
        return f"{self.recipe}:{text}" if text else self.recipe

    def build_optimizer(self) -> OptimizerConfig:
        """The optimizer's configuration."""
        cycles = 1
        if self.cosine_epochs is not None:
            cycles = round((self.epochs - self.warmup_epochs) / self.cosine_epochs)
        return OptimizerConfig(
            name=self.optimizer,
            learning_rate=self.learning_rate,
            head_learning_rate=self.head_learning_rate,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            schedule=self.schedule,
            warmup=self.warmup_epochs / self.epochs,
            cycles=cycles,
            clip_norm=self.clip_norm,
            ema_decay=self.ema_decay,
            freeze=self.freeze,
        )

    def build_exchange(self, total_steps: int) -> Exchange:
        """How the run's devices bring their gradients together."""
        if self.reduce != "signs":
            return Mean()
        return Signs(warmup=max(1, round(self.reduce_warmup * total_steps)))

    def filled_in(self) -> dict[str, Any]:
        """What options that were left open stand for, as far as the data do not decide."""
        optimizer = self.build_optimizer()
        rest, head = optimizer.rates()
        return {
            "learning_rate": rest,
            "head_learning_rate": head,
            "momentum": optimizer.momentum_or_default(),
        }

    def compiled(self) -> tuple[Any, ...]:
        """What, with the model's structure, decides the compiled steps: equal for runs that can
        share them.
        """
        rest, head = self.build_optimizer().rates()
        options = {k: v for k, v in self.to_json().items() if k not in self.NOT_COMPILED}
        return (rest == head, json.dumps(options, sort_keys=True))

    def to_json(self) -> dict[str, Any]:
        """The options as JSON values, without those that say where the run is kept."""
        values = dataclasses.asdict(self)
        for name in self.OF_THE_CALL:
            values.pop(name, None)
        return {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in values.items()}


RECIPE_PARTS = (
    "bits",
    "keep",
    "sampler",
    "importance",
    "groups",
    "prune",
    "grid",
    "budget",
    "scale",
    "clip",
    "threshold",
    "one_draw",
    "stratify",
)
"""The options that change parts of a recipe."""


def _given(config: RunConfig, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}
