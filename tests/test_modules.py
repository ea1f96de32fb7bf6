import collections

import pytest
from flax import nnx

from fqt_jax.modules import find_modules

Pair = collections.namedtuple("Pair", "left right")


class Leaf(nnx.Module):
    def __init__(self, name):
        self.name = name


class Holder(nnx.Module):
    """One of every container, in an order that is not the alphabet's, and a cycle."""

    def __init__(self):
        self.zebra = Leaf("zebra")
        self._hidden = Leaf("hidden")
        self.list = nnx.List([Leaf("first"), Leaf("second")])
        self.dict = nnx.Dict({"b": Leaf("b"), "a": Leaf("a")})
        self.plain = nnx.data([{"key": Leaf("plain")}])
        self.tuple = nnx.data((Leaf("left"), Pair(Leaf("inner"), None)))
        self.twin = nnx.data(self.tuple)
        self.again = self.zebra
        self.me = self


PATHS = {
    "zebra": "zebra",
    "_hidden": "hidden",
    "list/0": "first",
    "list/1": "second",
    "dict/b": "b",
    "dict/a": "a",
    "plain/0/key": "plain",
    "tuple/0": "left",
    "tuple/1/0": "inner",
}


def test_every_module_is_found_once_in_the_order_of_definition():
    found = find_modules(Holder(), Leaf)
    assert [(place.path, place.module.name) for place in found] == list(PATHS.items())
    others = {place.path: place.others for place in found if place.others}
    assert others == {
        "zebra": (("again",),),
        "tuple/0": (("twin", 0),),
        "tuple/1/0": (("twin", 1, 0),),
    }


def test_what_is_outside_comes_before_what_is_inside():
    net = nnx.Sequential(nnx.Sequential(Leaf("a")), Leaf("b"))
    assert [place.path for place in find_modules(net, nnx.Sequential)] == ["", "layers/0"]
    assert [place.module.name for place in find_modules(net, (Leaf,))] == ["a", "b"]


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("clone", [False, True])
def test_another_module_takes_the_place(clone):
    original = Holder()
    model = nnx.clone(original) if clone else original
    for place in find_modules(original, Leaf):
        assert place.of(model).name == place.module.name
        assert place.put(model, Leaf(place.module.name.upper())) is model
    names = {place.path: place.module.name for place in find_modules(model, Leaf)}
    names.pop("again", None)  # a clone has forgotten the order
    names["zebra"] = model.zebra.name
    assert names == {path: name.upper() for path, name in PATHS.items()}
    assert model.zebra is model.again
    assert type(model.tuple[1]) is Pair
    assert model.twin[1].left is model.tuple[1].left
    if clone:
        assert [place.module.name for place in find_modules(original, Leaf)] == [*PATHS.values()]


def test_the_model_itself_is_replaced():
    model, new = Leaf("old"), Leaf("new")
    (place,) = find_modules(model, Leaf)
    assert place.path == ""
    assert place.put(model, new) is new


def test_inner_modules_first_and_then_those_around_them():
    net = nnx.Sequential(nnx.Sequential(Leaf("a")), Leaf("b"))
    for place in reversed(find_modules(net, nnx.Sequential)):
        net = place.put(net, nnx.List(list(place.module.layers)))
    assert not find_modules(net, nnx.Sequential)
    assert [place.path for place in find_modules(net, Leaf)] == ["0/0", "1"]
