"""What a disk would hold after a power cut: a recorder of file operations and a replayer.

The model: data written since the last fsync of a file is lost, torn or zeroed; directory entries made
since the last fsync of their directory are lost, as a suffix in order (a journal) or any subset of
them (plain POSIX). A mark ("ack") in the log notes what was promised to the controller by then.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal_agent.fs import RealFs

Operation = tuple[Any, ...]


class RecordingFs(RealFs):
    """The real files, with every operation noted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.log: list[Operation] = []

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def write(self, path: Path, data: bytes) -> None:
        self.log.append(("write", self._name(path), data))
        super().write(path, data)

    def append(self, path: Path, data: bytes) -> None:
        self.log.append(("append", self._name(path), data))
        super().append(path, data)

    def fsync(self, path: Path) -> None:
        self.log.append(("fsync", self._name(path)))
        super().fsync(path)

    def fsync_directory(self, path: Path) -> None:
        self.log.append(("fsync directory", self._name(path)))
        super().fsync_directory(path)

    def replace(self, source: Path, target: Path) -> None:
        self.log.append(("replace", self._name(source), self._name(target)))
        super().replace(source, target)

    def unlink(self, path: Path) -> None:
        self.log.append(("unlink", self._name(path)))
        super().unlink(path)

    def ack(self, what: str) -> None:
        self.log.append(("ack", what))


@dataclass
class _Inode:
    data: bytes = b""
    synced: bytes = b""


@dataclass
class _Disk:
    live: dict[str, _Inode] = field(default_factory=dict)
    durable: dict[str, _Inode] = field(default_factory=dict)
    pending: list[tuple[str, str, _Inode | None]] = field(default_factory=list)  # directory, name, entry

    def set(self, name: str, inode: _Inode | None) -> None:
        if inode is None:
            self.live.pop(name, None)
        else:
            self.live[name] = inode
        self.pending.append((str(Path(name).parent), name, inode))

    def sync_directory(self, directory: str) -> None:
        for where, name, inode in self.pending:
            if where == directory:
                self.enter(name, inode)
        self.pending = [item for item in self.pending if item[0] != directory]

    def enter(self, name: str, inode: _Inode | None) -> None:
        if inode is None:
            self.durable.pop(name, None)
        else:
            self.durable[name] = inode


def replay(log: list[Operation], target: Path, chance: random.Random, model: str) -> list[str]:
    """Writes one possible disk after a power cut at the end of `log`; returns the acks before it."""
    disk, acks = _Disk(), []
    for kind, *what in log:
        if kind == "ack":
            acks.append(what[0])
        elif kind in ("write", "append"):
            inode = disk.live.get(what[0])
            if inode is None:
                inode = _Inode()
                disk.set(what[0], inode)
            inode.data = what[1] if kind == "write" else inode.data + what[1]
        elif kind == "fsync":
            disk.live[what[0]].synced = disk.live[what[0]].data
        elif kind == "fsync directory":
            disk.sync_directory(what[0])
        elif kind == "replace":
            inode = disk.live[what[0]]
            disk.set(what[1], inode)
            disk.set(what[0], None)
        elif what[0] in disk.live:
            disk.set(what[0], None)
    if model == "journal":
        survivors = disk.pending[: chance.randint(0, len(disk.pending))]
    else:
        survivors = [item for item in disk.pending if chance.random() < 0.5]
    for _, name, inode in survivors:
        disk.enter(name, inode)
    for name, inode in disk.durable.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_after_cut(inode, chance))
    return acks


def _after_cut(inode: _Inode, chance: random.Random) -> bytes:
    if inode.data == inode.synced:
        return inode.data
    return chance.choice(
        [
            inode.synced,
            inode.data,
            inode.data[: chance.randint(0, len(inode.data))],
            b"\0" * len(inode.data),
        ]
    )
