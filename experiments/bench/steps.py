"""Times training steps: the contenders take turns, so that a slow spell of the machine hits all."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from experiments.bench import machine
from experiments.bench.contenders import FLOATS, PHASES, Contender, Setting
from experiments.cli import UserError
from fqt_jax.kernels.contract import UnsupportedError

_SETTLE = 0.05
"""Seconds between contenders, in which the threads of the one before stop spinning."""
_BURST = 0.05
"""Seconds that the measurement of a part takes at least."""
_TURN = 1.0
"""The same of whole steps: a training run is many of them, and on a virtual machine two in a row
differ by half."""


def say(line: str) -> None:
    """Reports progress on the standard error."""
    print(line, file=sys.stderr, flush=True)


def timed(run: Callable[[], Any]) -> float:
    """Milliseconds that a call takes, which waits for its own end; see :func:`timed_in_a_row`."""
    return timed_in_a_row(_one_by_one(run), _BURST)


def timed_in_a_row(repeat: Callable[[int], Any], least: float) -> float:
    """Milliseconds that a call takes among others of its kind, as in training.

    The first call after another contender's is not counted: it wakes threads, which takes some
    milliseconds on a virtual machine, and maps the memory that the other gave back. Then as many
    are timed at once as are expected to take ``least`` seconds.

    Args:
      repeat: runs what is timed as many times as it is told, and waits for the end.
      least: seconds.
    """
    time.sleep(_SETTLE)
    start = time.perf_counter()
    repeat(1)
    calls = max(1, math.ceil(least / max(1e-6, time.perf_counter() - start)))
    start = time.perf_counter()
    repeat(calls)
    return 1e3 * (time.perf_counter() - start) / calls


def _one_by_one(run: Callable[[], Any]) -> Callable[[int], None]:
    def repeat(calls: int) -> None:
        for _ in range(calls):
            run()

    return repeat


def summarize(samples: Sequence[float]) -> dict[str, Any]:
    """Median, minimum and maximum of samples, and the samples."""
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "samples": list(samples),
    }


def measure_steps(
    setting: Setting,
    contenders: Sequence[Contender],
    *,
    warmup: int,
    repeats: int,
    phases: Sequence[str] = PHASES,
) -> dict[str, Any]:
    """Builds the contenders and times their steps and the parts of these, in turns.

    Args:
      setting: the model and the data.
      contenders: what is compared.
      warmup: runs before those that count; the first compiles.
      repeats: runs that count.
      phases: which of :data:`PHASES`; the ``total`` at least.

    Returns:
      ``dot_rate``, the machine's fp32 rate in G multiply-adds/s, and ``contenders``, by name:
      ``phases`` with the summary of each in ms, ``first``, the seconds until the first whole step
      is over, which are those of building and compiling, and what :func:`compare` adds;
      ``left_out``, why contenders are missing whose implementation of the kernels does not serve
      their recipe.

    Raises:
      UserError: none is left.
    """
    # At both ends of the run, and the better of the two: it stands for what the machine can do.
    rate = machine.dot_rate()
    left_out: list[str] = []
    runs: dict[str, dict[str, Callable[[int], None]]] = {}
    first: dict[str, float] = {}
    for i, contender in enumerate(contenders):
        say(f"  building {contender.name} ({i + 1} of {len(contenders)})")
        start = time.perf_counter()
        contender.build(setting)
        parts = {phase: _one_by_one(run) for phase, run in contender.phases().items()}
        parts["total"] = contender.train
        runs[contender.name] = {phase: run for phase, run in parts.items() if phase in phases}
        try:
            contender.train(1)
            first[contender.name] = time.perf_counter() - start
            for repeat in runs[contender.name].values():
                repeat(warmup)
        except UnsupportedError as error:
            del runs[contender.name]
            left_out.append(f"{contender.name} is left out: {error}")
    if not runs:
        raise UserError("; ".join(left_out))
    samples: dict[str, dict[str, list[float]]] = {
        name: {phase: [] for phase in of_one} for name, of_one in runs.items()
    }
    for i in range(repeats):
        start = time.perf_counter()
        for phase in PHASES:
            for name, of_one in runs.items():
                if phase in of_one:
                    least = _TURN if phase == "total" else _BURST
                    samples[name][phase].append(timed_in_a_row(of_one[phase], least))
        say(f"  repeat {i + 1} of {repeats}: {time.perf_counter() - start:.1f} s")
    results = {
        c.name: {
            "phases": {phase: summarize(s) for phase, s in samples[c.name].items()},
            "first": first[c.name],
            **c.details(),
        }
        for c in contenders
        if c.name in runs
    }
    rate = max(rate, machine.dot_rate())
    compare(results, setting.batch_size, rate)
    return {"dot_rate": rate, "contenders": results, "left_out": left_out}


def compare(results: dict[str, dict[str, Any]], batch_size: int, dot_rate: float) -> None:
    """Adds to each contender's result what follows from the medians of the total step.

    ``samples_per_second``; ``rate``, the products of its convolutions and dense layers in G/s over
    the whole step, and ``share_of_peak``, that over ``dot_rate``; ``speedup``, how many times as
    fast it is as ``torch``, as ``jax`` and as the fastest of :data:`FLOATS` (``float``), where
    those took part.
    """
    floats = {n: results[n]["phases"]["total"]["median"] for n in FLOATS if n in results}
    rivals: dict[str, float] = {n: floats[n] for n in ("torch", "jax") if n in floats}
    if floats:
        rivals["float"] = min(floats.values())
    for result in results.values():
        total = result["phases"]["total"]["median"]
        result["samples_per_second"] = batch_size / total * 1e3
        result["rate"] = result["products"] / total / 1e6
        result["share_of_peak"] = result["rate"] / dot_rate
        result["speedup"] = {name: median / total for name, median in rivals.items()}


def measure_rss(setting: Setting, contender: Contender) -> dict[str, Any]:
    """Peak resident memory of this process, which must run nothing else, while it trains.

    Returns:
      ``before``, bytes before the model is made; ``building``, the peak until the first step is
      over, compilation included; ``steps``, the peak over two more steps, or ``None`` where the
      system cannot start a peak anew.
    """
    before = machine.peak_rss()
    contender.build(setting)
    contender.train(1)
    building = machine.peak_rss()
    fresh = machine.reset_peak_rss()
    contender.train(2)
    return {
        "before": before,
        "building": building,
        "steps": machine.peak_rss() if fresh else None,
    }
