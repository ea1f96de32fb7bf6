"""Ordinary NNX models that know nothing of quantization; see :func:`fqt_jax.quantize`.

They take images, NHWC, but for those of :data:`TOKEN_MODELS`, which take tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx

from fqt_jax.models.gpt import GPT as GPT
from fqt_jax.models.gpt import GPTSmall as GPTSmall
from fqt_jax.models.mobilenet import MobileNet as MobileNet
from fqt_jax.models.recurrent import GRU as GRU
from fqt_jax.models.recurrent import LSTM as LSTM
from fqt_jax.models.recurrent import RecurrentNet as RecurrentNet
from fqt_jax.models.resnet import ResNet as ResNet
from fqt_jax.models.resnet import ResNet18 as ResNet18
from fqt_jax.models.resnet import ResNet34 as ResNet34
from fqt_jax.models.resnet import ResNet50 as ResNet50
from fqt_jax.models.torchvision import KERAS_MODELS as KERAS_MODELS
from fqt_jax.models.torchvision import TORCH_MODELS as TORCH_MODELS
from fqt_jax.models.torchvision import TorchResNet as TorchResNet
from fqt_jax.models.torchvision import TorchVGG as TorchVGG
from fqt_jax.models.vgg import VGG as VGG
from fqt_jax.models.vgg import VGG11 as VGG11
from fqt_jax.models.vgg import VGG13 as VGG13
from fqt_jax.models.vgg import VGG16 as VGG16
from fqt_jax.models.vgg import VGG19 as VGG19
from fqt_jax.models.vgg import VGGSmall as VGGSmall
from fqt_jax.models.vit import VisionTransformer as VisionTransformer
from fqt_jax.models.vit import ViTSmall as ViTSmall

TOKEN_MODELS: dict[str, Callable[..., Any]] = {"gpt_small": GPTSmall}
"""The models that take tokens and predict the next one, by name."""

IMAGE_SEQUENCE_MODELS: dict[str, Callable[..., Any]] = {
    "vit_small": ViTSmall,
    "lstm": LSTM,
    "gru": GRU,
}
"""The models that read images of one size as sequences of patches or rows, by name."""

MODELS: dict[str, Callable[..., Any]] = {
    "vgg_small": VGGSmall,
    "vgg11": VGG11,
    "vgg13": VGG13,
    "vgg16": VGG16,
    "vgg19": VGG19,
    "resnet18": ResNet18,
    "resnet34": ResNet34,
    "resnet50": ResNet50,
    "mobilenet": MobileNet,
    **IMAGE_SEQUENCE_MODELS,
    **TOKEN_MODELS,
    **TORCH_MODELS,
    **KERAS_MODELS,
}
"""The models by name. Those in the form of torchvision or Keras take its weights, and have ReLU."""


def has_stem(name: str) -> bool:
    """Whether a model of that name has a choice of stems.

    Example:
      >>> has_stem("resnet18"), has_stem("vgg11"), has_stem("resnet50_torch")
      (True, False, False)
    """
    has_form = name.startswith(("resnet", "mobilenet", "vit"))
    return has_form and name not in TORCH_MODELS | KERAS_MODELS


def create_model(
    name: str,
    *,
    num_classes: int,
    in_features: int = 3,
    image_size: tuple[int, int] = (32, 32),
    width: float = 1.0,
    stem: str = "small",
    rngs: nnx.Rngs,
) -> Any:
    """Builds a model by name.

    Args:
      name: one of :data:`MODELS`.
      num_classes: size of the output.
      in_features: channels of the images.
      image_size: height and width of the images.
      width: factor on the number of channels.
      stem: ``"small"`` or ``"imagenet"``.
      rngs: the stream ``params``.

    Models take what they have: one that takes images of any size has no ``image_size``, one that
    has one form no ``stem``, one of tokens no ``in_features``.

    Raises:
      ValueError: the name is unknown, or a size is out of range.

    Example:
      >>> from flax import nnx
      >>> from fqt_jax.models import create_model
      >>> model = create_model("vgg_small", num_classes=10, in_features=1, rngs=nnx.Rngs(0))
      >>> type(model).__name__
      'VGG'
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known models: {', '.join(MODELS)}.")
    options: dict[str, Any] = {"stem": stem} if has_stem(name) else {}
    if name in IMAGE_SEQUENCE_MODELS:
        options["image_size"] = image_size
    if name not in TOKEN_MODELS:
        options["in_features"] = in_features
    return MODELS[name](num_classes=num_classes, width=width, rngs=rngs, **options)
