"""Where a measurement takes place: on loopback, or at the two ends of a long path.

    near end                                              far end
    service clients ──▶ relay server ◀══════ links ══════ relay client ──▶ service

The long path is two network namespaces, a TUN device in each, and a process that carries packets from one to the other
and holds each of them for a while.  The namespaces have no names: they end with the last process that holds them.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from contextlib import ExitStack

from .programs import absent, find_program
from .sockets import SocketTable

ROUND_TRIP = 0.040
"""Seconds."""
_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x1, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 0x1, 0x2, 0x4
_LARGEST = 70000
"""No packet is larger, with its header."""
_AT_ONCE = 64
"""So many packets are read before some are written."""


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
    """Two namespaces with a round-trip time between them.  The calling thread is at the near end meanwhile.

    TCP sees an ordinary path with packets of 1,500 bytes.  The devices have segmentation offload, so that the
    forwarder gets them in pieces of up to 64 KiB, as they leave TCP.
    """

    near, far = "198.18.0.1", "198.18.0.2"  # of the block that is for benchmarks

    def __init__(self) -> None:
        super().__init__()
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        home = self._namespace()
        self.callback(enter, home)
        unshare()
        far, far_tun = self._namespace(), self._device(self.far, self.near)
        self.far_sockets = self._table()
        unshare()
        near_tun = self._device(self.near, self.far)
        self.near_sockets = self._table()
        self.entrance = (find_program("nsenter"), f"--net=/proc/{os.getpid()}/fd/{far}")
        command = [sys.executable, "-m", __name__, str(near_tun), str(far_tun), str(ROUND_TRIP / 2)]
        forwarder = subprocess.Popen(command, pass_fds=(near_tun, far_tun))
        self.callback(forwarder.wait)
        self.callback(forwarder.kill)

    def _namespace(self) -> int:
        """A descriptor of the namespace in which the calling thread is."""
        descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        self.callback(os.close, descriptor)
        return descriptor

    def _device(self, own: str, other: str) -> int:
        """A TUN device in the calling thread's namespace, up and configured; returns its descriptor."""
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        self.callback(os.close, tun)
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", b"tun0", _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR))
        fcntl.ioctl(tun, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6)
        for words in (
            ("link", "set", "lo", "up"),
            ("address", "add", own, "peer", other, "dev", "tun0"),
            ("link", "set", "tun0", "txqueuelen", "10000", "up"),
        ):
            subprocess.run([find_program("ip"), *words], check=True, timeout=30)
        return tun


def without_long_path() -> str:
    """What is missing for a `LongPath`, in one line."""
    if os.geteuid():
        return "the long path needs root"
    if not os.path.exists("/dev/net/tun"):
        return "the long path needs /dev/net/tun"
    return absent("ip", "nsenter")


def unshare() -> None:
    """`os.unshare`, which came with Python 3.12: a new network namespace for the calling thread."""
    if _LIBC.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")


def enter(namespace: int) -> None:
    """`os.setns`, which came with Python 3.12, of the calling thread."""
    if _LIBC.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def forward(one: int, other: int, delay: float) -> None:
    """Carry packets between two devices, each one so many seconds after it came.  Never returns."""
    waiting: dict[int, deque[tuple[float, bytes]]] = {one: deque(), other: deque()}
    towards = {one: other, other: one}
    while True:
        due = min((packets[0][0] for packets in waiting.values() if packets), default=None)
        ready, _, _ = select.select(towards, (), (), due and max(0.0, due - time.monotonic()))
        now = time.monotonic()
        for tun in ready:
            try:
                for _ in range(_AT_ONCE):
                    waiting[tun].append((now + delay, os.read(tun, _LARGEST)))
            except BlockingIOError:
                pass  # no more for now
        for tun, packets in waiting.items():
            while packets and packets[0][0] <= now:
                os.write(towards[tun], packets.popleft()[1])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it,
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # or has ended
    forward(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
