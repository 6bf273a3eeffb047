"""`Blobs` on the mutual-TLS door: a device fetches what its desired state names and pushes its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, BinaryIO

from sqlalchemy.orm import Session

from shoal_controller.services import Services
from shoal_controller.store.tables import Desired
from shoal_protos.bundle import check_digest
from shoal_protos.errors import Denied, InvalidInput, NotFound, ShoalError
from shoal_protos.v1 import blobs_pb2, blobs_pb2_grpc, desired_pb2

if TYPE_CHECKING:
    from shoal_controller.gateway.admission import Admission

CHUNK = 256 << 10
PURPOSES = frozenset({"samples", "outputs", "logs"})
LEASE_SECONDS = 7 * 86400  # of a pushed blob, until a sample or trial row refers to it


class BlobsServicer(blobs_pb2_grpc.BlobsServicer):
    """Ranged reading, resumable writing; the digest comes first and is checked last."""

    def __init__(self, services: Services, admission: Admission) -> None:
        self._services = services
        self._admission = admission
        # device -> (epoch, generation) and what that state lets it read
        self._readable: dict[str, tuple[tuple[int, int], frozenset[str]]] = {}

    # ------------------------------------------------------------------ fetch

    async def Fetch(  # noqa: N802
        self, request: blobs_pb2.FetchRequest, context: Any
    ) -> AsyncIterator[blobs_pb2.Chunk]:
        digest = check_digest(request.digest)
        device = self._admission.peer(context).device
        if digest not in await asyncio.to_thread(self._allowed, device):
            raise Denied(
                f"The blob {digest[:19]} is not part of this device's desired state.",
                "Take the newest desired state first.",
            )
        stream = await asyncio.to_thread(self._services.blobs.open, digest)
        try:
            async for chunk in _chunks(stream, request.offset, request.length):
                yield chunk
        finally:
            stream.close()

    def _allowed(self, device: str) -> frozenset[str]:
        with self._services.store.read() as session:
            row = session.get(Desired, device)
        if row is None:
            return frozenset()
        stamp = (row.epoch, row.generation)
        known = self._readable.get(device)
        if known is not None and known[0] == stamp:
            return known[1]
        allowed, whole = self._readable_by(desired_pb2.Signed.FromString(row.signed).payload)
        if whole:
            self._readable[device] = (stamp, allowed)
        return allowed

    def _readable_by(self, payload: bytes) -> tuple[frozenset[str], bool]:
        """(digests a state lets its device read, whether every bundle could be looked into)."""
        state = desired_pb2.DesiredState.FromString(payload)
        bundles = {placement.bundle for placement in state.placements} | set(state.keep)
        for trial in state.trials:
            bundles |= {trial.bundle, trial.incumbent}
        allowed = {trial.dataset for trial in state.trials if trial.dataset}
        whole = True
        for bundle in bundles - {""}:
            allowed.add(bundle)
            blobs = self._bundle_blobs(bundle)
            whole = whole and blobs is not None
            allowed.update(blobs or ())
        return frozenset(allowed), whole

    def _bundle_blobs(self, digest: str) -> list[str] | None:
        try:
            return self._services.blobs.bundle_blobs(digest)
        except ShoalError:
            return None

    # ------------------------------------------------------------------ push

    async def Stat(self, request: blobs_pb2.StatRequest, context: Any) -> blobs_pb2.StatReply:  # noqa: N802
        device = self._admission.peer(context).device
        return await asyncio.to_thread(self._stat, device, check_digest(request.digest))

    def _stat(self, device: str, digest: str) -> blobs_pb2.StatReply:
        received, complete = self._services.blobs.received(device, digest)
        return blobs_pb2.StatReply(digest=digest, received=received, complete=complete)

    async def Push(  # noqa: N802
        self, requests: AsyncIterator[blobs_pb2.PushRequest], context: Any
    ) -> blobs_pb2.StatReply:
        device = self._admission.peer(context).device
        messages = aiter(requests)
        first = await anext(messages, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidInput("A push begins with its header.")
        header = first.header
        await asyncio.to_thread(self._check_push, device, header)
        blobs = self._services.blobs
        if blobs.exists(header.digest):
            return await asyncio.to_thread(self._stat, device, header.digest)
        offset = header.offset
        async for message in messages:
            if message.WhichOneof("part") != "data":
                raise InvalidInput("After a push's header comes only data.")
            offset = await asyncio.to_thread(
                blobs.append, device, header.digest, offset, message.data, header.size
            )
        if offset == header.size:
            await self._finish(device, header)
        return await asyncio.to_thread(self._stat, device, header.digest)

    def _check_push(self, device: str, header: blobs_pb2.PushHeader) -> None:
        """Everything that can be refused before the first byte."""
        check_digest(header.digest)
        limit = self._services.settings.max_blob_bytes
        if header.purpose not in PURPOSES:
            raise InvalidInput(f"Devices push {', '.join(sorted(PURPOSES))}, not '{header.purpose[:40]}'.")
        if not 0 < header.size <= limit:
            raise InvalidInput(
                f"A blob of {header.size} bytes is out of range, the limit is {limit}.", "Send smaller parts."
            )
        received, complete = self._services.blobs.received(device, header.digest)
        if complete:
            return
        if header.offset != received:
            raise InvalidInput(f"The push continues at byte {received}.", "Ask Stat where it is.")
        with self._services.store.read() as session:
            self._services.blobs.check_quota(
                session, device, header.size - received, self._services.settings.device_quota_bytes
            )

    async def _finish(self, device: str, header: blobs_pb2.PushHeader) -> None:
        blobs = self._services.blobs
        await asyncio.to_thread(blobs.finish, device, header.digest, header.size)

        def adopt(session: Session) -> None:
            blobs.adopt(
                session,
                header.digest,
                header.size,
                purpose=header.purpose,
                owner=device,
                lease_seconds=LEASE_SECONDS,
            )

        await self._services.store.submit(adopt)


async def _chunks(stream: BinaryIO, offset: int, length: int) -> AsyncIterator[blobs_pb2.Chunk]:
    total = await asyncio.to_thread(stream.seek, 0, 2)
    if offset > total:
        raise NotFound(f"The blob has {total} bytes; nothing begins at {offset}.")
    end = total if length == 0 else min(total, offset + length)
    await asyncio.to_thread(stream.seek, offset)
    if total == 0:
        yield blobs_pb2.Chunk(offset=0, data=b"", total=0)
    while offset < end:
        data = await asyncio.to_thread(stream.read, min(CHUNK, end - offset))
        if not data:
            return
        yield blobs_pb2.Chunk(offset=offset, data=data, total=total)
        offset += len(data)
