from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_agent.telemetry import spool as spools
from shoal_agent.telemetry.spool import Spool
from shoal_protos.v1 import agents_pb2, telemetry_pb2
from tests.agent.fakes import FakeClock, FullFs


def make(directory: Path, **more: Any) -> Spool:
    return Spool(directory, **{"fs": FullFs(), "clock": FakeClock(), **more})


def result(name: str, size: int = 0) -> telemetry_pb2.TrialResult:
    return telemetry_pb2.TrialResult(trial=name, error="x" * size)


async def drain(spool: Spool, limit: int = 1000) -> list[agents_pb2.Spooled]:
    """Everything that would be sent now."""
    got: list[agents_pb2.Spooled] = []
    with contextlib.suppress(asyncio.TimeoutError):
        while len(got) < limit:
            got.append(await asyncio.wait_for(spool.next(), 0.02))
    return got


def ack(message: agents_pb2.Spooled) -> agents_pb2.Ack:
    last = message.gap.to_sequence if message.WhichOneof("item") == "gap" else message.sequence
    return agents_pb2.Ack(spool_id=message.spool_id, through=last)


async def test_in_order_until_acknowledged_also_over_restarts(tmp_path: Path) -> None:
    spool = make(tmp_path)
    for number in range(3):
        assert spool.add(result(f"a{number}"))
    sent = await drain(spool)
    assert [item.trial.trial for item in sent] == ["a0", "a1", "a2"]
    assert [item.sequence for item in sent] == [1, 2, 3]
    spool.acknowledge(ack(sent[0]))
    spool.rewind()
    assert [item.trial.trial for item in await drain(spool)] == ["a1", "a2"]

    again = make(tmp_path)  # killed and started anew
    again.add(result("b0"))
    later = await drain(again)
    assert [item.trial.trial for item in later] == ["a1", "a2", "b0"]
    assert later[0].spool_id == sent[0].spool_id != later[2].spool_id  # a file has its own id
    assert later[2].sequence == 1
    for item in later:
        again.acknowledge(ack(item))
    assert again.waiting == 0
    assert await drain(again) == []
    assert await drain(make(tmp_path)) == []


async def test_torn_tail_costs_only_the_torn_message(tmp_path: Path) -> None:
    spool = make(tmp_path)
    spool.add(result("whole"))
    spool.add(result("torn"))
    (file,) = tmp_path.glob("*.spool")
    os.truncate(file, file.stat().st_size - 3)
    again = make(tmp_path)
    again.add(result("new"))
    assert [item.trial.trial for item in await drain(again)] == ["whole", "new"]


@settings(max_examples=60, deadline=None)
@given(
    cut=st.integers(0, 400), flips=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 255)), max_size=3)
)
def test_any_damage_is_survived_and_nothing_wrong_is_sent(
    tmp_path_factory: Any, cut: int, flips: list[tuple[int, int]]
) -> None:
    directory = tmp_path_factory.mktemp("spool")
    spool = make(directory)
    names = [f"r{number}" for number in range(5)]
    for name in names:
        spool.add(result(name, 40))
    (file,) = directory.glob("*.spool")
    data = bytearray(file.read_bytes())
    for position, value in flips:
        data[position % len(data)] ^= value
    file.write_bytes(data[: max(0, len(data) - cut)])
    sent = asyncio.run(drain(make(directory)))
    assert [item.trial.trial for item in sent] == names[: len(sent)]


async def test_full_spool_drops_the_oldest_and_tells_the_gap(tmp_path: Path) -> None:
    spool = make(tmp_path, max_bytes=40_000)
    for number in range(100):
        spool.add(result(f"r{number}", 1000))
    assert spool.size <= 41_000
    sent: list[agents_pb2.Spooled] = []
    spool = make(tmp_path, max_bytes=40_000)  # gaps survive a restart
    while batch := await drain(spool):
        sent += batch
        for item in batch:
            spool.acknowledge(ack(item))
    gaps = [item for item in sent if item.WhichOneof("item") == "gap"]
    kept = [item for item in sent if item.WhichOneof("item") == "trial"]
    assert gaps and all(item.sequence == item.gap.from_sequence for item in gaps)
    dropped = sum(item.gap.to_sequence - item.gap.from_sequence + 1 for item in gaps)
    assert dropped + len(kept) == 100
    assert [item.trial.trial for item in kept] == [f"r{number}" for number in range(dropped, 100)]
    assert gaps[0].gap.reason == "spool full"
    assert await drain(make(tmp_path)) == []


async def test_disk_full_is_survived_and_told(tmp_path: Path) -> None:
    fs = FullFs()
    spool = make(tmp_path, fs=fs)
    spool.add(result("before"))
    fs.broken = OSError(errno.ENOSPC, "No space left on device")
    assert spool.add(result("lost")) is False
    fs.broken = None
    assert spool.add(result("after"))
    sent = await drain(spool)
    assert [item.WhichOneof("item") for item in sent] == ["trial", "gap", "trial"]
    assert sent[1].gap.reason == "disk full: 1 messages lost"
    assert sent[1].sequence == sent[1].gap.from_sequence == sent[1].gap.to_sequence


async def test_window_bounds_what_is_unacknowledged(tmp_path: Path) -> None:
    spool = make(tmp_path)
    for number in range(spools.WINDOW + 10):
        spool.add(result(str(number)))
    first = await drain(spool)
    assert len(first) == spools.WINDOW
    spool.acknowledge(ack(first[9]))
    assert len(await drain(spool)) == 10


async def test_next_wakes_up_when_something_is_added(tmp_path: Path) -> None:
    spool = make(tmp_path)
    waiting = asyncio.ensure_future(spool.next())
    await asyncio.sleep(0)
    spool.add(telemetry_pb2.SampleNotice(endpoint="e"))
    assert (await waiting).sample.endpoint == "e"


@pytest.mark.parametrize("through", [0, 99])
async def test_strange_acknowledgements_are_harmless(tmp_path: Path, through: int) -> None:
    spool = make(tmp_path)
    spool.add(result("a"))
    spool.acknowledge(agents_pb2.Ack(spool_id="unknown", through=through))
    assert spool.waiting == 1
    spool.acknowledge(agents_pb2.Ack(spool_id=(await drain(spool))[0].spool_id, through=99))
    assert spool.waiting == 0
    spool.add(result("b"))
    assert [item.trial.trial for item in await drain(spool)] == ["b"]
