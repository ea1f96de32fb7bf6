"""The same models and training step in PyTorch: images channels_last, with the fused Adam: eager or
compiled, in fp32 or with bfloat16 where autocast takes it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from experiments.bench import machine, torch_transformers
from experiments.bench.contenders import LEARNING_RATE, Setting, layers_of, step_products
from fqt_jax.models.common import scaled

VGG_STAGES: dict[str, Sequence[Sequence[int]]] = {
    "vgg_small": ((32, 32), (64, 64), (128, 128)),
    "vgg11": ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    "vgg13": ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    "vgg16": ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    "vgg19": ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}
RESNET_DEPTHS: dict[str, Sequence[int]] = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
}

TRANSFORMERS = {"gpt_small": torch_transformers.gpt, "vit_small": torch_transformers.vit}

MOBILENET_BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *[(512, 1)] * 5,
    *((1024, 2), (1024, 1)),
)


def missing() -> str | None:
    """Why PyTorch cannot take part; ``None`` when it can."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return "PyTorch is left out: it is not installed; pip install 'fqt-jax[bench]'"
    return None


class TorchContender:
    """A PyTorch training step; see :class:`experiments.bench.contenders.Contender`.

    Args:
      name: how it is called.
      bfloat16: the forward pass runs under ``torch.autocast`` with bfloat16.
      compiled: the model runs through ``torch.compile``.
    """

    def __init__(self, name: str, *, bfloat16: bool = False, compiled: bool = False):
        self.name = name
        self._bfloat16, self._compiled = bfloat16, compiled

    def build(self, setting: Setting) -> None:
        """See :class:`experiments.bench.contenders.Contender`."""
        import torch

        torch.set_num_threads(machine.available_cpus())
        torch.manual_seed(0)
        self._products = step_products(layers_of(setting), {})
        self._model = create_torch_model(setting).to(memory_format=torch.channels_last)
        parameters = self._model.parameters()
        self._optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)
        if self._compiled:
            self._model = torch.compile(self._model)
        inputs, labels = map(torch.from_numpy, setting.batch())
        # A view of NHWC data as NCHW is channels_last already.
        self._inputs = inputs if setting.is_text else inputs.permute(0, 3, 1, 2)
        self._labels = labels.long().flatten()
        self._loss = torch.nn.CrossEntropyLoss()

    def train(self, steps: int) -> None:
        """See :class:`experiments.bench.contenders.Contender`."""
        for _ in range(steps):
            self._forward_backward()
            self._optimizer.step()

    def phases(self) -> dict[str, Callable[[], None]]:
        """See :class:`experiments.bench.contenders.Contender`."""
        return {
            "forward": self._forward,
            "forward_backward": self._forward_backward,
            "update": self._optimizer.step,
        }

    def _forward(self) -> None:
        import torch

        with torch.no_grad():
            self._mean_loss().item()

    def _forward_backward(self) -> None:
        self._optimizer.zero_grad()
        loss = self._mean_loss()
        loss.backward()
        loss.item()

    def _mean_loss(self) -> Any:
        import torch

        precision: Any = contextlib.nullcontext()
        if self._bfloat16:
            precision = torch.autocast("cpu", dtype=torch.bfloat16)
        with precision:
            logits = self._model(self._inputs)
        return self._loss(logits.float().flatten(0, -2), self._labels)

    def details(self) -> dict[str, Any]:
        """See :class:`experiments.bench.contenders.Contender`."""
        return {"products": self._products, "memory": None}


def create_torch_model(setting: Setting) -> Any:
    """The model of :func:`fqt_jax.models.create_model` as a ``torch.nn.Module``, images over NCHW.

    Submodules have the same names and numbers, so parameters correspond by path.
    """
    if setting.model in VGG_STAGES:
        return _vgg(VGG_STAGES[setting.model], setting)
    if setting.model == "mobilenet":
        return _mobilenet(setting)
    if setting.model in TRANSFORMERS:
        return TRANSFORMERS[setting.model](setting)
    return _resnet(RESNET_DEPTHS[setting.model], setting)


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> Any:
    from torch import nn

    padding = size // 2
    return nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=False)


def _vgg(stages: Sequence[Sequence[int]], setting: Setting) -> Any:
    from torch import nn

    class VGG(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers: list[Any] = []
            inputs = setting.in_features
            for stage in stages:
                for channels in stage:
                    outputs = scaled(channels, setting.width)
                    layers += [_conv(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.PReLU()]
                    inputs = outputs
                layers.append(nn.MaxPool2d(2))
            self.features = nn.Sequential(*layers)
            self.head = nn.Linear(inputs, setting.num_classes)

        def forward(self, x: Any) -> Any:
            return self.head(self.features(x).mean((2, 3)))

    return VGG()


def _resnet(depths: Sequence[int], setting: Setting) -> Any:
    from torch import nn

    is_bottleneck = setting.model == "resnet50"

    class Block(nn.Module):
        def __init__(self, inputs: int, features: int, stride: int):
            super().__init__()
            outputs = 4 * features if is_bottleneck else features
            if is_bottleneck:
                convs = [
                    _conv(inputs, features, 1),
                    _conv(features, features, 3, stride),
                    _conv(features, outputs, 1),
                ]
            else:
                convs = [_conv(inputs, features, 3, stride), _conv(features, features, 3)]
            body: list[Any] = []
            for conv in convs:
                body += [nn.BatchNorm2d(conv.in_channels), conv, nn.PReLU()]
            self.body = nn.Sequential(*body)
            shortcut: list[Any] = []
            if stride > 1:
                pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
                shortcut.append(pool)
            if stride > 1 or inputs != outputs:
                shortcut += [_conv(inputs, outputs, 1), nn.BatchNorm2d(outputs)]
            self.shortcut = nn.Sequential(*shortcut)

        def forward(self, x: Any) -> Any:
            return self.body(x) + self.shortcut(x)

    class ResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            channels = scaled(64, setting.width)
            size, stride = (7, 2) if setting.stem == "imagenet" else (3, 1)
            stem = [
                _conv(setting.in_features, channels, size, stride),
                nn.BatchNorm2d(channels),
                nn.PReLU(),
            ]
            if setting.stem == "imagenet":
                stem.append(nn.MaxPool2d(3, 2, padding=1))
            self.stem = nn.Sequential(*stem)
            self.blocks = nn.ModuleList()
            for stage, depth in enumerate(depths):
                features = scaled(64 * 2**stage, setting.width)
                for i in range(depth):
                    self.blocks.append(Block(channels, features, 2 if stage and not i else 1))
                    channels = 4 * features if is_bottleneck else features
            self.head = nn.Linear(channels, setting.num_classes)

        def forward(self, x: Any) -> Any:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean((2, 3)))

    return ResNet()


def _mobilenet(setting: Setting) -> Any:
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int):
            super().__init__()
            depthwise = _conv(inputs, inputs, 3, stride, groups=inputs)
            self.depthwise = nn.Sequential(nn.BatchNorm2d(inputs), depthwise, nn.PReLU())
            self.pool = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
            pointwise = _conv(inputs, outputs, 1)
            self.pointwise = nn.Sequential(nn.BatchNorm2d(inputs), pointwise, nn.PReLU())
            self.copies, self.outputs = -(-outputs // inputs), outputs

        def forward(self, x: Any) -> Any:
            x = self.depthwise(x) + self.pool(x)
            return self.pointwise(x) + torch.cat([x] * self.copies, 1)[:, : self.outputs]

    class MobileNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            channels = scaled(32, setting.width)
            conv = _conv(setting.in_features, channels, 3, 2 if setting.stem == "imagenet" else 1)
            self.stem = nn.Sequential(conv, nn.BatchNorm2d(channels), nn.PReLU())
            self.blocks = nn.ModuleList()
            for features, stride in MOBILENET_BLOCKS:
                outputs = scaled(features, setting.width)
                self.blocks.append(Block(channels, outputs, stride))
                channels = outputs
            self.head = nn.Linear(channels, setting.num_classes)

        def forward(self, x: Any) -> Any:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean((2, 3)))

    return MobileNet()
