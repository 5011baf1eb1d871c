"""Pumps: order, bulk traffic, buffers, and the bound of what waits."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from _tcprelay.protocol import DATA, END, IDLE, MAX_DATA, READY, START, encode_frame, encode_header
from _tcprelay.ahead import Queue
from _tcprelay.pump import LARGE_BUFFER, SMALL_BUFFER, SPARSE_READS, Flow, SinkError
from _tcprelay.streams import PIPE_SIZE, Stream
from _tcprelay.tcp import UNSENT, hold_little, limit_unsent, unread_bytes
from _tcprelay.tls import LARGE_TLS_BUFFER

from .conftest import PATIENCE, read_all, replace, wait_until
from .ends import send_data, send_end
from .rigs import Rig, bytes_waiting, receive_by, tcp_pair


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


def pass_on(rig: Rig, *pieces: bytes) -> None:
    """Send these on the link, each when the one before has been taken."""
    for piece in pieces:
        rig.far.stream.send(piece)
        wait_until(lambda: not bytes_waiting(rig.link.sock))


@pytest.mark.parametrize("cut", range(40))
def test_small_frames_cut_anywhere(later_rig: Rig, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    """One by one, several at once, in two pieces, empty ones in between, and the end behind the last."""
    replace(monkeypatch, "OPENING_TIME", 0.0)  # pumps from the first byte on
    rig, parts = later_rig, [b"first", b"", b"the second", b"3", b"", b"", b"and the fourth"]
    rig.start()
    first, *others = (encode_header(DATA, len(part)) + part for part in parts)
    together = b"".join([first, *others, encode_frame(END)])
    pass_on(rig, first, *others, together[:cut], together[cut:])
    rig.far.machine.send(END)
    assert read_all(rig.far_stream) == 2 * b"".join(parts)
    assert rig.splice.from_link.carried == 2 * len(b"".join(parts))
    rig.far_stream.shutdown(socket.SHUT_WR)
    assert rig.done.wait(PATIENCE)
    assert rig.splice.reason == ""


def test_a_header_is_not_made_up_of_old_bytes(later_rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three bytes of a header stand before a byte of an earlier one, with which they would be a whole frame."""
    replace(monkeypatch, "OPENING_TIME", 0.0)
    rig = later_rig
    rig.start()
    short = ((DATA << 24) - 1).to_bytes(4, "big")[:3]
    pass_on(rig, encode_header(DATA, 1) + b"x", encode_header(DATA, 255) + bytes(255), short)
    rig.far.stream.send(b"\0")
    assert rig.done.wait(PATIENCE)
    assert rig.splice.reason == "link: FAIL of 16776960 bytes is longer than 4096"


def test_many_frames_behind_an_end_are_kept_for_the_next_connection(
    later_rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This side had ended before, so that the next START may follow END at once, with as much as there is room for."""
    replace(monkeypatch, "OPENING_TIME", 0.0)
    rig = later_rig
    rig.start()
    rig.far_stream.shutdown(socket.SHUT_WR)
    wait_until(lambda: rig.splice.to_link.done)
    pass_on(rig, encode_header(DATA, 300) + bytes(300), encode_header(DATA, 2048) + bytes(2048))
    next_data = random.Random(5).randbytes(1500)
    rig.far.stream.send(encode_frame(END) + encode_frame(START) + encode_header(DATA, 1500) + next_data)
    assert rig.done.wait(PATIENCE)
    assert rig.link.is_idle
    frame, view = rig.link.receive_held(), memoryview(bytearray(4096))
    assert frame is not None
    assert frame.kind == START
    rig.link.machine.send(READY)
    assert rig.link.recv_into(view) == 1500
    assert view[:1500] == next_data
    rig.link.close()


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

    receive_by(rig.stream, recv_into)
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
    receive_by(rig.stream, recv_into)
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
        far_source.sendall(b"some")
        wait_until(lambda: unread_bytes(source) == 4)
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
    """Nothing waits of it then.  It may have become farther than it was at its handshake."""
    queue, source, _, now = held_queue
    now[0] += 0.2
    queue.sent(1000)
    assert is_held(source)
    source.recv(4)
    now[0] += 0.2
    queue.sent(1000)
    assert not is_held(source)


def test_a_source_is_ahead_where_much_of_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as is taken at once, or more, and again at another look."""
    sink, far_sink = tcp_pair()
    source, far_source = tcp_pair()
    with sink, far_sink, source, far_source:
        far_source.sendall(bytes(UNSENT))
        wait_until(lambda: unread_bytes(source) == UNSENT)
        now = [100.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        queue, found = Queue(source, sink), []
        for count in (1000, 1000, 1 << 20, 1000):  # the third is so fast that nothing is bounded
            now[0] += 0.2 if count == 1000 else 0.001
            queue.sent(count)
            found.append(queue.is_ahead)
        assert found == [False, True, True, True]
        replace(monkeypatch, "unread_bytes", lambda sock: 1 << 21)
        queue = Queue(source, sink)
        for _ in range(3):
            now[0] += 0.001
            queue.sent(1 << 20)
        assert not queue.is_ahead
        replace(monkeypatch, "unread_bytes", unread_bytes)
        queue = Queue(source, sink)
        source.recv(1)
        for _ in range(3):
            now[0] += 0.2
            queue.sent(1000)
        assert not queue.is_ahead


@pytest.mark.parametrize("spliceable", [True, False])
def test_what_was_ahead_of_a_slow_reader_is_remembered(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, spliceable: bool
) -> None:
    """Of a link, which would be used again."""
    monkeypatch.setattr(Queue, "HELD_TIME", 0.0)  # each piece is a look
    rig.stream.spliceable = rig.link.spliceable = spliceable

    def write() -> None:
        for _ in range(100):
            send_data(rig.far, bytes(60_000))
        send_end(rig.far)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    wait_until(lambda: unread_bytes(rig.link.sock) >= UNSENT and not select.select([], [rig.far.sock], [], 0.5)[1])
    rig.far_stream.shutdown(socket.SHUT_WR)
    assert len(read_all(rig.far_stream)) == 6_000_000
    writer.join(PATIENCE)
    assert rig.far.recv_into(memoryview(bytearray(1))) == 0
    assert rig.done.wait(PATIENCE)
    assert (rig.splice.from_link.was_ahead, rig.splice.to_link.was_ahead) == (True, False)


def send_and_end(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


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


def make_flow() -> tuple[Flow, socket.socket, socket.socket, list[socket.socket]]:
    near, far = tcp_pair()
    sink, far_sink = tcp_pair()
    return Flow(Stream(near, "source"), Stream(sink, "sink")), far, far_sink, [near, far, sink, far_sink]


def test_a_halted_flow_carries_nothing_more() -> None:
    """Although there are bytes to carry."""
    flow, far, far_sink, socks = make_flow()
    far.sendall(b"too late")
    far.shutdown(socket.SHUT_WR)
    wait_until(lambda: bytes_waiting(flow.source.sock) == 8)
    flow.halted = True
    flow.pump()
    assert (flow.carried, flow.ended) == (0, False)
    assert bytes_waiting(far_sink) == 0
    for sock in socks:
        sock.close()


def test_what_a_broken_sink_has_not_taken_is_told() -> None:
    """Of the bytes that the opening exchange has left, too."""
    flow, far, _, socks = make_flow()
    far.sendall(b"12345")
    wait_until(lambda: bytes_waiting(flow.source.sock) == 5)
    flow.take(memoryview(bytearray(100)))
    flow.sink.stream.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(SinkError, match="sink: broken pipe") as caught:
        flow.pump()
    assert (caught.value.held, flow.carried) == (5, 0)
    for sock in socks:
        sock.close()
