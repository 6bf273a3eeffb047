"""What the supervisor tells: the report to the controller, the status file. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal_agent.profile import CLASS_RULE_VERSION
from shoal_agent.profile import class_of as profile_class
from shoal_agent.update.machine import Step
from shoal_protos import __version__
from shoal_protos.v1 import agents_pb2, desired_pb2, profile_pb2

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
    crash_logs: bytes = b""  # the last logs when the crash loop was noticed
    class_reason: str = ""
    clock_offset_ms: int | None = None  # ahead of the controller's; None = not heard yet


def reported(picture: Picture) -> agents_pb2.Reported:
    """The message for the controller."""
    return agents_pb2.Reported(
        epoch=picture.epoch,
        generation=picture.generation,
        placements=[_with_crash_loop(item, picture) for item in picture.placements],
        refusals=picture.refusals,
        requests=picture.answers,
        agent_version=__version__,
        ports=picture.ports,
        bundles_on_disk=picture.bundles,
        clock_wrong=picture.clock_wrong,
    )


def _with_crash_loop(status: agents_pb2.PlacementStatus, picture: Picture) -> agents_pb2.PlacementStatus:
    if not picture.crash_loop:
        return status
    copy = agents_pb2.PlacementStatus()
    copy.CopyFrom(status)
    copy.reason = copy.reason or "server: crash loop"
    copy.detail = f"{copy.detail} {picture.crash_loop}".strip()
    copy.logs = copy.logs or picture.crash_logs
    return copy


def status(picture: Picture, pid: int, wall_ms: int) -> dict[str, Any]:
    """`run/status.json`, which `shoal-agent status` shows."""
    return {
        "fleet": picture.fleet,
        "device": picture.device,
        "name": picture.name,
        "profile_class": picture.profile_class,
        "class_reason": picture.class_reason,
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
        "clock_offset_ms": picture.clock_offset_ms,
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


def profile_json(profile: profile_pb2.Profile) -> dict[str, Any]:
    """A profile for people and scripts: `shoal-agent profile --json` and the answer to a request."""
    return {
        "class": profile_class(profile),
        "class_rule_version": CLASS_RULE_VERSION,
        "architecture": profile.architecture,
        "cpu_model": profile.cpu_model,
        "isa_features": list(profile.isa_features),
        "cores": profile.cores,
        "memory_bytes": profile.memory_bytes,
        "accelerators": [
            {"vendor": item.vendor, "kind": item.kind, "name": item.name, "driver": item.driver_version}
            for item in profile.accelerators
        ],
        "runtimes": [
            {"name": item.name, "version": item.version, "providers": list(item.providers)}
            for item in profile.runtimes
        ],
        "os": profile.os,
        "hardware_part": profile.hardware_part,
        "emulated": profile.emulated,
        "agent_version": profile.agent_version,
        "features": list(profile.features),
        "python_version": profile.python_version,
    }


def has_traffic(placements: Iterable[Any]) -> bool:
    """Whether any placement window counted something."""
    return any(item.requests or item.errors or item.labelled or item.label_unmatched for item in placements)


def grpc_addresses(controllers: Sequence[desired_pb2.ControllerAddress], known: Sequence[str]) -> list[str]:
    """Addresses to try in order: those of the desired state, then those of the join."""
    named = [item.address for item in controllers if item.carrier in ("", "grpc")]
    return list(dict.fromkeys([*named, *known]))
