"""The kernel's TCP sockets, asked for by netlink: /proc/net/tcp takes a tenth of a second after a busy minute."""

from __future__ import annotations

import socket
import struct

ESTABLISHED, LISTEN = 1, 10
_SOCK_DIAG, _BY_FAMILY, _REQUEST_DUMP, _ERROR, _DONE = 4, 20, 0x301, 2, 3


class SocketTable:
    """The IPv4 sockets of the network namespace in which it was made; `close` it."""

    def __init__(self) -> None:
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG)
        self.close = self._netlink.close

    def count(self, port: int, state: int) -> int:
        """How many are in a state on a local port."""
        request = struct.pack("=BBxxI", socket.AF_INET, socket.IPPROTO_TCP, 1 << state)
        request += struct.pack(">H46x", port)
        self._netlink.send(struct.pack("=IHHII", 16 + len(request), _BY_FAMILY, _REQUEST_DUMP, 0, 0) + request)
        found = 0
        while True:
            data = self._netlink.recv(1 << 18)
            while data:
                length, kind = struct.unpack_from("=IH", data)
                if kind == _ERROR:
                    raise OSError(-struct.unpack_from("=i", data, 16)[0], "the kernel does not tell of its sockets")
                if kind == _DONE:
                    return found
                found += 1
                data = data[(length + 3) & ~3 :]
