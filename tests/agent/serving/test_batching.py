from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from shoal_agent.runtimes.base import Instance
from shoal_agent.serving.batching import INLINE_NS, Lane, Speed, measure_speed
from shoal_agent.serving.errors import ModelFailed
from shoal_protos.errors import Overloaded, ShoalError
from tests.agent.serving.fakes import Doubling, Gated

FAST = Speed(10_000, 0.2, 8)
FAST_ALONE = Speed(10_000, 1.0, 8)
SLOW = Speed(INLINE_NS * 10, 0.2, 8)
SLOW_ALONE = Speed(INLINE_NS * 10, float("nan"), 8)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


def lane(instance: Instance, speed: Speed, pool: ThreadPoolExecutor, **more: Any) -> Lane:
    return Lane(instance, speed, asyncio.get_running_loop(), pool, more.pop("workers", 1), **more)


async def ask(target: Lane, *values: float) -> Any:
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def done(outcome: Any, queue_ns: int, compute_ns: int, share: float) -> None:
        assert queue_ns >= 0
        assert compute_ns >= 0
        assert 0 < share <= 1
        future.set_result(outcome)

    target.submit({"x": np.asarray(values)[:, None]}, len(values), done)
    outcome = await future
    return outcome if isinstance(outcome, ShoalError) else outcome["y"].ravel().tolist()


@pytest.mark.parametrize("speed", [FAST, FAST_ALONE, SLOW, SLOW_ALONE])
async def test_each_request_gets_its_own_answer(speed: Speed, pool: ThreadPoolExecutor) -> None:
    target = lane(Doubling(), speed, pool)
    asked = [[float(n + k) for k in range(n % 3 + 1)] for n in range(40)]
    answers = await asyncio.gather(*(ask(target, *values) for values in asked))
    assert answers == [[2 * value for value in values] for values in asked]


async def test_requests_of_one_pass_run_together(pool: ThreadPoolExecutor) -> None:
    instance = Doubling()
    target = lane(instance, FAST, pool)
    await asyncio.gather(*(ask(target, float(n)) for n in range(20)))
    assert instance.batches == [16, 4]


async def test_a_batch_forms_while_another_runs(pool: ThreadPoolExecutor) -> None:
    gate = Gated(Doubling())
    target = lane(gate, SLOW, pool)
    asked = [asyncio.ensure_future(ask(target, float(n))) for n in range(9)]
    await asyncio.get_running_loop().run_in_executor(None, gate.entered.wait)
    gate.gate.set()
    await asyncio.gather(*asked)
    assert gate.batches == [1, 8]


@pytest.mark.parametrize("speed", [FAST_ALONE, SLOW_ALONE])
async def test_models_that_gain_nothing_are_not_batched(speed: Speed, pool: ThreadPoolExecutor) -> None:
    instance = Doubling()
    target = lane(instance, speed, pool)
    await asyncio.gather(*(ask(target, float(n)) for n in range(5)))
    assert instance.batches == [1] * 5


@pytest.mark.parametrize("speed", [FAST, SLOW])
async def test_a_bad_request_fails_alone(speed: Speed, pool: ThreadPoolExecutor) -> None:
    target = lane(Doubling(), speed, pool)
    answers = await asyncio.gather(*(ask(target, float(n)) for n in (1, -1, 2)))
    assert answers[0] == [2.0]
    assert isinstance(answers[1], ModelFailed)
    assert answers[2] == [4.0]


async def test_different_shapes_do_not_meet(pool: ThreadPoolExecutor) -> None:
    instance = Doubling()
    target = lane(instance, FAST, pool)
    done: list[Any] = []
    for width in (1, 1, 2, 1):
        target.submit({"x": np.ones((1, width))}, 1, lambda *outcome: done.append(outcome))
    while len(done) < 4:
        await asyncio.sleep(0)
    assert instance.batches == [2, 1, 1]


@pytest.mark.parametrize("speed", [FAST, SLOW, SLOW_ALONE])
async def test_a_full_queue_refuses(speed: Speed, pool: ThreadPoolExecutor) -> None:
    gate = Gated(Doubling())
    gate.gate.set()
    target = lane(gate, speed, pool, max_queue=3)
    asked = [asyncio.ensure_future(ask(target, float(n))) for n in range(12)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    refused = [answer for answer in answers if isinstance(answer, Overloaded)]
    assert refused
    assert len(refused) + sum(isinstance(answer, list) for answer in answers) == 12
    assert target.queued == 0
    assert await ask(target, 5.0) == [10.0]  # and goes on


async def test_a_stopped_pool_answers_with_an_error() -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    assert "stopping" in str(await ask(lane(Doubling(), SLOW, pool), 1.0))


def test_speed_decides() -> None:
    assert FAST.inline
    assert FAST.max_batch == 16
    assert not SLOW.inline
    assert Speed(10_000, float("nan"), 8).max_batch == 1
    assert Speed(10_000, 0.2, 1 << 20).max_batch == 4  # bytes of a batch are bounded


def test_measuring_finds_whether_a_batch_helps() -> None:
    speed = measure_speed(Doubling(), [{"x": np.ones((1, 1))}], batches=True)
    assert speed.inline
    assert speed.max_batch == 16
    assert measure_speed(Doubling(), [{"x": np.ones((1, 1))}], batches=False).max_batch == 1
