"""A TCP relay that counts bytes: how much an idle agent's connection really carries, TLS included."""

from __future__ import annotations

import contextlib
import socket
import threading
import time


class Relay:
    """Listens on a free loopback port and carries each connection to `target` ("host:port")."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._counts: list[tuple[float, int]] = []  # (monotonic s, bytes), both directions
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = [self._server]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                try:
                    far = socket.create_connection(self._target, timeout=5)
                    far.settimeout(None)
                except OSError:
                    near.close()
                    continue
                self._sockets += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                with self._lock:
                    self._counts.append((time.monotonic(), len(data)))
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def quietest(self, start: float, stop: float, span_s: float) -> float | None:
        """Bytes a second in the quietest `span_s` between two moments (monotonic seconds), both directions;
        None if they are not that far apart."""
        with self._lock:
            counts = [(moment, size) for moment, size in self._counts if start <= moment <= stop]
        if stop - start < span_s:
            return None
        # A window is quietest when it begins right after a message or at the start.
        begins = [start, *(moment + 1e-6 for moment, _ in counts)]
        totals = [
            sum(size for moment, size in counts if begin <= moment < begin + span_s)
            for begin in begins
            if begin + span_s <= stop
        ]
        return min(totals) / span_s

    def close(self) -> None:
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
