"""One style of pictures: sizes, colours, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import html
import io
import math
import pathlib
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from cycler import cycler

COLORS = ("#ee7733", "#009988", "#ee3377", "#0077bb", "#33bbee", "#cc3311", "#777777")
"""For whatever is no recipe: Paul Tol's vibrant scheme, told apart by colour-blind readers, on
paper and in the dark."""

_RECIPES = {
    "full_precision": "#777777",
    "qat": "#228833",
    "qat_activations": "#ccbb44",
    "psq1": "#ee6677",
    "fqt1": "#4477aa",
    "fqt1_plus": "#aa3377",
    "one_draw": "#66ccee",
}
"""Paul Tol's bright scheme. One draw has a colour of its own, whatever recipe it draws for."""

_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v")

FORMATS = (".png", ".svg", ".pdf")
"""Endings of the files that :func:`save` writes."""

_INK = "#010203"
"""Black, in a form that :func:`svg` finds again: it leaves the colour of text to the page."""

_STYLE: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "figure.titlesize": 10,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.title_fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 3,
    "errorbar.capsize": 2,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(linestyle=_LINES) * cycler(color=COLORS),
    "grid.alpha": 0.3,
    "savefig.dpi": 130,
    "svg.fonttype": "none",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
}


def recipe_color(variant: str) -> str:
    """The colour of a recipe, the same in every picture.

    Args:
      variant: a recipe's name, with what was changed after a colon, as sweeps write it.

    Example:
      >>> recipe_color("fqt1") == recipe_color("fqt1:bits=2") != recipe_color("fqt1:one_draw")
      True
    """
    name, _, changes = variant.partition(":")
    return _RECIPES.get("one_draw" if "one_draw" in changes else name, _INK)


def recipe_lines(variants: Sequence[str]) -> list[dict[str, Any]]:
    """How to draw a line for each variant: the colour of its recipe, and what tells it from others.

    The recipes themselves come first: their lines are solid.

    Example:
      >>> [line["linestyle"] for line in recipe_lines(["fqt1:bits=2", "fqt1", "qat"])]
      ['--', '-', '-']
    """
    lines: list[dict[str, Any]] = [{} for _ in variants]
    used: dict[str, int] = {}
    for i in sorted(range(len(variants)), key=lambda i: ":" in variants[i]):
        color = recipe_color(variants[i])
        n = used[color] = used.get(color, -1) + 1
        # 4 and 5 have no common divisor: twenty lines of a colour differ.
        lines[i] = {
            "color": color,
            "linestyle": _LINES[n % len(_LINES)],
            "marker": _MARKERS[n % len(_MARKERS)],
        }
    return lines


@contextlib.contextmanager
def figure(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float], title: str = "", **subplots: Any
) -> Iterator[tuple[Any, Any]]:
    """A figure and its grid of axes, in the style that holds until the end of the block.

    Args:
      rows, columns: of the grid, an array ``[rows, columns]``.
      size: width and height in inches.
      title: above all; it is wrapped.
      **subplots: as for :meth:`matplotlib.figure.Figure.subplots`.
    """
    import matplotlib.figure  # late: it takes a second, and most runs that need it train before

    with matplotlib.rc_context(_STYLE):
        made = matplotlib.figure.Figure(figsize=size)
        if title:
            made.suptitle("\n".join(fill(line, int(12 * size[0])) for line in title.split("\n")))
        yield made, made.subplots(rows, columns, squeeze=False, **subplots)


def fill(text: str, width: int) -> str:
    """The text in lines of at most so many characters; no number is broken at its minus."""
    return textwrap.fill(text, width, break_on_hyphens=False)


def whole_ticks(*axes: Any) -> None:
    """Ticks at whole numbers, as for epochs."""
    for each in axes:
        each.xaxis.get_major_locator().set_params(integer=True)


def number_ticks(axis: Any) -> None:
    """Plain numbers on a logarithmic axis, once all is drawn: the fewer, the further it reaches."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    axis.set_major_locator(
        LogLocator(subs=(1, 2, 3, 5, 7) if decades < 1.2 else (1, 2, 5) if decades < 3 else (1,))
    )
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def save(made: Any, path: pathlib.Path) -> None:
    """Writes a picture, in the format of the path's ending, whole or not at all.

    Raises:
      OSError: it cannot be written; what stood there stays.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        made.savefig(partial, format=path.suffix.removeprefix("."))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def svg(made: Any, description: str) -> str:
    """A picture as SVG for a page, which gives it its colours of text and paper.

    Args:
      made: the figure.
      description: what it shows, for those who cannot see it; no two of a page are alike.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": description}):
        metadata = {"Date": None, "Creator": None}
        made.savefig(file, format="svg", transparent=True, metadata=metadata)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    size = re.search(r'width="([\d.]+)pt"', text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(_INK, "currentColor").replace("#000000", "currentColor")
    width = f"{float(size[1]):.0f}pt" if size else "100%"
    label = html.escape(description)
    return text.replace(
        "<svg ", f'<svg role="img" aria-label="{label}" style="width:{width};max-width:100%" ', 1
    )
