import dataclasses
import pathlib

import pytest

from experiments.cli import UserError
from experiments.finetune import FinetuneConfig
from experiments.sweeps.specs import _OPTIONS, parse


def test_values_have_the_types_of_the_options():
    spec = parse(
        "dataset", "digits: epochs=3, learning-rate=1e-2, flip=false, data_dir=a/b, limit=9"
    )
    assert spec.options == {
        "dataset": "digits",
        "epochs": 3,
        "learning_rate": 0.01,
        "flip": False,
        "data_dir": pathlib.Path("a/b"),
        "limit": 9,
    }
    assert parse("recipe", "fqt1:clip").options["clip"] is True


def test_a_label_stands_before_the_name_only():
    assert parse("recipe", "fqt1:bits=2").label == "fqt1:bits=2"
    spec = parse("recipe", "two bits=fqt1:bits=2")
    assert (spec.label, spec.options) == ("two bits", {"recipe": "fqt1", "bits": 2})


def test_every_option_of_a_run_is_on_one_axis_at_most():
    fields = {field.name for field in dataclasses.fields(FinetuneConfig)}
    for options in _OPTIONS.values():
        assert set(options) <= fields
    for axis in ("model", "recipe"):
        assert not set(_OPTIONS[axis]) & set(_OPTIONS["dataset"])
    assert "seed" not in _OPTIONS["dataset"]


@pytest.mark.parametrize(
    ("axis", "text", "message"),
    [
        ("recipe", "fqt1:bit=2", "unknown option 'bit'; known: bits, keep"),
        ("recipe", "fqt1:epochs=2", "unknown option 'epochs'"),
        ("recipe", "fqt1:bits=2,bits=3", "gives bits twice"),
        ("recipe", "fqt1:bits=2.5", "bits must be int; got '2.5'"),
        ("recipe", "fqt1:bits", "bits must be int; got 'true'"),
        ("recipe", "fqt1:clip=yes", "clip must be one of true, false; got 'yes'"),
        ("recipe", "fqt1:prune=rows", "prune must be one of channels, shared; got 'rows'"),
        ("recipe", "", "has no name"),
        ("recipe", "=fqt1", "has no name"),
        ("recipe", "fqt1:", None),
        ("model", "resnet18:width=wide", "width must be float; got 'wide'"),
        ("dataset", "digits:seed=3", "unknown option 'seed'"),
    ],
)
def test_bad_points_are_named(axis, text, message):
    if message is None:
        assert parse(axis, text).options == {axis: "fqt1"}
        return
    with pytest.raises(UserError, match=message) as caught:
        parse(axis, text)
    assert "\n" not in str(caught.value)
