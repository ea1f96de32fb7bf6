"""Points on the axes of a sweep, written as ``[LABEL=]NAME[:OPTION[=VALUE],...]``.

``fqt1:bits=2``, ``one draw=fqt1:one_draw`` and ``resnet18:width=0.5`` are such points.
"""

from __future__ import annotations

import dataclasses
import pathlib
import types
from typing import Any, Literal, get_args, get_origin, get_type_hints

from experiments.cli import UserError
from experiments.runs.config import RECIPE_PARTS
from experiments.runs.finetuning import FinetuneConfig

Axis = Literal["dataset", "model", "recipe", "optimizer"]

_MODEL_OPTIONS = ("width", "stem", "checkpoint")
_OPTIMIZER_OPTIONS = (
    "learning_rate",
    "weight_decay",
    "momentum",
    "schedule",
    "warmup_epochs",
    "cosine_epochs",
    "clip_norm",
    "ema_decay",
)
_NOT_OF_A_DATASET = (
    "seed",
    "cache",
    "implementation",
    "out",
    "resume",
    "pretrain_seed",
    "log",
    "save_minutes",
    "coordinator",
    "processes",
    "process",
)
_OPTIONS: dict[Axis, tuple[str, ...]] = {
    "model": _MODEL_OPTIONS,
    "recipe": RECIPE_PARTS,
    "optimizer": _OPTIMIZER_OPTIONS,
    "dataset": tuple(
        field.name
        for field in dataclasses.fields(FinetuneConfig)
        if field.name not in (*get_args(Axis)[:3], *RECIPE_PARTS, *_MODEL_OPTIONS)
        and field.name not in _NOT_OF_A_DATASET
    ),
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """A point: how tables call it, and the options of a run that it sets."""

    label: str
    options: dict[str, Any]


def parse(axis: Axis, text: str) -> Spec:
    """Reads a point on an axis.

    Args:
      axis: what ``NAME`` is the name of. A model takes the options width, stem and checkpoint; a
        recipe bits, keep, sampler, importance, groups, prune, grid, budget, scale, clip, one_draw
        and stratify; an optimizer learning_rate, weight_decay, momentum, schedule, warmup_epochs,
        cosine_epochs, clip_norm and ema_decay; a data set these and all others, such as epochs,
        limit and from_scratch.
      text: the point. An option without a value is true. Without a label, the text is the label.

    Raises:
      UserError: an option is unknown on this axis, given twice, or its value is of another type.

    Example:
      >>> parse("recipe", "norm=fqt1:prune=shared,importance=norm")
      Spec(label='norm',
           options={'recipe': 'fqt1', 'prune': 'shared', 'importance': 'norm'})
      >>> parse("dataset", "mnist5k:from_scratch,epochs=8").options
      {'dataset': 'mnist5k', 'from_scratch': True, 'epochs': 8}
      >>> parse("recipe", "fqt1:bits=two")
      Traceback (most recent call last):
        ...
      experiments.cli.UserError: the recipe 'fqt1:bits=two': bits must be int; got 'two'.
    """
    label, point = text, text
    if "=" in text.partition(":")[0]:
        label, _, point = text.partition("=")
    name, _, rest = point.partition(":")
    if not name.strip() or not label.strip():
        raise UserError(f"the {axis} {text!r} has no name: write [LABEL=]NAME[:OPTION=VALUE,...].")
    options: dict[str, Any] = {axis: name.strip()}
    hints = get_type_hints(FinetuneConfig)
    for part in rest.split(",") if rest else ():
        key, equals, value = part.partition("=")
        key = key.strip().replace("-", "_")
        if key not in _OPTIONS[axis]:
            known = ", ".join(_OPTIONS[axis])
            raise UserError(f"the {axis} {text!r}: unknown option {key!r}; known: {known}.")
        if key in options:
            raise UserError(f"the {axis} {text!r} gives {key} twice.")
        try:
            options[key] = _value(hints[key], value.strip() if equals else "true")
        except ValueError as error:
            raise UserError(f"the {axis} {text!r}: {key} must be {error}.") from None
    return Spec(label.strip(), options)


def _value(hint: Any, text: str) -> Any:
    """A value of an option's type; the error says what it must be."""
    if isinstance(hint, types.UnionType) or type(None) in get_args(hint):
        (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
    if get_origin(hint) is Literal or hint is bool:
        choices = {"true": True, "false": False} if hint is bool else {k: k for k in get_args(hint)}
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}; got {text!r}")
        return choices[text]
    try:
        return {int: int, float: float, str: str, pathlib.Path: pathlib.Path}[hint](text)
    except ValueError:
        raise ValueError(f"{hint.__name__}; got {text!r}") from None
