"""A TCP proxy on loopback that can be slow, cut its connections, fail a share of HTTP requests or end answers early."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

CHUNK = 65_536
METHODS = (b"GET ", b"PUT ", b"POST ", b"HEAD ", b"DELETE ")
REFUSALS = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
)


class Proxy:
    """``target`` gives the port behind it, asked at every connection. ``refusing`` and ``truncating``: shares of HTTP
    requests and of chunks of answers; ``delay``: seconds before each chunk of an answer."""

    def __init__(self, target: Callable[[], int], seed: int) -> None:
        self._target = target
        self._random = random.Random(seed)
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.quiet()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def quiet(self) -> None:
        """As if it were not there."""
        self.refusing = self.truncating = self.delay = 0.0
        self.is_cut = False

    def cut(self) -> None:
        """Ends every connection and takes no other until it is ``quiet``."""
        self.is_cut = True
        with self._lock:
            open_ones = list(self._connections)
        for one in open_ones:
            _close(one)

    def close(self) -> None:
        self.cut()
        _close(self._listener)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.is_cut:
                _close(client)
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._target()), timeout=5)
            except OSError:
                _close(client)
                continue
            server.settimeout(None)
            with self._lock:
                self._connections |= {client, server}
            threading.Thread(target=self._ask, args=(client, server), daemon=True).start()
            threading.Thread(target=self._answer, args=(server, client), daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(CHUNK):
                if data.startswith(METHODS) and self._random.random() < self.refusing:
                    client.sendall(self._random.choice(REFUSALS))
                    break
                server.sendall(data)
        self._end(client, server)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(CHUNK):
                time.sleep(self.delay)
                if self._random.random() < self.truncating:
                    client.sendall(data[: len(data) // 2])
                    break
                client.sendall(data)
        self._end(client, server)

    def _end(self, *ends: socket.socket) -> None:
        for one in ends:
            _close(one)
            with self._lock:
                self._connections.discard(one)


def _close(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
