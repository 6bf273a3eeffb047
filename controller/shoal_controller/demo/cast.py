"""Who plays: a controller and three agents, each a process of its own with its own directory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal_controller.cli.token import write_secret
from shoal_controller.client import Client
from shoal_controller.demo.relay import Relay
from shoal_controller.demo.stage import AGENT, SHOAL, BrokenPromise, Process, Stage
from shoal_protos import tokens

AGENTS: Mapping[str, str] = {
    "hall": "onnxruntime",
    "kitchen": "openvino",
    "workshop": "onnxruntime,openvino",
}
UP_S, JOIN_S, HEARD_S = 60.0, 40.0, 30.0
HEARTBEAT_S = 10
TELEMETRY_S = 2  # how often agents report; the default of 30 s would make the story slow


@dataclass(frozen=True)
class Agent:
    """A running agent: where applications call it, and how long it took to be heard."""

    name: str
    device: str
    profile_class: str
    directory: Path
    process: Process
    address: str  # host:port of the data plane
    start_s: float  # from process start to the first accepted heartbeat


def start_controller(
    stage: Stage, telemetry_s: int = TELEMETRY_S, ports: Mapping[str, int] | None = None
) -> Client:
    """`shoal up` on free ports; returns a client once it answers."""
    given = ports or {}
    log = stage.root / "logs" / "controller.log"
    already = len(log.read_text()) if log.exists() else 0
    process = stage.start(
        "controller",
        [
            *(*SHOAL, "up", "--json"),
            *("--http-port", str(given.get("http", 0))),
            *("--enrolment-port", str(given.get("enrolment", 0))),
            *("--agents-port", str(given.get("agents", 0))),
        ],
        {"SHOAL_TELEMETRY_SECONDS": str(telemetry_s), "SHOAL_HEARTBEAT_SECONDS": str(HEARTBEAT_S)},
    )

    def answering() -> Client | None:
        with contextlib.suppress(OSError, ValueError, StopIteration, KeyError):
            # Printed when the doors are open. The log may hold the line of a controller before.
            lines = process.log.read_text()[already:].splitlines()
            return Client(json.loads(next(line for line in lines if line.startswith("{")))["url"])
        return None

    return stage.wait("the controller starts", answering, UP_S, explain=process.tail)


def make_token(stage: Stage) -> Path:
    """A join token in a file, good for exactly these agents."""
    path = stage.root / "join-token"
    uses = str(len(AGENTS))
    stage.shoal(
        "a join token is made", "token", "create", "--join", "--uses", uses, "--ttl", "1h", "--out", str(path)
    )
    return path


def through_relay(stage: Stage, token: Path) -> tuple[Relay, Path]:
    """A token for a device that reaches the controller through a relay: same fleet, same secret, same CA,
    another address of the agents' door."""
    known = tokens.decode(token.read_text())
    relay = Relay(known.agent_addresses[0])
    changed = tokens.JoinToken(
        fleet=known.fleet,
        enrolment_addresses=known.enrolment_addresses,
        agent_addresses=(relay.address,),
        secret=known.secret,
        ca_der=known.ca_der,
    )
    path = stage.root / "join-token-relay"
    write_secret(path, tokens.encode(changed))
    return relay, path


def join(stage: Stage, name: str, runtimes: str, token: Path) -> dict[str, str]:
    """`shoal-agent join`; returns the settings that the agent also runs with."""
    settings = {
        "SHOAL_AGENT_DIR": str(stage.root / "agents" / name),
        "SHOAL_AGENT_RUNTIMES": runtimes,
        "SHOAL_AGENT_HTTP_PORT": "0",
        "SHOAL_AGENT_GRPC_PORT": "0",
        "SHOAL_AGENT_METRICS_PORT": "0",
    }
    (stage.root / "agents").mkdir(exist_ok=True)
    stage.run(
        f"{name} joins",
        [*AGENT, "join", "--service", "none", "--token-file", str(token), "--name", name],
        JOIN_S,
        settings,
    )
    return settings


def start_agent(stage: Stage, client: Client, name: str, settings: Mapping[str, str]) -> Agent:
    """`shoal-agent run`; waits until the controller accepted its first heartbeat."""
    process = stage.start(name, [*AGENT, "run"], settings)

    def heard() -> Agent | None:
        device = client.device(name)
        ports = device.profile.get("ports") or {}
        if device.last_seen_ms < process.started_ms or device.status == "offline" or not ports.get("http"):
            return None
        return Agent(
            name=name,
            device=device.id,
            profile_class=device.profile_class,
            directory=Path(settings["SHOAL_AGENT_DIR"]),
            process=process,
            address=f"{ports.get('host') or '127.0.0.1'}:{ports['http']}",
            start_s=(device.last_seen_ms - process.started_ms) / 1000,
        )

    return stage.wait(f"{name} is heard", heard, HEARD_S, 0.1, explain=process.tail)


def supervisor_rss_mb(agent: Agent) -> float:
    """Resident memory of the supervisor in MB (10^6 bytes), as the kernel counts it."""
    for line in Path(f"/proc/{agent.process.popen.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise BrokenPromise("an agent's memory is known", f"{agent.name} has no VmRSS.")
