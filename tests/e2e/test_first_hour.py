"""The first hour, as it happens to a person, with real processes: a model is pushed, a bare aarch64 board
joins (emulated: no container, no root), gets a release, answers a picture with a name, proves what a search
made, and leaves.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shoal_agent.client import Client as Application
from shoal_controller.api import schemas
from shoal_controller.client import Client
from shoal_controller.demo import cast
from shoal_controller.demo.stage import Process, Stage
from shoal_protos.errors import NotFound
from tests.emulation import device, fixtures, tasks
from tests.emulation.device import Emulated

pytestmark = [pytest.mark.slow, pytest.mark.timeout(360)]

NAME = "pi"
SERVES_S = 120.0
FIRST_VARIANT_S = 60.0  # "within a minute of a push every class has a plain converted variant"


@dataclass
class Hour:
    """The controller and the board; what one step leaves for the next."""

    stage: Stage
    client: Client
    pi: Emulated
    process: Process | None = None

    @property
    def profile_class(self) -> str:
        return self.client.device(NAME).profile_class

    def figures(self) -> dict[str, schemas.VariantFigures]:
        """Variant name -> its figures for the board's class."""
        return {
            variant.name: figures
            for variant in self.client.variants(tasks.NAME)
            for figures in variant.classes
            if figures.profile_class == self.profile_class
        }


@pytest.fixture(scope="module")
def hour(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hour]:
    root = tmp_path_factory.mktemp("first-hour")
    board, shoal = fixtures.board(), fixtures.shoal_site(root / "shoal")
    with Stage(root, keep=False) as stage:
        client = cast.start_controller(stage)
        try:
            yield Hour(stage, client, Emulated(board, shoal, root / "pi"))
        finally:
            client.close()


def test_the_first_hour(hour: Hour, tmp_path: Path) -> None:
    stage, client = hour.stage, hour.client

    # My model.
    task = tasks.write_task(tmp_path / "task")
    stage.shoal("the push is taken", "model", "push", str(task), "--name", tasks.NAME, "--wait")
    stage.shoal(
        "an endpoint", "endpoint", "create", tasks.NAME, "--model", tasks.NAME, "--settle", "2s", "--yes"
    )

    # My board.
    token = tmp_path / "token"
    stage.shoal("a token", "token", "create", "--join", "--out", str(token))
    hour.pi.run(stage, "the board joins", "join", "--token-file", str(token), "--name", NAME)
    joined = time.monotonic()
    hour.process = hour.pi.start(stage, client, NAME)
    profile = client.device(NAME).profile
    assert client.device(NAME).emulated
    assert hour.profile_class.startswith("aarch64.") and hour.profile_class.endswith("+onnxruntime")
    assert "glibc 2.36" in profile["os"] and not profile.get("hardware_part")
    assert "neon" in profile["isa_features"] and not any(f.startswith("avx") for f in profile["isa_features"])

    # Nothing fitted its class when it came: a plain variant was converted for it without being asked.
    served = stage.wait(
        "the board serves a variant of its own",
        lambda: serving(hour),
        SERVES_S,
        explain=lambda: str(client.device(NAME)),
    )
    assert time.monotonic() - joined < SERVES_S
    assert served.variant == "plain-fp32-onnxruntime" and not served.fallback
    assert hour.figures()[served.variant].latency_p95_ms == schemas.Figure(
        value=None, source="unmeasured (emulated)"
    )
    rollout = stage.wait("its rollout is promoted", lambda: promoted(client), 90)
    assert "unmeasured (emulated)" in rollout.sentence

    # A picture in, a name out.
    where = device.address(client, NAME)
    assert where is not None
    with Application(where, tasks.NAME) as application:
        for name, picture in tasks.write_pictures(tmp_path / "pictures").items():
            assert application.classify(picture)[0].label == name

    # A search: the board answers real inputs, which counts as accuracy and says what answered.
    started = stage.shoal_json(
        "a search starts", "optimization", "start", tasks.NAME, "--class", hour.profile_class,
        "--minutes", "0.1",
    )  # fmt: skip
    found = stage.wait(
        "the search ends",
        lambda: ended(client, started["id"]),
        150,
        explain=lambda: str(client.optimization(started["id"])),
    )
    assert found.state == "done", found
    measured = hour.figures()
    assert {"plain-fp32-onnxruntime", "plain-int8-onnxruntime"} <= set(measured)
    for figures in measured.values():
        assert figures.accuracy is not None and figures.latency_p95_ms is not None
        assert figures.accuracy.source == "emulated" and (figures.accuracy.value or 0) > 0.95
        assert figures.latency_p95_ms.value is None
        assert figures.latency_p95_ms.source == "unmeasured (emulated)"
    listed = stage.shoal("the variants are listed", "variant", "list", "--class", hour.profile_class)
    assert "accuracy emulated" in listed and "unmeasured (emulated)" in listed

    # Goodbye.
    hour.process.popen.send_signal(signal.SIGTERM)
    hour.process.popen.wait(30)
    hour.pi.run(stage, "the board leaves", "leave", "--yes", "--purge")
    assert not hour.pi.state.exists()
    stage.wait("the controller has let it go", lambda: gone(client), 20)


def serving(hour: Hour) -> schemas.PlacementView | None:
    """The board's placement once it answers with a variant."""
    for placement in hour.client.device(NAME).placements:
        if placement.serving and placement.step == "commit":
            return placement
    return None


def promoted(client: Client) -> schemas.Rollout | None:
    """The newest rollout that moved a device, once it has ended."""
    for rollout in client.rollouts():
        if rollout.state in ("promoted", "rolled_back", "aborted") and rollout.waves:
            found = client.rollout(rollout.id)
            assert found.state == "promoted", found
            return found
    return None


def ended(client: Client, optimization: str) -> schemas.Optimization | None:
    found = client.optimization(optimization)
    return found if found.state in ("done", "failed", "cancelled") else None


def gone(client: Client) -> bool | None:
    try:
        return True if client.device(NAME).status == "revoked" else None
    except NotFound:
        return True
