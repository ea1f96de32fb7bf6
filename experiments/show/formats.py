"""Numbers and tables, the same on the screen, as Markdown, LaTeX and HTML."""

from __future__ import annotations

import dataclasses
import html
import statistics
from collections.abc import Sequence

from fqt_jax.text import check_rows, format_table


def number(value: float | None, form: str = "g") -> str:
    """A number, or a dash for one that there is not.

    Example:
      >>> number(2.5), number(0.25, ".0%"), number(None)
      ('2.5', '25%', '-')
    """
    return "-" if value is None else format(value, form)


def spread(middle: float, width: float, form: str = ".1f") -> str:
    """A number with its deviation or its error.

    Example:
      >>> spread(81.23, 0.31)
      '81.2 ± 0.3'
    """
    return f"{middle:{form}} ± {width:{form}}"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Mean and standard deviation (of the sample, so n - 1) of ``n`` values.

    Example:
      >>> str(Estimate.of([97.0, 98.0])), str(Estimate.of([97.0])), str(Estimate.of([]))
      ('97.5 ± 0.7', '97.0', '-')
      >>> str(Estimate.of([3.5, 3.75], ".3f"))
      '3.625 ± 0.177'
    """

    mean: float
    deviation: float
    n: int
    form: str = ".1f"

    @classmethod
    def of(cls, values: Sequence[float], form: str = ".1f") -> Estimate:
        """The estimate from some values, and the form in which it is written."""
        n = len(values)
        mean = statistics.fmean(values) if n else float("nan")
        return cls(mean, statistics.stdev(values) if n > 1 else float("nan"), n, form)

    def __str__(self) -> str:
        if self.n == 0:
            return "-"
        if self.n == 1:
            return format(self.mean, self.form)
        return spread(self.mean, self.deviation, self.form)

    def text(self, seeds: int) -> str:
        """With the number of values, where it is not that of the seeds."""
        return str(self) if self.n in (0, seeds) else f"{self} (n = {self.n})"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text, the same in every form; prints as plain text.

    Attributes:
      title: one line above it.
      columns: names of the columns.
      rows: as many cells each.
      notes: lines below it.
      names: how many columns, the first ones, hold names and stand left; the rest are numbers and
        stand right.

    Raises:
      ValueError: there is no column, or a row has more or fewer cells.

    Example:
      >>> print(Table("Accuracy, %", ["recipe", "adam"], [["qat", "97.1"], ["psq1", "8.6"]]))
      Accuracy, %
      recipe  adam
      ------------
      qat     97.1
      psq1     8.6
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = dataclasses.field(default_factory=list)
    names: int = 1

    def __post_init__(self) -> None:
        check_rows(self.columns, self.rows)

    def __str__(self) -> str:
        body = format_table(self.columns, self.rows, names=self.names)
        return "\n".join([self.title, body, *self.notes])

    def to_markdown(self) -> str:
        """As GitHub's Markdown.

        Example:
          >>> print(Table("Accuracy, %", ["recipe", "adam"], [["qat", "97.1"]]).to_markdown())
          **Accuracy, %**
          <BLANKLINE>
          | recipe | adam |
          |---|---|
          | qat | 97.1 |
          <BLANKLINE>
        """

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
        sides = "l" * self.names + "r" * (len(self.columns) - self.names)
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                r"\begin{threeparttable}",
                rf"\caption{{{_latex(self.title)}}}",
                rf"\begin{{tabular}}{{{sides}}}",
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


def show(tables: Sequence[Table]) -> None:
    """Prints tables, an empty line before each."""
    for table in tables:
        print(f"\n{table}")


def to_markdown(tables: Sequence[Table]) -> str:
    """Tables as one page of Markdown."""
    return "\n".join(table.to_markdown() for table in tables)


def to_latex(tables: Sequence[Table]) -> str:
    """Tables as one piece of LaTeX."""
    return "\n".join(table.to_latex() for table in tables)


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
