"""A TCP proxy that cuts: the bad Wi-Fi of the upload's tests."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Proxy:
    """Passes connections on to `target`. `cuts` holds, for each connection that is to die, the bytes it
    may send first; `damage` flips a bit of that byte of everything sent, once."""

    target: int
    cuts: list[int] = field(default_factory=list)
    damage: int | None = None
    port: int = 0
    sent: int = 0
    connections: int = 0
    ends: list[socket.socket] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def pump(self, source: socket.socket, to: socket.socket, limit: int | None, upwards: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(16384):
                if limit is not None and len(data) >= limit:
                    to.sendall(data[:limit])
                    break
                if limit is not None:
                    limit -= len(data)
                to.sendall(self.changed(data) if upwards else data)
        for end in (source, to):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def changed(self, data: bytes) -> bytes:
        before, self.sent = self.sent, self.sent + len(data)
        if self.damage is None or not before <= self.damage < self.sent:
            return data
        at, self.damage = self.damage - before, None
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    def accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            self.ends.append(client)
            try:
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                client.close()
                continue
            self.ends.append(server)
            limit = self.cuts.pop(0) if self.cuts else None
            for pair in ((client, server, limit, True), (server, client, None, False)):
                self.threads.append(threading.Thread(target=self.pump, args=pair, daemon=True))
                self.threads[-1].start()

    def close(self) -> None:
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(5)
        for end in self.ends:
            end.close()


@contextlib.contextmanager
def proxy(target: int, **values: object) -> Iterator[Proxy]:
    listener = socket.create_server(("127.0.0.1", 0))
    made = Proxy(target, port=listener.getsockname()[1], **values)  # type: ignore[arg-type]
    thread = threading.Thread(target=made.accept, args=(listener,), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
        made.close()
