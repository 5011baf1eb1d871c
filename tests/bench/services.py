"""Small services, all connections in one thread: ``python -m tests.bench.services echo|http HOST PORT``."""

import selectors
import socket
import sys

BODY = "100 bytes, which is about what small messages have: a reading, a move in a game, a line of a chat.\r\n"
OK = b"HTTP/1.1 200 OK\r\nConnection: %s\r\nContent-Length: 100\r\n\r\n" + BODY.encode()


def serve(name: str, host: str, port: int) -> None:
    """Serve for ever.  Answers are small, so that sending does not block."""
    listener = socket.create_server((host, port), backlog=4096)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            if sock is listener:
                selector.register(sock.accept()[0], selectors.EVENT_READ)
                continue
            try:
                data = sock.recv(65536)
                # HTTP only as well as wrk needs it: requests come whole, and without a body.
                last = not data or (name == "http" and b"connection: close" in data.lower())
                answer = OK % (b"close" if last else b"keep-alive")
                sock.sendall(data if name == "echo" else answer * data.count(b"\r\n\r\n"))
            except OSError:
                last = True
            if last:
                selector.unregister(sock)
                sock.close()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
