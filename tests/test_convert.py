import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import fqt_jax as fqt
from fqt_jax.models import ResNet, VGGSmall

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


def resnet(seed: int = 0) -> ResNet:
    return ResNet((1, 1), num_classes=3, width=0.125, rngs=nnx.Rngs(seed))


def recipes(table: fqt.ConversionTable) -> dict[str, fqt.Recipe]:
    return {layer.path: layer.recipe for layer in table}


def test_defaults_leave_the_first_layer_shortcuts_and_classifier_float():
    model, table = fqt.quantize(resnet(), fqt.FQT1)
    assert recipes(table) == {
        "stem/layers/0": fqt.FULL_PRECISION,
        "blocks/0/body/layers/1": fqt.FQT1,
        "blocks/0/body/layers/4": fqt.FQT1,
        "blocks/1/body/layers/1": fqt.FQT1,
        "blocks/1/body/layers/4": fqt.FQT1,
        "blocks/1/shortcut/layers/1": fqt.FULL_PRECISION,
        "head": fqt.FULL_PRECISION,
    }
    assert isinstance(model.blocks[0].body.layers[1], fqt.QuantConv)
    assert model.blocks[0].body.layers[1].recipe == fqt.FQT1
    assert "blocks/1/shortcut/layers/1" in str(table)


def test_the_first_layer_is_the_first_defined_not_the_first_by_name():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.zebra = nnx.Conv(1, 2, (3, 3), rngs=rngs)
            self.ant = nnx.Conv(2, 2, (3, 3), rngs=rngs)

    _, table = fqt.quantize(Model(nnx.Rngs(0)), fqt.QAT)
    assert recipes(table) == {"zebra": fqt.FULL_PRECISION, "ant": fqt.QAT}


def test_the_first_rule_that_matches_wins_and_overrides_defaults():
    rules = [("blocks/0/.*", fqt.QAT), (r"blocks/\d/body/layers/1", fqt.PSQ1), ("head", fqt.FQT1)]
    model, table = fqt.quantize(resnet(), fqt.FQT1, rules)
    got = recipes(table)
    assert got["blocks/0/body/layers/1"] == got["blocks/0/body/layers/4"] == fqt.QAT
    assert got["blocks/1/body/layers/1"] == fqt.PSQ1
    assert got["blocks/1/body/layers/4"] == got["head"] == fqt.FQT1
    assert isinstance(model.head, fqt.QuantLinear)


def test_the_original_stays_as_it_was():
    model = resnet()
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    model.eval()
    before = model(x)
    quantized, _ = fqt.quantize(model, fqt.QAT)
    quantized.blocks[0].body.layers[1].kernel[...] = jnp.zeros_like(
        quantized.blocks[0].body.layers[1].kernel[...]
    )
    assert type(model.blocks[0].body.layers[1]) is nnx.Conv
    np.testing.assert_array_equal(model(x), before)


def test_full_precision_computes_what_the_float_model_does():
    model = VGGSmall(num_classes=3, width=0.25, rngs=nnx.Rngs(0))
    same, _ = fqt.quantize(model, fqt.FULL_PRECISION)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    for m in (model, same):
        m.eval()
    np.testing.assert_allclose(same(x), model(x), rtol=1e-4, atol=1e-5)


def test_float_parameters_load_into_the_quantized_model_and_back():
    source, target = resnet(1), resnet(2)
    quantized, _ = fqt.quantize(target, fqt.FQT1)
    parameters = nnx.state(source, (nnx.Param, nnx.BatchStat))
    nnx.update(quantized, parameters)
    nnx.update(target, nnx.state(quantized, (nnx.Param, nnx.BatchStat)))
    for a, b in zip(
        jax.tree.leaves(nnx.state(source)), jax.tree.leaves(nnx.state(target)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_converted_model_trains_a_step_in_every_layer():
    model, _ = fqt.quantize(resnet(), fqt.FQT1)
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
    graphdef, params, others = nnx.split(model, nnx.Param, ...)

    def loss(params):
        return (nnx.merge(graphdef, params, others, copy=True)(x) ** 2).sum()

    grads = jax.jit(jax.grad(loss))(params)
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


class Special(nnx.Conv):
    pass


def own_product(*operands, **options):
    return jax.lax.conv_general_dilated(*operands, **options)


def one_conv(**options):
    kind = options.pop("kind", nnx.Conv)
    size = options.pop("size", (3, 3))
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Conv(4, 4, (3, 3), rngs=rngs), kind(4, 4, size, rngs=rngs, **options))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"preferred_element_type": jnp.float32}, "preferred_element_type"),
        ({"mask": jnp.ones((3, 3, 4, 4))}, "masked"),
        ({"kind": Special}, "subclass"),
        ({"conv_general_dilated": own_product}, "a conv_general_dilated of its own"),
    ],
)
def test_layers_that_cannot_be_quantized_are_refused_unless_kept_float(options, reason):
    model = one_conv(**options)
    with pytest.raises(ValueError, match=rf"layers/1 cannot be quantized: .*{reason}"):
        fqt.quantize(model, fqt.QAT)
    rules = [("layers/0", fqt.QAT), ("layers/1", fqt.FULL_PRECISION)]
    kept, _ = fqt.quantize(model, fqt.QAT, rules)
    assert type(kept.layers[1]) is type(model.layers[1])


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ([("conv9", fqt.QAT)], ValueError, "'conv9' matches no layer. Layers: stem/layers/0, "),
        ([("conv1", fqt.QAT)], ValueError, "matches no layer"),  # whole paths, not parts
        ([("(", fqt.QAT)], ValueError, "malformed"),
        ([("stem/.*", 1)], TypeError, "the recipe of the rule 'stem/.*' must be a Recipe, such"),
        ([("stem/.*", "qta")], ValueError, "unknown recipe 'qta'"),
        ([("stem/layers/1", "qat")], ValueError, "matches no layer, but BatchNorm. Layers: "),
        ([(".*", fqt.FULL_PRECISION)], ValueError, "leave every layer in full precision"),
    ],
)
def test_bad_rules_are_named(rules, error, message):
    with pytest.raises(error, match=message):
        fqt.quantize(resnet(), fqt.FQT1, rules)


def test_a_model_without_layers_is_an_error():
    with pytest.raises(ValueError, match=r"Sequential has no layer that can be quantized \(Conv, "):
        fqt.quantize(nnx.Sequential(nnx.relu), fqt.FQT1)


def test_a_layer_that_computes_in_a_way_of_its_own_is_refused():
    rngs = nnx.Rngs(0)
    layers = [nnx.Linear(4, 4, rngs=rngs) for _ in range(2)]
    layers[1].dot_general = own_product
    rules = [("layers/1", fqt.QAT)]
    with pytest.raises(ValueError, match="layers/1 cannot be quantized: it has a dot_general of"):
        fqt.quantize(nnx.Sequential(*layers), fqt.QAT, rules)


def test_a_model_that_is_one_layer_is_converted_by_a_rule():
    layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"leave every layer in full precision.* Layers: ''"):
        fqt.quantize(layer, fqt.QAT)
    model, table = fqt.quantize(layer, fqt.QAT, [("", fqt.QAT)])
    assert type(model) is fqt.QuantLinear
    assert recipes(table) == {"": fqt.QAT}


def test_layers_in_any_container_are_found():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Linear(4, 4, rngs=rngs)
            self._private = nnx.Linear(4, 4, rngs=rngs)
            self.named = nnx.Dict(a=nnx.Linear(4, 4, rngs=rngs))
            self.pair = nnx.data((nnx.Linear(4, 4, rngs=rngs),))
            self.head = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return self.head(self.pair[0](self.named.a(self._private(self.stem(x)))))

    model, table = fqt.quantize(Model(nnx.Rngs(0)), fqt.QAT)
    binary = [path for path, recipe in recipes(table).items() if recipe.binary]
    assert binary == ["_private", "named/a", "pair/0"]
    found = fqt.diagnostics.layer_gradients(
        model, jnp.ones((3, 4)), jnp.arange(3), key=jax.random.key(0)
    )
    assert list(found) == binary


class Attention(nnx.Module):
    """Blocks of a transformer, which are run by a scan over their stacked parameters."""

    def __init__(self, rngs, layers=3):
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return Block(rngs)

        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.blocks = stacked(rngs)
        self.head = nnx.Linear(8, 11, rngs=rngs)

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return block(x)

        return self.head(run(self.embed(tokens), self.blocks))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


TOKENS = jax.random.randint(jax.random.key(0), (4, 6), 0, 11)


def test_projections_of_an_attention_and_layers_stacked_for_a_scan():
    net = Attention(nnx.Rngs(0))
    same, table = fqt.quantize(net, fqt.FULL_PRECISION)
    np.testing.assert_allclose(same(TOKENS), net(TOKENS), rtol=1e-4, atol=1e-4)
    recipe = dataclasses.replace(fqt.FQT1, scale="learned")
    model, table = fqt.quantize(net, recipe, [("blocks/.*", recipe)])
    assert {layer.path for layer in table if layer.recipe.binary} == {
        *(f"blocks/attention/{name}" for name in ("query", "key", "value", "out")),
        "blocks/down",
        "blocks/up",
    }
    assert table.others == {"embed": "Embed", "blocks/norm": "LayerNorm"}
    assert str(table).endswith("\nas before: 1 Embed, 1 LayerNorm")
    assert model.blocks.up.scale.shape == (3, 16)
    assert model.blocks.up.rounding.key.shape == (3,)
    assert len({str(key) for key in jax.random.key_data(model.blocks.up.rounding.key[...])}) == 3
    scales = jnp.mean(jnp.abs(net.blocks.up.kernel[...]), axis=1)
    np.testing.assert_allclose(model.blocks.up.scale[...], scales, rtol=1e-6)

    @nnx.jit
    @nnx.grad
    def gradients(model):
        return jnp.mean(jnp.square(model(TOKENS)))

    grads = gradients(model)
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(leaf).all()
    up = grads["blocks"]["up"]["kernel"][...]
    assert (jnp.abs(up).max(axis=(1, 2)) > 0).all()  # of every block
    assert not np.array_equal(up[0], up[1])
    np.testing.assert_array_equal(model.blocks.up.rounding.count[...], [1, 1, 1])


def test_the_ends_are_those_in_use_where_an_example_is_given():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.gate = nnx.Linear(4, 4, rngs=rngs)
            self.encoder = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.decoder = nnx.ConvTranspose(4, 3, (3, 3), rngs=rngs)
            self.down = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x, gain):
            assert self.gate.kernel.shape == (4, 4)  # models look into their layers
            return self.decoder(self.down(self.gate(self.encoder(x) * gain)))

    model = Model(nnx.Rngs(0))
    _, table = fqt.quantize(model, "qat")
    assert [row.reason for row in table] == ["first layer", "default", "default", "classifier"]
    example = (jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jnp.ones(()))
    _, table = fqt.quantize(model, "qat", example=example)
    assert {row.path: row.reason for row in table} == {
        "gate": "default",
        "encoder": "first layer",
        "decoder": "last layer",
        "down": "default",
    }


def test_tokens_and_a_tied_embedding_have_no_first_and_no_last_layer():
    class Tied(Attention):
        def __call__(self, tokens):
            return self.embed.attend(self.blocks.up(self.embed(tokens))[..., :8])

    net = Tied(nnx.Rngs(0), layers=1)
    net.blocks = Block(nnx.Rngs(0))
    del net.head
    _, table = fqt.quantize(net, "qat", example=TOKENS)
    assert {row.reason for row in table} == {"default"}


def test_what_is_computed_in_float_is_told():
    _, table = fqt.quantize(one_conv(kernel_dilation=2), fqt.QAT)
    assert table[1].fuses == "no: a dilated convolution is computed in float"


@pytest.mark.parametrize(
    "options",
    [
        {"feature_group_count": 2},
        {"kernel_dilation": 2},
        {"padding": "CIRCULAR"},
        {"dtype": jnp.bfloat16},
        {"param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16},
    ],
)
def test_every_kind_of_convolution_trains_inside_a_sequence(options):
    net = one_conv(**options)
    model, _ = fqt.quantize(net, fqt.FQT1)
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 4))
    assert model(x).dtype == net(x).dtype
    grads = nnx.grad(lambda model: jnp.sum(jnp.square(model(x).astype(jnp.float32))))(model)
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(leaf.astype(jnp.float32)).all()
        assert np.abs(leaf).max() > 0


def test_what_cannot_be_quantized_may_stay_float():
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(
        nnx.Linear(4, 4, rngs=rngs),
        nnx.Einsum("bi,bij->bj", (3, 4, 4), rngs=rngs),
        nnx.Linear(4, 4, rngs=rngs),
        nnx.Linear(4, 4, rngs=rngs),
    )
    with pytest.raises(ValueError, match=r"layers/1 cannot be quantized: .*kernel has batch axes"):
        fqt.quantize(net, fqt.QAT)
    model, table = fqt.quantize(net, fqt.QAT, unsupported="float")
    assert [row.recipe.binary for row in table] == [False, False, True, False]
    assert table[1].reason == "'bi,bij->bj' is no matrix product: the kernel has batch axes"
    assert type(model.layers[1]) is nnx.Einsum
    with pytest.raises(ValueError, match="layers/1 cannot be quantized"):
        fqt.quantize(net, fqt.QAT, [("layers/1", fqt.QAT)], unsupported="float")


def quantized_once():
    return fqt.quantize(resnet(), fqt.QAT)[0]


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(x)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (LinenNet, {}, TypeError, "LinenNet is a Linen module; quantize takes NNX modules"),
        (dict, {}, TypeError, "model must be a Flax NNX module; got dict"),
        (lambda: nnx.eval_shape(resnet), {}, TypeError, "ResNet is abstract: it has shapes"),
        (quantized_once, {}, ValueError, "ResNet is quantized already: blocks/0/body/layers/1, "),
        (resnet, {"recipe": None}, TypeError, "recipe must be a Recipe, such as .* got None"),
        (resnet, {"recipe": "fqt2"}, ValueError, "unknown recipe 'fqt2'; known recipes: full_pre"),
        (resnet, {"unsupported": "skip"}, ValueError, "unsupported must be 'error' or 'float'"),
    ],
)
def test_models_and_options_are_named_for_what_they_are(model, options, error, message):
    with pytest.raises(error, match=message):
        fqt.quantize(model(), **{"recipe": fqt.QAT, **options})
