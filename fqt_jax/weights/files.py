"""Files of weights as named arrays."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from fqt_jax.weights.torch_file import read_torch

_WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema")
_PREFIXES = ("module.", "model.", "_orig_mod.")


class WeightsError(ValueError):
    """A file of weights is not what it should be. The message is one line."""


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The named arrays in a file: ``.safetensors``, ``.pth`` or ``.pt``, ``.h5``.

    Nothing in a file is executed. A dictionary that only wraps the weights, such as ``state_dict``,
    and prefixes that all names share, such as ``module.``, are taken off. Of an ``.h5`` file of
    Keras the names are ``layer/weight``.

    Args:
      path: of the file; its suffix tells the form.

    Returns:
      Arrays by name, in the file's order; half precision as it is.

    Raises:
      WeightsError: the file is missing, of another form, damaged, holds no array, or asks for code.

    Example:
      >>> import tempfile, numpy as np, safetensors.numpy
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = f"{folder}/w.safetensors"
      ...     safetensors.numpy.save_file({"module.fc.bias": np.zeros(3, np.float32)}, path)
      ...     read(path)
      {'fc.bias': array([0., 0., 0.], dtype=float32)}
    """
    path = Path(path)
    readers = {
        ".safetensors": _read_safetensors,
        ".pth": read_torch,
        ".pt": read_torch,
        ".h5": _read_keras,
    }
    if path.suffix not in readers:
        raise WeightsError(f"{path} must end in one of {', '.join(readers)}.")
    if not path.is_file():
        raise WeightsError(f"{path} is {'no file' if path.exists() else 'not there'}.")
    try:
        found = readers[path.suffix](path)
    except WeightsError:
        raise
    except (
        *(OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, IndexError),
        *(pickle.UnpicklingError, zipfile.BadZipFile, safetensors.SafetensorError),
    ) as error:
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise WeightsError(f"{path} cannot be read: {reason}.") from None
    arrays = _unwrapped(found)
    if not arrays:
        raise WeightsError(f"{path} holds no weights.")
    return arrays


def _unwrapped(found: Any) -> dict[str, np.ndarray]:
    while isinstance(found, Mapping):
        inner = [found[name] for name in _WRAPPERS if isinstance(found.get(name), Mapping)]
        if not inner or any(isinstance(value, np.ndarray) for value in found.values()):
            break
        found = inner[0]
    if not isinstance(found, Mapping):
        return {}
    arrays = {str(name): a for name, a in found.items() if isinstance(a, np.ndarray)}
    for prefix in _PREFIXES:
        if arrays and all(name.startswith(prefix) for name in arrays):
            arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    return arrays


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    # Through JAX, since NumPy alone has no bfloat16.
    with safetensors.safe_open(path, framework="flax") as file:
        return {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def _read_keras(path: Path) -> dict[str, np.ndarray]:
    try:
        import h5py
    except ImportError:
        raise WeightsError(
            f"{path} needs h5py: install it with pip install 'fqt-jax[keras]'."
        ) from None
    arrays: dict[str, np.ndarray] = {}
    with h5py.File(path, "r") as file:
        root = file.get("model_weights", file)

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                *_, layer, weight = name.split("/")
                arrays[f"{layer}/{weight.partition(':')[0]}"] = np.asarray(item)

        root.visititems(visit)
    return arrays
