"""The detector example: its scenes, its coding of boxes, and that it learns."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from shoal_agent.detection import average_precision, suppress
from shoal_optimizer import targets
from shoal_optimizer.evaluation import evaluate_exported, evaluate_model
from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.targets import ClassSpec
from shoal_optimizer.task import Task, load_task
from shoal_protos.errors import InvalidInput

EXAMPLES = Path(__file__).parents[2] / "examples"
TRACKS, FRAMES = 6, 5
DRAWN = {1: "red", 2: "red", 11: "orange", 33: "blue", 12: "gold", 13: "white", 14: "darkred"}


def drawn(number: int, track: int, side: int = 40) -> Image.Image:
    """A sign-like picture with its sign at 4..side-4."""
    picture = Image.new("RGB", (side, side), (70 + 9 * track, 90, 80))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((4, 4, side - 4, side - 4), DRAWN[number], "black", 3)
    draw.line((12, 12 + track, side - 12, side - 12), "black", 2 + number % 3)
    return picture


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as torchvision's download of GTSRB leaves it, with drawn signs."""
    root = tmp_path_factory.mktemp("data")
    for number in DRAWN:
        folder = root / "gtsrb" / "GTSRB" / "Training" / f"{number:05d}"
        folder.mkdir(parents=True)
        with (folder / f"GT-{number:05d}.csv").open("w", newline="") as stream:
            table = csv.writer(stream, delimiter=";")
            table.writerow(["Filename", "Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2", "ClassId"])
            for track in range(TRACKS):
                for frame in range(FRAMES):
                    name = f"{track:05d}_{frame:05d}.ppm"
                    drawn(number, track).save(folder / name)
                    table.writerow([name, 40, 40, 4, 4, 36, 36, number])
    return root


@pytest.fixture
def copied(tmp_path: Path, downloaded: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example beside nothing else, with SHOAL_DATA set and little to do."""
    monkeypatch.setenv("SHOAL_DATA", str(downloaded))
    monkeypatch.setenv("SHOAL_QUICK", "1")
    for name in ("detector.py", "scenes.py"):
        shutil.copy(EXAMPLES / name, tmp_path / name)
    return tmp_path / "detector.py"


@pytest.fixture
def scenes(copied: Path) -> ModuleType:
    load_task(copied)
    found = sys.modules["scenes"]
    found.signs.cache_clear()  # another test's data
    return found


# ---------------------------------------------------------------------------- scenes


def test_no_photograph_and_no_sign_is_in_two_parts(scenes: ModuleType) -> None:
    photos, tracks, _ = zip(*scenes.PARTS.values(), strict=True)
    assert not set(photos[0]) & set(photos[1])
    assert photos[1] == photos[2]
    assert sorted(track for own in tracks for track in own) == [0, 1, 2, 3, 4]


def test_every_photograph_comes_with_the_package(scenes: ModuleType) -> None:
    for photos, _, _ in scenes.PARTS.values():
        for name in photos:
            assert min(scenes.photograph(name).size) >= 150


def test_scenes_are_the_same_every_time_and_boxes_lie_inside(scenes: ModuleType, copied: Path) -> None:
    pictures, boxes = scenes.scenes("evaluation", 12, copied.parent)
    again, same = scenes.scenes("evaluation", 12, copied.parent)
    np.testing.assert_array_equal(pictures, again)
    np.testing.assert_array_equal(boxes, same)
    assert pictures.shape == (12, 192, 256, 3)
    rows = boxes[boxes[..., 4] >= 0]
    assert len(rows) > 5
    assert rows[:, :4].min() > 0
    assert rows[:, :4].max() < 1
    sides = (rows[:, 2:4] - rows[:, :2]) * (256, 192)
    assert sides.min() > 14
    assert sides.max() < 62
    assert scenes.contact_sheet("evaluation", copied.parent, 4).size == (4 * 256, 192)


def test_a_sign_fills_its_box(scenes: ModuleType, copied: Path) -> None:
    signs = scenes.signs(copied.parent)
    assert len(signs.crops) == len(DRAWN) * TRACKS * 4
    crop = signs.crops[int(np.flatnonzero(signs.kinds == scenes.LABELS.index("mandatory"))[0])]
    canvas = np.full((192, 256, 3), 128, np.float32)
    scenes._paste(
        np.random.default_rng(0), canvas, crop, scenes.LABELS.index("mandatory"), (100, 50, 140, 92)
    )
    changed = np.argwhere(np.abs(canvas - 128).max(-1) > 12)
    assert np.abs(changed.min(0) - (50, 100)).max() <= 2
    assert np.abs(changed.max(0) + 1 - (92, 140)).max() <= 2


def test_both_layouts_of_the_signs_are_read(scenes: ModuleType, downloaded: Path, tmp_path: Path) -> None:
    files, classes, tracks = [], [], []
    for number in DRAWN:
        for track in range(TRACKS):
            for _ in range(FRAMES):
                stream = io.BytesIO()
                box = (2, 2, 38, 38)  # the sign and a sixteenth of it
                drawn(number, track).resize((32, 32), Image.Resampling.BILINEAR, box=box).save(
                    stream, "JPEG", quality=95, subsampling=0
                )
                files.append(stream.getvalue())
                classes.append(number)
                tracks.append(track)
    packed = tmp_path / "packed"
    packed.mkdir()
    np.savez(
        packed / "gtsrb32_jpeg.npz",
        train_bytes=np.frombuffer(b"".join(files), np.uint8),
        train_offsets=np.cumsum([0, *map(len, files)]),
        train_y=np.array(classes, np.uint8),
        train_track=np.array(tracks, np.int32),
    )
    one, other = scenes.signs(downloaded), scenes.signs(packed)
    np.testing.assert_array_equal(one.kinds, other.kinds)
    np.testing.assert_array_equal(one.tracks, other.tracks)
    assert np.abs(one.crops.astype(int) - other.crops).mean() < 4


def test_without_signs_it_says_how_to_get_them(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_DATA", str(tmp_path))
    task = load_task(copied)
    sys.modules["scenes"].signs.cache_clear()  # type: ignore[attr-defined]
    with pytest.raises(InvalidInput, match="--download"):
        task.data("evaluation")


# ---------------------------------------------------------------------------- boxes in the head


def test_what_the_head_is_taught_decodes_to_the_boxes(scenes: ModuleType, copied: Path) -> None:
    task = load_task(copied)
    detector = sys.modules[type(task).__module__]
    _, truth = scenes.scenes("evaluation", 20, copied.parent)
    scores, boxes, _ = detector.wanted(torch.from_numpy(truth))  # type: ignore[attr-defined]
    head = torch.cat([boxes, torch.logit(scores.clamp(1e-4, 1 - 1e-4))], 1)
    candidates = task.post(head).numpy()
    found = [suppress(one, task.box_rule) for one in candidates]
    assert average_precision(found, truth, iou=0.95) > 0.999
    nothing = np.zeros_like(truth)
    nothing[..., 4] = -1
    for some in (truth, nothing):
        loss = task.loss(torch.zeros_like(head, requires_grad=True), torch.from_numpy(some))
        assert torch.isfinite(loss.detach())


# ---------------------------------------------------------------------------- training


def test_it_trains_a_little_and_becomes_a_task(copied: Path, local_class: ClassSpec) -> None:
    done = subprocess.run(
        [sys.executable, str(copied)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "on 12 composed scenes" in done.stdout
    assert copied.with_name("detector.pt").is_file()
    task = load_task(copied)
    sys.modules["scenes"].signs.cache_clear()  # type: ignore[attr-defined]
    assert task.signature.outputs[0].shape == (-1, 768, 10)
    assert task.signature.boxes == task.box_rule
    assert task.trainable
    plain = targets.find("onnxruntime").export(task.original, task)
    assert evaluate_exported(task, plain).value == pytest.approx(
        evaluate_model(task, task.original).value, abs=0.02
    )


def _smaller(task: Task, spec: ClassSpec) -> tuple[float, float, float]:
    """(map50 of the original, of the pruned int8 variant, their sizes' ratio on the wire)."""
    original = evaluate_model(task, task.original)
    target = targets.find("onnxruntime")
    plain = target.export(task.original, task, class_spec=spec)
    steps = (Step("channel_pruning"), Step("distillation", {"epochs": 6, "alpha": 0.7}), Step("quantization"))
    applied = apply(Recipe(steps, "small"), task)
    small = target.export(applied.model, task, applied.precision, applied.calibration, spec)
    assert small.facts["int8_share"] == 1.0
    return original.value, evaluate_exported(task, small).value, small.wire_bytes / plain.wire_bytes


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    not (Path(os.environ.get("SHOAL_DATA", "/")) / "gtsrb32_jpeg.npz").is_file(),
    reason="SHOAL_DATA has no traffic signs",
)
def test_the_real_one_from_scratch(tmp_path: Path, local_class: ClassSpec) -> None:
    for name in ("detector.py", "scenes.py"):
        shutil.copy(EXAMPLES / name, tmp_path / name)
    task = load_task(tmp_path / "detector.py")
    sys.modules["scenes"].signs.cache_clear()  # type: ignore[attr-defined]
    original, small, ratio = _smaller(task, local_class)
    assert original > 0.6
    assert small > original - 0.1
    assert ratio < 0.15
