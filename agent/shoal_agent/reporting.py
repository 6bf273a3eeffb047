"""What the supervisor tells: the report to the controller, answers to requests, the status file. Pure
but for reading files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal_agent import logs
from shoal_agent.config import Config
from shoal_agent.update.machine import Step
from shoal_protos import __version__
from shoal_protos.v1 import agents_pb2, desired_pb2, profile_pb2

MAX_ANSWER = 64 * 1024  # bytes
STEP_NAMES: Mapping[int, str] = {
    agents_pb2.STEP_WAITING: Step.WAITING.value,
    agents_pb2.STEP_FETCH: Step.FETCH.value,
    agents_pb2.STEP_VERIFY: Step.VERIFY.value,
    agents_pb2.STEP_PROBE: Step.PROBE.value,
    agents_pb2.STEP_SWITCH: Step.SWITCH.value,
    agents_pb2.STEP_SETTLE: Step.SETTLE.value,
    agents_pb2.STEP_COMMIT: Step.COMMIT.value,
    agents_pb2.STEP_ROLLED_BACK: Step.ROLLED_BACK.value,
    agents_pb2.STEP_FAILED: Step.FAILED.value,
}
ROLE_NAMES: Mapping[int, str] = {desired_pb2.ROLE_PRIMARY: "primary", desired_pb2.ROLE_SHADOW: "shadow"}


@dataclass(frozen=True)
class Picture:
    """Everything that is true of this device at one moment."""

    fleet: str
    device: str
    name: str
    profile_class: str
    connected: bool
    address: str
    last_problem: str
    epoch: int
    generation: int
    placements: tuple[agents_pb2.PlacementStatus, ...]
    refusals: tuple[agents_pb2.Refusal, ...]
    answers: tuple[agents_pb2.RequestResult, ...]
    ports: profile_pb2.Ports
    bundles: tuple[str, ...]
    clock_wrong: bool
    server_up: bool
    crash_loop: str
    first_heartbeat_s: float | None


def reported(picture: Picture) -> agents_pb2.Reported:
    """The message for the controller."""
    return agents_pb2.Reported(
        epoch=picture.epoch,
        generation=picture.generation,
        placements=[_with_crash_loop(item, picture.crash_loop) for item in picture.placements],
        refusals=picture.refusals,
        requests=picture.answers,
        agent_version=__version__,
        ports=picture.ports,
        bundles_on_disk=picture.bundles,
        clock_wrong=picture.clock_wrong,
    )


def _with_crash_loop(status: agents_pb2.PlacementStatus, sentence: str) -> agents_pb2.PlacementStatus:
    if not sentence:
        return status
    copy = agents_pb2.PlacementStatus()
    copy.CopyFrom(status)
    copy.reason = copy.reason or "server: crash loop"
    copy.detail = f"{copy.detail} {sentence}".strip()
    return copy


def status(picture: Picture, pid: int, wall_ms: int) -> dict[str, Any]:
    """`run/status.json`, which `shoal-agent status` shows."""
    return {
        "fleet": picture.fleet,
        "device": picture.device,
        "name": picture.name,
        "profile_class": picture.profile_class,
        "version": __version__,
        "pid": pid,
        "written_ms": wall_ms,
        "connected": picture.connected,
        "controller": picture.address,
        "last_problem": picture.last_problem,
        "epoch": picture.epoch,
        "generation": picture.generation,
        "server_up": picture.server_up,
        "ports": {
            "host": picture.ports.host,
            "http": picture.ports.http,
            "grpc": picture.ports.grpc,
            "metrics": picture.ports.metrics,
        },
        "placements": [_placement(item) for item in picture.placements],
        "refusals": [item.reason for item in picture.refusals],
        "clock_wrong": picture.clock_wrong,
        "crash_loop": picture.crash_loop,
        "first_heartbeat_s": picture.first_heartbeat_s,
    }


def _placement(item: agents_pb2.PlacementStatus) -> dict[str, Any]:
    return {
        "endpoint": item.endpoint,
        "role": ROLE_NAMES.get(item.role, "?"),
        "wanted": item.wanted,
        "serving": item.serving,
        "step": STEP_NAMES.get(item.step, "?"),
        "reason": item.reason,
        "detail": item.detail,
    }


def answer(
    request: desired_pb2.Request, config: Config, profile: profile_pb2.Profile, picture: Picture, wall_ms: int
) -> agents_pb2.RequestResult:
    """The answer to one request of the desired state."""
    if request.kind == desired_pb2.REQUEST_KIND_LOGS:
        body = logs.report(config.paths.logs, MAX_ANSWER)
    elif request.kind == desired_pb2.REQUEST_KIND_DIAGNOSE:
        body = _diagnosis(config, profile, picture, wall_ms)
    else:
        body = b"This agent does not know that kind of request; update it."
    text = body.decode(errors="replace").encode()[-MAX_ANSWER:]
    return agents_pb2.RequestResult(id=request.id, body=text.decode(errors="ignore").encode())


def _diagnosis(config: Config, profile: profile_pb2.Profile, picture: Picture, wall_ms: int) -> bytes:
    facts = status(picture, 0, wall_ms)
    facts["profile"] = {
        "architecture": profile.architecture,
        "cpu": profile.cpu_model,
        "isa": list(profile.isa_features),
        "cores": profile.cores,
        "memory_bytes": profile.memory_bytes,
        "runtimes": {item.name: item.version for item in profile.runtimes},
        "os": profile.os,
        "python": profile.python_version,
    }
    facts["bundles"] = list(picture.bundles)
    facts["files"] = sizes(config.paths.root)
    return json.dumps(facts, indent=1).encode()


def sizes(root: Path) -> dict[str, int]:
    """Bytes under each room of the state directory."""
    return {
        room.name: sum(path.lstat().st_size for path in room.rglob("*") if path.is_file())
        for room in sorted(root.iterdir())
        if room.is_dir() and room.name != "identity"
    }


def has_traffic(placements: Iterable[Any]) -> bool:
    """Whether any placement window counted something."""
    return any(item.requests or item.errors or item.labelled or item.label_unmatched for item in placements)


def grpc_addresses(controllers: Sequence[desired_pb2.ControllerAddress], known: Sequence[str]) -> list[str]:
    """Addresses to try in order: those of the desired state, then those of the join."""
    named = [item.address for item in controllers if item.carrier in ("", "grpc")]
    return list(dict.fromkeys([*named, *known]))
