"""One page from any set of runs: tables, curves, and how the runs differ.

    python -m experiments.report runs/tables-embedded runs/finetune-digits-* --out report.html

Takes folders of runs and of sweeps, or folders of those. The page holds all it shows, pictures
included, and reads well in the dark and in print; beside it the tables are written as Markdown and
LaTeX (.md, .tex). What the runs have alike is said once; runs that differ in their seeds alone
make one line, with their number, mean and deviation.
"""

from __future__ import annotations

import dataclasses
import html
import pathlib
from collections.abc import Sequence

import tyro

from experiments import cli
from experiments.reports import pictures as report_pictures
from experiments.reports.runs import Found, Group, differing, group, read
from experiments.runs.folders import write_text
from experiments.show.formats import Table, count, number, show, to_latex, to_markdown

Paths = tyro.conf.Positional[tuple[pathlib.Path, ...]]


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What is reported."""

    runs: Paths
    """Folders of runs and sweeps, or folders that hold them."""
    out: pathlib.Path = pathlib.Path("report.html")
    """The page; it is written anew where there is one."""
    title: str = "1-bit fully quantized training"
    """Its title."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise cli.UserError("name at least one folder of runs.")
        if self.out.suffix != ".html":
            raise cli.UserError(f"out must end in .html; got {self.out}.")


def main(config: ReportConfig) -> None:
    """Runs the command."""
    found = read(config.runs)
    groups = group(found.runs)
    tables = [*result_tables(groups), *found.tables, *difference_tables(groups)]
    if found.damaged:
        tables.append(damaged_table(found))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(config.out, page(config.title, found, groups))
    write_text(config.out.with_suffix(".md"), to_markdown(tables))
    write_text(config.out.with_suffix(".tex"), to_latex(tables))
    show(tables)
    names = [config.out.with_suffix(suffix).name for suffix in (".md", ".tex")]
    print(
        f"{count(len(found.runs), 'run')}, written to {config.out}, and as tables to "
        f"{' and '.join(names)}"
    )


def _tasks(groups: Sequence[Group]) -> dict[str, list[Group]]:
    tasks: dict[str, list[Group]] = {}
    for own in groups:
        tasks.setdefault(own.task, []).append(own)
    return tasks


def result_tables(groups: Sequence[Group]) -> list[Table]:
    """What the runs of each task came to."""
    return [_results(task, own) for task, own in _tasks(groups).items()]


def _results(task: str, groups: Sequence[Group]) -> Table:
    rows, open_runs = [], 0
    for own in groups:
        n = len(own.ended)
        open_runs += len(own.runs) - n
        rows.append(
            [
                own.label,
                str(n),
                str(own.estimate("test_accuracy", 100)),
                str(own.estimate("validation_accuracy", 100)),
                number(own.estimate("gradient_bits").mean if n else None),
                str(own.estimate("step_ms")),
                str(own.estimate("seconds")),
            ]
        )
    columns = ["recipe", "n", "test %", "validation %", "gradient bits", "step ms", "run s"]
    if any("test_bits" in run.summary for own in groups for run in own.ended if run.summary):
        columns.insert(2, "test bits/character")
        for row, own in zip(rows, groups, strict=True):
            row.insert(2, f"{own.estimate('test_bits').mean:.3f}" if own.ended else "-")
    notes = [
        "Gradient bits: an entry, on average. The time of a step is the median of its run; that of "
        "a run is longer where it compiled the steps for others."
    ]
    if open_runs:
        notes.append(f"Left out: {count(open_runs, 'run')} not ended.")
    return Table(f"{task}: mean ± standard deviation over n seeds", columns, rows, notes)


def difference_tables(groups: Sequence[Group]) -> list[Table]:
    """The options in which the groups of each task differ."""
    tables = []
    for task, own in _tasks(groups).items():
        # The recipe stands in the label.
        names = [name for name in differing(one.runs[0] for one in own) if name != "recipe"]
        if names:
            rows = [
                [one.label, *(one.runs[0].options().get(name, "-") for name in names)]
                for one in own
            ]
            tables.append(Table(f"{task}: options that differ", ["runs", *names], rows))
    return tables


def damaged_table(found: Found) -> Table:
    """The runs that were left out, and what is wrong with each."""
    return Table("Runs left out", ["what is wrong"], [[message] for message in found.damaged])


def page(title: str, found: Found, groups: Sequence[Group]) -> str:
    """The page, whole."""
    parts = []
    for (task, own), results in zip(_tasks(groups).items(), result_tables(groups), strict=True):
        parts.append(f"<section><h2>{html.escape(task)}</h2>{_wide(results)}")
        if len(own) > 1 and any(one.ended for one in own):
            parts.append(_figure(report_pictures.accuracies(task, own)))
        if any(run.history for one in own for run in one.runs):
            caption = "Means over the seeds"
            if len(own) <= report_pictures.BANDS:
                caption += "; the band reaches from the least to the greatest"
            caption += "."
            parts.append(_figure(report_pictures.curves(task, own), caption))
        parts += _diagnoses(own)
        parts.append("</section>")
    if found.tables:
        tables = "".join(_wide(table) for table in found.tables)
        parts.append(f"<section><h2>Tables of the sweeps</h2>{tables}</section>")
    if found.damaged:
        parts.append(f"<section><h2>Left out</h2>{_wide(damaged_table(found))}</section>")
    if found.runs:
        parts.append(_options(found, groups))
    body = "\n".join(parts)
    seeds = len({run.config.get("seed") for run in found.runs})
    lead = (
        f"{count(len(found.runs), 'run')} in {count(len(groups), 'group')}, {count(seeds, 'seed')}."
    )
    return _PAGE.format(title=html.escape(title), style=_STYLE, lead=lead, body=body)


def _diagnoses(groups: Sequence[Group]) -> list[str]:
    pictures = []
    for own in groups:
        for run in own.runs[:1]:
            history = [line for line in run.history if "diagnosis" in line]
            if history:
                title = f"{own.task}, {own.label}, seed {run.config['seed']}"
                caption = "Gradients of the quantized layers on one batch, after each epoch."
                pictures.append(_figure(report_pictures.diagnosis(title, history), caption))
    return pictures


def _options(found: Found, groups: Sequence[Group]) -> str:
    differences = "".join(_wide(table) for table in difference_tables(groups))
    names = set(differing(found.runs))
    shared = {k: v for k, v in found.runs[0].options().items() if k not in names}
    rows = [[name, value] for name, value in shared.items()]
    alike = Table("Options that all runs have alike", ["option", "value"], rows, names=2)
    folders = [[one.task, one.label, str(run.folder)] for one in groups for run in one.runs]
    places = Table("Folders of the runs", ["task", "runs", "folder"], folders, names=3)
    layers = "".join(_layers(one) for one in groups)
    return (
        f"<section><h2>Options</h2>{differences}"
        '<details class="options"><summary>What all runs have alike</summary>'
        f"{_wide(alike)}</details>"
        f"<details><summary>Folders</summary>{_wide(places)}</details>{layers}</section>"
    )


def _layers(group: Group) -> str:
    path = group.runs[0].folder / "layers.txt"
    if not path.exists():
        return ""
    name = html.escape(f"{group.task}, {group.label}")
    text = html.escape(path.read_text())
    return f"<details><summary>Layers: {name}</summary><pre>{text}</pre></details>"


def _wide(table: Table) -> str:
    return f'<div class="wide">{table.to_html()}</div>'


def _figure(svg: str, caption: str = "") -> str:
    text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{svg}{text}</figure>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{lead}</p>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { --paper: #ffffff; --ink: #1c1e21; --faint: #62676e; --line: #d9dce0; --band: #f4f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --ink: #e4e6e9; --faint: #9aa0a8; --line: #373b41; --band: #1f2226; }
}
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid var(--line); }
p, figcaption, summary { color: var(--faint); }
.wide { overflow-x: auto; margin: 1rem 0; max-width: 100%; }
.wide p { font-size: .85rem; margin: .3rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
tbody tr:nth-child(even) { background: var(--band); }
/* The names stay where they are while the numbers scroll under them. */
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper);
  white-space: normal; min-width: 8rem; max-width: 60vw; }
tbody tr:nth-child(even) td:first-child { background: var(--band); }
figure { margin: 1rem 0; overflow-x: auto; }
figure svg { display: block; height: auto; min-width: 30rem; }
figcaption { font-size: .85rem; }
summary { cursor: pointer; }
pre { overflow-x: auto; font-size: .8rem; }
@media print {
  :root { --paper: #ffffff; --ink: #000000; --faint: #444444; --line: #bbbbbb; --band: #ffffff; }
  main { max-width: none; padding: 0; }
  table { font-size: .62rem; }
  th, td { padding: .12rem .35rem; }
  .wide, figure { overflow: visible; }
  th:first-child, td:first-child { position: static; max-width: none; }
  figure svg { min-width: 0; }
  .wide, figure { break-inside: avoid; }
  h2 { break-after: avoid; }
  details:not([open], .options) { display: none; }
  details.options::details-content { content-visibility: visible; block-size: auto; }
}
"""

if __name__ == "__main__":
    cli.run(main, ReportConfig)
