"""What a run says of itself while it trains."""

import io
import pathlib
import re
import sys

import pytest

from experiments.finetune import FinetuneConfig
from experiments.runs import finetuning, reporting

LINE = {
    "epoch": 1,
    "step": 3,
    "train_loss": 1.0,
    "train_accuracy": 0.5,
    "validation_loss": 1.0,
    "validation_accuracy": 0.5,
}


def test_images_a_second_leave_out_what_came_before(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: now[0])
    with reporting.Progress(6) as progress:
        progress.count_from_here()
        now[0] = 60.0  # the first step compiles
        progress.step(1, 0, 1.0, 32)
        progress.count_from_here()
        progress.epoch(LINE, 2)
        for done in (2, 3):
            now[0] += 2.0
            progress.step(done, 0, 1.0, 32)
        progress.count_to_here()
        now[0] += 99.0  # validation
        progress.epoch(LINE, 2)
        progress.count_from_here()
        with progress.waiting():
            now[0] += 0.5
        now[0] += 0.5
        progress.step(4, 1, 1.0, 32)
        progress.count_to_here()
        progress.epoch(LINE, 2)
    printed = re.findall(r"(\S+) images/s, (\S+) waiting for them", capsys.readouterr().out)
    assert printed == [("-", "0%"), ("16", "0%"), ("32", "50%")]
    assert progress.wait_fraction == 0.5 / 5.0


def test_a_terminal_shows_each_epoch_above_the_bar(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with reporting.Progress(6) as progress:
        progress.epoch(LINE, 2)
        progress.epoch(LINE | {"epoch": 2, "step": 6}, 2)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())  # without its colours
    line = "loss 1.0000, training accuracy 50.0%, validation accuracy 50.0%, - images/s"
    assert shown.count(line) == 2
    assert f"epoch 2/2: {line}" in shown
    assert "6/6" in shown


@pytest.mark.usefixtures("own_folder", "relaxed_promotion", "tiny_vgg")
@pytest.mark.slow
def test_the_first_step_of_a_run_does_not_count(capsys):
    counted = []

    class Progress(reporting.Progress):
        def count_from_here(self):
            counted.append("from here")
            super().count_from_here()

        def step(self, done, *rest):
            counted.append(done)
            super().step(done, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "Progress", Progress)
        finetuning.main(
            FinetuneConfig(
                model="vgg_small",
                from_scratch=True,
                epochs=2,
                batch_size=8,
                limit=24,
                out=pathlib.Path("run"),
            )
        )
    expected = ["from here", 1, "from here", 2, 3, "from here", 4, 5, 6]
    assert [each for each in counted if each != "from here"] == [1, 2, 3, 4, 5, 6][: counted[-1]]
    assert counted[:4] == expected[:4]
    assert counted.count("from here") == 3
