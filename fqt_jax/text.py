"""Tables as plain text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def check_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Checks that rows have as many cells as the header has names.

    Raises:
      ValueError: the header is empty, or a row has more or fewer cells.
    """
    if not header:
        raise ValueError("a table must have at least one column.")
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(
                f"row {i} of a table has {len(row)} cells for {len(header)} columns "
                f"({', '.join(header)}): {list(row)}."
            )


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 1) -> str:
    """Lines of aligned cells under a header.

    Args:
      header: names of the columns.
      rows: as many cells each.
      names: how many columns, the first ones, hold names and stand left; the rest are numbers and
        stand right.

    Raises:
      ValueError: the header is empty, or a row has more or fewer cells.

    Example:
      >>> print(format_table(("layer", "bits"), [("stem", "32"), ("head", "1")]))
      layer  bits
      -----------
      stem     32
      head      1
    """
    check_rows(header, rows)
    lines = [header, *rows]
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]

    def padded(cell: str, column: int) -> str:
        space = " " * (widths[column] - _width(cell))
        return cell + space if column < names else space + cell

    first, *texts = (
        "  ".join(padded(cell, i) for i, cell in enumerate(line)).rstrip() for line in lines
    )
    return "\n".join([first, "-" * max(map(_width, (first, *texts))), *texts])


def _width(text: str) -> int:
    """Places on a terminal: two for a wide character, none for a mark on the one before."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "FW" else 1
        for c in text
    )
