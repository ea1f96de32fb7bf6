"""The command line of the experiments: typed options in, one clear line out when they are wrong."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import tyro

from experiments.data import DataError
from fqt_jax.checkpoints import CheckpointError

Config = TypeVar("Config")

INTERRUPTED = 130


class UserError(Exception):
    """Something the user can put right. The message is one line."""


class Interrupted(Exception):
    """The run was stopped by a signal, and saved. The message says how to resume."""


class StopOnSignal:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step in hand."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def run(main: Callable[[Config], None], config_type: type[Config]) -> None:
    """Parses the options, runs ``main`` and turns errors into one line and an exit status.

    The status is 0 on success, 2 for bad input, 130 after an interruption. Set
    ``FQT_JAX_TRACEBACK=1`` to see where an error came from.
    """
    module = sys.modules["__main__"]
    name = getattr(module.__spec__, "name", None)

    def go() -> None:
        prog = f"python -m {name}" if name else None
        main(tyro.cli(config_type, prog=prog, description=module.__doc__))

    if os.environ.get("FQT_JAX_TRACEBACK"):
        go()
        return
    try:
        go()
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}")
    except (UserError, DataError, CheckpointError, ValueError, TypeError) as error:
        _fail(str(error))


def _fail(message: str) -> None:
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(2)
