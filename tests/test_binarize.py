import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.dtypes import float0

from fqt_jax import PackedBits, binarize, weight_scale
from tests import reference

AROUND_ONE = [-2.0, -1.0000001, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.0000001, np.inf, -np.inf]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_sign_of_both_zeros_is_plus_one(dtype):
    signs = binarize(jnp.array([0.0, -0.0, 1e-7, -1e-7, 5.0, -jnp.inf], dtype))
    assert signs.dtype == dtype
    np.testing.assert_array_equal(signs, np.array([1, 1, 1, -1, 1, -1]))


@pytest.mark.parametrize("clip", [True, False])
def test_straight_through_gradient(clip):
    x = jnp.array(AROUND_ONE, jnp.float32)
    cotangent = jnp.arange(1.0, x.size + 1)
    signs, vjp = jax.vjp(lambda x: binarize(x, clip=clip), x)
    passes = np.abs(np.array(AROUND_ONE, np.float32)) <= 1 if clip else True
    np.testing.assert_array_equal(vjp(cotangent)[0], np.where(passes, cotangent, 0))
    np.testing.assert_array_equal(signs, reference.signs(x))
    _, tangent = jax.jvp(lambda x: binarize(x, clip=clip), (x,), (cotangent,))
    np.testing.assert_array_equal(tangent, np.where(passes, cotangent, 0))


def test_clip_is_on_unless_said_otherwise():
    assert jax.grad(binarize)(jnp.float32(1.5)) == 0
    assert jax.grad(lambda x: binarize(x, clip=False))(jnp.float32(1.5)) == 1


def test_nan_stays_nan_alone():
    signs = binarize(jnp.array([1.0, jnp.nan, -1.0]))
    np.testing.assert_array_equal(signs, [1, np.nan, -1])


def test_binarize_bfloat16_gradient():
    x = jnp.array([-1.5, -1.0, 0.5, 2.0], jnp.bfloat16)
    grad = jax.grad(lambda x: binarize(x).astype(jnp.float32).sum())(x)
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_array_equal(grad.astype(jnp.float32), [0, 1, 1, 0])


def test_binarize_under_jit_and_vmap(rng):
    x = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    np.testing.assert_array_equal(jax.jit(jax.vmap(binarize))(x), reference.signs(x))
    grads = jax.jit(jax.vmap(jax.grad(lambda row: binarize(row).sum())))(x)
    np.testing.assert_array_equal(grads, np.abs(x) <= 1)


@pytest.mark.parametrize("function", [binarize, weight_scale])
@pytest.mark.parametrize(
    "bad",
    [jnp.ones(3, jnp.int32), jnp.ones(3, bool), np.zeros(3, float0), 1.0, None, [1.0]],
    ids=lambda bad: str(getattr(bad, "dtype", type(bad).__name__)),
)
def test_only_floating_point_arrays(function, bad):
    with pytest.raises(TypeError, match="must be a floating-point array"):
        function(bad)


@pytest.mark.parametrize("shape", [(5,), (4, 3), (3, 2, 4, 6)])
def test_weight_scale(shape, rng):
    w = rng.normal(size=shape).astype(np.float32)
    scale = weight_scale(jnp.asarray(w))
    assert scale.shape == shape[-1:]
    np.testing.assert_allclose(
        scale, np.abs(w.astype(np.float64)).reshape(-1, shape[-1]).mean(0), rtol=1e-6
    )


@st.composite
def bit_arrays(draw):
    batch_ndim = draw(st.integers(0, 2))
    batch = draw(st.tuples(*[st.integers(0, 3)] * batch_ndim))
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 7, 16, 31, 32, 33]), max_size=3))
    shape = shape if math.prod(shape) <= 2000 else shape[:1]
    seed = draw(st.integers(0, 2**32 - 1))
    bits = np.random.default_rng(seed).random((*batch, *shape)) < 0.5
    return bits, batch_ndim


@settings(max_examples=40)
@given(bit_arrays())
def test_pack_layout_and_round_trip(case):
    bits, batch_ndim = case
    packed = jax.jit(lambda b: PackedBits.pack(b, batch_ndim=batch_ndim))(jnp.asarray(bits))
    shape = bits.shape[batch_ndim:]
    assert packed.shape == shape
    assert packed.words.dtype == jnp.uint32
    assert packed.words.shape == (*bits.shape[:batch_ndim], -(-math.prod(shape) // 32))
    assert packed.nbytes == 4 * packed.words.size
    np.testing.assert_array_equal(packed.words, reference.pack(bits, batch_ndim))
    unpacked, signs = jax.jit(lambda p: (p.unpack(), p.signs(jnp.int8)))(packed)
    assert (unpacked.dtype, signs.dtype) == (jnp.bool_, jnp.int8)
    np.testing.assert_array_equal(unpacked, bits)
    np.testing.assert_array_equal(signs, np.where(bits, 1, -1))


def test_documented_word_and_bit_order():
    bits = jnp.zeros((2, 40), bool).at[0, 0].set(True).at[0, 31].set(True).at[1, 33].set(True)
    words = PackedBits.pack(bits).words
    np.testing.assert_array_equal(words, np.array([[0x80000001, 0], [0, 2]], np.uint32))


def test_unused_bits_are_zero():
    words = PackedBits.pack(jnp.ones((1, 33), bool)).words
    np.testing.assert_array_equal(words, np.array([[0xFFFFFFFF, 1]], np.uint32))


def test_packed_bits_under_vmap(rng):
    bits = jnp.asarray(rng.random((4, 2, 35)) < 0.5)
    packed = jax.vmap(PackedBits.pack)(bits)
    np.testing.assert_array_equal(packed.words, reference.pack(np.asarray(bits), 2))
    assert packed.shape == (35,)
    np.testing.assert_array_equal(jax.vmap(PackedBits.unpack)(packed), bits)
    np.testing.assert_array_equal(packed.unpack(), bits)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_signs_have_the_type_asked_for(dtype):
    signs = PackedBits.pack(jnp.array([[True, False]])).signs(dtype)
    assert signs.dtype == dtype
    np.testing.assert_array_equal(signs.astype(jnp.float32), [[1, -1]])


def test_pack_rejects_other_types_and_too_few_axes():
    with pytest.raises(TypeError, match="boolean array; got float32"):
        PackedBits.pack(jnp.ones(3))
    with pytest.raises(ValueError, match="fewer than 2 batch axes"):
        PackedBits.pack(jnp.ones(3, bool), batch_ndim=2)


def test_packed_bits_is_frozen():
    packed = PackedBits.pack(jnp.ones((1, 3), bool))
    with pytest.raises(AttributeError):
        packed.shape = (4,)
