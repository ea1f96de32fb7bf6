"""Draws and codes for given seeds are part of what a recipe means: they must never change."""

import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqt_jax import FQT1_PLUS, GradientQuantizer
from fqt_jax.grouping import roundings
from fqt_jax.kernels.scaling import gradient_codes
from fqt_jax.rounding import seeds_from_key
from fqt_jax.samplers import SAMPLERS

RECORDED = json.loads((pathlib.Path(__file__).parent / "recorded_draws.json").read_text())
LAYOUTS = (
    ("sample_channel", "channels"),
    ("sample_channel", "shared"),
    ("sample", "shared"),
    ("tensor", "channels"),
    ("tensor", "shared"),
)
CASES = [(s, "range", *layout) for s in SAMPLERS for layout in LAYOUTS]
CASES += [("systematic", "norm", *layout) for layout in LAYOUTS]


def gradient() -> jax.Array:
    rng = np.random.default_rng(5)
    g = rng.normal(size=(12, 3, 3, 16)) * np.exp(rng.normal(size=(12, 1, 1, 1)))
    return jnp.asarray(g * np.exp(rng.normal(size=16)), jnp.float32)


@pytest.mark.parametrize(("sampler", "importance", "groups", "prune"), CASES)
def test_draws_and_codes_are_those_recorded(sampler, importance, groups, prune):
    quantizer = GradientQuantizer(4, 0.5, sampler, importance, groups, prune)

    @jax.jit
    def quantized(g, seeds):
        both = roundings(g, quantizer, seeds)
        return both, [gradient_codes(g, rounding) for rounding in both]

    g, seeds = gradient(), seeds_from_key(jax.random.key(42), 4)
    both, codes = quantized(g, seeds)
    checksums = []
    for rounding, own in zip(both, codes, strict=True):
        own = np.array(own, np.uint8)
        for axis, name in ((0, "samples"), (3, "channels")):
            selection = getattr(rounding, name)
            if selection is None:
                continue
            recorded = RECORDED["draws"][f"{sampler}/{importance}/{name}"]
            np.testing.assert_array_equal(selection.indices, recorded["indices"])
            np.testing.assert_allclose(selection.weights, recorded["weights"], rtol=1e-5)
            # Whatever the code of a slot that is not used.
            np.moveaxis(own, axis, 0)[np.asarray(selection.weights) == 0] = 0
        checksums.append(zlib.crc32(own.tobytes()))
    assert checksums == RECORDED["codes"][f"{sampler}/{importance}/{groups}/{prune}"]


def test_every_sampler_is_recorded():
    assert {name.partition("/")[0] for name in RECORDED["codes"]} == set(SAMPLERS)


def test_bounds_that_are_known_change_nothing():
    g, seeds = gradient(), seeds_from_key(jax.random.key(42), 4)
    bounds = (g.min(axis=(1, 2)), g.max(axis=(1, 2)))
    alone, given = (roundings(g, FQT1_PLUS.gradient, seeds, b) for b in (None, bounds))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(given), strict=True):
        np.testing.assert_array_equal(a, b)
