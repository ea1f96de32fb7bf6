"""The command line of the experiments: typed options in, one clear line out when they are wrong."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import pathlib
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from experiments import distributed, process
from experiments.data import DataError
from experiments.process import Interrupted
from fqt_jax.checkpoints import CheckpointError

Config = TypeVar("Config")


class UserError(Exception):
    """Something the user can put right. The message is one line."""


def run(main: Callable[[Config], None], config_type: type[Config]) -> None:
    """Parses the options, runs ``main`` and turns errors into one line and an exit status.

    The status is 0 on success, 1 where something failed that is not the input, such as a lack of
    memory, 2 for bad input, 130 after Ctrl-C and 143 after SIGTERM. Set ``FQT_JAX_TRACEBACK=1`` to
    see where an error came from.
    """
    process.install()
    starts = getattr(config_type, "DISTRIBUTED", False)
    module = sys.modules["__main__"]
    name = getattr(module.__spec__, "name", None)

    def go() -> None:
        prog = process.command(name.rpartition(".")[2]) if name else None
        if starts:
            distributed.start(sys.argv[1:])
        main(parse(config_type, sys.argv[1:], prog=prog, description=module.__doc__))

    try:
        _one_line_for_an_error(go)
    except SystemExit as end:
        if distributed.several():
            distributed.settle()
            distributed.end(int(end.code or 0))
        raise
    finally:
        process.settle()
        distributed.settle()


def parse(
    config_type: type[Config],
    arguments: Sequence[str],
    *,
    prog: str | None = None,
    description: str | None = None,
) -> Config:
    """Reads options from a command line.

    Where ``config_type.FROM_FILE`` is true, ``--config FILE`` reads options from a JSON file, such
    as the ``config.json`` of a run; those on the command line take their place.

    Raises:
      UserError: the file is damaged, or holds what is no option.
      OSError: the file cannot be read.
      SystemExit: the command line holds what is no option, or asks for help.
    """
    options: dict[str, Any] = {"prog": prog, "description": description}
    if getattr(config_type, "FROM_FILE", False):
        parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
        parser.add_argument("--config", nargs="?", const="")
        given, arguments = parser.parse_known_args(arguments)
        options["description"] = (
            f"{description or ''}\n--config FILE reads options from a JSON file, such as the "
            "config.json of a run; options given beside it take their place."
        )
        if given.config == "":
            raise UserError("--config needs the name of a file.")
        if given.config is not None:
            options["default"] = _from_file(config_type, pathlib.Path(given.config))
    return tyro.cli(config_type, args=arguments, **options)


def _from_file(config_type: type[Config], path: pathlib.Path) -> Config:
    """The options in a file, each of its type; whether they fit is checked with all the others."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object of options; got {values!r}.")
    hints = get_type_hints(config_type)
    config = object.__new__(config_type)
    fields: Any = dataclasses.fields(config_type)  # type: ignore[arg-type]
    known = [field.name for field in fields]
    for name in values:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(known)}."
            raise UserError(f"{path}: unknown option {name!r}; {hint}")
    for field in fields:
        value = field.default
        if field.name in values:
            try:
                value = _of_type(hints[field.name], values[field.name])
            except ValueError as error:
                raise UserError(f"{path}: {field.name} must be {error}.") from None
        object.__setattr__(config, field.name, value)
    return config


def _of_type(hint: Any, value: Any) -> Any:
    """A JSON value as the type of an option; the error says what it must be."""
    kinds = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
    allowed: list[str] = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            if value in get_args(kind):
                return value
            allowed += map(repr, get_args(kind))
        elif kind is float and type(value) in (int, float):
            return float(value)
        elif kind is pathlib.Path and isinstance(value, str):
            return pathlib.Path(value)
        elif type(value) is kind:
            return value
        else:
            allowed.append("null" if kind is types.NoneType else kind.__name__)
    *most, last = allowed
    allowed_here = f"{', '.join(most)} or {last}" if most else last
    raise ValueError(f"{allowed_here}; got {value!r}")


def _one_line_for_an_error(go: Callable[[], None]) -> None:
    if process.wants_traceback():
        go()
        return
    try:
        try:
            go()
        except Exception as error:  # whatever type the one that noticed gave it
            if not distributed.is_loss(error):
                raise
            hint = f"; {process.hint()}" if process.hint() else "."
            process.fail(f"{distributed.LOST}{hint}", status=1)
    except Interrupted as stop:
        distributed.wait_for_all("stopped")
        if not distributed.first():
            raise SystemExit(process.status_of_stop()) from None
        process.stopped(stop)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        process.fail(f"{where}{error.strerror or error}")
    except (UserError, DataError, CheckpointError, ValueError, TypeError, ImportError) as error:
        process.fail(str(error))
    except (MemoryError, RuntimeError) as error:
        # Lines after the first are the compiler's.
        line = (str(error).splitlines() or ["out of memory"])[0]
        process.fail(f"{line} (FQT_JAX_TRACEBACK=1 shows where)", status=1)
