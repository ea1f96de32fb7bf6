"""Tables of a sweep: means with deviations over seeds, on the screen, as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import rich.console
import rich.markup
import rich.table

from experiments.sweep import Result


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Mean and standard deviation (of the sample, so n - 1) of ``n`` values.

    Example:
      >>> str(Estimate.of([97.0, 98.0])), str(Estimate.of([97.0])), str(Estimate.of([]))
      ('97.5 ± 0.7', '97.0', '-')
    """

    mean: float
    deviation: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The estimate from some values."""
        n = len(values)
        mean = statistics.fmean(values) if n else float("nan")
        return cls(mean, statistics.stdev(values) if n > 1 else float("nan"), n)

    def __str__(self) -> str:
        if self.n == 0:
            return "-"
        return f"{self.mean:.1f}" + (f" ± {self.deviation:.1f}" if self.n > 1 else "")

    def text(self, seeds: int) -> str:
        """With the number of values, where it is not that of the seeds."""
        return str(self) if self.n in (0, seeds) else f"{self} (n = {self.n})"


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


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text, the same in every form.

    Example:
      >>> print(Table("Accuracy, %", ["recipe", "adam"], [["qat", "97.1"]]).to_markdown())
      **Accuracy, %**
      <BLANKLINE>
      | recipe | adam |
      |---|---|
      | qat | 97.1 |
      <BLANKLINE>
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = dataclasses.field(default_factory=list)

    def to_markdown(self) -> str:
        """As GitHub's Markdown."""

        def line(cells: list[str]) -> str:
            return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

        head = [line(self.columns), "|" + "---|" * len(self.columns)]
        body = "\n".join([*head, *(line(row) for row in self.rows)])
        notes = "".join(f"\n{note}\n" for note in self.notes)
        return f"**{self.title}**\n\n{body}\n{notes}"

    def show(self) -> None:
        """On the screen."""
        # Off a terminal nothing says how wide it may be; a table that wraps is hard to read.
        console = rich.console.Console(width=None if sys.stdout.isatty() else 160)
        table = rich.table.Table()
        for i, column in enumerate(self.columns):
            table.add_column(rich.markup.escape(column), justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*(rich.markup.escape(cell) for cell in row))
        console.print(f"\n{rich.markup.escape(self.title)}")
        console.print(table)
        for note in self.notes:
            console.print(rich.markup.escape(note))


def publish(
    root: pathlib.Path, options: dict[str, Any], results: Sequence[Result], tables: list[Table]
) -> None:
    """Shows the tables and writes ``tables.md`` and ``results.json``; lists what failed.

    Raises:
      SystemExit: a run failed; the status is 1.
    """
    for table in tables:
        table.show()
    (root / "tables.md").write_text("\n".join(table.to_markdown() for table in tables))
    report = {
        "options": options,
        "groups": [result.to_json() for result in results],
        "tables": [dataclasses.asdict(table) for table in tables],
    }
    (root / "results.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
    print(f"written to {root}: tables.md, results.json, and a folder for each run in cells")
    failures = {name: error for result in results for name, error in result.failures.items()}
    for name, error in failures.items():
        print(f"failed: {name}: {error}", file=sys.stderr)
    if failures:
        raise SystemExit(1)
