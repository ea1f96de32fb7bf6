"""Weights of PyTorch's networks: the same logits, and what a mismatch says."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import fqt_jax as fqt
from fqt_jax.models import TORCH_MODELS, create_model
from fqt_jax.weights import WeightsError, load

pytestmark = pytest.mark.usefixtures("own_folder", "relaxed_promotion")

FILE = pathlib.Path("w.safetensors")
WIDTH = 0.125
call = nnx.jit(lambda model, x: model(x))


def model_of(name, num_classes=5, width=WIDTH, seed=0, **options):
    return create_model(name, num_classes=num_classes, width=width, rngs=nnx.Rngs(seed), **options)


def torch_twin(name, num_classes=5):
    """The same network in PyTorch, with its names."""
    torch = pytest.importorskip("torch")
    from torch import nn

    def features(channels):
        return max(8, 8 * round(channels * WIDTH / 8))

    if name.startswith("vgg"):
        stages = TORCH_MODELS[name].args[0]
        layers, inputs = [], 3
        for stage in stages:
            for channels in stage:
                layers.append(nn.Conv2d(inputs, features(channels), 3, padding=1))
                inputs = features(channels)
                layers += [nn.BatchNorm2d(inputs)] if "_bn" in name else []
                layers.append(nn.ReLU())
            layers.append(nn.MaxPool2d(2, 2))
        hidden = features(4096)

        class VGG(nn.Module):
            def __init__(self):
                super().__init__()
                self.features = nn.Sequential(*layers)
                self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
                self.classifier = nn.Sequential(
                    nn.Linear(49 * inputs, hidden),
                    nn.ReLU(),
                    nn.Dropout(),
                    nn.Linear(hidden, hidden),
                    nn.ReLU(),
                    nn.Dropout(),
                    nn.Linear(hidden, num_classes),
                )

            def forward(self, x):
                return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))

        return VGG()

    bottleneck = TORCH_MODELS[name].keywords.get("bottleneck", False)

    class Block(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            outputs = 4 * width if bottleneck else width
            shapes = [(1, 1), (3, stride), (1, 1)] if bottleneck else [(3, stride), (3, 1)]
            widths = [inputs, width, width, outputs] if bottleneck else [inputs, width, outputs]
            for i, (size, step) in enumerate(shapes, 1):
                conv = nn.Conv2d(widths[i - 1], widths[i], size, step, size // 2, bias=False)
                setattr(self, f"conv{i}", conv)
                setattr(self, f"bn{i}", nn.BatchNorm2d(widths[i]))
            self.count, self.downsample = len(shapes), None
            if stride != 1 or inputs != outputs:
                conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

        def forward(self, x):
            shortcut = x if self.downsample is None else self.downsample(x)
            for i in range(1, self.count + 1):
                x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))
                x = torch.relu(x) if i < self.count else torch.relu(x + shortcut)
            return x

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            inputs = features(64)
            self.conv1 = nn.Conv2d(3, inputs, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(inputs)
            for stage, depth in enumerate(TORCH_MODELS[name].args[0]):
                width, blocks = features(64 * 2**stage), []
                for i in range(depth):
                    blocks.append(Block(inputs, width, 2 if stage and not i else 1))
                    inputs = 4 * width if bottleneck else width
                setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            self.fc = nn.Linear(inputs, num_classes)

        def forward(self, x):
            x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
            for stage in range(1, 5):
                x = getattr(self, f"layer{stage}")(x)
            return self.fc(x.mean((2, 3)))

    return ResNet()


@pytest.mark.parametrize("name", TORCH_MODELS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_logits_are_those_of_pytorch(name, suffix):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    twin = torch_twin(name)
    with torch.no_grad():
        for key, value in twin.state_dict().items():
            if value.ndim == 1 and value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5 * ("bias" not in key))
    twin.eval()
    size = 64 if name.startswith("resnet") else 96
    x = torch.randn(2, 3, size, size)
    path = pathlib.Path(f"w{suffix}")
    if suffix == ".pth":
        torch.save(twin.state_dict(), path)
    else:
        state = {key: value.numpy() for key, value in twin.state_dict().items()}
        safetensors.numpy.save_file(state, path)
    model = model_of(name)
    loaded = load(model, path)
    assert loaded.table.new == loaded.table.unused == ()
    assert len(loaded.table.loaded) == len(nnx.to_flat_state(nnx.state(model, nnx.Variable))) - len(
        nnx.to_flat_state(nnx.state(model, nnx.RngState))
    )
    model.eval()
    with torch.no_grad():
        expected = twin(x).numpy()
    got = np.asarray(call(model, jnp.asarray(x.numpy().transpose(0, 2, 3, 1))))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def vgg_state(batch_norm: bool, classes=5, width=WIDTH) -> dict[str, np.ndarray]:
    """A VGG-11's weights by PyTorch's names."""
    rng, state, place, inputs = np.random.default_rng(0), {}, 0, 3
    for stage in TORCH_MODELS["vgg11_torch"].args[0]:
        for channels in stage:
            outputs = channels if width == 1 else max(8, 8 * round(channels * width / 8))
            state[f"features.{place}.weight"] = rng.normal(size=(outputs, inputs, 3, 3))
            state[f"features.{place}.bias"] = rng.normal(size=outputs)
            if batch_norm:
                place += 1
                for field in ("weight", "bias", "running_mean", "running_var"):
                    state[f"features.{place}.{field}"] = rng.uniform(0.5, 2, outputs)
                state[f"features.{place}.num_batches_tracked"] = np.array(3)
            place, inputs = place + 2, outputs
        place += 1
    hidden = 4096 if width == 1 else 8 * round(4096 * width / 8)
    for number, (n, o) in {
        0: (49 * inputs, hidden),
        3: (hidden,) * 2,
        6: (hidden, classes),
    }.items():
        state[f"classifier.{number}.weight"] = rng.normal(size=(o, n))
        state[f"classifier.{number}.bias"] = rng.normal(size=o)
    return {name: array.astype(np.float32) for name, array in state.items()}


def save(state: dict[str, np.ndarray]) -> pathlib.Path:
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, FILE)
    return FILE


def test_a_binary_friendly_vgg_takes_convolutions_and_norms():
    state = vgg_state(batch_norm=True)
    model = model_of("vgg11")
    table = load(model, save(state)).table
    kernel, norm = model.features.layers[0].kernel[...], model.features.layers[1]
    np.testing.assert_array_equal(kernel, state["features.0.weight"].transpose(2, 3, 1, 0))
    expected = state["features.1.running_mean"] - state["features.0.bias"]
    np.testing.assert_allclose(norm.mean[...], expected, rtol=1e-6)
    np.testing.assert_array_equal(norm.var[...], state["features.1.running_var"])
    assert len(table.loaded) == 8 * 5
    new = dict(table.new)
    assert "classifier.6.weight is [5, 512], not [5, 64]" in new["head"]
    assert new["features/layers/2/negative_slope"] == "it has no counterpart"
    assert table.unused == tuple(f"classifier.{n}.{f}" for n in (0, 3) for f in ("bias", "weight"))
    text = str(table)
    assert "features/layers/0/kernel" in text
    assert "unused" in text


def test_without_batch_norm_the_norms_are_new():
    state = vgg_state(batch_norm=False)
    model = model_of("vgg11")
    table = load(model, save(state)).table
    np.testing.assert_array_equal(
        model.features.layers[4].kernel[...], state["features.3.weight"].transpose(2, 3, 1, 0)
    )
    assert len(table.loaded) == 8
    assert "features/layers/1/scale" in dict(table.new)


@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_a_binary_friendly_resnet_takes_convolutions(stem):
    source = model_of("resnet18_torch", seed=3)
    state = {"fc.weight": np.zeros((7, 64), np.float32), "fc.bias": np.zeros(7, np.float32)}
    state["conv1.weight"] = np.asarray(source.stem.layers[0].kernel[...]).transpose(3, 2, 0, 1)
    number = 0
    for stage in range(4):
        for i in range(2):
            block = source.blocks[number]
            for conv, place in ((1, 0), (2, 3)):
                kernel = np.asarray(block.body.layers[place].kernel[...])
                state[f"layer{stage + 1}.{i}.conv{conv}.weight"] = kernel.transpose(3, 2, 0, 1)
            if block.shortcut.layers:
                kernel = np.asarray(block.shortcut.layers[0].kernel[...])
                state[f"layer{stage + 1}.{i}.downsample.0.weight"] = kernel.transpose(3, 2, 0, 1)
            number += 1
    model = model_of("resnet18", stem=stem)
    table = load(model, save(state)).table
    np.testing.assert_array_equal(
        model.blocks[2].body.layers[1].kernel[...], source.blocks[2].body.layers[0].kernel[...]
    )
    np.testing.assert_array_equal(
        model.blocks[2].shortcut.layers[1].kernel[...],
        source.blocks[2].shortcut.layers[0].kernel[...],
    )
    new = dict(table.new)
    assert new["head"] == "fc.weight is [7, 64], not [5, 64]"
    assert ("stem/layers/0" in new) == (stem == "small")


def assert_same(model, other):
    for a, b in zip(
        jax.tree.leaves(nnx.state(model, nnx.Param)),
        jax.tree.leaves(nnx.state(other, nnx.Param)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_timm_names_a_vggs_layers_otherwise():
    state = vgg_state(batch_norm=False)
    model, again = model_of("vgg11_torch"), model_of("vgg11_torch", seed=1)
    load(model, save(state))
    renamed = dict(state)
    for number, name in ((0, "pre_logits.fc1"), (3, "pre_logits.fc2"), (6, "head.fc")):
        weight = renamed.pop(f"classifier.{number}.weight")
        if number == 0:
            weight = weight.reshape(weight.shape[0], -1, 7, 7)
        renamed[f"{name}.weight"] = weight[..., None, None] if number == 3 else weight
        renamed[f"{name}.bias"] = renamed.pop(f"classifier.{number}.bias")
    load(again, save(renamed))
    for a, b in zip(
        *(nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (model, again)), strict=True
    ):
        np.testing.assert_array_equal(a[1][...], b[1][...])


def test_keras_vgg_sees_blue_first_and_flattens_rows_first():
    h5py = pytest.importorskip("h5py")
    state = vgg_state(batch_norm=False)
    plain, theirs = model_of("vgg11_torch"), model_of("vgg11_torch", seed=1)
    load(plain, save(state))
    convs = iter(k for k in state if k.startswith("features.") and k.endswith("weight"))
    with h5py.File("w.h5", "w") as file:
        for block, stage in enumerate(TORCH_MODELS["vgg11_torch"].args[0], 1):
            for conv in range(1, len(stage) + 1):
                name, key = f"block{block}_conv{conv}", next(convs)
                kernel = state[key].transpose(2, 3, 1, 0)
                kernel = kernel[:, :, ::-1] if key == "features.0.weight" else kernel
                file[f"{name}/{name}/kernel:0"] = kernel
                file[f"{name}/{name}/bias:0"] = state[key.replace("weight", "bias")]
        for number, name in ((0, "fc1"), (3, "fc2"), (6, "predictions")):
            kernel = state[f"classifier.{number}.weight"].T
            if number == 0:
                kernel = kernel.reshape(-1, 7, 7, kernel.shape[1]).transpose(1, 2, 0, 3)
                kernel = kernel.reshape(-1, kernel.shape[-1])
            file[f"{name}/{name}/kernel:0"] = kernel
            file[f"{name}/{name}/bias:0"] = state[f"classifier.{number}.bias"]
    loaded = load(theirs, "w.h5")
    for a, b in zip(
        *(nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (plain, theirs)), strict=True
    ):
        np.testing.assert_array_equal(a[1][...], b[1][...])
    np.testing.assert_allclose(np.array(loaded.mean) * 255, [123.68, 116.779, 103.939])


def spoilt(**changes) -> dict[str, np.ndarray]:
    state = vgg_state(batch_norm=False)
    for name, value in changes.items():
        name = name.replace("_", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (spoilt(features_0_weight=None), "of another network: features.0.weight is missing"),
        (
            spoilt(features_3_weight=np.zeros((8, 8, 3, 3), np.float32)),
            r"features.3.weight is \[8, 8, 3, 3\], and features/layers/3 takes \[16, 8, 3, 3\]",
        ),
        (spoilt(features_0_bias=np.full(8, np.nan, np.float32)), "features.0.bias holds NaN"),
        ({"conv1.weight": np.zeros(3, np.float32)}, "of another network: features.0.weight is mis"),
    ],
)
def test_a_mismatch_is_named_and_changes_nothing(state, message):
    model = model_of("vgg11_torch")
    before = [np.asarray(v[...]) for _, v in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    with pytest.raises(WeightsError, match=message):
        load(model, save(state))
    after = [np.asarray(v[...]) for _, v in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_models_without_known_names():
    with pytest.raises(WeightsError, match="Linear is of no form that weights are known for"):
        load(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), save(vgg_state(batch_norm=False)))
    with pytest.raises(WeightsError, match="has no weight of this model"):
        load(model_of("vgg11"), save({"conv1.weight": np.zeros(3, np.float32)}))


def test_a_classifier_of_another_size_is_new():
    table = load(model_of("vgg11_torch", num_classes=7), save(vgg_state(batch_norm=False))).table
    assert table.new == (("head", "classifier.6.weight is [5, 512], not [7, 512]"),)


def test_a_loaded_network_converts_and_is_calibrated():
    model = model_of("resnet18_torch")
    with pytest.warns(UserWarning, match="relu returns no negative number"):
        fqt.quantize(model, "fqt1")
    recipe = dataclasses.replace(fqt.FQT1, threshold="calibrated")
    binary, _ = fqt.quantize(model, recipe)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64, 64, 3)), jnp.float32)
    assert all(row.one_sided < row.channels / 2 for row in fqt.calibrate(binary, images))
