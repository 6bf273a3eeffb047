"""The real agent against the real controller: join, run, first heartbeat, healthy."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import httpx

from .test_crash import Process


async def run(*arguments: str, state: Path, **options: Any) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "shoal_agent",
        *arguments,
        env={**os.environ, "SHOAL_AGENT_DIR": str(state)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        **options,
    )


async def finished(process: asyncio.subprocess.Process) -> str:
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    return output.decode()


async def test_a_real_agent_joins_and_becomes_healthy(home: Path, tmp_path: Path) -> None:
    controller = Process(home)
    ports = await controller.start()
    state = tmp_path / "agent"
    ports_flags = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports['http']}/api/v1") as api:
        made = (await api.post("/tokens", json={"uses": 1})).json()
        (tmp_path / "token").write_text(made["token"])
        joining = await run(
            "join", "--service", "none", "--token-file", str(tmp_path / "token"), *ports_flags, state=state
        )
        output = await finished(joining)
        assert joining.returncode == 0, output
        agent = await run("run", *ports_flags, state=state)
        try:
            device = await _until_healthy(api, agent)
        finally:
            if agent.returncode is None:
                agent.send_signal(signal.SIGTERM)
            await finished(agent)
        assert device["profile_class"].count("+") >= 1 and device["last_seen_ms"] > 0
        # Its use is spent: another machine is told so, with the remedy.
        other = await run("join", "--token-file", str(tmp_path / "token"), state=tmp_path / "other")
        refusal = await finished(other)
        assert other.returncode == 3 and "used up" in refusal and "shoal token create" in refusal
    assert await controller.end(signal.SIGTERM) == 0


async def _until_healthy(api: httpx.AsyncClient, agent: asyncio.subprocess.Process) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while True:
            assert agent.returncode is None, (await finished(agent))[-2000:]
            (device,) = (await api.get("/devices")).json()["items"]
            if device["status"] == "healthy":
                found: dict[str, Any] = device
                return found
            await asyncio.sleep(0.2)
