"""Steps on a mesh of eight devices: what one device computes, but for whose draws are whose."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import fqt_jax as fqt
from experiments.bench.traffic import collectives
from fqt_jax.estimators import FullBatch, OneDraw
from fqt_jax.mesh import by_sample, data_mesh, replicate, shard_batch, whole
from fqt_jax.models import VGG, create_model
from fqt_jax.training import (
    CrossEntropy,
    create_state,
    gather_on_device,
    make_eval_step,
    make_train_step,
    pad_batch,
)

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

DEVICES = 8
LOSS = CrossEntropy(num_classes=3)
METRICS = {"accuracy": LOSS.accuracy}
KEY = jax.random.key(0)
OPTIMIZER = optax.sgd(0.1)


def mesh(devices: int = DEVICES) -> jax.sharding.Mesh:
    return data_mesh(jax.devices()[:devices])


def network(recipe="fqt1"):
    model = VGG(((8,), (8,)), num_classes=3, in_features=1, rngs=nnx.Rngs(0))
    return fqt.quantize(model, recipe).model


def samples(n: int = 32):
    labels = np.arange(n, dtype=np.int32) % 3
    noise = np.random.default_rng(0).standard_normal((n, 8, 8, 1), np.float32)
    return {"image": labels.astype(np.float32).reshape(-1, 1, 1, 1) - 1 + noise, "label": labels}


def trained(model, steps=2, batch=None, **options):
    graphdef, state = create_state(model, OPTIMIZER, METRICS)
    step = make_train_step(graphdef, OPTIMIZER, loss=LOSS, metrics=METRICS, **options)
    for _ in range(steps):
        state, loss = step(state, samples() if batch is None else batch, KEY)
    return state, loss


def floats(tree):
    return [np.asarray(a) for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]


def assert_close(got, expected, tolerance):
    for a, b in zip(floats(got), floats(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("recipe", "estimator"),
    [
        ("full_precision", FullBatch()),
        ("qat", FullBatch()),
        ("qat", OneDraw(1.0)),
        ("qat", OneDraw(1.0, scope="batch")),
    ],
)
def test_float_gradients_are_those_of_one_device(recipe, estimator):
    expected, expected_loss = trained(network(recipe), estimator=estimator)
    got, loss = trained(network(recipe), estimator=estimator, mesh=mesh())
    assert_close((got, loss), (expected, expected_loss), 1e-6)
    assert float(got.metrics.counts["accuracy"]) == 64


def test_a_mesh_may_have_several_axes():
    two = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("host", "device"))
    expected, _ = trained(network("qat"))
    got, _ = trained(network("qat"), mesh=two)
    assert_close(got.params, expected.params, 1e-6)
    assert by_sample(two).spec == P(("host", "device"))


def test_local_statistics_are_those_of_steps_on_each_shard():
    shards = [jax.tree.map(lambda a: a[i : i + 16], samples()) for i in (0, 16)]  # noqa: B023
    alone = [trained(network("qat"), 1, shard)[0] for shard in shards]
    got, _ = trained(network("qat"), 1, mesh=mesh(2), statistics="local")
    for part in ("params", "others"):
        mean = [np.mean(a, 0) for a in zip(*(floats(getattr(s, part)) for s in alone), strict=True)]
        for a, b in zip(floats(getattr(got, part)), mean, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", [FullBatch(), OneDraw(), OneDraw(scope="batch")])
def test_runs_are_bit_identical_and_devices_agree(estimator):
    states = [trained(network(), estimator=estimator, mesh=mesh())[0] for _ in range(2)]
    for first, second in zip(*map(jax.tree.leaves, states), strict=True):
        if jnp.issubdtype(first.dtype, jax.dtypes.prng_key):
            first, second = map(jax.random.key_data, (first, second))
        copies = [np.asarray(shard.data) for shard in first.addressable_shards]
        assert len(copies) == DEVICES
        for copy in (*copies, np.asarray(second)):
            np.testing.assert_array_equal(copy, copies[0])


class OneLayer(nnx.Module):
    """Without norms the gradient of a quantized layer is unbiased."""

    def __init__(self, recipe):
        self.head = fqt.QuantLinear(8, 3, recipe=recipe, rngs=nnx.Rngs(params=0, rounding=1))

    def __call__(self, x):
        return self.head(x.reshape(len(x), -1)[:, :8])


def gradients(recipe, draws, batch, **options):
    """Gradients of one state and batch, from the updates of SGD at the rate 1."""
    optimizer = optax.sgd(1.0)
    graphdef, state = create_state(OneLayer(recipe), optimizer)
    step = make_train_step(graphdef, optimizer, loss=LOSS, **options)
    kernel, found = np.asarray(state.params["head"]["kernel"][...]), []
    for draw in range(draws):
        one = jax.tree.map(jnp.copy, state)
        # The layer's own stream goes on, as between steps.
        others = jax.tree.map(
            lambda a: a + draw if jnp.issubdtype(a.dtype, jnp.integer) else a,  # noqa: B023
            one.others,
        )
        new, _ = step(dataclasses.replace(one, others=others), batch, KEY)
        found.append(kernel - np.asarray(new.params["head"]["kernel"][...]))
    return np.stack(found)


def test_rounded_gradients_have_the_mean_of_float_ones_and_the_variance_of_independent_shards():
    draws, batch = 400, samples(16)
    exact = gradients("qat", 1, batch)[0]
    got = gradients("fqt1", draws, batch, mesh=mesh(4))
    error = got.std(axis=0) / np.sqrt(draws)
    assert (np.abs(got.mean(axis=0) - exact) < 5 * error + 1e-6).all()
    shards = [jax.tree.map(lambda a: a[i : i + 4], batch) for i in range(0, 16, 4)]  # noqa: B023
    of_shards = [gradients("fqt1", draws, shard).var(axis=0).sum() for shard in shards]
    expected = sum(of_shards) / 4**2
    assert got.var(axis=0).sum() == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("scope", ["shard", "batch"])
def test_one_draw_is_unbiased_from_shards_and_from_the_batch(scope):
    draws, batch = 300, samples(16)
    exact = gradients("qat", 1, batch)[0]
    found = []
    optimizer = optax.sgd(1.0)
    graphdef, state = create_state(OneLayer("qat"), optimizer)
    step = make_train_step(
        graphdef, optimizer, loss=LOSS, estimator=OneDraw(0.3, scope=scope), mesh=mesh(4)
    )
    kernel = np.asarray(state.params["head"]["kernel"][...])
    for draw in range(draws):
        new, _ = step(jax.tree.map(jnp.copy, state), batch, jax.random.key(draw))
        found.append(kernel - np.asarray(new.params["head"]["kernel"][...]))
    got = np.stack(found)
    error = got.std(axis=0) / np.sqrt(draws)
    assert got.std() > 0
    assert (np.abs(got.mean(axis=0) - exact) < 5 * error + 1e-6).all()


class Noise(nnx.Module):
    """Gives dropout of its inputs, and of its norm the statistics."""

    def __init__(self):
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=3))
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return self.drop(x) * self.scale[...]


def test_shards_have_random_streams_of_their_own_and_the_state_has_one():
    def loss(outputs, batch):
        return jnp.sum(outputs, axis=1)

    graphdef, state = create_state(Noise(), OPTIMIZER, {"kept": None})
    step = make_train_step(
        graphdef,
        OPTIMIZER,
        loss=loss,
        metrics={"kept": lambda outputs, batch: 2.0 ** batch["i"] * (outputs[:, 0] > 0)},
        mesh=mesh(),
    )
    batch = {"x": np.ones((8, 1), np.float32), "i": np.arange(8, dtype=np.float32)}
    seen = set()
    for _ in range(5):
        key = jax.tree.leaves(state.others, is_leaf=lambda a: isinstance(a, nnx.RngKey))[1]
        before = np.asarray(jax.random.key_data(key[...]))
        kept = float(state.metrics.sums["kept"])
        state, _ = step(state, batch, KEY)
        seen.add(float(state.metrics.sums["kept"]) - kept)
        after = jax.tree.leaves(state.others, is_leaf=lambda a: isinstance(a, nnx.RngKey))[1]
        np.testing.assert_array_equal(jax.random.key_data(after[...]), before)
    assert len(seen) > 1  # the streams go on
    assert not seen <= {0.0, 255.0}  # and are not the same everywhere


def test_evaluation_on_a_mesh_is_that_of_one_device():
    graphdef, state = create_state(network("qat"), OPTIMIZER)
    sums = [
        make_eval_step(graphdef, loss=LOSS, metrics=METRICS, mesh=over)(
            state, None, pad_batch(samples(27), 32)
        ).means()
        for over in (None, mesh())
    ]
    assert sums[1] == pytest.approx(sums[0], rel=1e-6)


def test_a_gathering_step_takes_each_devices_samples():
    graphdef, state = create_state(network("qat"), OPTIMIZER, METRICS)
    step = gather_on_device(
        make_train_step(graphdef, OPTIMIZER, loss=LOSS, metrics=METRICS, mesh=mesh())
    )
    data = replicate(samples(48), mesh())
    order = np.random.default_rng(1).permutation(48)[:32].astype(np.int32)
    state, _ = step(replicate(state, mesh()), data, order, KEY)
    chosen = jax.tree.map(lambda a: a[order], samples(48))
    expected, _ = trained(network("qat"), 1, chosen)
    assert_close(state, expected, 1e-6)
    text = step.jitted.lower(state, data, order, KEY).compile().as_text()
    assert "all-gather" not in text


def test_batches_are_put_where_the_step_wants_them():
    batch = shard_batch(samples(), mesh())
    assert batch["image"].sharding == by_sample(mesh())
    assert batch["image"].addressable_shards[0].data.shape == (4, 8, 8, 1)
    key = replicate({"key": KEY}, mesh())["key"]
    assert key.sharding.is_equivalent_to(whole(mesh()), 0)
    expected, _ = trained(network("qat"), 1)
    got, _ = trained(network("qat"), 1, batch, mesh=mesh())
    assert_close(got.params, expected.params, 1e-6)


def crossing(estimator, statistics="synchronized"):
    graphdef, state = create_state(network(), OPTIMIZER)
    step = make_train_step(
        graphdef, OPTIMIZER, loss=LOSS, estimator=estimator, mesh=mesh(), statistics=statistics
    )
    text = step.jitted.lower(state, samples(), KEY).compile().as_text()
    return [(each.kind, each.entries) for each in collectives(text)], state


def test_only_parameters_and_statistics_cross_between_devices():
    found, state = crossing(FullBatch())
    parameters = sum(a.size for a in floats(state.params))
    statistics = sum(a.size for a in floats(state.others))
    assert {kind for kind, _ in found} == {"all-reduce"}
    # Forward and backward statistics: five moments at most, four channels' sums; loss and counts.
    assert parameters < sum(size for _, size in found) < parameters + 8 * statistics + 8
    found, _ = crossing(FullBatch(), "local")
    assert sum(size for _, size in found) == parameters + statistics + 3


def test_a_draw_from_the_batch_moves_rows_and_nothing_else():
    found, _ = crossing(OneDraw(scope="batch"))
    gathered = [size for kind, size in found if kind == "all-gather"]
    assert sorted(gathered) == [2 * DEVICES, 32]  # seeds, and a number for each sample
    moved = [size for kind, size in found if kind == "reduce-scatter"]
    assert sorted(moved) == [1, 64]  # a label and an image for each device: 8 of 32 are drawn


@pytest.mark.parametrize(
    "name",
    ["lstm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vit_small", "resnet18"))],
)
def test_models_of_all_kinds_are_traced_on_a_mesh(name):
    model = create_model(
        name, num_classes=3, in_features=1, width=0.125, image_size=(8, 8), rngs=nnx.Rngs(0)
    )
    model = fqt.quantize(model, "fqt1", example=jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))
    graphdef, state = create_state(model.model, OPTIMIZER)
    step = make_train_step(graphdef, OPTIMIZER, loss=LOSS, mesh=mesh())
    new, loss = jax.eval_shape(step.function, state, samples(), KEY)
    assert loss.shape == ()
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_what_cannot_be_shared_out_is_named():
    graphdef, state = create_state(network("qat"), OPTIMIZER, METRICS)
    options = {"loss": LOSS, "metrics": METRICS, "mesh": mesh()}
    message = "a batch of 30 samples cannot be shared out evenly among 8 devices: its size must be"
    with pytest.raises(ValueError, match=message):
        make_train_step(graphdef, OPTIMIZER, **options)(state, samples(30), KEY)
    with pytest.raises(ValueError, match=message):
        make_eval_step(graphdef, **options)(state, None, samples(30))
    with pytest.raises(ValueError, match=message):
        gather_on_device(make_train_step(graphdef, OPTIMIZER, **options))(
            state, jax.device_put(samples()), np.arange(30), KEY
        )
    with pytest.raises(ValueError, match=message):
        shard_batch(samples(30), mesh())
    with pytest.raises(ValueError, match="statistics must be 'synchronized' or 'local'; got 'own'"):
        make_train_step(graphdef, OPTIMIZER, statistics="own", **options)
    with pytest.raises(ValueError, match="scope must be 'shard' or 'batch'; got 'all'"):
        OneDraw(scope="all")
    with pytest.raises(ValueError, match="a mesh must have devices"):
        data_mesh([])
    step = make_train_step(
        graphdef, OPTIMIZER, estimator=OneDraw(scope="batch"), statistics="local", **options
    )
    with pytest.raises(ValueError, match=r"moves rows to other devices, .* must be synchronized"):
        step(state, samples(), KEY)


THOUSAND_STEPS = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", ".jax_cache")
import optax
from fqt_jax.training import create_state, make_train_step
from tests.test_devices import KEY, LOSS, mesh, network, samples
from fqt_jax.estimators import FullBatch, OneDraw
for estimator in (FullBatch(), OneDraw(scope="batch")):
    optimizer = optax.adam(1e-3)
    graphdef, state = create_state(network(), optimizer)
    step = make_train_step(graphdef, optimizer, loss=LOSS, estimator=estimator, mesh=mesh())
    for _ in range(1000):
        state, loss = step(state, samples(64), KEY)
    print(float(loss))
"""


@pytest.mark.slow
def test_no_deadlock_in_a_thousand_steps():
    """Native kernels and collective operations use threads of one pool."""
    done = subprocess.run(
        [sys.executable, "-c", THOUSAND_STEPS], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert all(float(line) < 0.5 for line in done.stdout.split())
