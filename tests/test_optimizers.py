import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fqt_jax.averaging import averaged_parameters
from fqt_jax.optimizers import OptimizerConfig, adam
from fqt_jax.training import create_state, gather_on_device, make_train_step
from tests.test_training import LOSS, data, equal, small_model

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


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
        ({"name": "sgd", "momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"momentum": 0.9}, "momentum has no effect on adam"),
        ({"name": "lion", "momentum": 0.0}, "momentum has no effect on lion"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\)"),
        ({"cycles": 0}, "cycles must be a whole number from 1 on"),
        ({"cycles": 1.5}, "cycles must be a whole number"),
        ({"cycles": 2, "schedule": "constant"}, "cycles have no effect on a constant"),
        ({"clip_norm": 0.0}, "clip_norm must be a positive number"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \(0, 1\)"),
        ({"freeze": "stem("}, r"freeze must be a regular expression; 'stem\(' is none"),
    ],
)
def test_bad_optimizers_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)


def descent(params, grads, steps, **options):
    """How far each step of plain descent at the rate 1 moves the parameters."""
    config = OptimizerConfig(
        **{"name": "sgd", "learning_rate": 1.0, "momentum": 0.0, "weight_decay": 0.0, **options}
    )
    optimizer = config.build(params, steps)
    state, moves = optimizer.init(params), []
    for _ in range(steps):
        updates, state = optimizer.update(grads, state, params)
        moves.append(jax.tree.map(lambda u: -float(u[0]), updates))
    return moves


COSINE = [(1 + np.cos(np.pi * k / 4)) / 2 for k in range(4)]


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"cycles": 2}, COSINE * 2),
        ({"warmup": 0.5}, [0, 0.25, 0.5, 0.75, *COSINE]),
        ({"warmup": 1 / 3, "cycles": 2}, [0, 0.25, 0.5, 0.75, *COSINE, *COSINE]),
        ({"warmup": 0.5, "schedule": "constant"}, [0, 0.5, 1, 1]),
    ],
)
def test_rates_rise_first_and_cosines_begin_again(options, rates):
    ones = {"w": jnp.ones(1)}
    moves = descent(ones, ones, len(rates), **options)
    np.testing.assert_allclose([move["w"] for move in moves], rates, atol=1e-6)


def test_frozen_parameters_stay_and_count_for_no_norm():
    params = {"head": {"kernel": jnp.ones(1)}, "stem": {"kernel": jnp.ones(1), "bias": jnp.ones(1)}}
    grads = {"head": {"kernel": 3 * params["head"]["kernel"]}, "stem": {"kernel": 4 * jnp.ones(1)}}
    grads["stem"]["bias"] = jnp.full(1, 100.0)
    (move,) = descent(params, grads, 1, clip_norm=1.0, freeze=r"stem\.bias", weight_decay=0.5)
    assert move["stem"]["bias"] == 0
    np.testing.assert_allclose(move["head"]["kernel"], 3 / 5 + 0.5, rtol=1e-6)
    np.testing.assert_allclose(move["stem"]["kernel"], 4 / 5 + 0.5, rtol=1e-6)
    # With a rate of the head's own, and below the limit.
    (move,) = descent(params, grads, 1, clip_norm=9.0, freeze=".*bias", head_learning_rate=2.0)
    assert move == {"head": {"kernel": 6.0}, "stem": {"kernel": 4.0, "bias": 0.0}}


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("stem", r"no parameter is matched by freeze='stem'; there are a.w, b.w, .*, f.w, 2 more"),
        (".*", "all parameters are matched"),
    ],
)
def test_a_pattern_that_freezes_nothing_or_all_is_an_error(freeze, message):
    params = {name: {"w": jnp.ones(1)} for name in "abcdefgh"}
    config = OptimizerConfig(learning_rate=1.0, freeze=freeze)
    with pytest.raises(ValueError, match=message):
        config.build(params, 10)


def test_the_average_of_the_parameters_is_in_the_state():
    """Over steps of the model, with every other option at work, and a rate set in the state."""
    config = OptimizerConfig(
        learning_rate=1e-2, warmup=0.5, clip_norm=1.0, ema_decay=0.9, freeze=r"head\..*"
    )
    rate = dataclasses.replace(config, learning_rate=2e-2)
    model = small_model()
    optimizer = config.build(nnx.state(model, nnx.Param), 6)
    graphdef, state = create_state(model, optimizer)
    head = jnp.copy(state.params["head"]["kernel"][...])
    state = dataclasses.replace(state, opt_state=rate.set_rates(state.opt_state))
    step = gather_on_device(make_train_step(graphdef, optimizer, loss=LOSS))
    seen = []
    for _ in range(3):
        state, _ = step(state, data(), np.arange(16, dtype=np.int32), jax.random.key(0))
        seen.append(jax.tree.map(jnp.copy, state.params))
    weights = np.array([0.81, 0.9, 1.0]) / 2.71
    mean = jax.tree.leaves(averaged_parameters(state))
    for got, *each in zip(mean, *map(jax.tree.leaves, seen), strict=True):
        expected = sum(w * np.float64(x) for w, x in zip(weights, each, strict=True))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(state.params["head"]["kernel"][...], head)
    moved = jnp.abs(seen[2]["features"]["layers"][0]["kernel"][...]) != jnp.abs(
        seen[1]["features"]["layers"][0]["kernel"][...]
    )
    assert bool(moved.all())
    assert float(optax.tree.get(state.opt_state, "learning_rate")) == np.float32(2e-2)


def test_a_head_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="head's pattern"):
        OptimizerConfig().build({"fc": jnp.ones(1)}, 10)


def trained(optimizer, steps=3, scale=1.0):
    """The states after each step of the small model."""
    graphdef, state = create_state(small_model(), optimizer)
    step = gather_on_device(
        make_train_step(graphdef, optimizer, loss=lambda o, b: scale * LOSS(o, b))
    )
    states = []
    for i in range(steps):
        state, _ = step(state, data(), np.arange(16, dtype=np.int32) + i, jax.random.key(0))
        states.append(jax.tree.map(jnp.copy, state))
    return states


def moved(before, after) -> float:
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, after.params, before.params)))


@pytest.mark.slow
def test_clipping_by_the_global_norm():
    clipped = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    start = create_state(small_model(), clipped)[1]
    assert moved(start, trained(clipped, 1)[0]) == pytest.approx(1e-3, rel=1e-3)
    assert moved(start, trained(optax.sgd(1.0), 1)[0]) > 1e-2
    # Adam after clipping goes by the direction alone, which clipping leaves.
    both = [
        optax.chain(optax.clip_by_global_norm(limit), adam(1e-2, eps=0.0)) for limit in (0.1, 0.4)
    ]
    first, second = (trained(optimizer, 1, scale=100.0)[0] for optimizer in both)
    for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(second.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_warm_up_starts_at_nothing_and_ends_at_the_peak():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, warmup_steps=2, decay_steps=10)
    optimizer = adam(schedule)
    start = create_state(small_model(), optimizer)[1]
    first, second, third = trained(optimizer)
    assert equal(first.params, start.params)  # the first rate is zero
    moves = [
        max(float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, pair), strict=True))
        for pair in ((first.params, second.params), (second.params, third.params))
    ]
    # A step of Adam moves no parameter by more than its rate, at first.
    assert 0.8 * 5e-3 < moves[0] < 1.2 * 5e-3
    assert 0.8 * 1e-2 < moves[1] < 1.5 * 1e-2


@pytest.mark.slow
def test_moving_averages_of_updates_and_of_parameters():
    averaged = optax.chain(adam(1e-2), optax.ema(0.5, debias=False))
    plain, ema = trained(adam(1e-2), 1)[0], trained(averaged, 1)[0]
    start = create_state(small_model(), averaged)[1]
    assert moved(start, ema) == pytest.approx(moved(start, plain) / 2, rel=1e-5)

    decay = optax.ema(0.9, debias=True)
    states = trained(adam(1e-2))
    mean_state = decay.init(states[0].params)
    for state in states:
        mean, mean_state = decay.update(state.params, mean_state)
    weights = np.array([0.81, 0.9, 1.0]) / 2.71
    leaves = zip(*(jax.tree.leaves(state.params) for state in states), strict=True)
    for got, each in zip(jax.tree.leaves(mean), leaves, strict=True):
        expected = sum(w * np.float64(x) for w, x in zip(weights, each, strict=True))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
