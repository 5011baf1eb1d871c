"""What is set on TCP sockets, and what Linux's struct tcp_info tells of them."""

from __future__ import annotations

import functools
import itertools
import math
import socket
import struct
from dataclasses import dataclass

from .system import LINUX, fcntl, ignore_oserror, termios

RESET_ON_CLOSE, CLOSE_NORMALLY = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)
"""Values of SO_LINGER."""


def limit_sends(sock: socket.socket) -> None:
    """Have a blocked send return every quarter of a second, to see whether it is to give up."""
    set_timeout(sock, socket.SO_SNDTIMEO, 0.25)


def set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    """Limit blocking sends (SO_SNDTIMEO) or receives (SO_RCVTIMEO), which fail with `BlockingIOError` then."""
    for timeval in ("ll", "qq"):  # the latter where time is wider than the machine's words
        try:
            sock.setsockopt(socket.SOL_SOCKET, option, struct.pack(timeval, *divmod(round(seconds * 1e6), 1_000_000)))
            return
        except OSError:
            pass


@dataclass(frozen=True)
class Probing:
    """How TCP is to find out that a silent peer is no longer there."""

    keepalive: float = 20.0
    """Seconds of silence after which the peer is asked, and up to half as much again: each connection at another
    moment.  There are NATs that forget a connection after 30 s without a packet; a dead one is not missed before."""
    dead_path: float = 900.0
    """Seconds without any answer after which the connection is given up; 0 is never.  But a silent one is asked 127
    times at most, which is all that Linux allows."""
    INTERVAL = 15
    """Seconds from one question to the next, where that is not more than `keepalive`: Linux lets the greater of the
    two pass between questions that are answered."""

    def apply(self, sock: socket.socket) -> None:
        """Set what accepted sockets inherit from a listener, and the rest."""
        most = self.INTERVAL if self.dead_path else self.keepalive
        interval = max(1, int(min(most, self.keepalive, self.dead_path / 2 or most)))
        count = min(127, math.ceil(self.dead_path / interval)) if self.dead_path else 127
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPINTVL", interval), ("TCP_KEEPCNT", count)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.spread(sock)

    def spread(self, sock: socket.socket) -> None:
        """Choose the moment of the first question.

        Thousands at once overflow the kernel's queues, on loopback at 1,000 packets, and so do their repetitions:
        connections to living peers timed out (measured: 8 to 29 of 3,000 that were opened together).
        """
        if hasattr(socket, "TCP_KEEPIDLE"):
            idle = int(self.keepalive) + 37 * next(_turns) % (int(self.keepalive) // 2 or 1)
            ignore_oserror(sock.setsockopt, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)


_turns = itertools.count()


def set_tcp_options(sock: socket.socket) -> None:
    """No delay, urgent bytes among the others, and little that is unsent.

    Without SO_OOBINLINE an urgent byte (Telnet's and FTP's interrupt) would be taken out of the stream and lost.

    TCP_USER_TIMEOUT is left alone: on Linux it also ends a connection whose living peer merely does not read
    (measured: a stalled reader was cut off after 3.5 s with a time-out of 3 s), and stalling is no fault.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    limit_unsent(sock)


UNSENT = 1 << 15
"""Bytes that a socket takes beyond what the path and its peer's window allow: see `Queue`."""


def limit_unsent(sock: socket.socket, most: int = UNSENT) -> None:
    """Set TCP_NOTSENT_LOWAT, where there is such a thing; 0 leaves it to the system."""
    if sock.family != socket.AF_UNIX and hasattr(socket, "TCP_NOTSENT_LOWAT"):
        ignore_oserror(sock.setsockopt, socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, most)


NEAR = 0.002
"""Seconds of a round trip: what is nearer gives whatever it has in no time, and needs no large window for that."""
NEAR_BUFFER = 1 << 15
"""Bytes of the receive buffer for a near service behind a far link; Linux doubles what it is told."""
NEAR_SEGMENT = 7_400
"""Bytes of its segments at most.  The send buffer of a service on this host takes 20 segments at least, each rounded up
to a power of two with some 700 bytes of the kernel's own: with loopback's 65,483 these are 2.6 MB."""
_SO_BUF_LOCK = 72


def hold_little(sock: socket.socket) -> None:
    """Have the system not hold more and more of what comes, where the peer is near, until `hold_much` leaves that to it
    again; for which there is no way before Linux 5.14, so that nothing is done there."""
    if LINUX and sock.family != socket.AF_UNIX and is_near(sock):
        try:
            sock.getsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, NEAR_BUFFER)
        except OSError:
            pass


def hold_much(sock: socket.socket) -> None:
    if LINUX and sock.family != socket.AF_UNIX:
        ignore_oserror(sock.setsockopt, socket.SOL_SOCKET, _SO_BUF_LOCK, 0)


def unsent_bytes(sock: socket.socket) -> int:
    """How many sent bytes the peer has not acknowledged (SIOCOUTQ); 0 where the system does not tell, or it is
    closed."""
    try:
        return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0\0\0\0"))[0])
    except (AttributeError, OSError, ValueError):
        return 0


def unread_bytes(sock: socket.socket) -> int:
    """How many bytes have arrived and were not received yet (FIONREAD); 0 where the system does not tell."""
    try:
        return int(struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, b"\0\0\0\0"))[0])
    except (AttributeError, OSError, ValueError):
        return 0


# Fields of Linux's struct tcp_info: how struct reads one, and at which byte.
STATE, _RETRANSMITS, _SEGMENT, _UNACKED = ("B", 0), ("B", 2), ("I", 16), ("I", 24)
_LAST_ACK, _ROUND_TRIP, _THRESHOLD, _LOST = ("I", 56), ("I", 68), ("I", 76), ("I", 100)
BYTES_RECEIVED, _LEAST_ROUND_TRIP = ("Q", 128), ("I", 148)


def tcp_info(sock: socket.socket, *fields: tuple[str, int]) -> list[int] | None:
    """Fields of a connection's struct tcp_info; ``None`` where the system does not tell, or this Linux has not all of
    them."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
        return [struct.unpack_from(form, info, place)[0] for form, place in fields]
    except (OSError, AttributeError, struct.error):
        return None


def path_is_dead(sock: socket.socket, seconds: float) -> bool:
    """Whether sent bytes have gone without any acknowledgement for so many seconds; 0 is never.

    A living peer that does not read acknowledges the probes of its closed window, so it does not count.
    """
    unacked, milliseconds = tcp_info(sock, _UNACKED, _LAST_ACK) or (0, 0)
    return bool(seconds and unacked and milliseconds > 1000 * seconds)


def is_resent(sock: socket.socket) -> bool:
    """Whether what was sent has been sent again twice without an acknowledgement, at the times of this path itself."""
    unacked, times = tcp_info(sock, _UNACKED, _RETRANSMITS) or (0, 0)
    return bool(unacked and times >= 2)


def round_trip(sock: socket.socket) -> float:
    """Seconds of a connection's round trip; 0 where the system does not tell."""
    [microseconds] = tcp_info(sock, _ROUND_TRIP) or [0]
    return microseconds / 1e6


def is_near(sock: socket.socket) -> bool:
    """Whether a connection's shortest round trip, of the last five minutes, is below `NEAR`.

    The mean has delayed acknowledgements in it, some 40 ms even on loopback.  True where the system does not tell,
    False before the first sample.
    """
    [microseconds] = tcp_info(sock, _LEAST_ROUND_TRIP) or [0]
    return microseconds < NEAR * 1e6


SLOW_PATH = 1.0
"""Seconds of a round trip that are worth a remark: a queue that fills up before a saturated uplink."""


def say_path(sock: socket.socket) -> str:
    """A remark for the log where a connection's path is slow; "" where it is not, or the system does not tell."""
    seconds = round_trip(sock)
    return f"; the path is slow: a round trip takes {seconds:.1f} s" if seconds >= SLOW_PATH else ""


FEW_SEGMENTS = 20
"""A slow-start threshold at which a connection is always held back: twice the window with which a new one begins
(RFC 6928), which has no threshold.  Losses of 1 % lead to 8 or so, of 0.1 % to 27 (half of the window at which a
packet is lost, 1.22 divided by the square root of the share: Mathis and others, 1997)."""


SWOLLEN = 1 << 20
"""Bytes of a receive buffer, beyond those of a new connection, that are a long queue: seconds of a slow reader's."""


def is_swollen(sock: socket.socket) -> bool:
    """Whether the system has come to take many bytes from a far peer before anybody reads them.

    It does not make that less again: a peer has leave to send what it was once offered.
    """
    try:
        size = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        return size > SWOLLEN + new_buffer() and not is_near(sock)
    except OSError:
        return False


@functools.cache
def new_buffer() -> int:
    """Bytes of a new connection's receive buffer (net.ipv4.tcp_rmem).  Raises `OSError`."""
    with socket.socket() as sock:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def is_held_back(sock: socket.socket, sent: int) -> bool:
    """Whether a connection that has lost packets would now take longer than a new one for as many bytes as it has just
    sent: its threshold is below a quarter of them (measured over 40 ms and 100 Mbit/s: 2 MB take 0.21 s on a new
    one, and 1.6 s at a threshold of 30 segments)."""
    size, threshold, lost = tcp_info(sock, _SEGMENT, _THRESHOLD, _LOST) or (0, 0, 0)
    return bool(lost) and threshold <= max(FEW_SEGMENTS, sent // (4 * max(size, 1)))
