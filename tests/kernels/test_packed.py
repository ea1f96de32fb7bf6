"""What is particular to the packed kernels: how little memory they take, and what they decline."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqt_jax import PackedBits, Selection, kernels
from fqt_jax.kernels import Rounding, UnsupportedError, Window, packed
from fqt_jax.kernels.packed import pack_bytes

SAME = Window((3, 3), (1, 1), ((1, 1), (1, 1)))
MIB = 2**20


def vgg_layer(n, size, c, o):
    """Abstract operands of a 3x3 layer, a quarter of the samples kept."""
    f32, u32 = jnp.float32, jnp.uint32
    array = jax.ShapeDtypeStruct
    x = PackedBits(array((n, size * size * c // 32), u32), (size, size, c))
    w = PackedBits(array((9 * c * o // 32,), u32), (3, 3, c, o))
    g = array((n, size, size, o), f32)
    kept = Selection(array((n // 4,), jnp.int32), array((n // 4,), f32), n)
    scale, seed = array((n // 4,), f32), array((2,), u32)
    by_sample = Rounding(scale, scale, seed, kept, None, 4, "samples")
    scale = array((o,), f32)
    return x, w, g, by_sample, Rounding(scale, scale, seed, kept, None, 4, "channels")


@pytest.mark.parametrize(("size", "c", "o"), [(32, 64, 64), (8, 256, 256), (4, 512, 512)])
def test_scratch_memory_of_a_layer_stays_below_its_input_as_float(size, c, o):
    x, w, g, by_sample, by_channel = vgg_layer(128, size, c, o)
    options = {"implementation": "packed"}
    runs = {
        "forward": (lambda x, w: kernels.forward(x, w, SAME, **options), (x, w)),
        "input": (
            lambda g, w, r: kernels.input_grad(g, w, r, SAME, (size, size), **options),
            (g, w, by_sample),
        ),
        "weight": (
            lambda g, x, r: kernels.weight_grad(g, x, r, SAME, **options),
            (g, x, by_channel),
        ),
    }
    bounds = {"forward": 12 * MIB, "input": 28 * MIB, "weight": 28 * MIB}
    for name, (run, operands) in runs.items():
        used = jax.jit(run).lower(*operands).compile().memory_analysis().temp_size_in_bytes
        assert used < bounds[name], name


def test_declines_what_has_no_bit_planes():
    x = PackedBits.pack(jnp.ones((2, 4, 4, 3), bool))
    w = PackedBits.pack(jnp.ones((3, 3, 3, 5), bool), batch_ndim=0)
    g = jnp.ones((2, 4, 4, 5))
    with pytest.raises(UnsupportedError, match="packed: a gradient that is not rounded"):
        kernels.input_grad(g, w, None, SAME, (4, 4), implementation="packed")
    with pytest.raises(UnsupportedError, match="packed: a gradient that is not rounded"):
        kernels.weight_grad(g, x, None, SAME, implementation="packed")
    by_sample = Rounding(
        jnp.zeros(2), jnp.ones(2), jnp.zeros(2, jnp.uint32), None, None, 4, "samples"
    )
    with pytest.raises(UnsupportedError, match="packed: the scale of a group of samples"):
        kernels.weight_grad(g, x, by_sample, SAME, implementation="packed")


@pytest.mark.parametrize("n", [1, 8, 11])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_pack_bytes(rng, n, axis):
    shape = [3, 3, 3]
    shape[axis] = n
    bits = rng.integers(0, 2, shape).astype(np.uint8)
    expected = np.packbits(bits, axis=axis, bitorder="little")
    np.testing.assert_array_equal(pack_bytes(jnp.asarray(bits), axis), expected)


@pytest.mark.parametrize("size", [1, 4, 23, 24, 25, 72, 73, 300])
def test_counts_of_any_length(rng, size):
    """Words and bytes count alike, and add up beyond what a byte holds."""
    a = rng.integers(0, 256, (3, size)).astype(np.uint8)
    b = rng.integers(0, 256, (size, 5)).astype(np.uint8)
    met = a[:, :, None] & b[None]
    expected = np.unpackbits(met, axis=1).sum(1, dtype=np.int32)
    for platform in ("cpu", "cuda"):
        got = packed._count(platform, jnp.bitwise_and, jnp.asarray(a), jnp.asarray(b))
        np.testing.assert_array_equal(got, expected)


@pytest.mark.slow
def test_accelerators_count_the_bits_of_words():
    c, o = 3, 70
    keys = jax.random.split(jax.random.key(0), 3)
    x = PackedBits.pack(jax.random.bernoulli(keys[0], shape=(3, 5, 4, c)))
    w = PackedBits.pack(jax.random.bernoulli(keys[1], shape=(3, 3, c, o)), batch_ndim=0)
    g = jax.random.normal(keys[2], (3, 5, 4, o))
    seed = jnp.array([1, 2], jnp.uint32)
    by_sample = Rounding(g.min((1, 2, 3)), jnp.ptp(g, (1, 2, 3)), seed, None, None, 4, "samples")
    by_channel = Rounding(g.min((0, 1, 2)), jnp.ptp(g, (0, 1, 2)), seed, None, None, 4, "channels")

    @functools.partial(jax.jit, static_argnums=0)
    def products(platform, x, w, g, by_sample, by_channel):
        to = {"window": SAME, "platform": platform}
        options = {"input_size": (5, 4), "compact": False}
        return (
            packed.forward(x, w, **to),
            packed.input_grad(g, w, by_sample, None, **options, **to),
            packed.weight_grad(g, x, by_channel, **to),
        )

    operands = (x, w, g, by_sample, by_channel)
    for platform, kind in (("cpu", "xui8>"), ("cuda", "xui32>")):
        text = products.lower(platform, *operands).as_text()
        counts = [line for line in text.splitlines() if "popcnt" in line]
        assert counts
        assert all(line.endswith(kind) for line in counts)
    for words, others in zip(*(products(p, *operands) for p in ("cpu", "cuda")), strict=True):
        np.testing.assert_array_equal(words, others)
