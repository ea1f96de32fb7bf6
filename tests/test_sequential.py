"""Sequences in fused form against the same layers called in turn."""

import contextlib
import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqt_jax as fqt
from fqt_jax import kernels, sequential
from fqt_jax.binarize import PackedBits
from fqt_jax.fused import chain

LEARNED = dataclasses.replace(fqt.QAT, scale="learned")
UNSCALED = dataclasses.replace(fqt.QAT, scale="none", clip=False)

POOL = functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
LEAKY = functools.partial(nnx.leaky_relu, negative_slope=0.2)

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


def conv(inputs, outputs, recipe, strides=1, *, rngs, bias=False, implementation=None):
    layer = fqt.QuantConv(
        inputs,
        outputs,
        3,
        strides,
        use_bias=bias,
        recipe=recipe,
        implementation=implementation,
        rngs=rngs,
    )
    if layer.bias is not None:
        layer.bias[...] = 3 * jax.random.normal(rngs.params(), (outputs,))
    return layer


def norm(features, *, rngs, **options):
    layer = nnx.BatchNorm(features, momentum=0.9, rngs=rngs, **options)
    # Without these, sums that equal their mean lie on the edge of a sign.
    if layer.scale is not None:
        layer.scale[...] = jax.random.uniform(rngs.params(), (features,)) + 0.1
    if layer.bias is not None:
        layer.bias[...] = jax.random.uniform(rngs.params(), (features,)) + 0.1
    return layer


def network(recipes, *, norms=True, implementation=None):
    """Three convolutions with every kind of place between them."""
    rngs = nnx.Rngs(params=0, rounding=1)
    options = {"rngs": rngs, "implementation": implementation}
    norms = [norm(n, rngs=rngs) for n in (8, 12, 16, 8)] if norms else [None] * 4
    layers = (
        norms[0],
        conv(8, 12, recipes[0], **options),
        norms[1],
        nnx.PReLU(0.25),
        POOL,
        conv(12, 16, recipes[1], 2, **options),
        nnx.PReLU(0.25),
        norms[2],
        conv(16, 8, recipes[2], **options),
        norms[3],
        nnx.PReLU(0.25),
    )
    return fqt.Sequential(*(layer for layer in layers if layer is not None))


def value_and_grads(net, x, *, train=True, **arguments):
    """Output, gradients of the parameters and of ``x``, and the state after, of a random loss."""
    graphdef, params, others = nnx.split(net, nnx.Param, ...)

    def loss(params, x):
        model = nnx.merge(graphdef, params, others, copy=True)
        model.train() if train else model.eval()
        out = model(x, **arguments)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out * weights), (out, nnx.split(model, nnx.Param, ...)[2])

    (_, (out, after)), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    return out, grads, jax.tree.map(_data, after)


def _data(a):
    return jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a


@contextlib.contextmanager
def in_turn(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sequential, "fits", lambda *_: False)
        yield


def images(n=6, size=9):
    return jax.random.normal(jax.random.key(5), (n, size, size, 8))


def assert_trees_close(got, expected, tolerance):
    # A gradient that is zero by mathematics, as of a bias before a norm, is one of rounding.
    floor = 1e-2 * max(np.abs(np.asarray(b, np.float64)).max() for b in jax.tree.leaves(expected))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        assert a.dtype == b.dtype, jax.tree_util.keystr(path)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.abs(a - b).max() / max(np.abs(b).max(), floor)
        assert error < tolerance, (jax.tree_util.keystr(path), error)


def assert_both_forms_agree(net, x, tolerance, monkeypatch, **options):
    fused = value_and_grads(net, x, **options)
    with in_turn(monkeypatch):
        expected = value_and_grads(net, x, **options)
    assert_trees_close(fused, expected, tolerance)


def runs(net):
    return [each.run for each in net.explain()]


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("recipe", "norms", "train", "tolerance", "implementation"),
    [
        # The slope's gradient is a small difference of large sums.
        (fqt.QAT, True, True, 1e-4, None),
        pytest.param(fqt.QAT, True, True, 1e-4, "xla", marks=slow),
        pytest.param(fqt.QAT, True, False, 1e-5, None, marks=slow),
        pytest.param(fqt.QAT, True, False, 1e-5, "xla", marks=slow),
        pytest.param(UNSCALED, False, True, 1e-5, None, marks=slow),
        (UNSCALED, False, True, 1e-5, "xla"),
        pytest.param(LEARNED, True, False, 1e-5, None, marks=slow),
        pytest.param(LEARNED, True, False, 1e-5, "xla", marks=slow),
        (fqt.FQT1, True, True, 1e-3, None),
        pytest.param(fqt.FQT1, True, True, 1e-3, "xla", marks=slow),
    ],
)
def test_the_two_forms_agree(monkeypatch, recipe, norms, train, tolerance, implementation):
    net = network([recipe] * 3, norms=norms, implementation=implementation)
    assert set(runs(net)) == {1}
    assert_both_forms_agree(net, images(), tolerance, monkeypatch, train=train)


def every_order():
    """All combinations; without the slow ones, each pair of values is in one."""
    orders = enumerate(["norm_act", "act_norm", "act"])
    acts = enumerate([nnx.relu, LEAKY, nnx.identity, "prelu"])
    for (i, order), (j, act) in itertools.product(orders, acts):
        for train, implementation in itertools.product([True, False], [None, "xla"]):
            pairs = (train, implementation) == ((i + j) % 2 == 0, (None, "xla")[(i + j // 2) % 2])
            marks = () if pairs else slow
            yield pytest.param(order, act, train, implementation, marks=marks)


@pytest.mark.parametrize(("order", "act", "train", "implementation"), [*every_order()])
def test_activations_norms_and_biases_in_every_order(
    monkeypatch, order, act, train, implementation
):
    rngs = nnx.Rngs(params=0, rounding=1)
    act, last = (nnx.PReLU(0.1), nnx.PReLU(0.1)) if act == "prelu" else (act, act)
    options = {"rngs": rngs, "bias": True, "implementation": implementation}
    between = {
        "norm_act": [norm(12, rngs=rngs), act],
        "act_norm": [act, norm(12, rngs=rngs)],
        "act": [act],
    }[order]
    net = fqt.Sequential(
        conv(8, 12, fqt.QAT, **options), *between, conv(12, 8, fqt.QAT, **options), last
    )
    assert set(runs(net)) == {1}
    assert_both_forms_agree(net, images(4, 5), 2e-4, monkeypatch, train=train)


@pytest.mark.parametrize("act", [nnx.relu, nnx.PReLU(0.25), None], ids=["relu", "prelu", "none"])
@pytest.mark.parametrize("implementation", [None, pytest.param("xla", marks=slow)])
def test_thresholds_fuse(monkeypatch, act, implementation):
    rngs = nnx.Rngs(params=0, rounding=1)
    recipe = dataclasses.replace(fqt.QAT, threshold="learned")
    products = [conv(8, n, recipe, rngs=rngs, implementation=implementation) for n in (8, 12)]
    for layer in products:
        layer.threshold[...] = jax.random.normal(rngs.params(), (8,))
        layer.spread[...] = 0.5 + jax.random.uniform(rngs.params(), (8,))
    acts = [] if act is None else [act]
    net = fqt.Sequential(
        norm(8, rngs=rngs), products[0], norm(8, rngs=rngs), *acts, POOL, products[1]
    )
    assert set(runs(net)) == {1}
    assert_both_forms_agree(net, images(), 1e-4, monkeypatch)
    bare = fqt.Sequential(*products)  # signs of the input itself, and of sums
    assert_both_forms_agree(bare, images(), 1e-4, monkeypatch)


def test_relu_has_no_gradient_at_zero(monkeypatch):
    """Sums of an even number of signs are often zero."""
    rngs = nnx.Rngs(params=0, rounding=1)
    net = fqt.Sequential(
        conv(8, 12, UNSCALED, rngs=rngs), nnx.relu, conv(12, 8, UNSCALED, rngs=rngs)
    )
    assert_both_forms_agree(net, images(4, 5), 1e-6, monkeypatch)


@pytest.mark.parametrize(
    "options", [{"use_scale": False}, {"use_bias": False}, {"use_scale": False, "use_bias": False}]
)
def test_norms_without_some_parameters(monkeypatch, options):
    rngs = nnx.Rngs(params=0, rounding=1)
    net = fqt.Sequential(
        conv(8, 12, fqt.QAT, rngs=rngs),
        norm(12, rngs=rngs, **options),
        conv(12, 8, fqt.QAT, rngs=rngs),
    )
    assert set(runs(net)) == {1}
    # Signs of numbers whose mean is zero: no two roundings may put one on different sides.
    x = images(4, 5)
    fused = value_and_grads(net, x)
    with in_turn(monkeypatch):
        expected = value_and_grads(net, x)
    assert_trees_close(fused[2], expected[2], 1e-5)


@pytest.mark.parametrize(
    ("recipe", "shape"),
    [
        (fqt.QAT, (24, 8)),
        (fqt.QAT, (3, 5, 8)),
        (fqt.QAT, (8,)),
        pytest.param(fqt.FQT1, (24, 8), marks=slow),
        (fqt.FQT1, (3, 5, 8)),
        pytest.param(fqt.FQT1, (8,), marks=slow),
    ],
)
def test_dense_layers_fuse(monkeypatch, shape, recipe):
    rngs = nnx.Rngs(params=0, rounding=1)
    between = [norm(16, rngs=rngs), nnx.PReLU(0.25)]
    if len(shape) == 1:
        between = [nnx.PReLU(0.25)]
    net = fqt.Sequential(
        fqt.QuantLinear(8, 16, recipe=recipe, rngs=rngs),
        *between,
        fqt.QuantLinear(16, 4, recipe=recipe, rngs=rngs),
        nnx.relu,
    )
    assert set(runs(net)) == {1}
    x = jax.random.normal(jax.random.key(0), shape)
    assert_both_forms_agree(net, x, 1e-3, monkeypatch)


@pytest.mark.parametrize("acts", [[nnx.relu], [nnx.PReLU(0.25)], []])
def test_bfloat16_input_and_float32_parameters(monkeypatch, acts):
    rngs = nnx.Rngs(params=0, rounding=1)
    net = fqt.Sequential(conv(8, 12, fqt.QAT, rngs=rngs), *acts, conv(12, 8, fqt.QAT, rngs=rngs))
    x = images(4, 5).astype(jnp.bfloat16)
    fused = value_and_grads(net, x)
    assert fused[0].dtype == jnp.bfloat16
    with in_turn(monkeypatch):
        expected = value_and_grads(net, x)
    assert_trees_close(fused, expected, 0.05)
    normed = fqt.Sequential(*net.layers, norm(8, rngs=rngs))
    assert value_and_grads(normed, x)[0].dtype == jnp.float32


def test_half_precision_parameters():
    rngs = nnx.Rngs(params=0, rounding=1)
    net = fqt.Sequential(conv(8, 12, fqt.FQT1, rngs=rngs), norm(12, rngs=rngs), nnx.PReLU())
    halves = jax.tree.map(lambda a: a.astype(jnp.bfloat16), nnx.state(net, nnx.Param))
    nnx.update(net, halves)
    out, (grads, _), _ = value_and_grads(net, images(4, 5).astype(jnp.bfloat16))
    assert out.dtype == jnp.float32  # the norm's statistics are
    assert {leaf.dtype.name for leaf in jax.tree.leaves(grads)} == {"bfloat16"}


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_the_fused_form_keeps_bits_and_sums_only(monkeypatch, implementation):
    """No float of an activation's size but the input waits for the backward pass."""
    x = images(16, 16)
    net = network([fqt.FQT1] * 3, implementation=implementation)
    graphdef, params, others = nnx.split(net, nnx.Param, ...)

    def kept(params):
        def run(params):
            return nnx.merge(graphdef, params, others, copy=True)(x)

        leaves = jax.tree.leaves(jax.jit(lambda params: jax.vjp(run, params)[1])(params))
        return sorted(a.dtype.name for a in leaves if a.shape[:1] == (16,) and a.size > 16 * 100)

    # The input; bits are too small to be counted. Sums of few products are computed again, but not
    # where the processor has to look them up.
    monkeypatch.setattr(chain, "_looks_up", lambda *_: False)
    assert kept(params) == ["float32"]
    for name, value in (("_FEW_PRODUCTS", 0), ("_looks_up", lambda *_: True)):
        with monkeypatch.context() as patch:
            patch.setattr(chain, name, value)
            assert kept(params) == ["float32", *["int16"] * 3]
    with in_turn(monkeypatch):
        assert kept(params).count("float32") > 6


@pytest.mark.skipif(kernels.native.unavailable() is not None, reason="no native kernels")
@pytest.mark.parametrize("features", [5, 64])
@pytest.mark.parametrize("n", [0, 3])
def test_what_is_looked_up_is_what_the_kernels_say(features, n):
    window = kernels.Window((3, 3), (1, 1), ((1, 1), (1, 1)))
    x = PackedBits.pack(jnp.ones((n, 8, 8, features), bool))
    w = PackedBits.pack(jnp.ones((3, 3, features, 64), bool), batch_ndim=0)
    form = kernels.native.product_form("forward", (n, 8, 8, features), 64, window)
    for implementation in (None, "native"):
        assert chain._looks_up(x, w, window, implementation) == (form == "look_up")
    assert not chain._looks_up(x, w, window, "xla")


@pytest.mark.slow
def test_fusion_needs_less_memory_on_xla_alone(monkeypatch):
    x = jax.random.normal(jax.random.key(0), (16, 32, 32, 8))
    net = network([fqt.FQT1] * 3, implementation="xla")
    graphdef, params, others = nnx.split(net, nnx.Param, ...)

    def temporaries():
        def loss(params, x):
            return jnp.sum(nnx.merge(graphdef, params, others, copy=True)(x) ** 2)

        compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    fused = temporaries()
    with in_turn(monkeypatch):
        assert fused < temporaries()


def test_the_output_of_a_float_convolution_of_images_is_computed_again():
    x = images(16, 16)
    rngs = nnx.Rngs(params=0, rounding=1)
    net = fqt.Sequential(
        conv(8, 12, fqt.FULL_PRECISION, rngs=rngs),
        norm(12, rngs=rngs),
        nnx.PReLU(0.25),
        conv(12, 16, fqt.FQT1, rngs=rngs),
        norm(16, rngs=rngs),
    )
    assert set(runs(net)) == {1}
    graphdef, params, others = nnx.split(net, nnx.Param, ...)

    def run(params):
        return nnx.merge(graphdef, params, others, copy=True)(x)

    # The input of 8 channels is kept, and not the output of 12.
    leaves = jax.tree.leaves(jax.vjp(run, params)[1])
    floats = [a for a in leaves if a.shape[:3] == (16, 16, 16) and a.dtype == jnp.float32]
    assert all(a.shape[3] == 8 for a in floats)
    # XLA must not make the two computations one again.
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(run(params))))
    program = gradient.lower(params).compile().as_text()
    if fqt.implementations()["native"] == "available":
        assert program.count('custom_call_target="fqt_jax_float_conv"') == 2


@pytest.mark.parametrize("place", [0, 1, 2])
def test_float_layers_part_the_sequence(monkeypatch, place):
    recipes = [fqt.QAT] * 3
    recipes[place] = fqt.FULL_PRECISION
    assert_both_forms_agree(network(recipes), images(), 3e-4, monkeypatch)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_nan_of_the_input_and_of_weights_is_seen(train, implementation):
    net = network([fqt.QAT] * 3, implementation=implementation)
    x = images().at[2, 3, 3, 1].set(jnp.nan)
    out, *_ = value_and_grads(net, x, train=train)
    assert np.isnan(out[2]).all()
    assert train or not np.isnan(np.delete(np.asarray(out), 2, 0)).any()
    kernel = net.layers[5].kernel
    kernel[...] = kernel[...].at[0, 0, 0, 3].set(jnp.nan)
    out, *_ = value_and_grads(net, images(), train=train)
    assert np.isnan(out).all()


def test_statistics_of_the_batch_and_running_ones():
    net = network([fqt.QAT] * 3)
    norms = [layer for layer in net.layers if isinstance(layer, nnx.BatchNorm)]
    x = images()
    net.train()
    net(x)
    expected = 0.1 * np.asarray(x, np.float64).mean((0, 1, 2))
    np.testing.assert_allclose(norms[0].mean[...], expected, rtol=1e-5, atol=1e-7)
    variance = 0.9 + 0.1 * np.asarray(x, np.float64).var((0, 1, 2))
    np.testing.assert_allclose(norms[0].var[...], variance, rtol=1e-5)
    before = [jnp.copy(norm.mean[...]) for norm in norms]
    net.eval()
    net(x)
    for each, mean in zip(norms, before, strict=True):
        np.testing.assert_array_equal(each.mean[...], mean)


def test_under_vmap():
    net = network([fqt.QAT] * 3)
    net.eval()
    x = jnp.stack([images(3), images(3)[::-1]])
    graphdef, state = nnx.split(net)

    def run(x):
        return nnx.merge(graphdef, state, copy=True)(x)

    together = jax.jit(jax.vmap(run))(x)
    np.testing.assert_array_equal(together[0], jax.jit(run)(x[0]))
    np.testing.assert_array_equal(together[1], jax.jit(run)(x[1]))


@pytest.mark.parametrize("implementation", [None, pytest.param("xla", marks=slow)])
def test_under_shard_map(implementation):
    net = network([fqt.QAT] * 3, implementation=implementation)
    net.eval()
    x = images(8)
    graphdef, params, others = nnx.split(net, nnx.Param, ...)

    def grad(params, x):
        def loss(params):
            return jnp.sum(nnx.merge(graphdef, params, others, copy=True)(x) ** 2)

        return jax.grad(loss)(params)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    sharded = jax.jit(
        jax.shard_map(grad, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec())
    )
    assert_trees_close(sharded(params, x), jax.jit(grad)(params, x), 1e-5)


def test_a_gradient_lowers_for_machines_that_are_not_here():
    net = network([fqt.FQT1] * 3)

    def grad(params, x):
        model = network([fqt.FQT1] * 3)
        nnx.update(model, params)
        graphdef, params, others = nnx.split(model, nnx.Param, ...)
        return jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p, others, copy=True)(x)))(params)

    exported = jax.export.export(jax.jit(grad), platforms=("cuda", "tpu"))(
        nnx.state(net, nnx.Param), images()
    )
    assert exported.platforms == ("cuda", "tpu")
    assert "@fqt_jax_" not in exported.mlir_module()


def block(recipes):
    """A residual block whose shortcut is the identity."""
    rngs = nnx.Rngs(params=0, rounding=1)
    layers = []
    for recipe in recipes:
        layers += [norm(8, rngs=rngs), conv(8, 8, recipe, rngs=rngs)]
    return fqt.Sequential(*layers, nnx.PReLU(0.25))


RECIPES = [[fqt.QAT] * 2, [fqt.QAT, fqt.FULL_PRECISION]]


class Residual(nnx.Module):
    def __init__(self, recipes):
        self.block = block(recipes)

    def __call__(self, x):
        return self.block(x, residual=x)


@pytest.mark.parametrize("recipes", RECIPES)
def test_residual_is_added_as_in_turn(recipes, monkeypatch):
    assert_both_forms_agree(Residual(recipes), images(), 1e-4, monkeypatch)


def test_residual_may_have_another_dtype():
    net = block([fqt.QAT] * 2)
    net.eval()
    x = images()
    out = net(x, residual=x.astype(jnp.bfloat16))
    np.testing.assert_allclose(out, net(x) + x.astype(jnp.bfloat16), atol=1e-5)


@pytest.mark.parametrize("recipes", RECIPES)
def test_residual_of_another_shape(recipes, monkeypatch):
    net, x = block(recipes), images()
    message = "residual must have the shape of the output, (6, 9, 9, 8); got (6, 9, 9, 1)."
    with pytest.raises(ValueError, match=re.escape(message)):
        net(x, residual=x[..., :1])
    with in_turn(monkeypatch), pytest.raises(ValueError, match=re.escape(message)):
        net(x, residual=x[..., :1])


def test_what_does_not_fuse_is_called_and_explained(monkeypatch):
    rngs = nnx.Rngs(params=0, rounding=1, dropout=2)

    class OwnNorm(nnx.BatchNorm):
        pass

    net = fqt.Sequential(
        conv(8, 8, fqt.QAT, rngs=rngs),
        nnx.gelu,
        conv(8, 8, fqt.QAT, rngs=rngs),
        OwnNorm(8, rngs=rngs),
        conv(8, 8, fqt.QAT, rngs=rngs),
        lambda x: nnx.relu(x),
        nnx.Conv(8, 8, (3, 3), rngs=rngs),
        functools.partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2)),
        nnx.Dropout(0.0, rngs=rngs),
        functools.partial(nnx.avg_pool, window_shape=(2, 2)),
        conv(8, 8, fqt.QAT_ACTIVATIONS, rngs=rngs),
    )
    assert runs(net) == [1, None, 2, None, 3, None, None, None, None, None, None]
    reasons = [each.why for each in net.explain() if each.run is None]
    assert reasons == [
        "gelu is not linear on either side of one kink",
        "OwnNorm is a subclass of BatchNorm with behaviour of its own",
        "a lambda cannot be looked into; functools.partial can",
        "it is not quantized",
        "only square windows that neither overlap nor are padded fuse",
        "Dropout is not one of the layers that fuse",
        "an average is not the maximum of a window",
        "its weights are float",
    ]
    assert_both_forms_agree(net, images(), 1e-3, monkeypatch)


def test_a_subclass_of_a_layer_is_called():
    class Doubled(fqt.QuantLinear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    layer = Doubled(8, 4, recipe=fqt.QAT, rngs=nnx.Rngs(0))
    net = fqt.Sequential(layer, nnx.relu)
    assert net.explain()[0].why == "Doubled has behaviour of its own"
    x = jax.random.normal(jax.random.key(0), (3, 8))
    np.testing.assert_array_equal(net(x), nnx.relu(layer(x)))


def test_nested_sequences_fuse_as_one(monkeypatch):
    rngs = nnx.Rngs(params=0, rounding=1)
    inner = [fqt.Sequential(conv(8, 8, fqt.QAT, rngs=rngs), nnx.relu) for _ in range(2)]
    net = fqt.Sequential(*inner)
    assert [each.place for each in net.explain()] == [
        "layers/0/layers/0",
        "layers/0/layers/1",
        "layers/1/layers/0",
        "layers/1/layers/1",
    ]
    assert runs(net) == [1] * 4
    assert_both_forms_agree(net, images(), 1e-4, monkeypatch)


def test_layers_of_several_arguments_and_no_layers():
    net = fqt.Sequential(lambda x: (x, 2 * x), lambda a, b: {"a": a, "b": b}, lambda a, b: a + b)
    np.testing.assert_array_equal(net(jnp.ones(3)), 3 * np.ones(3))
    np.testing.assert_array_equal(fqt.Sequential()(jnp.ones(3)), np.ones(3))
    np.testing.assert_array_equal(
        fqt.Sequential()(jnp.ones(3), residual=jnp.ones(3)), 2 * np.ones(3)
    )


def test_an_empty_batch():
    net = network([fqt.FQT1] * 3)
    net.eval()
    assert net(images()[:0]).shape == (0, 2, 2, 8)


def layer_norm(features, *, rngs, **options):
    """One whose scale and bias are no ones and zeros."""
    layer = nnx.LayerNorm(features, rngs=rngs, **options)
    for parameter in (layer.scale, layer.bias):
        if parameter is not None:
            parameter[...] = jax.random.normal(rngs.params(), (features,))
    return layer


def normed_network(recipe, *, act_first=True, is_dense=True, implementation=None):
    """Two products with layer norms before both."""
    rngs = nnx.Rngs(params=0, rounding=1)
    options = {"recipe": recipe, "implementation": implementation, "rngs": rngs}

    def product(inputs, outputs):
        if is_dense:
            return fqt.QuantLinear(inputs, outputs, **options)
        return fqt.QuantConv(inputs, outputs, 3, use_bias=True, **options)

    middle = [nnx.PReLU(0.25), layer_norm(40, rngs=rngs)]
    return fqt.Sequential(
        layer_norm(8, rngs=rngs),
        product(8, 40),
        *(middle if act_first else reversed(middle)),
        product(40, 12),
    )


@pytest.mark.parametrize(
    ("recipe", "act_first", "is_dense", "implementation"),
    [
        (fqt.QAT, True, False, None),
        (fqt.FQT1, True, True, None),
        (fqt.FQT1, False, True, "xla"),
        pytest.param(dataclasses.replace(LEARNED, threshold="learned"), True, True, None),
        pytest.param(fqt.FQT1_PLUS, True, False, None, marks=slow),
        pytest.param(UNSCALED, False, False, None, marks=slow),
    ],
)
def test_layer_norms_in_both_forms(monkeypatch, recipe, act_first, is_dense, implementation):
    net = normed_network(
        recipe, act_first=act_first, is_dense=is_dense, implementation=implementation
    )
    assert set(runs(net)) == {1}
    assert_both_forms_agree(net, images(), 1e-3, monkeypatch, residual=jnp.ones((6, 9, 9, 12)))


def test_a_layer_norm_fuses_where_a_product_follows():
    rngs = nnx.Rngs(0)
    product = functools.partial(fqt.QuantLinear, recipe=fqt.QAT, rngs=rngs)
    net = fqt.Sequential(product(8, 8), nnx.relu, layer_norm(8, rngs=rngs), nnx.Dropout(0.1))
    rows = net.explain()
    assert [row.run for row in rows] == [1, 1, None, None]
    assert rows[2].why == "no quantized layer follows it"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"reduction_axes": (-2, -1)}, "it does not normalize the last axis alone"),
        ({"dtype": jnp.bfloat16}, "it computes in bfloat16"),
        ({"axis_name": "i"}, "its statistics are of several devices"),
    ],
)
def test_layer_norms_of_another_kind_are_called(options, why):
    rngs = nnx.Rngs(0)
    net = fqt.Sequential(
        nnx.LayerNorm(8, rngs=rngs, **options), fqt.QuantLinear(8, 8, recipe=fqt.QAT, rngs=rngs)
    )
    assert net.explain()[0].why == why


def test_a_layer_norm_keeps_no_float_of_the_hidden_layer(monkeypatch):
    net = normed_network(fqt.FQT1)
    graphdef, params, others = nnx.split(net, nnx.Param, ...)

    def run(params, x):
        return nnx.merge(graphdef, params, others, copy=True)(x)

    def hidden():
        _, vjp = jax.vjp(run, params, jnp.ones((50, 8)))
        kept = [leaf for leaf in jax.tree.leaves(vjp) if leaf.shape[:1] == (50,)]
        return [leaf.dtype.name for leaf in kept if leaf.shape[-1] == 40]

    monkeypatch.setattr(chain, "_looks_up", lambda *_: False)
    assert not hidden()
    monkeypatch.setattr(chain, "_FEW_PRODUCTS", 0)
    assert set(hidden()) == {"int16"}


@pytest.mark.parametrize("recipe", [fqt.FQT1, fqt.QAT], ids=["fqt1", "qat"])
@pytest.mark.parametrize("make", [network, normed_network], ids=["batch_norm", "layer_norm"])
def test_sums_that_are_computed_again_change_no_bit(monkeypatch, recipe, make):
    net = make([recipe] * 3) if make is network else make(recipe)
    x = images(16, 16) if make is network else jax.random.normal(jax.random.key(1), (50, 8))
    monkeypatch.setattr(chain, "_looks_up", lambda *_: False)
    again = value_and_grads(net, x)
    monkeypatch.setattr(chain, "_FEW_PRODUCTS", 0)
    for got, expected in zip(
        jax.tree.leaves(again), jax.tree.leaves(value_and_grads(net, x)), strict=True
    ):
        np.testing.assert_array_equal(got, expected)
