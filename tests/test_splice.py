"""Connections: the opening exchange, both directions and their ends, and how they break."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from unittest.mock import Mock

import pytest

from _tcprelay.link import RawLink
from _tcprelay.protocol import ABORT, DATA, END, IDLE, MAX_DATA, PING, encode_frame, encode_header
from _tcprelay.splice import Splice
from _tcprelay.streams import Stream
from _tcprelay.tcp import RESET_ON_CLOSE, unsent_bytes
from _tcprelay.threads import Threads
from _tcprelay.waiting import Deadline
from _tcprelay.watch import Splices

from .conftest import PATIENCE, read_all, read_exactly, replace, wait_until
from .ends import send_data, send_end
from .rigs import Rig, bytes_waiting, receive, receive_by, reset, sweep_until_broken, tcp_pair


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


def test_a_flood_after_abort_costs_the_link(rig: Rig) -> None:
    """A side that does not stop sending although the other broke off loses the link instead of being drained."""
    rig.far_stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    rig.far_stream.close()
    with pytest.raises(OSError):
        for _ in range(1000):
            send_data(rig.far, bytes(65536))
    assert rig.done.wait(PATIENCE)


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


@pytest.mark.parametrize(
    ("was_ahead", "much", "spent"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_a_link_that_a_slow_reader_has_had_swell_is_spent(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, was_ahead: bool, much: bool, spent: bool
) -> None:
    """Else the next slow reader has megabytes wait; what a fast one needed is kept for the next fast one."""
    replace(monkeypatch, "is_swollen", lambda sock: sock is rig.link.sock and much)
    rig.splice.from_link.was_ahead = was_ahead
    rig.far_stream.shutdown(socket.SHUT_WR)
    assert receive(rig.far) == b""
    rig.far.send(END)
    assert rig.done.wait(PATIENCE)
    assert ("slow reader" in rig.link.spent) == spent


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


# The raw wire, where an end is a FIN, and an RST all that can be told


class RawRig:
    """A splice between a stream and a raw link, with small buffers on the way, and the far ends of both."""

    def __init__(self, stack: ExitStack) -> None:
        near, self.far_stream = tcp_pair(2048)
        link, self.far_link = tcp_pair(2048)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        for sock in (self.far_stream, self.far_link):
            stack.callback(sock.close)
        self.stream, self.link = Stream(near, "stream"), RawLink(Stream(link, "link"))
        self.splice = Splice("1", "test", self.stream, self.link)
        self.threads, self.done = Threads(), threading.Event()
        stack.callback(self.close)

    def start(self) -> None:
        self.threads.start(self._run)

    def _run(self) -> None:
        self.splice.run(self.threads)
        self.stream.close()
        self.link.close()
        self.done.set()

    def close(self) -> None:
        self.splice.break_off("the test is over", hurry=True, close_link=True)
        assert self.done.wait(PATIENCE)
        self.threads.end(Deadline(PATIENCE))


@pytest.fixture
def raw_rig() -> Iterator[RawRig]:
    with ExitStack() as stack:
        yield RawRig(stack)


def fill(sock: socket.socket) -> None:
    """Send until nobody takes any more."""
    sock.settimeout(0.2)
    with contextlib.suppress(TimeoutError):
        while True:
            sock.send(bytes(4096))
    sock.settimeout(PATIENCE)


def test_an_upload_on_the_raw_wire_arrives_although_its_sender_resets(raw_rig: RawRig) -> None:
    """It had ended its direction: all of that goes out before the link is reset, however slowly it is read."""
    raw_rig.start()
    fill(raw_rig.far_link)  # a download, which will fail
    raw_rig.far_stream.sendall(b"u" * 30_000)
    raw_rig.far_stream.shutdown(socket.SHUT_WR)
    wait_until(lambda: raw_rig.splice.to_link.done)
    reset(raw_rig.far_stream)
    wait_until(lambda: raw_rig.splice.reason)
    data = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while piece := raw_rig.far_link.recv(65536):
            data += piece
    assert bytes(data) == b"u" * 30_000


def test_a_stream_that_fails_on_the_raw_wire_ends_the_connection(raw_rig: RawRig) -> None:
    """There is no ABORT: without an RST a download would go on for ever."""
    real = raw_rig.stream.recv_into

    def recv_into(view: memoryview) -> int:
        if real(view):
            raise AssertionError
        raise ConnectionResetError("cut off without TLS close_notify")

    receive_by(raw_rig.stream, recv_into)
    replace_now = raw_rig.stream.recv_now

    def recv_now(view: memoryview) -> int | None:
        if (count := replace_now(view)) == 0:
            raise ConnectionResetError("cut off without TLS close_notify")
        return count

    raw_rig.stream.recv_now = recv_now  # type: ignore[method-assign]

    def download() -> None:
        with contextlib.suppress(OSError):
            while True:
                raw_rig.far_link.sendall(bytes(65536))

    def read_on() -> None:
        with contextlib.suppress(OSError):
            while raw_rig.far_stream.recv(65536):
                pass

    raw_rig.start()
    raw_rig.threads.start(download)
    raw_rig.threads.start(read_on)
    wait_until(lambda: raw_rig.splice.from_link.carried > 1 << 15)
    raw_rig.far_stream.shutdown(socket.SHUT_WR)
    assert raw_rig.done.wait(PATIENCE)
    assert raw_rig.splice.reason == "stream: cut off without TLS close_notify"


def test_a_download_that_is_cut_off_at_its_end_is_not_whole(raw_rig: RawRig) -> None:
    """The source's end has come, and bytes before it wait for the stream, which is reset: that is no end."""
    raw_rig.far_link.sendall(bytes(14_000))
    raw_rig.far_link.shutdown(socket.SHUT_WR)
    wait_until(lambda: bytes_waiting(raw_rig.link.sock) == 14_000)
    raw_rig.start()
    wait_until(lambda: raw_rig.splice.from_link.ended)
    raw_rig.far_stream.shutdown(socket.SHUT_WR)
    wait_until(lambda: raw_rig.splice.to_link.done)
    reset(raw_rig.far_stream)
    assert raw_rig.done.wait(PATIENCE)
    assert raw_rig.splice.reason.startswith("stream: ")


def test_what_a_closed_peer_did_not_take_counts_as_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes and END came together, and are stuck when a peer that has ended its direction resets: both have ended."""
    with ExitStack() as stack:
        rig = Rig(stack, start=False, room=2048)
        stack.callback(rig.close)
        monkeypatch.setattr(rig.link, "may_have_more", lambda: True)  # as over TLS
        send_data(rig.far, bytes(15_000))
        send_end(rig.far)
        wait_until(lambda: bytes_waiting(rig.link.sock) >= 15_000)
        rig.start()
        wait_until(lambda: rig.splice.from_link.ended)
        rig.far_stream.shutdown(socket.SHUT_WR)
        wait_until(lambda: rig.splice.said_end)
        reset(rig.far_stream)
        assert rig.done.wait(PATIENCE)
        assert (rig.splice.reason, rig.splice.from_link.carried) == ("", 15_000)


def test_breaking_off_carries_no_further_byte(rig: Rig, long_opening: None) -> None:
    """What the link still brings is dropped up to its end, and the link is whole."""
    send_data(rig.far, b"greeting")
    assert read_exactly(rig.far_stream, 8) == b"greeting"
    rig.splice.break_off("enough")
    assert rig.far.receive(Deadline(PATIENCE)).kind == ABORT
    send_data(rig.far, b"late")
    send_data(rig.far, b"later")
    send_end(rig.far)
    assert rig.done.wait(PATIENCE)
    assert (rig.splice.from_link.carried, rig.splice.reason) == (8, "enough")
    assert rig.link.machine.state == IDLE


@pytest.mark.parametrize("ended", ["stream", "link"])
def test_a_pump_s_end_counts_for_the_half_close_timeout(rig: Rig, monkeypatch: pytest.MonkeyPatch, ended: str) -> None:
    """As that of the opening exchange does."""
    wait_until(lambda: len(rig.threads) == 2)
    if ended == "stream":
        rig.far_stream.shutdown(socket.SHUT_WR)
    else:
        send_end(rig.far)
    splices = Splices(idle_timeout=0, half_close_timeout=0.05)
    splices.add(rig.splice)
    sweep_until_broken(splices)
    assert rig.splice.reason == "half closed and idle for 0.05 s"
    assert rig.stream.hurried


def test_bulk_traffic_that_nobody_takes_can_be_hurried(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pump that is blocked inside the kernel looks again, as one that is blocked in a send does."""
    blocked, keep_trying = threading.Event(), rig.stream.keep_trying

    def note() -> None:
        blocked.set()
        keep_trying()

    monkeypatch.setattr(rig.stream, "keep_trying", note)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(send_data, rig.far, bytes(MAX_DATA))
        assert blocked.wait(PATIENCE)
        rig.splice.break_off("enough", hurry=True, close_link=True)
        ended = rig.done.wait(PATIENCE)
        reset(rig.far_stream)
        with pytest.raises(OSError):
            writing.result()
    assert ended


def test_a_splice_that_is_over_is_hurried(rig: Rig) -> None:
    """What was sent on the stream is waited for no longer; the link is left alone."""
    send_end(rig.far)
    rig.far_stream.shutdown(socket.SHUT_WR)
    assert rig.done.wait(PATIENCE)
    rig.splice.break_off("too late", hurry=True)
    assert (rig.stream.hurried, rig.link.stream.hurried) == (True, False)


@pytest.mark.parametrize("how", ["patient", "hasty"])
def test_a_raw_link_is_broken_off_by_rst(how: str) -> None:
    """Who receives is woken, and who sends is hurried only where that is asked for."""
    near, far = tcp_pair()
    link = RawLink(Stream(near, "link"))
    link.stream.close_normally()
    with far:
        link.break_off(how == "hasty", False)
        assert near.recv(1, socket.MSG_DONTWAIT) == b""
        assert link.stream.hurried is (how == "hasty")
        link.close()
        with pytest.raises(ConnectionResetError):
            far.recv(1)


def test_a_raw_link_is_woken_hurried_and_never_drained() -> None:
    """It has no end behind which it could be used again."""
    near, far = tcp_pair()
    link = RawLink(Stream(near, "link"))
    with near, far:
        link.wake()
        assert near.recv(1, socket.MSG_DONTWAIT) == b""
        assert not link.stream.hurried
        link.hurry()
        assert link.stream.hurried
        assert link.hear_out_time() == 0.0
        with pytest.raises(ConnectionResetError, match="no end but its own"):
            link.discard(Deadline(0))


@pytest.mark.parametrize(("leg", "name"), [("stream", "recv_now"), ("stream", "calls"), ("link", "calls")])
def test_an_unexpected_error_ends_the_connection(
    later_rig: Rig, monkeypatch: pytest.MonkeyPatch, leg: str, name: str
) -> None:
    """In whichever thread it happens: nobody waits for the other direction, and nobody sees a clean end."""
    rig = later_rig
    replace(monkeypatch, "OPENING_TIME", 0.0 if name == "calls" else 6 * PATIENCE)
    monkeypatch.setattr(getattr(rig, leg).stream, name, Mock(side_effect=MemoryError))
    rig.far_stream.sendall(b"x")
    rig.start()
    assert rig.done.wait(PATIENCE)
    assert rig.splice.reason == "unexpected error"
    with pytest.raises(ConnectionResetError):
        rig.far_stream.recv(1)
