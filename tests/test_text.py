import pytest

from fqt_jax.text import format_table


def test_names_stand_left_and_numbers_right():
    text = format_table(
        ("study", "recipe", "%"), [("bits", "qat", "97.1"), ("", "psq1", "8.6")], names=2
    )
    assert text == (
        "study  recipe     %\n"
        "-------------------\n"
        "bits   qat     97.1\n"
        "       psq1     8.6"
    )  # fmt: skip


def test_a_table_without_rows_is_its_header():
    assert format_table(("layer", "bits"), []) == "layer  bits\n-----------"


def test_one_column():
    assert format_table(("layer",), [("a",), ("stem/conv",)]) == "layer\n---------\na\nstem/conv"


def test_columns_are_as_wide_as_a_terminal_shows_them():
    # Two wide characters take four places; an accent of its own takes none.
    text = format_table(("name", "n"), [("模型", "1"), ("e\u0301a", "2"), ("ab", "30")])
    assert text.splitlines()[2:] == ["模型   1", "e\u0301a     2", "ab    30"]


@pytest.mark.parametrize(("row", "cells"), [(("a",), 1), (("a", "1", "2"), 3)])
def test_a_row_of_another_length_is_named(row, cells):
    with pytest.raises(
        ValueError, match=rf"row 1 of a table has {cells} cells for 2 columns \(k, n\)"
    ):
        format_table(("k", "n"), [("b", "1"), row])


def test_a_table_has_a_column():
    with pytest.raises(ValueError, match="at least one column"):
        format_table((), [])
