"""The traffic sign example: on tiny subsets always, on everything among the slow tests."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shoal_agent import imaging
from shoal_optimizer import targets
from shoal_optimizer.evaluation import evaluate_exported, evaluate_model
from shoal_optimizer.recipe import Recipe, Step, apply
from shoal_optimizer.targets import ClassSpec
from shoal_optimizer.task import Task, load_task
from shoal_protos.errors import InvalidInput

DATA = "gtsrb32_jpeg.npz"


@pytest.fixture
def quick(
    example: Callable[[str], Path], with_data: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> Task:
    with_data(DATA)
    monkeypatch.setenv("SHOAL_QUICK", "1")
    return untrained(load_task(example("signs.py")))


def untrained(task: Task) -> Task:
    """With random weights beside it, so that nothing is trained where it does not matter."""
    module = module_of(task)
    torch.manual_seed(0)
    torch.save(module.network().state_dict(), module.WEIGHTS)
    return task


def module_of(task: Task) -> Any:
    return sys.modules[type(task).__module__]


@pytest.mark.usefixtures("without_data")
def test_missing_pictures_are_refused_with_both_ways(example: Callable[[str], Path]) -> None:
    path = example("signs.py")
    with pytest.raises(InvalidInput, match=r"signs\.py --download.*SHOAL_DATA"):
        load_task(path).data("evaluation")
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "--download" in done.stderr and "SHOAL_DATA" in done.stderr and "Traceback" not in done.stderr


def test_a_tiny_subset_trains_and_exports_the_same(quick: Task) -> None:
    assert {part: len(quick.required(part)) for part in ("training", "evaluation", "holdout")} == {
        "training": 684,
        "evaluation": 262,
        "holdout": 1263,
    }
    evaluation = quick.required("evaluation")
    assert evaluation.inputs.dtype == np.uint8 and evaluation.inputs.shape[1:] == (32, 32, 3)
    spec = quick.signature.outputs[0]
    assert spec.shape == (-1, 43) and len(quick.labels) == len(set(quick.labels)) == 43
    exported = targets.find("onnxruntime").export(quick.original, quick)
    torch_score = evaluate_model(quick, quick.original).value
    assert evaluate_exported(quick, exported).value == pytest.approx(torch_score, abs=0.005)
    module = module_of(quick)
    # A few steps are better than one of 43 by chance.
    assert evaluate_model(quick, module.train()).value > 0.04


def test_parts_share_no_physical_sign(quick: Task) -> None:
    module = module_of(quick)
    kinds, tracks = module.stored()["train_y"].astype(int), module.stored()["train_track"].astype(int)
    owners = [
        set(zip(kinds[chosen], tracks[chosen], strict=True))
        for chosen in map(module.places, ("training", "evaluation"))
    ]
    assert owners[0] and owners[1] and not owners[0] & owners[1]


def test_a_class_that_never_appears_does_not_spoil_the_report(
    quick: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of(quick)
    pictures, classes = module.split("evaluation")
    rare = classes != 14
    monkeypatch.setattr(module, "split", lambda part: (pictures[rare], classes[rare]))
    text = module.report(quick.original, "evaluation")
    assert f"of {rare.sum()} pictures" in text and "of 42 classes" in text and "nan" not in text
    assert np.isfinite(quick.metric(quick.predict(quick.original, pictures[rare][:50]), classes[rare][:50]))


def test_pictures_of_other_sizes_and_colour_orders_are_the_same_sign(quick: Task, tmp_path: Path) -> None:
    module = module_of(quick)
    module.write_pictures(tmp_path / "pictures")
    files = sorted((tmp_path / "pictures").iterdir(), key=lambda path: path.suffix, reverse=True)
    assert len(files) == 8 and [path.suffix for path in files] == 4 * [".png"] + 4 * [".jpg"]
    with Image.open(files[0]) as picture:
        red_first = np.asarray(picture.convert("RGB"))
    assert red_first.shape == (128, 128, 3)
    wanted = imaging.decode(files[0], quick.signature)
    assert wanted.shape == (32, 32, 3) and wanted.dtype == np.uint8
    blue_first = imaging.decode(np.ascontiguousarray(red_first[..., ::-1]), quick.signature, color="bgr")
    assert np.abs(blue_first.astype(int) - wanted).max() <= 1
    wide = np.asarray(Image.fromarray(red_first).resize((201, 77)))
    assert imaging.decode(wide, quick.signature).shape == (32, 32, 3)


def test_public_archives_are_packed_as_they_are_published(
    example: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_DATA", str(tmp_path / "archives"))
    published(tmp_path / "archives")
    path = example("signs.py")
    module = module_of(load_task(path))
    module.DATA.ensure(tmp_path, download=True)
    stored = module.stored()
    assert stored["train_y"].tolist() == [0, 0, 14] and stored["train_track"].tolist() == [0, 1, 0]
    assert stored["test_y"].tolist() == [14]
    pictures, classes = module.split("holdout")
    assert classes.tolist() == [14]
    assert np.abs(pictures[0].astype(int) - (200, 30, 30)).max() < 12


def published(folder: Path) -> None:
    """The three archives in their layout: semicolon tables, PPM pictures."""
    folder.mkdir()
    image = io.BytesIO()
    pixels = np.full((60, 50, 3), (20, 120, 20), np.uint8)
    pixels[6:54, 5:45] = (200, 30, 30)
    Image.fromarray(pixels).save(image, "PPM")
    with zipfile.ZipFile(folder / "GTSRB_Final_Training_Images.zip", "w") as archive:
        root = "GTSRB/Final_Training/Images"
        for number, names in ((0, ["00000_00000.ppm", "00001_00000.ppm"]), (14, ["00000_00000.ppm"])):
            archive.writestr(f"{root}/{number:05d}/GT-{number:05d}.csv", table(names, number))
            for name in names:
                archive.writestr(f"{root}/{number:05d}/{name}", image.getvalue())
    with zipfile.ZipFile(folder / "GTSRB_Final_Test_Images.zip", "w") as archive:
        archive.writestr("GTSRB/Final_Test/Images/00000.ppm", image.getvalue())
        archive.writestr("GTSRB/Final_Test/Images/GT-final_test.test.csv", "no classes here")
    with zipfile.ZipFile(folder / "GTSRB_Final_Test_GT.zip", "w") as archive:
        archive.writestr("GT-final_test.csv", table(["00000.ppm"], 14))


def table(names: list[str], number: int) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=";")
    writer.writerow(["Filename", "Width", "Height", "Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2", "ClassId"])
    writer.writerows([name, 50, 60, 8, 9, 42, 51, number] for name in names)
    return stream.getvalue()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_signs_from_scratch(
    example: Callable[[str], Path], with_data: Callable[[str], None], local_class: ClassSpec
) -> None:
    with_data(DATA)
    task = load_task(example("signs.py"))
    assert evaluate_model(task, task.original, task.required("holdout")).value >= 0.91
    plain = targets.find("onnxruntime").export(task.original, task, class_spec=local_class)
    applied = apply(Recipe((Step("quantization"),), "int8"), task)
    small = targets.find("onnxruntime").export(
        applied.model, task, applied.precision, applied.calibration, local_class
    )
    assert small.wire_bytes <= 0.5 * plain.wire_bytes
    assert evaluate_exported(task, small).value >= evaluate_exported(task, plain).value - 0.02
