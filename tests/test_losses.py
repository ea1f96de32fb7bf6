import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqt_jax.losses import CrossEntropy


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_cross_entropy_and_its_gradient_against_numpy(smoothing):
    logits = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    labels = np.array([0, 3, 1, 1, 2])
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    q = np.full((5, 4), smoothing / 4)
    q[np.arange(5), labels] += 1 - smoothing
    loss = CrossEntropy(4, smoothing)
    batch = (None, jnp.asarray(labels))
    np.testing.assert_allclose(loss(jnp.asarray(logits), batch), -(q * np.log(p)).sum(1), rtol=1e-5)
    gradient = jax.grad(lambda z: loss(z, batch).sum())(jnp.asarray(logits))
    np.testing.assert_allclose(gradient, p - q, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("label", [-1, 4, -(2**31)])
def test_a_label_out_of_range_is_nan_inside_jit_and_no_other(smoothing, label):
    loss = CrossEntropy(4, smoothing)
    batch = {"label": jnp.array([0, label, 3])}
    logits = jnp.ones((3, 4))
    losses = jax.jit(loss)(logits, batch)
    gradient = jax.jit(jax.grad(lambda z: loss(z, batch).sum()))(logits)
    np.testing.assert_array_equal(np.isnan(losses), [False, True, False])
    np.testing.assert_array_equal(np.isnan(gradient).all(1), [False, True, False])
    np.testing.assert_array_equal(np.isnan(gradient).any(1), [False, True, False])


def test_labels_are_where_they_are_said_to_be():
    loss = CrossEntropy(4, labels=lambda batch: batch["fine"])
    batch = {"fine": np.array([3]), "label": np.array([9])}
    loss.check(batch)
    assert loss.accuracy(jnp.array([[0.0, 0.0, 0.0, 1.0]]), batch).all()
    with pytest.raises(ValueError, match="labels from 9 to 9"):
        CrossEntropy(4).check(batch)
    with pytest.raises(ValueError, match=r"none of 'label', 'y', 'labels', .* by labels=lambda"):
        CrossEntropy(4).check({"fine": np.array([3])})
    with pytest.raises(ValueError, match="only 1 entries"):
        CrossEntropy(4).check((np.array([3]),))
    CrossEntropy(4).check({"label": jnp.array([9])}, wait=False)
    with pytest.raises(ValueError, match="labels from 9 to 9"):
        CrossEntropy(4).check({"label": jnp.array([9])})


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_of_many_labels_a_sample_has_the_mean(rng, smoothing):
    logits = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    labels = jnp.array([[0, 1, 2], [3, 3, 0]])
    loss = CrossEntropy(4, smoothing)
    each = loss(logits.reshape(6, 4), (None, labels.reshape(6))).reshape(2, 3)
    np.testing.assert_allclose(loss(logits, (None, labels)), each.mean(1), rtol=1e-6)
    right = np.argmax(logits, -1) == np.asarray(labels)
    np.testing.assert_allclose(loss.accuracy(logits, (None, labels)), right.mean(1), rtol=1e-6)
    # Bits are those of the labels themselves, whatever the smoothing.
    p = np.exp(np.float64(logits))
    p = np.take_along_axis(p / p.sum(-1, keepdims=True), np.asarray(labels)[..., None], -1)
    np.testing.assert_allclose(
        loss.bits(logits, (None, labels)), -np.log2(p[..., 0]).mean(1), rtol=1e-5
    )
    assert np.isnan(loss(logits, (None, labels.at[1, 2].set(4)))).tolist() == [False, True]


@pytest.mark.parametrize(
    ("outputs", "labels", "error", "message"),
    [
        (jnp.zeros((2, 4), jnp.int32), [0, 1], TypeError, "the outputs must be a floating-point"),
        (jnp.zeros((2, 4)), [0.0, 1.0], TypeError, "labels must be whole numbers; got float32"),
        (jnp.zeros((2, 5)), [0, 1], ValueError, r"must be \[N, 4\] .*; got \[2, 5\] and \[2\]"),
        (jnp.zeros((2, 4)), [[0], [1]], ValueError, r"got \[2, 4\] and \[2, 1\]"),
        (jnp.zeros((2, 3, 4)), [0, 1], ValueError, r"got \[2, 3, 4\] and \[2\]"),
        (jnp.zeros((2, 3, 4)), [[0, 1]], ValueError, r"got \[2, 3, 4\] and \[1, 2\]"),
    ],
)
def test_outputs_and_labels_that_do_not_fit_are_named(outputs, labels, error, message):
    with pytest.raises(error, match=message):
        CrossEntropy(4)(outputs, {"label": jnp.array(labels)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "num_classes must be at least 1"), ((4, 1.0), "smoothing"), ((4, -0.1), "smoothing")],
)
def test_bad_options_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CrossEntropy(*arguments)
