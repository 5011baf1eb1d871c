"""Streams, links and pumps over real TCP connections, without a server or a client around them."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

import tcprelay
from tcprelay import (
    CLIENT,
    DATA,
    END,
    HELLO,
    MAX_DATA,
    READY,
    SERVER,
    START,
    WELCOME,
    Deadline,
    Link,
    Splice,
    Splices,
    Stream,
    Threads,
    encode_frame,
    encode_header,
)

from .conftest import PATIENCE, read_all, wait_until


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection; a deadline on the second one, which the test uses."""
    with tcprelay.listen("127.0.0.1", 0) as listener:
        listener.setblocking(True)
        far = socket.create_connection(listener.getsockname(), PATIENCE)
        near, _ = listener.accept()
    return near, far


class Rig:
    """A splice between a stream and a link, and the far ends of both."""

    def __init__(self, stack: ExitStack) -> None:
        stream, self.far_stream = tcp_pair()
        link, far_link = tcp_pair()
        far_link.settimeout(None)
        for sock in (self.far_stream, far_link):
            stack.callback(sock.close)
        self.threads = Threads()
        stack.callback(lambda: self.threads.end(Deadline(PATIENCE)))
        self.link, self.far = Link(Stream(link, "link"), CLIENT), Link(Stream(far_link, "far link"), SERVER)
        for sender, kind in ((CLIENT, HELLO), (SERVER, WELCOME), (SERVER, START), (CLIENT, READY)):
            for one in (self.link, self.far):
                (one.machine.send if one.machine.role == sender else one.machine.receive)(kind)
        self.stream = Stream(stream, "stream")
        self.splice = Splice("1", "test", self.stream, self.link)
        self.done = threading.Event()
        self.threads.start(self._run)

    def _run(self) -> None:
        self.splice.run(self.threads)
        self.stream.close()
        if self.link.machine.state != tcprelay.IDLE:
            self.link.close()
        self.done.set()

    def close(self) -> None:
        self.splice.break_off("the test is over", force=True, close_link=True)
        assert self.done.wait(PATIENCE)
        self.link.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    with ExitStack() as stack:
        made = Rig(stack)
        stack.callback(made.close)
        yield made


def test_bulk_and_small_mixed_arrive_in_order(rig: Rig) -> None:
    """Pieces of all sizes, through copying and through the kernel's pipe, both ways at once."""
    rng = random.Random(7)
    pieces = [rng.randbytes(rng.choice([1, 7, 1023, 1024, 4096, 16384, 65536, 300_000])) for _ in range(200)]
    whole = b"".join(pieces)
    results: dict[str, bytes] = {}

    def read_link() -> None:
        data = bytearray()
        view = memoryview(bytearray(100_000))
        while count := rig.far.recv_into(view):
            data += view[:count]
        results["link"] = bytes(data)

    def write_link() -> None:
        for piece in pieces:
            rig.far.send_buffer(memoryview(bytearray(4) + piece), len(piece))
        rig.far.end()

    def write_stream() -> None:
        for piece in pieces:
            rig.far_stream.sendall(piece)
        rig.far_stream.shutdown(socket.SHUT_WR)

    threads = [threading.Thread(target=f) for f in (read_link, write_link, write_stream)]
    for thread in threads:
        thread.start()
    results["stream"] = read_all(rig.far_stream)
    for thread in threads:
        thread.join(PATIENCE)
    assert hashlib.sha256(results["stream"]).digest() == hashlib.sha256(whole).digest()
    assert hashlib.sha256(results["link"]).digest() == hashlib.sha256(whole).digest()
    assert rig.done.wait(PATIENCE)
    assert (rig.splice.to_link, rig.splice.from_link, rig.splice.reason) == (len(whole), len(whole), "")
    assert rig.link.machine.state == tcprelay.IDLE


def test_large_frames_cut_anywhere(rig: Rig) -> None:
    """Frames larger than any buffer, sent in segments that end wherever they like, headers split too."""
    rng = random.Random(3)
    data = rng.randbytes(6_000_000)
    wire = bytearray()
    start = 0
    while start < len(data):
        size = rng.choice([1, 100, 20_000, 70_000, 1_000_000])
        piece = data[start : start + size]
        wire += encode_header(DATA, len(piece)) + piece
        start += size
    wire += encode_frame(END)

    def write() -> None:
        place = 0
        while place < len(wire):
            size = rng.choice([1, 3, 5, 1000, 65536, 200_000])
            rig.far.stream.send(wire[place : place + size])
            place += size
        rig.far.machine.send(END)

    writer = threading.Thread(target=write)
    writer.start()
    got = read_all(rig.far_stream)
    writer.join(PATIENCE)
    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("cut", [4, 5, 70_000])
def test_a_bulk_frame_cut_short_is_no_end(rig: Rig, cut: int) -> None:
    """A link that is lost inside a frame, even inside a spliced one, resets the stream."""
    rig.far.stream.send(encode_header(DATA, MAX_DATA) + bytes(200_000))
    wait_until(lambda: rig.splice.from_link == 200_000)
    rig.far.stream.send(bytes(cut))
    wait_until(lambda: rig.splice.from_link == 200_000 + cut)
    rig.far.stream.complete()
    rig.far.close()
    with pytest.raises(ConnectionResetError):
        read_all(rig.far_stream)
    assert rig.done.wait(PATIENCE)
    assert rig.splice.reason == "link: the link was lost"


def test_without_a_pipe_bytes_are_copied(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of descriptors, bulk traffic goes on without the pipe."""

    def no_pipe() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pipe", no_pipe)
    data = random.Random(1).randbytes(3_000_000)
    rig.far.send_buffer(memoryview(bytearray(4) + data), len(data))
    rig.far.end()
    assert read_all(rig.far_stream) == data


def test_a_flood_after_abort_costs_the_link(rig: Rig) -> None:
    """A side that does not stop sending although the other broke off loses the link instead of being drained."""
    rig.far_stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, tcprelay.RESET_ON_CLOSE)
    rig.far_stream.close()
    data = memoryview(bytearray(4) + bytes(65536))
    with pytest.raises(OSError):
        for _ in range(1000):
            rig.far.send_buffer(data, 65536)
    assert rig.done.wait(PATIENCE)


def test_waking_a_receiver_sends_nothing() -> None:
    """A blocked receive returns, and the peer sees no end."""
    near, far = tcp_pair()
    with near, far:
        stream = Stream(near, "near")
        threads = Threads()
        result: list[int] = []
        threads.start(lambda: result.append(stream.recv_into(memoryview(bytearray(1)))))
        while not result:
            stream.wake(force=True)
        assert result == [0]
        far.settimeout(0.2)
        with pytest.raises(TimeoutError):
            far.recv(1)
        threads.end(Deadline(PATIENCE))


def test_waking_a_sender_lets_no_end_be_seen() -> None:
    """A blocked send gives up, and nothing is sent that could be taken for an end: the peer comes to an RST."""
    near, far = tcp_pair()
    with far:
        stream = Stream(near, "near")
        threads = Threads()
        result: list[OSError] = []

        def fill() -> None:
            try:
                while True:
                    stream.send(bytes(65536))
            except OSError as error:
                result.append(error)

        threads.start(fill)
        last = -1
        while last != (last := tcprelay.unsent_bytes(near)) or not last:
            time.sleep(0.3)  # until nothing moves any more, although blocked sends look again
        assert not result
        stream.wake(force=True)
        wait_until(lambda: result)
        far.settimeout(0.3)
        with pytest.raises(TimeoutError):
            read_all(far)  # all that was sent, and no end
        stream.reset_on_close()
        stream.close()
        with pytest.raises(ConnectionResetError):
            read_all(far)
        threads.end(Deadline(PATIENCE))


def test_flush_waits_for_what_was_sent() -> None:
    """Bytes that the peer has yet to take are not discarded by the RST that follows."""
    near, far = tcp_pair()
    with far:
        stream = Stream(near, "near")
        near.setblocking(False)
        sent = 0
        try:
            while True:
                sent += near.send(bytes(65536))
        except BlockingIOError:
            pass
        got = bytearray()

        def read() -> None:
            try:
                while piece := far.recv(65536):
                    got.extend(piece)
            except ConnectionResetError:
                got.extend(b"reset")

        reader = threading.Thread(target=read)
        reader.start()
        stream.flush(PATIENCE)
        stream.close()
        reader.join(PATIENCE)
        assert len(got) == sent + 5
        assert got.endswith(b"reset")


def test_flush_gives_up_on_a_peer_that_has_gone() -> None:
    """Where the peer has reset the connection, or reads nothing, flushing ends."""
    near, far = tcp_pair()
    stream = Stream(near, "near")
    near.setblocking(False)
    try:
        while True:
            near.send(bytes(65536))
    except BlockingIOError:
        pass
    began = time.monotonic()
    stream.flush(0.2)
    assert 0.2 <= time.monotonic() - began < 2
    far.close()
    began = time.monotonic()
    stream.flush(PATIENCE)
    assert time.monotonic() - began < PATIENCE / 2
    stream.close()


def test_a_finished_splice_no_longer_touches_its_link(rig: Rig) -> None:
    """Breaking off a connection that is over does nothing: the link may be carrying another one."""
    rig.far.end()
    rig.far_stream.shutdown(socket.SHUT_WR)
    assert rig.done.wait(PATIENCE)
    rig.splice.break_off("too late", force=True, close_link=True)
    assert rig.splice.reason == ""
    rig.far.receive(Deadline(PATIENCE))
    rig.far.send(tcprelay.PING)
    assert rig.link.receive(Deadline(PATIENCE)).kind == tcprelay.PING


def test_a_reset_is_seen_although_the_pump_is_blocked(rig: Rig) -> None:
    """The stream is reset while its pump is stuck in a send to the link: the sweep breaks the connection off."""
    rig.far_stream.settimeout(0.3)
    try:
        while True:
            rig.far_stream.sendall(bytes(65536))  # nobody reads the link
    except TimeoutError:
        pass
    rig.far_stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, tcprelay.RESET_ON_CLOSE)
    rig.far_stream.close()
    splices = Splices(10, 0, 0)
    splices.add(rig.splice)

    def broken() -> str:
        splices.sweep()
        return rig.splice.reason

    wait_until(broken)
    assert rig.splice.reason == "stream: connection lost"


def test_an_unstarted_pump_is_an_error(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a second thread the connection is broken off, and nobody waits for it."""
    near, far = tcp_pair()
    with far:
        stream = Stream(near, "near")
        link, far_link = socket.socketpair()
        far_link.close()
        splice = Splice("2", "test", stream, Stream(link, "link"))
        monkeypatch.setattr(rig.threads, "start", no_thread)
        splice.run(rig.threads)
        assert splice.reason == "cannot start a thread"
        stream.close()
        splice.link.close()
        with pytest.raises(ConnectionResetError):
            far.recv(1)


def no_thread(*_: object) -> None:
    raise RuntimeError("cannot start a thread")


def test_an_end_after_an_rst_is_not_believed() -> None:
    """Another thread's send has taken the error of the RST: a receive then gives 0, and that is no end."""
    near, far = tcp_pair()
    stream = Stream(near, "near")
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, tcprelay.RESET_ON_CLOSE)
    far.close()
    wait_until(lambda: near.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))  # takes it
    assert near.recv(1) == b""
    with pytest.raises(ConnectionResetError):
        stream.recv_into(memoryview(bytearray(1)))
    with pytest.raises(ConnectionResetError):
        stream.recv_now(memoryview(bytearray(1)))
    stream.close()


def test_urgent_data_is_no_end(rig: Rig) -> None:
    """A byte out of band in the midst of bulk traffic stops the kernel's splice for a moment, not the direction."""
    data = random.Random(4).randbytes(3_000_000)

    def write() -> None:
        rig.far_stream.sendall(data[:2_000_000])
        rig.far_stream.send(b"!", socket.MSG_OOB)
        rig.far_stream.sendall(data[2_000_000:])
        rig.far_stream.shutdown(socket.SHUT_WR)

    writer = threading.Thread(target=write)
    writer.start()
    got = bytearray()
    view = memoryview(bytearray(100_000))
    while count := rig.far.recv_into(view):
        got += view[:count]
    writer.join(PATIENCE)
    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
    rig.far.end()


def test_the_sweep_meets_connections_that_have_just_ended() -> None:
    """Their sockets are closed when it comes to them, whatever it looks at."""
    with ExitStack() as stack:
        pairs = [tcp_pair() for _ in range(4)]
        splices = Splices(10, idle_timeout=100.0, half_close_timeout=100.0)
        for number, ended in enumerate(((False, False), (True, False))):
            stream, link = Stream(pairs[2 * number][0], "stream"), Stream(pairs[2 * number + 1][0], "link")
            splice = Splice("1", "test", stream, link)
            splice.to_link_ended, splice.from_link_ended = ended
            splices.add(splice)
        for pair in pairs:
            for sock in pair:
                stack.callback(sock.close)
                sock.close()
        splices.sweep()
        assert len(splices) == 2
