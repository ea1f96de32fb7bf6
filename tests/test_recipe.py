import dataclasses

import pytest

import fqt_jax as fqt
from fqt_jax import FQT1, FQT1_PLUS, FULL_PRECISION, PSQ1, QAT, GradientQuantizer, Recipe
from fqt_jax.samplers import Systematic


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=f"bits must be an integer from 1 to 8; got {bits}"):
        GradientQuantizer(bits=bits)


@pytest.mark.parametrize("bits", [True, 2.5, "4", None])
def test_bits_of_the_wrong_type(bits):
    with pytest.raises(TypeError, match="bits must be an integer"):
        GradientQuantizer(bits=bits)


@pytest.mark.parametrize("keep", [0, 0.0, 1.5, -1, float("nan"), float("inf")])
def test_keep_out_of_range(keep):
    with pytest.raises(ValueError, match=r"keep must be a number in \(0, 1\]"):
        GradientQuantizer(keep=keep)


@pytest.mark.parametrize("keep", [True, "half"])
def test_keep_of_the_wrong_type(keep):
    with pytest.raises(TypeError, match="keep must be a number"):
        GradientQuantizer(keep=keep)


def unpruned(**options) -> GradientQuantizer:
    return GradientQuantizer(keep=1.0, **options)


@pytest.mark.parametrize(
    ("make", "field", "allowed"),
    [
        (GradientQuantizer, "importance", ("range", "norm")),
        (unpruned, "groups", ("sample_channel", "sample", "tensor")),
        (GradientQuantizer, "prune", ("channels", "shared")),
        (GradientQuantizer, "grid", ("range", "zero")),
        (Recipe, "scale", ("mean_abs", "none", "learned", "learned_from_one")),
        (Recipe, "weights", ("binary", "float")),
    ],
)
def test_choices(make, field, allowed):
    for value in allowed:
        assert getattr(make(**{field: value}), field) == value
    with pytest.raises(ValueError, match=f"{field} must be one of") as error:
        make(**{field: "median"})
    for value in (*allowed, "median"):
        assert repr(value) in str(error.value)


@pytest.mark.parametrize("field", ["binary", "clip"])
@pytest.mark.parametrize("value", [1, None, "yes"])
def test_flags_must_be_bool(field, value):
    with pytest.raises(TypeError, match=f"{field} must be True or False"):
        Recipe(**{field: value})


def test_gradient_must_be_a_quantizer():
    with pytest.raises(TypeError, match="gradient must be a GradientQuantizer or None"):
        Recipe(gradient=4)


@pytest.mark.parametrize(
    "change",
    [
        {"gradient": GradientQuantizer()},
        {"scale": "none"},
        {"scale": "learned"},
        {"clip": False},
        {"weights": "float"},
    ],
)
def test_full_precision_takes_nothing_else(change):
    (field,) = change
    with pytest.raises(ValueError, match=f"{field} has no meaning in a full-precision layer"):
        Recipe(binary=False, **change)
    with pytest.raises(ValueError, match="no meaning"):
        dataclasses.replace(FULL_PRECISION, **change)


@pytest.mark.parametrize(
    "change", [{"gradient": GradientQuantizer()}, {"scale": "none"}, {"scale": "learned"}]
)
def test_float_weights_have_no_scale_and_float_gradients(change):
    (field,) = change
    with pytest.raises(ValueError, match=f"{field} has no meaning where weights are float: leave"):
        dataclasses.replace(fqt.QAT_ACTIVATIONS, **change)


def test_sample_groups_cannot_prune_channels():
    with pytest.raises(ValueError, match="set prune='shared'"):
        GradientQuantizer(bits=2, groups="sample")
    assert GradientQuantizer(bits=2, groups="sample", prune="shared").keep_fraction == 0.5
    assert GradientQuantizer(bits=2, keep=1.0, groups="sample").prune == "channels"
    with pytest.raises(ValueError, match="set prune='shared'"):
        dataclasses.replace(PSQ1, gradient=dataclasses.replace(PSQ1.gradient, keep=0.5))


@pytest.mark.parametrize(
    ("groups", "prune", "of_input", "of_weight"),
    [
        ("sample_channel", "channels", "samples samples", "channels channels"),
        ("sample_channel", "shared", "samples samples", "samples channels"),
        ("sample", "shared", "samples samples", "samples samples"),
        ("tensor", "channels", "samples samples", "channels channels"),
        ("tensor", "shared", "samples samples", "samples channels"),
    ],
)
def test_grouping(groups, prune, of_input, of_weight):
    """Which groups are pruned, and which have a scale of their own."""
    quantizer = GradientQuantizer(bits=2, groups=groups, prune=prune)
    for product, expected in (("input", of_input), ("weight", of_weight)):
        grouping = quantizer.grouping(product)
        assert f"{grouping.pruned} {grouping.scaled}" == expected
        assert grouping.one_scale == (groups == "tensor")
        part = quantizer.kept_part(product, samples=8, channels=3)
        assert part == (4 / 8 if grouping.pruned == "samples" else 2 / 3)


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        (FULL_PRECISION, "float"),
        (QAT, "binary, float gradients"),
        (fqt.QAT_ACTIVATIONS, "binary activations, float weights, float gradients"),
        (PSQ1, "binary, 1-bit gradients per sample"),
        (
            Recipe(
                gradient=GradientQuantizer(2, 0.125, "topk", "norm", "tensor", "shared"),
                scale="none",
                clip=False,
            ),
            "binary, scale none, no clip, "
            "2-bit gradients per tensor of 12% (topk, shared, by norm)",
        ),
    ],
)
def test_a_recipe_in_words(recipe, text):
    assert str(recipe) == text


def test_replace_checks_again():
    shared = dataclasses.replace(FQT1.gradient, prune="shared")
    assert (shared.prune, shared.bits, shared.sampler) == ("shared", 4, FQT1.gradient.sampler)
    assert FQT1.gradient.prune == "channels"
    with pytest.raises(ValueError, match="prune"):
        dataclasses.replace(FQT1.gradient, prune="everything")
    with pytest.raises(ValueError, match="sampler"):
        dataclasses.replace(FQT1.gradient, sampler="everything")
    with pytest.raises(ValueError, match="bits"):
        dataclasses.replace(FQT1.gradient, bits=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        FQT1.clip = False


def test_recipes_are_equal_and_hashable_by_value():
    assert Recipe(gradient=GradientQuantizer(bits=4)) == FQT1
    assert hash(Recipe(gradient=GradientQuantizer(bits=4))) == hash(FQT1)
    assert len({FQT1, PSQ1, QAT, FULL_PRECISION}) == 4


@pytest.mark.parametrize("bits", range(1, 9))
def test_one_bit_an_entry_by_default(bits):
    assert GradientQuantizer(bits=bits).bits_per_entry == 1.0
    assert GradientQuantizer(bits=bits, keep=1).bits_per_entry == bits


@pytest.mark.parametrize(
    ("keep", "n", "kept"),
    [
        (None, 0, 0),
        (None, 1, 1),
        (None, 3, 1),  # fewer groups than bits still keep one
        (None, 5, 1),
        (None, 6, 2),  # a half is rounded up, at odd and even multiples alike
        (None, 10, 3),
        (None, 128, 32),
        (1.0, 7, 7),
        (1, 7, 7),
        (0.5, 5, 3),
        (0.001, 100, 1),
        (0.999, 10, 10),
    ],
)
def test_kept(keep, n, kept):
    assert GradientQuantizer(bits=4, keep=keep).kept(n) == kept


def test_named_recipes():
    assert FULL_PRECISION.binary is False
    assert (QAT.binary, QAT.gradient) == (True, None)
    assert [recipe.binary_weights for recipe in (QAT, fqt.QAT_ACTIVATIONS, FULL_PRECISION)] == [
        *(True, False, False)
    ]
    assert (PSQ1.gradient.bits, PSQ1.gradient.keep_fraction) == (1, 1.0)
    assert PSQ1.gradient.groups == "sample"
    assert (FQT1.gradient.bits, FQT1.gradient.keep_fraction) == (4, 0.25)
    assert (FQT1.gradient.sampler, FQT1.gradient.groups) == (Systematic(), "sample_channel")
    assert dataclasses.replace(FQT1.gradient, prune="shared") == FQT1_PLUS.gradient


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("fqt1", FQT1),
        ("FQT1", FQT1),
        ("psq1", PSQ1),
        ("Qat", QAT),
        ("qat_activations", fqt.QAT_ACTIVATIONS),
        ("full_precision", FULL_PRECISION),
        ("Full-Precision", FULL_PRECISION),
    ],
)
def test_recipe_by_name(name, recipe):
    assert fqt.recipe_by_name(name) is recipe


@pytest.mark.parametrize("name", ["", "fp32", "fqt 1", "fqt2"])
def test_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="unknown recipe") as error:
        fqt.recipe_by_name(name)
    for known in (repr(name), "full_precision", "qat", "psq1", "fqt1"):
        assert known in str(error.value)
