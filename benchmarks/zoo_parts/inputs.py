"""Real inputs for the zoo: public pictures and speech, photographs, rendered text, files of this machine.

Each function is deterministic and gives items for calibration and others for judging. Where nobody has
labelled them, the fp32 model's own answers are the truth.
"""

from __future__ import annotations

import io
import os
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Channels = float | tuple[float, ...]
Random = np.random.Generator
CALIBRATION = 64
FONT_SIZES = (18, 22, 26, 30)


@dataclass(frozen=True)
class Data:
    """Items of one model; all arrays are [n, ...].

    Attributes:
        calibration, evaluation: in the model's own form.
        targets: of `evaluation`; None = the fp32 model's answers.
        argmax: those answers are classes, along the last axis.
        judged: the output that is judged, "" = the first.
        fixed: inputs that never change, by name; `name` is then the input that the items are for.
    """

    calibration: Array
    evaluation: Array
    targets: Array | None = None
    argmax: bool = False
    judged: str = ""
    name: str = ""
    fixed: dict[str, Array] = field(default_factory=dict)


def data_folder() -> Path:
    """SHOAL_DATA. Raises FileNotFoundError."""
    folder = os.environ.get("SHOAL_DATA", "")
    if not folder or not Path(folder).is_dir():
        raise FileNotFoundError("Set SHOAL_DATA to the folder of public data (examples/public_data.py).")
    return Path(folder)


# ---------------------------------------------------------------------------- pictures


def _packed(file: str, split: str, count: int, seed: int) -> tuple[Array, Array]:
    """`count` random pictures uint8 [n, 32, 32, 3] of a pack and their classes [n]."""
    from PIL import Image

    with np.load(data_folder() / file) as stored:
        content = stored[f"{split}_bytes"].tobytes()
        offsets, truth = stored[f"{split}_offsets"], stored[f"{split}_y"]
        chosen = np.sort(np.random.default_rng(seed).choice(len(truth), count, replace=False))
        pictures = [
            np.asarray(Image.open(io.BytesIO(content[offsets[i] : offsets[i + 1]])).convert("RGB"))
            for i in chosen
        ]
        return np.stack(pictures), truth[chosen].astype(np.int64)


def _planes(pictures: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(pictures.astype(np.float32), -1, 1))


def cifar(
    scale: float, mean: tuple[float, ...] = (0.0,) * 3, deviation: tuple[float, ...] = (1.0,) * 3
) -> Data:
    def form(pictures: Array) -> Array:
        shift, width = (np.array(v, np.float32).reshape(1, 3, 1, 1) for v in (mean, deviation))
        return ((_planes(pictures) / np.float32(scale)) - shift) / width

    known, _ = _packed("cifar10_jpeg.npz", "train", 300, 0)
    judged, truth = _packed("cifar10_jpeg.npz", "test", 2000, 1)
    return Data(form(known), form(judged), truth)


def signs() -> Data:
    known, _ = _packed("gtsrb32_jpeg.npz", "train", 300, 0)
    judged, truth = _packed("gtsrb32_jpeg.npz", "test", 2000, 1)
    return Data(_planes(known), _planes(judged), truth)


def grey() -> Data:
    def form(pictures: Array) -> Array:
        return np.ascontiguousarray(_planes(pictures).mean(1, keepdims=True)[:, :, 2:30, 2:30])

    known, _ = _packed("cifar10_jpeg.npz", "train", 300, 2)
    judged, _ = _packed("cifar10_jpeg.npz", "test", 2000, 3)
    return Data(form(known), form(judged), argmax=True)


def _photographs() -> list[Any]:
    """Photographs of scikit-image and scikit-learn as Pillow images."""
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_sample_images

    names = ("astronaut", "coffee", "chelsea", "rocket")
    found = [Image.fromarray(getattr(data, name)()) for name in names]
    found += [Image.fromarray(picture) for picture in load_sample_images().images]
    return [picture.convert("RGB") for picture in found]


def _crop(picture: Any, size: tuple[int, int], random: Random) -> Any:
    """A random part of a photograph, brought to `size` (width, height)."""
    ratio = random.uniform(0.45, 1.0)
    width, height = (max(8, int(side * ratio)) for side in picture.size)
    left = int(random.integers(0, picture.size[0] - width + 1))
    top = int(random.integers(0, picture.size[1] - height + 1))
    part = picture.crop((left, top, left + width, top + height)).resize(size)
    return part.transpose(0) if random.random() < 0.5 else part


def _split(items: Array, calibration: int = CALIBRATION) -> tuple[Array, Array]:
    return items[:calibration], items[calibration:]


def _scaled(pictures: list[Any], mean: Channels, deviation: Channels) -> Array:
    shift, width = (np.array(v, np.float32).reshape(1, -1, 1, 1) for v in (mean, deviation))
    return (_planes(np.stack([np.asarray(p) for p in pictures])) / np.float32(255) - shift) / width


# ---------------------------------------------------------------------------- text


def _words() -> list[str]:
    from sklearn.datasets import load_breast_cancer, load_wine

    text = f"{load_breast_cancer().DESCR} {load_wine().DESCR}"
    return [word for word in text.split() if word.isascii() and any(c.isalnum() for c in word)]


def _line(words: list[str], size: tuple[int, int], random: Random) -> Any:
    from PIL import Image, ImageDraw, ImageFont

    start = int(random.integers(0, len(words) - 8))
    text = " ".join(words[start : start + int(random.integers(2, 5))])
    low, high = sorted(random.integers(0, 255, 2).tolist())
    ground, ink = (high, low) if random.random() < 0.5 else (low, high)
    if high - low < 70:
        ground, ink = 240, 30
    picture = Image.new("RGB", size, (ground,) * 3)
    font = ImageFont.load_default(int(random.choice(FONT_SIZES)))
    ImageDraw.Draw(picture).text((6, int(random.integers(2, 14))), text, (ink,) * 3, font)
    return picture


def _lines(size: tuple[int, int], count: int, seed: int) -> list[Any]:
    random, words = np.random.default_rng(seed), _words()
    return [_line(words, size, random) for _ in range(count)]


def text_lines() -> Data:
    known, judged = _split(_scaled(_lines((320, 48), 264, 0), 0.5, 0.5))
    return Data(known, judged, argmax=True)


def turned_lines() -> Data:
    random = np.random.default_rng(1)
    lines = [p.rotate(180) if random.random() < 0.5 else p for p in _lines((192, 48), 464, 1)]
    known, judged = _split(_scaled(lines, 0.5, 0.5))
    return Data(known, judged, argmax=True)


def _scene(size: tuple[int, int], photographs: list[Any], words: list[str], random: Random) -> Any:
    picture = _crop(photographs[int(random.integers(len(photographs)))], size, random)
    for _ in range(int(random.integers(1, 5))):
        width, height = int(random.integers(120, 240)), int(random.integers(24, 48))
        line = _line(words, (width, height), random)
        place = random.integers(0, size[0] - width), random.integers(0, size[1] - height)
        picture.paste(line, (int(place[0]), int(place[1])))
    return picture


def text_scenes() -> Data:
    random, words, photographs = np.random.default_rng(2), _words(), _photographs()
    scenes = [_scene((320, 320), photographs, words, random) for _ in range(112)]
    known, judged = _split(_scaled(scenes, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 32)
    return Data(known, judged)


def captchas() -> Data:
    random, words, photographs = np.random.default_rng(3), _words(), _photographs()
    scenes = [_scene((416, 416), photographs, words, random) for _ in range(80)]
    known, judged = _split(_planes(np.stack([np.asarray(p)[..., ::-1] for p in scenes])), 32)
    return Data(known, judged)


def _page(size: tuple[int, int], photographs: list[Any], words: list[str], random: Random) -> Any:
    from PIL import Image, ImageDraw, ImageFont

    picture, top = Image.new("RGB", size, (255, 255, 255)), 20
    while top < size[1] - 40:
        if random.random() < 0.25:
            height = min(int(random.integers(60, 160)), size[1] - top - 10)
            photograph = photographs[int(random.integers(len(photographs)))]
            picture.paste(_crop(photograph, (int(size[0] * 0.5), height), random), (30, top))
            top += height + 10
            continue
        size_of_text = int(random.choice((9, 10, 12, 16)))
        font = ImageFont.load_default(size_of_text)
        start = int(random.integers(0, len(words) - 40))
        for row in range(int(random.integers(1, 6))):
            text = " ".join(words[start + 8 * row : start + 8 * row + 8])
            ImageDraw.Draw(picture).text((30, top), text, (20, 20, 20), font)
            top += int(size_of_text * 1.5)
        top += 14
    return picture


def pages() -> Data:
    random, words, photographs = np.random.default_rng(4), _words(), _photographs()
    made = [_page((608, 800), photographs, words, random) for _ in range(48)]
    known, judged = _split(_scaled(made, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 16)
    return Data(known, judged, judged="transpose_2.tmp_0")


def turned_pages() -> Data:
    random, words, photographs = np.random.default_rng(5), _words(), _photographs()
    made = []
    for _ in range(264):
        page = _page((448, 448), photographs, words, random)
        made.append(page.rotate(90 * int(random.integers(4))).resize((224, 224)))
    known, judged = _split(_scaled(made, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return Data(known, judged, argmax=True)


def people() -> Data:
    random, photographs = np.random.default_rng(6), _photographs()[:1]
    made = [_crop(photographs[0], (320, 320), random) for _ in range(112)]
    known, judged = _split(_scaled(made, 0.0, 1.0), 32)
    return Data(known, judged)


# ---------------------------------------------------------------------------- sound


def _speech(rate: int, samples: int, count: int, seed: int) -> Array:
    """Spoken digits one after another, float32 [count, samples] within -1..1, resampled linearly."""
    with np.load(data_folder() / "fsdd_8k.npz") as stored:
        sound, offsets, own = stored["samples"], stored["offsets"], int(stored["rate"])
    random, needed = np.random.default_rng(seed), int(samples * own / rate) + 2
    made = []
    for _ in range(count):
        parts: list[Array] = []
        while sum(map(len, parts)) < needed:
            take = int(random.integers(len(offsets) - 1))
            parts.append(sound[offsets[take] : offsets[take + 1]])
        line = np.concatenate(parts)[:needed].astype(np.float32) / 32768
        made.append(np.interp(np.arange(samples) * own / rate, np.arange(needed), line))
    return np.stack(made).astype(np.float32)


def speech_22k() -> Data:
    known, judged = _split(_speech(22050, 43844, 80, 7)[..., None], 32)
    return Data(known, judged)


def speech_16k() -> Data:
    known, judged = _split(_speech(16000, 144160, 80, 8), 32)
    return Data(known, judged)


def frames_16k() -> Data:
    """Frames of 512 samples with the 64 before them; the state is that of a beginning."""
    known, judged = _split(_speech(16000, 576, 600, 9), 100)
    fixed: dict[str, Array] = {"state": np.zeros((2, 1, 128), np.float32), "sr": np.array(16000, np.int64)}
    return Data(known, judged, name="input", fixed=fixed)


# ---------------------------------------------------------------------------- files


def source_files() -> Data:
    """First and last 1024 bytes of files of Python's own library, as magika takes them (256 = padding)."""
    root = Path(sysconfig.get_paths()["purelib"])
    kinds: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix and path.is_file() and 64 < path.stat().st_size < 1 << 20:
            kinds.setdefault(path.suffix, []).append(path)
    random = np.random.default_rng(10)
    chosen = [p for group in kinds.values() for p in group[:24]]
    chosen = [chosen[i] for i in random.permutation(len(chosen))[:500]]
    rows = []
    for path in chosen:
        content = path.read_bytes().strip()
        row = np.full(2048, 256, np.int32)
        head, tail = content[:1024], content[-1024:]
        row[: len(head)] = np.frombuffer(head, np.uint8)
        row[2048 - len(tail) :] = np.frombuffer(tail, np.uint8)
        rows.append(row)
    known, judged = _split(np.stack(rows), 100)
    return Data(known, judged, argmax=True)
