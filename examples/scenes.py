"""Composed street scenes for detector.py: real traffic signs pasted into real photographs.

They are composed, not photographed: signs are crops of GTSRB (benchmark.ini.rub.de, free for research,
cite Stallkamp et al. 2012), cut out along the sign's shape and matched in brightness and blur;
photographs are those that come with the package scikit-image. So the boxes are known exactly, and
accuracy on these scenes says how a detector keeps up under compression, not how it does on a street.

Two layouts of GTSRB are read, from the task's folder or the one that SHOAL_DATA names: `gtsrb32_jpeg.npz`
as `python examples/signs.py --download` packs it, or what
`torchvision.datasets.GTSRB(root, split="train", download=True)` puts on disk.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

HEIGHT, WIDTH = 192, 256
CROP = 32  # pixels of a sign's crop: its box and a margin of a sixteenth of it on each side
MARGIN = (1 / 16) / (1 + 2 / 16)  # the same as a share of the crop
MAX_SIGNS = 4
_ZOOM = 4  # how much finer than the crop its outline is drawn

# The three categories of the German Traffic Sign Detection Benchmark, and three signs with shapes of
# their own: label -> (numbers of GTSRB, outline as shares of the box).
_ROUND = [(0.5 + 0.5 * np.cos(a), 0.5 + 0.5 * np.sin(a)) for a in np.linspace(0, 2 * np.pi, 24, False)]
_EIGHT = [(0.3, 0), (0.7, 0), (1, 0.3), (1, 0.7), (0.7, 1), (0.3, 1), (0, 0.7), (0, 0.3)]
CATEGORIES: dict[str, tuple[tuple[int, ...], Sequence[tuple[float, float]]]] = {
    "prohibitory": ((0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16), _ROUND),
    "danger": ((11, *range(18, 32)), [(0.5, 0), (1, 0.95), (0, 0.95)]),
    "mandatory": (tuple(range(33, 41)), _ROUND),
    "priority": ((12,), [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)]),
    "yield": ((13,), [(0, 0.05), (1, 0.05), (0.5, 1)]),
    "stop": ((14,), _EIGHT),
}
LABELS = tuple(CATEGORIES)

# No photograph and no physical sign is in two of the parts that learn and judge.
# Both sides have smooth and busy ones: else every field would look as strange as the judging side.
_TRAINING_PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "coffee.png", "coins.png", "gravel.png",
    "hubble_deep_field.jpg", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg",
)  # fmt: skip
_JUDGING_PHOTOS = ("chelsea.png", "grass.png", "ihc.png", "rocket.jpg")
PARTS = {  # part -> (photographs, tracks modulo 5, seed)
    "training": (_TRAINING_PHOTOS, (0, 1, 2), 1),
    "evaluation": (_JUDGING_PHOTOS, (3,), 2),
    "holdout": (_JUDGING_PHOTOS, (4,), 3),
}


@dataclass(frozen=True)
class Signs:
    """Crops [n, 32, 32, 3] uint8, places in `LABELS` [n], and the track within its GTSRB class [n]
    (a track is one physical sign, photographed 30 times)."""

    crops: np.ndarray
    kinds: np.ndarray
    tracks: np.ndarray


# ---------------------------------------------------------------------------- signs


@cache
def signs(folder: Path, frames: int = 4) -> Signs:
    """The last `frames` pictures (the nearest ones) of every track of the classes in `CATEGORIES`.

    Raises:
        FileNotFoundError: neither `folder` nor SHOAL_DATA has GTSRB.
    """
    kind_of = {number: place for place, (numbers, _) in enumerate(CATEGORIES.values()) for number in numbers}
    crops, kinds, tracks = [], [], []
    for number, track, crop in _latest(_source(folder), frames, set(kind_of)):
        crops.append(crop)
        kinds.append(kind_of[number])
        tracks.append(track)
    return Signs(np.stack(crops), np.array(kinds), np.array(tracks))


def _source(folder: Path) -> Path:
    for place in (folder, Path(os.environ.get("SHOAL_DATA", "."))):
        for name in ("gtsrb32_jpeg.npz", "gtsrb/GTSRB/Training"):
            if (place / name).exists():
                return place / name
    raise FileNotFoundError(
        "GTSRB is neither beside detector.py nor in the folder that SHOAL_DATA names. "
        "Run `python examples/signs.py --download` to fetch it (benchmark.ini.rub.de)"
    )


def _latest(source: Path, frames: int, numbers: set[int]) -> Iterator[tuple[int, int, np.ndarray]]:
    """(GTSRB class, track, crop) of the last frames of each track."""
    if source.suffix == ".npz":
        yield from _packed(source, frames, numbers)
    else:
        yield from _downloaded(source, frames, numbers)


def _packed(source: Path, frames: int, numbers: set[int]) -> Iterator[tuple[int, int, np.ndarray]]:
    with np.load(source, allow_pickle=False) as stored:
        content, offsets = stored["train_bytes"].tobytes(), stored["train_offsets"]
        classes, tracks = stored["train_y"].astype(int), stored["train_track"].astype(int)
    for number in sorted(numbers):
        own = np.flatnonzero(classes == number)
        for track in np.unique(tracks[own]):
            for place in own[tracks[own] == track][-frames:]:
                with Image.open(io.BytesIO(content[offsets[place] : offsets[place + 1]])) as picture:
                    yield number, int(track), np.asarray(picture.convert("RGB"))


def _downloaded(source: Path, frames: int, numbers: set[int]) -> Iterator[tuple[int, int, np.ndarray]]:
    """torchvision's layout: 00014/GT-00014.csv, and 00014/TTTTT_FFFFF.ppm by track and frame."""
    for number in sorted(numbers):
        table = source / f"{number:05d}" / f"GT-{number:05d}.csv"
        if not table.is_file():
            continue
        with table.open(newline="") as stream:
            rows = sorted(csv.DictReader(stream, delimiter=";"), key=lambda row: row["Filename"])
        by_track: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            by_track.setdefault(row["Filename"].partition("_")[0], []).append(row)
        for track, found in by_track.items():
            for row in found[-frames:]:
                left, top, right, bottom = (int(row[f"Roi.{n}"]) for n in ("X1", "Y1", "X2", "Y2"))
                across, down = (right - left) / 16, (bottom - top) / 16
                box = (left - across, top - down, right + across, bottom + down)
                with Image.open(table.parent / row["Filename"]) as picture:
                    crop = picture.convert("RGB").resize(
                        (CROP, CROP), Image.Resampling.BILINEAR, box=cut_at(box, picture.size)
                    )
                yield number, int(track), np.asarray(crop)


def cut_at(
    box: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """A box cut at the edges of a picture of `size` (width, height)."""
    return (max(box[0], 0.0), max(box[1], 0.0), min(box[2], size[0]), min(box[3], size[1]))


# ---------------------------------------------------------------------------- photographs


@cache
def photograph(name: str) -> Image.Image:
    """A photograph that comes with scikit-image, RGB. Nothing is downloaded."""
    import skimage

    with Image.open(Path(skimage.__file__).parent / "data" / name) as picture:
        return picture.convert("RGB")


def _background(random: np.random.Generator, names: Sequence[str]) -> np.ndarray:
    """Part of a photograph [192, 256, 3] float32 under another light."""
    picture = photograph(names[int(random.integers(len(names)))])
    share = random.uniform(0.45, 1.0)
    height = share * min(picture.height, picture.width * HEIGHT / WIDTH)
    width = height * WIDTH / HEIGHT
    left, top = random.uniform(0, picture.width - width), random.uniform(0, picture.height - height)
    part = picture.resize(
        (WIDTH, HEIGHT), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
    )
    pixels = np.asarray(part, np.float32)[:, :: int(random.choice([-1, 1]))] / 255
    tint = random.uniform(0.85, 1.15, 3).astype(np.float32)
    return np.asarray(255 * np.clip(pixels * tint, 0, 1) ** random.uniform(0.6, 1.6), np.float32)


# ---------------------------------------------------------------------------- composing


def scene(random: np.random.Generator, names: Sequence[str], pool: Signs) -> tuple[np.ndarray, np.ndarray]:
    """One picture [192, 256, 3] uint8 and its boxes [signs, 5] float32 (shares, class)."""
    canvas = _background(random, names)
    boxes: list[tuple[float, ...]] = []
    for _ in range(int(random.integers(0, MAX_SIGNS + 1))):
        kind = int(random.integers(len(LABELS)))
        own = np.flatnonzero(pool.kinds == kind)
        if not len(own):
            continue
        crop = pool.crops[own[int(random.integers(len(own)))]]
        width = float(np.exp(random.uniform(np.log(16), np.log(56))))
        height = width * random.uniform(0.92, 1.08)
        left, top = random.uniform(1, WIDTH - width - 1), random.uniform(1, HEIGHT - height - 1)
        box = (left, top, left + width, top + height)
        if all(_apart(box, other) for other in boxes):
            _paste(random, canvas, crop, kind, box)
            boxes.append((*box, kind))
    canvas = _as_camera(random, canvas)
    target = np.array(boxes, np.float32).reshape(-1, 5) / (WIDTH, HEIGHT, WIDTH, HEIGHT, 1)
    return canvas, target.astype(np.float32)


def _apart(box: Sequence[float], other: Sequence[float]) -> bool:
    return bool(
        box[2] < other[0] - 2 or other[2] < box[0] - 2 or box[3] < other[1] - 2 or other[3] < box[1] - 2
    )


def _paste(
    random: np.random.Generator, canvas: np.ndarray, crop: np.ndarray, kind: int, box: Sequence[float]
) -> None:
    """Draws a sign into `canvas` so that it fills `box`: cut out along its shape, as bright as its place."""
    across, down = (box[2] - box[0]) / 16, (box[3] - box[1]) / 16  # the crop's margin on the canvas
    left, top, right, bottom = cut_at(
        (box[0] - across, box[1] - down, box[2] + across, box[3] + down), (WIDTH, HEIGHT)
    )
    x0, y0, x1, y1 = int(left), int(top), int(np.ceil(right)), int(np.ceil(bottom))
    # From a pixel of the window x0..x1, y0..y1 to the crop's pixel.
    wide, high = CROP / (box[2] - box[0] + 2 * across), CROP / (box[3] - box[1] + 2 * down)
    move = (wide, 0.0, (x0 - box[0] + across) * wide, 0.0, high, (y0 - box[1] + down) * high)

    def placed(picture: Image.Image, zoom: int) -> np.ndarray:
        window = picture.transform(
            (x1 - x0, y1 - y0),
            Image.Transform.AFFINE,
            tuple(zoom * step for step in move),
            Image.Resampling.BILINEAR,
        )
        return np.asarray(window, np.float32)

    blur = max(random.uniform(0.0, 0.8), 0.4 * min(wide, 2.0))  # a smaller copy needs it against aliasing
    sign = placed(Image.fromarray(crop).filter(ImageFilter.GaussianBlur(blur)), 1)
    mask = placed(_shape(kind), _ZOOM)[..., None] / 255
    place = canvas[y0:y1, x0:x1]
    bright = (np.mean(place) + 30) / (np.mean(sign) + 30)
    sign = np.clip(sign * bright ** random.uniform(0.2, 0.6) * random.uniform(0.8, 1.25), 0, 255)
    place += mask * (sign - place)


@cache
def _shape(kind: int) -> Image.Image:
    """The outline of a kind of sign, `_ZOOM` times as large as a crop, 255 inside, with a soft edge."""
    side = _ZOOM * CROP
    points = [
        tuple((MARGIN + share * (1 - 2 * MARGIN)) * side for share in point)
        for point in list(CATEGORIES.values())[kind][1]
    ]
    shape = Image.new("L", (side, side))
    ImageDraw.Draw(shape).polygon(points, fill=255, outline=255, width=2)
    return shape.filter(ImageFilter.GaussianBlur(3))


def _as_camera(random: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """What a small camera adds: blur and noise, over photograph and signs alike."""
    picture = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    picture = picture.filter(ImageFilter.GaussianBlur(random.uniform(0, 0.9)))
    noise = random.normal(0, random.uniform(0, 7), (HEIGHT, WIDTH, 1))
    return np.clip(np.asarray(picture, np.float32) + noise + 0.5, 0, 255).astype(np.uint8)


def scenes(part: str, count: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [count, 192, 256, 3] uint8 and targets [count, 4, 5] float32 (class -1 = padding) of
    "training", "evaluation" or "holdout". Equal arguments give equal scenes.

    Raises:
        FileNotFoundError: there is no GTSRB.
    """
    names, remainders, seed = PARTS[part]
    pool = signs(folder)
    chosen = np.isin(pool.tracks % 5, remainders)
    own = Signs(pool.crops[chosen], pool.kinds[chosen], pool.tracks[chosen])
    random = np.random.default_rng(seed)
    pictures = np.empty((count, HEIGHT, WIDTH, 3), np.uint8)
    targets = np.zeros((count, MAX_SIGNS, 5), np.float32)
    targets[..., 4] = -1
    for place in range(count):
        pictures[place], boxes = scene(random, names, own)
        targets[place, : len(boxes)] = boxes
    return pictures, targets


def contact_sheet(part: str, folder: Path, count: int = 12) -> Any:
    """A Pillow image of the first scenes with their boxes drawn: look at them before you believe them."""
    pictures, targets = scenes(part, count, folder)
    sheet = Image.new("RGB", (4 * WIDTH, -(-count // 4) * HEIGHT))
    for place, (pixels, target) in enumerate(zip(pictures, targets, strict=True)):
        picture = Image.fromarray(pixels)
        draw = ImageDraw.Draw(picture)
        for x1, y1, x2, y2, kind in target[target[:, 4] >= 0]:
            draw.rectangle((x1 * WIDTH, y1 * HEIGHT, x2 * WIDTH, y2 * HEIGHT), outline="lime")
            draw.text((x1 * WIDTH, y2 * HEIGHT), LABELS[int(kind)], fill="lime")
        sheet.paste(picture, (place % 4 * WIDTH, place // 4 * HEIGHT))
    return sheet
