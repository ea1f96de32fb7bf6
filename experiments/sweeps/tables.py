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


@dataclasses.dataclass(frozen=True)
class Score:
    """What is told of a run's test split.

    Attributes:
      title: how tables call it.
      unit: of differences.
      name: in summaries.
      factor: from there to the table.
      sign: 1 where more is better, -1 where less is.
      form: how it is written.
    """

    title: str
    unit: str
    name: str
    factor: float
    sign: int
    form: str

    def of(self, result: Result) -> Estimate:
        """Its estimate over the seeds."""
        return Estimate.of([self.factor * value for value in result.values(self.name)], self.form)

    def gains(self, result: Result, baseline: Result) -> dict[int, float]:
        """How much better a result is than a baseline, for each seed that both finished."""
        factor = self.sign * self.factor
        return {
            seed: factor * (summary[self.name] - baseline.summaries[seed][self.name])
            for seed, summary in result.summaries.items()
            if seed in baseline.summaries
        }


ACCURACY = Score("accuracy, %", "points", "test_accuracy", 100.0, 1, ".1f")
BITS = Score("bits per character", "bits", "test_bits", 1.0, -1, ".3f")


def score_of(result: Result) -> Score:
    """Bits per character where text is the data, and accuracy elsewhere."""
    return BITS if result.group.is_text else ACCURACY


def cost(result: Result, name: str) -> float | None:
    """A cost of a run, ``gradient_bits`` or ``step_ms``; None where it was not measured.

    Of the seeds' medians it is the least: what disturbs a step only ever lengthens it.
    """
    return min(result.values(name), default=None)


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
