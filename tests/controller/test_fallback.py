"""Every class gets a plain variant within a minute of a push; a class that comes later gets the nearest
one's as fallback, shown as such, until its own is there. A real controller, worker and agents.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal_controller.api import schemas
from shoal_controller.client import Client
from shoal_controller.demo import cast
from shoal_controller.demo.stage import Stage
from shoal_protos.v1 import desired_pb2
from tests.emulation import tasks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

PLAIN_S = 60.0  # what a push promises, on an idle machine
PATIENCE_S = 150.0  # the tests' own machine is not idle


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stage, Client, Path]]:
    with Stage(tmp_path_factory.mktemp("fallback"), keep=False) as stage:
        client = cast.start_controller(stage)
        try:
            token = stage.root / "token"
            stage.shoal(
                "a token", "token", "create", "--join", "--uses", "3", "--ttl", "1h", "--out", str(token)
            )
            yield stage, client, token
        finally:
            client.close()


def join(stage: Stage, client: Client, token: Path, name: str, runtimes: str) -> cast.Agent:
    return cast.start_agent(stage, client, name, cast.join(stage, name, runtimes, token))


def placement(client: Client, name: str) -> schemas.PlacementView | None:
    """What a device serves, once it has settled."""
    found = client.device(name).placements
    return next((p for p in found if p.serving and p.step == "commit"), None)


def adopted(agent: cast.Agent) -> desired_pb2.PlacementSettings:
    """The settings that the device itself was told, signed."""
    signed = desired_pb2.Signed.FromString((agent.directory / "trust/desired.bin").read_bytes())
    return desired_pb2.DesiredState.FromString(signed.payload).placements[0].settings


def test_plain_variants_then_a_fallback_then_a_variant_of_its_own(
    fleet: tuple[Stage, Client, Path], tmp_path: Path
) -> None:
    stage, client, token = fleet
    join(stage, client, token, "hall", "onnxruntime")
    join(stage, client, token, "kitchen", "openvino")
    known = {client.device(name).profile_class for name in ("hall", "kitchen")}
    assert len(known) == 2

    create = ("endpoint", "create", tasks.NAME, "--model", tasks.NAME, "--settle", "1s", "--ask", "--yes")
    began = time.monotonic()
    push = ("model", "push", str(tasks.write_task(tmp_path / "task")), "--name", tasks.NAME, "--wait")
    stage.shoal("the push is taken", *push, timeout_s=PATIENCE_S)
    release = stage.wait(
        "plain variants are released",
        lambda: next((r for r in client.releases(tasks.NAME) if set(r.fronts) >= known), None),
        PATIENCE_S,
    )
    print(f"plain variants of {len(known)} classes after {time.monotonic() - began:.1f} s, wanted {PLAIN_S}")
    stage.shoal("an endpoint", *create)
    stage.shoal(
        "a rollout", "rollout", "create", tasks.NAME, "--release", release.id, "--waves", "100%", "--yes"
    )
    for name, runtime in (("hall", "onnxruntime"), ("kitchen", "openvino")):
        found = stage.wait(f"{name} serves", functools.partial(placement, client, name), PATIENCE_S)
        assert found.variant == f"plain-fp32-{runtime}" and not found.fallback

    # A class that nobody knew: the same instructions, one of the runtimes known.
    workshop = join(stage, client, token, "workshop", "onnxruntime,openvino")
    assert workshop.profile_class not in known
    found = stage.wait("workshop serves a fallback", lambda: placement(client, "workshop"), PATIENCE_S)
    assert found.fallback and found.variant.startswith("plain-fp32-")
    told = adopted(workshop)
    assert told.fallback and not told.HasField("envelope") and told.promised_int8_share == 0
    finding = stage.wait(
        "a finding asks for a search",
        lambda: next((f for f in client.findings() if f.kind == "new_class"), None),
        PATIENCE_S,
    )
    assert finding.profile_class == workshop.profile_class
    assert "nearest compatible class is used after its own probe" in finding.sentence
    listed = stage.shoal("devices are listed", "device", "list")
    assert "fallback" in next(line for line in listed.splitlines() if line.startswith("workshop"))

    # Policies may act: it is converted, rolled out to this class alone, and the finding closes.
    stage.shoal("policies may act", "endpoint", "update", tasks.NAME, "--automatic", "--yes")

    def own() -> schemas.PlacementView | None:
        now = placement(client, "workshop")
        return now if now is not None and not now.fallback else None

    stage.wait("workshop has its own", own, PATIENCE_S, explain=lambda: str(client.findings()))
    stage.wait("it was told so", lambda: None if adopted(workshop).fallback else True, PATIENCE_S)
    stage.wait(
        "the finding closes",
        lambda: True if client.finding(finding.id).state == "resolved" else None,
        PATIENCE_S,
    )
    for name, runtime in (("hall", "onnxruntime"), ("kitchen", "openvino")):
        now = placement(client, name)
        assert now is not None and now.variant == f"plain-fp32-{runtime}"  # nobody else was touched
