"""Inference forms and files: the same bits as the model in evaluation."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import warnings
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqt_jax as fqt
from fqt_jax import export
from fqt_jax.frozen import FrozenLayer, FrozenRun, freeze
from fqt_jax.models import VisionTransformer, create_model
from fqt_jax.modules import find_modules

pytestmark = pytest.mark.usefixtures("relaxed_promotion", "own_folder")

THRESHOLDS = dataclasses.replace(fqt.FQT1, threshold="learned", scale="learned")
call = nnx.jit(lambda model, x: model(x))


def images(n=3, size=16, channels=1):
    return jax.random.normal(jax.random.key(7), (n, size, size, channels))


def scramble(model, seed=5):
    """Parameters and statistics of a model that has been trained."""
    leaves, treedef = jax.tree.flatten(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    values = [
        jnp.abs(leaf + 0.3 * jax.random.normal(key, leaf.shape)) + 0.01
        if leaf.ndim == 1
        else leaf + 0.01 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    nnx.update(model, jax.tree.unflatten(treedef, values))
    return model


def quantized(net, recipe=fqt.FQT1, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return scramble(fqt.quantize(net, recipe, **options)[0])


def named(name, recipe=fqt.FQT1, **options):
    net = create_model(name, num_classes=5, in_features=1, width=0.25, rngs=nnx.Rngs(0), **options)
    return quantized(net, recipe)


def relu_net(recipe=THRESHOLDS, implementation=None):
    rngs = nnx.Rngs(0)
    conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
    pool = functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
    net = nnx.Sequential(
        conv(1, 8), nnx.relu, conv(8, 8), nnx.relu, pool, nnx.gelu, conv(8, 8), conv(8, 4)
    )
    return quantized(net, recipe, implementation=implementation)


class Unfused(nnx.Module):
    """Layers that a class calls one by one, of every kind."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.plain = nnx.Conv(8, 8, (3, 3), strides=2, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.row = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.einsum = nnx.Einsum("...d,dk->...k", (8, 6), (6,), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = self.depthwise(self.plain(self.stem(x))).reshape(x.shape[0], -1, 8)
        x = self.einsum(self.attention(self.row(x)))
        return self.head(self.dropout(self.norm(x)))


MODELS = {
    "vgg_small": lambda: named("vgg_small"),
    "resnet18": lambda: named("resnet18", stem="small"),
    "thresholds": lambda: named("vgg_small", THRESHOLDS),
    "relu": relu_net,
    "unscaled": lambda: relu_net(dataclasses.replace(fqt.QAT, scale="none")),
    "xla": lambda: relu_net(implementation="xla"),
    "unfused": lambda: quantized(Unfused(nnx.Rngs(0))),
    "unfused thresholds": lambda: quantized(Unfused(nnx.Rngs(0)), THRESHOLDS),
    "layer norms": lambda: quantized(
        VisionTransformer(
            1, 16, num_classes=3, in_features=1, image_size=(16, 16), rngs=nnx.Rngs(0)
        ),
        THRESHOLDS,
    ),
    "one layer": lambda: scramble(fqt.QuantConv(1, 8, 3, recipe=THRESHOLDS, rngs=nnx.Rngs(0))),
}


LONG = {"resnet18", "unfused", "vgg_small"}
"""Those that take longest to compile."""
LONG_ONNX = [pytest.param((name,), marks=pytest.mark.slow) for name in sorted(LONG)]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in MODELS]
)
def test_a_file_computes_the_same_bits(name):
    model, x = MODELS[name](), images()
    model.eval()
    expected = np.asarray(call(model, x))
    assert np.isfinite(expected).all()
    assert expected.std() > 0
    export.save(model, "model.safetensors", {"name": name})
    loaded = export.load("model.safetensors", MODELS[name])
    found = export.inference(loaded)(x)
    if name == "xla":
        # Without native kernels XLA fuses the two programs as it likes, and rounds accordingly.
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    else:
        np.testing.assert_array_equal(found, expected)
    assert export.describe("model.safetensors") == {"name": name}
    kinds = (FrozenRun, FrozenLayer)
    assert find_modules(loaded, kinds)
    assert not any(place.module.recipe.binary for place in fqt_layers(loaded))


def fqt_layers(model):
    binary = {id(p.module.layer) for p in find_modules(model, FrozenLayer)}
    return [p for p in find_modules(model, fqt.QuantConv) if id(p.module) not in binary]


def test_the_model_stays_as_it_was():
    model = relu_net()
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
    freeze(model)
    for a, b in zip(
        jax.tree.leaves(before), jax.tree.leaves(nnx.state(model, nnx.Param)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert isinstance(model, fqt.Sequential)


@pytest.mark.slow
def test_the_file_of_a_resnet18_is_a_fifteenth_of_float():
    def build():
        net = create_model("resnet18", num_classes=10, in_features=3, rngs=nnx.Rngs(0))
        return fqt.quantize(net, fqt.FQT1)[0]

    model = build()
    floats = 4 * sum(a.size for a in jax.tree.leaves(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    assert export.save(model, "model.safetensors") * 15 < floats


@pytest.mark.parametrize(
    "name", [pytest.param("resnet18", marks=pytest.mark.slow), "unfused thresholds"]
)
def test_a_portable_program_with_any_batch(name):
    model = MODELS[name]()
    program = export.to_stablehlo(model, ("batch", 16, 16, 1), platforms=("cpu", "cuda"))
    model.eval()
    for n in (1, 3):
        x = images(n)
        np.testing.assert_allclose(program.call(x), call(model, x), rtol=1e-4, atol=1e-4)


def spoilt(text: str, about: dict | None = None):
    """A file whose header or bytes are not what was saved."""
    export.save(relu_net(), "good.safetensors")
    data = pathlib.Path("good.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    if text == "truncated":
        data = data[:-100]
    elif text == "noise":
        data = b"\x00" * 40
    elif text == "another format":
        header = json.loads(data[8 : 8 + size])
        header["__metadata__"]["format"] = "theirs"
        new = json.dumps(header).encode()
        data = len(new).to_bytes(8, "little") + new + data[8 + size :]
    pathlib.Path("bad.safetensors").write_bytes(data)
    return "bad.safetensors"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: "missing.safetensors", FileNotFoundError, "missing.safetensors is not there"),
        (lambda: ".", FileNotFoundError, ". is no file"),
        (
            lambda: spoilt("truncated"),
            ValueError,
            "is no safetensors file, or damaged: ",
        ),
        (
            lambda: spoilt("noise"),
            ValueError,
            "is no safetensors file, or damaged: ",
        ),
        (lambda: spoilt("another format"), ValueError, "was not written by fqt_jax.export.save"),
    ],
)
def test_bad_files_are_named(make, error, message):
    with pytest.raises(error, match=message):
        export.load(make(), relu_net)


def test_a_file_of_another_model_is_named():
    export.save(relu_net(), "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors is of another model: .* is missing; "):
        export.load("model.safetensors", MODELS["vgg_small"])
    with pytest.raises(
        ValueError, match=r"of another model: layers.0.bias is float32 .*, not float32"
    ):
        export.load("model.safetensors", lambda: wider())


def wider():
    rngs = nnx.Rngs(0)
    conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
    pool = functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
    net = nnx.Sequential(
        conv(1, 16), nnx.relu, conv(16, 16), nnx.relu, pool, nnx.gelu, conv(16, 16), conv(16, 4)
    )
    return quantized(net, THRESHOLDS)


def test_what_cannot_be_saved_is_named_and_leaves_what_there_was():
    pathlib.Path("model.safetensors").write_text("mine")
    with pytest.raises(ValueError, match="Linear has no quantized layer"):
        export.save(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "model.safetensors")
    model = relu_net()
    model.layers[2].kernel[...] = model.layers[2].kernel[...].at[0].set(jnp.nan)
    with pytest.raises(ValueError, match="layers/2/kernel holds NaN or infinity"):
        export.save(model, "model.safetensors")
    first_step = dataclasses.replace(fqt.QAT_ACTIVATIONS, threshold="learned")
    with pytest.raises(ValueError, match="layers/2 has binary activations but float weights"):
        export.save(relu_net(first_step), "model.safetensors")
    with pytest.raises(FileNotFoundError):
        export.save(relu_net(), "no/such/folder/model.safetensors")
    assert pathlib.Path("model.safetensors").read_text() == "mine"
    assert [path.name for path in pathlib.Path().iterdir()] == ["model.safetensors"]


def in_a_process(code: str) -> str:
    """jax2onnx replaces functions of jax.numpy as it is imported: it has a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(find_spec("jax2onnx") is None, reason="no jax2onnx")
@pytest.mark.parametrize("names", [("relu", "unfused thresholds"), *LONG_ONNX])
def test_an_onnx_file_computes_the_same_to_rounding(names):
    in_a_process(f"""
import json, numpy as np, onnx, onnxruntime
from fqt_jax import export
from tests.test_export import MODELS, call, images
for name in {names!r}:
    model, x = MODELS[name](), images(3)
    model.eval()
    expected = call(model, x)
    size = export.to_onnx(model, "model.onnx", ("B", 16, 16, 1), {{"name": name}})
    session = onnxruntime.InferenceSession("model.onnx")
    for n in (1, 3):
        found, = session.run(None, {{session.get_inputs()[0].name: np.asarray(x[:n])}})
        np.testing.assert_allclose(found, expected[:n], rtol=1e-3, atol=1e-4)
    graph = onnx.load("model.onnx")
    assert json.loads(graph.metadata_props[0].value) == {{"name": name}}
    assert {{opset.domain for opset in graph.opset_import}} <= {{"", "ai.onnx"}}
    types = [tensor.data_type for tensor in graph.graph.initializer]
    assert onnx.TensorProto.INT8 in types or name.startswith("unfused")
""")


def test_onnx_without_its_packages_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'fqt-jax\[onnx\]'"):
        export.to_onnx(MODELS["relu"](), "model.onnx", ("B", 16, 16, 1))
    assert not pathlib.Path("model.onnx").exists()
