"""Traffic signs in a picture: boxes with six kinds of signs, a small single-stage detector.

    python examples/signs.py --download      fetch the signs once; or set SHOAL_DATA to where they are
    python examples/detector.py              train and write detector.pt beside this file
    python examples/detector.py --pictures scenes    write scenes to try it with
    shoal optimize examples/detector.py      compress it for this machine

The scenes are composed: real signs in real photographs (scenes.py says how).
Evaluation and holdout have photographs and signs that training never saw.

SHOAL_QUICK=1 takes a twentieth of the scenes and a few steps: enough to see that everything runs.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scenes import HEIGHT, LABELS, WIDTH, contact_sheet, scenes
from torch import Tensor, nn
from torch.nn import functional

from shoal_optimizer import BoxRule, Task, TensorSpec

HERE = Path(__file__).parent
WEIGHTS = HERE / "detector.pt"
QUICK = bool(os.environ.get("SHOAL_QUICK"))
COUNTS = {"training": 800, "evaluation": 250, "holdout": 150}
STRIDE = 8
ROWS, COLUMNS = HEIGHT // STRIDE, WIDTH // STRIDE
SIZE = 32.0  # pixels of a box whose log-size is 0


def split(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [n, 192, 256, 3] uint8 and targets [n, 4, 5] float32 of one part."""
    pictures, targets = scenes(part, COUNTS[part] // (20 if QUICK else 1), HERE)
    return pictures, targets


# ---------------------------------------------------------------------------- network


class Scale(nn.Module):
    """From the camera's bytes (NHWC) to what the network wants (NCHW, -1 to 1)."""

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.to(torch.float32).permute(0, 3, 1, 2) / 127.5 - 1


def block(channels_in: int, channels_out: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())


class Detector(nn.Module):
    """One head at stride 8 that also sees stride 16: [n, 3, 192, 256] -> [n, 4 + labels, 24, 32].

    All outputs are one tensor and of like size, since they share a scale when quantized: the centre's
    distance from the cell's (cells), the logarithm of width and height, one logit a label.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(block(3, 16, 2), block(16, 24, 2), block(24, 48, 2), block(48, 48))
        self.wide = nn.Sequential(
            block(48, 64, 2), block(64, 64), block(64, 48, kernel=1), nn.Upsample(scale_factor=2)
        )
        self.near = block(48, 48)
        self.head = nn.Sequential(block(48, 64), nn.Conv2d(64, 4 + len(LABELS), 1))
        last = self.head[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        nn.init.constant_(last.bias[4:], -3.0)  # signs are rare: start by seeing none

    def forward(self, pictures: Tensor) -> Tensor:
        fine = self.stem(pictures)
        return self.head(self.near(fine) + self.wide(fine))  # type: ignore[no-any-return]


class Decode(nn.Module):
    """From the head [n, 4 + labels, 24, 32] to candidates [n, 768, 4 + labels]: corners, then scores."""

    cells: Tensor
    whole: Tensor

    def __init__(self) -> None:
        super().__init__()
        y, x = torch.meshgrid(torch.arange(ROWS) + 0.5, torch.arange(COLUMNS) + 0.5, indexing="ij")
        self.register_buffer("cells", torch.stack([x.flatten(), y.flatten()], -1))
        self.register_buffer("whole", torch.tensor([float(WIDTH), float(HEIGHT)]))

    def forward(self, head: Tensor) -> Tensor:
        said = head.flatten(2).transpose(1, 2)
        centre = (self.cells + said[..., :2]) * STRIDE / self.whole
        half = torch.exp(said[..., 2:4].clamp(-3, 3)) * (SIZE / 2) / self.whole
        return torch.cat([centre - half, centre + half, torch.sigmoid(said[..., 4:])], -1)


# ---------------------------------------------------------------------------- loss


def wanted(targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the head should say for targets [n, boxes, 5].

    Returns the scores [n, labels, 24, 32], 1 in the cell of a sign's centre and falling off around it
    (Zhou, Wang, Krähenbühl, "Objects as Points", 2019), and for every cell the box [n, 4, 24, 32] of the
    nearest sign with its weight [n, 1, 24, 32].
    """
    grid = torch.tensor([COLUMNS, ROWS], dtype=torch.float32)
    real = (targets[..., 4] >= 0).float()
    centre = (targets[..., :2] + targets[..., 2:4]) / 2 * grid  # in cells
    size = (targets[..., 2:4] - targets[..., :2]) * grid
    home = centre.floor() + 0.5
    y, x = torch.meshgrid(torch.arange(ROWS) + 0.5, torch.arange(COLUMNS) + 0.5, indexing="ij")
    cells = torch.stack([x, y], -1)
    away = cells - home[:, :, None, None, :]  # [n, boxes, rows, columns, 2]
    spread = (size / 6).clamp(min=0.5)[:, :, None, None, :]
    near = torch.exp(-(away**2 / (2 * spread**2)).sum(-1)) * real[..., None, None]
    kinds = functional.one_hot(targets[..., 4].long().clamp(min=0), len(LABELS)).float()
    scores = (near[:, :, None] * kinds[..., None, None]).amax(1)
    weight, which = near.max(1, keepdim=True)
    offset = (centre[:, :, None, None, :] - cells).permute(0, 1, 4, 2, 3)
    logs = torch.log(size.clamp(min=1e-3) * STRIDE / SIZE)[..., None, None].expand_as(offset)
    boxes = torch.cat([offset, logs], 2).gather(1, which[:, :, None].expand(-1, -1, 4, -1, -1))[:, 0]
    return scores, boxes, torch.where(weight > 0.3, weight, 0.0)


def detection_loss(head: Tensor, targets: Tensor) -> Tensor:
    """The penalty-reduced focal loss of "Objects as Points" (equation 1) for scores, L1 for boxes."""
    scores, boxes, weight = wanted(targets)
    logits = head[:, 4:]
    right, wrong = functional.logsigmoid(logits), functional.logsigmoid(-logits)
    share = torch.sigmoid(logits)
    centre = (scores == 1).float()
    focal = centre * (1 - share) ** 2 * right + (1 - centre) * (1 - scores) ** 4 * share**2 * wrong
    away = (functional.l1_loss(head[:, :4], boxes, reduction="none") * weight).sum()
    return -focal.sum() / centre.sum().clamp(min=1) + away / weight.sum().clamp(min=1)


# ---------------------------------------------------------------------------- training


def light(pictures: Tensor) -> Tensor:
    """Another brightness, contrast and colour for each picture [n, 192, 256, 3] of 0 to 255."""
    count = len(pictures)
    gain = 0.75 + 0.5 * torch.rand(count, 1, 1, 1)
    tint = 0.9 + 0.2 * torch.rand(count, 1, 1, 3)
    shift = 40 * torch.rand(count, 1, 1, 1) - 20
    return (pictures.to(torch.float32) * gain * tint + shift).clamp(0, 255)


def mirrored(pictures: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Half of the batch seen in a mirror: the kinds of signs stay what they are."""
    flip = torch.rand(len(pictures)) < 0.5
    pictures, targets = pictures.clone(), targets.clone()
    pictures[flip] = pictures[flip].flip(2)
    swapped = targets[flip]
    swapped[..., [0, 2]] = 1 - swapped[..., [2, 0]]
    targets[flip] = swapped
    return pictures, targets


def train(epochs: int = 2 if QUICK else 14, batch: int = 16) -> nn.Module:
    """Trains from scratch in two CPU minutes."""
    torch.manual_seed(0)
    pictures, targets = (torch.from_numpy(array) for array in split("training"))
    model, scale = Detector(), Scale()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-3)
    steps = -(-len(pictures) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(pictures))
        for start in range(0, len(pictures), batch):
            chosen = order[start : start + batch]
            seen, truth = mirrored(pictures[chosen], targets[chosen])
            loss = detection_loss(model(scale(light(seen))), truth)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


class Signs(Task):
    """Where is which sign?"""

    name = "detector"
    input = TensorSpec("image", "UINT8", (-1, HEIGHT, WIDTH, 3), "NHWC", low=0, high=255)
    input_kind = "image"
    color = "rgb"
    resize = "letterbox"
    output_kind = "boxes"
    boxes = BoxRule(score_threshold=0.3, iou_threshold=0.5, max_boxes=20)
    labels = LABELS
    files = ("scenes.py",)
    optional_files = ("detector.pt", "gtsrb32_jpeg.npz")

    def model(self) -> nn.Module:
        if not WEIGHTS.exists():
            return train()
        model = Detector()
        model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
        return model

    def preprocess(self) -> nn.Module:
        return Scale()

    def postprocess(self) -> nn.Module:
        return Decode()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return detection_loss(outputs, targets)

    def training(self):  # type: ignore[no-untyped-def]
        return split("training")

    def evaluation(self):  # type: ignore[no-untyped-def]
        return split("evaluation")

    def holdout(self):  # type: ignore[no-untyped-def]
        return split("holdout")

    def augment(self, pictures: Tensor) -> Tensor:
        return light(pictures)


def write_pictures(folder: Path, count: int = 12) -> None:
    """JPEG files of scenes that the network never saw, and `truth/boxes.png` with what is in them."""
    (folder / "truth").mkdir(parents=True, exist_ok=True)
    for place, pixels in enumerate(scenes("holdout", count, HERE)[0]):
        Image.fromarray(pixels).save(folder / f"scene-{place:02d}.jpg", quality=92)
    contact_sheet("holdout", HERE, count).save(folder / "truth" / "boxes.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the detector and writes detector.pt.")
    parser.add_argument("--pictures", type=Path, help="only write scenes it never saw into this folder")
    folder = parser.parse_args().pictures
    if folder is not None:
        write_pictures(folder)
        return
    trained = train()
    torch.save(trained.state_dict(), WEIGHTS)
    task = Signs()
    for part in ("evaluation", "holdout"):
        pictures, targets = split(part)
        value = task.metric(task.predict(trained, pictures), targets)
        print(f"{part}: map50 {value:.3f} on {len(pictures)} composed scenes")


if __name__ == "__main__":
    main()
