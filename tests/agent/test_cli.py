from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal_agent import cli
from shoal_protos.errors import Conflict, Denied, InvalidInput, ShoalError, Unavailable
from shoal_protos.tokens import JoinToken, encode
from tests.agent.fake_controller import FakeController


def run(*arguments: str) -> int:
    return cli.main(list(arguments))


async def in_thread(*arguments: str) -> int:
    import asyncio

    return await asyncio.to_thread(run, *arguments)


def test_profile_as_json_and_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("profile", "--json", "--runtimes", "onnxruntime") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["class"].endswith("+onnxruntime") and facts["runtimes"][0]["version"]
    assert {"isa_features", "cores", "memory_bytes", "accelerators", "os", "ports", "emulated"} <= set(facts)
    assert run("profile", "--runtimes", "onnxruntime") == 0
    assert facts["class"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidInput("x"), 2),
        (Denied("x"), 3),
        (Unavailable("x"), 4),
        (Conflict("x"), 1),
        (ShoalError("x"), 1),
    ],
)
def test_exit_codes(error: ShoalError, code: int) -> None:
    assert cli.exit_code(error) == code


async def test_join_status_leave(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = str(tmp_path / "device")
    async with FakeController() as controller:
        token_file = tmp_path / "token"
        token_file.write_text(encode(controller.token(uses=1)))
        join = ("join", "--token-file", str(token_file), "--state-dir", state, "--service", "none")
        assert await in_thread(*join, "--name", "bench", "--runtimes", "onnxruntime") == 0
        assert "bench (d-0001)" in capsys.readouterr().out
        assert await in_thread("status", "--state-dir", state, "--json") == 1
        assert json.loads(capsys.readouterr().out)["running"] is False
        assert await in_thread("status", "--state-dir", state) == 1
        assert "not running" in capsys.readouterr().out

        assert await in_thread("leave", "--state-dir", state) == 2
        assert "--yes" in capsys.readouterr().err
        assert await in_thread("leave", "--state-dir", state, "--yes") == 0
        capsys.readouterr()
        assert await in_thread(*join) == 3  # a new key, and the token is used up
        assert "used up" in capsys.readouterr().err
    assert await in_thread(*join) == 4
    error = capsys.readouterr().err
    assert controller.enrolment_address in error and "connection refused" in error


def test_mistyped_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("shj_abcdef")
    assert run("join", "--token-file", str(token_file), "--state-dir", str(tmp_path / "d")) == 2
    assert "mistyped" in capsys.readouterr().err


def test_a_disk_that_takes_nothing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "d"))

    monkeypatch.setattr(Path, "mkdir", full)
    (tmp_path / "token").write_text(
        encode(JoinToken("f", ("127.0.0.1:1",), ("127.0.0.1:1",), "secret", b"ca"))
    )
    arguments = ("--token-file", str(tmp_path / "token"), "--state-dir", str(tmp_path / "d"))
    assert run("join", "--service", "none", *arguments) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and "shoal-agent doctor" in error


def test_run_before_join_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", "--state-dir", str(tmp_path / "d")) == 1
    assert "shoal-agent join" in capsys.readouterr().err


def test_tokens_are_no_arguments() -> None:
    with pytest.raises(SystemExit) as stop:
        run("join", "shj_secret")
    assert stop.value.code == 2


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["run", "--http-port", "x"]])
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_other_processes_are_dispatched(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("probe", "bench", "serve"):
        with pytest.raises(SystemExit) as stop:
            run(name, "--help")
        assert stop.value.code == 0
        assert name in capsys.readouterr().out


HEAVY = [
    "numpy", "uvicorn", "uvloop", "httptools", "onnxruntime", "openvino",
    "torch", "cryptography", "onnx", "fastapi", "shoal_controller",
]  # fmt: skip


def python(code: str) -> Any:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_supervisor_lives_without_heavy_libraries() -> None:
    block = f"import sys\nfor name in {HEAVY!r}: sys.modules[name] = None\n"
    python(
        block + "import shoal_agent.supervisor, shoal_agent.exposition, shoal_agent.joining, shoal_agent.cli"
    )


def test_command_line_starts_light() -> None:
    loaded = python("import shoal_agent.cli, sys; print(*sys.modules)").split()
    assert not {"asyncio", "grpc", "google.protobuf", *HEAVY} & set(loaded)
