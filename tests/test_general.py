"""Products in float on signs and codes, against the same products on packed bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqt_jax as fqt
from fqt_jax.layers import ConvGeometry

KEY = jax.random.key(3)
GEOMETRY = ConvGeometry((2, 1), ((1, 0), (1, 1)), (1, 1), (1, 1), 1)
X = jax.random.normal(jax.random.key(0), (12, 6, 5, 7))
W = jax.random.normal(jax.random.key(1), (3, 2, 7, 8))
PARAMETERS = {
    "scale": jnp.linspace(0.5, 2, 8),
    "bias": jnp.arange(8.0),
    "threshold": jnp.linspace(-0.5, 0.5, 7),
    "spread": jnp.linspace(0.5, 2, 7),
}
ALL = dataclasses.replace(fqt.FQT1, scale="learned", threshold="learned")


def value_and_gradients(function, *operands):
    y, vjp = jax.vjp(function, *operands)
    return y, vjp(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        (fqt.FQT1, ("bias",)),
        (fqt.FQT1_PLUS, ()),
        (fqt.PSQ1, ()),
        (dataclasses.replace(fqt.FQT1, clip=False, scale="none"), ()),
        (ALL, tuple(PARAMETERS)),
        (fqt.FULL_PRECISION, ("bias",)),
    ],
    ids=["fqt1", "plus", "psq1", "plain", "all", "float"],
)
def test_the_same_key_gives_the_same_codes_as_packed_bits(recipe, names):
    def packed(x, w, parameters):
        options = {"strides": (2, 1), "padding": ((1, 0), (1, 1)), "recipe": recipe}
        return fqt.conv(x, w, key=KEY, **options, **parameters)

    def in_float(x, w, parameters):
        return fqt.product(x, w, GEOMETRY, key=KEY, recipe=recipe, **parameters)

    parameters = {name: PARAMETERS[name] for name in names}
    got, expected = (value_and_gradients(f, X, W, parameters) for f in (in_float, packed))
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale)


def test_what_is_kept_are_bits_and_sums():
    def run(x, w):
        return jax.vjp(lambda x, w: fqt.product(x, w, GEOMETRY, key=KEY), x, w)

    y, vjp = jax.eval_shape(run, X, W)
    of_the_batch = [leaf for leaf in jax.tree.leaves(vjp) if leaf.shape[:1] == (12,)]
    words = (12, -(-6 * 5 * 7 // 32))
    assert sorted((leaf.dtype.name, leaf.shape) for leaf in of_the_batch) == [
        ("int16", y.shape),
        ("uint32", words),
        ("uint32", words),
    ]


def test_bfloat16_input():
    y, (dx, _) = value_and_gradients(
        lambda x, w: fqt.product(x, w, GEOMETRY, key=KEY), X.astype(jnp.bfloat16), W
    )
    assert (y.dtype, dx.dtype) == (jnp.bfloat16, jnp.bfloat16)


def test_a_multiply_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"multiply must give \[12, ..., 8\]"):
        fqt.product(X, W, lambda x, w: jnp.sum(x) * w, key=KEY)


def test_nan_of_the_input_is_seen():
    y = fqt.product(X.at[3, 0, 0, 0].set(jnp.nan), W, GEOMETRY, key=KEY)
    assert np.isnan(y[3]).any()
    assert np.isfinite(np.delete(y, 3, axis=0)).all()


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (3, TypeError, r"such as jax.random.key\(0\); got int"),
        (jnp.float32(3), TypeError, r"such as jax.random.key\(0\); got float32 \(\)"),
        (jax.random.split(KEY, 4), ValueError, r"key must be one key; got \(4,\) of them"),
        (jnp.zeros((4, 2), jnp.uint32), ValueError, "key must be one key"),
        (None, ValueError, "pass key="),
    ],
)
def test_keys_are_named_for_what_they_are(key, error, message):
    with pytest.raises(error, match=message):
        fqt.product(X, W, GEOMETRY, key=key)


def test_recipes_by_name():
    np.testing.assert_array_equal(
        fqt.conv(X, W, key=KEY, recipe="fqt1"), fqt.conv(X, W, key=KEY, recipe=fqt.FQT1)
    )
    assert fqt.QuantLinear(3, 4, recipe="qat", rngs=nnx.Rngs(0)).recipe is fqt.QAT
