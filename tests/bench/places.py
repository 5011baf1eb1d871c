"""Where a measurement takes place: on loopback, or at the two ends of a long path.

near end                                              far end
service clients ──▶ relay server ◀══════ links ══════ relay client ──▶ service
"""

from __future__ import annotations

from contextlib import ExitStack

from ..wire import CLIENT, SERVER, Way, Wire, without_wire
from .programs import absent, find_program
from .sockets import SocketTable

ROUND_TRIP, SATELLITE = 0.040, 0.600
"""Seconds."""
LOSS = 0.01
"""The share of packets that are lost, of 1,500 bytes each."""


class Place(ExitStack):
    """Loopback for everything; a context manager."""

    near = far = "127.0.0.1"
    """The addresses of the two ends."""
    entrance: tuple[object, ...] = ()
    """What stands before a command that is to run at the far end."""

    def __init__(self) -> None:
        super().__init__()
        self.near_sockets = self.far_sockets = self._table()

    def _table(self) -> SocketTable:
        table = SocketTable()
        self.callback(table.close)
        return table


class LongPath(Place):
    """Two hosts with a round-trip time between them.  The calling thread is at the near end meanwhile.

    TCP sees an ordinary path with packets of 1,500 bytes; they are carried in pieces of up to 64 KiB, as they leave it.
    """

    near, far = SERVER, CLIENT
    way, offload = Way(delay=ROUND_TRIP / 2), True
    control = ""
    """TCP's congestion control at both ends; "" is the system's choice."""

    def __init__(self) -> None:
        super().__init__()
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        wire = Wire(self, self.way, offload=self.offload)
        for host in (wire.client, wire.server) if self.control else ():
            # A namespace may not choose all as its default; a route may.
            host.ip(f"route replace 198.18.0.0/16 dev tun0 src {host.address} congctl lock {self.control}")
        with wire.client.inside():
            self.far_sockets = self._table()
        self.entrance = (find_program("nsenter"), f"--net={wire.client.path}")
        self.enter_context(wire.server.inside())
        self.near_sockets = self._table()


class CubicPath(LongPath):
    """The same with the congestion control that Linux has by default."""

    control = "cubic"


class NarrowPath(LongPath):
    """The same with 100 Mbit/s, as many paths have, and a queue of a round trip before them."""

    way = Way(delay=ROUND_TRIP / 2, rate=100e6, queue=ROUND_TRIP)


class NarrowCubicPath(NarrowPath, CubicPath):
    """Both."""


class LossyPath(LongPath):
    """The same with losses that hit single packets, and at most 50 Mbit/s."""

    way, offload = Way(delay=ROUND_TRIP / 2, loss=LOSS, rate=50e6, queue=0.1), False


class SatellitePath(LongPath):
    """A path without losses that is far longer."""

    way = Way(delay=SATELLITE / 2)


def without_long_path() -> str:
    """What is missing for a `LongPath`, in one line."""
    return without_wire() or absent("nsenter")
