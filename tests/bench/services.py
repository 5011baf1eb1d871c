"""Small services, all connections in one thread: ``python -m tests.bench.services echo|http|bulk HOST PORT``."""

import selectors
import socket
import sys
import threading

BODY = "100 bytes, which is about what small messages have: a reading, a move in a game, a line of a chat.\r\n"
BULK, MESSAGE = b"bulk", b"m" * 100
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
                if name == "bulk" and data == BULK:
                    threading.Thread(target=send_for_ever, args=(sock,), daemon=True).start()
                else:
                    sock.sendall(answer * data.count(b"\r\n\r\n") if name == "http" else data)
            except OSError:
                last = True
            if last:
                selector.unregister(sock)
                sock.close()


def send_for_ever(sock: socket.socket) -> None:
    """Send what nobody needs, until that fails; in a thread of its own."""
    piece = bytes(1 << 18)
    try:
        while True:
            sock.sendall(piece)
    except OSError:
        pass


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
