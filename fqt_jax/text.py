"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def format_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False
) -> str:
    """Lines of aligned cells under a header.

    Args:
      header: names of the columns.
      rows: as many cells each.
      numbers: align all columns but the first to the right.

    Example:
      >>> print(format_table(("layer", "bits"), [("stem", "32"), ("head", "1")], numbers=True))
      layer  bits
      -----------
      stem     32
      head      1
    """
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first, *texts = (
        "  ".join(
            cell.rjust(width) if numbers and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
    return "\n".join([first, "-" * max(map(len, (first, *texts))), *texts])
