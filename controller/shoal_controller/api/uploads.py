"""Resumable uploads, named by the SHA-256 of the whole."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.requests import ClientDisconnect

from shoal_controller.api import schemas
from shoal_controller.api.deps import ServicesDep
from shoal_controller.services import Services
from shoal_controller.uploads import Progress, Uploads
from shoal_protos.bundle import blob_path
from shoal_protos.errors import Unavailable

router = APIRouter(tags=["uploads"])

PIECE = 1 << 18  # written at once
SILENCE_SECONDS = 30.0  # a sender that is silent for so long has to ask again


def uploads_of(services: Services) -> Uploads:
    return Uploads(services.blobs, services.settings.max_upload_bytes)


@router.get("/uploads/{digest}")
def get_upload(digest: str, services: ServicesDep) -> schemas.Upload:
    """How much of an upload is here; 0 for one that nobody began. `size` is 0 until it is whole."""
    found = uploads_of(services).progress(digest)
    return _view(digest, found, found.received if found.complete else 0)


@router.put(
    "/uploads/{digest}",
    openapi_extra={
        "requestBody": {
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
        }
    },
)
async def put_upload(
    digest: str,
    request: Request,
    services: ServicesDep,
    offset: Annotated[int, Query(ge=0)],
    size: Annotated[int, Query(ge=0)],
) -> schemas.Upload:
    """Appends the body at `offset` of a whole of `size` bytes. What is answered is on disk; when the
    last byte came, the whole is hashed and becomes a blob. 409 names the offset to go on from."""
    uploads = uploads_of(services)
    found = await asyncio.to_thread(uploads.begin, digest, offset, size)
    if found.complete:
        await _keep(services, digest)
        return _view(digest, found, found.received)
    try:
        received = await _receive(request, uploads, digest, offset, size)
    finally:
        await asyncio.to_thread(uploads.sync, digest)
    if received < size:
        return _view(digest, Progress(received, False), size)
    await asyncio.to_thread(uploads.finish, digest, size)
    await _keep(services, digest)
    return _view(digest, Progress(size, True), size)


async def _receive(request: Request, uploads: Uploads, digest: str, offset: int, size: int) -> int:
    """Appends the body piece by piece, so that a line that drops loses no more than a piece."""
    pending = bytearray()
    stream = request.stream().__aiter__()
    try:
        while True:
            async with asyncio.timeout(SILENCE_SECONDS):
                chunk = await anext(stream, None)
            if chunk is None:
                break
            pending += chunk
            if len(pending) >= PIECE:
                offset = await asyncio.to_thread(uploads.append, digest, offset, bytes(pending), size)
                pending.clear()
    except (ClientDisconnect, TimeoutError) as error:
        if pending:
            await asyncio.to_thread(uploads.append, digest, offset, bytes(pending), size)
        raise Unavailable("The upload was cut off.", "Run the same command: it goes on there.") from error
    if pending or not size:
        offset = await asyncio.to_thread(uploads.append, digest, offset, bytes(pending), size)
    return offset


async def _keep(services: Services, digest: str) -> None:
    """A row with a lease: the sweep leaves the blob alone until a version refers to it."""
    length = blob_path(services.blobs.root, digest).stat().st_size

    def write() -> None:
        with services.store.write() as session:
            services.blobs.adopt(session, digest, length, purpose="source")

    await asyncio.to_thread(write)


def _view(digest: str, progress: Progress, size: int) -> schemas.Upload:
    return schemas.Upload(digest=digest, received=progress.received, size=size, complete=progress.complete)
