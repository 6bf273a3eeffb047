"""Tasks that give files: decoded as the client decodes them, so that what is judged is what is served."""

from __future__ import annotations

import asyncio
import dataclasses
import wave
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shoal_agent import detection, imaging, runtimes, sounds
from shoal_agent.client import Client
from shoal_agent.runtimes.base import Facts, Instance, Options
from shoal_agent.serving.asgi import App
from shoal_agent.serving.dataplane import DataPlane
from shoal_agent.serving.http import listen_tcp
from shoal_optimizer.boxes import moved
from shoal_optimizer.task import Task, load_task
from shoal_protos.bundle import (
    BoxRule,
    Bundle,
    BundleConfig,
    RuntimeNeed,
    Signature,
    TensorSpec,
    write_bundle,
)
from shoal_protos.errors import InvalidInput

Write = Callable[[str], Path]
RULES = ("stretch", "letterbox", "crop")
PICTURES = """
from shoal_optimizer import Task, TensorSpec
from PIL import Image
class Cats(Task):
    input = TensorSpec("image", "UINT8", (-1, 24, 32, 3), "NHWC", 0, 255)
    input_kind = "image"
    color = "rgb"
    labels = ("cat",)
    resize = "letterbox"
"""


def picture(path: Path, width: int = 80, height: int = 40, seed: int = 0) -> Path:
    """A real JPEG of smooth colours with some noise."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (5, 8, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = np.clip(pixels + random.integers(-12, 13, pixels.shape), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(path, quality=90)
    return path


def cats(write_task: Write, body: str, **attributes: str) -> Task:
    lines = "".join(f"    {name} = {value}\n" for name, value in attributes.items())
    return load_task(write_task(PICTURES + lines + body))


@pytest.mark.parametrize("rule", RULES)
def test_paths_and_pillow_images_become_tensors(rule: str, write_task: Write, tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    body = "    def evaluation(self): return [('a.jpg', 0), (Image.open(self.directory / 'a.jpg'), 0)]\n"
    task = cats(write_task, body, resize=repr(rule))
    found = task.required("evaluation").inputs
    assert found.shape == (2, 24, 32, 3)
    np.testing.assert_array_equal(found[0], imaging.decode(tmp_path / "a.jpg", task.declared))
    with Image.open(tmp_path / "a.jpg") as opened:
        np.testing.assert_array_equal(found[1], imaging.decode(opened, task.declared))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("missing.jpg", "found no file"), ("text.jpg", "not a picture"), ("cut.jpg", "cannot be decoded")],
)
def test_a_file_that_is_no_picture_is_named(
    name: str, complaint: str, write_task: Write, tmp_path: Path
) -> None:
    whole = picture(tmp_path / "a.jpg").read_bytes()
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    body = f"    def evaluation(self): return [('a.jpg', 0), ('{name}', 0)]\n"
    with pytest.raises(InvalidInput, match=complaint) as caught:
        cats(write_task, body).data("evaluation")
    assert name in str(caught.value)


def test_a_picture_for_numbers_is_refused(write_task: Write, tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    body = "    def evaluation(self): return [('a.jpg', 0)]\n"
    with pytest.raises(InvalidInput, match="input of kind 'tensor'"):
        cats(write_task, body, input_kind="'tensor'").data("evaluation")
    with pytest.raises(InvalidInput, match="resize"):
        cats(write_task, body, resize="''").data("evaluation")


def test_a_sound_becomes_a_tensor(write_task: Write, tmp_path: Path) -> None:
    samples = (8000 * np.sin(np.arange(800) / 9)).astype("<i2")
    with wave.open(str(tmp_path / "a.wav"), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(8000)
        stream.writeframes(samples.tobytes())
    text = (
        "from shoal_optimizer import Task, TensorSpec\n"
        "class Words(Task):\n"
        '    input = TensorSpec("sound", "INT16", (-1, 600), "NT", -32768, 32767)\n'
        '    input_kind = "audio"\n'
        "    sample_rate = 4000\n"
        "    def evaluation(self): return [('a.wav', 0)]\n"
    )
    task = load_task(write_task(text))
    found = task.required("evaluation").inputs
    assert found.shape == (1, 600)
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found[0], sounds.decode(tmp_path / "a.wav", task.declared))
    with pytest.raises(InvalidInput, match="Image"):
        load_task(write_task(text.replace("'a.wav'", "__import__('PIL.Image').Image.new('L', (9, 9))"))).data(
            "evaluation"
        )


# ---------------------------------------------------------------------------- boxes of pictures


@pytest.mark.parametrize("rule", RULES)
def test_boxes_move_with_their_picture(rule: str, write_task: Write, tmp_path: Path) -> None:
    pixels = np.full((40, 80, 3), 30, np.uint8)
    pixels[10:30, 30:60] = 250  # the object
    Image.fromarray(pixels).save(tmp_path / "a.png")
    body = (
        "    output_kind = 'boxes'\n"
        "    def evaluation(self): return [('a.png', [[30/80, 10/40, 60/80, 30/40, 0]])]\n"
    )
    data = cats(write_task, body, resize=repr(rule)).required("evaluation")
    x1, y1, x2, y2, kind = data.targets[0, 0]
    assert kind == 0
    bright = np.argwhere(data.inputs[0, ..., 0] > 140)
    (top, left), (bottom, right) = bright.min(0), bright.max(0) + 1
    assert np.allclose([x1 * 32, y1 * 24, x2 * 32, y2 * 24], [left, top, right, bottom], atol=1.01)


def test_a_box_that_is_cut_off_with_its_part_of_the_picture_goes(tmp_path: Path) -> None:
    signature = Signature(
        (TensorSpec("image", "UINT8", (-1, 24, 24, 3), "NHWC", 0, 255),),
        (),
        "image",
        color="rgb",
        resize="crop",
    )
    placed = imaging.place(picture(tmp_path / "a.jpg", 80, 40), signature)
    target = np.array([[0, 0, 0.2, 1, 0], [0.2, 0, 0.5, 1, 1], [0, 0, 0, 0, -1]], np.float32)
    found = moved(target, placed)
    assert found[0].tolist() == [0, 0, 0, 0, -1]
    assert found[1].tolist() == pytest.approx([0, 0, 0.5, 1, 1])
    assert found[2].tolist() == [0, 0, 0, 0, -1]


# ---------------------------------------------------------------------------- client and evaluation agree

DETECTOR = Signature(
    inputs=(TensorSpec("image", "UINT8", (-1, 24, 32, 3), "NHWC", 0, 255),),
    outputs=(TensorSpec("boxes", "FP32", (-1, 40, 6)),),
    input_kind="image",
    output_kind="boxes",
    labels=("cat", "dog"),
    color="rgb",
    boxes=BoxRule(0.4, 0.3, 5),
)


class Recording(Instance):
    """Keeps what it is asked and answers the same candidates always."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []
        random = np.random.default_rng(3)
        corner = random.uniform(0, 0.6, (40, 2))
        size = random.uniform(0.1, 0.4, (40, 2))
        scores = random.uniform(0, 1, (40, 2))
        self.candidates = np.concatenate([corner, corner + size, scores], 1).astype(np.float32)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.seen.append(np.array(inputs["image"]))
        return {"boxes": np.repeat(self.candidates[None], len(inputs["image"]), 0)}

    def facts(self) -> Facts:
        return Facts("recording", "1", "none", 1, float("nan"))

    def close(self) -> None:
        """Nothing to free."""


class RecordingRuntime:
    """The runtime of the one instance."""

    def __init__(self, instance: Recording) -> None:
        self.instance = instance

    def load(self, bundle: Bundle, options: Options) -> Instance:
        return self.instance


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [(80, 40), (300, 500)])
async def test_the_client_sends_what_evaluation_uses(
    rule: str, size: tuple[int, int], write_task: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = picture(tmp_path / "a.jpg", *size)
    body = (
        "    output_kind = 'boxes'\n    def evaluation(self): return [('a.jpg', [[0.4, 0.4, 0.6, 0.6, 0]])]\n"
    )
    task = cats(write_task, body, resize=repr(rule))
    judged = task.required("evaluation").inputs[0]
    signature = dataclasses.replace(DETECTOR, resize=rule)
    config = BundleConfig(signature, RuntimeNeed("onnxruntime", "model.onnx"))
    digest = write_bundle(tmp_path / "bundle", config, {"model.onnx": b"none"})
    instance = Recording()
    monkeypatch.setattr(runtimes, "find", lambda name: RecordingRuntime(instance))
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(2) as executor:
        plane = DataPlane(loop, executor, workers=2, max_queue=8)
        await loop.run_in_executor(None, lambda: plane.load("cats", tmp_path / "bundle", digest))
        instance.seen.clear()
        server = await listen_tcp(App(plane), "127.0.0.1", 0)

        def ask() -> list[tuple[str, float, float, float, float, float]]:
            with Client(f"127.0.0.1:{server.port}") as client:
                return [(b.label, b.score, b.x1, b.y1, b.x2, b.y2) for b in client.detect(path)]

        answered = await asyncio.to_thread(ask)
        await server.close(1.0)
    assert len(instance.seen) == 1
    np.testing.assert_array_equal(instance.seen[0][0], judged)
    found = detection.suppress(instance.candidates, BoxRule(0.4, 0.3, 5))
    boxes = imaging.place(path, signature).to_picture(found.boxes)
    assert [a[0] for a in answered] == [signature.labels[kind] for kind in found.classes]
    assert [a[1] for a in answered] == pytest.approx(found.scores.tolist())
    np.testing.assert_allclose([a[2:] for a in answered], boxes, atol=1e-3)
