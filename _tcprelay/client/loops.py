"""Connections that come back: a service that is published onto a service port of the relay's.

Each connection to such a service would make the relay client dial that port, which is a further connection to it, until
all links are in use.  Two things show it:

- START tells where its service client comes from, and at which address it has connected.  Where this relay client, in
  whichever of its processes, has a connection to a service between these very addresses, it is its own one that has
  come back (`OwnConnections`).  One of the two is not enough: a system gives the same port to connections that go to
  different places.  And both are not where they may be another host's, which has loopback and private ones as well
  (`RelayPlace.shares`).
- A NAT in between changes that address.  There it is where the service was dialled that counts: at the relay server's
  host, and the port at which the server says that service clients come (`RelayPlace.is_at`).

A connection may come back for another service, which is published onto the service port of the first: once for each
service, but not again and again.
"""

from __future__ import annotations

import ipaddress
import mmap
import socket
import zlib
from typing import Any

from ..addresses import Endpoint, host_of, is_loopback, show_address
from ..names import resolve_here


class OwnConnections:
    """A relay client's connections to its services, by the addresses of both ends; any thread.

    They are in memory that the worker processes share, and that is made before these are forked: a connection comes
    back to any of them.  Each port has one mark: of two connections with the same one, the later one counts.
    """

    def __init__(self) -> None:
        self._marks = memoryview(mmap.mmap(-1, 4 * 65536)).cast("I")  # what is not used takes no memory

    def hold(self, near: Any, far: Any, times: int) -> tuple[int, int]:
        """Note a connection to a service, between these socket addresses, that has come back so many times before;
        returns what `release` needs."""
        port, mark = _mark(show_address(near), show_address(far))
        mark |= min(times + 1, 255) << 24
        if port:
            self._marks[port] = mark
        return port, mark

    def release(self, held: tuple[int, int]) -> None:
        """That connection is over."""
        port, mark = held
        if port and self._marks[port] == mark:
            self._marks[port] = 0

    def times(self, near: str, far: str) -> int:
        """How often the connection between these addresses has come back, as the relay server shows them; 0 where it is
        none of these."""
        port, mark = _mark(near, far)
        found = self._marks[port] if port else 0
        return found >> 24 if found & 0xFFFFFF == mark else 0


def _mark(near: str, far: str) -> tuple[int, int]:
    """The near port, and 24 bits that stand for both addresses; port 0 where there is none."""
    port = near.rpartition(":")[2]
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 65536
    return (int(port) if is_port else 0), zlib.crc32(f"{near} {far}".encode(errors="replace")) & 0xFFFFFF


class RelayPlace:
    """Where the relay server is, as a link shows it; made once for each."""

    def __init__(self, link: socket.socket, beyond: Endpoint | None = None) -> None:
        """With the relay server itself where that is `beyond` the link's far end, a proxy: by its address; of a name
        only the proxy can know where it leads, so that nothing is known here then.  Loopback is the proxy's."""
        here, relay = ends_of(link)
        if beyond is not None and isinstance(relay, tuple):
            [(_, found), *_] = resolve_here(beyond.host, beyond.port) or [(0, None)]
            relay = (*relay[:1], beyond.port, *relay[2:]) if found and is_loopback(found) else found
        if not (isinstance(relay, tuple) and isinstance(here, tuple)):  # the link is lost
            relay = here = "", 0
        self._host, self._port = host_of(relay), relay[1]
        self._is_loopback = is_loopback(relay)
        self._is_here = self._is_loopback or self._host == host_of(here) != ""
        self._shown = show_address(relay).rpartition(":")[0]

    def shares(self, address: str) -> bool:
        """Whether an address of the relay server's, at which a service client has connected, is known here by that
        name, too: on one host with it, or as the host to which the link leads."""
        return self._is_here or address.rpartition(":")[0] == self._shown

    def may_return(self, near: Any, far: Any) -> bool:
        """Whether a connection to a service, between these addresses, may be one to the relay server's host."""
        if not isinstance(far, tuple):
            return False
        host = host_of(far)
        return host == self._host or (self._is_here and (host == host_of(near) or is_loopback(far)))

    def is_at(self, far: Any, address: str) -> bool:
        """Whether a service was dialled, at `far`, at the relay port itself, or at the relay server's host and the port
        of its `address` there.

        On one host with the relay server another network of that host, a container's say, can have the service port:
        there that is left to `OwnConnections`.
        """
        if not isinstance(far, tuple):
            return False
        if not self._host:  # beyond a proxy: what the internet knows by one address is one port
            return show_address(far) == address and is_public(far)
        if far[1] == self._port and (host_of(far) == self._host or (self._is_loopback and is_loopback(far))):
            return True
        return not self._is_here and host_of(far) == self._host and str(far[1]) == address.rpartition(":")[2]


def is_public(address: Any) -> bool:
    """Whether a socket address is one that is the same host's everywhere."""
    try:
        return ipaddress.ip_address(host_of(address)).is_global
    except ValueError:
        return False


class Way:
    """How a service client has come: to a port of the relay's place, and back so many times; and where that leads."""

    def __init__(self, place: RelayPlace, port: str, times: int) -> None:
        self.place = place
        self.port = port
        self.times = times
        self.ends: tuple[Any, Any] = None, None
        """The addresses of the connection to the service, when there is one."""


def ends_of(sock: socket.socket) -> tuple[Any, Any]:
    """The near and the far address of a connected socket; ``None`` where it is broken off already."""
    try:
        return sock.getsockname(), sock.getpeername()
    except OSError:
        return None, None
