"""Networks of many families, untrained and small, for what must hold for any of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from shoal_optimizer import Task, TensorSpec


def conv_norm(given: int, made: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(given, made, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(made),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    """The block of MobileNetV2 (Sandler et al., 2018): expand, filter each channel, project."""

    def __init__(self, given: int, made: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = given * expand
        self.use_shortcut = stride == 1 and given == made
        parts = [] if expand == 1 else [conv_norm(given, hidden, 1)]
        parts += [conv_norm(hidden, hidden, 3, stride, hidden)]
        self.conv = nn.Sequential(*parts, nn.Conv2d(hidden, made, 1, bias=False), nn.BatchNorm2d(made))

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.conv(inputs)
        return inputs + out if self.use_shortcut else out


class MobileNetV2(nn.Module):
    """As torchvision builds it; `share` scales the number of channels."""

    SETTINGS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
                (6, 320, 1, 1))  # fmt: skip

    def __init__(self, classes: int = 10, share: float = 1.0) -> None:
        super().__init__()

        def scaled(channels: int) -> int:
            return max(8, round(channels * share / 8) * 8)

        given = scaled(32)
        features: list[nn.Module] = [conv_norm(3, given, 3, 2)]
        for expand, channels, count, stride in self.SETTINGS:
            for number in range(count):
                made = scaled(channels)
                features.append(InvertedResidual(given, made, stride if number == 0 else 1, expand))
                given = made
        features.append(conv_norm(given, scaled(1280), 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(scaled(1280), classes))

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.features(inputs).mean((2, 3)))
        return out


class BasicBlock(nn.Module):
    """The block of ResNet-18 (He et al., 2016); its shortcut is a convolution where shapes change."""

    def __init__(self, given: int, made: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(given, made, 3, stride, 1, bias=False, groups=groups)
        self.bn1 = nn.BatchNorm2d(made)
        self.conv2 = nn.Conv2d(made, made, 3, 1, 1, bias=False, groups=groups)
        self.bn2 = nn.BatchNorm2d(made)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or given != made:
            self.downsample = nn.Sequential(
                nn.Conv2d(given, made, 1, stride, bias=False), nn.BatchNorm2d(made)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        shortcut = inputs if self.downsample is None else self.downsample(inputs)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(inputs)))))
        out += shortcut
        done: Tensor = self.relu(out)
        return done


class ResNet(nn.Module):
    def __init__(self, width: int = 16, blocks: int = 2, groups: int = 1, stem: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, stem, 1, stem // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = self._stage(width, width, blocks, 1, groups)
        self.layer2 = self._stage(width, 2 * width, blocks, 2, groups)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2 * width, 10)

    @staticmethod
    def _stage(given: int, made: int, blocks: int, stride: int, groups: int) -> nn.Sequential:
        first = BasicBlock(given, made, stride, groups)
        return nn.Sequential(first, *(BasicBlock(made, made, 1, groups) for _ in range(blocks - 1)))

    def forward(self, inputs: Tensor) -> Tensor:
        out = self.maxpool(self.relu(self.bn1(self.conv1(inputs))))
        out = self.avgpool(self.layer2(self.layer1(out)))
        done: Tensor = self.fc(torch.flatten(out, 1))
        return done


class DenseNet(nn.Module):
    """Each layer gets what all before it made (Huang et al., 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 16)
        self.layers = nn.ModuleList(conv_norm(16 + 16 * n, 16) for n in range(3))
        self.transition = conv_norm(64, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        out = self.stem(inputs)
        for layer in self.layers:
            out = torch.cat([out, layer(out)], 1)
        done: Tensor = self.head(self.transition(out).mean((2, 3)))
        return done


class UNet(nn.Module):
    """Down and up again, with what was seen on the way down; the answer is one number per pixel row."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(conv_norm(3, 16), conv_norm(16, 16))
        self.bottom = nn.Sequential(conv_norm(16, 32), conv_norm(32, 32))
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.fuse = nn.Sequential(conv_norm(32, 16), conv_norm(16, 16))
        self.head = nn.Conv2d(16, 10, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        fine = self.down(inputs)
        coarse = self.up(self.bottom(nn.functional.max_pool2d(fine, 2)))
        done: Tensor = self.head(self.fuse(torch.cat([fine, coarse], 1))).mean((2, 3))
        return done


class Attention(nn.Module):
    """Pre-norm self-attention and perceptron, each with a shortcut."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.grow, self.shrink = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        normed = self.norm1(inputs)
        parts = [
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        ]
        mixed = nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        out = inputs + self.out(mixed)
        done: Tensor = out + self.shrink(nn.functional.gelu(self.grow(self.norm2(out))))
        return done


class VisionTransformer(nn.Module):
    def __init__(self, width: int = 32, depth: int = 3, side: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.places = nn.Parameter(torch.randn(1, (side // 8) ** 2, width) / 10)
        self.blocks = nn.Sequential(*(Attention(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.patches(inputs).flatten(2).transpose(1, 2) + self.places
        done: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return done


class Perceptron(nn.Module):
    """A perceptron as people write it, with functions between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3072, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.last = nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        out = torch.relu(self.first(torch.flatten(inputs, 1)))
        out = torch.relu(self.third(torch.relu(self.second(out))))
        done: Tensor = self.last(out)
        return done


class Branching(nn.Module):
    """Control flow on values: cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.more, self.head = conv_norm(3, 16), conv_norm(16, 16), nn.Linear(16, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        out = self.stem(inputs)
        if out.mean() > 1e6:
            out = self.more(out)
        done: Tensor = self.head(out.mean((2, 3)))
        return done


def plain_chain() -> nn.Module:
    """A VGG-like chain with large kernels."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 7, padding=3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 5, padding=2), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(32, 10),
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "resnet": ResNet,
    "resnext": lambda: ResNet(width=32, groups=4),
    "mobilenet": lambda: MobileNetV2(share=0.35),
    "densenet": DenseNet,
    "unet": UNet,
    "transformer": VisionTransformer,
    "perceptron": Perceptron,
    "chain": plain_chain,
    "branching": Branching,
}


class Pictures(Task):
    """Random pictures for any network: nothing can be learned, everything can be tried."""

    input = TensorSpec("picture", "FP32", (-1, 3, 32, 32), "NCHW", low=-9, high=9)
    output_kind = "logits"
    labels = tuple("abcdefghij")

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def model(self) -> nn.Module:
        return self.network

    def evaluation(self):  # type: ignore[no-untyped-def]
        random = np.random.default_rng(0)
        return random.normal(size=(40, 3, 32, 32)).astype(np.float32), random.integers(0, 10, 40)

    def training(self):  # type: ignore[no-untyped-def]
        random = np.random.default_rng(1)
        return random.normal(size=(64, 3, 32, 32)).astype(np.float32), random.integers(0, 10, 64)


def pictures(family: str) -> Pictures:
    """A fresh task with a network of the family, its batch norms settled as after training."""
    torch.manual_seed(0)
    network = FAMILIES[family]().train()
    with torch.no_grad():
        for _ in range(20):
            network(torch.randn(16, 3, 32, 32))
    return Pictures(network.eval())
