import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import pretrain
from experiments.cli import UserError
from experiments.estimators import (
    ConstantNorm,
    Error,
    EstimatorsConfig,
    _kernels,
    main,
    relative_error,
)
from fqt_jax.models import VGG

pytestmark = pytest.mark.usefixtures("relaxed_promotion", "own_folder", "tiny_vgg")


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_bias_and_noise_are_told_apart(rng, bias):
    draws = bias + 2 * rng.standard_normal((1600, 50))
    square = float(np.square(draws).sum(1).mean())
    error = relative_error(draws.reshape(200, 8, 50).mean(1), square, 1600, norm=50**0.5)
    assert error.noise == pytest.approx(2, rel=0.02)
    assert error.bias == pytest.approx(bias, rel=0.1)
    assert 0 < error.least < 0.25


def test_no_deviation_is_no_error():
    assert relative_error(np.zeros((4, 3)), 0.0, 32, norm=1.0) == Error(0.0, 0.0, 0.0)


def test_queries_keys_and_values_are_kernels_of_their_own():
    kernel = np.arange(12.0).reshape(2, 6)
    tree = {
        "attention": {"qkv": {"layer": {"kernel": kernel}, "bias": kernel}},
        "up": {"kernel": kernel},
    }
    found = _kernels(tree)
    assert list(found) == ["attention/q", "attention/k", "attention/v", "up"]
    np.testing.assert_array_equal(found["attention/k"], kernel[:, 2:4])
    np.testing.assert_array_equal(np.concatenate([*found.values()][:3], axis=1), kernel)


def test_text_has_no_labels_to_lay_a_batch_out_by():
    labels = EstimatorsConfig(dataset="pydoc", model="gpt_small").runs()
    assert {"psq1", "fqt1", "one draw"} <= set(labels)
    assert not any("stratified" in label for label in labels)
    assert "one draw, stratified" in EstimatorsConfig().runs()


@pytest.mark.slow
def test_the_experiment_tells_the_biased_estimator(capsys):
    estimators = ("qat", "fqt1_plus:stratify", "top=fqt1:sampler=topk,keep=0.1")
    options = {"limit": 64, "width": 0.25, "batch_size": 16, "images": 16, "epochs": 1}
    main(EstimatorsConfig(**options, estimators=estimators, draws=64, out=pathlib.Path("run")))
    found = json.loads(pathlib.Path("run/errors.json").read_text())
    exact, plus, top = (found[label.partition("=")[0]] for label in estimators)
    assert [error["noise"] for error in exact] == [0.0, 0.0]
    assert all(error["noise"] > 0 and error["bias"] == 0 for error in plus)
    assert all(error["bias"] > 0.8 > error["least"] for error in top)
    text = pathlib.Path("run/tables.md").read_text()
    assert "| qat | 32 |" in text
    assert "| fqt1_plus:stratify | 1 |" in text
    assert "written to run" in capsys.readouterr().out


@pytest.mark.slow
def test_each_layer_is_told_from_a_checkpoint():
    options = {"limit": 64, "model": "vgg_small", "width": 0.25, "batch_size": 16, "epochs": 1}
    pretrain.main(pretrain.PretrainConfig(**options, image_size=16, out=pathlib.Path("start")))
    main(
        EstimatorsConfig(
            **options,
            images=16,
            estimators=("qat", "fqt1"),
            draws=64,
            layers=True,
            checkpoint=pathlib.Path("start"),
            out=pathlib.Path("run"),
        )
    )
    found = json.loads(pathlib.Path("run/errors.json").read_text())
    for exact, fqt1 in zip(found["qat"], found["fqt1"], strict=True):
        assert list(exact["layers"]) == list(fqt1["layers"])
        for layer in exact["layers"].values():
            assert layer["noise"] == 0
            assert layer["largest"] == pytest.approx(1, rel=1e-5)
        # Each kernel counts alike in the error over all of them.
        squares = [layer["noise"] ** 2 for layer in fqt1["layers"].values()]
        assert np.mean(squares) == pytest.approx(fqt1["noise"] ** 2, rel=0.1)
    text = pathlib.Path("run/tables.md").read_text()
    assert "noise-to-signal by layer, epoch 0" in text
    assert "noise-to-signal by layer, epoch 1" in text
    assert json.loads(pathlib.Path("run/config.json").read_text())["checkpoint"] == "start"


@pytest.mark.slow
def test_constant_norms_have_the_values_of_the_batch_and_part_its_samples(rng):
    model = VGG(((8,), (8,)), num_classes=3, in_features=1, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.standard_normal((6, 8, 8, 1)), jnp.float32)
    model.train()
    expected = nnx.clone(model)(x)

    def influence() -> np.ndarray:
        return np.asarray(jax.grad(lambda x: nnx.clone(model)(x)[0].sum())(x))

    assert np.abs(influence()[1:]).max() > 1e-4
    ConstantNorm.take_over_all(model, x)
    model.train()
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(influence()[0]).max() > 0.01
    np.testing.assert_array_equal(influence()[1:], 0)


@pytest.mark.slow
def test_one_draw_has_no_bias_where_samples_do_not_meet():
    options = {"limit": 64, "width": 0.25, "batch_size": 16, "images": 16, "epochs": 1}
    main(
        EstimatorsConfig(
            **options,
            estimators=("qat", "fqt1:one_draw"),
            statistics="constant",
            draws=64,
            out=pathlib.Path("run"),
        )
    )
    found = json.loads(pathlib.Path("run/errors.json").read_text())
    assert all(error["noise"] == 0 for error in found["qat"])
    assert all(error["noise"] > 0.5 and error["bias"] == 0 for error in found["fqt1:one_draw"])
    assert "batch norm's statistics constant" in pathlib.Path("run/tables.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 10}, "draws must be a multiple of 8"),
        ({"images": 1}, "images must be at least 2"),
        ({"estimators": ("full_precision",)}, "'full_precision' must be binary"),
        ({"estimators": ("fqt1:scale=learned",)}, "no parameters of its own"),
        ({"estimators": ()}, "at least one recipe"),
        ({"resume": pathlib.Path("run")}, "cannot resume"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        EstimatorsConfig(**options)
