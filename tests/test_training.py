import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fqt_jax as fqt
from fqt_jax.estimators import Gradients
from fqt_jax.metrics import Metrics
from fqt_jax.models import VGG
from fqt_jax.training import (
    CrossEntropy,
    Padded,
    create_state,
    gather_on_device,
    make_eval_step,
    make_train_step,
    merge_model,
    pad_batch,
    reset_metrics,
)

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

LOSS = CrossEntropy(num_classes=3)
METRICS = {"accuracy": LOSS.accuracy}
KEY = jax.random.key(0)


def small_model() -> nnx.Module:
    model = VGG(((8,), (8,)), num_classes=3, in_features=1, rngs=nnx.Rngs(0))
    return fqt.quantize(model, fqt.FQT1).model


def data(n: int = 48) -> tuple[jax.Array, jax.Array]:
    """Images whose brightness tells the class."""
    labels = jnp.arange(n, dtype=jnp.int32) % 3
    noise = jax.random.normal(jax.random.key(9), (n, 8, 8, 1))
    return labels.astype(jnp.float32).reshape(-1, 1, 1, 1) * 2 - 2 + noise, labels


def batches(n_steps: int, offset: int = 0):
    images, labels = map(np.asarray, data())
    for i in range(n_steps):
        order = np.random.default_rng(offset + i).permutation(48)[:16]
        yield {"image": images[order], "label": labels[order]}


def run(state, step, n_steps, *, offset=0):
    for batch in batches(n_steps, offset):
        state, _ = step(state, batch, KEY)
    return state


def equal(a, b) -> bool:
    def raw(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(raw(x), raw(y)) for x, y in leaves)


def linear(features=3, outputs=1, optimizer=None, metrics=()):
    model = nnx.Linear(features, outputs, rngs=nnx.Rngs(0))
    return create_state(model, optimizer or optax.sgd(0.1), metrics)


def test_training_learns_and_compiles_once():
    graphdef, state = create_state(small_model(), optax.adam(1e-2), METRICS)
    step = make_train_step(graphdef, optax.adam(1e-2), loss=LOSS, metrics=METRICS)
    evaluate = make_eval_step(graphdef, loss=LOSS, metrics=METRICS)
    state = run(state, step, 40)
    state = run(reset_metrics(state), step, 1)
    sums = None
    for batch in (*batches(3), pad_batch(next(batches(1)), 16)):
        sums = evaluate(state, sums, batch)
    assert list(sums.means()) == ["loss", "accuracy"]
    assert sums.means()["accuracy"] > 0.9
    assert step.jitted._cache_size() == 1
    assert evaluate.jitted._cache_size() == 1
    assert int(state.step) == 41
    assert float(state.metrics.counts["loss"]) == 16


def test_the_state_is_donated_and_the_callers_model_survives():
    model = small_model()
    graphdef, state = create_state(model, optax.sgd(0.1))
    step = make_train_step(graphdef, optax.sgd(0.1), loss=LOSS)
    after = run(state, step, 1)
    assert jax.tree.leaves(state.params)[0].is_deleted()
    before = jax.tree.leaves(nnx.state(model, nnx.Param))[0]
    assert np.isfinite(before).all()
    assert isinstance(merge_model(graphdef, after), VGG)


@pytest.mark.parametrize("estimator", [fqt.estimators.FullBatch(), fqt.estimators.OneDraw()])
def test_the_same_seed_gives_the_same_state_bit_for_bit(estimator):
    states = []
    for _ in range(2):
        graphdef, state = create_state(small_model(), optax.adam(1e-2))
        step = make_train_step(graphdef, optax.adam(1e-2), loss=LOSS, estimator=estimator)
        states.append(run(state, step, 3))
    assert equal(*states)


def test_preprocessing_runs_in_the_step_with_a_key_of_its_own():
    keys = []

    def preprocess(batch, key):
        keys.append(key)
        return batch | {"image": batch["image"] + jax.random.uniform(key, batch["image"].shape)}

    optimizer = optax.sgd(0.1)
    graphdef, state = create_state(small_model(), optimizer)
    step = make_train_step(graphdef, optimizer, loss=LOSS, preprocess=preprocess)
    plain = make_train_step(graphdef, optimizer, loss=LOSS)
    with_noise = run(state, step, 1)
    without = run(create_state(small_model(), optimizer)[1], plain, 1)
    assert len(keys) == 1  # traced once
    assert not equal(with_noise.params, without.params)


def test_a_step_gathers_on_the_device_what_it_would_be_given():
    optimizer = optax.sgd(0.1)
    graphdef, state = create_state(small_model(), optimizer, METRICS)
    plain = make_train_step(graphdef, optimizer, loss=LOSS, metrics=METRICS)
    gathered = gather_on_device(plain)
    images, labels = data()
    order = np.arange(16, dtype=np.int32) * 3 % 16
    other = jax.tree.map(jnp.copy, state)
    state, loss = plain(state, (images[order], labels[order]), KEY)
    for indices in (order, jnp.asarray(order)):
        start = jax.tree.map(jnp.copy, other)
        got, got_loss = gathered(start, (images, labels), indices, KEY)
        assert start.step.is_deleted()
        np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(state.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("gathered", [False, True])
def test_evaluation_ignores_padding_and_changes_nothing(gathered):
    graphdef, state = create_state(small_model(), optax.sgd(0.1))
    images, labels = data(20)
    evaluate = make_eval_step(graphdef, loss=LOSS, metrics=METRICS)
    if gathered:
        evaluate = gather_on_device(evaluate)
        indices = np.arange(32, dtype=np.int32).reshape(2, 16)
        sums = None
        for part in np.where(indices < 20, indices, -1):
            sums = evaluate(state, sums, (images, labels), part)
    else:
        sums = evaluate(state, Metrics.zero(METRICS), (images[:16], labels[:16]))
        sums = evaluate(state, sums, pad_batch((images[16:], labels[16:]), 16))
    assert evaluate.jitted._cache_size() == 1
    model = merge_model(graphdef, state)
    model.eval()
    logits = model(images)
    assert float(sums.counts["loss"]) == 20
    expected = float(LOSS(logits, (images, labels)).mean())
    np.testing.assert_allclose(sums.means()["loss"], expected, rtol=1e-5)
    hits = (jnp.argmax(logits, 1) == labels).mean()
    np.testing.assert_allclose(sums.means()["accuracy"], hits, rtol=1e-6)


def test_a_step_of_regression_is_that_of_float64(rng):
    x, y = rng.standard_normal((8, 3)), rng.standard_normal((8, 2))

    def loss(outputs, batch):
        return jnp.mean(jnp.square(outputs - batch["target"]), axis=-1)

    def error(outputs, batch):
        return jnp.abs(outputs - batch["target"]).max(axis=-1)

    graphdef, state = linear(3, 2, metrics=["error"])
    w, b = (np.float64(state.params[name][...]) for name in ("kernel", "bias"))
    step = make_train_step(graphdef, optax.sgd(0.1), loss=loss, metrics={"error": error})
    batch = {"x": np.float32(x), "target": np.float32(y)}
    state, mean = step(state, batch, KEY)
    off = x @ w + b - y
    np.testing.assert_allclose(mean, np.square(off).mean(), rtol=1e-5)
    np.testing.assert_allclose(state.params["kernel"][...], w - 0.1 * x.T @ off / 8, rtol=1e-4)
    np.testing.assert_allclose(state.params["bias"][...], b - 0.1 * off.mean(0), rtol=1e-4)
    np.testing.assert_allclose(state.metrics.means()["error"], np.abs(off).max(1).mean(), rtol=1e-5)


class Tagger(nnx.Module):
    """Two outputs for each token of a sequence."""

    def __init__(self):
        self.embed = nnx.Embed(7, 8, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(8, 2, rngs=nnx.Rngs(1))

    def __call__(self, tokens, lengths):
        mask = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        return {"logits": self.head(self.embed(tokens)), "mask": mask}


def token_losses(outputs, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs["logits"], batch["tags"])
    return jnp.mean(losses, axis=-1, where=outputs["mask"])


def right_tokens(outputs, batch):
    right = jnp.argmax(outputs["logits"], axis=-1) == batch["tags"]
    return jnp.sum(right & outputs["mask"], axis=1), jnp.sum(outputs["mask"], axis=1)


@pytest.mark.parametrize("estimator", [fqt.estimators.FullBatch(), fqt.estimators.OneDraw(0.5)])
def test_sequences_with_several_inputs_and_outputs(rng, estimator):
    tokens = rng.integers(0, 7, (32, 5))
    batch = {"tokens": tokens, "tags": tokens % 2, "lengths": rng.integers(1, 6, 32)}
    options = {
        "loss": token_losses,
        "metrics": {"token_accuracy": right_tokens},
        "inputs": lambda batch: (batch["tokens"], batch["lengths"]),
    }
    optimizer = optax.adam(0.1)
    graphdef, state = create_state(Tagger(), optimizer, options["metrics"])
    step = make_train_step(graphdef, optimizer, estimator=estimator, **options)
    for _ in range(60):
        state, loss = step(state, batch, KEY)
    assert loss < 0.1
    assert float(state.metrics.counts["token_accuracy"]) == 60 * batch["lengths"].sum()
    evaluate = make_eval_step(graphdef, **options)
    shorter = jax.tree.map(lambda a: a[:5], batch)
    sums = evaluate(state, None, pad_batch(shorter, 32))
    assert float(sums.counts["token_accuracy"]) == shorter["lengths"].sum()
    assert sums.means()["token_accuracy"] == 1.0


class FirstHalf:
    """The gradient of the first half of a batch."""

    def gradients(self, model, batch, loss, key):
        outputs, others = model.run(model.params, model.others, batch)
        half = jax.tree.map(lambda a: a[: len(a) // 2], batch)

        def objective(params):
            return jnp.mean(loss(model.run(params, model.others, half)[0], half))

        return Gradients(jax.grad(objective)(model.params), outputs, others)


def test_an_estimator_of_ones_own_is_an_object_with_one_method():
    def loss(outputs, batch):
        return outputs[:, 0] * batch[1]

    graphdef, state = linear()
    bias = float(state.params["bias"][0])
    step = make_train_step(graphdef, optax.sgd(1.0), loss=loss, estimator=FirstHalf())
    state, _ = step(state, (np.eye(4, 3, dtype=np.float32), np.float32([1, 2, 30, 40])), KEY)
    assert float(state.params["bias"][0]) == bias - 1.5
    for wrong in (FirstHalf, None):
        with pytest.raises(TypeError, match="estimator must be an object with a method gradients"):
            make_train_step(graphdef, optax.sgd(1.0), loss=loss, estimator=wrong)


def square(outputs, batch):
    return jnp.square(outputs[:, 0])


X = np.ones((4, 3), np.float32)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": X, "y": X[:3]}, "must be equally long: x has 4 entries, y 3"),
        ((X, {"a": X[:2]}), r"must be equally long: 0 has 4 entries, 1\.a 2"),
        ({"x": X[:0]}, "the batch is empty"),
        ({}, r"must hold arrays; got \{\}"),
        ({"x": X, "seed": 3}, "seed has none"),
        ((X,) * 0, r"must hold arrays; got \(\)"),
        ({"tokens": X}, "none of 'image', 'x', 'inputs', but 'tokens': say where .* by inputs="),
        ({"x": X, "image": X}, "several of 'image', 'x', 'inputs': 'image', 'x': say where"),
    ],
)
def test_batches_that_are_none_are_named(batch, message):
    graphdef, state = linear()
    with pytest.raises(ValueError, match=message):
        make_train_step(graphdef, optax.sgd(0.1), loss=square)(state, batch, KEY)
    with pytest.raises(ValueError, match=message):
        make_eval_step(graphdef, loss=square)(state, None, batch)
    assert not state.step.is_deleted()


@pytest.mark.parametrize(
    ("loss", "metrics", "error", "message"),
    [
        (
            lambda o, b: jnp.mean(o),
            {},
            ValueError,
            r"the loss .* 4 samples.* shape \(\): leave out",
        ),
        (lambda o, b: o, {}, ValueError, r"the loss must give .* shape \(4,\); got shape \(4, 1\)"),
        (lambda o, b: o[:, 0] > 0, {}, TypeError, "the loss must be floating-point; got bool"),
        (square, {"a": lambda o, b: jnp.mean(o)}, ValueError, "the metric 'a' must give one"),
        (square, {"a": lambda o, b: (o[:, 0], 4)}, ValueError, "the metric 'a' must give one"),
        (square, {"a": lambda o, b: (1, 2, 3)}, ValueError, r"values or \(sums, counts\); got 3"),
    ],
)
def test_losses_and_metrics_of_the_wrong_shape_are_named(loss, metrics, error, message):
    graphdef, state = linear(metrics=metrics)
    with pytest.raises(error, match=message):
        make_train_step(graphdef, optax.sgd(0.1), loss=loss, metrics=metrics)(state, {"x": X}, KEY)
    with pytest.raises(error, match=message):
        make_eval_step(graphdef, loss=loss, metrics=metrics)(state, None, {"x": X})


def test_metrics_that_clash_are_named():
    graphdef, state = linear(metrics=["error"])
    for build in (
        lambda: create_state(merge_model(graphdef, state), optax.sgd(0.1), ["loss"]),
        lambda: make_train_step(graphdef, optax.sgd(0.1), loss=square, metrics={"loss": square}),
        lambda: make_eval_step(graphdef, loss=square, metrics={"loss": square}),
    ):
        with pytest.raises(ValueError, match="a metric cannot be called 'loss'"):
            build()
    with pytest.raises(ValueError, match=r"metrics must be their names, such as \('error',\)"):
        Metrics.zero("error")
    step = make_train_step(graphdef, optax.sgd(0.1), loss=square, metrics={"other": square})
    with pytest.raises(ValueError, match="sums are of error, loss, the step's metrics loss, other"):
        step(state, {"x": X}, KEY)
    with pytest.raises(ValueError, match="there is no mean of no samples"):
        state.metrics.means()


@pytest.mark.parametrize(
    "labels", [[0, 1, 2, 3], [0, 1, -1, 2], [np.iinfo(np.int32).min, 0, 0, 2**31 - 1]]
)
def test_labels_out_of_range_are_errors_or_nan(labels):
    labels = np.array(labels, np.int32)
    graphdef, state = linear(outputs=3)
    step = make_train_step(graphdef, optax.sgd(0.1), loss=LOSS)
    evaluate = make_eval_step(graphdef, loss=LOSS)
    message = rf"must lie in 0\.\.2 for 3 classes; .* from {labels.min()} to {labels.max()}\."
    on_device = (jnp.asarray(X), jnp.asarray(labels))
    for call in (
        lambda: step(state, (X, labels), KEY),
        lambda: evaluate(state, None, (X, labels)),
        lambda: evaluate(state, None, pad_batch((X, labels), 6)),
        lambda: gather_on_device(step)(state, on_device, np.arange(2), KEY),
        lambda: gather_on_device(evaluate)(state, None, on_device, np.arange(2)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not state.step.is_deleted()
    # Labels on the device are not waited for.
    assert np.isnan(evaluate(state, None, on_device).means()["loss"])
    state, loss = step(state, on_device, KEY)
    assert np.isnan(loss)
    assert np.isnan(state.params["bias"][...]).all()


def test_a_data_set_is_checked_once():
    checked = []

    class Loss:
        def __call__(self, outputs, batch):
            return square(outputs, batch)

        def check(self, batch, wait):
            checked.append(wait)

    graphdef, state = linear()
    step = make_train_step(graphdef, optax.sgd(0.1), loss=Loss())
    gathered = gather_on_device(step)
    for _ in range(2):
        state, _ = step(state, {"x": X}, KEY)
    assert checked == [False, False]
    train, other = ({"x": jnp.asarray(X)} for _ in range(2))
    for part in (train, train, dict(train), other, other):
        state, _ = gathered(state, part, np.arange(2), KEY)
    assert checked == [False, False, True, True]


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (np.array([0, 4]), ValueError, r"in (0|-1)\.\.3 for 4 samples; got 0 to 4"),
        (np.array([-2, 3]), ValueError, r"in (0|-1)\.\.3 for 4 samples; got -2 to 3"),
        (np.array([], np.int32), ValueError, "the batch is empty"),
        (np.array([0.0]), TypeError, r"whole numbers with one axis; got float64\[1\]"),
        (np.array([[0]]), TypeError, r"whole numbers with one axis; got int64\[1, 1\]"),
        ([0, 1], TypeError, "indices must be an array; got list"),
    ],
)
def test_bad_indices_are_named(indices, error, message):
    graphdef, state = linear()
    step = gather_on_device(make_train_step(graphdef, optax.sgd(0.1), loss=square))
    evaluate = gather_on_device(make_eval_step(graphdef, loss=square))
    train = {"x": jnp.asarray(X)}
    with pytest.raises(error, match=message):
        step(state, train, indices, KEY)
    with pytest.raises(error, match=message):
        evaluate(state, None, train, indices)


def test_only_padding_has_negative_indices_and_data_are_on_the_device():
    graphdef, state = linear()
    step = gather_on_device(make_train_step(graphdef, optax.sgd(0.1), loss=square))
    with pytest.raises(ValueError, match=r"indices must lie in 0\.\.3"):
        step(state, {"x": jnp.asarray(X)}, np.array([0, -1]), KEY)
    with pytest.raises(TypeError, match=r"jax\.device_put\(data\); got ndarray"):
        step(state, {"x": X}, np.array([0, 1]), KEY)
    with pytest.raises(ValueError, match="equally long"):
        step(state, {"x": jnp.asarray(X), "y": jnp.zeros(3)}, np.array([0, 1]), KEY)
    with pytest.raises(TypeError, match="from make_train_step or make_eval_step; got function"):
        gather_on_device(square)


def test_padding_is_not_trained_on():
    graphdef, state = linear()
    with pytest.raises(ValueError, match="a training step takes whole batches"):
        make_train_step(graphdef, optax.sgd(0.1), loss=square)(state, pad_batch({"x": X}, 6), KEY)


def test_padding_repeats_the_last_sample():
    padded = pad_batch({"x": np.arange(3), "y": jnp.arange(6).reshape(3, 2)}, 5)
    assert isinstance(padded, Padded)
    np.testing.assert_array_equal(padded.batch["x"], [0, 1, 2, 2, 2])
    np.testing.assert_array_equal(padded.batch["y"][3:], [[4, 5], [4, 5]])
    np.testing.assert_array_equal(padded.valid, [True, True, True, False, False])
    with pytest.raises(ValueError, match="has 3 samples, more than the 2"):
        pad_batch(np.arange(3), 2)
    with pytest.raises(ValueError, match="the batch is empty"):
        pad_batch(np.arange(0), 2)
