"""The paper's protocol as one command, on small files of the true formats."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from experiments import cli
from experiments.finetune import FinetuneConfig, main
from fqt_jax.models import TORCH_MODELS

prepared = pytest.importorskip("tests.experiments.test_prepared")

pytestmark = pytest.mark.usefixtures("relaxed_promotion", "own_folder")

COUNTS = {"train": 40, "validation": 15, "test": 20}


def vgg16_weights(width: float) -> dict[str, np.ndarray]:
    """Random weights of torchvision's VGG16 for ImageNet, that much narrower."""
    rng, shapes, place, inputs = np.random.default_rng(0), {}, 0, 3
    for stage in TORCH_MODELS["vgg16_torch"].args[0]:
        for channels in stage:
            outputs = int(channels * width)
            shapes[f"features.{place}"] = (outputs, inputs, 3, 3)
            place, inputs = place + 2, outputs
        place += 1
    hidden = int(4096 * width)
    sizes = {0: (hidden, 49 * inputs), 3: (hidden, hidden), 6: (1000, hidden)}
    shapes |= {f"classifier.{number}": size for number, size in sizes.items()}
    state = {}
    for name, shape in shapes.items():
        deviation = np.sqrt(2 / np.prod(shape[1:]))
        state[f"{name}.weight"] = rng.normal(0, deviation, shape).astype(np.float32)
        state[f"{name}.bias"] = np.zeros(shape[0], np.float32)
    return state


@pytest.mark.slow
def test_vgg16_is_fine_tuned_on_the_flowers(capsys):
    examples = {s: prepared.examples_of("oxford_flowers102", s, n) for s, n in COUNTS.items()}
    prepared.prepare(pathlib.Path("tfds"), "oxford_flowers102", examples)
    safetensors.numpy.save_file(vgg16_weights(0.125), "vgg16.safetensors")
    command = (
        "--dataset oxford_flowers102 --data-dir tfds --model vgg16_torch --width 0.125 "
        "--weights vgg16.safetensors --recipe fqt1 --threshold learned --optimizer adam "
        "--image-size 32 --batch-size 20 --epochs 2 --out run"
    )
    main(cli.parse(FinetuneConfig, command.split()))
    printed = capsys.readouterr().out
    assert "vgg16.safetensors (30 loaded, 1 new, 0 unused)" in printed
    assert "new: head: classifier.6.weight is [1000, 512], not [102, 512]" in printed
    summary = json.loads(pathlib.Path("run/summary.json").read_text())
    assert (summary["steps"], summary["test_images"]) == (4, 20)
    rows = [
        line.split(maxsplit=3) for line in printed.splitlines() if line.startswith(("feat", "cl"))
    ]
    becomes = {layer: rest for layer, _, _, rest in rows}
    assert becomes.pop("features/layers/0").startswith("float")
    quantized = "binary, threshold learned, 4-bit gradients of 25% (systematic, channels)"
    assert len(becomes) == 12 + 2
    assert all(text.startswith(quantized) for text in becomes.values())
