"""Files that ``torch.save`` writes, read without PyTorch and without running what is in them.

Such a file is a zip archive of a pickle and of raw storages. A pickle may name any function and
have it called. Here it may name those that put tensors together, and nothing else.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_DTYPES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Storage(NamedTuple):
    dtype: Any
    key: str
    size: int


def read_torch(path: Path) -> Any:
    """What was saved, tensors as NumPy arrays.

    Raises:
      ValueError: the file is none that ``torch.save`` wrote, is damaged, or asks for anything but
        tensors, dictionaries, lists and plain values.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            is_pickle = file.read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04")
        raise ValueError(
            "it is in the form of PyTorch before 1.6: load and save it with a newer one"
            if is_pickle
            else "it is no file of torch.save, or cut short"
        )
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError("it holds no data.pkl: it is no file of torch.save")
        root = names[0].removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError("it was written on a big-endian machine")
        return _Unpickler(archive, root, archive.read(names[0])).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str, data: bytes):
        super().__init__(io.BytesIO(data))
        self.archive, self.root = archive, root
        self.storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The few names that a file of tensors needs."""
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return self._tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, *_: data
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise ValueError(f"it asks for {module}.{name}, which is no part of a tensor: refused")

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage, by the tuple that stands for it."""
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise ValueError("it refers to something that is no storage")
        return _Storage(np.dtype(pid[1]), str(pid[2]), int(pid[4]))

    def _tensor(
        self, storage: _Storage, offset: int, size: Any, stride: Any, *_: Any
    ) -> np.ndarray:
        if storage.key not in self.storages:
            data = self.archive.read(f"{self.root}data/{storage.key}")
            flat = np.frombuffer(data, storage.dtype)
            if len(flat) < storage.size:
                raise ValueError("a storage is cut short")
            self.storages[storage.key] = flat
        flat, sizes, strides = self.storages[storage.key], tuple(size), tuple(stride)
        if len(sizes) != len(strides) or min((*sizes, *strides, offset), default=0) < 0:
            raise ValueError("a tensor has impossible sizes")
        last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        if 0 not in sizes and last >= len(flat):
            raise ValueError("a tensor reaches beyond its storage")
        if 0 in sizes:
            return np.zeros(sizes, storage.dtype)
        steps = [step * storage.dtype.itemsize for step in strides]
        return np.lib.stride_tricks.as_strided(flat[offset:], sizes, steps).copy()
