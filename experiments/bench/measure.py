"""Carries out what experiments.speed asks for, in this process or in one of its own."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any

from experiments import process
from experiments.bench import machine, report
from experiments.bench.contenders import Roster, Setting, resolve_implementations
from experiments.bench.layers import check, measure_layers
from experiments.bench.steps import measure_rss, measure_steps, say
from experiments.cli import UserError


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Carries out one request, as ``SpeedConfig.request`` makes them, in this process."""
    setting = Setting(**request["setting"])
    counts = {"warmup": request["warmup"], "repeats": request["repeats"]}
    result: dict[str, Any] = {"threads": request["threads"], "machine": machine.describe()}
    if request["kind"] in ("layers", "check"):
        names = resolve_implementations(request["implementations"] or ["all"])
        if request["kind"] == "layers":
            return result | measure_layers(setting, names, **counts)
        lines = []
        for line in check(setting, names, repeats=request["repeats"]):
            say(f"  {line['implementation']}, {line['product']}: {report.verdict(line)}")
            lines.append(line)
        return result | {"check": lines}
    roster = Roster(request["recipes"], request["implementations"], request["contenders"])
    if request["kind"] == "rss":
        return measure_rss(setting, roster.contenders[0])
    result |= measure_steps(setting, roster.contenders, **counts, phases=request["phases"])
    result["left_out"] = roster.left_out + result["left_out"]
    return result


def in_process(request: dict[str, Any]) -> dict[str, Any]:
    """Carries out a request in a process of its own.

    Raises:
      UserError: the request does not fit, or the process was killed.
    """
    # Memory of an accelerator as it is needed, so that a peak means something.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    with (
        tempfile.TemporaryDirectory() as folder,
        process.on_stop(lambda: shutil.rmtree(folder, ignore_errors=True)),
    ):
        ask, answer = pathlib.Path(folder, "request.json"), pathlib.Path(folder, "result.json")
        ask.write_text(json.dumps(request))
        command = [sys.executable, "-m", "experiments.bench.worker", str(ask), str(answer)]
        # In a session of its own: Ctrl-C reaches this process alone, which ends that one.
        worker = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, start_new_session=True
        )
        with worker, process.on_stop(worker.kill):
            status = worker.wait()
        if status < 0:
            raise UserError(f"the measuring process was ended by signal {-status}: out of memory?")
        if status > 0:
            raise UserError("the measuring process failed; its error is above.")
        result: dict[str, Any] = json.loads(answer.read_text())
    if "error" in result:
        raise UserError(result["error"])
    return result
