"""The networks that the benchmark compresses: fixed in advance, each a family by width and depth.

All take float32 pictures [n, 3, 32, 32] and give logits [n, classes].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut: [n, in, h, w] -> [n, out, h / stride, w / stride]."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.second = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, pictures: Tensor) -> Tensor:
        inner = functional.relu(self.norm1(self.first(pictures)))
        return functional.relu(self.norm2(self.second(inner)) + self.shortcut(pictures))


class ResNet(nn.Module):
    """Stem, 2x2 max-pool, stages of residual blocks (the first of a later stage halves), mean, linear."""

    def __init__(self, widths: Sequence[int], blocks: Sequence[int], classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, 1, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        stages, before = [], widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            made = []
            for place in range(count):
                made.append(Residual(before, width, 2 if stage and not place else 1))
                before = width
            stages.append(nn.Sequential(*made))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(before, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        found: Tensor = self.head(mean(self.stages(self.stem(pictures))))
        return found


def resnet18(classes: int, width: float = 1.0, depth: float = 1.0) -> ResNet:
    """ResNet-18 shape of He et al. (2015), width 32 instead of 64 and a 2x2 pool: small pictures."""
    return ResNet(scaled((32, 64, 128, 256), width), [max(1, round(2 * depth))] * 4, classes)


def wide_resnet10(classes: int, width: float = 1.0, depth: float = 1.0) -> ResNet:
    """The same with one block in each stage, and twice as wide: few wide layers."""
    return ResNet(scaled((64, 128, 256, 512), width), [1] * 4, classes)


class Inverted(nn.Module):
    """MobileNetV2's block: expand 1x1, depthwise 3x3, project 1x1 without activation."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = channels_in * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [nn.Conv2d(channels_in, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()]
        layers += [
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(),
            nn.Conv2d(inner, channels_out, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        ]
        self.body = nn.Sequential(*layers)
        self.adds = stride == 1 and channels_in == channels_out

    def forward(self, pictures: Tensor) -> Tensor:
        found: Tensor = self.body(pictures)
        return pictures + found if self.adds else found


MOBILE_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 2, 2), (6, 64, 3, 2), (6, 96, 2, 1), (6, 160, 1, 2))


class MobileNet(nn.Module):
    """MobileNetV2 of Sandler et al. (2018), strides and depth fitted to 32x32."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
        before = 32
        for expand, width, count, stride in MOBILE_STAGES:
            for place in range(count):
                layers.append(Inverted(before, width, stride if not place else 1, expand))
                before = width
        layers += [nn.Conv2d(before, 640, 1, bias=False), nn.BatchNorm2d(640), nn.ReLU6()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(640, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        found: Tensor = self.head(mean(self.body(pictures)))
        return found


def mean(planes: Tensor) -> Tensor:
    """[n, c, s, s] -> [n, c]. As a pool, since runtimes keep a pool in int8 and a reduction in float."""
    return functional.avg_pool2d(planes, planes.shape[-1]).flatten(1)


def scaled(widths: Sequence[int], share: float, multiple: int = 8) -> list[int]:
    """Channel counts times `share`, rounded to a multiple of 8: kernels compute whole vectors."""
    return [max(multiple, math.floor(width * share / multiple + 0.5) * multiple) for width in widths]


class Scale(nn.Module):
    """From bytes to 0..1. No shift: padding with zeros stays black, and a product folds into the stem."""

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.to(torch.float32) * (1 / 255)
