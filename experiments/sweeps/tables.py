"""What the results of a sweep come to, and the files that say so."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from experiments.runs.folders import write_text
from experiments.show.formats import Estimate, Table, show, to_latex, to_markdown
from experiments.sweeps.sweep import Result


def accuracy(result: Result) -> Estimate:
    """Test accuracy in percent."""
    return Estimate.of([100 * value for value in result.values("test_accuracy")])


def cost(result: Result, name: str) -> float | None:
    """A cost of a run, ``gradient_bits`` or ``step_ms``; None where it was not measured.

    Of the seeds' medians it is the least: what disturbs a step only ever lengthens it.
    """
    return min(result.values(name), default=None)


def differences(result: Result, baseline: Result) -> dict[int, float]:
    """Test accuracy over that of a baseline in points, for each seed that both finished."""
    return {
        seed: 100 * (summary["test_accuracy"] - baseline.summaries[seed]["test_accuracy"])
        for seed, summary in result.summaries.items()
        if seed in baseline.summaries
    }


def publish(
    root: pathlib.Path, options: dict[str, Any], results: Sequence[Result], tables: list[Table]
) -> None:
    """Shows the tables; writes ``tables.md``, ``tables.tex`` and ``results.json``.

    What failed is listed.

    Raises:
      SystemExit: a run failed; the status is 1.
    """
    show(tables)
    write_text(root / "tables.md", to_markdown(tables))
    write_text(root / "tables.tex", to_latex(tables))
    report = {
        "options": options,
        "groups": [result.to_json() for result in results],
        "tables": [dataclasses.asdict(table) for table in tables],
    }
    write_text(root / "results.json", json.dumps(report, indent=1, default=str) + "\n")
    print(f"written to {root}: tables.md, tables.tex, results.json, and each run in cells")
    failures = {name: error for result in results for name, error in result.failures.items()}
    for name, error in failures.items():
        print(f"failed: {name}: {error}", file=sys.stderr)
    if failures:
        raise SystemExit(1)
