"""From a 640x480 JPEG to labelled boxes: client and agent against hand-written loops on the same model.

    python benchmarks/application.py [--quick] [--json FILE]

The agent is a process of its own (`shoal-agent serve`), reached through shared memory. The hand-written
loops call ONNX Runtime in process with one thread, as the agent does; several ways to decode, resize
and suppress are timed and the fastest is the one compared with. All take turns in every round. CPU is
user and system time a frame, of client and agent together. The model is examples/detector.py with its
trained weights; the picture is a photograph with signs drawn on it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import skimage.data
import torch
from PIL import Image, ImageDraw
from scipy import stats

from shoal_agent.client import Client
from shoal_controller.demo.figures import context
from shoal_protos.bundle import BundleConfig, Lineage, RuntimeNeed, Signature, TensorSpec, write_bundle

HERE = Path(__file__).resolve().parent
AIMS = {"end_to_end_over_handwritten": 1.10, "cpu_over_handwritten": 1.0}
WARM_UP = 150  # requests of each client: a window's first 256 are sketched whatever it costs
Found = list[tuple[str, float, list[float]]]
Loop = Callable[[bytes], Found]


# ---------------------------------------------------------------------------- model and picture


def export(folder: Path, width: int, height: int) -> tuple[Path, Signature]:
    """The example detector as one ONNX file, scaling and decoding included; it takes any size."""
    sys.path.insert(0, str(HERE.parent / "examples"))
    detector: Any = importlib.import_module("detector")
    detector.HEIGHT, detector.WIDTH = height, width
    detector.ROWS, detector.COLUMNS = height // detector.STRIDE, width // detector.STRIDE
    task = detector.Signs()
    model = torch.nn.Sequential(task.preprocess(), task.model(), task.postprocess()).eval()
    path = folder / "model.onnx"
    example = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    torch.onnx.export(
        model, (example,), str(path), input_names=["image"], output_names=["candidates"], dynamo=True,
        external_data=False, verbose=False,
    )  # fmt: skip
    with torch.no_grad():
        shape = model(example).shape
    return path, Signature(
        inputs=(TensorSpec("image", "UINT8", (1, height, width, 3), "NHWC", 0.0, 255.0),),
        outputs=(TensorSpec("candidates", "FP32", tuple(shape)),),
        input_kind="image",
        output_kind="boxes",
        labels=tuple(task.labels),
        color="rgb",
        resize="letterbox",
        boxes=task.boxes,
    )


def picture() -> bytes:
    """A 640x480 JPEG (quality 85, 4:2:0): a photograph with four signs drawn on it."""
    photograph: np.ndarray = skimage.data.astronaut()  # type: ignore[no-untyped-call]
    image = Image.fromarray(photograph).resize((640, 480))
    draw = ImageDraw.Draw(image)
    corner = np.asarray([(0.3, 0), (0.7, 0), (1, 0.3), (1, 0.7), (0.7, 1), (0.3, 1), (0, 0.7), (0, 0.3)])
    draw.polygon([tuple(p) for p in (corner * 90 + (40, 60)).tolist()], fill=(190, 20, 30))
    draw.text((52, 92), "STOP", fill="white", font_size=26)
    draw.ellipse((470, 40, 560, 130), fill="white", outline=(200, 20, 30), width=14)
    draw.polygon([(480, 300), (580, 300), (530, 390)], fill="white", outline=(200, 20, 30), width=12)
    draw.ellipse((60, 300, 140, 380), fill=(20, 70, 170))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return stream.getvalue()


# ---------------------------------------------------------------------------- written by hand


def _opencv(flag: int, method: int) -> Callable[[bytes, int, int], np.ndarray]:
    def decode(data: bytes, width: int, height: int) -> np.ndarray:
        frame = cv2.imdecode(np.frombuffer(data, np.uint8), flag)  # R, G, B right away: no cvtColor
        assert frame is not None
        if frame.shape[:2] == (height, width):
            return frame
        return cv2.resize(frame, (width, height), interpolation=method)

    return decode


def _pillow(draft: bool) -> Callable[[bytes, int, int], np.ndarray]:
    def decode(data: bytes, width: int, height: int) -> np.ndarray:
        image = Image.open(io.BytesIO(data))
        if draft:
            image.draft("RGB", (width, height))
        return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))

    return decode


def _opencv_boxes(candidates: np.ndarray, signature: Signature) -> list[tuple[int, float, np.ndarray]]:
    rule = signature.boxes
    assert rule is not None
    scores = candidates[:, 4:]
    best = scores.max(axis=1)
    keep = best >= rule.score_threshold
    boxes, best, classes = candidates[keep, :4], best[keep], scores[keep].argmax(axis=1)
    sides = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    suppress: Any = cv2.dnn.NMSBoxesBatched  # its stub does not know that it takes arrays
    places = suppress(sides, best, classes, rule.score_threshold, rule.iou_threshold)
    return [(int(classes[i]), float(best[i]), boxes[i]) for i in list(places)[: rule.max_boxes]]


def _numpy_boxes(candidates: np.ndarray, signature: Signature) -> list[tuple[int, float, np.ndarray]]:
    """The plain loop that everybody writes."""
    rule = signature.boxes
    assert rule is not None
    scores = candidates[:, 4:]
    best = scores.max(axis=1)
    keep = np.flatnonzero(best >= rule.score_threshold)
    order = keep[np.argsort(-best[keep])]
    boxes, classes = candidates[order, :4], scores[order].argmax(axis=1)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    rest, kept = np.arange(len(order)), list[int]()
    while rest.size and len(kept) < rule.max_boxes:
        first, rest = rest[0], rest[1:]
        kept.append(int(first))
        low = np.maximum(boxes[first, :2], boxes[rest, :2])
        high = np.minimum(boxes[first, 2:], boxes[rest, 2:])
        common = np.clip(high - low, 0, None).prod(axis=1)
        overlap = common / (area[first] + area[rest] - common)
        rest = rest[(overlap <= rule.iou_threshold) | (classes[rest] != classes[first])]
    return [(int(classes[i]), float(best[order[i]]), boxes[i]) for i in kept]


def by_hand(model: Path, signature: Signature) -> dict[str, Loop]:
    """Every combination of decoding and suppressing, as a loop body from bytes to labelled boxes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    _, height, width, _ = signature.inputs[0].shape
    half = cv2.IMREAD_REDUCED_GRAYSCALE_2 | cv2.IMREAD_COLOR_RGB  # "half" of the two, colour of the latter
    decoders = {
        "OpenCV full": _opencv(cv2.IMREAD_COLOR_RGB, cv2.INTER_LINEAR),
        "OpenCV full, area": _opencv(cv2.IMREAD_COLOR_RGB, cv2.INTER_AREA),
        "OpenCV half": _opencv(half, cv2.INTER_LINEAR),
        "Pillow full": _pillow(False),
        "Pillow half": _pillow(True),
    }
    suppressors = {"numpy": _numpy_boxes, "OpenCV": _opencv_boxes}

    def loop(decode: Callable[..., np.ndarray], suppress: Callable[..., Any]) -> Loop:
        def run(data: bytes) -> Found:
            tensor = decode(data, width, height)[None]
            candidates = session.run(["candidates"], {"image": tensor})[0][0]
            found = suppress(candidates, signature)
            size = np.asarray([640, 480, 640, 480])
            return [(signature.labels[kind], score, (box * size).tolist()) for kind, score, box in found]

        return run

    return {
        f"{decoder} + {suppressor} suppression": loop(decode, suppress)
        for decoder, decode in decoders.items()
        for suppressor, suppress in suppressors.items()
    }


# ---------------------------------------------------------------------------- client and agent


@contextlib.contextmanager
def agent(folder: Path) -> Iterator[tuple[int, int]]:
    """(port, process id) of `shoal-agent serve` on a free port."""
    command = [sys.executable, "-m", "shoal_agent", "serve", str(folder), "--threads", "1"]
    command += ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                break
        else:
            raise RuntimeError("The agent did not start.")
        yield int(json.loads(line)["http"]), process.pid
    finally:
        process.terminate()
        process.wait(20)


# ---------------------------------------------------------------------------- measuring


@dataclass
class Contender:
    """Median wall time and mean CPU time a frame, milliseconds, one value a round."""

    run: Loop
    server: int | None = None  # its process id
    wall: list[float] = field(default_factory=list)
    quiet: list[float] = field(default_factory=list)  # the fastest frame, which nobody disturbed
    cpu: list[float] = field(default_factory=list)

    def measure(self, data: bytes, frames: int) -> None:
        times = []
        before = self._cpu()
        for _ in range(frames):
            start = time.perf_counter()
            self.run(data)
            times.append(time.perf_counter() - start)
        self.cpu.append((self._cpu() - before) / frames * 1e3)
        self.wall.append(statistics.median(times) * 1e3)
        self.quiet.append(min(times) * 1e3)

    def _cpu(self) -> float:
        own = time.process_time()
        if self.server is None:
            return own
        # The server's CPU clock in nanoseconds (clock_getcpuclockid); psutil counts in steps of 10 ms.
        return own + time.clock_gettime((~self.server << 3) | 2)


def ratio(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Mean of the rounds' ratios with Student's 95 % interval."""
    values = [a / b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(values)
    half = 0.0
    if len(values) > 1:
        half = statistics.stdev(values) / len(values) ** 0.5 * float(stats.t.ppf(0.975, len(values) - 1))
    return {"value": mean, "unit": "ratio", "low": mean - half, "high": mean + half, "n": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and frames")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--size", default="320x240", help="of the model's input, a multiple of 16 [%(default)s]"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rounds, frames = (3, 40) if options.quick else (options.rounds, 60)
    width, height = (int(side) for side in options.size.split("x"))
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    data = picture()
    with tempfile.TemporaryDirectory() as name:
        model, signature = export(Path(name), width, height)
        need = RuntimeNeed("onnxruntime", "model.onnx")
        config = BundleConfig(
            signature=signature, runtime=need, lineage=Lineage(model="signs", model_version=1)
        )
        write_bundle(Path(name) / "bundle", config, {"model.onnx": model})
        contenders = {title: Contender(run) for title, run in by_hand(model, signature).items()}
        with (
            agent(Path(name) / "bundle") as (port, process),
            Client(f"127.0.0.1:{port}") as client,
            Client(f"127.0.0.1:{port}", shared_memory=False) as plain,
        ):
            contenders["Shoal client and agent"] = Contender(_through(client), process)
            contenders["Shoal, through the socket"] = Contender(_through(plain), process)
            play(contenders, data, rounds, frames)
            sizes = {title: len(part.run(data)) for title, part in contenders.items()}
    report(contenders, sizes, options.json, options.size)


def _through(client: Client) -> Loop:
    return lambda data: [(b.label, b.score, [b.x1, b.y1, b.x2, b.y2]) for b in client.detect(data)]


def play(contenders: dict[str, Contender], data: bytes, rounds: int, frames: int) -> None:
    for part in contenders.values():
        for _ in range(WARM_UP if part.server else 20):
            part.run(data)
    names = list(contenders)
    for number in range(rounds):
        for place in range(len(names)):  # another one begins each round
            contenders[names[(place + number) % len(names)]].measure(data, frames)


def report(contenders: dict[str, Contender], sizes: dict[str, int], target: Path | None, size: str) -> None:
    ours = contenders["Shoal client and agent"]
    hand = {title: part for title, part in contenders.items() if part.server is None}
    best = min(hand, key=lambda title: statistics.median(hand[title].wall))
    calm = min(hand, key=lambda title: statistics.median(hand[title].quiet))
    thrifty = min(hand, key=lambda title: statistics.median(hand[title].cpu))
    figures: dict[str, dict[str, Any]] = {
        "end_to_end_over_handwritten": ratio(ours.wall, hand[best].wall),
        "cpu_over_handwritten": ratio(ours.cpu, hand[thrifty].cpu),
        "undisturbed_over_handwritten": ratio(ours.quiet, hand[calm].quiet),
    }
    for key, part in {"client_and_agent": ours, "handwritten": hand[best]}.items():
        figures[f"{key}_ms"] = {
            "value": statistics.median(part.wall), "unit": "ms", "n": len(part.wall)
        }  # fmt: skip
    lines = ["| loop | median, ms | fastest, ms | CPU a frame, ms | boxes |", "|---|---|---|---|---|"]
    for title, part in sorted(contenders.items(), key=lambda item: statistics.median(item[1].wall)):
        wall, cpu = statistics.median(part.wall), statistics.median(part.cpu)
        quiet = statistics.median(part.quiet)
        lines.append(f"| {title} | {wall:.2f} | {quiet:.2f} | {cpu:.2f} | {sizes[title]} |")
    lines += ["", "| figure | value | 95 % interval | aim | met |", "|---|---|---|---|---|"]
    for key, aim in AIMS.items():
        found = figures[key]
        met = "yes" if found["value"] <= aim else "no"
        interval = f"{found['low']:.3f} to {found['high']:.3f}"
        lines.append(f"| {key} | {found['value']:.3f} | {interval} | <= {aim:g} | {met} |")
    found = figures["undisturbed_over_handwritten"]
    interval = f"{found['low']:.3f} to {found['high']:.3f}"
    lines.append(f"| undisturbed_over_handwritten | {found['value']:.3f} | {interval} | | |")
    text = "\n".join(lines)
    print(text)
    note = (
        f"The model takes {size} pixels. Fastest by hand: {best}; least CPU by hand: {thrifty}. The load of "
        f"the machine at the end was {os.getloadavg()[0]:.1f}: on a busy one two processes get more of the "
        "processors than one, so medians are no fair comparison. `undisturbed` compares each "
        "round's fastest frames; CPU time is the figure to trust."
    )
    print(f"\n{note}")
    if target:
        document = {"benchmark": "application", "figures": figures, "context": context()}
        target.write_text(json.dumps(document, indent=1) + "\n")
        target.with_suffix(".md").write_text(f"# application\n\n{text}\n\n{note}\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
