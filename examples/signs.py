"""German traffic signs: 43 classes, pictures of 32x32 pixels, a small residual network.

python examples/signs.py --download    fetch the pictures once, train (2 to 3 minutes), write signs.pt
python examples/signs.py --pictures signs    also write pictures that the network never saw
shoal optimize examples/signs.py       compress it for this machine

The pictures are GTSRB (benchmark.ini.rub.de; free for research, cite Stallkamp et al. 2012): 39 209 to
learn from in tracks of 30 frames of one physical sign, 12 630 to judge by. `gtsrb32_jpeg.npz` holds them
cropped to the sign and a margin of a sixteenth; public_data.py says where it is looked for. torchvision's
GTSRB is another choice of 26 640 pictures for training: accuracies differ.

SHOAL_QUICK=1 takes every tenth track or picture and few steps: enough to see that everything runs.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import zipfile
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from public_data import Archive, DataSet, locate
from torch import Tensor, nn
from torch.nn import functional

from shoal_optimizer import Task, TensorSpec

HERE = Path(__file__).parent
WEIGHTS = HERE / "signs.pt"
QUICK = bool(os.environ.get("SHOAL_QUICK"))
SIZE = 32
LABELS = (
    "speed limit 20", "speed limit 30", "speed limit 50", "speed limit 60", "speed limit 70",
    "speed limit 80", "end of speed limit 80", "speed limit 100", "speed limit 120", "no passing",
    "no passing for trucks", "right of way at next crossing", "priority road", "yield", "stop",
    "no vehicles", "no trucks", "no entry", "caution", "curve left", "curve right", "double curve",
    "bumpy road", "slippery road", "road narrows", "road works", "traffic lights", "pedestrians",
    "children", "bicycles", "ice or snow", "wild animals", "end of all limits", "turn right ahead",
    "turn left ahead", "straight on only", "straight on or right", "straight on or left", "keep right",
    "keep left", "roundabout", "end of no passing", "end of no passing for trucks",
)  # fmt: skip

# ---------------------------------------------------------------------------- data

_BASE = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
_TRAINING = Archive(_BASE + "GTSRB_Final_Training_Images.zip", "f33fd80ac59bff73c82d25ab499e03a3")
_TEST = Archive(_BASE + "GTSRB_Final_Test_Images.zip", "c7e4e6327067d32654124b0fe9e82185")
_TRUTH = Archive(_BASE + "GTSRB_Final_Test_GT.zip", "fe31e9c9270bbcd7b84b7f21a9d9d9e5")


def pack(places: list[Path], target: Path) -> None:
    """Writes `target` from the three public archives: JPEG crops end to end, classes and tracks."""
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(locate(places, _TRAINING.name)) as archive:
        tables = sorted(name for name in archive.namelist() if name.endswith(".csv"))
        found = [
            (jpeg, int(row["ClassId"]), int(row["Filename"].partition("_")[0]))
            for table in tables
            for jpeg, row in _crops(archive, archive.read(table), str(PurePosixPath(table).parent))
        ]
    _put(arrays, "train", [jpeg for jpeg, _, _ in found], [number for _, number, _ in found])
    arrays["train_track"] = np.array([track for _, _, track in found], np.int32)
    with zipfile.ZipFile(locate(places, _TRUTH.name)) as archive:
        truth = archive.read("GT-final_test.csv")
    with zipfile.ZipFile(locate(places, _TEST.name)) as archive:
        judged = list(_crops(archive, truth, "GTSRB/Final_Test/Images"))
    _put(arrays, "test", [jpeg for jpeg, _ in judged], [int(row["ClassId"]) for _, row in judged])
    np.savez(target, **arrays)  # type: ignore[arg-type]


def _crops(archive: zipfile.ZipFile, table: bytes, folder: str):  # type: ignore[no-untyped-def]
    """(JPEG of the crop, its row) of each picture in a table."""
    for row in csv.DictReader(io.StringIO(table.decode()), delimiter=";"):
        left, top, right, bottom = (int(row[f"Roi.{n}"]) for n in ("X1", "Y1", "X2", "Y2"))
        with Image.open(io.BytesIO(archive.read(f"{folder}/{row['Filename']}"))) as picture:
            across, down = (right - left) / 16, (bottom - top) / 16
            box = (
                max(left - across, 0.0), max(top - down, 0.0),
                min(right + across, picture.width), min(bottom + down, picture.height),
            )  # fmt: skip
            crop = picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
        stream = io.BytesIO()
        crop.save(stream, "JPEG", quality=90, subsampling=0)
        yield stream.getvalue(), row


def _put(arrays: dict[str, np.ndarray], part: str, jpegs: list[bytes], classes: list[int]) -> None:
    arrays[f"{part}_bytes"] = np.frombuffer(b"".join(jpegs), np.uint8)
    arrays[f"{part}_offsets"] = np.cumsum([0, *map(len, jpegs)]).astype(np.int32)
    arrays[f"{part}_y"] = np.array(classes, np.uint8)


DATA = DataSet(
    "gtsrb32_jpeg.npz", "GTSRB", "benchmark.ini.rub.de", "signs.py", (_TRAINING, _TEST, _TRUTH), pack
)  # fmt: skip


@cache
def stored() -> dict[str, np.ndarray]:
    """The packed arrays by name, once."""
    with np.load(DATA.find(HERE), allow_pickle=False) as packed:
        return {name: packed[name] for name in packed.files}


def places(part: str) -> np.ndarray:
    """Which stored pictures belong to a part.

    Frames of a track show the same physical sign, so training and evaluation are cut by track. "thinned"
    is every sixth frame of the training tracks: neighbours hardly differ, and fine-tuning stays short.
    """
    if part == "holdout":
        return np.arange(0, len(stored()["test_y"]), 10 if QUICK else 1)
    tracks, frames = stored()["train_track"], _frames()
    judges = tracks % 10 == 5
    if part == "evaluation":
        return np.flatnonzero(judges & (frames % (15 if QUICK else 2) == 0))
    step = {"training": 1, "thinned": 6}[part]
    kept = ~judges & (frames % (15 if QUICK else step) == 0)
    return np.flatnonzero(kept & (tracks % 4 == 0) if QUICK else kept)


def _frames() -> np.ndarray:
    """Each training picture's place in its track."""
    number = stored()["train_track"].astype(np.int64) + 1000 * stored()["train_y"].astype(np.int64)
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    return np.arange(len(number)) - np.repeat(starts, np.diff(starts, append=len(number)))


@cache
def split(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [n, 32, 32, 3] uint8, red first, and classes [n] int64 of one part."""
    source = "test" if part == "holdout" else "train"
    content, offsets = stored()[f"{source}_bytes"], stored()[f"{source}_offsets"]
    chosen = places(part)
    pictures = np.empty((len(chosen), SIZE, SIZE, 3), np.uint8)
    for row, place in enumerate(chosen):
        with Image.open(io.BytesIO(content[offsets[place] : offsets[place + 1]].tobytes())) as picture:
            pictures[row] = np.asarray(picture.convert("RGB"))
    return pictures, stored()[f"{source}_y"][chosen].astype(np.int64)


# ---------------------------------------------------------------------------- network


class Scale(nn.Module):
    """From the camera's bytes (NHWC) to what the network wants (NCHW, -1 to 1)."""

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.to(torch.float32).permute(0, 3, 1, 2) / 127.5 - 1


class Residual(nn.Module):
    """Two convolutions beside a shortcut: [n, in, h, w] -> [n, out, h / stride, w / stride]."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        self.shortcut = (
            nn.Identity()
            if stride == 1 and channels_in == channels_out
            else nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )
        )

    def forward(self, pictures: Tensor) -> Tensor:
        summed: Tensor = self.body(pictures) + self.shortcut(pictures)
        return functional.relu(summed)


def network(width: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Residual(width, width, 1),
        Residual(width, 2 * width, 2),
        Residual(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(1),
        nn.Linear(4 * width, len(LABELS)),
    )


def vary(pictures: Tensor) -> Tensor:
    """Moves, turns and sizes each picture of a batch [n, 32, 32, 3] a little under another light.

    Nothing is mirrored: "keep left" would become "keep right".
    """
    count = len(pictures)
    angle, size = 0.12 * (2 * torch.rand(2, count) - 1)
    moves = 0.12 * (2 * torch.rand(count, 2) - 1)
    cosine, sine = torch.cos(angle) * (1 + size), torch.sin(angle) * (1 + size)
    maps = torch.stack([cosine, -sine, moves[:, 0], sine, cosine, moves[:, 1]], 1).reshape(count, 2, 3)
    planes = pictures.to(torch.float32).permute(0, 3, 1, 2)
    grid = functional.affine_grid(maps, list(planes.shape), align_corners=False)
    moved = functional.grid_sample(planes, grid, padding_mode="border", align_corners=False)
    contrast, light = torch.rand(2, count, 1, 1, 1)
    changed = (moved - 127.5) * (0.6 + 0.8 * contrast) + 127.5 + 60 * (light - 0.5)
    varied: Tensor = changed.clamp(0, 255).permute(0, 2, 3, 1)
    return varied


def train(epochs: float = 3.2, batch: int = 128) -> nn.Module:
    """Trains from scratch in 2 to 3 minutes on one CPU core."""
    torch.manual_seed(0)
    pictures, classes = split("training")
    inputs, targets = torch.from_numpy(pictures), torch.from_numpy(classes)
    model, scale = network().to(memory_format=torch.channels_last), Scale()  # type: ignore[call-overload]
    steps = 12 if QUICK else round(epochs * len(inputs) / batch)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=steps)
    model.train()
    for step in range(steps):
        if step * batch % len(inputs) < batch:
            order = torch.randperm(len(inputs))
        start = step * batch % len(inputs)
        chosen = order[start : start + batch]
        outputs = model(scale(vary(inputs[chosen])))
        loss = functional.cross_entropy(outputs, targets[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[no-any-return, call-overload]


class Signs(Task):
    """Which traffic sign is on the picture?"""

    input = TensorSpec("picture", "UINT8", (-1, SIZE, SIZE, 3), "NHWC", low=0, high=255)
    input_kind = "image"
    output_kind = "logits"
    color = "rgb"
    resize = "stretch"
    labels = LABELS
    files = ("public_data.py",)
    optional_files = ("signs.pt", "gtsrb32_jpeg.npz")

    def model(self) -> nn.Module:
        if not WEIGHTS.exists():
            return train()
        model = network()
        model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
        return model

    def preprocess(self) -> nn.Module:
        return Scale()

    def training(self):  # type: ignore[no-untyped-def]
        return split("thinned")

    def evaluation(self):  # type: ignore[no-untyped-def]
        return split("evaluation")

    def holdout(self):  # type: ignore[no-untyped-def]
        return split("holdout")

    def augment(self, pictures: Tensor) -> Tensor:
        return vary(pictures)


# ---------------------------------------------------------------------------- the script


def report(model: nn.Module, part: str) -> str:
    """Accuracy over pictures and, since classes are unequal, the mean over the classes that appear."""
    pictures, classes = split(part)
    with torch.inference_mode():
        pieces = [model(Scale()(piece)).argmax(1) for piece in torch.split(torch.from_numpy(pictures), 256)]
    right = torch.cat(pieces).numpy() == classes
    present = np.unique(classes)
    macro = np.mean([right[classes == number].mean() for number in present])
    return (
        f"{part}: {right.mean():.3f} of {len(right)} pictures right, {macro:.3f} in the mean of "
        f"{len(present)} classes"
    )


def write_pictures(folder: Path, count: int = 8) -> None:
    """Held-out crops, enlarged as a camera's would be: PNG and JPEG files named after their sign."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures, classes = split("holdout")
    wanted = [14, 13, 12, 1, 17, 25, 38, 40][:count]
    for place, number in enumerate(number for number in wanted if (classes == number).any()):
        picture = Image.fromarray(pictures[np.flatnonzero(classes == number)[0]])
        name = LABELS[number].replace(" ", "-") + (".png" if place % 2 else ".jpg")
        picture.resize((128, 128), Image.Resampling.BICUBIC).save(folder / name, quality=92)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the traffic sign network.")
    parser.add_argument("--download", action="store_true", help="fetch the public data set if it is missing")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="also write pictures to try it with")
    options = parser.parse_args()
    try:
        DATA.ensure(HERE, options.download)
    except (OSError, RuntimeError) as error:
        raise SystemExit(str(error)) from error
    if options.pictures:
        write_pictures(options.pictures)
        print(f"{options.pictures}: pictures to try it with")
    trained = train()
    torch.save(trained.state_dict(), WEIGHTS)
    print(f"{WEIGHTS.name} written")
    for part in ("evaluation", "holdout"):
        print(report(trained, part))


if __name__ == "__main__":
    main()
