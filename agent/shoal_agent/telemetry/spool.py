"""A bounded spool on disk for what the controller must receive: telemetry, trial results, notices, gaps.

Append-only files, each with a random id and its own sequence from 1. A message stays until the
controller acknowledged it after its own commit. Every start opens a new file, so a tail torn by a
power cut can never be confused with what comes after it. When the spool is full its oldest file is
dropped and a `Gap` tells the controller what is missing.

File: magic, 16 bytes of id, then records of `length:u32 crc32:u32 payload`, little-endian, the payload
being a serialized `shoal.v1.Spooled`. A Gap is sent with `sequence = from_sequence` and counts as
everything up to `to_sequence`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import struct
import zlib
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.message import DecodeError

from shoal_agent.clock import Clock
from shoal_agent.fs import Fs
from shoal_protos.errors import InvalidInput
from shoal_protos.v1 import agents_pb2, telemetry_pb2

log = logging.getLogger(__name__)

MAGIC = b"shoal-spool-1\0\0\0"
ID_BYTES = 16
HEADER = len(MAGIC) + ID_BYTES
RECORD = struct.Struct("<II")
MAX_RECORD = 8 * 1024 * 1024  # bytes
FILES_PER_SPOOL = 8  # how finely the bound drops
WINDOW = 64  # unacknowledged messages in flight
SYNC_EVERY_MS = 5_000  # telemetry may lose this much at a power cut; nothing at a kill -9


@dataclass
class _File:
    path: Path
    id: str
    offsets: array[int] = field(default_factory=lambda: array("Q"))  # of record i+1
    size: int = HEADER
    acknowledged: int = 0

    @property
    def last(self) -> int:
        return len(self.offsets)

    @property
    def done(self) -> bool:
        return self.acknowledged >= self.last


@dataclass(frozen=True)
class _Dropped:
    """Messages of a file that no longer exists, still to be told."""

    id: str
    first: int
    last: int
    reason: str


class Spool:
    """Keeps messages in order until they are acknowledged. Implements `link.base.Outbox`.

    Args:
        directory: holds `NUMBER.spool` files; one process at a time.
        max_bytes: bound of all files together.
        new_id: random id of a file; another one only in tests.
    """

    def __init__(
        self,
        directory: Path,
        *,
        fs: Fs,
        clock: Clock,
        max_bytes: int = 64 * 1024 * 1024,
        new_id: Callable[[], bytes] = lambda: secrets.token_bytes(ID_BYTES),
    ) -> None:
        self._directory, self._fs, self._clock = directory, fs, clock
        self._max_bytes = max_bytes
        self._file_bytes = max(4096, max_bytes // FILES_PER_SPOOL)
        self._new_id = new_id
        self._news = asyncio.Event()
        self._cursor: tuple[str, int] | None = None  # last message handed out
        self._in_flight: deque[tuple[str, int]] = deque()  # handed out and not acknowledged
        self._writable = False  # whether the newest file was begun by this process and is whole
        self._synced_ms = 0
        self._unwritten = 0  # messages lost because nothing could be written
        fs.mkdir(directory)
        self._dropped: deque[_Dropped] = deque(self._read_gaps())
        self._files: deque[_File] = deque(self._scan())
        self._number = 1 + max((int(file.path.stem) for file in self._files), default=0)
        self._remove_done()

    # ------------------------------------------------------------------ writing

    def add(
        self,
        item: telemetry_pb2.TelemetryWindow | telemetry_pb2.TrialResult | telemetry_pb2.SampleNotice,
        *,
        sync: bool = False,
    ) -> bool:
        """Appends a message. Returns False if the disk refused it even after dropping older ones;
        the loss is told with the next message that can be written.

        Args:
            sync: on disk before this returns (results that took work to make).
        """
        try:
            if self._unwritten:
                self._append(_gap_item(f"disk full: {self._unwritten} messages lost"), sync)
                self._unwritten = 0
            self._append(_wrap(item), sync)
        except OSError as error:
            self._unwritten += 1
            log.error("the spool cannot be written: %s", error)
            return False
        finally:
            self._news.set()
        return True

    def _append(self, message: agents_pb2.Spooled, sync: bool) -> None:
        while not self._try_append(message, sync):
            pass

    def _try_append(self, message: agents_pb2.Spooled, sync: bool) -> bool:
        """False if the disk refused but an older file could be dropped for it."""
        try:
            self._append_once(message, sync)
        except OSError:
            if not self._drop_oldest("disk full"):
                raise
            return False
        return True

    def _append_once(self, message: agents_pb2.Spooled, sync: bool) -> None:
        file = self._open_file()
        message.spool_id, message.sequence = file.id, file.last + 1
        if message.WhichOneof("item") == "gap":
            message.gap.from_sequence = message.gap.to_sequence = message.sequence
        payload = message.SerializeToString()
        if len(payload) > MAX_RECORD:
            raise InvalidInput(f"A message of {len(payload)} bytes is too large for the spool.")
        record = RECORD.pack(len(payload), zlib.crc32(payload)) + payload
        try:
            self._fs.append(file.path, record)
        except OSError:
            self._writable = False  # half a record may stand at the end: what follows needs a new file
            raise
        file.offsets.append(file.size)
        file.size += len(record)
        self._sync(file, sync)
        while self.size > self._max_bytes and self._drop_oldest("spool full"):
            pass

    def _open_file(self) -> _File:
        if self._files and self._writable and self._files[-1].size < self._file_bytes:
            return self._files[-1]
        identity = self._new_id()
        path = self._directory / f"{self._number:08d}.spool"
        self._fs.write(path, MAGIC + identity)
        self._fs.fsync_directory(self._directory)
        self._number += 1
        self._files.append(_File(path, identity.hex()))
        self._writable = True
        return self._files[-1]

    def _sync(self, file: _File, now: bool) -> None:
        time_ms = self._clock.monotonic_ns() // 1_000_000
        if now or time_ms - self._synced_ms >= SYNC_EVERY_MS:
            self._fs.fsync(file.path)
            self._synced_ms = time_ms

    def _drop_oldest(self, reason: str) -> bool:
        """Removes the oldest file, noting the gap first. False if there is only the newest one."""
        if len(self._files) < 2:
            return False
        file = self._files.popleft()
        if not file.done:
            self._dropped.append(_Dropped(file.id, file.acknowledged + 1, file.last, reason))
            log.warning("spool: dropped %d messages: %s", file.last - file.acknowledged, reason)
            self._write_gaps()
        self._fs.unlink(file.path)
        self._fs.unlink(file.path.with_suffix(".ack"))
        self._news.set()
        return True

    # ------------------------------------------------------------------ sending

    def rewind(self) -> None:
        self._cursor = None
        self._in_flight.clear()
        self._news.set()

    async def next(self) -> agents_pb2.Spooled:
        while True:
            message = self._peek() if len(self._in_flight) < WINDOW else None
            if message is not None:
                return message
            self._news.clear()
            await self._news.wait()

    def _peek(self) -> agents_pb2.Spooled | None:
        """The message after the cursor, which moves to it."""
        order = [(gap.id, gap.first, gap.last) for gap in self._dropped]
        order += [(file.id, file.acknowledged + 1, file.last) for file in self._files]
        start = 0
        if self._cursor is not None:
            ids = [item[0] for item in order]
            # A file that vanished meanwhile was acknowledged whole or became a gap, which is new.
            start = ids.index(self._cursor[0]) if self._cursor[0] in ids else 0
        for identity, first, last in order[start:]:
            sent = self._cursor[1] if self._cursor is not None and self._cursor[0] == identity else 0
            sequence = max(first, sent + 1)
            if sequence > last:
                continue
            message = self._message(identity, sequence)
            through = message.gap.to_sequence if message.WhichOneof("item") == "gap" else sequence
            self._cursor = (identity, through)
            self._in_flight.append(self._cursor)
            return message
        return None

    def _message(self, identity: str, sequence: int) -> agents_pb2.Spooled:
        for gap in self._dropped:
            if gap.id == identity:
                return _gap_message(identity, sequence, gap.last, gap.reason)
        file = next(file for file in self._files if file.id == identity)
        payload = _read_record(file, sequence)
        if payload is None:  # damaged on disk since it was indexed: told, never sent as if whole
            return _gap_message(identity, sequence, sequence, "damaged on disk")
        return agents_pb2.Spooled.FromString(payload)

    def acknowledge(self, ack: agents_pb2.Ack) -> None:
        """Forgets what the controller has committed."""
        self._in_flight = deque(
            (identity, through)
            for identity, through in self._in_flight
            if identity != ack.spool_id or through > ack.through
        )
        before = len(self._dropped)
        self._dropped = deque(
            gap for gap in self._dropped if gap.id != ack.spool_id or ack.through < gap.last
        )
        if len(self._dropped) != before:
            self._write_gaps()
        for file in self._files:
            if file.id == ack.spool_id and ack.through > file.acknowledged:
                file.acknowledged = min(ack.through, file.last)
                self._remember(file)
        self._remove_done()
        self._news.set()

    def _remember(self, file: _File) -> None:
        """Notes the acknowledgement; losing the note only means sending again."""
        try:
            self._fs.write(file.path.with_suffix(".ack"), str(file.acknowledged).encode())
        except OSError as error:
            log.warning("spool: %s", error)

    def _remove_done(self) -> None:
        """Removes acknowledged files; the one being written only once it is long."""
        for file in list(self._files):
            newest = file is self._files[-1] and self._writable
            if file.done and not (newest and file.size < self._file_bytes // 4):
                self._files.remove(file)
                self._writable = self._writable and not newest
                self._fs.unlink(file.path)
                self._fs.unlink(file.path.with_suffix(".ack"))

    # ------------------------------------------------------------------ state

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.size for file in self._files)

    @property
    def waiting(self) -> int:
        """Messages not yet acknowledged."""
        return sum(file.last - file.acknowledged for file in self._files) + len(self._dropped)

    def _scan(self) -> list[_File]:
        files = []
        for path in sorted(self._directory.glob("*.spool")):
            file = _index(path)
            if file is None:
                self._fs.unlink(path)  # died while it was begun; it holds nothing
            else:
                files.append(file)
        return files

    @property
    def _gaps_path(self) -> Path:
        return self._directory / "gaps.json"

    def _read_gaps(self) -> list[_Dropped]:
        try:
            return [_Dropped(**item) for item in json.loads(self._gaps_path.read_bytes())]
        except (OSError, ValueError, TypeError):
            return []

    def _write_gaps(self) -> None:
        temporary = self._gaps_path.with_suffix(".tmp")
        try:
            self._fs.write(temporary, json.dumps([vars(gap) for gap in self._dropped]).encode())
            self._fs.replace(temporary, self._gaps_path)
        except OSError as error:  # a full disk is why we drop; the gap is still told by this process
            log.warning("spool: %s", error)


def _index(path: Path) -> _File | None:
    """Reads a file's record positions up to the first torn or damaged one."""
    data = path.read_bytes()
    if len(data) < HEADER or not data.startswith(MAGIC):
        return None
    file = _File(path, data[len(MAGIC) : HEADER].hex())
    position = HEADER
    while position + RECORD.size <= len(data):
        length, checksum = RECORD.unpack_from(data, position)
        payload = data[position + RECORD.size : position + RECORD.size + length]
        if length > MAX_RECORD or len(payload) != length or zlib.crc32(payload) != checksum:
            break
        file.offsets.append(position)
        position += RECORD.size + length
    file.size = position
    try:
        file.acknowledged = min(file.last, int(path.with_suffix(".ack").read_bytes()))
    except (OSError, ValueError):
        file.acknowledged = 0
    return file


def _read_record(file: _File, sequence: int) -> bytes | None:
    try:
        with file.path.open("rb") as stream:
            stream.seek(file.offsets[sequence - 1])
            length, checksum = RECORD.unpack(stream.read(RECORD.size))
            payload = stream.read(min(length, MAX_RECORD))
        message = agents_pb2.Spooled.FromString(payload)
    except (OSError, struct.error, DecodeError):
        return None
    whole = zlib.crc32(payload) == checksum and message.sequence == sequence
    return payload if whole else None


def _wrap(
    item: telemetry_pb2.TelemetryWindow | telemetry_pb2.TrialResult | telemetry_pb2.SampleNotice,
) -> agents_pb2.Spooled:
    if isinstance(item, telemetry_pb2.TelemetryWindow):
        return agents_pb2.Spooled(telemetry=item)
    if isinstance(item, telemetry_pb2.TrialResult):
        return agents_pb2.Spooled(trial=item)
    return agents_pb2.Spooled(sample=item)


def _gap_item(reason: str) -> agents_pb2.Spooled:
    return agents_pb2.Spooled(gap=telemetry_pb2.Gap(reason=reason))


def _gap_message(identity: str, first: int, last: int, reason: str) -> agents_pb2.Spooled:
    gap = telemetry_pb2.Gap(from_sequence=first, to_sequence=last, reason=reason)
    return agents_pb2.Spooled(spool_id=identity, sequence=first, gap=gap)
