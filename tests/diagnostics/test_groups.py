import jax.numpy as jnp
import numpy as np
import pytest

from fqt_jax.diagnostics import effective_groups, group_ranges, lorenz_curve, sign_flip_ratio


def test_ranges_of_samples_and_channels(rng):
    g = rng.normal(size=(5, 3, 2, 4))
    for axis in (0, 3, -1):
        rows = np.moveaxis(g, axis, 0)
        expected = [row.max() - row.min() for row in rows]
        np.testing.assert_allclose(group_ranges(g, axis), expected)


def test_lorenz_curve(rng):
    sizes = rng.lognormal(size=50)
    part, share = lorenz_curve(sizes)
    np.testing.assert_allclose(part, np.arange(51) / 50)
    assert (share[0], share[-1]) == (0, pytest.approx(1))
    assert np.all(np.diff(np.diff(share)) >= -1e-12)  # convex
    assert np.all(share <= part + 1e-12)
    np.testing.assert_allclose(share[25], np.sort(sizes)[:25].sum() / sizes.sum())
    np.testing.assert_allclose(*lorenz_curve(np.ones(7)))
    np.testing.assert_allclose(*lorenz_curve(np.zeros(7)))


def test_effective_number_of_groups():
    assert effective_groups([0.0, 0.0, 3.0]) == 1
    assert effective_groups([2.0] * 6) == pytest.approx(6)
    assert effective_groups([3.0, 1.0]) == pytest.approx(16 / 10)
    assert effective_groups(np.float64([3.0, 1.0]) * 1e-300) == pytest.approx(1.6)
    assert effective_groups(np.zeros(4)) == 4


@pytest.mark.parametrize("function", [lorenz_curve, effective_groups])
def test_sizes_are_checked(function):
    for bad, message in (([], "no groups"), ([-1.0], "negative"), ([float("nan")], "NaN")):
        with pytest.raises(ValueError, match=message):
            function(bad)


def test_sign_flips():
    before = {"a": {"kernel": jnp.array([[-1.0, 0.0], [-0.0, 2.0]]), "bias": jnp.ones(3)}}
    after = {"a": {"kernel": jnp.array([[1.0, 1.0], [-1.0, 3.0]]), "bias": -jnp.ones(3)}}
    assert sign_flip_ratio(before, after) == {"a.kernel": 0.5}
    assert sign_flip_ratio(before, after, ".*") == {"a.kernel": 0.5, "a.bias": 1.0}
    with pytest.raises(ValueError, match=r"matches 'scale'\. Names: a\.bias, a\.kernel"):
        sign_flip_ratio(before, after, "scale")
    with pytest.raises(ValueError, match="differ"):
        sign_flip_ratio(before, {"a": {"kernel": jnp.ones(4), "bias": jnp.ones(3)}})
