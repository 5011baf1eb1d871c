"""Asks relays for what they tell of themselves, once a second, as a page that is open does, or Prometheus.

python -m tests.bench.watcher PATH PORT...
"""

import socket
import sys
import time


def ask(port: int, path: str) -> int:
    """One question; returns the bytes of the answer, or 0 where there is none yet."""
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            return sum(map(len, iter(lambda: sock.recv(1 << 18), b"")))
    except OSError:
        return 0


def watch(path: str, ports: list[int]) -> None:
    while True:
        until = time.monotonic() + 1.0
        for port in ports:
            ask(port, path)
        time.sleep(max(0.0, until - time.monotonic()))


if __name__ == "__main__":
    watch(sys.argv[1], [int(port) for port in sys.argv[2:]])
