"""The command line of the experiments: typed options in, one clear line out when they are wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from experiments import process
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
    module = sys.modules["__main__"]
    name = getattr(module.__spec__, "name", None)

    def go() -> None:
        prog = process.command(name.rpartition(".")[2]) if name else None
        main(tyro.cli(config_type, prog=prog, description=module.__doc__))

    try:
        _one_line_for_an_error(go)
    finally:
        process.settle()


def _one_line_for_an_error(go: Callable[[], None]) -> None:
    if process.wants_traceback():
        go()
        return
    try:
        go()
    except Interrupted as stop:
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
