"""The report on runs whose folders are written by hand."""

import dataclasses
import json
import pathlib
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from experiments.cli import UserError
from experiments.finetune import FinetuneConfig
from experiments.report import ReportConfig, main
from experiments.reports.runs import group, read
from experiments.show.formats import Table
from experiments.sweeps.sweep import Group, Store, collect
from experiments.sweeps.tables import publish


def write_run(folder: pathlib.Path, test: float | None = 0.9, **options) -> pathlib.Path:
    folder.mkdir(parents=True)
    config = FinetuneConfig(**options)
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    lines = [{"epoch": e, "train_loss": 1.0 / e, "validation_accuracy": 0.1 * e} for e in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if test is not None:
        summary = {
            "seed": config.seed,
            "test_accuracy": test,
            "validation_accuracy": 0.5,
            "validation_loss": 1.0,
            "gradient_bits": 1.0,
            "step_ms": None,
            "seconds": 3.0,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


class Page(HTMLParser):
    """Collects a page's pictures, tables and what it would load from elsewhere."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.outside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.outside += [
            v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith("#")
        ]

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_runs_that_differ_in_their_seeds_alone_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, test in ((0, 0.90), (1, 0.94), (2, None)):
        write_run(tmp_path / f"a/{seed}", test, seed=seed, recipe="fqt1")
    write_run(tmp_path / "b", 0.8, recipe="fqt1", bits=2, learning_rate=0.5)
    write_run(tmp_path / "c", 0.7, dataset="mnist5k", from_scratch=True)
    main(ReportConfig((tmp_path / "a", tmp_path / "b", tmp_path), title="A & B"))
    assert "5 runs, written to report.html" in capsys.readouterr().out
    markdown = pathlib.Path("report.md").read_text()
    assert "| fqt1, learning_rate=- | 2 | 92.0 ± 2.8 | 50.0 ± 0.0 | 1 | - | 3.0 ± 0.0 |" in markdown
    assert "| fqt1:bits=2, learning_rate=0.5 | 1 | 80.0 |" in markdown
    assert "Left out: 1 run not ended." in markdown
    assert r"fqt1:bits=2, learning\_rate=0.5 & 1 & 80.0" in pathlib.Path("report.tex").read_text()
    text = pathlib.Path("report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.outside == []
    style = text.split("<style>")[1].split("</style>")[0]
    assert style.count("{") == style.count("}")
    assert "position: sticky; left: 0; background: var(--paper)" in style
    assert page.tags.count("table") == text.count('<div class="wide"><table>')
    assert "<title>A &amp; B</title>" in text
    # Two groups of digits: accuracies and curves; one of mnist5k: curves.
    assert page.tags.count("svg") == 3
    for start in range(3):
        svg = "<svg" + text.split("<svg")[start + 1].split("</svg>")[0] + "</svg>"
        picture = ET.fromstring(svg)
        labels = " ".join("".join(e.itertext()) for e in picture.iter() if e.tag.endswith("text"))
        assert "(n = " in labels
        assert "accuracy (%)" in labels
    assert "#010203" not in text


def test_of_a_sweep_the_runs_at_the_chosen_rates_count(tmp_path):
    store = Store(tmp_path)
    cells = Group({"recipe": "fqt1"}, FinetuneConfig(), (0, 1), (0.1, 0.2, 0.4))
    for rate, seed in ((0.1, 0), (0.2, 0), (0.4, 0), (0.2, 1)):
        cell = cells.cell(seed, rate)
        write_run(store.folder(cell), seed=seed, learning_rate=rate)
        summary = json.loads((store.folder(cell) / "summary.json").read_text())
        summary["validation_accuracy"] = 1 - abs(rate - 0.2)
        (store.folder(cell) / "summary.json").write_text(json.dumps(summary))
    table = Table("Accuracy", ["recipe", "adam"], [["fqt1", "90"]], ["a note"])
    publish(tmp_path, {}, [collect(cells, store)], [table])
    found = read([tmp_path])
    assert [(r.config["seed"], r.config["learning_rate"]) for r in found.runs] == [
        (0, 0.2),
        (1, 0.2),
    ]
    assert found.tables == [table]
    assert [len(own.runs) for own in group(found.runs)] == [2]


def test_diagnoses_are_drawn(tmp_path):
    folder = write_run(tmp_path / "a")
    line = {
        "epoch": 1,
        "train_loss": 1.0,
        "validation_accuracy": 0.5,
        "diagnosis": {
            "conv/gradient_norm": 1.0,
            "conv/kernel_noise_to_signal": 2.0,
            "conv/samples": 8.0,
            "conv/effective_samples": 4.0,
            "conv/exact_effective_samples": 4.0,
            "conv/input_noise_to_signal": 1.0,
            "conv/weight_noise_to_signal": 1.0,
            "conv/sign_flip_ratio": 0.1,
        },
    }
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    out = tmp_path / "page.html"
    main(ReportConfig((folder,), out=out))
    assert "signal of the weights" in out.read_text()


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="missing is not a folder of runs: it does not exist"):
        read([tmp_path / "missing"])
    with pytest.raises(UserError, match="holds no run"):
        read([tmp_path])
    with pytest.raises(UserError, match=r"must end in \.html"):
        ReportConfig((tmp_path,), out=pathlib.Path("a.txt"))
    with pytest.raises(UserError, match="at least one folder"):
        ReportConfig(())
    for name, text in (("config.json", "[1"), ("summary.json", ""), ("metrics.jsonl", "{")):
        folder = write_run(tmp_path / name)
        (folder / name).write_text(text)
        with pytest.raises(UserError, match=f"{name} is damaged"):
            read([folder])
    folder = write_run(tmp_path / "other")
    (folder / "config.json").write_text('{"seed": 3}')
    with pytest.raises(UserError, match=r"config.json is damaged or no run's"):
        read([folder])


def test_a_damaged_run_is_left_out_and_named(tmp_path, capsys):
    write_run(tmp_path / "a")
    for name in ("b", "c"):
        (write_run(tmp_path / name) / "summary.json").write_text("{")
    out = tmp_path / "page.html"
    main(ReportConfig((tmp_path,), out=out))
    printed = capsys.readouterr().out
    assert "1 run, written to" in printed
    for text in (printed, out.read_text(), out.with_suffix(".md").read_text()):
        for name in ("b", "c"):
            assert f"{tmp_path / name}/summary.json is damaged." in text
    with pytest.raises(UserError, match=r"b/summary.json is damaged. .*c/summary.json is damaged"):
        read([tmp_path / "b", tmp_path / "c"])


def test_what_was_left_open_is_compared_by_what_it_became(tmp_path):
    """By its file, or by the summary; an old run has neither, and a momentum not used."""
    became = {"image_size": 16, "flip": False, "learning_rate": 1e-5, "momentum": None}
    folder = write_run(tmp_path / "file", test=None, seed=1)
    (folder / "resolved.json").write_text(json.dumps(became))
    folder = write_run(tmp_path / "summary", seed=2)
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resolved": became}))
    folder = write_run(tmp_path / "old", seed=3, image_size=16, flip=False, learning_rate=1e-5)
    values = json.loads((folder / "config.json").read_text()) | {"momentum": 0.9}
    (folder / "config.json").write_text(json.dumps(values))
    (own,) = group(read([tmp_path]).runs)
    assert (own.label, len(own.runs)) == ("fqt1", 3)


def test_a_sweep_whose_table_is_damaged_is_named(tmp_path):
    table = {"title": "t", "columns": ["recipe", "adam"], "rows": [["fqt1"]], "notes": []}
    (tmp_path / "results.json").write_text(json.dumps({"groups": [], "tables": [table]}))
    with pytest.raises(UserError, match=r"results\.json is damaged or not of a sweep: row 0 of a"):
        read([tmp_path])


def test_options_of_other_versions_do_not_matter(tmp_path):
    folder = write_run(tmp_path / "a")
    config = dataclasses.asdict(FinetuneConfig()) | {"a_new_option": 3}
    config = {k: v for k, v in config.items() if k not in ("out", "resume", "cache")}
    (folder / "config.json").write_text(json.dumps(config))
    (run,) = read([folder]).runs
    assert run.options()["a_new_option"] == "3"
