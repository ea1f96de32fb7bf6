"""Estimators of the gradient at one bit an entry: their noise and their bias on a real model.

    python -m experiments.estimators --model vgg_small --epochs 4

Trains a model with float gradients and, before training and after each epoch, estimates its
gradient on one batch over and over with each recipe. Reports the noise-to-signal ratio
sqrt(E |g' - E g'|^2) / |g| and the bias |E g' - g| / |g| of the kernels' gradients, as root mean
squares over the kernels; g is the float gradient. Each kernel counts alike, as it does for Adam.

    python -m experiments.estimators --checkpoint runs/NAME --layers

starts from a trained model, and tells the noise of each layer as well.

    python -m experiments.estimators --dataset pydoc --model gpt_small --width 0.25 \
        --batch-size 32 --images 32 --draws 64 --layers

is about text. Of attention the parts for queries, keys and values are told apart.

    python -m experiments.estimators --statistics constant

holds batch norm's statistics constant, so that samples meet in no layer: what is different then is
what batch norm does to an estimator.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import cli
from experiments.runs import folders, tasks
from experiments.runs.config import RunConfig
from experiments.runs.kinds import kind_named
from experiments.runs.measuring import drop_image_size, load_in_memory
from experiments.runs.plain_training import plain_epochs
from experiments.show.formats import Table, show, to_markdown
from experiments.sweeps.sweep import parse_all
from fqt_jax.estimators import Estimator, SplitModel
from fqt_jax.training import CrossEntropy
from fqt_jax.tree import leaf_name

_BLOCK = 8
"""Draws whose sum is one sample of the estimate of the bias."""

_ESTIMATORS: tuple[str, ...] = (
    "psq1",
    "fqt1",
    "range, shared=fqt1_plus",
    "norm, channels=fqt1:importance=norm",
    "norm, shared=fqt1_plus:importance=norm",
    "norm, shared, stratified=fqt1_plus:importance=norm,stratify",
    "the same, 2 bits=fqt1_plus:importance=norm,bits=2,stratify",
    "the same, 8 bits=fqt1_plus:importance=norm,bits=8,stratify",
    "one draw=fqt1:one_draw",
    "one draw, stratified=fqt1:one_draw,stratify",
)


@dataclasses.dataclass(frozen=True)
class EstimatorsConfig(RunConfig):
    """The training run, without augmentation, and what is estimated."""

    dataset: str = "mnist5k"
    """Data set, as for experiments.finetune."""
    model: str = "vgg_small"
    """Model: vgg_small, vgg11, vgg13, vgg16, vgg19, resnet18, resnet34, resnet50, mobilenet,
    vit_small, lstm, gru; gpt_small (text); or of torchvision's form with ReLU: resnet18_torch,
    vgg16_torch, vgg16_bn_torch and the like."""
    width: float = 0.5
    """Factor on the model's number of channels."""
    recipe: str = "qat"
    """The recipe that trains; what is estimated is its gradient with nothing rounded."""
    image_size: int | None = 16
    """Images are resized to this. It has no effect on text."""
    learning_rate: float | None = 2e-3
    """Learning rate."""
    epochs: int = 3
    """Passes over the training data."""
    checkpoint: pathlib.Path | None = None
    """Start from this, the folder of a run or a checkpoint in it; the default is random values."""
    estimators: tuple[str, ...] | None = None
    """Recipes, as [LABEL=]NAME[:OPTION=VALUE,...]; the default is the named ones, variants by
    importance and bits, and one draw a step."""
    images: int = 128
    """Images, or sequences of text, of the batch whose gradient is estimated."""
    draws: int = 256
    """Estimates of each gradient."""
    statistics: Literal["batch", "constant"] = "batch"
    """Batch norm's statistics: those of the batch, with the gradient that flows through them, or
    the same values as constants. Training always goes by the batch's."""
    layers: bool = False
    """Show the noise of each layer, the float ones included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        drop_image_size(self)
        if self.resume is not None:
            raise cli.UserError("estimators cannot resume: choose a new folder.")
        if self.images < 2:
            raise cli.UserError(f"images must be at least 2; got {self.images}.")
        if self.draws < 2 * _BLOCK or self.draws % _BLOCK:
            raise cli.UserError(
                f"draws must be a multiple of {_BLOCK} from {2 * _BLOCK} on; got {self.draws}."
            )
        for label, run in self.runs().items():
            if not run.build_recipe().binary or run.build_recipe().learns_scale:
                raise cli.UserError(
                    f"the estimator {label!r} must be binary and have no parameters of its own."
                )

    def runs(self) -> dict[str, RunConfig]:
        """This run with the recipe of each estimator, by its label."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(RunConfig)}
        usual = _ESTIMATORS
        if kind_named(self.dataset).samples == "sequences":  # which have no labels to go by
            usual = tuple(text for text in usual if "stratif" not in text)
        specs = parse_all("recipe", usual if self.estimators is None else self.estimators)
        return {spec.label: RunConfig(**values | spec.options) for spec in specs}


class Error(NamedTuple):
    """Error of an estimator, relative to the norm of what it estimates.

    Attributes:
      noise: ``sqrt(E |g' - E g'|^2) / |g|``.
      bias: ``|E g' - g| / |g|``, or 0 where three standard errors do not tell it from none.
      least: the least bias that could have been told from none.
    """

    noise: float
    bias: float
    least: float


class Layer(NamedTuple):
    """What one layer's part of an estimator is like, relative to the norm of the exact one.

    Attributes:
      noise: ``sqrt(E |g' - E g'|^2) / |g|``.
      largest: the largest ``|g'| / |g|`` of any draw.
    """

    noise: float
    largest: float


class Measured(NamedTuple):
    """An estimator's error over all kernels, and layer by layer."""

    error: Error
    layers: dict[str, Layer]


def relative_error(blocks: np.ndarray, mean_square: float, draws: int, norm: float) -> Error:
    """The error of an estimator from means of its deviations ``g' - g`` over blocks of draws.

    Products of different blocks have the squared bias as their mean, without the noise's own part.

    Args:
      blocks: means over blocks of equal size, ``[blocks, parameters]``.
      mean_square: mean of ``|g' - g|^2`` over all draws.
      draws: their number.
      norm: ``|g|``.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> d = 0.5 + rng.standard_normal((800, 100))  # |bias| is 5, and the noise 10
      >>> blocks = d.reshape(100, 8, 100).mean(1)
      >>> error = relative_error(blocks, float(np.square(d).sum(1).mean()), 800, norm=10.0)
      >>> round(error.noise, 1), round(error.bias, 1)
      (1.0, 0.5)
    """
    blocks = np.asarray(blocks, np.float64)
    n = len(blocks)
    products = (blocks @ blocks.T)[~np.eye(n, dtype=bool)]
    square = float(products.mean())
    # If there were no bias, products would be uncorrelated, each pair standing there twice.
    sigma = float(np.sqrt(2 * np.square(products).sum())) / (n * (n - 1))
    bias = np.sqrt(square) if square > 3 * sigma else 0.0
    noise = np.sqrt(max(0.0, (mean_square - square) * draws / (draws - 1)))
    return Error(*(float(value) / norm for value in (noise, bias, np.sqrt(3 * sigma))))


class ConstantNorm(nnx.Module):
    """Batch norm whose statistics are constants, in training as well: no samples meet in it."""

    @classmethod
    def take_over_all(cls, model: Any, x: jax.Array) -> None:
        """Makes all of a model's batch norms such, in place, with their statistics on ``x``."""
        norms = [norm for _, norm in nnx.iter_modules(model) if type(norm) is nnx.BatchNorm]
        model.train()
        for norm in norms:
            norm.momentum = 0.0
        model(x)
        for norm in norms:
            norm.__class__ = cls

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes ``x[N, ..., C]``."""
        own: Any = self
        y: jax.Array = nnx.BatchNorm.__call__(own, x, use_running_average=True)
        return y


class _Estimator:
    """A recipe's gradient on a batch, that of all kernels in one vector."""

    def __init__(
        self, model: nnx.Module, estimator: Estimator, loss: CrossEntropy, *, constant: bool
    ):
        graphdef, _, others = nnx.split(model, nnx.Param, ...)

        def gradient(params: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
            draw_key, rounding_key = jax.random.split(key)
            fresh = nnx.merge(graphdef, params, others, copy=True)
            if constant:
                ConstantNorm.take_over_all(fresh, x)
            nnx.reseed(fresh, rounding=rounding_key)
            result = estimator.gradients(SplitModel.of(fresh), (x, y), loss, draw_key)
            return jnp.concatenate([jnp.ravel(g) for g in _kernels(result.grads).values()])

        self.gradient = jax.jit(gradient)

        @jax.jit
        def block(
            params: Any, x: jax.Array, y: jax.Array, exact: jax.Array, keys: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            ends = _ends(params)
            norms = jnp.maximum(jnp.sqrt(_squares(exact, ends)), jnp.float32(1e-30))
            sizes = np.diff(ends, prepend=0)
            scale = jnp.concatenate([jnp.full(m, 1 / n) for m, n in zip(sizes, norms, strict=True)])

            def add(found: Any, key: jax.Array) -> tuple[Any, None]:
                total, squares, largest = found
                g = gradient(params, x, y, key)
                d = (g - exact) * scale
                largest = jnp.maximum(largest, jnp.sqrt(_squares(g * scale, ends)))
                return (total + d, squares + _squares(d, ends), largest), None

            none = jnp.zeros(len(ends), exact.dtype)
            return jax.lax.scan(add, (jnp.zeros_like(exact), none, none), keys)[0]

        self._block = block

    def measure(
        self, params: Any, x: jax.Array, y: jax.Array, exact: jax.Array, keys: jax.Array
    ) -> Measured:
        """The error of draws with these keys."""
        found = [self._block(params, x, y, exact, k) for k in keys.reshape(-1, _BLOCK)]
        totals, squares, largest = (
            np.stack(part).astype(np.float64) for part in zip(*found, strict=True)
        )
        n, ends = len(keys), _ends(params)
        blocks, squares = totals / _BLOCK, squares.sum(0) / n
        error = relative_error(blocks, float(squares.sum()), n, len(ends) ** 0.5)
        variances = (squares - _squares(blocks.mean(0), ends)) * n / (n - 1)
        noise = np.sqrt(np.maximum(variances, 0))
        values = zip(_kernels(params), noise, largest.max(0), strict=True)
        return Measured(error, {name: Layer(float(a), float(b)) for name, a, b in values})


def _kernels(tree: Any) -> dict[str, jax.Array]:
    """The layers' kernels, by the path of the layer; of attention queries, keys and values."""
    found: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *names, last = leaf_name(path).split(".")
        if last != "kernel":
            continue
        if "qkv" in names:
            stem = "/".join([*names[: names.index("qkv")], ""])
            parts = jnp.split(leaf, 3, axis=1)
            found |= {stem + part: kernel for part, kernel in zip("qkv", parts, strict=True)}
        else:
            found["/".join(names)] = leaf
    return found


def _ends(params: Any) -> np.ndarray:
    """Where each kernel ends in the vector of all of them."""
    return np.cumsum([leaf.size for leaf in _kernels(params).values()])


def _squares(g: Any, ends: np.ndarray) -> Any:
    """Of the vector of all kernels, each one's sum of squares."""
    xp = np if isinstance(g, np.ndarray) else jnp
    return xp.stack([xp.sum(xp.square(part)) for part in xp.split(g, ends[:-1])])


def main(config: EstimatorsConfig) -> None:
    """Runs the experiment."""
    began = time.perf_counter()
    dataset, kind = load_in_memory(config)
    if max(config.batch_size, config.images) > len(dataset.train):
        raise cli.UserError(f"there are only {len(dataset.train)} training {kind.samples}.")
    folder = folders.run_folder(config, "estimators")

    def estimator(run: RunConfig) -> _Estimator:
        model = tasks.build_task(run, dataset, None).model
        constant = config.statistics == "constant"
        loss = CrossEntropy(dataset.num_classes)
        return _Estimator(model, run.build_estimator(), loss, constant=constant)

    runs = config.runs()
    estimators = {label: estimator(run) for label, run in runs.items()}
    exact = estimator(dataclasses.replace(next(iter(runs.values())), **_FLOAT_GRADIENT))
    inputs = kind.first(dataset, dataset.train, config.images)
    labels = jnp.asarray(dataset.train.labels[: config.images])
    batch = (inputs, labels)
    keys = jax.random.split(jax.random.key(config.seed + 1), config.draws)
    found: dict[str, list[Measured]] = {label: [] for label in estimators}
    start = config.checkpoint and folders.checkpoint_at(config.checkpoint)
    model = tasks.build_task(config, dataset, start).model
    for epoch, _, state in plain_epochs(config, dataset, model):
        g = exact.gradient(state.params, *batch, keys[0])
        for label, own in estimators.items():
            own_batch = batch
            if runs[label].stratify:
                order = jnp.argsort(labels, stable=True)
                own_batch = (inputs[order], labels[order])
            found[label].append(own.measure(state.params, *own_batch, g, keys))
        loss = f", loss {state.metrics.means()['loss']:.4f}" if epoch else ""
        print(f"epoch {epoch}/{config.epochs}{loss}", flush=True)
    write(config, found, folder)
    print(f"{time.perf_counter() - began:.0f} seconds; written to {folder}")


_FLOAT_GRADIENT: dict[str, Any] = {
    "recipe": "qat",
    "one_draw": False,
    "stratify": False,
} | dict.fromkeys(("bits", "keep", "sampler", "importance", "groups", "prune"))


def write(config: EstimatorsConfig, found: dict[str, list[Measured]], folder: pathlib.Path) -> None:
    """Shows the tables and writes them, as Markdown and JSON."""
    bits = {label: run.build_recipe().gradient for label, run in config.runs().items()}
    samples = kind_named(config.dataset).samples
    title = f"{config.dataset}, {config.model} x{config.width:g}, n = {config.images} {samples}"
    if config.statistics == "constant":
        title += ", batch norm's statistics constant"
    columns = ["estimator", "bits an entry", *(f"epoch {e}" for e in range(config.epochs + 1))]

    def rows(text: Callable[[Error], str]) -> list[list[str]]:
        return [
            [
                label,
                f"{own.bits_per_entry:g}" if (own := bits[label]) else "32",
                *(text(measured.error) for measured in epochs),
            ]
            for label, epochs in found.items()
        ]

    tables = [
        Table(
            f"{title}: noise-to-signal of the kernels' gradients, {config.draws} draws",
            columns,
            rows(lambda error: f"{error.noise:.2f}"),
        ),
        Table(
            f"{title}: bias of the kernels' gradients, {config.draws} draws",
            columns,
            rows(lambda e: f"{e.bias:.3f}" if e.bias else f"< {e.least:.3f}"),
            ["Relative to the gradient's norm; below the value after <, not told from none."],
        ),
    ]
    for epoch in range(config.epochs + 1) if config.layers else ():
        own = {label: epochs[epoch].layers for label, epochs in found.items()}
        tables.append(
            Table(
                f"{title}: noise-to-signal by layer, epoch {epoch}, {config.draws} draws",
                ["layer", *own],
                [
                    [
                        name,
                        *(
                            f"{layers[name].noise:.1f} ({layers[name].largest:.1f})"
                            for layers in own.values()
                        ),
                    ]
                    for name in next(iter(own.values()))
                ],
                ["In brackets the largest norm of any draw, over that of the exact gradient."],
            )
        )
    show(tables)
    folders.write_text(folder / "tables.md", to_markdown(tables))
    values = {
        label: [
            error._asdict() | {"layers": {name: one._asdict() for name, one in layers.items()}}
            for error, layers in epochs
        ]
        for label, epochs in found.items()
    }
    folders.write_json(folder / "errors.json", values)


if __name__ == "__main__":
    cli.run(main, EstimatorsConfig)
