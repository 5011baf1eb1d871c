"""Small services for the bench: ``python -m tests.bench.services echo|http PORT``."""

from __future__ import annotations

import selectors
import socket
import sys

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"


def echo(received: bytearray) -> tuple[bytes, bool]:
    data = bytes(received)
    received.clear()
    return data, False


def http(received: bytearray) -> tuple[bytes, bool]:
    """Answer every complete request without a body; only as good as wrk needs it."""
    requests, _, rest = received.rpartition(b"\r\n\r\n")
    last = b"connection: close" in requests.lower()
    count = received.count(b"\r\n\r\n")
    received[:] = rest
    return ANSWER * count, last


def serve(name: str, port: int) -> None:
    """Serve for ever, all connections in one thread.  Answers are small, so that sending does not block."""
    answer = {"echo": echo, "http": http}[name]
    listener = socket.create_server(("127.0.0.1", port), backlog=4096)
    listener.setblocking(False)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.data is None:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    continue
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                selector.register(sock, selectors.EVENT_READ, (sock, bytearray()))
                continue
            sock, received = key.data
            try:
                data = sock.recv(65536)
                received += data
                reply, last = answer(received) if data else (b"", True)
                sock.sendall(reply)
            except OSError:
                last = True
            if last:
                selector.unregister(sock)
                sock.close()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
