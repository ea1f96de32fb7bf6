"""Time to accuracy: who reaches what, when, and what is refused; the training is stood in for."""

import json
import pathlib

import pytest

from experiments import time_to_accuracy
from experiments.cli import UserError
from experiments.show.race import Course, plot, tables
from experiments.sweeps.sweep import Result
from experiments.time_to_accuracy import TimeConfig, main

pytestmark = pytest.mark.usefixtures("own_folder")

END = {"full_precision": 99.0, "qat": 97.0, "fqt1": 95.0, "fqt1:one_draw=True": 96.0}
"""Accuracies after the last of two epochs, by variant; after the first, they are 6 points less."""


def fake_results(groups, root, jobs):
    pathlib.Path(root).mkdir(parents=True, exist_ok=True)
    found = []
    for group in groups:
        assert group.base.test_each_epoch
        end = END[group.base.variant]
        histories = {
            seed: [
                {"epoch": 1, "step": 30, "test_accuracy": (end - 6 + seed) / 100},
                {"epoch": 2, "step": 60, "test_accuracy": (end + seed) / 100},
            ]
            for seed in (-1, 0, 1)
        }
        summaries = {
            seed: {"test_accuracy": h[-1]["test_accuracy"]} for seed, h in histories.items()
        }
        found.append(Result(group, 1e-3, {}, summaries, histories, {}))
    return found


def fake_times(request):
    steps = {"jax": 1000.0, "jax_bf16": 500.0, "qat": 800.0, "fqt1": 100.0, "fqt1_one_draw": 50.0}
    return {
        "contenders": {
            name: {"phases": {"total": {"median": steps[name.partition("/")[0]]}}, "first": 4.0}
            for name in request["contenders"]
        }
    }


CONTENDERS = ("jax", "jax_bf16", "qat", "fqt1", "fqt1_one_draw")


def test_the_race_is_told_and_drawn(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(time_to_accuracy, "run_groups", fake_results)
    monkeypatch.setattr(
        time_to_accuracy, "in_process", lambda request: asked.append(request) or fake_times(request)
    )
    config = TimeConfig(models=("vgg_small",), contenders=CONTENDERS, targets=(90,))
    main(config)
    (request,) = asked
    assert request["phases"] == ["total"]
    assert request["contenders"] == [
        "jax",
        "jax_bf16",
        "qat/auto",
        "fqt1/auto",
        "fqt1_one_draw/auto",
    ]
    assert request["setting"] == {
        "model": "vgg_small",
        "width": 0.25,
        "batch_size": 128,
        "image_size": 32,
        "num_classes": 10,
        "in_features": 1,
        "length": 128,
    }
    times, ratios = json.loads((config.out / "results.json").read_text())["tables"]
    assert times["columns"][4:] == ["90 %", "qat's 97.0 %", "at the end, %"]
    rows = {row[0]: row[1:] for row in times["rows"]}
    assert rows["jax"] == ["0.001", "1000", "4.0", "30 (30)", "60 (60)", "99.0"]
    assert rows["jax_bf16"][3:] == ["15 (30)", "30 (60)", "99.0"]
    assert rows["qat"][3:] == ["24 (30)", "48 (60)", "97.0"]
    assert rows["fqt1"][3:] == ["6 (60)", "-", "95.0"]
    assert rows["fqt1_one_draw"][3:] == ["1.5 (30)", "-", "96.0"]
    ratio = {row[0]: row[1:] for row in ratios["rows"]}
    assert ratio == {
        "qat": ["0.62", "0.62"],
        "fqt1": ["2.50", "float alone"],
        "fqt1_one_draw": ["10.00", "float alone"],
    }
    assert (config.out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((config.out / "steps.json").read_text())) == 1
    assert "how many times as fast as the fastest float" in capsys.readouterr().out


def test_one_group_for_all_floats_and_rates_where_none_is_given(monkeypatch):
    seen = []
    monkeypatch.setattr(time_to_accuracy, "in_process", fake_times)
    monkeypatch.setattr(
        time_to_accuracy,
        "run_groups",
        lambda groups, *rest: seen.extend(groups) or fake_results(groups, *rest),
    )
    given = ("a=mnist5k:from_scratch,epochs=2", "b=mnist5k:from_scratch,learning_rate=2e-3")
    main(TimeConfig(models=("vgg_small",), tasks=given, contenders=CONTENDERS, tuning_seeds=2))
    assert [group.base.variant for group in seen] == [*END] * 2
    assert {group.rates for group in seen[:4]} == {(3e-4, 1e-3, 3e-3)}
    assert {group.tuning for group in seen[:4]} == {2}
    assert {(group.rates, group.base.learning_rate) for group in seen[4:]} == {((), 2e-3)}


def test_nobody_finished_or_nobody_is_float():
    none = Course("jax", False, "full_precision", None, 1.0, 2.0, [], [])
    fast = Course("fqt1", True, "fqt1", 1e-3, 0.1, 2.0, [10], [[80.0], [90.0]])
    times, ratios = tables("t", [none, fast], {"85 %": 85.0, "99 %": 99.0})
    assert times.rows == [
        ["jax", "-", "1000", "2.0", "-", "-", "-"],
        ["fqt1", "0.001", "100", "2.0", "1 (10)", "-", "85.0"],
    ]
    assert ratios.rows == [["fqt1", "no float", "-"]]
    plot([("t", [none, fast]), ("nobody", [none])], pathlib.Path("race.png"))
    assert pathlib.Path("race.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contenders": ("fqt2",)}, "unknown contender 'fqt2'; known: torch, "),
        ({"contenders": ("jax", "jax")}, "contenders must be distinct"),
        ({"targets": (0.0,)}, r"targets must be in \(0, 100\] %"),
        ({"baseline": "fqt2"}, "the baseline 'fqt2' is no contender: jax, jax_bf16, qat, "),
        ({"contenders": ("jax",), "baseline": "qat"}, "the baseline 'qat' is no contender: jax"),
        ({"repeats": 0}, "repeats must be at least 1"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        TimeConfig(**changes)


def test_without_pytorch_it_is_left_out_and_refused_before_anything_trains(monkeypatch):
    reason = "PyTorch is left out: it is not installed; pip install 'fqt-jax[bench]'"
    monkeypatch.setattr(time_to_accuracy, "missing", lambda: reason)
    monkeypatch.setattr(time_to_accuracy, "run_groups", lambda *_: pytest.fail("trained"))
    assert not any(name.startswith("torch") for name in TimeConfig().names())
    with pytest.raises(UserError, match="pip install 'fqt-jax"):
        main(TimeConfig(contenders=("torch",)))


def test_what_cannot_be_timed_is_refused_before_it_trains(monkeypatch):
    monkeypatch.setattr(time_to_accuracy, "run_groups", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError, match="with the stem usual for their size"):
        main(TimeConfig(models=("resnet18:stem=imagenet",), contenders=("jax",)))
    with pytest.raises(UserError, match="batch_size is 128, but limit leaves only 100"):
        main(TimeConfig(tasks=("mnist5k:from_scratch,limit=100",), contenders=("jax",)))
    with pytest.raises(ValueError, match="images must be at least 32x32; got 16x16"):
        main(TimeConfig(models=("vgg11",), tasks=("mnist5k:from_scratch",), contenders=("jax",)))
