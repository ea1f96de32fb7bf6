"""Names of the leaves of a pytree."""

from __future__ import annotations

from typing import Any


def leaf_name(path: tuple[Any, ...]) -> str:
    """A pytree path as names joined by dots; the entry of an NNX variable's value left out.

    Example:
      >>> import jax
      >>> [(path, _)] = jax.tree_util.tree_leaves_with_path({"head": {"bias": 1.0}})
      >>> leaf_name(path)
      'head.bias'
    """
    names = []
    for entry in path:
        for attribute in ("key", "idx", "name"):
            if hasattr(entry, attribute):
                names.append(str(getattr(entry, attribute)))
                break
    return ".".join(name for name in names if name != "value")
