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

    def __init__(self) -> None:
        super().__init__()
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        wire = Wire(self, self.way, offload=self.offload)
        with wire.client.inside():
            self.far_sockets = self._table()
        self.entrance = (find_program("nsenter"), f"--net={wire.client.path}")
        self.enter_context(wire.server.inside())
        self.near_sockets = self._table()


class LossyPath(LongPath):
    """The same with losses that hit single packets, and at most 50 Mbit/s."""

    way, offload = Way(delay=ROUND_TRIP / 2, loss=LOSS, rate=50e6, queue=0.1), False


class SatellitePath(LongPath):
    """A path without losses that is far longer."""

    way = Way(delay=SATELLITE / 2)


def without_long_path() -> str:
    """What is missing for a `LongPath`, in one line."""
    return without_wire() or absent("nsenter")
