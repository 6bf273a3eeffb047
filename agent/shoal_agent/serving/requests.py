"""One inference request over HTTP, from body to reply: what the fast path and the ASGI path share."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from shoal_agent.runtimes.tensors import Array
from shoal_agent.serving.batching import Outputs
from shoal_agent.serving.dataplane import DataPlane
from shoal_agent.serving.errors import RETRY_AFTER_S, as_shoal, http_body, http_status
from shoal_agent.serving.peers import Peer
from shoal_agent.serving.wire import Plan
from shoal_protos.errors import InvalidInput, ShoalError, Unsupported

log = logging.getLogger("shoal.serving")

JSON = (b"content-type", b"application/json")
BINARY = (b"content-type", b"application/octet-stream")
HEADER_LENGTH = b"inference-header-content-length"
_RETRY = (b"retry-after", str(RETRY_AFTER_S).encode())


class Reply(NamedTuple):
    """Status, headers without content-length, body in pieces."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: list[bytes]


def error_reply(error: BaseException) -> Reply:
    known = as_shoal(error)
    if known is not error:
        log.error("A request failed.", exc_info=error)
    status = http_status(known)
    return Reply(status, (JSON, _RETRY) if status == 503 else (JSON,), [http_body(known)])


def json_reply(text: bytes, status: int = 200) -> Reply:
    return Reply(status, (JSON,), [text])


def infer(
    plane: DataPlane,
    name: str,
    version: str,
    header_length: bytes | None,
    body: bytes,
    reply: Callable[[Reply], None],
    peer: Peer,
) -> None:
    """Answers one infer request; `reply` is called exactly once, now or later, in the event loop."""
    started = time.perf_counter_ns()
    try:
        loaded = plane.find(name, version)
        try:
            parsed = loaded.codec.parse(body, None if header_length is None else _length(header_length))
        except (InvalidInput, Unsupported):
            loaded.observer.invalid()
            raise
    except Exception as error:
        reply(error_reply(error))
        return
    plan, request_id = parsed.plan, parsed.request_id
    codec = loaded.codec
    if plan.shared_inputs:
        try:
            _read_shared(plane, plan, parsed.inputs, peer)
        except ShoalError as error:
            loaded.observer.invalid()
            reply(error_reply(error))
            return

    def answer(outcome: Outputs | ShoalError) -> None:
        if isinstance(outcome, ShoalError):
            reply(error_reply(outcome))
            return
        if plan.shared_outputs:
            try:
                _write_shared(plane, plan, outcome, peer)
            except ShoalError as error:
                reply(error_reply(error))
                return
        size, pieces = codec.answer(plan, request_id, outcome)
        if size is None:
            reply(Reply(200, (JSON,), pieces))
        else:
            reply(Reply(200, (BINARY, (HEADER_LENGTH, b"%d" % size)), pieces))

    try:
        plane.submit(loaded, parsed.inputs, plan.batch, request_id, started, answer)
    except Exception as error:  # a defect of ours; the client must not wait for ever
        reply(error_reply(error))


def _read_shared(plane: DataPlane, plan: Plan, inputs: dict[str, Array], peer: Peer) -> None:
    user = peer.user()
    for part in plan.shared_inputs:
        assert part.span is not None
        inputs[part.spec.name] = plane.regions.read(part.span, part.dtype, part.shape, user)


def _write_shared(plane: DataPlane, plan: Plan, outputs: Outputs, peer: Peer) -> None:
    user = peer.user()
    for wanted in plan.shared_outputs:
        assert wanted.span is not None
        plane.regions.write(wanted.span, outputs[wanted.name], user)


def _length(value: bytes) -> int:
    if not value.isdigit() or len(value) > 12:
        raise InvalidInput("Inference-Header-Content-Length is not a number of bytes.")
    return int(value)
