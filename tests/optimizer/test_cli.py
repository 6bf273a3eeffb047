"""`shoal optimize`: its results, its resumption, its refusals; on digits the chosen bundle answers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal_optimizer import cli
from shoal_optimizer.task import load_task
from shoal_protos.bundle import open_bundle
from shoal_protos.errors import Conflict, InvalidInput, ShoalError

EXAMPLES = Path(__file__).parents[2] / "examples"


def shoal(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "shoal_controller.cli.main", "optimize", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
    )


def finish(child: subprocess.Popen[str], seconds: float = 150) -> tuple[int, str, str]:
    out, err = child.communicate(timeout=seconds)
    return child.returncode, out, err


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, quadrants_path: Path) -> tuple[Path, str, str]:
    """One conversion-only optimization by the command line: its folder, stdout and stderr."""
    folder = tmp_path_factory.mktemp("cli")
    child = shoal(
        str(quadrants_path), "--out", "out", "--minutes", "0.01", "--objective", "minimise size", cwd=folder
    )
    code, out, err = finish(child)
    assert code == 0, err
    return folder, out, err


class TestOptimize:
    def test_rows_when_piped(self, result: tuple[Path, str, str]) -> None:
        lines = [line.split("\t") for line in result[1].splitlines()]
        rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
        assert rows[0]["chosen"] == "yes" and [r["chosen"] for r in rows].count("yes") == 1
        assert int(rows[0]["size_bytes"]) == min(int(row["size_bytes"]) for row in rows)
        assert all(float(row["latency_p95_ms"]) > 0 and float(row["memory_bytes"]) >= 0 for row in rows)

    def test_bundles_and_report_are_left(self, result: tuple[Path, str, str]) -> None:
        folder, _, err = result
        serve = re.search(r"shoal-agent serve (\S+)", err)
        assert serve is not None
        assert open_bundle(folder / serve.group(1)).digest.startswith("sha256:")
        assert (folder / "out" / "report.html").is_file()
        assert json.loads((folder / "out" / "report.json").read_text())["classes"]

    def test_again_it_prints_the_same_as_json(
        self, result: tuple[Path, str, str], quadrants_path: Path
    ) -> None:
        arguments = (str(quadrants_path), "--out", "out", "--minutes", "0.01", "--objective", "minimise size")
        code, out, _ = finish(shoal(*arguments, "--json", cwd=result[0]))
        assert code == 0
        found: dict[str, Any] = json.loads(out)
        (entry,) = found["classes"]
        assert entry["choice"]["bundle"] == entry["front"][0]["bundle"] and entry["serve"] in result[2]

    def test_another_search_is_refused_unless_resumed(
        self, result: tuple[Path, str, str], quadrants_path: Path
    ) -> None:
        out, other = result[0] / "out", "accuracy>=0.1; minimise latency_p95"
        with pytest.raises(Conflict, match="objective"):
            cli.optimize(quadrants_path, out=out, objective_text=other)
        found = cli.optimize(quadrants_path, out=out, objective_text=other, resume=True)
        assert found["objective"] == "minimise size"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["missing.py"], 2, "no task file"),
        (["TASK", "--objective", "accuracy>2"], 2, "accuracy"),
        (["TASK", "--class", "x86_64.avx2.2c"], 2, "names no runtime"),
        (["TASK", "--class", "x86_64.magic.2c+onnxruntime"], 2, "instruction set"),
        (["TASK", "--minutes", "-1"], 2, "minutes"),
        (["TASK", "--resume"], 1, "no search"),
    ],
)
def test_refusals_say_what_and_what_to_do(
    arguments: list[str], code: int, said: str, quadrants_path: Path, tmp_path: Path
) -> None:
    filled = [str(quadrants_path) if a == "TASK" else a for a in arguments]
    found, out, err = finish(shoal(*filled, "--out", "out", cwd=tmp_path))
    assert found == code and out == "" and said in err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_is_left_alone(quadrants_path: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(Conflict, match="another --out"):
        cli.optimize(quadrants_path, out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_bad_task_file_is_a_short_error(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("raise RuntimeError('no luck')")
    with pytest.raises(ShoalError, match="no luck") as caught:
        cli.optimize(bad, out=tmp_path / "out", minutes=0.01)
    assert caught.value.remedy


def test_classes_of_this_and_of_other_machines() -> None:
    (own,) = cli.machine_classes([])
    assert own.local and own.runtimes and own.isa
    part = f"{own.name.partition('+')[0]}+onnxruntime"
    assert cli.machine_classes([part])[0].local
    arm = cli.machine_classes(["aarch64.dotprod.4c+onnxruntime"])[0]
    assert arm.isa == ("neon", "dotprod") and not arm.local
    assert not cli.machine_classes([part], ["avx2"])[0].local
    with pytest.raises(InvalidInput):
        cli.machine_classes(["nonsense"])


@pytest.mark.slow
def test_ctrl_c_stops_and_the_same_command_goes_on(quadrants_path: Path, tmp_path: Path) -> None:
    arguments = (str(quadrants_path), "--out", "out", "--minutes", "0.01")
    child = shoal(*arguments, cwd=tmp_path)
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith("made plain"):
            child.send_signal(signal.SIGINT)
            break
    code, out, err = finish(child)
    assert code == 130 and out == "" and "same command" in err
    code, out, err = finish(shoal(*arguments, cwd=tmp_path))
    assert code == 0, err
    assert "baseline" not in err  # the original was neither trained nor judged again
    assert "yes" in out


# ---------------------------------------------------------------------------- on real digits


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The digits optimized for this machine, and the chosen bundle served: result and HTTP port."""
    child = shoal(
        str(EXAMPLES / "digits.py"),
        "--out",
        "out",
        "--json",
        "--objective",
        "accuracy>=0.97; minimise size",
        cwd=tmp_path,
    )
    code, out, err = finish(child, 170)
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    command = found["classes"][0]["serve"].split()[1:]
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "shoal_agent",
            *command,
            "--http-port",
            "0",
            "--grpc-port",
            "0",
            "--metrics-port",
            "0",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
    )
    try:
        assert server.stdout is not None
        deadline, port = time.monotonic() + 60, 0
        while not port and time.monotonic() < deadline:
            match = re.search(r'"http"\s*:\s*(\d+)', server.stdout.readline())
            port = int(match.group(1)) if match else 0
        assert port
        yield found, port
    finally:
        server.terminate()
        server.communicate(timeout=20)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_chosen_bundle_answers_a_client_we_did_not_write(served: tuple[dict[str, Any], int]) -> None:
    import tritonclient.http as triton

    found, port = served
    best = found["classes"][0]["front"][0]
    assert best["accuracy"] >= 0.97 and best["size_bytes"] < 0.1 * 968_317
    task = load_task(EXAMPLES / "digits.py")
    data = task.required("holdout").take(slice(0, 200))
    client = triton.InferenceServerClient(f"127.0.0.1:{port}")
    try:
        index = client.get_model_repository_index()
        name = index[0]["name"]
        given = triton.InferInput(task.input.name, list(data.inputs.shape), task.input.datatype)
        given.set_data_from_numpy(data.inputs)
        answer = client.infer(name, [given]).as_numpy(task.signature.outputs[0].name)
    finally:
        client.close()
    assert answer is not None
    assert float(np.mean(answer.argmax(axis=1) == data.targets)) >= 0.94
