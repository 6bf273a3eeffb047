"""A folder of pictures, a sub-folder a class, with or without folders for the splits.

Pictures are decoded by `shoal_agent.imaging`, the very code that clients use, and packed at the input's
size: what evaluation judges is what an application will send.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal_optimizer.scaffolding.found import Found, describe_classes, describe_items, shortened, stable_split
from shoal_protos.bundle import Signature, TensorSpec
from shoal_protos.errors import InvalidInput, MissingExtra

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pnm", ".tif", ".tiff")
TRAINING = ("train", "training")
EVALUATION = ("val", "valid", "validation", "evaluation", "eval", "test", "testing")
LARGEST_SIDE, SMALLEST_SIDE = 224, 8
MAX_BYTES = 1 << 30  # of the packed pictures
INSPECTED = 2000  # pictures whose sizes are read


@dataclass(frozen=True)
class _Picture:
    path: Path
    label: str
    evaluation: bool | None  # None = the folder does not say


def read(
    folder: Path,
    *,
    size: tuple[int, int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """Reads and packs the pictures of a folder.

    Args:
        size: height and width of the input; None = chosen from the pictures.

    Raises:
        InvalidInput: no pictures, one class only, or most of them cannot be read.
    """
    pictures, empty, other = _list(folder)
    shapes, modes = _look(pictures)
    height, width = size or _choose_size(shapes, len(pictures))
    gray = bool(modes) and set(modes) <= {"1", "L", "LA", "I;16", "I"}
    aspects = [h / w for h, w in shapes]
    even = max(aspects) / min(aspects) < 1.25
    channels = 1 if gray else 3
    signature = Signature(
        inputs=(TensorSpec("image", "UINT8", (-1, height, width, channels), "NHWC", 0, 255),),
        outputs=(),
        input_kind="image",
        color="gray" if gray else "rgb",
        resize="stretch" if even else "letterbox",
    )
    inputs, kept, unreadable = _decode(pictures, signature, progress)
    labels = tuple(sorted({p.label for p in pictures}))
    index = {label: number for number, label in enumerate(labels)}
    targets = np.array([index[p.label] for p in kept], np.int64)
    found = Found(
        inputs=inputs,
        targets=targets,
        evaluation=_split(folder, kept, targets),
        input=signature.inputs[0],
        input_kind="image",
        output_kind="logits",
        labels=labels,
        color=signature.color,
        resize=signature.resize,
    )
    describe_items(found)
    describe_classes(found)
    found.facts.append(("pictures", _sizes(shapes)))
    found.decided.append(
        f"The input is {width}x{height} pixels, {'gray' if gray else 'RGB'}; pictures of other sizes are "
        + ("stretched to it." if even else "fitted into it with gray bars, their proportions kept.")
        + ("" if size else " Another size: --size 96x96.")
    )
    given = any(p.evaluation is not None for p in kept)
    found.decided.append(
        "The folders say which pictures train and which judge."
        if given
        else "A fifth of each class judges, chosen by a hash of the file's name: always the same ones."
    )
    if unreadable:
        names = shortened([str(path.relative_to(folder)) for path in unreadable], 5)
        found.warnings.append(f"{_count(len(unreadable), 'picture')} cannot be read, left out: {names}.")
    if empty:
        found.warnings.append(f"No picture is in {shortened(empty)}: no such class.")
    if other:
        found.warnings.append(f"{_count(other, 'file')} without a picture, left out.")
    return found


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _list(folder: Path) -> tuple[list[_Picture], list[str], int]:
    """Pictures in a fixed order, folders without any, and how many other files there are."""
    tops = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    names = {path.name.lower(): path for path in tops}
    training = [names[n] for n in TRAINING if n in names]
    judging = [names[n] for n in EVALUATION if n in names]
    groups: list[tuple[Path, bool | None]] = [(folder, None)]
    if training:
        groups = [(training[0], None if not judging else False), *((path, True) for path in judging[:1])]
    pictures: list[_Picture] = []
    empty: list[str] = []
    other = 0
    for top, evaluation in groups:
        for sub in sorted(path for path in top.iterdir() if path.is_dir()):
            if sub.name.startswith("."):
                continue
            files = sorted(p for p in sub.rglob("*") if p.is_file() and not p.name.startswith("."))
            own = [p for p in files if p.suffix.lower() in SUFFIXES]
            other += len(files) - len(own)
            if not own:
                empty.append(str(sub.relative_to(folder)))
            pictures += [_Picture(p, sub.name, evaluation) for p in own]
    if not pictures:
        loose = any(p.suffix.lower() in SUFFIXES for p in folder.iterdir())
        raise InvalidInput(
            f"{folder} holds no folder with pictures" + (", only loose pictures." if loose else "."),
            "Make a folder for each class and put its pictures there: signs/stop/1.jpg, signs/yield/2.jpg.",
        )
    return pictures, empty, other


def _look(pictures: list[_Picture]) -> tuple[list[tuple[int, int]], Counter[str]]:
    """Heights and widths, and colour modes, of some of the pictures; reads only their heads."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("client", "pillow") from error
    shapes: list[tuple[int, int]] = []
    modes: Counter[str] = Counter()
    for picture in pictures[:: max(1, len(pictures) // INSPECTED)]:
        try:
            with Image.open(picture.path) as image:
                shapes.append((image.height, image.width))
                modes[image.mode] += 1
        except (OSError, ValueError, SyntaxError):  # noqa: PERF203
            continue  # counted when it is decoded
    if not shapes:
        raise InvalidInput(
            f"None of the {len(pictures)} pictures can be read, e.g. {pictures[0].path}.",
            "Open one of them in a viewer; save them as JPEG or PNG.",
        )
    return shapes, modes


def _choose_size(shapes: list[tuple[int, int]], count: int) -> tuple[int, int]:
    """The pictures' own size where they agree and are small, else a square near their median."""
    height, width = (int(np.median([shape[axis] for shape in shapes])) for axis in (0, 1))
    same = len(set(shapes)) == 1 and max(height, width) <= LARGEST_SIDE
    if not same:
        side = min(LARGEST_SIDE, max(SMALLEST_SIDE, round(math.sqrt(height * width) / 8) * 8))
        height = width = side
    fits = math.sqrt(MAX_BYTES / (3 * count * height * width))
    if fits < 1:
        height, width = (max(SMALLEST_SIDE, int(v * fits) // 8 * 8) for v in (height, width))
    return height, width


def _sizes(shapes: list[tuple[int, int]]) -> str:
    heights, widths = [s[0] for s in shapes], [s[1] for s in shapes]
    if len(set(shapes)) == 1:
        return f"all {widths[0]}x{heights[0]}"
    return f"{len(set(shapes))} sizes, {min(widths)}x{min(heights)} to {max(widths)}x{max(heights)}"


def _decode(
    pictures: list[_Picture], signature: Signature, progress: Callable[[int, int], None]
) -> tuple[np.ndarray, list[_Picture], list[Path]]:
    from shoal_agent import imaging

    shape = signature.inputs[0].shape[1:]
    inputs = np.empty((len(pictures), *shape), np.uint8)
    kept: list[_Picture] = []
    unreadable: list[Path] = []
    for number, picture in enumerate(pictures):
        try:
            inputs[len(kept)] = imaging.decode(picture.path, signature).reshape(shape)
            kept.append(picture)
        except (InvalidInput, OSError, ValueError, SyntaxError):
            unreadable.append(picture.path)
        progress(number + 1, len(pictures))
    if len(unreadable) > len(pictures) / 2:
        raise InvalidInput(
            f"{len(unreadable)} of {len(pictures)} pictures cannot be read, e.g. {unreadable[0]}.",
            "Open one of them in a viewer; save them as JPEG or PNG.",
        )
    return inputs[: len(kept)], kept, unreadable


def _split(folder: Path, kept: list[_Picture], targets: np.ndarray) -> np.ndarray:
    if any(p.evaluation for p in kept):
        chosen = np.array([bool(p.evaluation) for p in kept])
        if chosen.all():
            raise InvalidInput(
                "All readable pictures are in the folder that judges.", "Put some into 'train'."
            )
        return chosen
    return stable_split([p.path.relative_to(folder).as_posix() for p in kept], targets)
