import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fqt_jax as fqt
from fqt_jax import GradientQuantizer, theory
from fqt_jax.pruning import draw
from fqt_jax.samplers import SAMPLERS, Systematic, Uniform
from tests import reference

AGP = GradientQuantizer(bits=4)
SHARED = dataclasses.replace(AGP, prune="shared")
UNBIASED = [name for name, sampler in SAMPLERS.items() if sampler.unbiased]


def gradient(seed: int, n: int = 8, positions: int = 6, channels: int = 12) -> np.ndarray:
    """Groups of very different size on both axes, as gradients have them."""
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(n, positions, 1, channels))
    g *= rng.lognormal(sigma=1.5, size=(n, 1, 1, 1)) * rng.lognormal(size=(1, 1, 1, channels))
    return g.astype(np.float32)


def reference_probabilities(g, axis: int, quantizer: GradientQuantizer) -> np.ndarray:
    rows = np.moveaxis(np.float64(g), axis, 0).reshape(g.shape[axis], -1)
    k = quantizer.kept(len(rows))
    if quantizer.sampler == Uniform():
        return np.full(len(rows), k / len(rows))
    if quantizer.importance == "norm":
        return reference.keep_probabilities(np.linalg.norm(rows, axis=1), k)
    importance = np.maximum(rows.max(axis=1), 0) - np.minimum(rows.min(axis=1), 0)
    return reference.keep_probabilities(importance, k)


@pytest.mark.parametrize("sampler", UNBIASED)
@pytest.mark.parametrize("importance", ["range", "norm"])
@pytest.mark.parametrize(("product", "axis"), [("input", 0), ("weight", 3)])
def test_error_is_that_of_the_formula(sampler, importance, product, axis):
    g = gradient(0)
    for bits, keep in ((1, 1.0), (4, None), (2, 0.6)):
        quantizer = GradientQuantizer(bits, keep, sampler, importance)
        error = theory.gradient_error(g, quantizer, product=product)
        p = reference_probabilities(g, axis, quantizer)
        expected = reference.pruned_rounded_variance(g, p, bits, axis)
        np.testing.assert_allclose(error.total, expected, rtol=1e-5)
        assert error.bias == 0
        assert (error.mask > 0) == (keep != 1.0)


def test_one_scale_for_the_tensor():
    g = gradient(1)
    quantizer = GradientQuantizer(bits=4, groups="tensor")
    p = reference_probabilities(g, 3, quantizer).reshape(1, 1, 1, -1)
    entries = reference.rounding_variance(g, 4, None) / p + reference.mask_variance(g, p)
    error = theory.gradient_error(g, quantizer, product="weight")
    np.testing.assert_allclose(error.total, entries.sum(), rtol=1e-5)


def test_sample_groups_serve_both_products():
    g = gradient(2)
    quantizer = GradientQuantizer(bits=2, groups="sample", prune="shared")
    of_input = theory.gradient_error(g, quantizer, product="input")
    assert theory.gradient_error(g, quantizer, product="weight") == of_input


def test_topk_has_a_bias_and_no_mask():
    g = gradient(3)
    error = theory.gradient_error(g, dataclasses.replace(AGP, sampler="topk"))
    largest = np.argsort(np.abs(g).max(axis=(1, 2, 3)))[-2:]
    kept = np.isin(np.arange(8), largest)
    rounding = reference.rounding_variance(g, 4, 0)[kept].sum()
    np.testing.assert_allclose(error, (rounding, 0, (np.float64(g[~kept]) ** 2).sum()), rtol=1e-6)
    assert error.variance == error.rounding


def shared_by_enumeration(g, p, bits: int, outcomes) -> float:
    """Rounding of the folded rows, per channel, over (probability, kept) of each outcome."""
    total = 0.0
    for probability, kept in outcomes:
        if len(kept):
            folded = g[kept] / p[kept].reshape(-1, 1, 1, 1)
            total += probability * reference.rounding_variance(folded, bits, 3).sum()
    return total


def outcomes_of(p: np.ndarray, sampler: str):
    n = len(p)
    if sampler == "bernoulli":
        for bits in itertools.product([False, True], repeat=n):
            kept = np.array(bits)
            yield np.prod(np.where(kept, p, 1 - p)), np.flatnonzero(kept)
    elif sampler == "uniform":
        subsets = list(itertools.combinations(range(n), round(p.sum())))
        for subset in subsets:
            yield 1 / len(subsets), np.array(subset)
    else:
        # The points u, u + 1, ... for many u, straight from the definition.
        edges = np.concatenate([[0], np.cumsum(p)])
        points = (np.arange(20_000) + 0.5) / 20_000
        for u in points:
            kept = np.ceil(edges[1:] - u) > np.ceil(edges[:-1] - u)
            yield 1 / len(points), np.flatnonzero(kept)


@pytest.mark.parametrize("sampler", UNBIASED)
def test_shared_samples_average_over_the_outcomes(sampler):
    g = gradient(4, n=6, positions=2, channels=3)
    quantizer = GradientQuantizer(2, 0.5, sampler, importance="norm", prune="shared")
    p = reference_probabilities(g, 0, quantizer)
    assert 0 < np.sum(p < 1) < 6 or sampler == "uniform"
    # Many outcomes drawn where theory draws them; all of them where it is exact.
    error = theory.gradient_error(g, quantizer, product="weight", selections=20_000)
    expected = shared_by_enumeration(g, p, 2, outcomes_of(p, sampler))
    rtol = 1e-3 if sampler == "systematic" else 0.03
    np.testing.assert_allclose(error.rounding, expected, rtol=rtol)
    mask = reference.mask_variance(g, p.reshape(-1, 1, 1, 1)).sum()
    np.testing.assert_allclose(error.mask, mask, rtol=1e-5)


def test_systematic_outcomes_have_the_marginals_and_the_number():
    rng = np.random.default_rng(0)
    for n, k in ((7, 3), (40, 10), (5, 5), (1, 1)):
        p = reference.keep_probabilities(rng.lognormal(sigma=1.5, size=n), k)
        probability, weights = Systematic().outcomes(p)
        kept = weights > 0
        assert len(probability) <= n + 1
        np.testing.assert_allclose(probability @ kept, p, atol=1e-9)
        np.testing.assert_allclose(probability @ weights, 1, atol=1e-9)
        np.testing.assert_allclose(probability @ (kept.sum(axis=1) != k), 0, atol=1e-9)


def test_systematic_outcomes_are_those_of_the_library():
    r = np.float32([4, 1, 1, 2, 3, 1, 2, 2])
    p = np.asarray(fqt.keep_probabilities(r, 3), np.float64)
    probability, weights = Systematic().outcomes(p)
    seeds = jax.random.bits(jax.random.key(0), (4000, 2))
    drawn = jax.jit(jax.vmap(lambda seed: draw(r, 3, "systematic", seed).expand()))(seeds)
    known = {tuple(w > 0): q for q, w in zip(probability, weights, strict=True) if q > 1e-6}
    found = {}
    for row in np.asarray(drawn) > 0:
        found[tuple(row)] = found.get(tuple(row), 0) + 1 / 4000
    assert set(found) == set(known)
    for outcome, q in known.items():
        assert abs(found[outcome] - q) < 4 * np.sqrt(q * (1 - q) / 4000) + 1e-9


def test_systematic_needs_a_whole_number():
    with pytest.raises(ValueError, match=r"whole number; got 0\.7"):
        Systematic().outcomes(np.array([0.5, 0.2]))


@pytest.mark.parametrize("sampler", UNBIASED)
def test_variance_of_a_sum_counts_which_groups_go_together(sampler, rng):
    p = np.array([0.3, 0.9, 1.0, 0.5, 0.8, 0.5])
    if sampler == "uniform":
        p = np.full(6, 4 / 6)
    u = rng.normal(size=(6, 4)) + 1
    mean, square = np.zeros(4), 0.0
    for probability, kept in outcomes_of(p, sampler):
        total = (u[kept] / p[kept, None]).sum(axis=0)
        mean, square = mean + probability * total, square + probability * (total**2).sum()
    got = theory.sampled_sum_variance(u, p, sampler)
    np.testing.assert_allclose(got, square - (mean**2).sum(), rtol=1e-3)
    alone = ((1 - p) / p * (u**2).sum(axis=1)).sum()
    assert (sampler == "bernoulli") == np.isclose(got, alone)


def test_sampled_sum_errors():
    with pytest.raises(ValueError, match="'topk'"):
        theory.sampled_sum_variance([[1.0]], [1.0], "topk")
    with pytest.raises(ValueError, match="biased"):
        theory.sampled_sum_variance([[1.0], [1.0]], [1.0, 0.0], "bernoulli")


@given(st.integers(0, 1000), st.integers(1, 8), st.sampled_from([None, 0.5, 1.0]))
def test_bounds_hold(seed, bits, keep):
    g = gradient(seed, n=9, positions=3, channels=4)
    exact = {
        groups: theory.gradient_error(g, GradientQuantizer(bits, 1.0, groups=groups)).total
        for groups in ("tensor", "sample")
    }
    assert exact["tensor"] <= theory.per_tensor_bound(g, bits) * (1 + 1e-9)
    assert exact["sample"] <= theory.per_sample_bound(g, bits) * (1 + 1e-9)
    assert theory.per_sample_bound(g, bits) <= theory.per_tensor_bound(g, bits)
    assert theory.published_agp_bound(g, bits, keep) <= theory.per_sample_bound(g, bits) + 1e-9
    for sampler in UNBIASED:
        quantizer = GradientQuantizer(bits, keep, sampler)
        error = theory.gradient_error(g, quantizer).total
        assert error <= theory.agp_bound(g, quantizer) * (1 + 1e-9)


def test_published_bounds_are_tight_where_they_can_be():
    # Half of the entries in the middle of a step, the rest at the extremes of the group.
    g = np.array([[0.0, 0.5, 0.5, 1.0], [0.0, 1.0, 1.0, 2.0]])
    half = 0.5 * theory.per_sample_bound(g, bits=1)
    np.testing.assert_allclose(theory.gradient_error(g, fqt.PSQ1.gradient).total, half)
    np.testing.assert_allclose(theory.per_tensor_bound(g, bits=1), 8 * 4 / 4)
    np.testing.assert_allclose(theory.per_sample_bound(g, bits=1), 4 * (1 + 4) / 4)
    np.testing.assert_allclose(theory.published_agp_bound(g, bits=2), 4 * 4 / 4 / 9)


def test_the_published_expression_for_agp_is_no_bound():
    g = gradient(5)
    assert theory.gradient_error(g, AGP).total > 2 * theory.published_agp_bound(g, bits=4)


def test_degenerate_gradients():
    for g in (np.zeros((4, 3, 3, 8)), np.full((4, 3, 3, 8), 2.0)):
        for product in ("input", "weight"):
            for quantizer in (AGP, SHARED):
                error = theory.gradient_error(g, quantizer, product=product)
                assert np.isfinite(error).all()
                assert error.rounding == pytest.approx(0, abs=1e-12)
                assert (error.mask > 0) == bool(g.any())
    one = theory.gradient_error(np.ones((1, 4)), AGP)
    assert one == (0, 0, 0)


def test_errors():
    with pytest.raises(ValueError, match="axis of samples"):
        theory.gradient_error(np.ones(3), AGP)
    with pytest.raises(ValueError, match="'input' or 'weight'"):
        theory.gradient_error(np.ones((3, 3)), AGP, product="both")
    with pytest.raises(ValueError, match="topk"):
        theory.agp_bound(np.ones((3, 3)), dataclasses.replace(AGP, sampler="topk"))


@pytest.mark.parametrize("seed", range(5))
def test_tokens_are_never_worse_groups_than_their_sequences(seed):
    sequences = gradient(seed)
    tokens = sequences.reshape(-1, 1, 1, sequences.shape[-1])
    quantizer = dataclasses.replace(AGP, importance="norm")
    coarse, fine = (theory.gradient_error(g, quantizer).mask for g in (sequences, tokens))
    assert 0 < fine <= coarse * (1 + 1e-6)
    assert fine < 0.95 * coarse  # they are unlike each other
    coarse, fine = (theory.per_sample_bound(g, bits=1) for g in (sequences, tokens))
    assert 0 < fine < coarse
