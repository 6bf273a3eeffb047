"""A detection task for tests: where are the bright and the dark squares of a 32x32 image?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from shoal_optimizer import BoxRule, Task, TensorSpec

SIDE, CELLS = 32, 8
LABELS = ("bright", "dark")


def images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [n, 32, 32, 1] uint8 and boxes [n, 2, 5] float32; a second square in half of them."""
    random = np.random.default_rng(seed)
    pixels = random.integers(90, 150, (count, SIDE, SIDE, 1))
    targets = np.zeros((count, 2, 5), np.float32)
    targets[..., 4] = -1
    for image, boxes in zip(pixels, targets, strict=True):
        for half in range(int(random.integers(1, 3))):
            width, height, kind = *random.integers(6, 12, 2), int(random.integers(0, 2))
            x = 16 * half + int(random.integers(0, 16 - width))
            y = int(random.integers(0, SIDE - height))
            image[y : y + height, x : x + width] += 90 if kind == 0 else -80
            boxes[half] = (x / SIDE, y / SIDE, (x + width) / SIDE, (y + height) / SIDE, kind)
    return pixels.astype(np.uint8), targets


class Scale(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.float32).permute(0, 3, 1, 2) / 64.0 - 2


class Decode(nn.Module):
    """[n, 4 + 2, 8, 8] -> [n, 64, 4 + 2]."""

    cells: Tensor

    def __init__(self) -> None:
        super().__init__()
        y, x = torch.meshgrid(torch.arange(CELLS) + 0.5, torch.arange(CELLS) + 0.5, indexing="ij")
        self.register_buffer("cells", torch.stack([x.flatten(), y.flatten()], -1))

    def forward(self, head: Tensor) -> Tensor:
        said = head.flatten(2).transpose(1, 2)
        centre = (self.cells + said[..., :2]) / CELLS
        half = torch.exp(said[..., 2:4].clamp(-3, 3)) / CELLS
        return torch.cat([centre - half, centre + half, torch.sigmoid(said[..., 4:])], -1)


def loss_of(head: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every cell's scores, L1 of the box in the cells that hold a centre."""
    wanted = torch.zeros_like(head)
    mask = torch.zeros(len(head), 1, CELLS, CELLS)
    for item, boxes in enumerate(targets):
        for x1, y1, x2, y2, kind in boxes[boxes[:, 4] >= 0].tolist():
            x, y = (x1 + x2) / 2 * CELLS, (y1 + y2) / 2 * CELLS
            row, column = min(int(y), CELLS - 1), min(int(x), CELLS - 1)
            size = (np.log((x2 - x1) * CELLS / 2), np.log((y2 - y1) * CELLS / 2))
            wanted[item, :4, row, column] = torch.tensor([x - column - 0.5, y - row - 0.5, *size])
            wanted[item, 4 + int(kind), row, column] = mask[item, 0, row, column] = 1
    scores = functional.binary_cross_entropy_with_logits(
        head[:, 4:], wanted[:, 4:], reduction="sum", pos_weight=torch.tensor(3.0)
    )
    return (scores + 2 * ((head[:, :4] - wanted[:, :4]).abs() * mask).sum()) / mask.sum().clamp(min=1)


def block(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]


class Blobs(Task):
    input = TensorSpec("pixels", "UINT8", (-1, SIDE, SIDE, 1), "NHWC", low=0, high=255)
    input_kind = "image"
    color = "gray"
    resize = "letterbox"
    output_kind = "boxes"
    boxes = BoxRule(score_threshold=0.3, iou_threshold=0.4, max_boxes=10)
    labels = LABELS

    def network(self) -> nn.Module:
        return nn.Sequential(
            *block(1, 16, 2), *block(16, 32, 2), *block(32, 32, 1), nn.Conv2d(32, 4 + len(LABELS), 1)
        )

    def model(self) -> nn.Module:
        model, scale = self.network(), Scale()
        pixels, targets = (torch.from_numpy(part) for part in images(256, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=121)
        model.train()
        for _ in range(120):
            chosen = torch.randint(0, len(pixels), (32,))
            loss = loss_of(model(scale(pixels[chosen])), targets[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        return model.eval()

    def preprocess(self) -> nn.Module:
        return Scale()

    def postprocess(self) -> nn.Module:
        return Decode()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return loss_of(outputs, targets)

    def training(self):  # type: ignore[no-untyped-def]
        return images(256, 1)

    def evaluation(self):  # type: ignore[no-untyped-def]
        return images(200, 2)
