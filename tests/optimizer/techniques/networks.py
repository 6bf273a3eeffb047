"""Small networks of every shape that channel pruning has to cope with: [n, 1, 8, 8] -> [n, 4]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv(channels_in: int, channels_out: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, 1, groups=groups, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class Net(nn.Module):
    """A body and a linear head."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(channels, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.head(functional.adaptive_avg_pool2d(self.body(pixels), 1).flatten(1))
        return out


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels))

    def forward(self, maps: Tensor) -> Tensor:
        return torch.relu(maps + self.second(self.first(maps)))


class Inverted(nn.Module):
    """Pointwise up, depthwise, pointwise down, and a shortcut: the block of MobileNetV2."""

    def __init__(self, channels: int, times: int) -> None:
        super().__init__()
        wide = channels * times
        self.up = nn.Sequential(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6())
        self.middle = conv(wide, wide, groups=wide)
        self.down = nn.Sequential(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, maps: Tensor) -> Tensor:
        out: Tensor = maps + self.down(self.middle(self.up(maps)))
        return out


class Concat(nn.Module):
    """Two branches side by side, as in Inception and DenseNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.left, self.right = conv(channels, 16), conv(channels, 24)
        self.after = conv(16 + 24 + channels, 32)

    def forward(self, maps: Tensor) -> Tensor:
        out: Tensor = self.after(torch.cat([self.left(maps), self.right(maps), maps], 1))
        return out


class Attention(nn.Module):
    """Self-attention written by hand, with a fused projection and a constant size of heads."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        n, t, _ = tokens.shape
        parts = self.qkv(tokens).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = parts[0], parts[1], parts[2]
        weights = torch.softmax(query @ key.transpose(-2, -1) / self.head_dim**0.5, -1)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        out: Tensor = self.proj(mixed)
        return out


class Multihead(nn.Module):
    """The same with torch's own module."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.inner(tokens, tokens, tokens, need_weights=False)[0]
        return out


class Transformer(nn.Module):
    """Patches, positions, one block of attention and a perceptron."""

    def __init__(self, attention: nn.Module, dim: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, 4, dim) * 0.02)
        self.before, self.attention = nn.LayerNorm(dim), attention
        self.between = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.head = nn.Linear(dim, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.patches(pixels).flatten(2).transpose(1, 2) + self.positions
        tokens = tokens + self.attention(self.before(tokens))
        tokens = tokens + self.down(functional.gelu(self.up(self.between(tokens))))
        out: Tensor = self.head(tokens.mean(1))
        return out


def residual() -> nn.Module:
    return Net(nn.Sequential(conv(1, 32, 2), Residual(32), Residual(32), conv(32, 48, 2)), 48)


def depthwise() -> nn.Module:
    return Net(nn.Sequential(conv(1, 16, 2), Inverted(16, 4), Inverted(16, 4), conv(16, 32)), 32)


def grouped() -> nn.Module:
    return Net(nn.Sequential(conv(1, 32, 2), conv(32, 64, groups=4), conv(64, 32)), 32)


def concat() -> nn.Module:
    return Net(nn.Sequential(conv(1, 16, 2), Concat(16)), 32)


def attention() -> nn.Module:
    return Transformer(Attention(32, 4), 32)


def multihead() -> nn.Module:
    return Transformer(Multihead(32, 4), 32)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": residual,
    "depthwise": depthwise,
    "grouped": grouped,
    "concat": concat,
    "attention": attention,
    "multihead": multihead,
}
