"""The demo's parts by themselves; the story is told in tests/e2e."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_agent.telemetry.intervals import wilson
from shoal_controller.cli.demo import find_task
from shoal_controller.demo import evidence, figures, timing, worsening
from shoal_controller.demo.relay import Relay
from shoal_controller.demo.stage import BrokenPromise, Stage
from shoal_protos.errors import NotFound


class TestRelay:
    def test_it_carries_and_counts_both_directions(self) -> None:
        server = socket.create_server(("127.0.0.1", 0))

        def echo() -> None:
            connection, _ = server.accept()
            with connection:
                while data := connection.recv(1024):
                    connection.sendall(data)

        thread = threading.Thread(target=echo)
        thread.start()
        relay = Relay(f"127.0.0.1:{server.getsockname()[1]}")
        began = time.monotonic()
        host, port = relay.address.split(":")
        with socket.create_connection((host, int(port)), timeout=5) as near:
            near.sendall(b"x" * 500)
            got = 0
            while got < 500:
                got += len(near.recv(1024))
        thread.join(5)
        time.sleep(0.3)
        now = time.monotonic()
        assert relay.quietest(began, now, 1000) is None
        assert relay.quietest(now - 0.25, now, 0.2) == 0
        assert sum(size for _, size in relay._counts) == 1000
        relay.close()
        server.close()

    def test_the_quietest_window(self) -> None:
        relay = Relay("127.0.0.1:9")
        relay._counts = [(0.0, 900), (5.0, 100), (24.0, 100), (40.0, 900)]
        assert relay.quietest(0.0, 41.0, 20.0) == pytest.approx(100 / 20)
        relay.close()


class TestWorsening:
    def test_it_keeps_type_shape_and_range(self) -> None:
        inputs = np.random.default_rng(0).integers(0, 17, (20, 8, 8, 1)).astype(np.uint8)
        changed = worsening.worsen(inputs, worsening.SEVERITIES[-1], 0, 16)
        assert changed.dtype == np.uint8
        assert changed.shape == inputs.shape
        assert changed.max() <= 16
        assert not np.array_equal(changed, inputs)
        assert np.array_equal(changed, worsening.worsen(inputs, worsening.SEVERITIES[-1], 0, 16))

    def test_the_first_that_costs_enough(self) -> None:
        costs = {severity: 6.0 * place for place, severity in enumerate(worsening.SEVERITIES)}
        severity, fall = worsening.choose(lambda s: costs[s])
        assert fall == 24.0
        assert severity == worsening.SEVERITIES[4]

    def test_none_is_a_broken_promise(self) -> None:
        with pytest.raises(BrokenPromise, match="20 to 30 points"):
            worsening.choose(lambda _: 3.0)


class TestEvidence:
    @given(st.integers(0, 400), st.integers(1, 400))
    def test_wilson_holds_the_share(self, right: int, n: int) -> None:
        right = min(right, n)
        low, high = wilson(right, n)
        assert 0 <= low <= right / n + 1e-9
        assert right / n - 1e-9 <= high <= 1

    def test_recovery(self) -> None:
        assert evidence.recovered(0.9, 0.6, 0.84) == pytest.approx(0.8)
        assert np.isnan(evidence.recovered(0.9, 0.9, 0.9))

    def test_intervals_surround(self) -> None:
        random = np.random.default_rng(3)
        parts = [
            evidence.Rights((random.random((3, 200)) < share).astype(float)) for share in (0.95, 0.7, 0.93)
        ]
        low, high = evidence.resampled(parts, evidence.recovered)
        assert low < evidence.recovered(*(part.share for part in parts)) < high

    def test_rights(self) -> None:
        outputs = np.eye(3)[[0, 1, 2, 2]]
        assert evidence.rights([outputs], np.array([0, 1, 2, 0])).share == 0.75

    def test_turns_are_taken(self) -> None:
        calls: list[str] = []
        medians = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
        assert len(medians["a"]) == len(medians["b"]) == timing.ROUNDS
        after = calls[2 * timing.WARM_UP :]
        assert after[: timing.CALLS] == ["a"] * timing.CALLS
        assert after[timing.CALLS : 2 * timing.CALLS] == ["b"] * timing.CALLS

    @given(st.lists(st.floats(0, 100), min_size=3, max_size=200))
    def test_median_interval(self, values: list[float]) -> None:
        low, high = figures.median_interval(values)
        assert low <= float(np.median(values)) <= high

    def test_the_form(self) -> None:
        document = figures.document({"x": figures.figure(1.0, "ratio", (0.9, 1.1), 3)})
        assert document["figures"]["x"] == {"value": 1.0, "unit": "ratio", "low": 0.9, "high": 1.1, "n": 3}
        assert set(document["context"]) == {"cpu", "isa", "cores", "load", "versions", "commit", "date"}


class TestStage:
    def test_everything_ends_and_nothing_stays(self, tmp_path: Path) -> None:
        root = tmp_path / "demo"
        with Stage(root, keep=False) as stage:
            code = (
                "import subprocess, sys, time\n"
                "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
                "print(child.pid, flush=True)\n"
                "time.sleep(60)"
            )
            process = stage.start("parent", [sys.executable, "-c", code])
            grandchild = int(stage.wait("it is on", lambda: process.log.read_text() or None, 20))
        assert process.popen.poll() is not None
        assert not root.exists()
        limit = time.monotonic() + 5  # it is not our child: the kernel ends it in its own time
        while runs(grandchild) and time.monotonic() < limit:
            time.sleep(0.01)
        assert not runs(grandchild)

    def test_an_early_end_is_a_broken_promise(self, tmp_path: Path) -> None:
        with Stage(tmp_path / "demo", keep=True) as stage:
            stage.start("short", [sys.executable, "-c", "print('no luck'); raise SystemExit(3)"])
            with pytest.raises(BrokenPromise, match="short ended with code 3"):
                stage.wait("never", lambda: None, 20)

    def test_a_deadline_is_a_broken_promise(self, tmp_path: Path) -> None:
        with Stage(tmp_path / "demo", keep=True) as stage:
            with pytest.raises(BrokenPromise, match="it is quick"):
                stage.run("it is quick", [sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
            with pytest.raises(BrokenPromise, match="what happened"):
                stage.wait("it comes", lambda: None, 0.1, explain=lambda: "what happened")
            with pytest.raises(BrokenPromise, match="Exit code 2: bad"):
                stage.run("it works", [sys.executable, "-c", "import sys; sys.exit(print('bad') or 2)"], 20)

    def test_settings_of_this_shell_do_not_leak_in(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SHOAL_URL", "http://elsewhere")
        with Stage(tmp_path / "demo", keep=True) as stage:
            environment = stage.environment()
            assert "SHOAL_URL" not in environment
            assert environment["SHOAL_HOME"].startswith(str(tmp_path))


class TestTask:
    def test_the_digits_are_found(self) -> None:
        assert find_task(None).name == "digits.py"

    def test_a_missing_one_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(NotFound, match=r"none\.py"):
            find_task(tmp_path / "none.py")


def test_importing_the_demo_is_light() -> None:
    code = (
        "import sys, shoal_controller.demo.story; print('torch' in sys.modules or 'fastapi' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def runs(pid: int) -> bool:
    """Whether a process is there and not just waiting to be reaped by its new parent."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
    return "State:\tZ" not in status
