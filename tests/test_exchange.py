"""Gradients that cross between devices as packed signs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from experiments.bench.traffic import collectives
from fqt_jax.adam import adam
from fqt_jax.exchange import Signs
from fqt_jax.training import create_state, make_train_step, place_state
from tests.test_devices import mesh

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

KEY = jax.random.key(0)


def exchanged(exchange, grads, steps, devices=4):
    """What each of some steps gives to all devices, and what they keep after the last."""
    params = {"a": jnp.zeros((5, 7)), "b": jnp.zeros(3)}
    state = exchange.init(params, devices)

    def one(grads, state, step):
        mean, new = exchange.reduce(jax.tree.map(lambda g: g[0], grads), state, step, "data")
        return jax.tree.map(lambda m: m[None], mean), new

    run = jax.jit(
        jax.shard_map(
            one,
            mesh=mesh(devices),
            in_specs=(P("data"), P("data"), P()),
            out_specs=P("data"),
            check_vma=False,
        )
    )
    found = []
    for step in range(steps):
        mean, state = run(jax.tree.map(lambda g: g[step], grads), state, jnp.int32(step))  # noqa: B023
        for leaf in jax.tree.leaves(mean):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))
        found.append(np.concatenate([np.ravel(leaf[0]) for leaf in jax.tree.leaves(mean)]))
    return np.stack(found), jax.tree.map(np.asarray, state)


def random_grads(rng, steps, devices=4):
    shapes = {"a": (5, 7), "b": (3,)}
    return {
        name: rng.standard_normal((steps, devices, *shape)).astype(np.float32) + 0.3
        for name, shape in shapes.items()
    }


def flat(grads):
    leaves = [np.asarray(g).reshape(*g.shape[:2], -1) for g in grads.values()]
    return np.concatenate(leaves, axis=2).astype(np.float64)


def test_what_signs_leave_out_is_kept_and_comes_later(rng):
    """The momentum that is sent, and the errors that are kept, sum to the momentum of float64."""
    steps, warmup, beta = 12, 3, 0.9
    grads = random_grads(rng, steps)
    got, state = exchanged(Signs(warmup, beta, block=16), grads, steps)
    of_devices = flat(grads)
    np.testing.assert_allclose(got[:warmup], of_devices[:warmup].mean(axis=1), atol=1e-5)
    momentum, owed = np.zeros(38), np.zeros(38)
    for step in range(steps):
        wanted = beta * momentum + (1 - beta) * of_devices[step].mean(axis=0)
        sent = beta * momentum + (1 - beta) * got[step]
        owed += wanted - sent
        momentum = sent
    kept = state.error.mean(axis=0)[:38] + state.error_of_part.reshape(-1)[:38]
    np.testing.assert_allclose(kept, owed, atol=1e-5)
    np.testing.assert_allclose(state.momentum[0][:38], momentum, atol=1e-5)
    assert np.abs(owed).max() > 0.01
    # One size for each block of 16: signs are all that differs within one.
    assert len(np.unique(np.abs(state.momentum[0][:16]))) == 1


def test_what_is_kept_moves_to_another_number_of_devices(rng):
    exchange = Signs(1, block=16)
    grads = random_grads(rng, 4)
    _, state = exchanged(exchange, grads, 4)
    params = {"a": jnp.zeros((5, 7)), "b": jnp.zeros(3)}
    moved = exchange.moved(jax.tree.map(jnp.asarray, state), params, 2)
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, exchange.init(params, 2))
    for take in (
        lambda s: s.error.mean(axis=0)[:38],
        lambda s: s.error_of_part.reshape(-1)[:38],
        lambda s: s.momentum[0][:38],
    ):
        np.testing.assert_allclose(take(moved), take(state), atol=1e-6)


def regression(exchange, steps, over, warmup=40):
    optimizer = adam(optax.cosine_decay_schedule(0.005, steps), freeze_after=warmup)
    model = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
    options = {} if exchange is None else {"exchange": exchange}
    graphdef, state = create_state(model, optimizer, mesh=over, **options)
    step = make_train_step(
        graphdef,
        optimizer,
        loss=lambda outputs, batch: jnp.mean(jnp.square(outputs - batch["y"]), axis=1),
        mesh=over,
        **options,
    )
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((64, 64), np.float32), rng.standard_normal((64, 32), np.float32)
    batch = {"x": x, "y": x @ w / 8}
    state, losses = place_state(state, over), []
    for _ in range(steps):
        state, loss = step(state, batch, KEY)
        losses.append(float(loss))
    return np.array(losses), state, (step, batch)


def test_signs_train_as_floats_do():
    floats, _, _ = regression(None, 300, mesh(4))
    signs, state, (step, batch) = regression(Signs(40, block=256), 300, mesh(4))
    np.testing.assert_allclose(signs[:40], floats[:40], rtol=1e-3)
    assert (signs[41:] != floats[41:]).any()
    assert signs[-1] < 2 * floats[-1] < 0.02 * floats[0]
    again, _, _ = regression(Signs(40, block=256), 300, mesh(4))
    np.testing.assert_array_equal(signs, again)
    for leaf in jax.tree.leaves(state.params):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert all(np.array_equal(copy, copies[0]) for copy in copies)
    assert state.exchange.error.addressable_shards[0].data.shape == (1, 3072)
    text = step.jitted.lower(state, batch, KEY).compile().as_text()
    parameters, devices = 64 * 32 + 32, 4
    bytes_of_signs = -(-parameters // (devices * 256)) * 256 * devices // 8
    sent = [each for each in collectives(text) if each.type == "u8"]
    assert {each.kind for each in sent} == {"all-to-all", "all-gather"}
    assert [each.bytes for each in sent] == [bytes_of_signs] * 2
    in_floats = sum(each.bytes for each in collectives(text) if each.branch == 1)
    in_signs = sum(each.bytes for each in collectives(text) if each.branch == 0)
    assert in_signs / 2 < 1.2 * in_floats / 32 + 100  # each way; a size for each block besides


def test_the_second_moment_is_frozen_and_the_first_goes_on():
    params, grads = jnp.ones(3), jnp.array([1.0, -2.0, 3.0])
    frozen, plain = adam(0.1, freeze_after=2), adam(0.1)
    state, other = frozen.init(params), plain.init(params)
    for step in range(4):
        updates, state = frozen.update(grads * (step + 1), state)
        expected, other = plain.update(grads * (step + 1), other)
        if step == 1:
            at_two = np.asarray(optax.tree.get(state, "nu"))
            np.testing.assert_allclose(updates, expected, rtol=1e-6)
    nu, mu = (np.asarray(optax.tree.get(state, name)) for name in ("nu", "mu"))
    np.testing.assert_array_equal(nu, at_two)
    np.testing.assert_allclose(mu, optax.tree.get(other, "mu"), rtol=1e-6)
    corrected = np.sqrt(nu / (1 - 0.999**2))
    np.testing.assert_allclose(updates, -0.1 * mu / (1 - 0.9**4) / (corrected + 1e-8), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": 0}, "warmup must be a whole number from 1 on; got 0"),
        ({"warmup": 1, "momentum": 1.0}, r"momentum must be in \[0, 1\); got 1.0"),
        ({"warmup": 1, "block": 12}, "block must be a multiple of 8; got 12"),
    ],
)
def test_numbers_that_make_no_sense_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Signs(**options)
    assert dataclasses.is_dataclass(Signs)
