import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import cli, gradient_statistics
from experiments.gradient_statistics import StatisticsConfig, main
from fqt_jax import diagnostics
from fqt_jax.diagnostics import COMPARED, MeasuredError
from fqt_jax.models import MODELS

TINY = {
    "dataset": "digits", "image_size": 8, "limit": 80, "batch_size": 32, "epochs": 2, "width": 1.0,
    "diagnosed_images": 16, "passes": 2, "draws": 4, "precision": 10.0,
}  # fmt: skip


class Dense(nnx.Module):
    """One quantized layer between two float ones."""

    def __init__(self, *, num_classes, in_features, width, rngs):
        self.first = nnx.Linear(64 * in_features, 12, rngs=rngs)
        self.middle = nnx.Linear(12, 12, rngs=rngs)
        self.head = nnx.Linear(12, num_classes, rngs=rngs)

    def __call__(self, x):
        return self.head(self.middle(self.first(x.reshape(x.shape[0], -1))))


pytestmark = pytest.mark.usefixtures("relaxed_promotion", "own_folder")


@pytest.fixture(autouse=True)
def _a_model_of_one_quantized_layer(monkeypatch):
    monkeypatch.setitem(MODELS, "vgg_small", Dense)
    few = {name: COMPARED[name] for name in ("psq", "agp_topk/channels")}
    monkeypatch.setattr(diagnostics, "COMPARED", few)


def test_the_experiment_writes_its_folder(capsys):
    main(StatisticsConfig(**TINY, out=pathlib.Path("run")))
    folder = pathlib.Path("run")
    lines = [json.loads(line) for line in (folder / "statistics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert lines[0]["train_loss"] is None
    assert lines[2]["train_loss"] > 0
    layer = "middle"
    for line in lines:
        assert line["diagnosis"][f"{layer}/samples"] == 16
        assert (f"{layer}/sign_flip_ratio" in line["diagnosis"]) == (line["epoch"] > 0)
    errors = json.loads((folder / "errors.json").read_text())
    assert [(row["epoch"], row["quantization"]) for row in errors] == [
        (epoch, name) for epoch in (0, 2) for name in ("psq", "agp_topk/channels")
    ]
    for row in errors:
        assert row["predicted"] == pytest.approx(row["rounding"] + row["mask"] + row["bias"])
        assert row["ratio"] == pytest.approx(1, rel=0.2)
    for name in ("ranges", "lorenz", "over_time", "errors"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "epoch 2/2: loss" in printed
    assert "largest deviation of 4 (2 gradients)" in printed


def test_where_samples_are_tokens_whole_inputs_are_samples_too():
    g = jnp.arange(24.0).reshape(6, 1, 1, 4)
    found = gradient_statistics._compared(g, inputs=2)
    assert list(found) == ["psq", "agp_topk/channels", "psq, whole inputs"]
    whole, quantization = found["psq, whole inputs"]
    assert quantization is COMPARED["psq"]
    np.testing.assert_array_equal(whole[1, :, 0], np.arange(12, 24).reshape(3, 4))
    assert len(gradient_statistics._compared(g, inputs=6)) == 2


def test_draws_are_added_up_to_the_precision(monkeypatch):
    blocks = iter([MeasuredError(10.0, 1.0), *[MeasuredError(11.0, 1.0)] * 99])
    monkeypatch.setattr(diagnostics, "measured_error", lambda *_: next(blocks))
    config = StatisticsConfig(**{**TINY, "precision": 0.05})
    measured, draws = gradient_statistics._measure(
        config, jnp.ones(1), COMPARED["psq"], jax.random.key(0)
    )
    assert draws == 4 * 4  # (1 / 0.5)^2 blocks of 4
    np.testing.assert_allclose(measured, (10.75, 0.5))


def test_bad_options_are_named():
    for bad, message in (
        ({"recipe": "full_precision"}, "binary"),
        ({"draws": 1}, "draws"),
        ({"passes": 0}, "passes"),
        ({"precision": 0.0}, "precision"),
        ({"resume": pathlib.Path("run")}, "resume"),
    ):
        with pytest.raises(cli.UserError, match=message):
            StatisticsConfig(**{**TINY, **bad})
    with pytest.raises(cli.UserError, match=r"only \d+ training images"):
        main(StatisticsConfig(**{**TINY, "diagnosed_images": 5000}))
