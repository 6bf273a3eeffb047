"""Handwritten digits: 8x8 images of scikit-learn, a convolutional network, ten classes.

python examples/digits.py              train and write digits.pt beside this file
python examples/digits.py --pictures pictures    the same, and ten images that it never saw as PNG files
shoal optimize examples/digits.py      compress it for this machine
shoal demo                             the whole story with a small fleet
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from shoal_optimizer import Task, TensorSpec

WEIGHTS = Path(__file__).with_name("digits.pt")
SPLIT_SEED = 7
TRAINING, EVALUATION = 847, 250  # the other 700 are traffic that Shoal never sees


def split(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 8, 8, 1] uint8 from 0 to 16 and labels [n] int64 of one part of the data."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    bounds = {
        "training": slice(0, TRAINING),
        "evaluation": slice(TRAINING, TRAINING + EVALUATION),
        "holdout": slice(TRAINING + EVALUATION, None),
    }
    chosen = order[bounds[part]]
    return images[chosen].reshape(-1, 8, 8, 1).astype(np.uint8), labels[chosen].astype(np.int64)


class Scale(nn.Module):
    """From the camera's bytes (NHWC, 0 to 16) to what the network wants (NCHW, 0 to 1)."""

    def forward(self, images: Tensor) -> Tensor:
        return images.to(torch.float32).permute(0, 3, 1, 2) / 16.0


def block(channels_in: int, channels_out: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]


def network() -> nn.Module:
    return nn.Sequential(
        *block(1, 32),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 128),
        *block(128, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(1),
        nn.Linear(128, 10),
    )


def shift(images: Tensor) -> Tensor:
    """Moves the whole batch [n, 8, 8, 1] by up to one pixel, zeros coming in."""
    down, right = (int(step) for step in torch.randint(-1, 2, (2,)))
    padded = nn.functional.pad(images, (0, 0, 1, 1, 1, 1))
    return padded[:, 1 + down : 9 + down, 1 + right : 9 + right]


def train(epochs: int = 10, batch: int = 32) -> nn.Module:
    """Trains from scratch in a few seconds on one CPU core."""
    torch.manual_seed(0)
    images, labels = split("training")
    inputs, targets = torch.from_numpy(images), torch.from_numpy(labels)
    model, scale = network(), Scale()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-3)
    steps = -(-len(inputs) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(inputs))
        for start in range(0, len(inputs), batch):
            chosen = order[start : start + batch]
            loss = nn.functional.cross_entropy(model(scale(shift(inputs[chosen]))), targets[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


class Digits(Task):
    """Which digit is on the image?"""

    input = TensorSpec("image", "UINT8", (-1, 8, 8, 1), "NHWC", low=0, high=16)
    input_kind = "image"
    output_kind = "logits"
    color = "gray"
    resize = "stretch"
    labels = tuple("0123456789")
    optional_files = ("digits.pt",)

    def model(self) -> nn.Module:
        if not WEIGHTS.exists():
            return train()
        model = network()
        model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
        return model

    def preprocess(self) -> nn.Module:
        return Scale()

    def training(self):  # type: ignore[no-untyped-def]
        return split("training")

    def evaluation(self):  # type: ignore[no-untyped-def]
        return split("evaluation")

    def holdout(self):  # type: ignore[no-untyped-def]
        return split("holdout")

    def augment(self, images: Tensor) -> Tensor:
        return shift(images)


def write_pictures(folder: Path) -> None:
    """One image of each digit that the network never saw, in a picture's range from 0 to 255."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    images, labels = split("holdout")
    for digit in range(10):
        image = images[labels == digit][0, :, :, 0]
        Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)).save(folder / f"{digit}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the example's network.")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="also write ten PNG files there")
    options = parser.parse_args()
    trained = train()
    torch.save(trained.state_dict(), WEIGHTS)
    images, labels = split("evaluation")
    with torch.inference_mode():
        answers = trained(Scale()(torch.from_numpy(images))).argmax(1).numpy()
    print(f"{WEIGHTS.name}: {np.mean(answers == labels):.3f} of {len(labels)} images right")
    if options.pictures:
        write_pictures(options.pictures)
        print(f"{options.pictures}: ten pictures to try it with")


if __name__ == "__main__":
    main()
