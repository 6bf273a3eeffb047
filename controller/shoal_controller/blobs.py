"""Everything content-addressed, as one OCI image layout on disk: `blobs/sha256/<hex>`.

`open_bundle(blobs.root, digest)` works on it. A blob is on disk before its row is written; it lives
while a row refers to it or its lease holds, and the sweep removes the rest. What a device pushes
waits in `partial/` under the device's name until it is whole and its digest is right.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shoal_agent.fs import RealFs
from shoal_controller.clock import Clock, now_ms
from shoal_controller.store.tables import Blob, Optimization, Sample, Trial, Variant, Version
from shoal_protos.bundle import (
    MAX_MANIFEST_BYTES,
    Bundle,
    blob_path,
    check_digest,
    open_bundle,
    parse_manifest,
    write_index,
)
from shoal_protos.errors import InvalidInput, NotFound, Overloaded, ShoalError, TamperedData

CHUNK = 1 << 20
DEFAULT_LEASE_SECONDS = 86400


class BlobStore:
    """A directory of blobs; the rows about them are in the database."""

    def __init__(
        self, root: Path, *, clock: Clock = now_ms, lease_seconds: int = DEFAULT_LEASE_SECONDS
    ) -> None:
        self.root = root
        self.clock = clock
        self.lease_seconds = lease_seconds
        for room in (root / "blobs" / "sha256", root / "partial"):
            room.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (root / "oci-layout").exists():
            write_index(root, [])

    # ------------------------------------------------------------------ reading

    def path(self, digest: str) -> Path:
        """Where the blob is. Raises NotFound, or InvalidInput for what is no digest."""
        path = blob_path(self.root, digest)
        if not path.is_file():
            raise NotFound(f"There is no blob {digest[:19]}.")
        return path

    def exists(self, digest: str) -> bool:
        return blob_path(self.root, digest).is_file()

    def open(self, digest: str) -> BinaryIO:
        """Opens a blob for reading. Raises NotFound."""
        return self.path(digest).open("rb")

    def read(self, digest: str, limit: int = 64 << 20) -> bytes:
        """A small blob's bytes. Raises NotFound, or InvalidInput if it is above `limit` bytes."""
        path = self.path(digest)
        if path.stat().st_size > limit:
            raise InvalidInput(f"The blob {digest[:19]} is larger than {limit} bytes.")
        return path.read_bytes()

    def bundle(self, digest: str) -> Bundle:
        """Opens a bundle that was put here; its blobs were verified when they came."""
        return open_bundle(self.root, digest, verify=False)

    def bundle_blobs(self, digest: str) -> list[str]:
        """Digests that a device fetches for this bundle: manifest, config, layers.

        Raises:
            NotFound, InvalidInput, TamperedData: no such bundle, or not a bundle.
        """
        manifest = parse_manifest(self.read(digest, MAX_MANIFEST_BYTES), digest)
        return [digest, manifest.config.digest, *(layer.digest for layer in manifest.layers)]

    # ------------------------------------------------------------------ writing

    def put(
        self,
        session: Session,
        source: bytes | Path | BinaryIO,
        *,
        purpose: str,
        owner: str = "",
        lease_seconds: int | None = None,
    ) -> str:
        """Stores bytes, a file or a stream and leases it; returns its digest. Idempotent."""
        digest, size = self.store(source)
        self.adopt(session, digest, size, purpose=purpose, owner=owner, lease_seconds=lease_seconds)
        return digest

    def store(self, source: bytes | Path | BinaryIO) -> tuple[str, int]:
        """The slow half of `put`, without a transaction: durable on disk, no row yet."""
        descriptor, name = tempfile.mkstemp(dir=self.root / "partial", prefix="put-")
        state, size = hashlib.sha256(), 0
        try:
            with os.fdopen(descriptor, "wb") as target:
                for chunk in _chunks(source):
                    state.update(chunk)
                    size += len(chunk)
                    target.write(chunk)
                _sync(target)
            digest = "sha256:" + state.hexdigest()
            self._place(Path(name), digest)
        finally:
            Path(name).unlink(missing_ok=True)
        return digest, size

    def adopt(
        self,
        session: Session,
        digest: str,
        size: int,
        *,
        purpose: str,
        owner: str = "",
        lease_seconds: int | None = None,
    ) -> None:
        """The quick half of `put`: the row and its lease."""
        until = self.clock() + 1000 * (self.lease_seconds if lease_seconds is None else lease_seconds)
        row = session.get(Blob, digest)
        if row is None:
            session.add(
                Blob(
                    digest=digest,
                    size=size,
                    purpose=purpose,
                    owner=owner,
                    created_ms=self.clock(),
                    lease_until_ms=until,
                )
            )
            session.flush()
        else:
            row.lease_until_ms = max(row.lease_until_ms, until)

    def put_bundle(self, session: Session, layout: Path, digest: str) -> Bundle:
        """Copies a verified bundle from a layout into this one.

        Raises:
            InvalidInput, TamperedData, Unsupported: see shoal_protos.bundle.open_bundle.
        """
        bundle = open_bundle(layout, digest)
        for name in (bundle.manifest.config.digest, *(layer.digest for layer in bundle.manifest.layers)):
            self.put(session, blob_path(layout, name), purpose="bundle")
        # The manifest last: whoever finds it finds everything.
        self.put(session, blob_path(layout, digest), purpose="bundle")
        return self.bundle(digest)

    def lease(self, session: Session, digest: str, seconds: int | None = None) -> None:
        """Keeps a blob alive for a while without a row that refers to it. Raises NotFound."""
        self.adopt(session, digest, self.path(digest).stat().st_size, purpose="", lease_seconds=seconds)

    def _place(self, temporary: Path, digest: str) -> None:
        target = blob_path(self.root, digest)
        if not target.exists():
            temporary.replace(target)
            RealFs().fsync_directory(target.parent)

    # ------------------------------------------------------------------ what devices push

    def partial(self, device: str, digest: str) -> Path:
        """The unfinished file of one device's push."""
        return self.root / "partial" / device / check_digest(digest).removeprefix("sha256:")

    def received(self, device: str, digest: str) -> tuple[int, bool]:
        """Bytes that are here already, and whether the blob is whole."""
        if self.exists(digest):
            return blob_path(self.root, digest).stat().st_size, True
        partial = self.partial(device, digest)
        return (partial.stat().st_size if partial.is_file() else 0), False

    def check_quota(self, session: Session, device: str, size: int, quota: int) -> None:
        """Raises Overloaded if `size` more bytes pass what this device may hold here."""
        used = session.scalar(select(func.sum(Blob.size)).where(Blob.owner == device)) or 0
        room = self.root / "partial" / device
        used += sum(entry.stat().st_size for entry in room.iterdir()) if room.is_dir() else 0
        if used + size > quota:
            raise Overloaded(
                f"The device holds {used} bytes here, {size} more pass its quota of {quota}.",
                "The controller frees the oldest samples; try again later.",
            )

    def append(self, device: str, digest: str, offset: int, data: bytes, limit: int) -> int:
        """Appends to an unfinished push; returns the bytes received so far.

        Raises:
            InvalidInput: `offset` is not where the push stands, or it grows past `limit` bytes.
        """
        partial = self.partial(device, digest)
        partial.parent.mkdir(exist_ok=True, mode=0o700)
        with partial.open("ab") as stream:
            at = stream.tell()
            if at != offset:
                raise InvalidInput(f"The push continues at byte {at}, not {offset}.", "Ask Stat where it is.")
            if at + len(data) > limit:
                raise InvalidInput(f"The push is longer than the {limit} bytes it announced.")
            stream.write(data)
            return at + len(data)

    def finish(self, device: str, digest: str, size: int) -> None:
        """Checks a whole push and makes it a blob on disk.

        Raises:
            TamperedData: the bytes do not match the digest; they are dropped.
        """
        partial = self.partial(device, digest)
        state, received = hashlib.sha256(), 0
        with partial.open("rb+") as stream:
            while chunk := stream.read(CHUNK):
                state.update(chunk)
                received += len(chunk)
            _sync(stream)
        if "sha256:" + state.hexdigest() != digest or received != size:
            partial.unlink(missing_ok=True)
            raise TamperedData(
                f"The pushed bytes do not match {digest[:19]}; they were dropped.", "Push them again from 0."
            )
        self._place(partial, digest)
        partial.unlink(missing_ok=True)

    # ------------------------------------------------------------------ sweeping

    def sweep(self, session: Session) -> list[str]:
        """Removes rows and files that nothing refers to and no lease holds; returns their digests.

        Call it in a write transaction: it deletes rows, and files only of rows that it deletes or
        that never had one for longer than a lease.
        """
        now = self.clock()
        alive = self.references(session)
        gone = [
            row
            for row in session.scalars(select(Blob).where(Blob.lease_until_ms < now))
            if row.digest not in alive
        ]
        for row in gone:
            session.delete(row)
        session.flush()
        removed = [row.digest for row in gone]
        for digest in removed:
            blob_path(self.root, digest).unlink(missing_ok=True)
        self._sweep_files(set(session.scalars(select(Blob.digest))), now)
        return removed

    def references(self, session: Session) -> set[str]:
        """Digests that rows refer to, with everything inside the bundles among them."""
        found: set[str] = set()
        for columns in (
            (Version.source_blob, Version.weights_blob, Version.data_blob),
            (Trial.dataset,),
            (Sample.blob,),
        ):
            for row in session.execute(select(*columns)):
                found.update(value for value in row if value)
        for spec, result in session.execute(select(Optimization.spec, Optimization.result)):
            found.update(_digests((spec, result)))
        bundles = set(session.scalars(select(Variant.bundle))) | set(session.scalars(select(Trial.bundle)))
        for digest in bundles:
            found.add(digest)
            with contextlib.suppress(ShoalError):  # of a bundle that is lost there is nothing to keep
                found.update(self.bundle_blobs(digest))
        return found

    def _sweep_files(self, known: set[str], now: int) -> None:
        oldest = now / 1000 - self.lease_seconds
        for path in (self.root / "blobs" / "sha256").iterdir():
            if f"sha256:{path.name}" not in known and path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)
        for path in (self.root / "partial").iterdir():
            if path.is_dir():
                for part in path.iterdir():
                    if part.stat().st_mtime < oldest:
                        part.unlink(missing_ok=True)
            elif path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)

    def forget_device(self, device: str) -> None:
        """Drops a device's unfinished pushes."""
        shutil.rmtree(self.root / "partial" / device, ignore_errors=True)


def _chunks(source: bytes | Path | BinaryIO) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    stream = source.open("rb") if isinstance(source, Path) else source
    try:
        while chunk := stream.read(CHUNK):
            yield chunk
    finally:
        if isinstance(source, Path):
            stream.close()


def _digests(value: Any) -> set[str]:
    """Every digest inside a JSON value, also those within texts."""
    text = json.dumps(value)
    found = set()
    at = text.find("sha256:")
    while at >= 0:
        candidate = text[at : at + 71]
        with contextlib.suppress(InvalidInput):
            found.add(check_digest(candidate))
        at = text.find("sha256:", at + 7)
    return found


def _sync(stream: BinaryIO | Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
