"""How the process of an experiment ends: by a signal or by an error, each in one line.

Ctrl-C (SIGINT) ends it with the status 130 and SIGTERM with 143, at any moment from the first
import on. While there is nothing to save, that is at once. What has something to save asks for a
delay, by :class:`StopOnSignal`, and raises :class:`Interrupted` when it has saved; a second signal
then ends the process at once. Only the standard library is imported here: it comes before JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPED = tuple(128 + number for number in SIGNALS)
"""Exit statuses of a process that a signal stopped."""

_GRACE = 0.05
"""Seconds for the main thread to handle a signal before the watching thread steps in."""


def command(name: str) -> str:
    """How an experiment is called here, in a checkout or by the installed command."""
    by = os.environ.get("FQT_JAX_COMMAND")
    return f"{by} {name}" if by else f"python -m experiments.{name}"


class Interrupted(Exception):
    """A signal stopped the work, and it is saved. The message says how to go on."""


@dataclasses.dataclass
class _Process:
    installed: bool = False
    hint: str = ""
    received: int = signal.SIGINT  # the last signal
    handled: int = 0  # signals that the main thread has seen
    deferring: StopOnSignal | None = None
    errors: int = 2  # the descriptor that errors are written to
    actions: list[Callable[[], None]] = dataclasses.field(default_factory=list)
    ending: threading.Lock = dataclasses.field(default_factory=threading.Lock)  # never released


_process = _Process()


def install() -> None:
    """Makes signals and failing imports end the process in one line. Once is enough.

    Python runs handlers of signals in the main thread only, between two of its instructions, which
    may be a minute apart while XLA compiles. So another thread watches the signals too.
    """
    if _process.installed:
        return
    _process.installed = True
    sys.excepthook = _say_failed_import
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What was printed must not be lost with the buffer.
        sys.stdout.reconfigure(line_buffering=True)
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, _handle)
    threading.Thread(target=_watch, args=(read,), daemon=True).start()


def if_stopped(hint: str) -> None:
    """Sets what the line of a process that a signal ends at once says after *interrupted*."""
    _process.hint = hint


@contextlib.contextmanager
def on_stop(action: Callable[[], None]) -> Iterator[None]:
    """Has an action done before a signal ends the process at once, such as to end a child."""
    _process.actions.append(action)
    try:
        yield
    finally:
        _process.actions.remove(action)


def before_end(action: Callable[[], None]) -> None:
    """Has an action done before a signal ends the process at once, from now on."""
    _process.actions.append(action)


def errors_to(descriptor: int) -> None:
    """Has errors written to another file than that of the standard error."""
    _process.errors = descriptor


def hint() -> str:
    """What was set by :func:`if_stopped`."""
    return _process.hint


def status_of_stop() -> int:
    """The exit status of a process that the last signal stopped."""
    return 128 + _process.received


class StopOnSignal:
    """Turns the first SIGINT or SIGTERM into a request to stop as soon as the work is saved.

    That holds from :meth:`defer` on, until the context is left. The second signal does what it did
    before.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        return self

    def defer(self) -> None:
        """Begins: from now on there is something to save. Again, it does nothing."""
        if self._previous:
            return
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        _process.deferring = self

    def __exit__(self, *_: object) -> None:
        if self._previous:
            _process.deferring = None
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if not self.requested:
            _process.handled += 1
            _process.received = number
            self.requested = True
        elif callable(self._previous[number]):
            self._previous[number](number, frame)
        else:
            raise KeyboardInterrupt


def _handle(number: int, _: types.FrameType | None) -> None:
    _process.handled += 1
    _end(number)


def _watch(pipe: int) -> None:
    """Ends the process where the main thread is held up and sees no signal."""
    arrived = 0
    while True:
        for number in os.read(pipe, 1):
            if number not in SIGNALS:
                continue
            arrived += 1
            time.sleep(_GRACE)
            unseen = arrived - _process.handled
            deferring = _process.deferring
            if unseen > 0 and (deferring is None or deferring.requested or unseen > 1):
                _end(number)


def _end(number: int) -> None:
    """Ends the process at once, whatever it is doing, as SIGKILL would, but for a line."""
    if not _process.ending.acquire(blocking=False):
        return  # the other thread is at it
    for action in list(_process.actions):
        with contextlib.suppress(Exception):
            action()
    word = "interrupted" if number == signal.SIGINT else "terminated"
    _write(f"{word}; {_process.hint}" if _process.hint else f"{word}.")
    os._exit(128 + number)


def _write(line: str) -> None:
    """Writes a line to the standard error, below what a terminal's cursor is in."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stdout is not None and sys.stdout.isatty():
            os.write(sys.stdout.fileno(), b"\x1b[?25h")  # a progress bar hides the cursor
    with contextlib.suppress(OSError, ValueError):
        newline = "\n" if os.isatty(_process.errors) else ""
        os.write(_process.errors, f"{newline}{line}\n".encode())


def settle() -> None:
    """Ignores signals from now on: the outcome is written, and only Python's own end is to come.

    Python would first set them back to their default, by which one of them changes the status.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stopped(stop: Interrupted) -> NoReturn:
    """Ends the process after an interruption that was saved."""
    _write(str(stop))
    raise SystemExit(status_of_stop())


def fail(message: str, status: int = 2) -> NoReturn:
    """Ends the process after an error: with one line, and by default the status of bad input."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)


def wants_traceback() -> bool:
    """Whether errors are to be shown as Python shows them, by ``FQT_JAX_TRACEBACK=1``."""
    return bool(os.environ.get("FQT_JAX_TRACEBACK"))


def _say_failed_import(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    """An import fails where a package is missing or an environment variable is wrong."""
    if wants_traceback() or not isinstance(error, (ImportError, ValueError)):
        sys.__excepthook__(kind, error, trace)
        return
    try:
        fail(str(error))
    except SystemExit as end:
        sys.stderr.flush()
        os._exit(int(end.code or 0))


def end_with_parent() -> None:
    """Stops this process as SIGTERM does when its standard input ends, that is, with its parent."""

    def wait() -> None:
        while os.read(0, 1024):
            pass
        if not (_process.deferring and _process.deferring.requested):
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
