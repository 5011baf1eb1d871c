"""Streams, links and pumps over real TCP connections, without a server or a client around them."""

from __future__ import annotations

import errno
import fcntl
import gc
import hashlib
import os
import random
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from unittest.mock import Mock

import pytest

from _tcprelay.link import Link, RawLink
from _tcprelay.protocol import (
    CLIENT, DATA, END, HELLO, IDLE, MAX_DATA, PING, READY, SERVER, START, WELCOME, encode_frame, encode_header,
)  # fmt: skip
from _tcprelay.pump import LARGE_BUFFER, SMALL_BUFFER, SPARSE_READS, Queue
from _tcprelay.server.clients import ServiceClient
from _tcprelay.sockets import listen
from _tcprelay.splice import Splice
from _tcprelay.streams import PIPE_SIZE, Stream
from _tcprelay.tcp import (
    NEAR, RESET_ON_CLOSE, UNSENT, hold_little, is_held_back, is_near, limit_unsent, path_is_dead, round_trip, say_path,
    unsent_bytes,
)  # fmt: skip
from _tcprelay.threads import Threads
from _tcprelay.tls import LARGE_TLS_BUFFER
from _tcprelay.waiting import Deadline
from _tcprelay.watch import Splices

from .conftest import PATIENCE, read_all, read_exactly, replace, wait_until
from .ends import send_data, send_end
from .wire import Way, Wire


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection; a deadline on the second one, which the test uses."""
    [listener] = listen("127.0.0.1", 0)
    with listener:
        listener.setblocking(True)
        far = socket.create_connection(listener.getsockname(), PATIENCE)
        near, _ = listener.accept()
    return near, far


class Rig:
    """A splice between a stream and a link, and the far ends of both."""

    def __init__(self, stack: ExitStack, start: bool = True) -> None:
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
        if start:
            self.start()

    def start(self) -> None:
        self.threads.start(self._run)

    def _run(self) -> None:
        self.splice.run(self.threads)
        self.stream.close()
        if self.link.machine.state != IDLE:
            self.link.close()
        self.done.set()

    def close(self) -> None:
        self.splice.break_off("the test is over", hurry=True, close_link=True)
        assert self.done.wait(PATIENCE)
        self.link.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    with ExitStack() as stack:
        made = Rig(stack)
        stack.callback(made.close)
        yield made


@pytest.fixture
def later_rig() -> Iterator[Rig]:
    """One that the test starts."""
    with ExitStack() as stack:
        made = Rig(stack, start=False)
        stack.callback(made.close)
        yield made


@pytest.fixture
def long_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    """The opening exchange does not end because of the time."""
    replace(monkeypatch, "OPENING_TIME", 6 * PATIENCE)


def receive(link: Link) -> bytes:
    """What comes in on a link, to the end of its connection."""
    data = bytearray()
    view = memoryview(bytearray(100_000))
    while count := link.recv_into(view):
        data += view[:count]
    return bytes(data)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    sock.close()


@pytest.mark.parametrize("first", ["stream", "link"])
def test_a_short_connection_needs_one_thread(rig: Rig, first: str, long_opening: None) -> None:
    """A question, an answer and both ends, whoever speaks first: nothing is started, and all is as it should be."""
    view = memoryview(bytearray(100))
    if first == "stream":
        rig.far_stream.sendall(b"question")
        assert rig.far.recv_into(view) == 8
        send_data(rig.far, b"answer")
        assert read_exactly(rig.far_stream, 6) == b"answer"
        rig.far_stream.shutdown(socket.SHUT_WR)
        assert rig.far.recv_into(view) == 0
        send_end(rig.far)
        assert read_all(rig.far_stream) == b""
    else:
        send_data(rig.far, b"question")
        send_end(rig.far)
        assert read_all(rig.far_stream) == b"question"
        rig.far_stream.sendall(b"answer")
        rig.far_stream.shutdown(socket.SHUT_WR)
        assert receive(rig.far) == b"answer"
    assert rig.done.wait(PATIENCE)
    assert len(rig.threads) == 1
    assert sorted([rig.splice.to_link.carried, rig.splice.from_link.carried]) == [6, 8]
    assert rig.splice.reason == ""
    assert rig.link.machine.state == rig.far.machine.state == IDLE


def test_bytes_and_end_leave_together(later_rig: Rig, long_opening: None) -> None:
    """What ends with its first bytes wakes the other side once, on the link and on the stream."""
    rig = later_rig
    rig.far_stream.sendall(b"answer")
    rig.far_stream.shutdown(socket.SHUT_WR)
    rig.far.stream.send(encode_header(DATA, 8) + b"question" + encode_frame(END))
    rig.far.machine.send(END)
    poller = select.poll()
    poller.register(rig.far_stream, select.POLLIN | select.POLLRDHUP)
    rig.start()
    [(_, events)] = poller.poll(PATIENCE * 1000)
    assert events == select.POLLIN | select.POLLRDHUP | select.POLLHUP
    assert rig.done.wait(PATIENCE)
    assert read_all(rig.far_stream) == b"question"
    told = encode_header(DATA, 6) + b"answer" + encode_frame(END, {"passed": 8})
    assert rig.far.sock.recv(1000) == told
    rig.far.machine.receive(END)


def test_bytes_that_the_link_holds_already(later_rig: Rig, long_opening: None) -> None:
    """They came in behind START or READY, and poll does not tell of them."""
    rig = later_rig
    send_data(rig.far, b"question")
    rig.link._end += rig.link.stream.recv_into(rig.link._space())
    rig.start()
    assert read_exactly(rig.far_stream, 8) == b"question"


@pytest.mark.parametrize("ended", ["stream", "link"])
def test_one_direction_goes_on_in_the_same_thread(rig: Rig, ended: str) -> None:
    """Where the opening exchange has seen one end, the rest is carried without a second thread."""
    data = random.Random(5).randbytes(3_000_000)
    if ended == "stream":
        rig.far_stream.shutdown(socket.SHUT_WR)
        assert receive(rig.far) == b""
        send_data(rig.far, data)
        send_end(rig.far)
        assert read_all(rig.far_stream) == data
    else:
        send_end(rig.far)
        assert read_all(rig.far_stream) == b""

        def write() -> None:
            rig.far_stream.sendall(data)
            rig.far_stream.shutdown(socket.SHUT_WR)

        writer = threading.Thread(target=write)
        writer.start()
        assert receive(rig.far) == data
        writer.join(PATIENCE)
    assert rig.done.wait(PATIENCE)
    assert (len(rig.threads), rig.splice.reason) == (1, "")


def test_what_goes_on_is_carried_by_two_threads(rig: Rig) -> None:
    """A connection that is no longer young gets its second thread without having to send anything."""
    send_data(rig.far, b"greeting")
    assert read_exactly(rig.far_stream, 8) == b"greeting"
    wait_until(lambda: len(rig.threads) == 2)
    rig.far_stream.sendall(b"answer")
    rig.far_stream.shutdown(socket.SHUT_WR)
    assert receive(rig.far) == b"answer"
    send_end(rig.far)
    assert read_all(rig.far_stream) == b""


def test_what_the_opening_exchange_could_not_send(later_rig: Rig, long_opening: None) -> None:
    """Both sides send before either reads: the second thread comes at once, and not a byte is lost or sent twice."""
    rig = later_rig
    for sock in (rig.stream.sock, rig.link.sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    one, other = random.Random(1).randbytes(40_000), random.Random(2).randbytes(40_000)

    def write_stream() -> None:
        rig.far_stream.sendall(one)
        rig.far_stream.shutdown(socket.SHUT_WR)

    def write_link() -> None:
        for start in range(0, len(other), 1000):
            send_data(rig.far, other[start : start + 1000])
        send_end(rig.far)

    for sock in (rig.far_stream, rig.far.sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    writers = [threading.Thread(target=f) for f in (write_stream, write_link)]
    for writer in writers:
        writer.start()
    rig.start()
    wait_until(lambda: len(rig.threads) == 2)
    assert read_all(rig.far_stream) == other
    assert receive(rig.far) == one
    for writer in writers:
        writer.join(PATIENCE)
    assert rig.done.wait(PATIENCE)
    assert (rig.splice.to_link.carried, rig.splice.from_link.carried, rig.splice.reason) == (len(one), len(other), "")


@pytest.mark.parametrize("end", [True, False])
def test_bytes_and_end_that_did_not_fit_are_sent_later(later_rig: Rig, end: bool, long_opening: None) -> None:
    """The socket takes a part of the last bytes: the rest, and END, go out when the other side reads."""
    rig = later_rig
    rig.link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
    data = random.Random(3).randbytes(16_000)
    rig.far_stream.sendall(data)
    if end:
        rig.far_stream.shutdown(socket.SHUT_WR)
    sent, real = [], rig.link.stream.send_now

    def send_a_part(data: bytearray, end_follows: bool = False) -> bool:
        piece = data[:100]
        del data[:100]
        sent.append(real(piece))
        return False

    rig.link.stream.send_now = send_a_part  # type: ignore[method-assign]
    rig.start()
    wait_until(lambda: sent)
    got = bytearray()
    view = memoryview(bytearray(100_000))
    while len(got) < len(data):
        got += view[: rig.far.recv_into(view)]
    assert got == data
    if not end:
        rig.far_stream.shutdown(socket.SHUT_WR)
    assert receive(rig.far) == b""
    send_end(rig.far)
    assert rig.done.wait(PATIENCE)
    assert (rig.splice.to_link.carried, rig.splice.said_end, rig.splice.reason) == (len(data), True, "")
    assert rig.link.machine.state == IDLE


def test_breaking_off_ends_the_opening_exchange(rig: Rig, long_opening: None) -> None:
    """Its poll returns, the stream is reset, and the other relay is told why."""
    send_data(rig.far, b"greeting")
    assert read_exactly(rig.far_stream, 8) == b"greeting"
    splices = Splices(0.2, 0)
    splices.add(rig.splice)
    sweep_until_broken(splices)
    with pytest.raises(ConnectionAbortedError, match=r"idle for 0\.2 s"):
        receive(rig.far)
    rig.far.abort("so be it")
    assert rig.done.wait(PATIENCE)
    with pytest.raises(ConnectionResetError):
        rig.far_stream.recv(1)
    assert rig.link.machine.state == IDLE


def test_a_link_that_is_to_be_closed_ends_the_opening_exchange(rig: Rig, long_opening: None) -> None:
    """At the end of the relay nobody answers ABORT any more."""
    send_data(rig.far, b"greeting")
    assert read_exactly(rig.far_stream, 8) == b"greeting"
    rig.splice.break_off("ending", hurry=True, close_link=True)
    assert rig.done.wait(PATIENCE)
    with pytest.raises(ConnectionResetError):
        rig.far_stream.recv(1)


def test_bytes_before_a_reset_in_the_opening_exchange(later_rig: Rig, long_opening: None) -> None:
    """They arrive, and then ABORT; the link is used again."""
    rig = later_rig
    rig.far_stream.sendall(b"last words")
    wait_until(lambda: unsent_bytes(rig.far_stream) == 0)
    reset(rig.far_stream)
    rig.start()
    view = memoryview(bytearray(100))
    assert rig.far.recv_into(view) == 10
    with pytest.raises(ConnectionAbortedError, match="stream: connection reset by peer"):
        rig.far.recv_into(view)
    send_end(rig.far)
    assert rig.done.wait(PATIENCE)
    assert (rig.splice.to_link.carried, rig.splice.said_end) == (10, False)
    assert rig.link.machine.state == IDLE


def test_an_abort_after_our_end_leaves_the_link_whole(rig: Rig) -> None:
    """Who has sent it uses the link again at once, and knows: nothing is left to be said by closing it."""
    rig.far_stream.shutdown(socket.SHUT_WR)
    assert receive(rig.far) == b""
    rig.far.abort("broken off")
    with pytest.raises(ConnectionResetError):
        rig.far_stream.recv(1)
    assert rig.done.wait(PATIENCE)
    assert rig.splice.reason == "link: broken off"
    rig.far.send(PING)
    assert rig.link.receive(Deadline(PATIENCE)).kind == PING


def test_a_link_lost_in_the_opening_exchange(later_rig: Rig, long_opening: None) -> None:
    """What came before arrives, and then an RST, never an end."""
    rig = later_rig
    send_data(rig.far, b"last words")
    rig.far.stream.close_normally()
    rig.far.close()
    rig.start()
    assert read_exactly(rig.far_stream, 10) == b"last words"
    with pytest.raises(ConnectionResetError):
        rig.far_stream.recv(1)
    assert rig.done.wait(PATIENCE)
    assert rig.splice.reason == "link: the link was lost"


@pytest.mark.parametrize("broken", [None, "stream", "link"])
def test_the_opening_exchange_on_the_raw_wire(broken: str | None, long_opening: None) -> None:
    """Bytes, ends and errors pass without frames, too, in one thread."""
    near, far = tcp_pair()
    near_link, far_link = tcp_pair()
    stream, link = Stream(near, "stream"), RawLink(Stream(near_link, "link"))
    splice, threads = Splice("1", "test", stream, link), Threads()

    def run() -> None:
        splice.run(threads)
        stream.close()
        link.close()

    with far, far_link:
        threads.start(run)
        far.sendall(b"question")
        assert read_exactly(far_link, 8) == b"question"
        if broken:
            one, other = (far, far_link) if broken == "stream" else (far_link, far)
            reset(one)
            with pytest.raises(ConnectionResetError):
                other.recv(1)
        else:
            far.shutdown(socket.SHUT_WR)
            assert read_all(far_link) == b""
            far_link.sendall(b"answer")
            far_link.shutdown(socket.SHUT_WR)
            assert read_all(far) == b"answer"
            assert len(threads) == 1
        threads.end(Deadline(PATIENCE))
    assert splice.reason == (f"{broken}: connection reset by peer" if broken else "")


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
            send_data(rig.far, piece)
        send_end(rig.far)

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
    assert (rig.splice.to_link.carried, rig.splice.from_link.carried, rig.splice.reason) == (len(whole), len(whole), "")
    assert rig.link.machine.state == IDLE


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
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_all, rig.far_stream)
        rig.far.stream.send(encode_header(DATA, MAX_DATA) + bytes(200_000))
        wait_until(lambda: rig.splice.from_link.carried == 200_000)
        rig.far.stream.send(bytes(cut))
        wait_until(lambda: rig.splice.from_link.carried == 200_000 + cut)
        rig.far.stream.close_normally()
        rig.far.close()
        with pytest.raises(ConnectionResetError):
            reading.result()
    assert rig.done.wait(PATIENCE)
    assert rig.splice.reason == "link: the link was lost"


def test_without_a_pipe_bytes_are_copied(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of descriptors, bulk traffic goes on without the pipe."""

    def no_pipe() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pipe", no_pipe)
    data = random.Random(1).randbytes(3_000_000)
    send_data(rig.far, data)
    send_end(rig.far)
    assert read_all(rig.far_stream) == data


def test_a_flood_after_abort_costs_the_link(rig: Rig) -> None:
    """A side that does not stop sending although the other broke off loses the link instead of being drained."""
    rig.far_stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    rig.far_stream.close()
    with pytest.raises(OSError):
        for _ in range(1000):
            send_data(rig.far, bytes(65536))
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
            stream.wake()
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
        while last != (last := unsent_bytes(near)) or not last:
            time.sleep(0.3)  # until nothing moves any more, although blocked sends look again
        assert not result
        stream.hurry()
        stream.wake()
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
    send_end(rig.far)
    rig.far_stream.shutdown(socket.SHUT_WR)
    assert rig.done.wait(PATIENCE)
    rig.splice.break_off("too late", hurry=True, close_link=True)
    assert rig.splice.reason == ""
    rig.far.receive(Deadline(PATIENCE))
    rig.far.send(PING)
    assert rig.link.receive(Deadline(PATIENCE)).kind == PING


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


def test_an_unstarted_pump_is_an_error(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a second thread the connection is broken off, and nobody waits for it."""
    near, far = tcp_pair()
    with far:
        stream = Stream(near, "near")
        link, far_link = socket.socketpair()
        splice = Splice("2", "test", stream, RawLink(Stream(link, "link")))
        monkeypatch.setattr(rig.threads, "start", no_thread)
        splice.run(rig.threads)
        assert splice.reason == "cannot start a thread"
        stream.close()
        splice.link.close()
        far_link.close()
        with pytest.raises(ConnectionResetError):
            far.recv(1)


def no_thread(*_: object) -> None:
    raise RuntimeError("cannot start a thread")


def test_an_end_after_an_rst_is_not_believed() -> None:
    """Another thread's send has taken the error of the RST: a receive then gives 0, and that is no end."""
    near, far = tcp_pair()
    stream = Stream(near, "near")
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    far.close()
    wait_until(lambda: near.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))  # takes it
    assert near.recv(1) == b""
    with pytest.raises(ConnectionResetError):
        stream.recv_into(memoryview(bytearray(1)))
    with pytest.raises(ConnectionResetError):
        stream.recv_now(memoryview(bytearray(1)))
    stream.close()


def test_an_end_after_an_rst_is_not_believed_in_another_worker_either() -> None:
    """What was read before the service client was passed on counts."""
    near, far = tcp_pair()
    far.sendall(b"early")
    assert near.recv(5, socket.MSG_PEEK) == b"early"
    first = ServiceClient("default", near, far.getsockname())
    first.read_early()
    assert first.early == b"early"
    again = ServiceClient("default", near, far.getsockname())
    state = {"waited": 0.0, "queued": True, **first.state}
    again.resume(state, bytes(first.early))
    reset(far)
    wait_until(lambda: near.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))  # takes it
    with pytest.raises(ConnectionResetError):
        again.stream.recv_now(memoryview(bytearray(1)))
    near.close()


def test_urgent_data_is_no_end(rig: Rig) -> None:
    """An urgent byte in the midst of bulk traffic stops the kernel's splice for a moment, not the direction; it is
    passed on in its place, as an ordinary one."""
    data = random.Random(4).randbytes(3_000_000)

    def write() -> None:
        rig.far_stream.sendall(data[:2_000_000])
        rig.far_stream.send(data[2_000_000:2_000_001], socket.MSG_OOB)
        rig.far_stream.sendall(data[2_000_001:])
        rig.far_stream.shutdown(socket.SHUT_WR)

    writer = threading.Thread(target=write)
    writer.start()
    got = bytearray()
    view = memoryview(bytearray(100_000))
    while count := rig.far.recv_into(view):
        got += view[:count]
    writer.join(PATIENCE)
    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
    send_end(rig.far)


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


class Greeting:
    """A splice between two streams that begins with a greeting to the second one."""

    def __init__(self, stack: ExitStack) -> None:
        near, self.far_stream = tcp_pair()
        link, self.far_link = tcp_pair()
        stack.callback(self.far_stream.close)
        stack.callback(self.far_link.close)
        self.stream = Stream(near, "stream")
        self.splice = Splice("1", "test", self.stream, RawLink(Stream(link, "link")), b"hello ")
        self.threads, self.done = Threads(), threading.Event()
        stack.callback(self.close)

    def start(self) -> None:
        self.threads.start(self._run)

    def _run(self) -> None:
        self.splice.run(self.threads)
        for leg in (self.stream, self.splice.link):
            leg.close()
        self.done.set()

    def close(self) -> None:
        self.splice.break_off("the test is over", hurry=True)
        assert self.done.wait(PATIENCE)
        self.threads.end(Deadline(PATIENCE))


@pytest.fixture
def greeting() -> Iterator[Greeting]:
    with ExitStack() as stack:
        yield Greeting(stack)


def test_a_greeting_goes_with_the_first_bytes(greeting: Greeting) -> None:
    """In one message: the other side is woken once."""
    greeting.far_stream.sendall(b"banner")
    wait_until(lambda: bytes_waiting(greeting.stream.sock) == 6)
    greeting.start()
    assert greeting.far_link.recv(100) == b"hello banner"


def test_a_greeting_does_not_wait_for_long(greeting: Greeting, long_opening: None) -> None:
    """Nobody else need say a word first."""
    greeting.start()
    assert greeting.far_link.recv(100) == b"hello "
    greeting.far_stream.sendall(b"world")
    assert greeting.far_link.recv(100) == b"world"


def test_a_greeting_is_not_put_off(greeting: Greeting, long_opening: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much there is to read from the link meanwhile."""
    link = greeting.splice.link.fd

    class Busy:
        """A poll for which the link is ready each time, and nothing else."""

        def register(self, fd: int, events: int) -> None:
            pass

        def poll(self, timeout: float) -> list[tuple[int, int]]:
            return [(link, select.POLLIN)]

    monkeypatch.setattr(select, "poll", Busy)
    greeting.start()
    assert greeting.far_link.recv(100) == b"hello "
    monkeypatch.undo()


@pytest.mark.parametrize("how", ["end", "error"])
def test_a_greeting_goes_before_an_end_or_an_error(greeting: Greeting, how: str) -> None:
    """Also where the stream has said nothing else."""
    if how == "end":
        greeting.far_stream.shutdown(socket.SHUT_WR)
    else:
        reset(greeting.far_stream)
    greeting.start()
    assert read_exactly(greeting.far_link, 6) == b"hello "
    if how == "end":
        assert greeting.far_link.recv(1) == b""
    else:
        with pytest.raises(ConnectionResetError):
            greeting.far_link.recv(1)


def test_nothing_follows_a_frame_that_was_cut_short(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a link fails in the midst of a frame, an ABORT would be taken for bytes of the connection."""
    real, data, sent = os.splice, random.Random(10).randbytes(3_000_000), list[int]()

    def splice(source: int, sink: int, count: int) -> int:
        if sink == rig.link.fd:
            sent.append(count)
            if len(sent) > 1:
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            count = 1000
        return real(source, sink, count)

    monkeypatch.setattr(os, "splice", splice)
    rig.far.sock.settimeout(PATIENCE)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(rig.far_stream.sendall, data)
        got, view = bytearray(), memoryview(bytearray(1 << 20))
        with pytest.raises(ConnectionResetError):
            while count := rig.far.recv_into(view):
                got += view[:count]
        rig.far.close()
        wait((writing,))
    assert len(sent) == 2
    assert got == data[: len(got)]
    assert rig.done.wait(PATIENCE)
    assert rig.splice.reason == f"link: {os.strerror(errno.ENOMEM).lower()}"


@pytest.mark.parametrize(("count", "largest"), [(5_000, 2048), (30_000, 131_072), (3_000_000, LARGE_TLS_BUFFER)])
def test_a_pump_gives_its_large_buffer_back(
    later_rig: Rig, monkeypatch: pytest.MonkeyPatch, count: int, largest: int
) -> None:
    """When bulk traffic is over it is at home on its processor again, and costs what a small one does."""
    rig, sizes, moves = later_rig, list[int](), list[str]()
    rig.stream.spliceable = False  # as with TLS
    rig.stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    real = rig.stream.recv_into

    def recv_into(view: memoryview) -> int:
        sizes.append(len(view))
        return real(view)

    monkeypatch.setattr(rig.stream, "recv_into", recv_into)
    replace(monkeypatch, "roam", lambda: moves.append("roam"))
    replace(monkeypatch, "go_home", lambda: moves.append("home"))
    replace(monkeypatch, "OPENING_BYTES", 2048)
    bulk = random.Random(9).randbytes(count)
    writer = threading.Thread(target=rig.far_stream.sendall, args=(bulk,))
    writer.start()
    wait_until(lambda: bytes_waiting(rig.stream.sock) >= min(count, 200_000))
    rig.start()
    view, got = memoryview(bytearray(len(bulk))), 0
    while got < len(bulk):
        got += rig.far.recv_into(view[got:])
    assert view == bulk
    wait_until(lambda: largest in sizes)
    assert ("roam" in moves) == (largest == LARGE_TLS_BUFFER)
    writer.join(PATIENCE)
    for _ in range(SPARSE_READS):
        rig.far_stream.sendall(b"!")
        assert rig.far.recv_into(view) == 1
    wait_until(lambda: sizes[-1] == SMALL_BUFFER)
    assert moves in ([], ["roam", "home"])


@pytest.mark.parametrize("spliceable", [True, False])
def test_little_waits_for_a_sink_that_does_not_read(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, spliceable: bool
) -> None:
    """What a relay takes ahead of a slow peer is a queue for all that this one says next."""
    rig.stream.spliceable = rig.link.spliceable = spliceable
    sizes: list[int] = []
    real_splice, real_receive = os.splice, rig.stream.recv_into

    def splice(source: int, sink: int, count: int) -> int:
        if source == rig.stream.fd:
            sizes.append(count)
        return real_splice(source, sink, count)

    def recv_into(view: memoryview) -> int:
        sizes.append(len(view))
        return real_receive(view)

    monkeypatch.setattr(os, "splice", splice)
    monkeypatch.setattr(rig.stream, "recv_into", recv_into)
    limit_unsent(rig.link.sock)
    rig.far_stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
    rig.far_stream.settimeout(0.5)
    taken = 0
    with pytest.raises(TimeoutError):
        while True:
            taken += rig.far_stream.send(bytes(1 << 16))
    assert taken > UNSENT
    assert taken < 3_000_000  # without bounds 8 to 13
    assert sizes[sizes.index(LARGE_BUFFER) :].index(UNSENT) <= 2, "bulk traffic begins with little"
    rig.far_stream.settimeout(PATIENCE)
    rig.far_stream.shutdown(socket.SHUT_WR)
    view, got = memoryview(bytearray(1 << 16)), 0
    while count := rig.far.recv_into(view):
        got += count
    assert got == taken


def unsent_limit(sock: socket.socket) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)


def is_held(sock: socket.socket) -> bool:
    """Whether its receive buffer is locked: SO_BUF_LOCK, SOCK_RCVBUF_LOCK."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, 72) & 2)


@pytest.fixture
def held_queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Queue, socket.socket, socket.socket, list[float]]]:
    """A queue whose source is near and is to hold little; its source and its sink, and the time, which stands still."""
    sink, far_sink = tcp_pair()
    source, far_source = tcp_pair()
    with sink, far_sink, source, far_source:
        try:
            source.getsockopt(socket.SOL_SOCKET, 72)
        except OSError:
            pytest.skip("before Linux 5.14 receive buffers cannot be given back to the system")
        hold_little(source)
        assert is_held(source)
        limit_unsent(sink)
        now = [100.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        yield Queue(source, sink), source, sink, now


HeldQueue = tuple[Queue, socket.socket, socket.socket, list[float]]


def test_a_queue_is_bounded_by_what_its_sink_takes(held_queue: HeldQueue) -> None:
    """In a tenth of a second; by nothing where that is a lot, and by little again in the end."""
    queue, source, sink, now = held_queue
    sink.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            sink.send(bytes(1 << 16))
    assert queue.bound == UNSENT == unsent_limit(sink)
    for seconds, count, bound in (
        (0.05, 200_000, UNSENT),  # too early to say
        (0.15, 600_000, 400_000),
        (0.2, 600_000, 400_000),  # near enough
        (0.2, 200_000, 100_000),
        (10.0, 100_000, UNSENT),
    ):
        now[0] += seconds
        queue.sent(count)
        assert queue.bound == unsent_limit(sink) == pytest.approx(bound, rel=0.01)
        assert is_held(source)
    now[0] += 0.001
    queue.sent(1 << 20)
    assert queue.bound == PIPE_SIZE
    assert unsent_limit(sink) == 0
    assert not is_held(source)
    queue.release()
    assert unsent_limit(sink) == UNSENT


def test_a_near_source_that_is_slower_than_its_sink_gets_its_window(held_queue: HeldQueue) -> None:
    """It may have become farther than it was at its handshake."""
    queue, source, _, now = held_queue
    now[0] += 0.2
    queue.sent(1000)
    assert not is_held(source)


@pytest.mark.parametrize("spliceable", [True, False])
def test_bulk_traffic_may_take_what_its_sink_takes(rig: Rig, monkeypatch: pytest.MonkeyPatch, spliceable: bool) -> None:
    """And in the end the sink is as it was."""
    rig.stream.spliceable = rig.link.spliceable = spliceable
    limits: list[tuple[socket.socket, int]] = []
    replace(monkeypatch, "limit_unsent", lambda sock, most=UNSENT: limits.append((sock, most)))
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(send_and_end, rig.far_stream, bytes(20_000_000))
        got, view = 0, memoryview(bytearray(1 << 20))
        while count := rig.far.recv_into(view):
            got += count
        writing.result()
    assert got == 20_000_000
    wait_until(lambda: limits and limits[-1] == (rig.link.sock, UNSENT))
    assert (rig.link.sock, 0) in limits


def send_and_end(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def test_copying_looks_for_a_pipe_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be none for a moment only."""
    real, refused = os.pipe, list[int]()

    def pipe() -> tuple[int, int]:
        if not refused:
            refused.append(1)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        refused.append(2)
        return real()

    monkeypatch.setattr(os, "pipe", pipe)
    replace(monkeypatch, "PIPE_AGAIN", 4)
    data = random.Random(3).randbytes(10_000_000)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(send_and_end, rig.far_stream, data)
        got, view = bytearray(), memoryview(bytearray(1 << 20))
        while count := rig.far.recv_into(view):
            got += view[:count]
        writing.result()
    assert got == data
    assert 2 in refused


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


def bytes_waiting(sock: socket.socket) -> int:
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, b"\0\0\0\0"))[0])


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


def sweep_until_broken(splices: Splices) -> None:
    """Sweep until every connection is broken off."""

    def broken() -> bool:
        splices.sweep()
        return all(splice.reason for splice in splices.snapshot())

    wait_until(broken)


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


def test_a_message_on_a_link_stays_one(later_rig: Rig) -> None:
    """A frame that has come as a whole is received as a whole, though its beginning is read together with its header;
    one of which a part is still under way gives what is there."""
    message = random.Random(8).randbytes(4000)
    link, view = later_rig.link, memoryview(bytearray(8192))
    later_rig.far.sock.sendall(encode_header(DATA, len(message)) + message)
    wait_until(lambda: len(link.sock.recv(8192, socket.MSG_PEEK)) == 4 + len(message))
    assert (link.recv_into(view), bytes(view[:4000])) == (4000, message)
    later_rig.far.sock.sendall(encode_header(DATA, len(message)) + message[:1000])
    wait_until(lambda: len(link.sock.recv(8192, socket.MSG_PEEK)) == 1004)
    assert (link.recv_into(view), bytes(view[:1000])) == (1000, message[:1000])
    later_rig.far.sock.sendall(message[1000:])
    assert (link.recv_into(view), bytes(view[:3000])) == (3000, message[1000:])
    later_rig.start()


def test_an_end_that_cannot_be_passed_on_leaves_the_link_whole(rig: Rig) -> None:
    """The stream's peer has ended its direction, and is gone when the other's end comes: both sides have said all,
    the connection is complete, and the far side may START the next one on the link."""
    rig.far_stream.shutdown(socket.SHUT_WR)
    assert rig.far.receive(Deadline(PATIENCE)).kind == END
    rig.far_stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    rig.far_stream.close()
    poller = select.poll()
    poller.register(rig.stream.sock, 0)
    assert poller.poll(1000 * PATIENCE)
    rig.far.send(END)
    assert rig.done.wait(PATIENCE)
    assert not rig.splice.reason
    assert rig.link.machine.state == rig.far.machine.state == IDLE
    with pytest.raises(BlockingIOError):
        rig.far.sock.recv(1, socket.MSG_DONTWAIT)


def close_early(rig: Rig, more: bytes = b"second") -> None:
    """The stream's peer ends and closes, and what is sent to it then draws an RST: the stream takes no more."""
    rig.far_stream.close()
    assert rig.far.receive(Deadline(PATIENCE)).kind == END
    send_data(rig.far, b"first")
    poller = select.poll()
    poller.register(rig.stream.sock, 0)
    assert poller.poll(1000 * PATIENCE)
    send_data(rig.far, more)


def test_the_end_is_heard_out_when_the_stream_has_closed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on the way to somebody who has closed cannot be delivered; END comes behind it, the link stays whole,
    and both relays count the same and call the connection complete."""
    replace(monkeypatch, "HEAR_OUT_TIME", PATIENCE)
    close_early(rig)
    send_data(rig.far, b"third")
    rig.far.send(END)
    assert rig.done.wait(PATIENCE)
    assert (rig.splice.reason, rig.splice.from_link.carried) == ("", 16)
    assert rig.link.machine.state == rig.far.machine.state == IDLE
    with pytest.raises(BlockingIOError):
        rig.far.sock.recv(1, socket.MSG_DONTWAIT)


def test_an_end_that_does_not_come_is_not_waited_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who goes on sending to somebody who has closed is told by the end of the link."""
    replace(monkeypatch, "HEAR_OUT_TIME", 0.1)
    close_early(rig)
    with pytest.raises((EOFError, ConnectionError)):
        rig.far.receive(Deadline(PATIENCE))
    assert rig.done.wait(PATIENCE)
    assert rig.splice.reason == "stream: broken pipe"


def test_who_sends_much_to_somebody_who_has_closed_is_told_soon(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is gained by dropping more than a mebibyte."""
    replace(monkeypatch, "HEAR_OUT_TIME", 1000.0)
    close_early(rig)
    with pytest.raises(OSError):
        while True:
            send_data(rig.far, bytes(65536))
    assert rig.done.wait(PATIENCE)
    assert rig.splice.reason == "stream: broken pipe"


def test_a_sweep_hears_the_end_out_too(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees the RST of a peer that has closed, while END is on its way: that comes in time, or it does not."""
    replace(monkeypatch, "HEAR_OUT_TIME", PATIENCE)
    close_early(rig, b"")
    splices = Splices(0, 0)
    splices.add(rig.splice)
    for _ in range(2):
        splices.sweep()
        assert not splices.snapshot()[0].reason
    replace(monkeypatch, "HEAR_OUT_TIME", 0.01)
    sweep_until_broken(splices)
    assert rig.splice.reason == "stream: connection lost"


def test_a_fin_is_believed_although_an_rst_came_behind_it() -> None:
    """The peer has closed and was sent more: what it had sent before is whole."""
    near, far = tcp_pair()
    with near, far:
        stream, view = Stream(near, "near"), memoryview(bytearray(100))
        far.sendall(b"all")
        assert stream.recv_into(view) == 3
        far.close()
        poller = select.poll()
        poller.register(near, select.POLLRDHUP)
        assert poller.poll(1000 * PATIENCE)
        near.send(b"too late")
        poller.modify(near, 0)
        assert poller.poll(1000 * PATIENCE)
        assert near.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x07"
        with pytest.raises(BrokenPipeError):
            near.send(b"later still")
        assert stream.recv_into(view) == stream.recv_now(view) == 0


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


def test_a_link_that_losses_hold_back_is_spent(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked when the connection is over, with what that has sent on it."""
    asked: list[tuple[socket.socket, int]] = []

    def is_held_back(sock: socket.socket, sent: int) -> bool:
        asked.append((sock, sent))
        return True

    replace(monkeypatch, "is_held_back", is_held_back)
    rig.far_stream.sendall(b"hello")
    rig.far_stream.shutdown(socket.SHUT_WR)
    assert receive(rig.far) == b"hello"
    rig.far.send(END)
    assert rig.done.wait(PATIENCE)
    assert asked == [(rig.link.sock, 5)]
    assert rig.link.spent


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


def test_a_pump_s_end_says_what_was_passed_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the opening exchange's does; without it each larger connection's link would have to settle."""
    replace(monkeypatch, "OPENING_TIME", 0.0)
    data = random.Random(5).randbytes(300_000)
    for start in range(0, len(data), 50_000):
        send_data(rig.far, data[start : start + 50_000])
        assert read_exactly(rig.far_stream, 50_000) == data[start : start + 50_000]
    wait_until(lambda: rig.splice.from_link.carried == len(data))
    rig.far_stream.shutdown(socket.SHUT_WR)
    assert receive(rig.far) == b""
    assert rig.far.passed == len(data)
