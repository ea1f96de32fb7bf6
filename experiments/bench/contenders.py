"""What experiments.speed compares: ways to run one training step of one model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.cli import UserError
from fqt_jax.allocation import Budget
from fqt_jax.convert import quantize
from fqt_jax.diagnostics import LayerShape, layer_shapes
from fqt_jax.estimators import Estimator, FullBatch, OneDraw
from fqt_jax.kernels import check_implementation, implementations
from fqt_jax.models import TOKEN_MODELS, create_model
from fqt_jax.optimizers import OptimizerConfig
from fqt_jax.recipe import FQT1, FQT1_PLUS, FULL_PRECISION, RECIPES, Recipe
from fqt_jax.training import CrossEntropy, create_state, make_train_step

PHASES = ("forward", "forward_backward", "update", "total")
FLOATS = (
    "torch",
    "torch_compile",
    "torch_bf16",
    "torch_bf16_compile",
    "jax",
    "jax_bf16",
    "full_precision",
)
"""The contenders that quantize nothing."""
LEARNING_RATE = 1e-3


class Variant(NamedTuple):
    """A recipe and how it is used.

    Attributes:
      recipe: the recipe.
      spec: the same as a point of a sweep (:mod:`experiments.sweeps.specs`).
      estimator: of the step.
      budget: what spends the recipe's bits; see :func:`fqt_jax.quantize`.
    """

    recipe: Recipe
    spec: str
    estimator: Estimator = FullBatch()
    budget: Budget = "layer"


SPEED_RECIPES: dict[str, Variant] = {
    **{name: Variant(recipe, name) for name, recipe in RECIPES.items()},
    "fqt1_one_draw": Variant(FQT1, "fqt1:one_draw", OneDraw()),
    "fqt1_budget": Variant(FQT1, "fqt1:budget=model", budget="model"),
    "fqt1_plus_budget": Variant(FQT1_PLUS, "fqt1_plus:budget=model", budget="model"),
}
"""The named recipes, FQT1 with samples drawn once a step, and two with the bits of the model as a
whole."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """The model and the data of a step; of text, classes are tokens."""

    model: str
    width: float
    batch_size: int
    image_size: int
    num_classes: int = 10
    in_features: int = 3
    length: int = 128

    @property
    def is_text(self) -> bool:
        """Whether the model takes tokens, not images."""
        return self.model in TOKEN_MODELS

    @property
    def samples(self) -> str:
        """What a sample is called, in the plural."""
        return "sequences" if self.is_text else "images"

    @property
    def size(self) -> str:
        """Of a sample, in words."""
        if self.is_text:
            return f"{self.length} characters"
        return f"{self.image_size}x{self.image_size}"

    @property
    def stem(self) -> str:
        """A ResNet's stem, as in :class:`experiments.runs.config.RunConfig`."""
        return "imagenet" if self.image_size >= 96 else "small"

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """Shape and type of a batch: ``[N, T]`` or ``[N, H, W, C]``."""
        if self.is_text:
            return jax.ShapeDtypeStruct((self.batch_size, self.length), jnp.int32)
        size = (self.image_size, self.image_size)
        return jax.ShapeDtypeStruct((self.batch_size, *size, self.in_features), jnp.float32)

    def create_model(self) -> Any:
        """The float model, from a fixed seed."""
        # XLA takes far longer to compile threefry for each shape than this generator.
        key = jax.random.key(0, impl="unsafe_rbg")
        if self.is_text:
            options: dict[str, Any] = {"length": self.length}
            create: Callable[..., Any] = TOKEN_MODELS[self.model]
        else:
            size = (self.image_size, self.image_size)
            options = {"in_features": self.in_features, "image_size": size, "stem": self.stem}
            create = functools.partial(create_model, self.model)
        return create(num_classes=self.num_classes, width=self.width, rngs=nnx.Rngs(key), **options)

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Random images or tokens, and labels."""
        rng = np.random.default_rng(0)
        if self.is_text:
            tokens = rng.integers(0, self.num_classes, (2, *self.example.shape), np.int32)
            return tokens[0], tokens[1]
        labels = rng.integers(0, self.num_classes, self.batch_size).astype(np.int32)
        return rng.standard_normal(self.example.shape, np.float32), labels


class Contender(Protocol):
    """One way to run a training step. To add one, implement this and add it to the registry."""

    name: str

    def build(self, setting: Setting) -> None:
        """Makes the model; what is compiled may be left to the first call."""

    def train(self, steps: int) -> None:
        """Runs whole training steps and waits for the end of the last, as a training run does."""

    def phases(self) -> dict[str, Callable[[], None]]:
        """Parts of a step, by their names in ``PHASES``; each waits for its end."""

    def details(self) -> dict[str, Any]:
        """What is known without running: ``products`` of a step, ``memory`` of the compiled one."""


class JaxContender:
    """A step of :func:`fqt_jax.training.make_train_step` with Adam.

    Args:
      name: how it is called.
      recipe: the recipe that the model is converted by; ``None`` leaves it as its user wrote it.
      implementation: of the kernels.
      estimator: of the step.
      budget: what spends the recipe's bits.
      dtype: what the layers compute in; their parameters stay float32.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe | None,
        implementation: str | None = None,
        estimator: Estimator = FullBatch(),
        budget: Budget = "layer",
        dtype: Any = None,
    ):
        self.name = name
        self._recipe, self._implementation = recipe, implementation
        self._estimator, self._budget, self._dtype = estimator, budget, dtype

    def build(self, setting: Setting) -> None:
        """See :class:`Contender`."""
        recipes: dict[str, Recipe] = {}

        def start() -> Any:
            model = setting.create_model()
            if self._dtype is not None:
                _compute_in(self._dtype, model)
            if self._recipe is not None:
                model, table = quantize(
                    model,
                    self._recipe,
                    example=setting.example,
                    budget=self._budget,
                    implementation=self._implementation,
                )
                recipes.update((row.path, row.recipe) for row in table)
            self._optimizer = OptimizerConfig(
                learning_rate=LEARNING_RATE, weight_decay=0.0, schedule="constant"
            ).build(nnx.state(model, nnx.Param), 1)
            self._graphdef, state = create_state(model, self._optimizer)
            return state, _zeros(state.params)

        # One compiled program in place of some hundred small ones.
        self._state, self._grads = jax.jit(start)()
        self._products = step_products(layers_of(setting), recipes, self._estimator)
        inputs, labels = map(jnp.asarray, setting.batch())
        self._batch, self._key = (inputs, labels), jax.random.key(0)
        self._loss = CrossEntropy(setting.num_classes)

    # Compiled at their first use: who only wants whole steps need not wait for the parts.

    @functools.cached_property
    def _total(self) -> Any:
        return self._compile_step(self._optimizer, self._state)

    @functools.cached_property
    def _forward_backward(self) -> Any:
        """The same step under an optimizer that only keeps the gradients."""
        return self._compile_step(_KEEP_GRADIENTS, self._with_grads())

    @functools.cached_property
    def _forward(self) -> Any:
        return _forward(self._graphdef, self._loss).lower(self._state, self._batch).compile()

    @functools.cached_property
    def _update(self) -> Any:
        operands = (self._grads, self._state.opt_state, self._state.params)
        return _update(self._optimizer).lower(*operands).compile()

    def _compile_step(self, optimizer: optax.GradientTransformation, state: Any) -> Any:
        step = make_train_step(
            self._graphdef, optimizer, loss=self._loss, estimator=self._estimator
        )
        return step.jitted.lower(state, self._batch, self._key).compile()

    def _with_grads(self) -> Any:
        return dataclasses.replace(self._state, opt_state=self._grads)

    def train(self, steps: int) -> None:
        """See :class:`Contender`."""
        for _ in range(steps):
            self._state, _ = self._total(self._state, self._batch, self._key)
        jax.block_until_ready(self._state)

    def phases(self) -> dict[str, Callable[[], None]]:
        """See :class:`Contender`."""
        return {
            "forward": self._run_forward,
            "forward_backward": self._run_forward_backward,
            "update": self._run_update,
        }

    def _run_forward(self) -> None:
        jax.block_until_ready(self._forward(self._state, self._batch))

    def _run_forward_backward(self) -> None:
        opt_state = self._state.opt_state
        operands = (self._with_grads(), self._batch, self._key)
        new, _ = jax.block_until_ready(self._forward_backward(*operands))
        self._grads = new.opt_state
        self._state = dataclasses.replace(new, opt_state=opt_state)

    def _run_update(self) -> None:
        state = self._state
        params, opt_state, self._grads = self._update(self._grads, state.opt_state, state.params)
        jax.block_until_ready((params, opt_state, self._grads))
        self._state = dataclasses.replace(state, params=params, opt_state=opt_state)

    def details(self) -> dict[str, Any]:
        """See :class:`Contender`."""
        analysis = self._total.memory_analysis()
        names = ("temp", "argument", "output", "alias")
        memory = analysis and {n: getattr(analysis, f"{n}_size_in_bytes") for n in names}
        return {"products": self._products, "memory": memory or None}


_COMPUTE = (nnx.Conv, nnx.Linear, nnx.BatchNorm, nnx.LayerNorm)


def _compute_in(dtype: Any, model: Any) -> None:
    """As if the layers had been made with this ``dtype``."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, _COMPUTE):
            module.dtype = dtype


def _forward(graphdef: Any, loss: CrossEntropy) -> Any:
    @jax.jit
    def forward(state: Any, batch: tuple[jax.Array, jax.Array]) -> Any:
        model = nnx.merge(graphdef, state.params, state.others, copy=True)
        model.train()
        mean = jnp.mean(loss(model(batch[0]), batch))
        return mean, nnx.split(model, nnx.Param, ...)[2]

    return forward


def _update(optimizer: optax.GradientTransformation) -> Any:
    # Gradients too are given up, as in a step; the updates are as good for the next call.
    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def update(grads: Any, opt_state: Any, params: Any) -> Any:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, updates

    return update


def _zeros(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


_KEEP_GRADIENTS = optax.GradientTransformation(_zeros, lambda g, state, params=None: (_zeros(g), g))


def layers_of(setting: Setting) -> list[LayerShape]:
    """The convolutions and dense layers of the model, in the order in which they are called."""
    found: list[LayerShape] = []

    def trace(batch: jax.Array) -> None:
        found.extend(layer_shapes(setting.create_model(), batch))

    jax.eval_shape(trace, setting.example)
    return found


def step_products(
    layers: Sequence[LayerShape],
    recipes: Mapping[str, Recipe],
    estimator: Estimator = FullBatch(),
) -> int:
    """Multiply-adds of a step's convolutions and dense layers that the recipes leave to be done.

    Args:
      layers: of the model; the first needs no input gradient.
      recipes: by a layer's path; full precision where there is none.
      estimator: of the step. With :class:`OneDraw` there is a forward pass of the whole batch, and
        all passes of the rows drawn.
    """
    total = 0.0
    for i, layer in enumerate(layers):
        if isinstance(estimator, OneDraw):
            n = layer.output[0]
            total += layer.products * (1 + estimator.kept(n) / n * (3 if i else 2))
            continue
        recipe = recipes.get(layer.path, FULL_PRECISION)
        of_input, of_weight = kept_fractions(layer, recipe)
        total += layer.products * (1 + of_weight + (of_input if i else 0))
    return round(total)


def kept_fractions(layer: LayerShape, recipe: Recipe) -> tuple[float, float]:
    """The parts of the input and the weight gradient's products that a recipe keeps."""
    gradient = recipe.gradient
    if gradient is None:
        return 1.0, 1.0
    sizes = {"samples": layer.output[0], "channels": layer.output[3]}
    return gradient.kept_part("input", **sizes), gradient.kept_part("weight", **sizes)


class Roster:
    """The contenders of a run, and why others were left out.

    Args:
      recipes: names of recipes.
      implementations: names of the kernels' implementations, ``"all"`` for all that are available;
        empty leaves the choice to each product (``auto``).
      chosen: names of contenders; empty for all.

    Raises:
      UserError: an unknown contender, or one that was named and is missing here.
      ValueError: an unknown implementation, or one that is not available.
    """

    def __init__(
        self, recipes: Sequence[str], implementations: Sequence[str], chosen: Sequence[str]
    ):
        from experiments.bench.torch_steps import TorchContender, missing

        rivals: list[Contender] = [
            TorchContender("torch"),
            TorchContender("torch_compile", compiled=True),
            TorchContender("torch_bf16", bfloat16=True),
            TorchContender("torch_bf16_compile", bfloat16=True, compiled=True),
            JaxContender("jax", None),
            JaxContender("jax_bf16", None, dtype=jnp.bfloat16),
        ]
        everything = {contender.name: contender for contender in rivals}
        for name in recipes:
            recipe, _, estimator, budget = SPEED_RECIPES[name]
            if not recipe.binary:
                everything[name] = JaxContender(name, recipe)
                continue
            for each in resolve_implementations(implementations) if implementations else [None]:
                key = f"{name}/{each or 'auto'}"
                everything[key] = JaxContender(key, recipe, each, estimator, budget)
        for name in chosen:
            if name not in everything:
                raise UserError(f"unknown contender {name!r}; known: {', '.join(everything)}.")
        self.left_out: list[str] = []
        reason = missing()
        if reason is not None:
            of_torch = [name for name in everything if name.startswith("torch")]
            if set(of_torch) & set(chosen):
                raise UserError(reason)
            for name in of_torch:
                del everything[name]
            if not chosen:
                self.left_out.append(reason)
        self.contenders = [c for name, c in everything.items() if not chosen or name in chosen]


def resolve_implementations(names: Sequence[str]) -> list[str]:
    """Names of implementations; ``"all"`` means all that are available.

    Raises:
      ValueError: an unknown implementation, or one that is not available.
    """
    available = [name for name, state in implementations().items() if state == "available"]
    if "all" in names:
        return available
    for name in names:
        check_implementation(name)
    return list(dict.fromkeys(names))
