"""Tokens drawn from a model, one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqt_jax as fqt
from fqt_jax.generation import generate
from fqt_jax.models import GPT

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


class Table(nnx.Module):
    """Logits that depend on the token alone."""

    def __init__(self, logits, positions=None):
        self.logits, self.positions = nnx.Param(jnp.asarray(logits)), positions

    def __call__(self, tokens):
        if self.positions is not None:
            assert tokens.shape[1] == self.positions
        return self.logits[...][tokens]


def test_the_most_probable_token_follows_at_temperature_zero():
    successor = np.array([2, 3, 1, 0])
    model = Table(5.0 * np.eye(4, dtype=np.float32)[successor], positions=3)
    tokens = generate(model, jnp.array([[0], [3]]), 6, length=3, temperature=0.0)
    np.testing.assert_array_equal(tokens, [[2, 1, 3, 0, 2, 1], [0, 2, 1, 3, 0, 2]])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_have_the_probabilities_of_the_logits_over_the_temperature(temperature):
    logits = np.array([0.0, 1.0, -1.0, 0.5], np.float32)
    model = Table(np.tile(logits, (4, 1)))
    options = {"length": 2, "key": jax.random.key(0), "temperature": temperature}
    tokens = generate(model, jnp.zeros((500, 1), jnp.int32), 20, **options)
    found = np.bincount(np.ravel(tokens), minlength=4) / tokens.size
    expected = np.exp(logits / temperature)
    expected /= expected.sum()
    np.testing.assert_allclose(found, expected, atol=4.5 * 0.5 / tokens.size**0.5)
    assert len({tuple(row) for row in np.asarray(tokens)}) > 490  # each row draws its own


def test_a_quantized_model_sees_its_last_tokens_and_no_padding():
    model = GPT(1, 8, num_classes=6, length=4, rngs=nnx.Rngs(0))
    example = jnp.zeros((1, 4), jnp.int32)
    model = fqt.quantize(model, fqt.FQT1, example=example).model
    prompt = jax.random.randint(jax.random.key(1), (3, 2), 0, 6)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    tokens = np.asarray(generate(model, prompt, 5, length=4, temperature=0.0))

    text = np.asarray(prompt)
    for position in range(5):
        logits = model(jnp.asarray(text[:, -4:]))[:, -1]
        np.testing.assert_array_equal(tokens[:, position], np.argmax(logits, axis=-1))
        text = np.concatenate([text, tokens[:, position, None]], axis=1)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": jnp.zeros((2, 0), jnp.int32)}, r"a token at least; got \(2, 0\)"),
        ({"prompt": jnp.zeros(3, jnp.int32)}, r"must be \[N, P\]"),
        ({"count": 0}, "at least 1; got 0 and 3"),
        ({"length": 0}, "at least 1; got 4 and 0"),
        ({"temperature": -1.0}, "temperature must be a number from 0 on; got -1.0"),
        ({"temperature": float("nan")}, "got nan"),
        ({"key": None}, "a key is needed"),
    ],
)
def test_what_cannot_be_meant_is_named(changes, message):
    options = {"prompt": jnp.zeros((1, 1), jnp.int32), "count": 4, "length": 3}
    options |= {"key": jax.random.key(0)} | changes
    with pytest.raises(ValueError, match=message):
        generate(Table(np.zeros((2, 2), np.float32)), **options)
