"""The Transformers of fqt_jax.models in PyTorch, with its own attention."""

from __future__ import annotations

from typing import Any

from experiments.bench.contenders import Setting
from fqt_jax.models.common import scaled
from fqt_jax.models.gpt import GPTSmall
from fqt_jax.models.transformer import head_count
from fqt_jax.models.vit import PATCH, POSITION_DEVIATION, ViTSmall

_EPSILON = 1e-6
"""Of Flax's layer norms."""


def _blocks(depth: int, features: int, *, causal: bool) -> Any:
    from torch import nn
    from torch.nn.functional import scaled_dot_product_attention

    heads = head_count(features)

    def normed(inputs: int, outputs: int) -> list[Any]:
        return [nn.LayerNorm(inputs, _EPSILON), nn.Linear(inputs, outputs)]

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Sequential(*normed(features, 3 * features))
            self.out = nn.Sequential(*normed(features, features))

        def forward(self, x: Any) -> Any:
            n, length, _ = x.shape
            parts = self.qkv(x).view(n, length, 3, heads, features // heads)
            q, k, v = parts.permute(2, 0, 3, 1, 4)
            y = scaled_dot_product_attention(q, k, v, is_causal=causal)
            return x + self.out(y.transpose(1, 2).reshape(x.shape))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()
            self.feed_forward = nn.Sequential(
                *normed(features, 4 * features), nn.PReLU(), *normed(4 * features, features)
            )

        def forward(self, x: Any) -> Any:
            x = self.attention(x)
            return x + self.feed_forward(x)

    return nn.ModuleList(Block() for _ in range(depth))


def gpt(setting: Setting) -> Any:
    """A decoder with learned positions and a head of its own."""
    import torch
    from torch import nn

    depth, features = GPTSmall.args[0], scaled(GPTSmall.args[1], setting.width)

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(setting.num_classes, features)
            self.positions = nn.Parameter(0.02 * torch.randn(setting.length, features))
            self.blocks = _blocks(depth, features, causal=True)
            self.norm = nn.LayerNorm(features, _EPSILON)
            self.head = nn.Linear(features, setting.num_classes)

        def forward(self, tokens: Any) -> Any:
            x = self.embedding(tokens) + self.positions
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    return GPT()


def vit(setting: Setting) -> Any:
    """Patches of an image, learned positions and a mean over the patches."""
    import torch
    from torch import nn

    depth, features = ViTSmall.args[0], scaled(ViTSmall.args[1], setting.width)
    patch = PATCH[setting.stem]

    class ViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(setting.in_features, features, 2 * patch - 1, patch, patch - 1)
            patches = (setting.image_size // patch) ** 2
            start = POSITION_DEVIATION * torch.randn(patches, features)
            self.positions = nn.Parameter(start)
            self.blocks = _blocks(depth, features, causal=False)
            self.norm = nn.LayerNorm(features, _EPSILON)
            self.head = nn.Linear(features, setting.num_classes)

        def forward(self, x: Any) -> Any:
            x = self.stem(x).flatten(2).transpose(1, 2) + self.positions
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x).mean(1))

    return ViT()
