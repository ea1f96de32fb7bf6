"""Estimates and tables, the same on the screen, as Markdown, LaTeX and HTML."""

from __future__ import annotations

import dataclasses
import html
import statistics
import sys
from collections.abc import Sequence
from typing import Literal

import rich.console
import rich.markup
import rich.table


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

    def to_latex(self) -> str:
        """As LaTeX, for the packages booktabs and, in the notes, threeparttable.

        Example:
          >>> print(Table("Accuracy, %", ["recipe", "adam"], [["qat_1", "97.1 ± 0.2"]]).to_latex())
          \\begin{table}
          \\centering
          \\begin{threeparttable}
          \\caption{Accuracy, \\%}
          \\begin{tabular}{lr}
          \\toprule
          recipe & adam \\\\
          \\midrule
          qat\\_1 & 97.1 $\\pm$ 0.2 \\\\
          \\bottomrule
          \\end{tabular}
          \\end{threeparttable}
          \\end{table}
          <BLANKLINE>
        """

        def line(cells: list[str]) -> str:
            return " & ".join(_latex(cell) for cell in cells) + r" \\"

        notes = [rf"\item {_latex(note)}" for note in self.notes]
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                r"\begin{threeparttable}",
                rf"\caption{{{_latex(self.title)}}}",
                rf"\begin{{tabular}}{{{''.join(side[0] for side in self._sides())}}}",
                r"\toprule",
                line(self.columns),
                r"\midrule",
                *(line(row) for row in self.rows),
                r"\bottomrule",
                r"\end{tabular}",
                *([r"\begin{tablenotes}", *notes, r"\end{tablenotes}"] if notes else []),
                r"\end{threeparttable}",
                r"\end{table}",
                "",
            ]
        )

    def _sides(self) -> list[Literal["left", "right"]]:
        """Where each column's cells stand: names on the left, numbers on the right."""
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.columns)
        named = [bool(column) and all(cell[:1].isalpha() for cell in column) for column in columns]
        return ["left" if i == 0 or name else "right" for i, name in enumerate(named)]

    def to_html(self) -> str:
        """As HTML, without style.

        Example:
          >>> Table("a < b", ["x"], [["1"]]).to_html()[:36]
          '<table><caption>a &lt; b</caption><t'
        """

        def line(tag: str, cells: list[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        head = line("th", self.columns)
        body = "".join(line("td", row) for row in self.rows)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        caption = html.escape(self.title)
        return (
            f"<table><caption>{caption}</caption><thead>{head}</thead>"
            f"<tbody>{body}</tbody></table>{notes}"
        )

    def show(self) -> None:
        """On the screen."""
        # Off a terminal nothing says how wide it may be; a table that wraps is hard to read.
        console = rich.console.Console(width=None if sys.stdout.isatty() else 160)
        table = rich.table.Table()
        for column, side in zip(self.columns, self._sides(), strict=True):
            table.add_column(rich.markup.escape(column), justify=side)
        for row in self.rows:
            table.add_row(*(rich.markup.escape(cell) for cell in row))
        console.print(f"\n{rich.markup.escape(self.title)}")
        console.print(table)
        for note in self.notes:
            console.print(rich.markup.escape(note))


def count(n: int, noun: str) -> str:
    """A number of things.

    Example:
      >>> count(1, "seed"), count(2, "seed")
      ('1 seed', '2 seeds')
    """
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "<": r"$<$",
    ">": r"$>$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
