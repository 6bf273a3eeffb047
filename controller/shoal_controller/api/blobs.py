"""Blobs by digest, whole or by range."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import FileResponse

from shoal_controller.api.deps import ServicesDep

router = APIRouter(tags=["blobs"])


@router.get("/blobs/{digest}", response_class=FileResponse)
def get_blob(digest: str, services: ServicesDep) -> FileResponse:
    """A blob's bytes. It never changes, so it may be cached for ever."""
    return FileResponse(
        services.blobs.path(digest),
        media_type="application/octet-stream",
        headers={
            "Cache-Control": "private, max-age=31536000, immutable",
            "ETag": f'"{digest}"',
            # Devices push some of them: no browser may take one for a page.
            "Content-Disposition": "attachment",
            "Content-Security-Policy": "sandbox",
        },
    )
