from __future__ import annotations

import threading
import time

import pytest

from shoal_agent.serving.workers import Workers


def test_one_thread_does_what_comes_one_by_one() -> None:
    workers = Workers(4)
    seen: list[int] = []
    for _ in range(50):
        done = threading.Event()

        def work(done: threading.Event = done) -> None:
            seen.append(threading.get_ident())
            done.set()

        workers.submit(work)
        assert done.wait(10)
        while len(workers._idle) == 0:  # the thread says so a moment later
            time.sleep(0.0005)
    workers.shutdown(wait=True)
    assert len(seen) == 50 and len(set(seen)) == 1


def test_no_more_threads_than_allowed() -> None:
    workers = Workers(2)
    gate, both = threading.Event(), threading.Barrier(3, timeout=10)
    finished: list[int] = []

    def first() -> None:
        both.wait()
        gate.wait(10)

    for _ in range(2):
        workers.submit(first)
    for number in range(5):
        workers.submit(lambda number=number: finished.append(number))  # type: ignore[misc]
    both.wait()
    assert finished == []
    gate.set()
    workers.shutdown(wait=True)  # what was taken is still done
    assert sorted(finished) == [0, 1, 2, 3, 4]


def test_a_defect_ends_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    workers = Workers(1)
    done = threading.Event()
    workers.submit(lambda: 1 / 0)
    workers.submit(done.set)
    assert done.wait(10)
    workers.shutdown(wait=True)
    assert "defect" in caplog.text


def test_nothing_after_the_end() -> None:
    workers = Workers(1)
    workers.shutdown()
    with pytest.raises(RuntimeError):
        workers.submit(print)
