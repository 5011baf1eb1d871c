"""The least that this design costs: a bare relay with a thread pair for each connection, no links, no proofs, no ends.

python -m tests.bench.pairs HOST PORT TARGET_HOST TARGET_PORT
"""

import socket
import sys
import threading


def pump(source: socket.socket, sink: socket.socket) -> None:
    buffer = memoryview(bytearray(65536))
    receive, send = source.recv_into, sink.sendall
    try:
        while count := receive(buffer):
            send(buffer[:count])
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        for sock in (source, sink):
            sock.close()


def carry(sock: socket.socket, target: tuple[str, int]) -> None:
    with sock, socket.create_connection(target) as far:
        for one in (sock, far):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        back = threading.Thread(target=pump, args=(far, sock))
        back.start()
        pump(sock, far)
        back.join()


def serve(host: str, port: int, target: tuple[str, int]) -> None:
    threading.stack_size(256 * 1024)
    listener = socket.create_server((host, port), backlog=4096)
    while True:
        threading.Thread(target=carry, args=(listener.accept()[0], target)).start()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), (sys.argv[3], int(sys.argv[4])))
