from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shoal_agent import cli
from tests.agent import bundles, detectors
from tests.agent.test_client import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path)
    yield found
    found.stop()


def picture(path: Path) -> Path:
    Image.fromarray(np.full((8, 8), 200, np.uint8)).convert("RGB").save(path)
    return path


def ask(server: Server, *arguments: str) -> list[str]:
    return ["infer", "--address", server.address, *arguments]


def test_a_picture_gets_a_name(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = picture(tmp_path / "a.png")
    assert cli.main(ask(server, str(file))) == 0
    name, answer = capsys.readouterr().out.strip().split("\t")
    assert name == "a.png"
    assert answer.endswith("%")


def test_a_folder_as_json_lines(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("b.png", "a.png"):
        picture(folder / name)
    assert cli.main(ask(server, str(folder), "--json", "--top", "2")) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(row["file"]).name for row in rows] == ["a.png", "b.png"]
    assert all(len(row["answers"]) == 2 and row["answers"][0]["label"] for row in rows)


def test_one_bad_file_of_several_is_told_and_left_out(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = picture(tmp_path / "b.png"), tmp_path / "a.png"
    bad.write_bytes(b"no picture")
    (tmp_path / "c.npy").write_bytes(b"no array")
    assert cli.main(ask(server, str(bad), str(good), str(tmp_path / "c.npy"))) == 1
    told = capsys.readouterr()
    assert told.out.startswith("b.png\t") and len(told.out.splitlines()) == 1
    assert "a.png is not a picture" in told.err and "c.npy is not an array" in told.err
    assert cli.main(ask(server, str(bad))) == 2, "alone it is a wrong line"
    assert cli.main(ask(server, str(tmp_path / "none.npy"))) == 2
    assert "There is no file" in capsys.readouterr().err


def test_a_picture_for_a_model_of_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Server(tmp_path, bundles.vector_bundle)
    try:
        assert cli.main(ask(server, str(picture(tmp_path / "a.png")))) == 2
        told = capsys.readouterr().err
        assert "a.png is no array" in told and "FP32 [-1, 64]" in told and "numpy.save" in told
    finally:
        server.stop()


def test_several_models_want_a_name(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = bundles.onnx_bundle(tmp_path / "other", seed=1)
    server.plane.load("other", other.path, other.digest)
    assert cli.main(ask(server, str(picture(tmp_path / "a.png")))) == 2
    assert "2 models" in (told := capsys.readouterr().err) and "--model NAME" in told
    assert cli.main(ask(server, "--model", "other", str(tmp_path / "a.png"))) == 0


def test_an_array_file(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "one.npy", bundles.images(1)[0])
    assert cli.main(ask(server, str(tmp_path / "one.npy"))) == 0
    assert capsys.readouterr().out.startswith("one.npy\t")


def test_boxes_are_told_with_their_corners(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Server(tmp_path, detectors.detector_bundle)
    try:
        assert cli.main(ask(server, str(picture(tmp_path / "a.png")))) == 0
    finally:
        server.stop()
    assert capsys.readouterr().out.startswith("a.png\t")


@pytest.mark.parametrize("missing", ["nowhere.png", "empty"])
def test_what_is_not_there_is_named(
    server: Server, tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert cli.main(ask(server, str(tmp_path / missing))) != 0
    assert missing in capsys.readouterr().err


def test_no_agent_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["infer", "--state-dir", str(tmp_path), "a.png"]) == 1
    assert "--address" in capsys.readouterr().err
