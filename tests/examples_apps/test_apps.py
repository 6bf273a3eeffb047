"""Every example application, run as people run it, against a real agent."""

from __future__ import annotations

import csv
import importlib.util
import io
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

import shoal_agent
import shoal_protos
from shoal_agent.client import Box, Client
from shoal_protos.errors import InvalidInput
from tests.agent import bundles
from tests.agent.detectors import encoded, scene
from tests.examples_apps.conftest import APPS


def run(*command: str, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, **options)
    assert done.returncode == code, done.stderr
    return done


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"app_{name}", APPS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class TestFolder:
    @pytest.fixture
    def pictures(self, tmp_path: Path) -> Path:
        (tmp_path / "a.png").write_bytes(encoded(scene()))
        (tmp_path / "b.jpg").write_bytes(encoded(scene(), "JPEG", quality=95))
        (tmp_path / "broken.jpg").write_bytes(encoded(scene(), "JPEG")[:900])
        (tmp_path / "notes.txt").write_text("no picture")
        return tmp_path

    def test_csv(self, pictures: Path, shapes_server: str) -> None:
        done = run(sys.executable, str(APPS / "folder.py"), str(pictures), "--server", shapes_server, "--csv")
        rows = list(csv.DictReader(io.StringIO(done.stdout)))
        assert [(row["file"], row["name"].split()[0] if row["name"] else "") for row in rows] == [
            ("a.png", "red"),
            ("a.png", "blue"),
            ("b.jpg", "red"),
            ("b.jpg", "blue"),
            ("broken.jpg", ""),
        ]
        assert rows[0]["name"] == "red at 80,80,160,160"
        assert "damaged" in rows[-1]["probability"]

    def test_table_of_names(self, tmp_path: Path, digits_server: str) -> None:
        picture = bundles.images(1)[0]
        Image.fromarray((picture[..., 0].astype(np.uint16) * 255 // 16).astype(np.uint8)).save(
            tmp_path / "seven.png"
        )
        done = run(sys.executable, str(APPS / "folder.py"), str(tmp_path), "--server", digits_server)
        assert f"digit-{bundles.expected(picture[None]).argmax()}" in done.stdout

    def test_nobody_there(self, pictures: Path) -> None:
        done = run(sys.executable, str(APPS / "folder.py"), str(pictures), "--server", "127.0.0.1:1", code=1)
        assert "does not answer" in done.stderr and "Traceback" not in done.stderr


class TestCamera:
    def test_a_video_file(self, tmp_path: Path, shapes_server: str) -> None:
        video = tmp_path / "drive.avi"
        writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"MJPG"), 10, (640, 480))
        for _ in range(5):
            writer.write(cv2.cvtColor(np.asarray(scene()), cv2.COLOR_RGB2BGR))
        writer.release()
        out = tmp_path / "out.mp4"
        command = [str(APPS / "camera.py"), "--source", str(video), "--server", shapes_server]
        done = run(sys.executable, *command, "--save", str(out))
        lines = done.stdout.splitlines()
        assert len(lines) == 6 and all("'red'" in line and "'blue'" in line for line in lines[:5])
        assert lines[5].startswith("5 pictures")
        assert out.stat().st_size > 1000

    def test_no_camera(self, shapes_server: str) -> None:
        done = run(
            sys.executable, str(APPS / "camera.py"), "--source", "no.mp4", "--server", shapes_server, code=1
        )
        assert "Cannot open no.mp4" in done.stderr


class TestGstreamer:
    def test_rows_are_padded_to_four_bytes(self) -> None:
        frame_of = load("gstreamer").frame_of
        picture = np.random.default_rng(0).integers(0, 255, (3, 5, 3), dtype=np.uint8)
        padded = np.zeros((3, 16), np.uint8)
        padded[:, :15] = picture.reshape(3, 15)
        assert np.array_equal(frame_of(padded.tobytes(), 5, 3), picture)

    def test_a_pipeline(self, shapes_server: str) -> None:
        """Needs the distribution's python3-gi, which is built for the distribution's Python."""
        python = "/usr/bin/python3"
        probe = (
            "import gi, sys; gi.require_version('GstApp', '1.0'); assert sys.version_info[:2] == "
            f"{sys.version_info[:2]}; from gi.repository import Gst, GstApp; Gst.init(None); "
            "assert Gst.ElementFactory.find('videotestsrc') and Gst.ElementFactory.find('videoconvert')"
        )
        if subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode:
            pytest.skip("needs python3-gi and GStreamer for the same Python")
        paths = [str(Path(module.__file__ or "").parents[1]) for module in (shoal_agent, shoal_protos, np)]
        command = [str(APPS / "gstreamer.py"), "--server", shapes_server, "--source"]
        pattern = "videotestsrc pattern=red num-buffers=3 ! video/x-raw,width=321,height=240"
        done = run(python, *command, pattern, env={"PYTHONPATH": ":".join(paths), "PATH": "/usr/bin:/bin"})
        assert "'red'" in done.stdout and "pictures" in done.stdout.splitlines()[-1]


class TestRos2:
    """rclpy is not installed here: what surrounds ROS runs with messages of the same fields."""

    @staticmethod
    def message(encoding: str, frame: np.ndarray[Any, Any], padding: int = 0) -> Any:
        height, width = frame.shape[:2]
        rows = np.pad(frame.reshape(height, -1), ((0, 0), (0, padding)))
        return SimpleNamespace(
            header=SimpleNamespace(frame_id="camera"),
            height=height,
            width=width,
            encoding=encoding,
            step=rows.shape[1],
            data=rows.tobytes(),
        )

    @pytest.mark.parametrize(("encoding", "padding"), [("rgb8", 0), ("bgr8", 7)])
    def test_the_callback(self, shapes_server: str, encoding: str, padding: int) -> None:
        frame = np.asarray(scene())
        frame = frame[..., ::-1] if encoding == "bgr8" else frame
        with Client(shapes_server) as client:
            seen = load("ros2_node").look(client, self.message(encoding, frame, padding))
        assert seen.header.frame_id == "camera"
        assert [box.label for box in seen.found] == ["red", "blue"]
        assert all(isinstance(box, Box) for box in seen.found)

    def test_messages_that_are_refused(self) -> None:
        frame_of = load("ros2_node").frame_of
        good = self.message("rgb8", np.asarray(scene()))
        with pytest.raises(InvalidInput, match="16UC1"):
            frame_of(SimpleNamespace(**{**vars(good), "encoding": "16UC1"}))
        with pytest.raises(InvalidInput, match="cut off"):
            frame_of(SimpleNamespace(**{**vars(good), "data": good.data[:-1]}))


class TestCurl:
    def test_a_file_of_the_tensor(self, tmp_path: Path, digits_server: str) -> None:
        picture = bundles.images(1, seed=3)
        (tmp_path / "raw.bin").write_bytes(picture.tobytes())
        done = run("sh", str(APPS / "curl.sh"), str(tmp_path / "raw.bin"), digits_server)
        assert done.stdout.strip() == f"digit-{bundles.expected(picture).argmax()}"

    def test_a_picture(self, tmp_path: Path, digits_server: str) -> None:
        if not Path("/usr/bin/convert").exists():
            pytest.skip("needs ImageMagick")
        Image.new("L", (40, 40), 7).save(tmp_path / "gray.png")
        picture, path = str(tmp_path / "gray.png"), {"PATH": "/usr/bin:/bin"}
        done = run("sh", str(APPS / "curl.sh"), picture, digits_server, env=path)
        truth = bundles.expected(np.full((1, 8, 8, 1), 7, np.uint8)).argmax()
        assert done.stdout.strip() == f"digit-{truth}"

    def test_what_goes_wrong_is_said(self, tmp_path: Path, digits_server: str) -> None:
        (tmp_path / "raw.bin").write_bytes(bytes(64))
        script = str(APPS / "curl.sh")
        assert "no file" in run("sh", script, "none.jpg", digits_server, code=1).stderr
        picture = str(tmp_path / "raw.bin")
        assert "No agent answers" in run("sh", script, picture, "127.0.0.1:1", code=1).stderr
        assert "no model cats" in run("sh", script, picture, digits_server, "cats", code=1).stderr
