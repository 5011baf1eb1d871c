"""The watch over connections: what it finds, and that it disturbs nothing."""

from __future__ import annotations

import gc
import socket
import struct
from contextlib import ExitStack

import pytest

from _tcprelay.link import RawLink
from _tcprelay.splice import Splice
from _tcprelay.streams import Stream
from _tcprelay.tcp import RESET_ON_CLOSE
from _tcprelay.watch import Splices

from .conftest import replace, wait_until
from .rigs import Rig, sweep_until_broken, tcp_pair


def test_a_reset_is_seen_although_the_pump_is_blocked(rig: Rig) -> None:
    """The stream is reset while its pump is stuck in a send to the link: the sweep breaks the connection off."""
    rig.far_stream.settimeout(0.3)
    try:
        while True:
            rig.far_stream.sendall(bytes(65536))  # nobody reads the link
    except TimeoutError:
        pass
    rig.far_stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    rig.far_stream.close()
    splices = Splices(0, 0)
    splices.add(rig.splice)
    sweep_until_broken(splices)
    assert rig.splice.reason == "stream: connection lost"


def test_the_sweep_meets_connections_that_have_just_ended() -> None:
    """Their sockets are closed when it comes to them, whatever it looks at."""
    with ExitStack() as stack:
        pairs = [tcp_pair() for _ in range(4)]
        splices = Splices(idle_timeout=100.0, half_close_timeout=100.0)
        for number, ended in enumerate(((False, False), (True, False))):
            stream = Stream(pairs[2 * number][0], "stream")
            link = RawLink(Stream(pairs[2 * number + 1][0], "link"))
            splice = Splice("1", "test", stream, link)
            splice.to_link.done, splice.from_link.done = ended
            splices.add(splice)
        for pair in pairs:
            for sock in pair:
                stack.callback(sock.close)
                sock.close()
        splices.sweep()
        assert len(splices) == 2


def test_a_sweep_looks_at_all_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at those beyond what it looks at without a pause."""
    replace(monkeypatch, "BATCH", 2)
    splices = Splices(idle_timeout=0.001, half_close_timeout=0)
    with ExitStack() as stack:
        add_silent(stack, splices, 5)
        sweep_until_broken(splices)


def add_silent(stack: ExitStack, splices: Splices, count: int) -> None:
    """Watch so many connections that nobody carries."""
    for number in range(count):
        legs = [stack.enter_context(one) for _ in range(2) for one in socket.socketpair()]
        splices.add(Splice(str(number), "test", Stream(legs[0], "one"), RawLink(Stream(legs[2], "other"))))


def test_a_sweep_does_not_call_the_garbage_collector() -> None:
    """Every few seconds it would look at all that 5,000 connections have, and everything would stand still."""
    with ExitStack() as stack:
        splices = Splices(idle_timeout=100.0, half_close_timeout=100.0)
        add_silent(stack, splices, 60)
        stack.callback(gc.set_threshold, *gc.get_threshold())
        collections: list[str] = []

        def note(phase: str, _: dict[str, int]) -> None:
            collections.append(phase)

        gc.callbacks.append(note)
        stack.callback(gc.callbacks.remove, note)
        gc.collect()
        gc.set_threshold(20)
        splices.sweep()
        assert collections.count("start") <= 3  # the first of them is our own


@pytest.mark.parametrize("lost", ["stream", "link"])
def test_a_dead_path_ends_a_connection(rig: Rig, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """Of either leg, and by RST on the link; not where --dead-path is 0, and not before that time."""
    dead = getattr(rig, lost).sock
    replace(monkeypatch, "path_is_dead", lambda sock, seconds: sock is dead)
    for dead_path in (0.0, 1000.0):
        patient = Splices(0, 0, dead_path)
        patient.add(rig.splice)
        patient.sweep()
        assert not rig.splice.reason
    rig.link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
    splices = Splices(0, 0, 0.01)
    splices.add(rig.splice)
    sweep_until_broken(splices)
    assert rig.splice.reason == "sent bytes are no longer acknowledged"
    wait_until(lambda: rig.far.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x07")  # not CLOSE_WAIT
