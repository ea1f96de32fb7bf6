"""Transformers and recurrent networks, in float and quantized."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fqt_jax as fqt
from fqt_jax import kernels
from fqt_jax.diagnostics.taps import layer_gradients, layer_shapes
from fqt_jax.estimators import FullBatch, OneDraw, SplitModel
from fqt_jax.losses import CrossEntropy
from fqt_jax.models import GPT, VisionTransformer, create_model
from fqt_jax.models.recurrent import RecurrentNet, gru_step, lstm_step
from fqt_jax.models.transformer import Attention, turned
from fqt_jax.training import create_state, make_train_step
from tests.test_functional import normal
from tests.test_gradients import flat

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

TOKENS = jax.random.randint(jax.random.key(0), (8, 4), 0, 6)


def tiny_gpt(**options):
    return GPT(1, 8, num_classes=6, length=4, rngs=nnx.Rngs(0), **options)


def tiny_recurrent(step=lstm_step, gates=4):
    sizes = {"num_classes": 3, "in_features": 1, "image_size": (4, 4)}
    return RecurrentNet(step, gates, 1, 16, **sizes, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("options", [{}, {"positions": "rotary", "tied": True}])
def test_gpt_looks_at_no_later_token(options):
    model = tiny_gpt(**options)
    assert (model.head is None) == options.get("tied", False)
    logits = model(TOKENS)
    assert logits.shape == (8, 4, 6)
    changed = model(TOKENS.at[:, 2].set((TOKENS[:, 2] + 1) % 6))
    np.testing.assert_array_equal(changed[:, :2], logits[:, :2])
    for position in (2, 3):
        assert not np.allclose(changed[:, position], logits[:, position], atol=1e-4)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_gpt_tells_positions_apart(positions):
    # Without them, what comes before is a set: the order of the first two would not matter.
    model = tiny_gpt(positions=positions)
    if positions == "learned":
        model.positions[...] = normal(0, 4, 8)
    tokens = jnp.array([[0, 1, 2]])
    swapped = jnp.array([[1, 0, 2]])
    assert not np.allclose(model(tokens)[:, 2], model(swapped)[:, 2], atol=1e-4)


def test_rotary_positions_make_products_of_distances():
    q, k = normal(0, 1, 1, 1, 8), normal(1, 1, 1, 1, 8)
    q, k = (jnp.broadcast_to(a, (1, 6, 1, 8)) for a in (q, k))
    products = jnp.einsum("nshd,nthd->st", turned(q), turned(k), precision="highest")
    for offset in range(-5, 6):
        diagonal = jnp.diagonal(products, offset)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert np.std(products[0]) > 0.1


@pytest.mark.parametrize(
    ("step", "cell"), [(lstm_step, nnx.OptimizedLSTMCell), (gru_step, nnx.GRUCell)]
)
def test_cells_are_those_of_flax(step, cell):
    reference = cell(5, 5, rngs=nnx.Rngs(0))
    x, h, c = (normal(i, 3, 5) for i in range(3))
    given, product = reference.dense_i(x), reference.dense_h(h)
    if step is lstm_step:
        expected, _ = reference((c, h), x)
        given = given.at[:, 5:10].add(-1)  # this forget gate begins open
        got = step(given, product, (h, c))
        np.testing.assert_allclose(got[1], expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[0], expected[1], rtol=1e-5, atol=1e-6)
    else:
        expected, _ = reference(h, x)
        np.testing.assert_allclose(step(given, product, (h, c))[0], expected, rtol=1e-5, atol=1e-6)


def test_a_recurrent_layer_is_its_cell_step_by_step():
    layer = tiny_recurrent().layers[0]
    x = normal(0, 2, 3, 16)
    carry, expected = (jnp.zeros((2, 16)), jnp.zeros((2, 16))), []
    for t in range(3):
        given = layer.input(layer.input_norm(x[:, t]))
        carry = lstm_step(given, layer.state(layer.state_norm(carry[0])), carry)
        expected.append(carry[0])
    np.testing.assert_allclose(layer(x), jnp.stack(expected, 1), rtol=1e-4, atol=1e-5)


BLOCK = {
    "attention/qkv/layers/1",
    "attention/out/layers/1",
    "feed_forward/layers/1",
    "feed_forward/layers/4",
}


@pytest.mark.parametrize(
    ("name", "of_blocks"),
    [
        ("vit_small", BLOCK),
        ("gpt_small", BLOCK),
        ("lstm", {"input", "state"}),
        ("gru", {"input", "state"}),
    ],
)
def test_products_inside_become_binary_and_the_ends_stay(name, of_blocks):
    example = jnp.zeros((2, 8), jnp.int32) if name == "gpt_small" else None
    sizes = {"num_classes": 5, "in_features": 1, "image_size": (8, 8), "width": 0.05}
    model = create_model(name, **sizes, rngs=nnx.Rngs(0))
    table = fqt.quantize(model, fqt.QAT, example=example).table
    binary = {layer.path for layer in table if layer.recipe.binary}
    assert {path.split("/", 2)[2] for path in binary} == of_blocks
    rest = {layer.path for layer in table} - binary
    assert rest == ({"head"} if name == "gpt_small" else {"stem", "head"})


@pytest.mark.parametrize("name", ["vit_small", "gpt_small"])
def test_the_products_of_a_block_fuse_with_their_norms(name):
    sizes = {"num_classes": 5, "in_features": 1, "image_size": (8, 8), "width": 0.05}
    model = create_model(name, **sizes, rngs=nnx.Rngs(0))
    example = jnp.zeros((2, 8), jnp.int32) if name == "gpt_small" else None
    table = fqt.quantize(model, fqt.FQT1, example=example).table
    assert {layer.fuses for layer in table if layer.recipe.binary} == {"yes"}


def test_each_product_sees_centred_signs():
    # What attention and the feed-forward layer's activation give is not centred by itself.
    model = VisionTransformer(
        1, 32, num_classes=3, in_features=1, image_size=(8, 8), rngs=nnx.Rngs(0)
    )
    found = fqt.sign_balance(fqt.quantize(model, fqt.QAT).model, normal(0, 16, 8, 8, 1))
    assert len(found) == 4
    assert all(0.3 < layer.positive < 0.7 for layer in found), str(found)


def test_a_scan_packs_its_weights_once_and_draws_anew_in_each_step():
    model, _ = fqt.quantize(tiny_recurrent(gru_step, 3), fqt.FQT1)
    optimizer = optax.sgd(0.1)
    graphdef, state = create_state(model, optimizer)
    step = make_train_step(graphdef, optimizer, loss=CrossEntropy(3))
    batch = {"x": normal(0, 6, 4, 4, 1), "label": jnp.arange(6) % 3}
    compiled = step.jitted.lower(state, batch, jax.random.key(0)).compile()

    new, _ = compiled(state, batch, jax.random.key(0))
    counts = {
        jax.tree_util.keystr(path): int(x)
        for path, x in jax.tree_util.tree_leaves_with_path(new.others)
        if "count" in jax.tree_util.keystr(path)
    }
    by_layer = {next(n for n in ("input", "state") if n in path): x for path, x in counts.items()}
    assert by_layer == {"input": 1, "state": 4}

    if kernels.implementations()["native"] == "available":  # whose calls have names
        loops, main = re.split(r"^(?=ENTRY )", compiled.as_text(), flags=re.M)
        calls = [len(re.findall('"fqt_jax_encode_weights"', part)) for part in (loops, main)]
        assert calls == [0, 2]
        assert '"fqt_jax_forward"' in loops


def test_heads_have_at_most_32_features_and_an_even_number():
    found = {n: Attention(n, rngs=nnx.Rngs(0)).heads for n in (8, 32, 40, 136, 384)}
    assert found == {8: 1, 32: 1, 40: 2, 136: 17, 384: 12}


def token_losses(outputs, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["label"])
    return jnp.mean(losses, axis=1)


@pytest.mark.parametrize("recipe", [pytest.param(fqt.QAT, marks=pytest.mark.slow), fqt.FQT1])
def test_one_draw_is_unbiased_for_a_gpt(recipe):
    batch = {"x": TOKENS, "label": jnp.roll(TOKENS, -1, 1)}

    def task(recipe):
        model = fqt.quantize(tiny_gpt(), recipe, example=TOKENS).model
        return SplitModel.of(model), batch, token_losses

    model, _, loss = task(recipe)
    key = jax.random.key(0)
    expected = flat(jax.jit(lambda: FullBatch().gradients(*task(fqt.QAT), key).grads)())

    def one(key):
        draw_key, rounding_key = jax.random.split(key)
        merged = model.merge()
        nnx.reseed(merged, rounding=rounding_key)
        result = OneDraw(keep=0.5).gradients(SplitModel.of(merged), batch, loss, draw_key)
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(result.grads)])

    draws = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 2000)))
    error = draws.mean(0) - expected
    spread = draws.std(0) / np.sqrt(len(draws))
    assert np.abs(error).max() > 0
    assert (np.abs(error) <= 4.5 * spread + 1e-6).all()
    # The bound tells a bias: a gradient a tenth too large is out of it.
    assert not (np.abs(1.1 * draws.mean(0) - expected) <= 4.5 * spread + 1e-6).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tiny_gpt(positions="none"), "'learned' or 'rotary'; got 'none'"),
        (lambda: tiny_gpt()(jnp.zeros((1, 5), jnp.int32)), "4 positions; got a sequence of 5"),
        (lambda: Attention(5, rngs=nnx.Rngs(0)), "must be even; got 5"),
        (lambda: tiny_recurrent()(jnp.ones((1, 4, 5, 1))), "4 pixels wide; got 5"),
        (
            functools.partial(create_model, "vit_small", num_classes=2, image_size=(8, 10)),
            r"patches of 4x4 pixels; they are 8x10",
        ),
        (functools.partial(create_model, "vit_small", num_classes=2, stem="big"), "'small' or"),
    ],
)
def test_what_does_not_fit_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build(rngs=nnx.Rngs(0)) if isinstance(build, functools.partial) else build()


def test_what_is_inside_of_a_loop_is_listed_and_else_named():
    recipe = dataclasses.replace(fqt.FQT1, threshold="calibrated")
    model, _ = fqt.quantize(tiny_recurrent(), recipe)
    x = normal(0, 6, 4, 4, 1)
    found = {shape.path: (shape.input[0], shape.is_inside) for shape in layer_shapes(model, x)}
    assert found["layers/0/input"] == (24, False)  # all rows at once
    assert found["layers/0/state"] == (6, True)
    assert len(found) == 4
    for function in (fqt.calibrate, fqt.sign_balance):
        with pytest.raises(ValueError, match=r"layer layers/0/state is called inside of a loop"):
            function(model, x)
    with pytest.raises(ValueError, match=r"cannot be seen, inside of a loop: layers/0/state\."):
        layer_gradients(model, x, jnp.arange(6) % 3, key=jax.random.key(0))
    # An example tells the first and the last layer through loops too.
    table = fqt.quantize(tiny_recurrent(), fqt.QAT, example=x).table
    assert {layer.path: layer.reason for layer in table if not layer.recipe.binary} == {
        "stem": "first layer",
        "head": "last layer",
    }
