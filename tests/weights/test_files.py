import pathlib
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from fqt_jax.weights import WeightsError, read
from tests.weights import saved

pytestmark = pytest.mark.usefixtures("own_folder")

FILE = pathlib.Path("weights.pth")
A = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8]
)
def test_tensors_of_every_type(dtype):
    saved.save(FILE, {"a": A.astype(dtype), "b": np.ones((), dtype)})
    found = read(FILE)
    assert {name: array.dtype for name, array in found.items()} == dict.fromkeys("ab", dtype)
    np.testing.assert_array_equal(found["a"], A.astype(dtype))
    assert found["b"].shape == ()


def test_views_of_one_storage():
    flat = np.arange(24, dtype=np.float32)
    views = {
        "turned": saved.tensor(flat, "0", size=(4, 6), stride=(1, 4)),
        "part": saved.tensor(flat, "0", size=(2, 3), stride=(6, 2), offset=5),
        "same": saved.tensor(flat, "0", size=(3, 2), stride=(0, 1)),
        "empty": saved.tensor(flat, "0", size=(0, 5), stride=(5, 1)),
    }
    saved.write(FILE, views, {"0": flat})
    found = read(FILE)
    np.testing.assert_array_equal(found["turned"], flat.reshape(6, 4).T)
    np.testing.assert_array_equal(found["part"], [[5, 7, 9], [11, 13, 15]])
    np.testing.assert_array_equal(found["same"], [[0, 1]] * 3)
    assert found["empty"].shape == (0, 5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"epoch": 3, "state_dict": weights, "best": 0.5},
        lambda weights: {"model": {f"module.{name}": a for name, a in weights.items()}},
    ],
)
def test_wrappers_and_prefixes_are_taken_off(wrap):
    saved.save(FILE, {"conv.weight": A, "conv.bias": A[0, 0]}, wrap)
    assert list(read(FILE)) == ["conv.weight", "conv.bias"]


def test_safetensors_with_half_precision():
    path = pathlib.Path("w.safetensors")
    half = A.astype(ml_dtypes.bfloat16)
    safetensors.numpy.save_file({"a": A, "b": A.astype(np.float16)}, path)
    assert {name: a.dtype.name for name, a in read(path).items()} == {
        "a": "float32",
        "b": "float16",
    }
    header = b'{"h":{"dtype":"BF16","shape":[2,3,4],"data_offsets":[0,48]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + half.tobytes())
    np.testing.assert_array_equal(read(path)["h"], half)


def test_keras_names():
    h5py = pytest.importorskip("h5py")
    with h5py.File("w.h5", "w") as file:
        file["model_weights/fc1/fc1/kernel:0"] = A
        file["model_weights/fc1/fc1/bias:0"] = A[0, 0]
    assert set(read("w.h5")) == {"fc1/kernel", "fc1/bias"}


HARMFUL = [
    ("os", "system", "touch harmed"),
    ("posix", "system", "touch harmed"),
    ("builtins", "eval", "open('harmed', 'w')"),
    ("builtins", "exec", "open('harmed', 'w')"),
    ("builtins", "getattr", "a", "b"),
    ("subprocess", "Popen", "touch harmed"),
    ("torch", "load", "x"),
    ("torch._utils", "_rebuild_sparse_tensor", 1),
    ("collections", "namedtuple", "a", "b"),
]


@pytest.mark.parametrize("call", HARMFUL, ids=lambda call: ".".join(call[:2]))
def test_no_code_is_executed(call):
    saved.write(FILE, {"a": saved.call_of(*call)}, {})
    with pytest.raises(WeightsError, match=rf"weights.pth cannot be read: .*{call[1]}.*refused"):
        read(FILE)
    assert not pathlib.Path("harmed").exists()


def broken(kind: str) -> pathlib.Path:
    saved.save(FILE, {"a": A})
    data = FILE.read_bytes()
    if kind == "cut":
        FILE.write_bytes(data[:200])
    elif kind == "legacy":
        FILE.write_bytes(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.")
    elif kind == "other zip":
        with zipfile.ZipFile(FILE, "w") as archive:
            archive.writestr("a.txt", "a")
    elif kind == "short storage":
        saved.write(FILE, {"a": saved.tensor(A, "0")}, {"0": A[0]})
    elif kind == "beyond":
        saved.write(FILE, {"a": saved.tensor(A, "0", size=(5, 6), stride=(6, 1))}, {"0": A})
    elif kind == "backwards":
        saved.write(FILE, {"a": saved.tensor(A, "0", size=(2,), stride=(-1,))}, {"0": A})
    elif kind == "no storage":
        saved.write(FILE, {"a": saved.tensor(A, "7")}, {"0": A})
    elif kind == "nothing":
        saved.write(FILE, {"epoch": 3}, {})
    elif kind == "a list":
        saved.write(FILE, [1, 2], {})
    return FILE


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "cannot be read: it is no file of torch.save, or cut short"),
        ("legacy", "in the form of PyTorch before 1.6"),
        ("other zip", "it holds no data.pkl"),
        ("short storage", "a storage is cut short"),
        ("beyond", "a tensor reaches beyond its storage"),
        ("backwards", "a tensor has impossible sizes"),
        ("no storage", "cannot be read: .*archive/data/7"),
        ("nothing", "weights.pth holds no weights"),
        ("a list", "weights.pth holds no weights"),
    ],
)
def test_broken_files_are_named_in_one_line(kind, message):
    with pytest.raises(WeightsError, match=message) as error:
        read(broken(kind))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.pth", "nowhere.pth is not there"),
        ("w.bin", "w.bin must end in one of .safetensors, .pth, .pt, .h5"),
        ("noise.safetensors", "noise.safetensors cannot be read: "),
        ("noise.h5", "noise.h5 cannot be read: "),
        ("folder.pth", "folder.pth is no file"),
    ],
)
def test_other_files_are_named(path, message):
    pathlib.Path("folder.pth").mkdir()
    for name in ("noise.safetensors", "noise.h5"):
        pathlib.Path(name).write_bytes(b"noise" * 20)
    with pytest.raises(WeightsError, match=message):
        read(path)
