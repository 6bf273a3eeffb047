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
