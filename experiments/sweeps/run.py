"""Runs a sweep: a process for each group, a few at a time, and goes on where one fails."""

from __future__ import annotations

import itertools
import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from experiments.process import STOPPED, Interrupted, StopOnSignal, if_stopped
from experiments.runs.locks import locked
from experiments.sweeps.sweep import Group, Result, Store, collect, plan


def run_groups(groups: Sequence[Group], root: pathlib.Path, jobs: int) -> list[Result]:
    """Runs what is not settled yet of some groups, and collects the results of all.

    Cells of an earlier sweep in the same folder are found by their options and not run again,
    unless they failed for another reason than divergence.

    Args:
      groups: the groups; equal ones run once.
      root: folder of the sweep; made where there is none.
      jobs: processes at a time.

    Returns:
      A result for each group, whether it failed or not.

    Raises:
      Interrupted: a signal stopped the sweep; the same command continues it.
      UserError: a file of an earlier sweep is damaged, or another process runs this sweep.
      OSError: the folder cannot be written.
    """
    store = Store(root)
    for cell in itertools.chain(*(plan(group, store) for group in groups)):
        store.check(cell)  # before anything runs
    (root / "logs").mkdir(parents=True, exist_ok=True)
    distinct = {json.dumps(group.to_json() | {"labels": None}): group for group in groups}
    sweep = _Sweep(store, len(distinct))
    go_on = f"the same command continues the sweep in {root}."
    if_stopped(go_on)
    with locked(root), StopOnSignal() as stop, ThreadPoolExecutor(jobs) as pool:
        stop.defer()
        futures = [pool.submit(sweep.run, group) for group in distinct.values()]
        try:
            while not stop.requested:
                done, running = wait(futures, timeout=_POLL, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if not running:
                    break
            else:
                raise Interrupted(f"stopped; {go_on}")
        finally:
            for future in futures:
                future.cancel()
            sweep.stop()
    return [collect(group, store) for group in groups]


_POLL = 0.2
"""Seconds between looks for a signal."""

_WORKER = (sys.executable, "-m", "experiments.sweeps.worker")


class _Sweep:
    def __init__(self, store: Store, groups: int):
        self._store, self._groups, self._begun = store, groups, 0
        self._processes: set[subprocess.Popen[str]] = set()
        self._lock, self._stopped = threading.Lock(), False

    def run(self, group: Group) -> None:
        """Runs a group; where a cell takes its process down, the others go on in a new one."""
        with self._lock:
            self._begun += 1
            number = self._begun
        if all(self._store.settled(cell) for cell in plan(group, self._store)):
            self._say(f"{number}/{self._groups} {group.name}: complete already")
            return
        self._say(f"{number}/{self._groups} {group.name}")
        skip: list[str] = []
        while True:
            in_hand, status = self._process(group, skip, number)
            if status in (0, *STOPPED) or self._stopped:
                return
            log = self._log(group)
            ended = f"by signal {-status}: out of memory?" if status < 0 else f"with {status}"
            error = f"its process ended {ended} (see {log})"
            cells = {cell.name: cell for cell in plan(group, self._store)}
            for cell in [cells[in_hand]] if in_hand else cells.values():
                if not self._store.settled(cell):
                    self._store.fail(cell, error)
                    self._say(f"{number}/{self._groups}   failed: {error}")
            if in_hand is None:
                return
            skip.append(in_hand)

    def stop(self) -> None:
        """Asks the processes to save and end."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                process.send_signal(signal.SIGTERM)

    def _process(self, group: Group, skip: list[str], number: int) -> tuple[str | None, int]:
        """Runs a group's process: the cell it had in hand at its end, and its exit status."""
        request = {"group": group.to_json(), "root": str(self._store.root), "skip": skip}
        in_hand = None
        with tempfile.TemporaryDirectory() as folder, self._log(group).open("a") as log:
            path = pathlib.Path(folder, "request.json")
            path.write_text(json.dumps(request))
            with self._lock:
                if self._stopped:
                    return None, 0
                # In a session of its own: Ctrl-C reaches this process, which passes it on once.
                process = subprocess.Popen(
                    [*_WORKER, str(path)],
                    stdin=subprocess.PIPE,  # whose end tells it that this process has died
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
                self._processes.add(process)
            with process:
                for line in process.stdout or ():
                    report: dict[str, Any] = json.loads(line)
                    in_hand = report.get("begin")
                    if line := _describe(report):
                        self._say(f"{number}/{self._groups}   {line}")
            with self._lock:
                self._processes.discard(process)
        return in_hand, process.returncode

    def _log(self, group: Group) -> pathlib.Path:
        return self._store.root / "logs" / f"{group.cell(group.seeds[0]).name}.log"

    def _say(self, line: str) -> None:
        with self._lock:
            print(line, flush=True)


def _describe(report: dict[str, Any]) -> str:
    """A report of a worker as text; empty where a cell only begins."""
    if "error" in report:
        return f"{'diverged' if report['diverged'] else 'failed'}: {report['error']}"
    if "summary" not in report:
        return ""
    s = report["summary"]
    found = f"validation accuracy {s['validation_accuracy']:.1%}"
    if "validation_bits" in s:
        found = f"{s['validation_bits']:.3f} bits per character in the validation"
    return f"rate {s['learning_rate']:g}, seed {s['seed']}: {found} ({s['seconds']:.0f} s)"
