"""Answers what the desired state asks for: logs, a diagnosis, a new profile. One at a time, beside the
supervisor's loop: a diagnosis is made by a child process, so that neither its time nor its imports
are the supervisor's.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable

from shoal_agent import children, logs, reporting
from shoal_agent.config import Config
from shoal_agent.processes import describe, throwaway
from shoal_agent.processor import patience
from shoal_protos.errors import ShoalError, Unavailable
from shoal_protos.v1 import agents_pb2, desired_pb2, profile_pb2

log = logging.getLogger(__name__)

MAX_ANSWER = 64 * 1024  # bytes
DIAGNOSIS_S = 30.0


class Requests:
    """The open requests of the adopted state and their answers.

    Args:
        measure: measures the profile again and lets the controller know of it.
        on_answer: told after each answer.
    """

    def __init__(
        self,
        config: Config,
        *,
        measure: Callable[[], Awaitable[profile_pb2.Profile]],
        on_answer: Callable[[], None],
    ) -> None:
        self._config, self._measure, self._on_answer = config, measure, on_answer
        self._answers: dict[str, agents_pb2.RequestResult] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._one = asyncio.Lock()

    def apply(self, state: desired_pb2.DesiredState, now_ms: int) -> None:
        """Takes up what is asked for and not too late; forgets what is no longer asked for. Idempotent."""
        wanted = {
            item.id: item for item in state.requests if not item.not_after_ms or now_ms <= item.not_after_ms
        }
        self._answers = {key: value for key, value in self._answers.items() if key in wanted}
        for key in set(self._tasks) - set(wanted):
            self._tasks.pop(key).cancel()
        for key, request in wanted.items():
            if key not in self._answers and key not in self._tasks:
                self._tasks[key] = asyncio.ensure_future(self._take(request))

    def answers(self) -> tuple[agents_pb2.RequestResult, ...]:
        return tuple(self._answers.values())

    async def stop(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _take(self, request: desired_pb2.Request) -> None:
        async with self._one:
            try:
                body = await self._body(request.kind)
            except (ShoalError, OSError) as error:
                log.warning("the request %s failed: %s", request.id, error)
                body = await asyncio.to_thread(self._failure, request.kind, str(error))
        self._answers[request.id] = agents_pb2.RequestResult(id=request.id, body=bounded(body))
        self._tasks.pop(request.id, None)
        self._on_answer()

    async def _body(self, kind: int) -> bytes:
        if kind == desired_pb2.REQUEST_KIND_LOGS:
            return await asyncio.to_thread(logs.report, self._config.paths.logs, MAX_ANSWER)
        if kind == desired_pb2.REQUEST_KIND_DIAGNOSE:
            return await self._diagnosis()
        if kind == desired_pb2.REQUEST_KIND_PROFILE:
            return json.dumps(reporting.profile_json(await self._measure())).encode()
        return b"This agent does not know that kind of request; update it."

    async def _diagnosis(self) -> bytes:
        config, limit = self._config, patience(DIAGNOSIS_S)
        command = [
            *children.interpreter(config.child_prefix), "-m", "shoal_agent.diagnosis",
            "--state-dir", str(config.state_dir), "--limit", str(MAX_ANSWER),
        ]  # fmt: skip
        outcome = await throwaway(command, logs.path(config.paths.logs, "probe"), config, timeout_s=limit)
        if outcome.code is None:
            raise Unavailable(f"The diagnosis took longer than {limit:.0f} s.")
        if outcome.code not in (0, 1) or outcome.last_json() is None:
            raise Unavailable(f"The diagnosis failed: {describe(outcome.code)}.")
        return outcome.output.strip()

    def _failure(self, kind: int, problem: str) -> bytes:
        """A failed request brings the last logs by itself, in the form that its kind promises."""
        if kind != desired_pb2.REQUEST_KIND_DIAGNOSE:
            words = f"The request failed: {problem}\n\n".encode()
            return words + logs.report(self._config.paths.logs, MAX_ANSWER - len(words))
        check = {"name": "diagnosis", "state": "failed", "found": problem, "remedy": "See the logs."}
        limit = MAX_ANSWER
        while True:  # in JSON a byte may take six
            limit //= 2
            text = logs.report(self._config.paths.logs, limit).decode(errors="replace")
            body = json.dumps({"checks": [check], "facts": {}, "transitions": [], "logs": text}).encode()
            if len(body) <= MAX_ANSWER:
                return body


def bounded(body: bytes) -> bytes:
    """At most `MAX_ANSWER` bytes of UTF-8: the last ones, as of a log."""
    text = body.decode(errors="replace").encode()[-MAX_ANSWER:]
    return text.decode(errors="ignore").encode()
