"""What Linux tells of a TCP connection: whether it is near, slow, dead, or held back by losses."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from unittest.mock import Mock

import pytest

from _tcprelay.tcp import NEAR, is_swollen, is_held_back, is_near, path_is_dead, round_trip, say_path, unsent_bytes

from .conftest import PATIENCE, replace, wait_until
from .rigs import tcp_pair
from .wire import Way, Wire


def test_what_is_near(lay_wire: Callable[..., Wire]) -> None:
    """Not what is 10 ms away, but loopback, whatever delayed acknowledgements say."""
    near, far = tcp_pair()
    with near, far:
        for one, other in ((near, far), (far, near)):  # an exchange, after which acknowledgements wait for an answer
            one.sendall(b"?")
            assert other.recv(1) == b"?"
        while round_trip(near) < 2 * NEAR:  # the mean, of acknowledgements that are delayed
            near.sendall(b"not answered")
            wait_until(lambda: not unsent_bytes(near))
        assert is_near(near)
    wire = lay_wire(Way(delay=0.005), offload=True)
    with wire.server.inside():
        listener = socket.create_server((wire.server.address, 0))
    with listener, wire.client.inside(), socket.create_connection(listener.getsockname(), PATIENCE) as distant:
        assert not is_near(distant)


def tcp_info(**values: int) -> socket.socket:
    """Stands in for a socket whose `struct tcp_info` has these numbers, and zeros."""
    offsets = {"mss": 16, "unacked": 24, "last_ack": 56, "round_trip": 68, "threshold": 76, "lost": 100}
    info = bytearray(200)
    for name, value in values.items():
        struct.pack_into("I", info, offsets[name], value)
    sock = Mock(spec=socket.socket)
    sock.getsockopt.side_effect = lambda level, option, size: bytes(info[:size])
    return sock


@pytest.mark.parametrize(
    ("lost", "threshold", "sent", "held_back"),
    [(0, 8, 10**7, False), (1, 8, 0, True), (1, 20, 0, True), (1, 21, 0, False), (1, 250, 10**6, True),
     (1, 251, 10**6, False), (1, 0x7FFFFFFF, 10**6, False)],
)  # fmt: skip
def test_what_losses_hold_back(lost: int, threshold: int, sent: int, held_back: bool) -> None:
    """A threshold that is low, or less than a quarter of what was sent; without a loss it says nothing."""
    assert is_held_back(tcp_info(mss=1000, lost=lost, threshold=threshold), sent) is held_back


@pytest.mark.parametrize(
    ("size", "near", "much"), [(1 << 20, False, True), (1 << 20, True, False), (1 << 19, False, False)]
)
def test_for_which_the_system_is_swollen(monkeypatch: pytest.MonkeyPatch, size: int, near: bool, much: bool) -> None:
    """Linux doubles what it is told; a near peer's bytes come when they are wanted, however many may."""
    replace(monkeypatch, "is_near", lambda sock: near)
    replace(monkeypatch, "new_buffer", lambda: 1 << 17)
    sock = Mock(spec=socket.socket)
    sock.getsockopt.side_effect = lambda level, option: {(socket.SOL_SOCKET, socket.SO_RCVBUF): 2 * size}[level, option]
    assert is_swollen(sock) is much
    sock.getsockopt.side_effect = OSError
    assert not is_swollen(sock)


def test_where_the_path_is_slow_that_is_said() -> None:
    """From a second on; of what is no TCP connection nothing is."""
    assert say_path(tcp_info(round_trip=2_340_000)) == "; the path is slow: a round trip takes 2.3 s"
    assert say_path(tcp_info(round_trip=999_999)) == ""
    one, other = socket.socketpair()
    with one, other:
        assert say_path(one) == ""
        assert not is_held_back(one, 10**9)
        assert not path_is_dead(one, 1)


@pytest.mark.parametrize(
    ("unacked", "last_ack", "seconds", "dead"),
    [(1, 2001, 2, True), (1, 2000, 2, False), (0, 10**6, 2, False), (1, 10**6, 0, False)],
)
def test_when_a_path_is_dead(unacked: int, last_ack: int, seconds: float, dead: bool) -> None:
    """Something is under way, and nothing was acknowledged for longer than that; 0 is never."""
    assert path_is_dead(tcp_info(unacked=unacked, last_ack=last_ack), seconds) is dead
