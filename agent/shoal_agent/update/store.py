"""Bundles on disk: one OCI image layout for all of them, filled blob by blob from the link.

A blob grows in `partial/` and is resumed at the byte; once whole it is hashed, synced and renamed into
`blobs/`, so what stands there is what its name says. Blobs are shared by all bundles. What no bundle
in use needs is collected.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from shoal_agent.clock import Clock
from shoal_agent.fs import Fs, durable_write
from shoal_agent.link.base import Source
from shoal_protos import bundle as bundles
from shoal_protos.bundle import Bundle, Manifest
from shoal_protos.errors import InvalidInput, Overloaded, ShoalError, TamperedData

log = logging.getLogger(__name__)

RESERVE_BYTES = 16 * 1024 * 1024  # disk that is left for state, spool and logs
Progress = Callable[[int, int], None]  # (bytes of the bundle on disk, bytes of the bundle)


class DiskFull(Overloaded):
    """The bundle does not fit on this device's disk, even with everything unused removed."""

    code = "disk_full"


class Bandwidth:
    """Token bucket over all downloads of this agent."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._rate = 0
        self._free_at_ns = 0

    def set_rate(self, bytes_per_s: int) -> None:
        """0 = no cap."""
        self._rate = bytes_per_s

    async def spend(self, count: int) -> None:
        """Waits until `count` bytes fit under the cap."""
        if not self._rate:
            return
        now = self._clock.monotonic_ns()
        start = max(now, self._free_at_ns)
        self._free_at_ns = start + count * 1_000_000_000 // self._rate
        if start > now:
            await self._clock.sleep((start - now) / 1e9)


class BundleStore:
    """The agent's bundles.

    Args:
        root: the OCI layout's directory.
        on_bytes: told the number of bytes each time something arrives (for `wire_bytes`).
    """

    def __init__(
        self,
        root: Path,
        *,
        fs: Fs,
        bandwidth: Bandwidth | None = None,
        on_bytes: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.root, self._fs = root, fs
        self._bandwidth, self._on_bytes = bandwidth, on_bytes
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._fetching: set[str] = set()  # digests of bundles and blobs under way
        for directory in (root / "partial", root / "blobs" / "sha256"):
            fs.mkdir(directory)
        self._write_index()

    # ------------------------------------------------------------------ fetching

    async def fetch(
        self,
        digest: str,
        source: Source,
        *,
        progress: Progress = lambda have, total: None,
        make_room: Callable[[], int] = lambda: 0,
    ) -> Bundle:
        """Fetches what is missing of a bundle and returns it.

        Args:
            make_room: called when the disk is too full; removes what is unused, returns bytes freed.

        Raises:
            TamperedData: the source sent other bytes than the digest names, twice.
            InvalidInput: what the digest names is not a bundle.
            DiskFull: it does not fit.
            Unavailable, NotFound, Denied: from the source; what has arrived is kept.
        """
        async with self._locks[digest]:
            self._fetching.add(digest)
            try:
                return await self._fetch_bundle(digest, source, progress, make_room)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    self._discard_partials([digest])
                    raise DiskFull("The disk is full.", _FREE_DISK) from error
                raise
            finally:
                self._fetching.discard(digest)

    async def _fetch_bundle(
        self, digest: str, source: Source, progress: Progress, make_room: Callable[[], int]
    ) -> Bundle:
        await self._blob(digest, bundles.MAX_MANIFEST_BYTES, None, source)
        manifest = self.manifest(digest)
        missing = [blob for blob in _blobs(manifest) if not self.has(blob[0], blob[1])]
        self._require_room(sum(size - self._partial_size(name) for name, size in missing), make_room)
        have = manifest.size - sum(size for _, size in missing)
        progress(have, manifest.size)
        for name, size in missing:
            await self._blob(name, size, size, source, _shifted(progress, have, manifest.size))
            have += size
        self._write_index()
        return self.open(digest)

    async def fetch_blob(self, digest: str, source: Source, max_bytes: int) -> Path:
        """Fetches one blob that belongs to no bundle (a trial's data set) and returns its path."""
        async with self._locks[digest]:
            self._fetching.add(digest)
            try:
                await self._blob(digest, max_bytes, None, source)
            finally:
                self._fetching.discard(digest)
        return self.path(digest)

    async def _blob(
        self,
        digest: str,
        limit: int,
        size: int | None,
        source: Source,
        progress: Callable[[int], None] = lambda got: None,
    ) -> None:
        """One blob into `blobs/`. A partial file that was damaged costs one download from zero."""
        if self.has(digest, size):
            return
        resumed = self._partial_size(digest) > 0
        try:
            await self._download(digest, limit, size, source, progress)
        except TamperedData:
            self._fs.unlink(self._partial(digest))
            if not resumed:
                raise
            log.warning("the partial download of %s was damaged; fetching it again", digest[:19])
            await self._download(digest, limit, size, source, progress)

    async def _download(
        self, digest: str, limit: int, size: int | None, source: Source, progress: Callable[[int], None]
    ) -> None:
        partial = self._partial(digest)
        got = self._partial_size(digest)
        if got > limit:
            raise TamperedData(f"The blob {digest[:19]} is longer than its {limit} bytes.")
        if size is None or got < size:
            parts = source.fetch(digest, got)
            async for part in parts:
                if part.offset != got:
                    raise TamperedData(f"The blob {digest[:19]} came out of order.")
                if got + len(part.data) > limit or part.total > limit:
                    raise TamperedData(f"The blob {digest[:19]} is longer than its {limit} bytes.")
                self._fs.append(partial, part.data)
                got += len(part.data)
                self._on_bytes(len(part.data))
                progress(got)
                if self._bandwidth is not None:
                    await self._bandwidth.spend(len(part.data))
        await self._accept(digest, partial)

    async def _accept(self, digest: str, partial: Path) -> None:
        if not partial.exists() and digest == "sha256:" + hashlib.sha256(b"").hexdigest():
            self._fs.append(partial, b"")
        if not partial.exists() or await asyncio.to_thread(bundles.digest_of_file, partial) != digest:
            raise TamperedData(f"The blob {digest[:19]} does not match its digest.")
        self._fs.fsync(partial)
        target = self.path(digest)
        self._fs.replace(partial, target)
        self._fs.fsync_directory(target.parent)

    def _require_room(self, needed: int, make_room: Callable[[], int]) -> None:
        if self._fs.free_bytes(self.root) >= needed + RESERVE_BYTES:
            return
        make_room()
        free = self._fs.free_bytes(self.root)
        if free < needed + RESERVE_BYTES:
            raise DiskFull(
                f"The bundle needs {needed} bytes more, {max(0, free - RESERVE_BYTES)} are free.", _FREE_DISK
            )

    # ------------------------------------------------------------------ reading

    def path(self, digest: str) -> Path:
        return bundles.blob_path(self.root, digest)

    def has(self, digest: str, size: int | None = None) -> bool:
        """Whether a blob is there (and of that size); its bytes were checked when it was stored."""
        path = self.path(digest)
        return path.is_file() and (size is None or path.stat().st_size == size)

    def has_bundle(self, digest: str) -> bool:
        try:
            manifest = self.manifest(digest)
        except ShoalError:
            return False
        return all(self.has(name, size) for name, size in _blobs(manifest))

    def manifest(self, digest: str) -> Manifest:
        """Raises TamperedData if it is not there, InvalidInput if it is no bundle's."""
        try:
            data = self._fs.read(self.path(digest))
        except OSError as error:
            raise TamperedData(f"The bundle {digest[:19]} is not on this device.") from error
        return bundles.parse_manifest(data, digest)

    def open(self, digest: str) -> Bundle:
        """The bundle, unhashed. Raises TamperedData if a blob is missing."""
        return bundles.open_bundle(self.root, digest, verify=False)

    def verify(self, digest: str) -> Bundle:
        """Hashes every blob of a bundle; a damaged one is removed, so that fetching repairs it.

        Raises:
            TamperedData: a blob is missing or altered.
        """
        manifest = self._verified_manifest(digest)
        for name, size in _blobs(manifest):
            if self.has(name, size) and bundles.digest_of_file(self.path(name)) == name:
                continue
            self._fs.unlink(self.path(name))
            raise TamperedData(f"The blob {name[:19]} of bundle {digest[:19]} is damaged on disk.")
        return self.open(digest)

    def _verified_manifest(self, digest: str) -> Manifest:
        try:
            return self.manifest(digest)
        except (TamperedData, InvalidInput):
            self._fs.unlink(self.path(digest))
            raise

    def bundles(self) -> list[str]:
        """Digests of the whole bundles on disk, sorted."""
        found = []
        for path in sorted((self.root / "blobs" / "sha256").iterdir()):
            digest = f"sha256:{path.name}"
            small = path.stat().st_size <= bundles.MAX_MANIFEST_BYTES
            if small and _looks_like_manifest(path) and self.has_bundle(digest):
                found.append(digest)
        return found

    # ------------------------------------------------------------------ room

    def collect(self, keep: Iterable[str]) -> int:
        """Removes every blob and partial download that no kept bundle (or kept blob) needs.

        Args:
            keep: digests of bundles, and of single blobs, that are in use.

        Returns:
            bytes freed.
        """
        wanted = set(keep) | self._fetching
        for digest in list(wanted):
            wanted.update(self._parts_of(digest))
        freed = 0
        for room in (self.root / "blobs" / "sha256", self.root / "partial"):
            for path in room.iterdir():
                if f"sha256:{path.name}" not in wanted:
                    freed += path.stat().st_size
                    self._fs.unlink(path)
        if freed:
            self._write_index()
        return freed

    def _discard_partials(self, digests: Iterable[str]) -> None:
        """Frees what half-finished downloads take: a full disk harms everything else."""
        names = set(digests)
        for digest in list(names):
            names.update(self._parts_of(digest))
        for name in names:
            self._fs.unlink(self._partial(name))

    def _parts_of(self, digest: str) -> list[str]:
        try:
            return [name for name, _ in _blobs(self.manifest(digest))]
        except ShoalError:
            return []  # a single blob, or a bundle whose manifest has not arrived

    def _partial(self, digest: str) -> Path:
        return self.root / "partial" / bundles.check_digest(digest).removeprefix("sha256:")

    def _partial_size(self, digest: str) -> int:
        try:
            return self._partial(digest).stat().st_size
        except FileNotFoundError:
            return 0

    def _write_index(self) -> None:
        """`oci-layout` and `index.json`, for other tools; the agent itself goes by digests."""
        entries = [
            {
                "artifactType": bundles.ARTIFACT_TYPE,
                "digest": digest,
                "mediaType": bundles.MANIFEST_TYPE,
                "size": self.path(digest).stat().st_size,
            }
            for digest in self.bundles()
        ]
        index = {"manifests": entries, "mediaType": bundles.INDEX_TYPE, "schemaVersion": 2}
        layout = self.root / "oci-layout"
        if not layout.exists():
            durable_write(self._fs, layout, bundles.canonical_json({"imageLayoutVersion": "1.0.0"}))
        durable_write(self._fs, self.root / "index.json", bundles.canonical_json(index))


def _shifted(progress: Progress, base: int, total: int) -> Callable[[int], None]:
    return lambda got: progress(base + got, total)


_FREE_DISK = "Free disk space on the device, or release a smaller variant."


def _blobs(manifest: Manifest) -> list[tuple[str, int]]:
    """(digest, size) of everything a manifest names, each once."""
    return list(dict.fromkeys((layer.digest, layer.size) for layer in (manifest.config, *manifest.layers)))


def _looks_like_manifest(path: Path) -> bool:
    with path.open("rb") as stream:
        if stream.read(1) != b"{":
            return False
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(value, dict) and value.get("artifactType") == bundles.ARTIFACT_TYPE
