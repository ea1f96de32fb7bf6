"""Text: its splits, and runs on it."""

import functools
import json
import math
import pathlib
import re
from pydoc_data import topics

import numpy as np
import pytest

from experiments import estimators, export, gradient_statistics, predict, report
from experiments.cli import UserError
from experiments.data import DataError, Sequences, load, text
from experiments.finetune import FinetuneConfig
from experiments.finetune import main as finetune
from experiments.pretrain import PretrainConfig
from experiments.pretrain import main as pretrain
from fqt_jax.models import GPT, MODELS

TEXTS = topics.topics


def test_tokens_are_characters_and_all_others_are_one():
    tokens = text.encode("Aé\n~\t")
    assert text.decode(tokens) == "A�\n~�"
    assert tokens.dtype == np.uint8
    assert text.encode(text.CHARACTERS).tolist() == list(range(text.NUM_CLASSES - 1))


def test_labels_are_the_characters_after():
    data = load("pydoc", limit=50)
    for split in (data.train, data.validation, data.test):
        assert split.tokens.shape == split.labels.shape
        assert split.shape == (text.LENGTH,)
        np.testing.assert_array_equal(split.tokens[:, 1:], split.labels[:, :-1])
    # A sequence with its next character stands in the text as it is, where it is in one topic.
    whole = [re.sub(r"[^\n -~]", "�", each) for each in TEXTS.values()]
    split = data.train
    found = [
        any(text.decode([*tokens, labels[-1]]) in each for each in whole)
        for tokens, labels in zip(split.tokens, split.labels, strict=True)
    ]
    assert np.mean(found) > 0.8


def test_topics_are_dealt_out_whole_by_their_content():
    held, rest = text.split_topics(TEXTS, 0.2, seed=3)
    assert {**held, **rest} == TEXTS
    assert not set(held) & set(rest)
    part = sum(map(len, held.values())) / sum(map(len, TEXTS.values()))
    assert 0.1 < part <= 0.2
    backwards = dict(reversed(TEXTS.items()))
    assert list(text.split_topics(backwards, 0.2, seed=3)[0]) == list(held)
    assert set(text.split_topics(TEXTS, 0.2, seed=4)[0]) != set(held)


def test_the_test_split_is_the_same_for_each_seed():
    first, second = (load("pydoc", seed=seed) for seed in (0, 1))
    in_order = [sorted(map(bytes, data.test.tokens)) for data in (first, second)]
    assert in_order[0] == in_order[1]
    assert len(first.train) > 6 * len(first.test) > 0
    assert sorted(map(bytes, first.train.tokens)) != sorted(map(bytes, second.train.tokens))
    limited = load("pydoc", limit=7)
    np.testing.assert_array_equal(limited.train.tokens, first.train.tokens[:7])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 8}, "pydoc is text that comes with Python: it takes no image_size"),
        ({"validation_fraction": 1e-6}, "leaves no sequence of 128 characters for the validation"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(DataError, match=message):
        load("pydoc", **options)


def test_sequences_need_labels_of_their_shape():
    with pytest.raises(DataError, match=r"must be \[N, T\]; got \[2, 3\] and \[2, 4\]"):
        Sequences(np.zeros((2, 3), np.uint8), np.zeros((2, 4), np.int32))
    with pytest.raises(DataError, match="a split is empty"):
        Sequences(np.zeros((0, 3), np.uint8), np.zeros((0, 3), np.int32))


@pytest.fixture
def tiny_text(monkeypatch, own_folder, relaxed_promotion):
    monkeypatch.setitem(MODELS, "gpt_small", functools.partial(GPT, 1, 16, length=8))
    monkeypatch.setattr(text, "LENGTH", 8)


TINY = {"dataset": "pydoc", "model": "gpt_small", "limit": 48, "batch_size": 16}


def test_a_run_on_text_is_measured_in_bits_and_reported(tiny_text, capsys):
    run = pathlib.Path("run")
    pretrain(PretrainConfig(**TINY, epochs=2, label_smoothing=0.1, learning_rate=0.02, out=run))
    printed = capsys.readouterr().out
    assert re.search(r"epoch 2/2: .* validation accuracy \S+%, \S+ bits per character,", printed)
    assert re.search(r"test, bits per character +\d\.\d{3}\n", printed)
    assert "sequences/s" in printed
    assert "of 48 sequences" in printed
    summary = json.loads((run / "summary.json").read_text())
    assert summary["samples"] == "sequences"
    assert summary["test_bits"] == pytest.approx(summary["test_loss"] / math.log(2), rel=1e-5)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Bits are those of the labels, without the smoothing.
    assert lines[1]["train_loss"] != pytest.approx(lines[1]["train_bits"] * math.log(2), rel=1e-3)
    assert lines[1]["validation_bits"] < lines[0]["validation_bits"]
    assert "image_size" not in json.loads((run / "resolved.json").read_text())
    binary = (run / "layers.txt").read_text()
    assert len(re.findall(r"^blocks.* binary, float gradients", binary, re.M)) == 4

    report.main(report.ReportConfig((run,)))
    assert f"{summary['test_bits']:.3f}" in pathlib.Path("report.md").read_text()
    assert "test bits/character" in pathlib.Path("report.md").read_text()

    export.main(export.ExportConfig(run, pathlib.Path("gpt.safetensors")))
    assert "bit for bit, on 32 test sequences" in capsys.readouterr().out

    file, texts = pathlib.Path("gpt.safetensors"), []
    for seed in (0, 0, 1):
        options = {"prompt": "for é", "characters": 30, "seed": seed}
        predict.main(predict.PredictConfig(file, **options))
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("for é")
    assert len(texts[0]) == len("for é") + 30 + len("\n")
    assert texts[0] == texts[1] != texts[2]
    with pytest.raises(UserError, match="the model takes text, and no images"):
        predict.main(predict.PredictConfig(file, (pathlib.Path("a.png"),)))


@pytest.mark.slow
def test_a_run_on_text_starts_from_another_and_resumes(tiny_text):
    pretrain(PretrainConfig(**TINY, epochs=1, out=pathlib.Path("start")))
    options = TINY | {"checkpoint": pathlib.Path("start"), "one_draw": True, "learning_rate": 1e-3}
    finetune(FinetuneConfig(**options, epochs=2, diagnose=True, out=pathlib.Path("run")))
    summary = json.loads(pathlib.Path("run/summary.json").read_text())
    assert summary["start"].startswith("start/checkpoints")
    pathlib.Path("run/summary.json").unlink()
    finetune(FinetuneConfig(resume=pathlib.Path("run")))
    again = json.loads(pathlib.Path("run/summary.json").read_text())
    assert again["test_bits"] == summary["test_bits"]


@pytest.mark.slow
def test_gradients_of_text_are_measured(tiny_text):
    out = pathlib.Path("noise")
    options = TINY | {"epochs": 1, "width": 1.0}
    measured = {"estimators": ("psq1", "fqt1:one_draw"), "images": 16, "draws": 16, "layers": True}
    estimators.main(estimators.EstimatorsConfig(**options, **measured, out=out))
    rows = (out / "tables.md").read_text()
    assert "n = 16 sequences" in rows
    assert all(f"| blocks/0/attention/{part} |" in rows for part in "qkv")
    out = pathlib.Path("statistics")
    measured = {"recipe": "fqt1", "diagnosed_images": 4, "draws": 2, "precision": 9.0, "passes": 1}
    gradient_statistics.main(gradient_statistics.StatisticsConfig(**options, **measured, out=out))
    errors = json.loads((out / "errors.json").read_text())
    up = "blocks/0/feed_forward/layers/1"
    found = {row["quantization"]: row["predicted"] for row in errors if row["layer"] == up}
    # One scale for all tokens of a sequence is never less noise than one for each.
    assert found["psq, whole inputs"] > found["psq"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit_small", "lstm", "gru"])
def test_sequence_models_train_on_images(own_folder, relaxed_promotion, model):
    options = {"dataset": "digits", "model": model, "width": 0.05, "limit": 256, "batch_size": 32}
    training = {"recipe": "qat", "epochs": 4, "learning_rate": 5e-3, "from_scratch": True}
    finetune(FinetuneConfig(**options, **training, out=pathlib.Path("run")))
    lines = pathlib.Path("run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train_loss"] for line in lines]
    assert losses[3] < 0.95 * losses[0]
