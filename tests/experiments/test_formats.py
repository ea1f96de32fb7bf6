"""The one table of the experiments, in all its forms."""

import dataclasses
import json
from html.parser import HTMLParser

import pytest

from experiments.show.formats import Estimate, Table, number, show, spread, to_markdown

EMPTY = Table("t", ["recipe", "adam"], [])
ONE = Table("t", ["recipe"], [["qat"]])
WIDE = Table("Größe", ["名", "%"], [["模型", "97.1 ± 0.2"], ["b", "8"]], ["注"])


def test_a_table_without_rows():
    assert str(EMPTY) == "t\nrecipe  adam\n------------"
    assert EMPTY.to_markdown() == "**t**\n\n| recipe | adam |\n|---|---|\n"
    assert "recipe & adam" in EMPTY.to_latex()
    assert "<tbody></tbody>" in EMPTY.to_html()


def test_one_column():
    assert str(ONE) == "t\nrecipe\n------\nqat"
    assert ONE.to_markdown() == "**t**\n\n| recipe |\n|---|\n| qat |\n"
    assert r"\begin{tabular}{l}" in ONE.to_latex()


def test_wide_characters_stand_under_one_another():
    assert str(WIDE).splitlines() == [
        "Größe",
        "名             %",
        "----------------",
        "模型  97.1 ± 0.2",
        "b              8",
        "注",
    ]
    assert "| 模型 | 97.1 ± 0.2 |" in WIDE.to_markdown()


@pytest.mark.parametrize("row", [["qat"], ["qat", "1", "2"]])
def test_a_row_of_another_length_is_refused_when_the_table_is_made(row):
    with pytest.raises(ValueError, match=rf"row 1 of a table has {len(row)} cells for 2 columns"):
        Table("t", ["recipe", "adam"], [["fqt1", "1"], row])


def test_a_table_has_a_column():
    with pytest.raises(ValueError, match="at least one column"):
        Table("t", [], [])


def test_names_stand_left_in_text_and_latex():
    table = Table("t", ["study", "recipe", "%"], [["bits", "qat", "9"]], names=2)
    assert r"\begin{tabular}{llr}" in table.to_latex()
    assert str(table).endswith("bits   qat     9")


def test_what_means_something_elsewhere_is_escaped():
    table = Table("a_b", ["x|y"], [["<1 & 2>"]])
    assert r"| x\|y |" in table.to_markdown()
    assert r"\caption{a\_b}" in table.to_latex()
    assert r"$<$1 \& 2$>$" in table.to_latex()
    cells = []
    parser = HTMLParser()
    parser.handle_data = cells.append
    parser.feed(table.to_html())
    parser.close()
    assert cells == ["a_b", "x|y", "<1 & 2>"]


def test_a_table_comes_back_from_json():
    assert Table(**json.loads(json.dumps(dataclasses.asdict(WIDE)))) == WIDE
    old = {"title": "t", "columns": ["a", "b"], "rows": [["1", "2"]], "notes": []}
    assert Table(**old).names == 1


def test_tables_are_shown_one_under_the_other(capsys):
    show([ONE, EMPTY])
    assert capsys.readouterr().out == f"\n{ONE}\n\n{EMPTY}\n"
    assert to_markdown([ONE, EMPTY]) == ONE.to_markdown() + "\n" + EMPTY.to_markdown()


def test_numbers_have_one_form():
    assert (number(None, ".2f"), number(0.0, ".2f"), number(12.0)) == ("-", "0.00", "12")
    assert spread(0.12345, 0.00011, ".4f") == "0.1235 ± 0.0001"
    assert str(Estimate.of([1.0, 3.0])) == spread(2.0, 2**0.5)
