"""The first hour, as it happens to a person, with real processes: a model is pushed, a bare aarch64 board
(emulated: no container, no root file system) runs the installer and joins, gets a release, answers pictures
with names, proves what a search made, and leaves.
"""

from __future__ import annotations

import hashlib
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shoal_agent.client import Client as Application
from shoal_controller.api import schemas
from shoal_controller.client import Client
from shoal_controller.demo import cast
from shoal_controller.demo.stage import BrokenPromise, Stage
from shoal_protos.errors import NotFound
from tests.emulation import device, fixtures, tasks
from tests.emulation.device import Emulated
from tests.emulation.root import PINNED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SERVES_S = 120.0


@dataclass
class Hour:
    """The controller and the board; what one step leaves for the next."""

    stage: Stage
    client: Client
    pi: Emulated

    @property
    def device(self) -> schemas.DeviceDetail:
        (found,) = self.client.all_devices()
        return self.client.device(found.id)

    def figures(self) -> dict[str, schemas.VariantFigures]:
        """Variant name -> its figures for the board's class."""
        name = self.device.profile_class
        return {
            variant.name: figures
            for variant in self.client.variants(tasks.NAME)
            for figures in variant.classes
            if figures.profile_class == name
        }


@pytest.fixture(scope="module")
def hour(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hour]:
    root = tmp_path_factory.mktemp("first-hour")
    pi = Emulated(fixtures.board(), root / "pi")
    pi.folder.mkdir()
    with Stage(root, keep=False) as stage:
        client = cast.start_controller(stage)
        try:
            yield Hour(stage, client, pi)
        finally:
            pi.end()
            client.close()


def test_the_first_hour(hour: Hour, tmp_path: Path) -> None:
    push_my_model(hour, tmp_path)
    join_my_board(hour, tmp_path)
    wait_for_its_release(hour)
    send_pictures(hour, tmp_path)
    search(hour)
    leave(hour)


def push_my_model(hour: Hour, folder: Path) -> None:
    task = tasks.write_task(folder / "task")
    hour.stage.shoal("the push is taken", "model", "push", str(task), "--name", tasks.NAME, "--wait")
    create = ("endpoint", "create", tasks.NAME, "--model", tasks.NAME, "--settle", "2s", "--yes")
    hour.stage.shoal("an endpoint", *create)


def join_my_board(hour: Hour, folder: Path) -> None:
    """What the join line does: fetch the installer, check its SHA-256, run it with the token."""
    add = ("controller", "wheels", "add", "--platform", "aarch64", "--python", "3.11", "--glibc", "2.36")
    try:
        hour.stage.shoal("wheels", *add, "--constraint", PINNED["onnxruntime"], timeout_s=180)
    except BrokenPromise as reason:
        if "registry cannot be reached" in str(reason):
            pytest.skip(str(reason))
        raise
    token = folder / "token"
    hour.stage.shoal("a token", "token", "create", "--join", "--out", str(token))
    with device.installer_door(hour.stage.home / "wheels") as (url, sha256):
        with urllib.request.urlopen(f"{url}/installer/{sha256}", timeout=10) as answer:
            code = answer.read()
        assert hashlib.sha256(code).hexdigest() == sha256
        file = folder / "installer.py"
        file.write_bytes(code)
        hour.pi.install(hour.stage, file, url, token.read_text().strip())
    found = hour.device  # the installer ended well: the first heartbeat was accepted
    assert found.emulated and found.profile_class.startswith("aarch64.")
    assert found.profile_class.endswith("+onnxruntime")
    assert "glibc 2.36" in found.profile["os"] and not found.profile.get("hardware_part")
    features = found.profile["isa_features"]
    assert "neon" in features and not any(feature.startswith("avx") for feature in features)


def wait_for_its_release(hour: Hour) -> None:
    """No variant fitted its class when it came: a plain one was converted for it without being asked."""

    def serving() -> schemas.PlacementView | None:
        return next((p for p in hour.device.placements if p.serving and p.step == "commit"), None)

    served = hour.stage.wait("the board serves", serving, SERVES_S, explain=lambda: str(hour.device))
    assert served.variant == "plain-fp32-onnxruntime" and not served.fallback
    latency = hour.figures()[served.variant].latency_p95_ms
    assert latency is not None and (latency.value, latency.source) == (None, "unmeasured (emulated)")


def send_pictures(hour: Hour, folder: Path) -> None:
    """Pictures in, names out."""
    where = device.address(hour.client, hour.device)
    assert where is not None
    with Application(where, tasks.NAME) as application:
        for name, picture in tasks.write_pictures(folder / "pictures").items():
            assert application.classify(picture)[0].label == name


def search(hour: Hour) -> None:
    """The board answers real inputs, which counts as accuracy and says what answered."""
    start = ("optimization", "start", tasks.NAME, "--class", hour.device.profile_class, "--minutes", "0.1")
    started = hour.stage.shoal_json("a search starts", *start)["id"]

    def ended() -> schemas.Optimization | None:
        found = hour.client.optimization(started)
        return found if found.state in ("done", "failed", "cancelled") else None

    found = hour.stage.wait(
        "the search ends", ended, 150, explain=lambda: str(hour.client.optimization(started))
    )
    assert found.state == "done", found
    measured = hour.figures()
    assert {"plain-fp32-onnxruntime", "plain-int8-onnxruntime"} <= set(measured)
    for figures in measured.values():
        assert figures.accuracy is not None and figures.latency_p95_ms is not None
        assert figures.accuracy.source == "emulated" and (figures.accuracy.value or 0) > 0.95
        assert figures.latency_p95_ms.source == "unmeasured (emulated)"
        assert figures.latency_p95_ms.value is None
    listed = hour.stage.shoal("they are listed", "variant", "list", "--class", hour.device.profile_class)
    assert "accuracy emulated, times unmeasured (emulated)" in listed


def leave(hour: Hour) -> None:
    known = hour.device.id
    hour.pi.agent(hour.stage, "the board leaves", "leave", "--yes", "--purge")
    assert not hour.pi.state.exists() and not hour.pi.prefix.exists()

    def gone() -> bool | None:
        try:
            return True if hour.client.device(known).status == "revoked" else None
        except NotFound:
            return True

    hour.stage.wait("the controller has let it go", gone, 20)
    assert not [d for d in hour.client.all_devices() if d.status != "revoked"]
