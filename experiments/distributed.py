"""Several processes of one run: how they find each other, agree, and end together.

All is JAX's (:mod:`jax.distributed`, :mod:`jax.experimental.multihost_utils`). With one process
every function here does nothing, or what is obvious.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments import last_word, process

_HEARTBEAT_SECONDS = 30
"""After so long without a sign of life a process counts as lost."""
_START_SECONDS = 300
"""How long processes wait for each other at the start, and at the end."""

LOST = last_word.LOST
"""What is said where another process cannot be reached."""

_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)
_LOST = re.compile("gloo|nccl|coordination|heartbeat|socket closed|connection (closed|reset)", re.I)


class StartError(ValueError):
    """The processes of a run do not find each other; the message is one line."""


def start(arguments: Sequence[str]) -> None:
    """Joins the other processes of a run, before JAX is used for anything.

    That is by ``--coordinator HOST:PORT --processes N --process I``, or without them under Slurm,
    Kubernetes and on TPU pods, where their environment variables are there and tell of several
    processes. ``--processes 1`` is one process wherever it runs.

    Args:
      arguments: of the command line.

    Raises:
      StartError: the options are incomplete or out of range, or not all processes came.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("coordinator", "processes", "process"):
        parser.add_argument(f"--{name}")
    try:
        given, _ = parser.parse_known_args(arguments)
    except SystemExit:
        return  # argparse has told; whoever parses all of them tells again
    address, count, number = given.coordinator, _whole(given.processes), _whole(given.process)
    if count == 1 and number in (None, 0):
        return
    options: dict[str, Any] = {}
    if (address, given.processes, given.process) != (None, None, None):
        if address is None or count is None or number is None or not 0 <= number < count:
            raise StartError(
                "several processes need --coordinator HOST:PORT, --processes N and --process I, "
                f"with I from 0 to N - 1; got {address}, {given.processes} and {given.process}."
            )
        if not re.fullmatch(r".+:\d+", address):
            raise StartError(f"coordinator must be HOST:PORT; got {address}.")
        options = {"coordinator_address": address, "num_processes": count, "process_id": number}
        options["cluster_detection_method"] = "deactivate"
    elif not _in_cluster():
        return
    # Signals are handled here: a run that is asked to stop saves first.
    jax.config.update("jax_enable_preemption_service", False)
    if not process.wants_traceback():
        _speak_for_the_runtime()
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_START_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise StartError(
            f"the processes of the run did not find each other: {line} Say where they are by "
            "--coordinator, --processes and --process, or that it is one by --processes 1."
        ) from error
    if not first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"\d+", text) else None


def _in_cluster() -> bool:
    """Whether the environment is that of one of several processes."""
    found = os.environ
    if all(name in found for name in _SLURM):
        return found["SLURM_NTASKS"] != "1"
    if "KUBERNETES_SERVICE_HOST" in found and "JOB_COMPLETION_INDEX" in found:
        return True
    return "," in found.get("TPU_WORKER_HOSTNAMES", "")


def several() -> bool:
    """Whether the run has several processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that writes what people read; of one process, that one is."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Goes on when all processes have come here."""
    if several():
        multihost_utils.sync_global_devices(what)


def from_first(path: pathlib.Path | None) -> pathlib.Path:
    """A path that the first process tells the others."""
    text = np.zeros(4096, np.uint8)
    if path is not None:
        encoded = os.fsencode(path)
        text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    if several():
        text = multihost_utils.broadcast_one_to_all(text)
    return pathlib.Path(os.fsdecode(bytes(text).rstrip(b"\0")))


class Agreement:
    """Questions that any process may answer with yes, and to which all get the same answer.

    An answer comes some questions late, so that no process waits for another; but on CPUs, where
    programs that were started one after the other may run in any order, and the collective
    operations of two of them would meet each other.

    Args:
      late: how many questions an answer is late, with several processes.
    """

    def __init__(self, late: int):
        self._waits = jax.default_backend() == "cpu"
        self._late = late if several() and not self._waits else 0
        self._asked: collections.deque[jax.Array] = collections.deque()
        if several():
            devices = np.array(jax.devices())
            mesh = jax.sharding.Mesh(devices, ("all",))
            spec = jax.sharding.PartitionSpec
            self._apart = jax.sharding.NamedSharding(mesh, spec("all"))
            together = jax.sharding.NamedSharding(mesh, spec())
            self._any = jax.jit(lambda yes: yes.max(axis=0), out_shardings=together)

    def ask(self, *yes: bool, after: Any = ()) -> tuple[bool, ...]:
        """Whether any process said yes to each of some questions, some calls ago.

        Args:
          yes: this process' answers.
          after: results of what was started before.
        """
        if not several():
            return yes
        if self._waits:
            jax.block_until_ready(after)
        mine = np.tile(np.array(yes, np.int32), (jax.local_device_count(), 1))
        self._asked.append(self._any(jax.make_array_from_process_local_data(self._apart, mine)))
        if len(self._asked) <= self._late:
            return (False,) * len(yes)
        return tuple(bool(value) for value in np.asarray(self._asked.popleft()))

    def ask_now(self, *yes: bool) -> tuple[bool, ...]:
        """The same, with an answer to all that was asked: processes wait for each other."""
        late, self._late = self._late, 0
        answers = [self.ask(*yes)]
        while self._asked:
            answers.append(tuple(bool(value) for value in np.asarray(self._asked.popleft())))
        self._late = late
        return tuple(any(each) for each in zip(*answers, strict=True))


_control: list[int] = []
"""The pipe to the process that has the last word, where there is one."""


def _speak_for_the_runtime() -> None:
    """Has what the runtime writes read by a process that tells it in one line."""
    read, write = os.pipe()
    told, tell = os.pipe()
    os.set_inheritable(told, True)
    subprocess.Popen(
        [sys.executable, "-S", "-E", last_word.__file__, str(told)],
        stdin=read,
        stdout=subprocess.DEVNULL,
        pass_fds=(told,),
        start_new_session=True,
    )
    os.close(read)
    os.close(told)
    # Python goes on with what was there; the runtime, with the descriptors, goes to the pipe.
    for number, name in ((1, "stdout"), (2, "stderr")):
        getattr(sys, name).flush()
        stream = os.fdopen(os.dup(number), "w", buffering=1)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
        os.dup2(write, number)
    os.close(write)
    _control.append(tell)
    process.errors_to(sys.stderr.fileno())
    process.before_end(settle)


def tell_how_to_go_on(hint: str) -> None:
    """Sets what is said after a loss."""
    for tell in _control:
        os.write(tell, f"{hint}\n".encode())


def settle() -> None:
    """The process ends with its own word from here on, or with none."""
    with contextlib.suppress(OSError):
        for tell in _control:
            os.write(tell, b".")
    _control.clear()


def is_loss(error: BaseException) -> bool:
    """Whether an error is that another process cannot be reached."""
    return several() and bool(_LOST.search(str(error)))


def end(status: int) -> NoReturn:
    """Ends the process at once: Python's own end would wait for processes that are gone."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
