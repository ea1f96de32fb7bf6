"""Weights of Keras by the names and in the layout of PyTorch. Its images have blue first."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import numpy as np

from fqt_jax.weights.files import WeightsError


def is_resnet(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether arrays are by the names of a ResNet of Keras."""
    return "conv1_conv/kernel" in arrays


def by_torch_names(
    arrays: dict[str, np.ndarray], path: str | os.PathLike[str]
) -> dict[str, np.ndarray]:
    """The arrays of a file by PyTorch's names, where they are by those of Keras.

    Raises:
      WeightsError: they are of a network that is not known.
    """
    kinds = {"VGG": _vgg, "ResNet (v1)": _resnet}
    if is_resnet(arrays):
        kind = "ResNet (v1)"
    elif any(name.startswith("block1_conv1/") for name in arrays):
        kind = "VGG"
    else:
        return arrays
    try:
        return kinds[kind](arrays)
    except KeyError as error:
        raise WeightsError(f"{path} is no {kind} of Keras: it has no {error.args[0]}.") from None
    except ValueError as error:
        raise WeightsError(f"{path} is no {kind} of Keras: {error}.") from None


def _convolution(kernel: np.ndarray, *, sees_images: bool = False) -> np.ndarray:
    return (kernel[:, :, ::-1] if sees_images else kernel).transpose(3, 2, 0, 1)


def _resnet(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """ResNet50 and its like. The biases of convolutions go into the means of the norms after them.

    The first convolution of a block's shortcut is ``0_conv``.
    """
    renamed: dict[str, np.ndarray] = {}
    names = {"conv1": ("conv1", "bn1")}
    for name in arrays:
        if match := re.fullmatch(r"conv(\d+)_block(\d+)_(\d+)_conv/kernel", name):
            stage, block, number = map(int, match.groups())
            of = f"layer{stage - 1}.{block - 1}."
            parts = (f"conv{number}", f"bn{number}") if number else ("downsample.0", "downsample.1")
            names[f"conv{stage}_block{block}_{number}"] = (of + parts[0], of + parts[1])
    for name, (conv, norm) in names.items():
        kernel = arrays[f"{name}_conv/kernel"]
        renamed[f"{conv}.weight"] = _convolution(kernel, sees_images=name == "conv1")
        for ours, theirs in (
            ("weight", "gamma"),
            ("bias", "beta"),
            ("running_mean", "moving_mean"),
            ("running_var", "moving_variance"),
        ):
            renamed[f"{norm}.{ours}"] = arrays[f"{name}_bn/{theirs}"]
        renamed[f"{norm}.running_mean"] = (
            arrays[f"{name}_bn/moving_mean"] - arrays[f"{name}_conv/bias"]
        )
    for name in ("predictions", "probs"):  # of files made by newer and by older versions
        if f"{name}/kernel" in arrays:
            renamed["fc.weight"] = arrays[f"{name}/kernel"].T
            renamed["fc.bias"] = arrays[f"{name}/bias"]
    return renamed


def _vgg(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """VGG16 or VGG19, whose first dense layer flattens rows first."""
    blocks: dict[int, int] = {}
    for name in arrays:
        if name.startswith("block"):
            of, _, count = name.partition("/")[0].partition("_conv")
            number = int(of.removeprefix("block"))
            blocks[number] = max(blocks.get(number, 0), int(count or 0))
    renamed: dict[str, np.ndarray] = {}
    place = 0
    for block, convs in sorted(blocks.items()):
        for conv in range(1, convs + 1):
            kernel = arrays[f"block{block}_conv{conv}/kernel"]
            renamed[f"features.{place}.weight"] = _convolution(kernel, sees_images=place == 0)
            renamed[f"features.{place}.bias"] = arrays[f"block{block}_conv{conv}/bias"]
            place += 2
        place += 1
    for name, dense in (("fc1", 0), ("fc2", 3), ("predictions", 6)):
        if f"{name}/kernel" in arrays:
            kernel = arrays[f"{name}/kernel"]
            if dense == 0:
                kernel = kernel.reshape(7, 7, -1, kernel.shape[1]).transpose(2, 0, 1, 3)
                kernel = kernel.reshape(-1, kernel.shape[-1])
            renamed[f"classifier.{dense}.weight"] = kernel.T
            renamed[f"classifier.{dense}.bias"] = arrays[f"{name}/bias"]
    return renamed
