import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from experiments import export as exporting
from experiments import predict
from experiments.cli import UserError
from experiments.data import load
from experiments.finetune import FinetuneConfig, main
from fqt_jax import export
from fqt_jax.checkpoints import CheckpointError

pytestmark = pytest.mark.usefixtures("relaxed_promotion", "own_folder", "tiny_vgg")

FILE = pathlib.Path("model.safetensors")


def a_run(**changes) -> pathlib.Path:
    options = {
        "model": "vgg_small",
        "width": 0.25,
        "image_size": 8,
        "limit": 96,
        "batch_size": 32,
        "epochs": 1,
        "learning_rate": 1e-2,
        "from_scratch": True,
        "out": pathlib.Path("run"),
    }
    main(FinetuneConfig(**{**options, **changes}))
    return pathlib.Path("run")


def test_a_run_is_exported_and_its_file_predicts(capsys):
    run = a_run(threshold="learned")
    exporting.main(exporting.ExportConfig(run, FILE))
    assert "the same logits, bit for bit, on 32 test images" in capsys.readouterr().out
    about = export.describe(FILE)
    assert (about["dataset"], about["classes"]) == ("digits", [str(n) for n in range(10)])
    paths = []
    for number, image in enumerate(load("digits", image_size=8, limit=96).test.images[:3]):
        paths.append(pathlib.Path(f"{number}.png"))
        Image.fromarray(image[..., 0]).save(paths[-1])
    Image.open("0.png").convert("RGBA").save("rgba.png")
    predict.main(predict.PredictConfig(FILE, (*paths, pathlib.Path("rgba.png")), top=10))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["image", *(f"{n}." for n in range(1, 11))]
    rows = [line.split() for line in lines[2:]]
    assert [row[0] for row in rows] == ["0.png", "1.png", "2.png", "rgba.png"]
    for row in rows:
        assert sorted(row[1::2]) == about["classes"]
        shares = [float(text.rstrip("%")) for text in row[2::2]]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(100, abs=0.6)
    again = {name: row[1:] for name, *row in rows if name in ("0.png", "rgba.png")}
    assert again["0.png"] == again["rgba.png"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ((".", "m.txt"), UserError, "out must end in .safetensors or .onnx; got m.txt"),
        ((".", "there.safetensors"), UserError, "there.safetensors exists already"),
        ((".", "no/m.safetensors"), UserError, "no is no folder"),
        (("nowhere", "m.safetensors"), CheckpointError, "there is no checkpoint at "),
    ],
)
def test_what_cannot_be_exported_is_named(options, error, message):
    pathlib.Path("there.safetensors").touch()
    run, out = map(pathlib.Path, options)
    with pytest.raises(error, match=message):
        exporting.main(exporting.ExportConfig(run, out))
    assert [path.name for path in pathlib.Path().iterdir()] == ["there.safetensors"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("full_precision", "run is in full precision: it has no signs to pack"),
        ("qat_activations", "run has float weights, the first of two steps: fine-tune it with"),
    ],
)
def test_a_run_with_float_weights_is_not_exported(recipe, message):
    run = a_run(recipe=recipe)
    with pytest.raises(UserError, match=message):
        exporting.main(exporting.ExportConfig(run, FILE))
    assert not FILE.exists()


def file_of(description: dict) -> pathlib.Path:
    import safetensors.numpy

    about = {"format": export.FORMAT, "description": json.dumps(description)}
    safetensors.numpy.save_file({"a": np.zeros(1, np.float32)}, FILE, metadata=about)
    return FILE


GOOD = {
    "model": {"name": "vgg_small", "num_classes": 2, "in_features": 1, "width": 0.25},
    "recipe": {},
    "image_size": [8, 8],
    "mean": [0.0],
    "std": [1.0],
    "classes": ["a", "b"],
}


@pytest.mark.parametrize(
    ("file", "images", "error", "message"),
    [
        (lambda: pathlib.Path("nowhere"), ["i.png"], FileNotFoundError, "nowhere is not there"),
        (lambda: file_of({}), ["i.png"], UserError, "does not say which model it is of"),
        (lambda: file_of(GOOD), ["no.png"], UserError, "no.png: No such file or directory."),
        (lambda: file_of(GOOD), ["text.png"], UserError, "text.png: cannot identify image file"),
        (lambda: file_of(GOOD), ["i.png"], ValueError, "model.safetensors is of another model"),
    ],
)
def test_what_cannot_be_predicted_is_named(file, images, error, message):
    Image.new("L", (8, 8)).save("i.png")
    pathlib.Path("text.png").write_text("no image")
    with pytest.raises(error, match=message):
        predict.main(predict.PredictConfig(file(), tuple(map(pathlib.Path, images))))


def test_a_model_of_images_continues_no_text():
    with pytest.raises(UserError, match="the model takes images, and no text"):
        predict.main(predict.PredictConfig(file_of(GOOD), prompt="a"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": ()}, "name at least one image, or give a --prompt"),
        ({"top": 0}, "top must be at least 1; got 0"),
        ({"prompt": "a"}, "give either images, or a --prompt"),
        ({"temperature": 1.0}, "temperature has no effect on images"),
        ({"seed": 0}, "seed has no effect on images"),
        ({"images": (), "prompt": "a", "top": 3}, "top has no effect on text"),
        ({"images": (), "prompt": ""}, "the prompt must have a character"),
        ({"images": (), "prompt": "a", "characters": 0}, "characters must be at least 1; got 0"),
        ({"images": (), "prompt": "a", "temperature": -1.0}, "temperature must be from 0 on"),
        ({"images": (), "prompt": "a", "seed": -1}, "seed must be from 0"),
    ],
)
def test_options_of_predict_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        predict.PredictConfig(**{"model": FILE, "images": (FILE,), **options})
