from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import fqt_jax as fqt
from fqt_jax import FQT1, FULL_PRECISION, PSQ1, QAT, QAT_ACTIVATIONS, binarize, weight_scale
from fqt_jax.kernels import Window
from fqt_jax.windows import resolve_window
from tests import reference

KEY = jax.random.key(5)
run_conv = jax.jit(fqt.conv, static_argnames="recipe")


def recipe_with(recipe=FQT1, *, scale=None, **gradient):
    changes = {} if scale is None else {"scale": scale}
    if gradient:
        changes["gradient"] = dataclasses.replace(recipe.gradient, **gradient)
    return dataclasses.replace(recipe, **changes)


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, jnp.float32).astype(dtype)


def float_conv(x, w, strides, padding):
    return jax.lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def plain_conv(x, w, scale, bias, *, recipe, strides=(1, 1), padding="SAME"):
    """What the layer is meant to compute, left to automatic differentiation."""
    if recipe.binary:
        if recipe.scale == "mean_abs" and recipe.weights == "binary":
            # The scale is a function of w for the value; its gradient reaches w as well.
            scale = weight_scale(w)
        x = binarize(x, clip=recipe.clip)
        w = binarize(w, clip=recipe.clip) if recipe.weights == "binary" else w
    y = float_conv(x, w, strides, padding)
    if scale is not None:
        y = y * scale.reshape(1, 1, 1, -1)
    return y + bias.reshape(1, 1, 1, -1)


def value_and_gradients(function, *operands):
    """The value and the gradients of a loss whose output gradient varies from entry to entry."""

    @jax.jit
    def run(*operands):
        y, vjp = jax.vjp(function, *operands)
        return y, vjp(normal(99, *y.shape).astype(y.dtype))

    return run(*operands)


def assert_trees_close(got, expected, tol=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = reference.numeric(a), reference.numeric(b)
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol * np.abs(b).max(initial=0))


# Float gradients: the layer against automatic differentiation

GEOMETRIES = [
    {"strides": (1, 1), "padding": "SAME"},
    {"strides": (2, 2), "padding": "VALID"},
    {"strides": (2, 1), "padding": ((2, 0), (1, 3))},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"{g['strides']}{g['padding']}")
@pytest.mark.parametrize(
    "recipe",
    [
        QAT,
        dataclasses.replace(QAT, scale="none"),
        dataclasses.replace(QAT, scale="learned"),
        dataclasses.replace(QAT, clip=False),
        QAT_ACTIVATIONS,
        dataclasses.replace(QAT_ACTIVATIONS, clip=False),
        FULL_PRECISION,
    ],
    ids=["mean_abs", "none", "learned", "no clip", "activations", "their no clip", "fp"],
)
def test_conv_without_gradient_quantization(recipe, geometry):
    x, w, bias = normal(0, 3, 6, 5, 4), normal(1, 3, 2, 4, 5), normal(2, 5)
    scale = normal(3, 5) if recipe.scale == "learned" else None

    def layer(x, w, scale, bias):
        return fqt.conv(x, w, recipe=recipe, scale=scale, bias=bias, **geometry)

    def plain(x, w, scale, bias):
        return plain_conv(x, w, scale, bias, recipe=recipe, **geometry)

    got = value_and_gradients(layer, x, w, scale, bias)
    assert_trees_close(got, value_and_gradients(plain, x, w, scale, bias))


@pytest.mark.parametrize(
    ("clip", "weights"), [(True, "binary"), (False, "binary"), (True, "float")]
)
def test_a_threshold_moves_and_scales_what_the_signs_are_of(clip, weights):
    x, w = normal(0, 3, 6, 5, 4), normal(1, 3, 2, 4, 5)
    threshold, spread = normal(2, 4), jnp.array([0.5, 1.0, 2.0, 3.0])
    recipe = dataclasses.replace(QAT, threshold="learned", clip=clip, weights=weights)

    def layer(x, w, threshold, spread):
        return fqt.conv(x, w, recipe=recipe, threshold=threshold, spread=spread)

    def plain(x, w, threshold, spread):
        x = (x - threshold.reshape(1, 1, 1, -1)) / spread.reshape(1, 1, 1, -1)
        return plain_conv(x, w, None, jnp.zeros(5), recipe=recipe)

    got = value_and_gradients(layer, x, w, threshold, spread)
    assert_trees_close(got, value_and_gradients(plain, x, w, threshold, spread))


@pytest.mark.parametrize("recipe", [QAT, FULL_PRECISION], ids=["qat", "full precision"])
@pytest.mark.parametrize("lead", [(7,), (2, 3), ()])
def test_dense_without_gradient_quantization(recipe, lead):
    x, w, bias = normal(0, *lead, 6), normal(1, 6, 4), normal(2, 4)

    def plain(x, w, bias):
        if not recipe.binary:
            return x @ w + jnp.broadcast_to(bias, (*lead, 4))
        y = (binarize(x) @ binarize(w)) * jnp.broadcast_to(weight_scale(w), (*lead, 4))
        return y + jnp.broadcast_to(bias, (*lead, 4))

    got = value_and_gradients(lambda x, w, b: fqt.dense(x, w, recipe=recipe, bias=b), x, w, bias)
    assert_trees_close(got, value_and_gradients(plain, x, w, bias))


def test_float_weights_in_any_product():
    """The convolution that the integer kernels have a form for, and the same by the other way."""
    x, w, bias = normal(0, 3, 6, 5, 4), normal(1, 3, 2, 4, 5), normal(2, 5)
    threshold, spread = normal(3, 4), jnp.array([0.5, 1.0, 2.0, 3.0])
    options = {"recipe": dataclasses.replace(QAT_ACTIVATIONS, threshold="learned"), "bias": bias}

    def multiply(x, w):
        return float_conv(x, w, (1, 1), "SAME")

    def general(x, w, t, s):
        return fqt.product(x, w, multiply, threshold=t, spread=s, **options)

    def images(x, w, t, s):
        return fqt.conv(x, w, threshold=t, spread=s, **options)

    operands = (x, w, threshold, spread)
    assert_trees_close(
        value_and_gradients(general, *operands), value_and_gradients(images, *operands)
    )


@pytest.mark.parametrize(
    "recipe",
    [QAT, FQT1, QAT_ACTIVATIONS, FULL_PRECISION],
    ids=["qat", "fqt1", "activations", "fp"],
)
def test_bfloat16(recipe):
    x, w = normal(0, 3, 4, 4, 4, dtype=jnp.bfloat16), normal(1, 3, 3, 4, 5, dtype=jnp.bfloat16)
    bias = normal(2, 5)
    y, grads = value_and_gradients(
        lambda x, w, b: fqt.conv(x, w, key=KEY, recipe=recipe, bias=b), x, w, bias
    )
    assert [a.dtype for a in (y, *grads)] == [jnp.bfloat16] * 3 + [jnp.float32]
    wide_x, wide_w = x.astype(jnp.float32), w.astype(jnp.float32)
    expected, wide_grads = value_and_gradients(
        lambda x, w, b: plain_conv(x, w, None, b, recipe=recipe), wide_x, wide_w, bias
    )
    near = {"rtol": 0.02, "atol": 0.02 * np.abs(expected).max()}
    np.testing.assert_allclose(reference.numeric(y), expected, **near)
    if recipe.gradient is None:
        for got, wide in zip(grads, wide_grads, strict=True):
            near = {"rtol": 0.02, "atol": 0.02 * np.abs(wide).max()}
            np.testing.assert_allclose(reference.numeric(got), wide, **near)


def test_forward_is_the_same_for_every_binary_recipe():
    x, w = normal(0, 3, 5, 5, 4), normal(1, 3, 3, 4, 6)
    outputs = [np.asarray(run_conv(x, w, key=KEY, recipe=r)) for r in (QAT, PSQ1, FQT1)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])


# Quantized gradients: unbiased, and converging as the square root of the number of draws

X, W, DY = normal(10, 8, 3, 3, 2), normal(11, 3, 3, 2, 8), normal(12, 8, 3, 3, 8)
UNEQUAL = DY * jnp.geomspace(0.3, 3.0, 8).reshape(8, 1, 1, 1)
DRAWS = 2048


def gradients_of_draws(recipe, draws=DRAWS):
    """``dx`` and ``dw`` of each key, and what they are without gradient quantization."""

    def gradients(key, recipe):
        _, vjp = jax.vjp(lambda x, w: fqt.conv(x, w, key=key, recipe=recipe), X, W)
        return vjp(UNEQUAL)

    keys = jax.random.split(jax.random.key(21), draws)
    exact = jax.jit(lambda: gradients(None, dataclasses.replace(recipe, gradient=None)))()
    return jax.jit(jax.vmap(lambda key: gradients(key, recipe)))(keys), exact


def assert_converges(draws, exact):
    for got, expected in zip(draws, exact, strict=True):
        got, expected = np.asarray(got), np.asarray(expected)
        size = np.abs(expected).max()
        reference.assert_mean(got, expected, floor=1e-4 * size)
        slope = reference.convergence_slope(got, expected)
        assert -0.65 < slope < -0.35, f"error falls with slope {slope:.2f}"


@pytest.mark.parametrize(
    "recipe",
    [
        FQT1,
        PSQ1,
        recipe_with(sampler="bernoulli"),
        recipe_with(sampler="uniform"),
        recipe_with(importance="norm"),
        recipe_with(groups="tensor"),
        recipe_with(prune="shared"),
        recipe_with(prune="shared", sampler="bernoulli", importance="norm"),
        recipe_with(prune="shared", groups="sample", bits=2),
        recipe_with(prune="shared", groups="tensor", scale="none"),
    ],
    ids=str,
)
def test_quantized_gradients_converge_to_the_float_ones(recipe):
    assert_converges(*gradients_of_draws(recipe))


def test_topk_does_not_converge():
    draws, exact = gradients_of_draws(recipe_with(sampler="topk"))
    with pytest.raises(AssertionError, match="mean is off"):
        assert_converges(draws, exact)
    for got, expected in zip(draws, exact, strict=True):
        assert reference.convergence_slope(np.asarray(got), np.asarray(expected)) > -0.2


def test_total_variance_is_the_closed_form():
    """Orthogonal signs, so that both products only rotate and scale the quantized gradient."""
    one = np.array([[1, 1], [1, -1]])
    hadamard = np.kron(np.kron(one, one), one).astype(np.float32)
    x = w = jnp.asarray(0.5 * hadamard)
    sizes = np.geomspace(0.2, 4, 8).astype(np.float32)
    dy = np.asarray(normal(4, 8, 8)) * sizes[:, None] * sizes[[3, 0, 6, 1, 7, 2, 5, 4]]
    recipe = recipe_with(scale="none")

    @jax.jit
    @jax.vmap
    def gradients(key):
        return jax.vjp(lambda x, w: fqt.dense(x, w, key=key, recipe=recipe), x, w)[1](dy)

    dx, dw = gradients(jax.random.split(jax.random.key(31), 10_000))
    for draws, axis in ((dx, 0), (dw, 1)):
        lo, hi = dy.min(axis=1 - axis), dy.max(axis=1 - axis)
        p = reference.keep_probabilities(np.maximum(hi, 0) - np.minimum(lo, 0), 2)
        expected = 8 * reference.pruned_rounded_variance(dy, p, 4, axis)
        reference.assert_total_variance(draws, expected)


# What backward keeps


def what_is_kept(function, *operands):
    """Shapes and types of the output and of everything that backward holds on to."""
    y, vjp = jax.eval_shape(lambda *operands: jax.vjp(function, *operands), *operands)
    return y, jax.tree.leaves(vjp)


@pytest.mark.parametrize("scale", ["none", "mean_abs"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_two_bits_of_an_input_entry_are_kept(scale, dtype):
    x, w = normal(0, 16, 16, 16, 64, dtype=dtype), normal(1, 3, 3, 64, 8)
    recipe = recipe_with(scale=scale)
    y, kept = what_is_kept(lambda x, w: fqt.conv(x, w, key=KEY, recipe=recipe), x, w)
    assert all(a.size < x.size / 8 or a.shape == y.shape for a in kept)
    of_weights = w.nbytes + w.size // 8 + 2 * w.shape[-1] * 4 + 64
    if scale == "mean_abs":  # autodiff of the mean keeps the sign of w, and the integer sums stay
        of_weights += w.nbytes + 2 * y.size
    assert sum(a.size * a.dtype.itemsize for a in kept) - of_weights <= x.size * 2 / 8


def test_no_clip_mask_without_clipping():
    x, w = normal(0, 16, 16, 16, 64), normal(1, 3, 3, 64, 8)
    recipe = dataclasses.replace(recipe_with(scale="none"), clip=False)
    _, kept = what_is_kept(lambda x: fqt.conv(x, w, key=KEY, recipe=recipe), x)
    assert [a.dtype for a in kept if a.size == x.size // 32] == [jnp.uint32]


# NaN, zeros, determinism


@pytest.mark.parametrize(
    "recipe",
    [QAT, FQT1, QAT_ACTIVATIONS, FULL_PRECISION],
    ids=["qat", "fqt1", "activations", "fp"],
)
def test_nan_poisons_its_sample_and_no_other(recipe):
    x, w = normal(0, 4, 3, 3, 2), normal(1, 3, 3, 2, 5)
    clean = np.asarray(run_conv(x, w, key=KEY, recipe=recipe))
    y = np.asarray(run_conv(x.at[2, 1, 1, 0].set(jnp.nan), w, key=KEY, recipe=recipe))
    assert np.isnan(y[2]).all()
    np.testing.assert_array_equal(y[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("scale", ["mean_abs", "none", "learned"])
def test_nan_weight_poisons_its_channel_and_no_other(scale):
    x, w = normal(0, 4, 3, 3, 2), normal(1, 3, 3, 2, 5)
    given = jnp.ones(5) if scale == "learned" else None
    recipe = dataclasses.replace(QAT, scale=scale)
    y = np.asarray(run_conv(x, w.at[0, 0, 0, 1].set(jnp.nan), recipe=recipe, scale=given))
    assert np.isnan(y[..., 1]).all()
    assert np.isfinite(y[..., [0, 2, 3, 4]]).all()


@pytest.mark.parametrize("prune", ["channels", "shared"])
@pytest.mark.parametrize(
    ("sampler", "importance"),
    [
        ("systematic", "range"),
        ("systematic", "norm"),
        ("bernoulli", "norm"),
        ("topk", "range"),
        ("uniform", "range"),
    ],
)
def test_zero_gradient_gives_zero_gradients(sampler, prune, importance):
    x, w = normal(0, 3, 2), normal(1, 2, 5)
    recipe = recipe_with(sampler=sampler, prune=prune, importance=importance)

    @jax.jit
    def gradients(x, w, dy):
        return jax.vjp(lambda x, w: fqt.dense(x, w, key=KEY, recipe=recipe), x, w)[1](dy)

    for grad in gradients(x, w, jnp.zeros((3, 5))):
        np.testing.assert_array_equal(grad, np.zeros(grad.shape))


def test_dropping_every_sample_gives_zero_and_not_nan():
    """The Bernoulli sampler keeps nothing in some draws."""
    recipe = recipe_with(sampler="bernoulli", prune="shared")
    x, w, dy = normal(0, 3, 4), normal(1, 4, 5), normal(2, 3, 5)

    @jax.jit
    @jax.vmap
    def gradients(key):
        return jax.vjp(lambda x, w: fqt.dense(x, w, key=key, recipe=recipe), x, w)[1](dy)

    dx, dw = gradients(jax.random.split(KEY, 64))
    assert np.isfinite(dx).all()
    assert np.isfinite(dw).all()
    nothing = ~np.asarray(dx).any(axis=(1, 2))
    assert 0 < nothing.sum() < 64
    # What is left of dw there comes through the weight scale, which no pruning touches.
    alone = np.asarray(dw)[nothing]
    np.testing.assert_array_equal(alone, np.broadcast_to(alone[:1], alone.shape))


@pytest.mark.parametrize("shape", [(0, 4, 4, 2), (1, 4, 4, 2)])
def test_empty_and_single_batches(shape):
    w = normal(1, 3, 3, 2, 5)
    y, (dx, dw) = value_and_gradients(
        lambda x, w: fqt.conv(x, w, key=KEY, recipe=FQT1), normal(0, *shape), w
    )
    assert y.shape == (shape[0], 4, 4, 5)
    assert dx.shape == shape
    assert np.isfinite(dw).all()


def test_one_key_one_result():
    @jax.jit
    def gradients(key):
        return jax.vjp(lambda x, w: fqt.conv(x, w, key=key), X, W)[1](DY)

    first, again, other = gradients(KEY), gradients(KEY), gradients(jax.random.key(6))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


def test_old_style_keys_work():
    def gradient(key):
        return jax.jit(jax.grad(lambda w: fqt.dense(X, w, key=key).sum()))(normal(1, 2, 5))

    np.testing.assert_array_equal(
        gradient(jax.random.PRNGKey(0)), gradient(jax.random.key(0, impl="threefry2x32"))
    )


# Transformations


def test_vmap_over_batches_and_keys():
    xs, keys = normal(0, 3, 2, 4, 4, 2), jax.random.split(KEY, 3)
    w = normal(1, 3, 3, 2, 4)

    def gradients(x, key):
        y, vjp = jax.vjp(lambda x, w: fqt.conv(x, w, key=key), x, w)
        return y, vjp(y)

    batched = jax.jit(jax.vmap(gradients))(xs, keys)
    run = jax.jit(gradients)
    for i in range(3):
        alone = run(xs[i], keys[i])
        assert_trees_close(jax.tree.map(lambda a, i=i: a[i], batched), alone, 1e-5)


def test_checkpoint_recomputes_to_the_same():
    def loss(x, w):
        return (fqt.conv(x, w, key=KEY) * DY).sum()

    plain = jax.jit(jax.grad(loss, (0, 1)))(X, W)
    remat = jax.jit(jax.grad(jax.checkpoint(loss), (0, 1)))(X, W)
    assert_trees_close(remat, plain)


@pytest.mark.parametrize(
    "recipe",
    [FULL_PRECISION, QAT, FQT1, recipe_with(prune="shared"), PSQ1],
    ids=["fp", "qat", "fqt1", "shared", "psq1"],
)
def test_shard_map_over_the_batch(recipe):
    """Each device's shard is a batch of its own; gradients of the shared weights are summed."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w, dy = normal(0, 16, 3, 3, 2), normal(1, 3, 3, 2, 4), normal(2, 16, 3, 3, 4)

    def step(x, w, dy):
        y, vjp = jax.vjp(lambda x, w: fqt.conv(x, w, key=KEY, recipe=recipe), x, w)
        return y, *vjp(dy)

    specs = {"in_specs": (P("data"), P(), P("data")), "out_specs": (P("data"), P("data"), P())}
    run = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
    got = run(x, w, dy)
    alone = jax.jit(step)
    shards = [alone(x[i : i + 4], w, dy[i : i + 4]) for i in range(0, 16, 4)]
    ys, dxs, dws = zip(*shards, strict=True)
    expected = (jnp.concatenate(ys), jnp.concatenate(dxs), sum(dws[1:], dws[0]))
    assert_trees_close(tuple(got), expected, 1e-5)
    assert "all-gather" not in run.lower(x, w, dy).compile().as_text()


@pytest.mark.parametrize("recipe", [FULL_PRECISION, QAT, FQT1], ids=["fp", "qat", "fqt1"])
def test_gradient_through_shard_map(recipe):
    """Weights that are the same on all devices get the sum of the devices' gradients."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w = normal(0, 16, 3, 3, 2), normal(1, 3, 3, 2, 4)

    def local_loss(x, w):
        return (fqt.conv(x, w, key=KEY, recipe=recipe) ** 2).sum()

    def total(x, w):
        return jax.lax.psum(local_loss(x, w), "data")

    loss = jax.shard_map(total, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    got = jax.jit(jax.grad(loss, (0, 1)))(x, w)
    alone = jax.jit(jax.grad(local_loss, (0, 1)))
    dxs, dws = zip(*(alone(x[i : i + 4], w) for i in range(0, 16, 4)), strict=True)
    assert_trees_close(got, (jnp.concatenate(dxs), sum(dws[1:], dws[0])), 1e-5)


# What is refused


def call_conv(x=None, w=None, **options):
    x = jnp.ones((2, 4, 4, 3)) if x is None else x
    w = jnp.ones((3, 3, 3, 5)) if w is None else w
    return fqt.conv(x, w, **{"key": KEY, **options})


@pytest.mark.parametrize("recipe", [FQT1, PSQ1])
def test_a_missing_key(recipe):
    with pytest.raises(ValueError, match="pass key="):
        call_conv(recipe=recipe, key=None)
    with pytest.raises(ValueError, match="pass key="):
        fqt.dense(jnp.ones((2, 3)), jnp.ones((3, 4)), recipe=recipe)


@pytest.mark.parametrize("recipe", [QAT, FULL_PRECISION])
def test_a_key_is_not_needed_without_gradient_quantization(recipe):
    without = run_conv(X, W, recipe=recipe)
    np.testing.assert_array_equal(without, run_conv(X, W, key=KEY, recipe=recipe))


LEARNED = dataclasses.replace(QAT, scale="learned")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": LEARNED}, "pass scale="),
        ({"scale": jnp.ones(5)}, "this one has 'mean_abs'"),
        ({"recipe": FULL_PRECISION, "scale": jnp.ones(5)}, "this one has 'mean_abs'"),
        ({"recipe": LEARNED, "scale": jnp.ones(4)}, r"scale must have one entry .* \(5,\)"),
        ({"recipe": LEARNED, "scale": jnp.ones((1, 5))}, "scale must have one entry"),
        ({"bias": jnp.ones(4)}, "bias must have one entry for each output channel"),
        ({"spread": jnp.ones(2)}, "spread= is for recipes with a threshold; that of this one is"),
        (
            {"recipe": dataclasses.replace(QAT, threshold="calibrated"), "spread": jnp.ones(2)},
            "recipe.threshold is 'calibrated': pass threshold=.",
        ),
        (
            {
                "recipe": dataclasses.replace(QAT, threshold="learned"),
                "threshold": jnp.ones(5),
                "spread": jnp.ones(2),
            },
            "threshold must have one entry for each input channel",
        ),
        ({"x": jnp.ones((4, 4, 3))}, r"x must be \[N, H, W, C\]"),
        ({"w": jnp.ones((3, 3, 3))}, r"w \[kh, kw, C, O\]"),
        ({"w": jnp.ones((3, 3, 2, 5))}, "x has 3 channels, but w takes 2"),
        ({"w": jnp.ones((5, 5, 3, 5)), "padding": "VALID"}, "larger than the padded input"),
        ({"implementation": "cudnn"}, "unknown implementation 'cudnn'"),
        ({"implementation": "cudnn", "recipe": FULL_PRECISION}, "unknown implementation 'cudnn'"),
    ],
)
def test_values(options, message):
    with pytest.raises(ValueError, match=message):
        call_conv(**options)


INTEGERS = jnp.ones(5, jnp.int32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": jnp.ones((2, 4, 4, 3), jnp.int8)}, "x must be a floating-point array; got int8"),
        ({"w": jnp.ones((3, 3, 3, 5), bool)}, "w must be a floating-point array; got bool"),
        ({"bias": INTEGERS}, "bias must be a floating-point array"),
        ({"recipe": LEARNED, "scale": INTEGERS}, "scale must be a floating-point array"),
        ({"recipe": 1}, "recipe must be a Recipe, such as fqt_jax.FQT1, or the name of one; got 1"),
    ],
)
def test_types(options, message):
    with pytest.raises(TypeError, match=message):
        call_conv(**options)


@pytest.mark.parametrize(
    ("x", "w", "message"),
    [
        ((), (3, 4), "x must be"),
        ((2, 3), (3,), r"w \[C, O\]"),
        ((2, 3), (4, 5), "x has 3 features, but w takes 4"),
    ],
)
def test_dense_operands(x, w, message):
    with pytest.raises(ValueError, match=message):
        fqt.dense(jnp.ones(x), jnp.ones(w), key=KEY)


def test_dense_integer_input():
    with pytest.raises(TypeError, match="x must be a floating-point array"):
        fqt.dense(jnp.ones((2, 3), jnp.int32), jnp.ones((3, 4)), key=KEY)


@pytest.mark.parametrize(
    "strides", [0, -1, (1, 0), (1, 2, 3), (1,), "2", "12", 1.5, (1.5, 2), None]
)
def test_bad_strides(strides):
    with pytest.raises(ValueError, match="strides must be one or two positive integers"):
        call_conv(strides=strides)


@pytest.mark.parametrize(
    "padding",
    ["FULL", "", 1.5, (1,), (1, 2, 3), ((1, 2), (3,)), ((1, 2, 3), 1), ((1.5, 1), 1), None],
)
def test_bad_padding(padding):
    with pytest.raises(ValueError, match="padding must be"):
        call_conv(padding=padding)


@pytest.mark.parametrize("padding", [-1, ((0, -1), 0)])
def test_negative_padding(padding):
    with pytest.raises(ValueError, match="padding must not be negative"):
        call_conv(padding=padding)


@pytest.mark.parametrize(
    ("padding", "pads"),
    [
        ("SAME", ((1, 1), (0, 1))),
        ("valid", ((0, 0), (0, 0))),
        (2, ((2, 2), (2, 2))),
        ((1, 0), ((1, 1), (0, 0))),
        ([(1, 0), 3], ((1, 0), (3, 3))),
    ],
)
def test_padding_forms(padding, pads):
    window = resolve_window((3, 2), (5, 4), 1, padding)
    assert window == Window((3, 2), (1, 1), pads)
    assert hash(window) == hash(Window((3, 2), (1, 1), pads))


@pytest.mark.parametrize("size", [(4, 7), (5, 5), (1, 2)])
@pytest.mark.parametrize("strides", [(1, 2), (3, 3)])
def test_same_padding(size, strides):
    window = resolve_window((3, 4), size, strides, "SAME")
    assert window.padding == reference.same_padding(size, (3, 4), strides)
    assert window.output_size(size) == tuple(
        math.ceil(n / s) for n, s in zip(size, strides, strict=True)
    )
