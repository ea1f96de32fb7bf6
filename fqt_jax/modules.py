"""Finding modules inside a model, and putting others in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from flax import nnx

Keys = tuple[str | int, ...]
"""Names of attributes and positions in lists, from the model to a module in it."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a module stands in a model.

    Attributes:
      module: the module.
      keys: how it is reached, the first way in the order in which the model defines its parts;
        empty where the model is the module itself.
      others: the other ways, of a module that the model holds in several places.
    """

    module: Any
    keys: Keys
    others: tuple[Keys, ...] = ()

    @property
    def path(self) -> str:
        """The keys joined by ``/``."""
        return "/".join(map(str, self.keys))

    def of(self, model: Any) -> Any:
        """What stands there in another model of the same structure, such as a clone."""
        for key in self.keys:
            model = _child(model, key)
        return model

    def put(self, model: Any, new: Any) -> Any:
        """Puts another module there, at every place that the old one has.

        Returns:
          The model, changed; the new module where it replaces the model itself.
        """
        for keys in (self.keys, *self.others):
            model = _put(model, keys, new)
        return model


def find_modules(model: Any, kinds: type | tuple[type, ...]) -> list[Place]:
    """The modules of these types, in the order in which the model defines its parts, each once.

    A module comes before those inside it. Lists, tuples and dictionaries are searched as well,
    private attributes too.

    Example:
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> net = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.relu, nnx.Linear(3, 1, rngs=rngs))
      >>> [place.path for place in find_modules(net, nnx.Linear)]
      ['layers/0', 'layers/2']
    """
    ways: dict[int, list[Keys]] = {}
    modules = []
    for keys, module in _walk(model, (), set()):
        if id(module) not in ways:
            modules.append(module)
        ways.setdefault(id(module), []).append(keys)
    return [
        Place(module, ways[id(module)][0], tuple(ways[id(module)][1:]))
        for module in modules
        if isinstance(module, kinds)
    ]


def _walk(value: Any, keys: Keys, seen: set[int]) -> Iterator[tuple[Keys, Any]]:
    """Every way to every module; what is inside one is walked through the first way alone."""
    if isinstance(value, nnx.Module):
        yield keys, value
    if id(value) in seen:
        return
    if not isinstance(value, tuple):  # a tuple is put together anew at each place
        seen.add(id(value))
    for key, child in _children(value):
        yield from _walk(child, (*keys, key), seen)


def _children(value: Any) -> list[tuple[str | int, Any]]:
    if isinstance(value, nnx.List | list | tuple):
        return list(enumerate(value))
    if isinstance(value, nnx.Module):
        return list(vars(value).items())
    return list(value.items()) if isinstance(value, dict) else []


def _child(value: Any, key: Any) -> Any:
    if isinstance(value, nnx.List | list | tuple | dict):
        return value[key]
    return getattr(value, key)


def _put(value: Any, keys: Keys, new: Any) -> Any:
    """``value`` with another module inside; a new one where it is a tuple."""
    if not keys:
        return new
    key: Any = keys[0]
    child = _child(value, key)
    changed = _put(child, keys[1:], new)
    if changed is child:
        return value
    if isinstance(value, tuple):
        items = (*value[:key], changed, *value[key + 1 :])
        return type(value)(*items) if hasattr(value, "_fields") else items
    if isinstance(value, nnx.List | list | dict):
        value[key] = changed
    else:
        setattr(value, key, changed)
    return value
