from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from shoal_agent.fs import RealFs
from shoal_agent.link.base import Content
from shoal_agent.samples import SampleSender
from shoal_agent.telemetry.spool import Spool
from shoal_protos.bundle import digest_of
from shoal_protos.errors import Overloaded, ShoalError, Unavailable
from tests.agent.fakes import FakeClock


class Rig:
    """A sender over a server that sampled `new` and a link that may be away."""

    def __init__(self, folder: Path, max_bytes: int = 10_000) -> None:
        self.directory = folder / "samples"
        self.new: list[str] = []
        self.pushed: list[str] = []
        self.problem: ShoalError | None = None
        self.spool = Spool(folder, fs=RealFs(), clock=FakeClock())
        self.sender = SampleSender(
            self.directory,
            take=self.take,
            push=self.push,
            spool=self.spool,
            clock=FakeClock(),
            max_bytes=max_bytes,
        )

    async def take(self, directory: Path) -> list[dict[str, Any]]:
        items = []
        for name in self.new:
            path = directory / f"{name}.npz"
            path.write_bytes(name.encode() * 100)
            items.append({"endpoint": name, "bundle": "b", "path": str(path), "count": 3, "labelled": 1})
        self.new = []
        return items

    async def push(self, content: Content, purpose: str) -> None:
        if self.problem is not None:
            raise self.problem
        assert purpose == "samples"
        self.pushed.append(content.digest)

    async def run(self, seconds: float = 0.05) -> None:
        task = asyncio.ensure_future(self.sender.run())
        await asyncio.sleep(seconds)
        task.cancel()

    def left(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())


async def test_sent_noticed_and_removed(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.new = ["a"]
    await rig.sender.collect()
    await rig.run()
    assert rig.pushed == [digest_of(b"a" * 100)] and rig.left() == []
    notice = (await rig.spool.next()).sample
    assert (notice.endpoint, notice.blob, notice.size, notice.count, notice.labelled) == (
        "a", rig.pushed[0], 100, 3, 1,
    )  # fmt: skip


@pytest.mark.parametrize("problem", [Unavailable("offline"), Overloaded("quota")])
async def test_waits_while_it_cannot_be_sent_also_over_restarts(tmp_path: Path, problem: ShoalError) -> None:
    rig = Rig(tmp_path)
    rig.problem, rig.new = problem, ["a", "b"]
    await rig.sender.collect()
    await rig.run()
    assert rig.left() == ["a.json", "a.npz", "b.json", "b.npz"]
    (rig.directory / "torn.npz").write_bytes(b"half")  # was being written when all died
    again = Rig(tmp_path)
    await again.run()
    assert len(again.pushed) == 2 and again.left() == []


async def test_bounded_oldest_first(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_bytes=250)
    rig.problem = Unavailable("offline")
    for name in ("a", "b", "c"):
        rig.new = [name]
        await rig.sender.collect()
        await asyncio.sleep(0.01)
    assert rig.left() == ["b.json", "b.npz", "c.json", "c.npz"]


async def test_refused_or_strange_samples_are_given_up(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.problem, rig.new = ShoalError("no"), ["a"]
    await rig.sender.collect()
    rig.sender._note({"path": "/etc/passwd"})
    rig.sender._note({})
    await rig.run()
    assert rig.left() == [] and rig.pushed == []
