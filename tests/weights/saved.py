"""Files as ``torch.save`` writes them, made without PyTorch; and what must not be read."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np

_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "uint8": "ByteStorage",
}


class _Global:
    """Stands for ``module.name`` in a pickle."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class _Call:
    """Stands for a call in a pickle."""

    def __init__(self, function: _Global, *arguments):
        self.function, self.arguments = function, arguments


class _Ref:
    """Stands for a storage."""

    def __init__(self, dtype: str, key: str, size: int):
        self.pid = ("storage", _Global("torch", _STORAGES[dtype]), key, "cpu", size)


class _Pickler(pickle._Pickler):
    """A pickler that writes what it is told, whether it exists here or not."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, _Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, _Call):
            self.save(obj.function)
            self.save(tuple(obj.arguments))
            self.write(pickle.REDUCE)
        elif isinstance(obj, _Ref):
            self.save(obj.pid)
            self.write(pickle.BINPERSID)
        else:
            super().save(obj, save_persistent_id)


def tensor(array: np.ndarray, key: str, *, stride=None, size=None, offset=0) -> _Call:
    """A tensor as a call in a pickle; ``stride`` and ``offset`` count entries."""
    size = array.shape if size is None else size
    if stride is None:
        stride = tuple(np.cumprod((1, *size[:0:-1]))[::-1].tolist()) if size else ()
    storage = _Ref(array.dtype.name, key, array.size)
    rebuild = _Global("torch._utils", "_rebuild_tensor_v2")
    hooks = _Call(_Global("collections", "OrderedDict"))
    return _Call(rebuild, storage, offset, tuple(size), tuple(stride), False, hooks)


def write(path: Path, value: object, storages: dict[str, np.ndarray]) -> None:
    """A zip archive of a pickle and of storages."""
    buffer = io.BytesIO()
    _Pickler(buffer, 2).dump(value)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        archive.writestr("archive/byteorder", "little")
        for key, array in storages.items():
            archive.writestr(f"archive/data/{key}", np.ascontiguousarray(array).tobytes())


def save(path: Path, arrays: dict[str, np.ndarray], wrap=lambda value: value) -> None:
    """A state dictionary."""
    keys = {name: str(number) for number, name in enumerate(arrays)}
    tensors = {name: tensor(array, keys[name]) for name, array in arrays.items()}
    write(path, wrap(tensors), {keys[name]: array for name, array in arrays.items()})


def call_of(module: str, name: str, *arguments) -> _Call:
    """A call of any function."""
    return _Call(_Global(module, name), *arguments)
