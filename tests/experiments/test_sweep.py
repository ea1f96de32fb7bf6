"""The machinery of sweeps without training: summaries are written by hand."""

import dataclasses
import json
import pathlib

import matplotlib.figure
import numpy as np
import pytest

from experiments.cli import UserError
from experiments.finetune import FinetuneConfig
from experiments.show.formats import Estimate, Table
from experiments.sweeps.plots import Row, plot_curves, plot_intervals
from experiments.sweeps.run import run_groups
from experiments.sweeps.specs import parse
from experiments.sweeps.sweep import Group, Store, SweepConfig, best_rate, collect, parse_all, plan
from experiments.sweeps.tables import ACCURACY, BITS, score_of
from experiments.tables import mean_gain, pairs


def group(rates=(), seeds=(0, 1), **options) -> Group:
    return Group({"recipe": "fqt1"}, FinetuneConfig(**options), tuple(seeds), tuple(rates))


def finish(store: Store, cell, *, validation=0.5, test=0.5, loss=1.0, **more) -> None:
    folder = store.folder(cell)
    folder.mkdir(parents=True)
    summary = {
        "seed": cell.config.seed,
        "validation_accuracy": validation,
        "validation_loss": loss,
        "test_accuracy": test,
        "gradient_bits": 1.0,
        "step_ms": 2.0,
    } | more
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [{"epoch": e, "train_loss": 1.0 / e, "validation_accuracy": 0.1 * e} for e in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(group: Group, store: Store, quality) -> list[tuple[float | None, int]]:
    """Walks the plan as the worker does; ``quality`` of a rate is None where the run diverges."""
    ran = []
    for cell in plan(group, store):
        if store.settled(cell):
            continue
        rate = cell.config.learning_rate
        value = quality(rate)
        ran.append((rate, cell.config.seed))
        if value is None:
            store.fail(cell, "the loss became nan", diverged=True)
        else:
            finish(store, cell, validation=value)
    return ran


def test_a_grid_is_tried_on_the_first_seed_then_all_seeds_run_at_its_best(tmp_path):
    store, cells = Store(tmp_path), group(rates=(0.1, 0.2, 0.4), seeds=(5, 6))
    ran = run(cells, store, lambda rate: 1 - abs(rate - 0.2))
    assert ran == [(0.1, 5), (0.2, 5), (0.4, 5), (0.2, 6)]
    result = collect(cells, store)
    assert result.rate == 0.2
    assert result.tried == {0.1: 0.9, 0.2: 1.0, 0.4: 0.8}
    assert list(result.summaries) == [5, 6]
    assert result.failures == {}


@pytest.mark.parametrize(
    ("peak", "tried"),
    [
        (0.8, [0.1, 0.2, 0.4, 0.8, 1.6]),
        (100.0, [0.1, 0.2, 0.4, 0.8, 1.6]),
        (0.05, [0.1, 0.2, 0.4, 0.05, 0.025]),
    ],
)
def test_a_grid_grows_while_its_best_rate_lies_on_its_edge(tmp_path, peak, tried):
    store, cells = Store(tmp_path), group(rates=(0.1, 0.2, 0.4), seeds=(0,))
    ran = run(cells, store, lambda rate: -abs(rate - peak))
    assert [rate for rate, _ in ran] == tried


def test_rates_that_diverge_are_never_chosen_and_are_no_failures(tmp_path):
    store, cells = Store(tmp_path), group(rates=(0.1, 1.0), seeds=(0, 1))
    run(cells, store, lambda rate: None if rate >= 1 else 1 - abs(rate - 0.1))
    result = collect(cells, store)
    assert result.rate == 0.1
    assert result.tried == {0.01: 0.91, 0.1: 1.0, 1.0: None}
    assert result.failures == {}


def test_where_all_rates_diverge_there_is_no_result_but_a_reason(tmp_path):
    store, cells = Store(tmp_path), group(rates=(0.1, 1.0), seeds=(0, 1))
    assert run(cells, store, lambda rate: None) == [(0.1, 0), (1.0, 0)]
    result = collect(cells, store)
    assert (result.rate, result.summaries) == (None, {})
    assert set(result.failures.values()) == {"the loss became nan"}
    assert len(result.failures) == 2


def test_equal_accuracies_are_told_apart_by_the_loss(tmp_path):
    store, cells = Store(tmp_path), group(rates=(0.1, 0.2))
    for rate, loss in ((0.1, 0.3), (0.2, 0.4)):
        finish(store, cells.cell(0, rate), loss=loss)
    assert best_rate(cells, (0.1, 0.2), store) == 0.1


TEXT = {"dataset": "pydoc", "model": "gpt_small", "from_scratch": True}


def test_text_is_judged_by_its_bits(tmp_path):
    store, cells = Store(tmp_path), group(rates=(0.1, 0.2), seeds=(0,), **TEXT)
    for rate, accuracy, loss in ((0.1, 0.4, 2.0), (0.2, 0.3, 1.5)):
        cell = cells.cell(0, rate)
        finish(store, cell, validation=accuracy, loss=loss, test_bits=10 * rate)
    finish(store, cells.cell(0, 0.4), validation=0.9, loss=3.0, test_bits=9.0)
    result = collect(cells, store)
    assert result.rate == 0.2
    assert result.tried == pytest.approx(
        {0.1: 2 / np.log(2), 0.2: 1.5 / np.log(2), 0.4: 3 / np.log(2)}
    )
    assert score_of(result) is BITS
    assert str(BITS.of(result)) == "2.000"
    other = dataclasses.replace(result, summaries={0: {"test_bits": 2.25}})
    assert BITS.gains(result, other) == {0: 0.25}  # fewer bits are better
    gain = mean_gain({("a", "m", "x"): result, ("a", "m", "y"): other}, [("a", "m")], "x", "y")
    assert str(gain) == "0.250"
    assert score_of(collect(group(), store)) is ACCURACY


@pytest.mark.parametrize(
    ("datasets", "models", "alone"),
    [
        (["pydoc", "digits"], ["lstm"], "pydoc goes with none of lstm"),
        (["a=digits"], ["lstm", "b=gpt_small"], "b goes with none of a"),
    ],
)
def test_a_task_is_data_and_a_model_that_takes_them(datasets, models, alone):
    with pytest.raises(UserError, match=alone):
        pairs(parse_all("dataset", datasets), parse_all("model", models))


def test_a_cells_name_follows_from_its_options_alone():
    base = group()
    name = base.cell(0).name
    assert name == Group({"recipe": "other label"}, base.base, (0, 7)).cell(0).name
    assert name == group(cache=pathlib.Path("elsewhere"), data_dir=pathlib.Path("x")).cell(0).name
    others = [group(bits=2).cell(0), base.cell(1), base.cell(0, 0.5), group(epochs=3).cell(0)]
    assert len({name, *(cell.name for cell in others)}) == 5
    assert base.cell(0, 0.5).config.build_optimizer().rates() == (0.5, 0.5)


def test_a_group_survives_a_round_trip_through_json():
    first = group(rates=(0.1,), checkpoint=pathlib.Path("a"), one_draw=True)
    assert Group.from_json(json.loads(json.dumps(first.to_json()))) == first


def test_failures_are_tried_again_unless_they_diverged(tmp_path):
    store, cell = Store(tmp_path), group().cell(0)
    assert not store.settled(cell)
    store.fail(cell, "disk\nfull")
    assert not store.settled(cell)
    assert collect(group(), store).failures[cell.name] == "disk full"
    store.fail(cell, "nan", diverged=True)
    assert store.settled(cell)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("summary.json", "{"),
        ("summary.json", "[]"),
        ("summary.json", "{}"),
        ("summary.json", '{"validation_accuracy": "high"}'),
        ("failure.json", ""),
        ("failure.json", '{"error": "it failed"}'),
        ("metrics.jsonl", '{"epoch": 1'),
        ("metrics.jsonl", "1"),
        ("metrics.jsonl", None),
    ],
)
def test_a_damaged_file_of_a_cell_is_named_before_anything_runs(name, text, tmp_path):
    store, cell = Store(tmp_path), group().cell(0)
    finish(store, cell)
    store.check(cell)
    path = store.folder(cell) / name
    path.unlink(missing_ok=True) if text is None else path.write_text(text)
    message = rf"{path} is damaged: remove its folder to run that cell again\.$"
    with pytest.raises(UserError, match=message):
        store.check(cell)
    with pytest.raises(UserError, match=message):
        run_groups([group()], tmp_path, 1)
    assert not (tmp_path / "logs").exists()


def results(tmp_path, *accuracies):
    """One result for each list of test accuracies."""
    found = []
    for i, values in enumerate(accuracies):
        store, own = Store(tmp_path / str(i)), group(seeds=range(len(values)))
        for seed, value in enumerate(values):
            if value is not None:
                finish(store, own.cell(seed), test=value)
        found.append(collect(own, store))
    return found


def test_means_and_deviations_over_seeds(tmp_path):
    high, low = results(tmp_path, [0.9, 0.8, 0.7], [0.5, None, 0.6])
    assert str(ACCURACY.of(high)) == "80.0 ± 10.0"
    assert ACCURACY.of(low).text(3) == "55.0 ± 7.1 (n = 2)"
    assert ACCURACY.of(results(tmp_path / "x", [None])[0]).text(3) == "-"
    assert ACCURACY.gains(high, low) == pytest.approx({0: 40.0, 2: 10.0})


def test_gains_are_means_over_tasks_with_deviations_over_seeds(tmp_path):
    a, a0, b, b0 = results(tmp_path, [0.9, 0.8], [0.5, 0.6], [0.7, 0.9], [0.6, 0.5])
    found = {
        ("a", "m", "new"): a,
        ("a", "m", "old"): a0,
        ("b", "m", "new"): b,
        ("b", "m", "old"): b0,
    }
    gain = mean_gain(found, [("a", "m"), ("b", "m")], "new", "old")
    assert gain.mean == pytest.approx((25 + 30) / 2)  # seeds: (40 + 10) / 2 and (20 + 40) / 2
    assert gain.deviation == pytest.approx(abs(25 - 30) / 2**0.5)
    assert mean_gain(found, [("a", "m")], "old", "new", -1).mean == pytest.approx(30)
    assert mean_gain(found, [], "new", "old").n == 0


def test_markdown_escapes_what_would_end_a_cell():
    text = Table("t", ["a|b"], [["1|2"]], ["note"]).to_markdown()
    assert text == "**t**\n\n| a\\|b |\n|---|\n| 1\\|2 |\n\nnote\n"


def drawn(monkeypatch) -> list:
    """The axes of every picture that is saved from now on."""
    figures: list = []
    save = matplotlib.figure.Figure.savefig

    def note(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", note)
    return figures


def row(group: str, name: str, *errors: float, **columns: str) -> Row:
    return Row(group, name, Estimate.of(errors), "fqt1", columns)


def test_rows_stand_in_their_groups_by_error_with_their_intervals(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    rows = [
        row("bits", "one", 10.0, 20.0, cost="1"),
        row("keep", "half", 4.0, 6.0, cost="2"),
        row("bits", "none"),
        row("bits", "four", 4.0, 6.0, cost="4"),
        row("keep", "all", 3.0),
    ]
    plot_intervals(rows, "title", tmp_path / "a.png", reference="four")
    (axes,) = figures[0].axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["bits", "four", "one", "none", "keep", "all", "half"]
    heights = dict(zip(labels, axes.get_yticks(), strict=True))
    assert list(heights.values()) == [6, 5, 4, 3, 2, 1, 0]  # from the top
    points = {container[0].get_ydata()[0]: container for container in axes.containers}
    assert {h: float(c[0].get_xdata()[0]) for h, c in points.items()} == {5: 5, 4: 15, 1: 3, 0: 5}
    (whisker,) = points[heights["four"]][2][0].get_segments()
    np.testing.assert_allclose(whisker[:, 0], [5 - 2**0.5, 5 + 2**0.5])
    assert points[heights["all"]][2] == ()  # of one seed there is no deviation
    beside = {(getattr(t, "xy", t.get_position())[1], t.get_text()) for t in axes.texts}
    named = {(heights["four"], "4"), (heights["one"], "1"), (heights["half"], "2")}
    assert beside >= named | {(heights["none"], "no run finished")}


def test_an_error_of_zero_and_a_wide_deviation_stay_on_a_logarithmic_axis(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    rows = [row("a", "perfect", 0.0, 0.0), row("a", "wide", 0.0, 10.0)]
    plot_intervals(rows, "title", tmp_path / "a.png")
    (axes,) = figures[0].axes
    for container in axes.containers:
        lines = [
            container[0].get_xdata()[0],
            *(s[0] for b in container[2] for s in b.get_segments()[0]),
        ]
        assert min(lines) > 0


def test_a_picture_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        plot_intervals([], "title", tmp_path / "a.png")


def test_curves_are_drawn_with_missing_results_too(tmp_path):
    good, part, none = results(tmp_path, [0.9, 0.8], [0.5, None], [None, None])
    named = [("good", good), ("part", part), ("none", none)]
    plot_curves([("left", named), ("right", named[:1])], "title", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ()}, "models must name one"),
        ({"seeds": ()}, "seeds must be distinct"),
        ({"seeds": (1, 1)}, "seeds must be distinct"),
        ({"jobs": 0}, "jobs must be at least 1"),
        ({"implementation": "cuda"}, "unknown implementation 'cuda'"),
    ],
)
def test_bad_options_of_sweeps_are_named(options, message):
    with pytest.raises((UserError, ValueError), match=message):
        SweepConfig(**options)


@pytest.mark.parametrize(
    ("recipe", "rates", "message"),
    [
        ("fqt2", (), "unknown recipe 'fqt2'"),
        ("fqt1:bits=9", (), "bits must be an integer from 1 to 8"),
        ("qat:bits=2", (), "does not quantize gradients: bits"),
        ("psq1:one_draw", (), "'psq1' prunes nothing: one_draw cannot be set"),
        ("fqt1:groups=sample", (), "set prune='shared'"),
        ("fqt1", (0.0,), "rates must be positive"),
        ("fqt1", (float("nan"),), "rates must be positive"),
    ],
)
def test_bad_groups_are_refused_before_anything_runs(recipe, rates, message):
    points = {"dataset": parse("dataset", "digits"), "recipe": parse("recipe", recipe)}
    with pytest.raises((UserError, ValueError), match=message):
        SweepConfig().group(points, rates)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [("imagenet", "unknown data set 'imagenet'; known: mnist5k"), ("cifar10", "needs a start")],
)
def test_data_sets_are_checked_before_anything_runs(dataset, message):
    with pytest.raises(UserError, match=message):
        SweepConfig().group({"dataset": parse("dataset", dataset)})
    if dataset == "cifar10":
        SweepConfig().group({"dataset": parse("dataset", "cifar10:from_scratch")})


def test_groups_share_one_pretraining_over_seeds():
    made = SweepConfig(seeds=(3, 4)).group({"recipe": parse("recipe", "fqt1")})
    assert {made.cell(seed).config.pretrain_seed for seed in made.seeds} == {0}


def test_an_axis_has_each_point_once():
    with pytest.raises(UserError, match="each once; got qat, qat"):
        parse_all("recipe", ["qat", "qat"])
    with pytest.raises(UserError, match="at least one recipe"):
        parse_all("recipe", [])


def test_runs_that_differ_in_values_alone_share_their_steps():
    base = FinetuneConfig(learning_rate=0.1)
    same = {"seed": 4, "learning_rate": 0.5, "from_scratch": True, "pretrain_seed": 3}
    for name, value in same.items():
        assert dataclasses.replace(base, **{name: value}).compiled() == base.compiled(), name
    other = {"head_learning_rate": 0.5, "bits": 2, "epochs": 7, "one_draw": True, "clip_norm": 0.5}
    for name, value in other.items():
        assert dataclasses.replace(base, **{name: value}).compiled() != base.compiled(), name


def test_rates_can_be_tuned_on_several_seeds(tmp_path):
    store, cells = Store(tmp_path), dataclasses.replace(group((0.1, 0.2, 0.4), (5, 6, 7)), tuning=2)
    # By the first seed alone it would be 0.1; 0.4 is best for both but failed once.
    quality = {
        (0.1, 5): 0.8,
        (0.1, 6): 0.2,
        (0.2, 5): 0.7,
        (0.2, 6): 0.6,
        (0.4, 5): 0.9,
        (0.4, 6): None,
        (0.2, 7): 0.1,
    }
    for cell in plan(cells, store):
        value = quality[cell.config.learning_rate, cell.config.seed]
        if value is None:
            store.fail(cell, "the loss became nan", diverged=True)
        elif not store.settled(cell):
            finish(store, cell, validation=value)
    result = collect(cells, store)
    assert result.rate == 0.2
    assert result.tried == {0.1: 0.5, 0.2: pytest.approx(0.65), 0.4: None}
    assert list(result.summaries) == [5, 6, 7]
    assert result.failures == {}
    assert Group.from_json(cells.to_json()) == cells


@pytest.mark.parametrize("tuning", [0, 3])
def test_there_must_be_seeds_to_tune_on(tuning):
    with pytest.raises(UserError, match="tuned on 1 to 2 seeds"):
        dataclasses.replace(group((0.1,), (5, 6)), tuning=tuning)
