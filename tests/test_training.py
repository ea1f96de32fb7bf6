import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fqt_jax as fqt
from fqt_jax.models import VGG
from fqt_jax.optimizers import OptimizerConfig
from fqt_jax.training import (
    Metrics,
    create_state,
    cross_entropy,
    make_eval_step,
    make_train_step,
    merge_model,
    reset_metrics,
)

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


def small_model() -> nnx.Module:
    model = VGG(((8,), (8,)), num_classes=3, in_features=1, rngs=nnx.Rngs(0))
    return fqt.quantize(model, fqt.FQT1).model


def data(n: int = 48) -> tuple[jax.Array, jax.Array]:
    """Images whose brightness tells the class."""
    labels = jnp.arange(n, dtype=jnp.int32) % 3
    noise = jax.random.normal(jax.random.key(9), (n, 8, 8, 1))
    return labels.astype(jnp.float32).reshape(-1, 1, 1, 1) * 2 - 2 + noise, labels


def run(state, step, n_steps, *, offset=0):
    images, labels = data()
    key = jax.random.key(0)
    for i in range(n_steps):
        order = np.random.default_rng(offset + i).permutation(48)[:16]
        state, _ = step(state, images, labels, jnp.asarray(order, jnp.int32), key)
    return state


def equal(a, b) -> bool:
    def raw(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(raw(x), raw(y)) for x, y in leaves)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_against_numpy(smoothing):
    logits = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    labels = np.array([0, 3, 1, 1, 2])
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    q = np.full((5, 4), smoothing / 4)
    q[np.arange(5), labels] += 1 - smoothing
    got = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing=smoothing)
    np.testing.assert_allclose(got, -(q * np.log(p)).sum(1), rtol=1e-5)


def test_the_cross_entropy_checks_its_arguments():
    with pytest.raises(ValueError, match="smoothing"):
        cross_entropy(jnp.zeros((1, 2)), jnp.array([0]), smoothing=1.0)
    with pytest.raises(TypeError, match="floating-point"):
        cross_entropy(jnp.zeros((1, 2), jnp.int32), jnp.array([0]))


def test_training_learns_and_compiles_once():
    graphdef, state = create_state(small_model(), optax.adam(1e-2))
    step = make_train_step(graphdef, optax.adam(1e-2))
    evaluate = make_eval_step(graphdef)
    images, labels = data()
    state = run(state, step, 40)
    state = run(reset_metrics(state), step, 1)
    metrics = Metrics.zero()
    for start in (0, 16, 32):
        metrics = evaluate(state, metrics, images, labels, jnp.arange(start, start + 16))
    assert metrics.means()["accuracy"] > 0.9
    assert step._cache_size() == 1
    assert evaluate._cache_size() == 1
    assert int(state.step) == 41


def test_the_state_is_donated_and_the_callers_model_survives():
    model = small_model()
    graphdef, state = create_state(model, optax.sgd(0.1))
    step = make_train_step(graphdef, optax.sgd(0.1))
    after = run(state, step, 1)
    assert jax.tree.leaves(state.params)[0].is_deleted()
    before = jax.tree.leaves(nnx.state(model, nnx.Param))[0]
    assert np.isfinite(before).all()
    assert isinstance(merge_model(graphdef, after), VGG)


def test_the_same_seed_gives_the_same_state_bit_for_bit():
    states = []
    for _ in range(2):
        graphdef, state = create_state(small_model(), optax.adam(1e-2))
        states.append(run(state, make_train_step(graphdef, optax.adam(1e-2)), 3))
    assert equal(*states)


def test_preprocessing_runs_in_the_step_with_a_key_of_its_own():
    keys = []

    def preprocess(x, key):
        keys.append(key)
        return x + jax.random.uniform(key, x.shape)

    optimizer = optax.sgd(0.1)
    graphdef, state = create_state(small_model(), optimizer)
    step = make_train_step(graphdef, optimizer, preprocess=preprocess)
    plain = make_train_step(graphdef, optimizer)
    with_noise = run(state, step, 1)
    without = run(create_state(small_model(), optimizer)[1], plain, 1)
    assert len(keys) == 1  # traced once
    assert not equal(with_noise.params, without.params)


def test_evaluation_ignores_padding_and_changes_nothing():
    graphdef, state = create_state(small_model(), optax.sgd(0.1))
    images, labels = data(20)
    evaluate = make_eval_step(graphdef)
    padded = jnp.array([*range(16, 20), *([-1] * 12)], jnp.int32)
    metrics = evaluate(state, Metrics.zero(), images, labels, jnp.arange(16, dtype=jnp.int32))
    metrics = evaluate(state, metrics, images, labels, padded)
    model = merge_model(graphdef, state)
    model.eval()
    logits = model(images)
    assert int(metrics.total) == 20
    expected = float(cross_entropy(logits, labels).mean())
    np.testing.assert_allclose(metrics.means()["loss"], expected, rtol=1e-5)
    hits = (jnp.argmax(logits, 1) == labels).mean()
    np.testing.assert_allclose(metrics.means()["accuracy"], hits, rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (OptimizerConfig(), (1e-5, 1e-3)),
        (OptimizerConfig(name="sgd"), (1e-4, 1e-3)),
        (OptimizerConfig(learning_rate=0.1), (0.1, 0.1)),
        (OptimizerConfig(learning_rate=0.1, head_learning_rate=0.2), (0.1, 0.2)),
        (OptimizerConfig(name="lion", head_learning_rate=0.5), (1e-5, 0.5)),
    ],
)
def test_default_rates_are_the_papers(config, expected):
    assert config.rates() == expected


def test_head_and_rest_move_at_their_own_rates_along_a_cosine():
    params = {"head": {"kernel": jnp.ones(2)}, "stem": {"kernel": jnp.ones(2)}}
    config = OptimizerConfig(
        name="sgd", learning_rate=0.1, head_learning_rate=1.0, momentum=0.0, weight_decay=0.0
    )
    optimizer = config.build(params, total_steps=2)
    state = optimizer.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    moved = []
    for _ in range(3):
        updates, state = optimizer.update(grads, state, params)
        moved.append((-updates["head"]["kernel"][0], -updates["stem"]["kernel"][0]))
    np.testing.assert_allclose(moved, [(1.0, 0.1), (0.5, 0.05), (0.0, 0.0)], atol=1e-7)


@pytest.mark.parametrize("head", [None, 2.0])
@pytest.mark.parametrize("name", ["adam", "sgd", "adamw", "lion"])
def test_rates_set_in_the_state_are_those_of_an_optimizer_built_with_them(name, head):
    params = {"head": {"kernel": jnp.ones(2)}, "stem": {"kernel": jnp.full(2, 2.0)}}
    built_head = None if head is None else 7.0
    built = OptimizerConfig(name=name, learning_rate=5.0, head_learning_rate=built_head)
    config = OptimizerConfig(name=name, learning_rate=0.5, head_learning_rate=head)
    optimizer, other = built.build(params, 4), config.build(params, 4)
    state, expected = config.set_rates(optimizer.init(params)), other.init(params)
    grads = jax.tree.map(lambda p: 0.25 * p, params)
    for _ in range(2):
        updates, state = optimizer.update(grads, state, params)
        reference, expected = other.update(grads, expected, params)
        assert equal(updates, reference)
        assert float(jnp.abs(updates["stem"]["kernel"]).min()) > 0


def test_weight_decay_is_added_to_the_gradient():
    params = {"head": jnp.full(1, 2.0)}
    config = OptimizerConfig(
        name="sgd", learning_rate=1.0, momentum=0.0, weight_decay=0.25, schedule="constant"
    )
    optimizer = config.build(params, 10)
    updates, _ = optimizer.update({"head": jnp.zeros(1)}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["head"], [-0.5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adamm"}, "unknown optimizer 'adamm'"),
        ({"name": "chain"}, "unknown optimizer"),
        ({"name": "_private"}, "unknown optimizer"),
        ({"schedule": "step"}, "'cosine' or 'constant'"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"head_learning_rate": float("nan")}, "head_learning_rate"),
        ({"weight_decay": float("inf")}, "weight_decay"),
        ({"momentum": 1.0}, "momentum"),
    ],
)
def test_bad_optimizers_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)


def test_a_head_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="head's pattern"):
        OptimizerConfig().build({"fc": jnp.ones(1)}, 10)


def test_a_stratified_step_does_not_depend_on_the_order_of_the_labels():
    images, labels = data()
    batch = np.array([0, 3, 6, 1, 4, 7, 2, 5, 8])  # three of each label, one after the other
    mixed = batch.reshape(3, 3).T.ravel()

    def params(indices, *, stratify):
        graphdef, state = create_state(small_model(), optax.sgd(0.1))
        step = make_train_step(graphdef, optax.sgd(0.1), stratify=stratify)
        return step(state, images, labels, jnp.asarray(indices), jax.random.key(0))[0].params

    assert equal(params(batch, stratify=False), params(mixed, stratify=True))
    assert not equal(params(batch, stratify=False), params(mixed, stratify=False))
