"""The one style of pictures, and the curves drawn in it."""

import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

from experiments.show import style
from experiments.show.curves import Series, compare, curve
from fqt_jax.recipe import RECIPES


def luminance(color: str) -> float:
    """Of a colour, from 0 for black to 1 for white."""
    linear = [((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(color)]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_each_recipe_has_a_colour_of_its_own_that_its_variants_share():
    variants = [*RECIPES, "fqt1:one_draw=True"]
    assert len({style.recipe_color(each) for each in variants}) == len(variants)
    assert style.recipe_color("fqt1:bits=2,keep=1") == style.recipe_color("fqt1")
    assert style.recipe_color("fqt1_plus:one_draw=True") == style.recipe_color("fqt1:one_draw")


@pytest.mark.parametrize("color", [*style.COLORS, *map(style.recipe_color, RECIPES)])
def test_colours_are_seen_on_white_and_in_the_dark(color):
    assert (1.05) / (luminance(color) + 0.05) > 1.9
    assert (luminance(color) + 0.05) / (luminance("#16181b") + 0.05) > 1.9


def test_a_recipe_is_solid_and_its_variants_differ():
    variants = [*(f"fqt1:bits={n}" for n in range(1, 20)), "fqt1", "qat"]
    lines = style.recipe_lines(variants)
    assert lines[-2] == {"color": style.recipe_color("fqt1"), "linestyle": "-", "marker": "o"}
    assert lines[-1] == {"color": style.recipe_color("qat"), "linestyle": "-", "marker": "o"}
    assert len({tuple(line.values()) for line in lines}) == len(variants)


def test_the_style_ends_with_the_picture():
    before = dict(matplotlib.rcParams)
    with style.figure(1, 2, size=(4, 2), title="a " * 60) as (figure, grid):
        assert grid.shape == (1, 2)
        assert matplotlib.rcParams["axes.grid"]
        assert "\n" in figure.get_suptitle()
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(("name", "begin"), [("a.png", b"\x89PNG"), ("a.pdf", b"%PDF")])
def test_a_picture_is_written_in_the_format_of_its_name(name, begin, tmp_path):
    with style.figure(size=(2, 2)) as (figure, _):
        style.save(figure, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begin)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_picture_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    with style.figure(size=(2, 2)) as (figure, _):
        style.save(figure, path)
        before = path.read_bytes()

        def fail(target, **_):
            target.write_bytes(b"half")
            raise OSError("no space")

        monkeypatch.setattr(figure, "savefig", fail)
        with pytest.raises(OSError, match="no space"):
            style.save(figure, path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"]


def test_a_page_gives_the_picture_its_colours():
    with style.figure(size=(2, 2)) as (figure, grid):
        grid[0, 0].set_xlabel("epoch")
        text = style.svg(figure, 'a "<b>"')
    root = ET.fromstring(text)
    assert root.get("aria-label") == 'a "<b>"'
    assert "currentColor" in text
    assert "#010203" not in text
    assert "#ffffff" not in text


def histories(*runs):
    return [[{"loss": value} for value in run] for run in runs]


def test_a_curve_is_the_mean_in_a_band_from_the_least_to_the_most():
    with style.figure(size=(2, 2)) as (_, grid):
        axes = grid[0, 0]
        # The second run was stopped: its mean is over those that got so far.
        curve(axes, histories([1.0, 2.0, 3.0], [3.0, 6.0]), "loss", factor=10)
        np.testing.assert_array_equal(axes.lines[0].get_xdata(), [1, 2, 3])
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), [20, 40, 30])
        (band,) = axes.collections
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
        assert {(1, 10), (1, 30), (2, 20), (2, 60), (3, 30)} <= corners


@pytest.mark.parametrize(
    ("runs", "band"), [(([1.0, 2.0],), True), (([1.0], [2.0]), False), ((), True)]
)
def test_one_run_has_no_band_nor_has_what_asks_for_none(runs, band):
    with style.figure(size=(2, 2)) as (_, grid):
        curve(grid[0, 0], histories(*runs), "loss", "a", band=band)
        assert not grid[0, 0].collections
        assert [line.get_label() for line in grid[0, 0].lines] == ["a"]


@pytest.mark.parametrize("values", [(1.0, 1.1), (0.01, 1e3), (1.0,), ()])
def test_ticks_of_the_loss_are_a_few_plain_numbers(values):
    epochs = [{"train_loss": v, "validation_accuracy": 0.5} for v in values]
    with style.figure(1, 2, size=(6, 3)) as (figure, grid):
        loss, accuracy = grid[0]
        compare(loss, accuracy, [Series("a", [epochs] if epochs else [], {})])
        figure.draw_without_rendering()
        low, high = loss.get_ylim()
        shown = [t.get_text() for t in loss.get_yticklabels() if low <= t.get_position()[1] <= high]
    assert 1 <= len(shown) <= 12
    assert all(float(text) > 0 for text in shown)
