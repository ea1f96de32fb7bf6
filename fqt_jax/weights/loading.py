"""Named arrays into a model: which array is which parameter, and in which layout."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fqt_jax.models.resnet import ResNet
from fqt_jax.models.torchvision import TorchResNet, TorchVGG
from fqt_jax.models.vgg import VGG
from fqt_jax.text import format_table
from fqt_jax.weights import keras
from fqt_jax.weights.files import WeightsError, read

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of PyTorch's ImageNet networks, on the scale 0 to 1."""

KERAS_MEAN = (123.68 / 255, 116.779 / 255, 103.939 / 255)
KERAS_STD = (1 / 255,) * 3
"""Of Keras' VGGs and ResNets, whose images are not divided by anything."""


class LoadTable(NamedTuple):
    """What became of the parameters of a model, and of the arrays of a file; prints as a table.

    Attributes:
      loaded: pairs of parameter and array.
      new: parameters that keep their values, with the reason.
      unused: arrays of the file that no parameter took.
    """

    loaded: tuple[tuple[str, str], ...]
    new: tuple[tuple[str, str], ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        rows = [(name, "loaded", source) for name, source in self.loaded]
        rows += [(name, "new", why) for name, why in self.new]
        rows += [("-", "unused", name) for name in self.unused]
        return format_table(("parameter", "is", "from"), rows, names=3)


class Loaded(NamedTuple):
    """What :func:`load` returns.

    Attributes:
      table: what became of each parameter.
      mean, std: of the images that the weights were trained on, for each channel, on the scale
        0 to 1: what a network is fed is ``(image - mean) / std``.
    """

    table: LoadTable
    mean: tuple[float, ...]
    std: tuple[float, ...]


class _Part(NamedTuple):
    """A layer of a model, and its name in the file."""

    path: str
    layer: Any
    name: str
    is_optional: bool = False  # it may have another shape, and then is new


def load(model: Any, path: str | os.PathLike[str]) -> Loaded:
    """Loads weights that were trained elsewhere into a float model, in place.

    A model in the form of PyTorch or Keras (:data:`fqt_jax.models.TORCH_MODELS`,
    :data:`fqt_jax.models.KERAS_MODELS`) takes all weights of that network, and computes the same
    logits. Of a binary-friendly one (:class:`fqt_jax.models.ResNet`,
    :class:`fqt_jax.models.VGG`) it fills what has a counterpart: the convolutions, and the norms of
    a VGG with batch norm. A classifier of another size, and a stem of another, stay as they are and
    are listed as new.

    Args:
      model: the model, not quantized yet.
      path: of the file (:func:`read`): PyTorch's names, as torchvision and timm have them, or
        those of Keras' VGG16, VGG19 and ResNet50.

    Returns:
      A table of what was loaded, and the mean and deviation of the images.

    Raises:
      WeightsError: the file cannot be read; the model is of no known form; a weight is missing, has
        another shape, or is not finite. The model is unchanged then.

    Example:
      >>> import tempfile, numpy as np, safetensors.numpy
      >>> from flax import nnx
      >>> from fqt_jax.models import create_model
      >>> model = create_model("vgg11", num_classes=10, width=0.125, rngs=nnx.Rngs(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = f"{folder}/w.safetensors"
      ...     weights = {"features.0.weight": np.zeros((64, 3, 3, 3), np.float32)}
      ...     safetensors.numpy.save_file(weights, path)
      ...     load(model, path)
      Traceback (most recent call last):
        ...
      fqt_jax.weights.files.WeightsError: ... is of another network: features.0.weight is
        [64, 3, 3, 3], and features/layers/0 takes [8, 3, 3, 3].
    """
    arrays = read(path)
    is_keras_resnet = keras.is_resnet(arrays)
    if isinstance(model, TorchResNet) and model.keras != is_keras_resnet:
        theirs = "is" if is_keras_resnet else "is not"
        other = "resnet50_keras" if is_keras_resnet else "one like resnet50_torch"
        raise WeightsError(
            f"{path} {theirs} a ResNet of Keras, which has its strides elsewhere: load it into "
            f"{other}."
        )
    arrays = _from_timm(keras.by_torch_names(arrays, path))
    found: list[tuple[str, str, nnx.Variable[Any], np.ndarray]] = []
    new: list[tuple[str, str]] = []
    wrong: list[str] = []
    used: set[str] = set()
    is_whole = isinstance(model, TorchResNet | TorchVGG)
    for part in _parts(model, arrays):
        weight = arrays.get(f"{part.name}.weight")
        shape = _torch_shape(part.layer)
        if weight is not None and list(weight.shape) != shape:
            if part.is_optional:
                new.append((part.path, f"{part.name}.weight is {list(weight.shape)}, not {shape}"))
                used |= {name for name in arrays if name.startswith(f"{part.name}.")}
            else:
                wrong.append(
                    f"{part.name}.weight is {list(weight.shape)}, and {part.path} takes {shape}"
                )
            continue
        folded = _folded_bias(model, part, arrays)
        used |= {folded} if folded else set()
        for field, name, variable in _fields(part):
            if name not in arrays:
                if is_whole and not part.is_optional:
                    wrong.append(f"{name} is missing")
                else:
                    new.append((f"{part.path}/{field}", f"the file has no {name}"))
                continue
            used.add(name)
            value = _in_our_layout(part, field, arrays, folded, name)
            if not np.isfinite(value).all():
                wrong.append(f"{name} holds NaN or infinity")
            found.append((f"{part.path}/{field}", name, variable, value))
    ignored = {name for name in arrays if name.endswith("num_batches_tracked")}
    if not found and not wrong:
        raise WeightsError(f"{path} has no weight of this model: it is of another network.")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise WeightsError(f"{path} is of another network: {'; '.join(wrong[:3])}{more}.")
    for _, _, variable, value in found:
        variable[...] = jnp.asarray(value, variable.dtype)
    covered = {name for name, *_ in found} | {name for name, _ in new}
    new += [
        (name, "it has no counterpart")
        for name in _parameters(model)
        if name not in covered and name.rpartition("/")[0] not in covered
    ]
    table = LoadTable(
        tuple((name, source) for name, source, *_ in found),
        tuple(new),
        tuple(sorted(set(arrays) - used - ignored)),
    )
    return Loaded(table, *statistics(path))


def statistics(path: str | os.PathLike[str]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the images that the weights in a file were trained on, by its form.

    Example:
      >>> statistics("resnet18.pth")
      ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    """
    is_keras = os.fspath(path).endswith(".h5")
    return (KERAS_MEAN, KERAS_STD) if is_keras else (IMAGENET_MEAN, IMAGENET_STD)


def _parameters(model: Any) -> list[str]:
    flat = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return ["/".join(map(str, path)) for path, _ in flat]


def _parts(model: Any, arrays: Mapping[str, np.ndarray]) -> Iterator[_Part]:
    """The layers of a model that have a counterpart, with its name in PyTorch."""
    if isinstance(model, TorchVGG | VGG):
        # PyTorch counts activations and pooling too; without batch norm there are fewer places.
        has_norms = isinstance(model, TorchVGG) or "features.1.running_mean" in arrays
        place = 0
        for number, layer in enumerate(model.features.layers):
            is_norm = isinstance(layer, nnx.BatchNorm)
            if isinstance(layer, nnx.Conv) or (is_norm and has_norms):
                yield _Part(f"features/layers/{number}", layer, f"features.{place}")
            place += has_norms or not is_norm
        if isinstance(model, TorchVGG):
            for number in (0, 3):
                layer = model.classifier.layers[number]
                yield _Part(f"classifier/layers/{number}", layer, f"classifier.{number}")
        yield _Part("head", model.head, "classifier.6", is_optional=True)
    elif isinstance(model, TorchResNet | ResNet):
        is_ours = isinstance(model, ResNet)
        yield _Part("stem/layers/0", model.stem.layers[0], "conv1", is_optional=is_ours)
        if not is_ours:
            yield _Part("stem/layers/1", model.stem.layers[1], "bn1")
        number = 0
        for stage, depth in enumerate(model.depths):
            for i in range(depth):
                block, name = model.blocks[number], f"layer{stage + 1}.{i}"
                yield from _block(block, f"blocks/{number}", name, is_ours)
                number += 1
        yield _Part("head", model.head, "fc", is_optional=True)
    else:
        raise WeightsError(
            f"{type(model).__name__} is of no form that weights are known for: ResNet and VGG of "
            "fqt_jax.models are."
        )


def _block(block: Any, path: str, name: str, is_ours: bool) -> Iterator[_Part]:
    for place, layers, prefix in (
        ("body", block.body.layers, ""),
        ("shortcut", block.shortcut.layers, "downsample."),
    ):
        convs = 0
        for number, layer in enumerate(layers):
            here = f"{path}/{place}/layers/{number}"
            if isinstance(layer, nnx.Conv):
                convs += 1
                yield _Part(here, layer, f"{name}.{prefix}{0 if prefix else f'conv{convs}'}")
            elif isinstance(layer, nnx.BatchNorm) and not is_ours:
                yield _Part(here, layer, f"{name}.{prefix}{1 if prefix else f'bn{convs}'}")


def _torch_shape(layer: Any) -> list[int]:
    if isinstance(layer, nnx.BatchNorm):
        return [layer.num_features]
    shape = layer.kernel.shape
    return [shape[-1], shape[-2], *shape[:-2]]


def _fields(part: _Part) -> Iterator[tuple[str, str, nnx.Variable[Any]]]:
    """A layer's parameters: their names here and in the file."""
    if isinstance(part.layer, nnx.BatchNorm):
        names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    else:
        names = {"kernel": "weight", "bias": "bias"}
    for field, name in names.items():
        variable = getattr(part.layer, field)
        if variable is not None:
            yield field, f"{part.name}.{name}", variable


def _in_our_layout(
    part: _Part, field: str, arrays: Mapping[str, np.ndarray], folded: str | None, name: str
) -> np.ndarray:
    value = np.asarray(arrays[name], np.float32)
    if field == "kernel":
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        if part.path == "classifier/layers/0":  # PyTorch flattens channels first
            value = value.reshape(-1, 7, 7, value.shape[1]).transpose(1, 2, 0, 3)
            value = value.reshape(-1, value.shape[-1])
    elif field == "mean" and folded is not None:
        value = value - np.asarray(arrays[folded], np.float32)
    return value


def _folded_bias(model: Any, part: _Part, arrays: Mapping[str, np.ndarray]) -> str | None:
    """The bias of the convolution before a norm, where the model has none: it shifts the mean."""
    if not isinstance(model, VGG) or not isinstance(part.layer, nnx.BatchNorm):
        return None
    stem, _, place = part.name.rpartition(".")
    name = f"{stem}.{int(place) - 1}.bias"
    return name if name in arrays else None


def _from_timm(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """timm has VGG's dense layers as convolutions, under names of its own."""
    names = {"pre_logits.fc1": 0, "pre_logits.fc2": 3, "head.fc": 6}
    if not any(name.startswith("pre_logits.") for name in arrays):
        return arrays
    renamed = {}
    for full_name, array in arrays.items():
        name = full_name
        layer, _, field = name.rpartition(".")
        if layer in names:
            name = f"classifier.{names[layer]}.{field}"
            array = array.reshape(array.shape[0], -1) if array.ndim == 4 else array
        renamed[name] = array
    return renamed
