"""Metrics for TensorBoard, read back, and for Weights & Biases, by a module in its place."""

import json
import pathlib
import struct
import sys
import types

import pytest

from experiments.data import DataError
from experiments.finetune import FinetuneConfig, main
from experiments.runs.config import RunConfig
from experiments.runs.logs import NoLog, check_log, open_log
from tests.experiments.test_finetune import lines, tiny

pytestmark = pytest.mark.usefixtures("relaxed_promotion", "own_folder", "tiny_vgg")

LINE = {"epoch": 1, "step": 3, "train_loss": 0.5, "diagnosis": {"conv/noise": 2.0}}


def test_event_files_hold_the_metrics_and_say_from_where_a_run_goes_on():
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    folder = pathlib.Path("run")
    for step, line in ((0, LINE), (3, LINE | {"step": 6})):
        log = open_log(RunConfig(log="tensorboard"), folder, step)
        log.write(line)
        log.close()
        (path,) = folder.glob("events.out.tfevents.*")
        data, events = path.read_bytes(), []
        while data:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
        values = {
            (value.tag, event.step): value.simple_value
            for event in events
            for value in event.summary.value
        }
        at = line["step"]
        expected = {("epoch", at): 1.0, ("train/loss", at): 0.5, ("diagnosis/conv/noise", at): 2.0}
        assert values == expected
        starts = [event.step for event in events if event.HasField("session_log")]
        assert starts == ([] if step == 0 else [4])
        path.unlink()


def test_a_run_writes_to_weights_and_biases_and_goes_on_there(monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    main(tiny(epochs=2, log="wandb"))
    begun, first, second, test, finish = calls
    assert (begun["name"], begun["config"]["epochs"]) == ("run", 2)
    assert [first[0], second[0], test[0], finish] == [3, 6, 6, "finish"]
    for (_, values), line in zip((first, second), lines("run"), strict=True):
        assert values["validation/loss"] == line["validation_loss"]
    summary = json.loads(pathlib.Path("run/summary.json").read_text())
    assert test[1] == {"test/loss": summary["test_loss"], "test/accuracy": summary["test_accuracy"]}
    pathlib.Path("run/summary.json").unlink()
    calls.clear()
    main(FinetuneConfig(resume=pathlib.Path("run")))
    assert calls[0]["id"] == begun["id"]
    assert calls[1:] == [test, "finish"]


@pytest.mark.parametrize(
    ("kind", "module", "extra"),
    [("tensorboard", "tensorboardX", "logging"), ("wandb", "wandb", "wandb")],
)
def test_a_package_that_is_missing_is_named_before_a_folder_is_made(
    kind, module, extra, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"{module}.*pip install 'fqt-jax\[{extra}\]'"):
        main(tiny(log=kind))
    assert not pathlib.Path("run").exists()
    check_log(RunConfig())
    assert isinstance(open_log(RunConfig(), pathlib.Path(), 0), NoLog)
