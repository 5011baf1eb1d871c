"""Streams: waking, flushing, and ends that can be believed."""

from __future__ import annotations

import select
import socket
import threading
import time

import pytest

from _tcprelay.server.clients import ServiceClient
from _tcprelay.streams import Stream
from _tcprelay.tcp import RESET_ON_CLOSE, unsent_bytes
from _tcprelay.threads import Threads
from _tcprelay.waiting import Deadline

from .conftest import PATIENCE, read_all, wait_until
from .rigs import reset, tcp_pair


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
