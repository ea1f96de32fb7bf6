"""Weights of Keras' ResNet50: the logits of a NumPy network of its architecture, and mismatches."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fqt_jax.models import create_model
from fqt_jax.weights import WeightsError, load

h5py = pytest.importorskip("h5py")

pytestmark = pytest.mark.usefixtures("own_folder", "relaxed_promotion")

FILE = pathlib.Path("w.h5")
DEPTHS = (3, 4, 6, 3)
CLASSES = 5


def model_of(name, num_classes=CLASSES):
    return create_model(name, num_classes=num_classes, width=0.125, rngs=nnx.Rngs(0))


def blocks():
    """The residual blocks: name, input channels, inner channels, stride."""
    inputs = 8
    for stage, depth in enumerate(DEPTHS):
        for block in range(depth):
            yield (
                f"conv{stage + 2}_block{block + 1}",
                inputs,
                8 * 2**stage,
                1 + (stage and not block),
            )
            inputs = 4 * 8 * 2**stage


def weights() -> dict[str, np.ndarray]:
    """Random weights by Keras' names."""
    rng, arrays = np.random.default_rng(0), {}

    def convolution(name, size, inputs, outputs):
        kernel = rng.normal(size=(size, size, inputs, outputs)) / size / np.sqrt(inputs)
        arrays[f"{name}_conv/kernel"] = kernel
        arrays[f"{name}_conv/bias"] = rng.normal(size=outputs)
        arrays[f"{name}_bn/moving_mean"] = rng.normal(size=outputs)
        for field in ("gamma", "beta", "moving_variance"):
            arrays[f"{name}_bn/{field}"] = rng.uniform(0.2, 1, outputs)

    convolution("conv1", 7, 3, 8)
    for name, inputs, width, stride in blocks():
        if stride == 2 or inputs != 4 * width:
            convolution(f"{name}_0", 1, inputs, 4 * width)
        convolution(f"{name}_1", 1, inputs, width)
        convolution(f"{name}_2", 3, width, width)
        convolution(f"{name}_3", 1, width, 4 * width)
    arrays["predictions/kernel"] = rng.normal(size=(256, CLASSES))
    arrays["predictions/bias"] = rng.normal(size=CLASSES)
    return arrays


def save(arrays: dict[str, np.ndarray]) -> pathlib.Path:
    with h5py.File(FILE, "w") as file:
        for name, array in arrays.items():
            layer, field = name.split("/")
            file[f"{layer}/{layer}/{field}:0"] = array.astype(np.float32)
    return FILE


def logits(arrays: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """Keras' ResNet50 in NumPy, for images with blue first."""

    def windows(x, size, stride):
        view = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
        return view[:, ::stride, ::stride]

    def normed(x, name, stride=1, pad=0):
        kernel = arrays[f"{name}_conv/kernel"]
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        x = np.einsum("nhwcij,ijco->nhwo", windows(x, len(kernel), stride), kernel, optimize=True)
        x = x + arrays[f"{name}_conv/bias"] - arrays[f"{name}_bn/moving_mean"]
        x = x / np.sqrt(arrays[f"{name}_bn/moving_variance"] + 1.001e-5)
        return x * arrays[f"{name}_bn/gamma"] + arrays[f"{name}_bn/beta"]

    x = np.maximum(normed(images, "conv1", stride=2, pad=3), 0)
    x = windows(np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 3, 2).max((-2, -1))
    for name, _, _, stride in blocks():
        shortcut = normed(x, f"{name}_0", stride) if f"{name}_0_conv/kernel" in arrays else x
        x = np.maximum(normed(x, f"{name}_1", stride), 0)
        x = np.maximum(normed(x, f"{name}_2", pad=1), 0)
        x = np.maximum(normed(x, f"{name}_3") + shortcut, 0)
    return x.mean((1, 2)) @ arrays["predictions/kernel"] + arrays["predictions/bias"]


def test_logits_are_those_of_keras():
    arrays, model = weights(), model_of("resnet50_keras")
    loaded = load(model, save(arrays))
    assert loaded.table.new == loaded.table.unused == ()
    assert len(loaded.table.loaded) == len(
        nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    )
    np.testing.assert_allclose(np.array(loaded.mean) * 255, [123.68, 116.779, 103.939])
    norms = [each for _, each in nnx.iter_graph(model) if isinstance(each, nnx.BatchNorm)]
    assert {norm.epsilon for norm in norms} == {1.001e-5}
    model.eval()
    images = np.random.default_rng(1).normal(size=(2, 66, 64, 3))
    expected = logits(arrays, images[..., ::-1])
    got = nnx.jit(lambda model, x: model(x))(model, jnp.asarray(images, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_older_names_another_number_of_classes_and_a_binary_friendly_network():
    arrays = weights()
    for field in ("kernel", "bias"):
        arrays[f"probs/{field}"] = arrays.pop(f"predictions/{field}")
    table = load(model_of("resnet50_keras", num_classes=7), save(arrays)).table
    assert table.new == (("head", "fc.weight is [5, 256], not [7, 256]"),)
    model = model_of("resnet50")
    table = load(model, FILE).table
    assert ("blocks/3/body/layers/1/kernel", "layer2.0.conv1.weight") in table.loaded
    np.testing.assert_array_equal(
        model.blocks[3].body.layers[1].kernel[...],
        arrays["conv3_block1_1_conv/kernel"].astype(np.float32),
    )


def without(name):
    return {key: array for key, array in weights().items() if key != name}


@pytest.mark.parametrize(
    ("name", "arrays", "message"),
    [
        ("resnet50_torch", weights(), r"w\.h5 is a ResNet of Keras, .*: load it into resnet50_ker"),
        ("resnet50_keras", {"conv1/weight": np.zeros(3)}, r"w\.h5 is not a ResNet of Keras, .*tor"),
        (
            "resnet50_keras",
            without("conv1_bn/gamma"),
            "no ResNet .v1. of Keras: it has no conv1_bn",
        ),
        ("resnet50_keras", without("conv4_block2_2_conv/bias"), "has no conv4_block2_2_conv/bias"),
        ("resnet50_keras", without("conv2_block1_3_conv/kernel"), "layer1.0.conv3.weight is missi"),
    ],
)
def test_a_mismatch_is_named(name, arrays, message):
    with pytest.raises(WeightsError, match=message):
        load(model_of(name), save(arrays))
