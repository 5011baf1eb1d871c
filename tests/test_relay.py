"""The relay as a whole, over loopback: bytes, ends and errors, both ways."""

from __future__ import annotations

import hashlib
import random
import socket
import struct
import threading

import pytest

from _tcprelay.tcp import unsent_bytes
from tcprelay import ConnectionClosed, ConnectionFailed, ConnectionOpened, LinkDown, RelayClient

from .conftest import PATIENCE, Bench, read_all, read_exactly, wait_until

RESET = struct.pack("ii", 1, 0)


def pseudo_random(count: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(count)


def reset(sock: socket.socket) -> None:
    """Close with an RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


SIZES = [0, 1, 1023, 1024, 1025, 65535, 65536, 65537, (1 << 20) + 1, 20_000_000]


# On the raw wire nothing is dialled before the first byte.
@pytest.mark.parametrize(("wire", "size"), [("v1", n) for n in SIZES] + [("raw", n) for n in SIZES if n])
def test_every_byte_arrives_both_ways(bench: Bench, wire: str, size: int) -> None:
    """Whatever the size, the service gets what was sent, and the service client gets the answer."""
    seen = []

    def serve(sock: socket.socket) -> None:
        data = read_all(sock)
        seen.append(hashlib.sha256(data).digest())
        sock.sendall(data[::-1])

    sock = bench.connect(bench.relay(serve, wire=wire))
    data = pseudo_random(size)
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    assert read_all(sock) == data[::-1]
    assert seen == [hashlib.sha256(data).digest()]


def test_the_service_may_speak_first(bench: Bench) -> None:
    """A banner arrives although the service client has not sent a byte."""
    sock = bench.connect(bench.relay(lambda s: s.sendall(b"SSH-2.0-banner\r\n")))
    assert read_all(sock) == b"SSH-2.0-banner\r\n"


def test_the_service_client_ends_its_direction_first(bench: Bench) -> None:
    """After the client's end the whole answer still comes."""
    answer = pseudo_random(5_000_000)

    def serve(sock: socket.socket) -> None:
        assert read_all(sock) == b"question"
        sock.sendall(answer)

    sock = bench.connect(bench.relay(serve))
    sock.sendall(b"question")
    sock.shutdown(socket.SHUT_WR)
    assert read_all(sock) == answer


def test_the_service_ends_its_direction_first(bench: Bench) -> None:
    """After the service's end the service client can go on sending, and all of it arrives."""
    got = bytearray()
    done = threading.Event()

    def serve(sock: socket.socket) -> None:
        sock.sendall(b"go on")
        sock.shutdown(socket.SHUT_WR)
        got.extend(read_all(sock))
        done.set()

    sock = bench.connect(bench.relay(serve))
    assert read_all(sock) == b"go on"
    data = pseudo_random(5_000_000)
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    assert done.wait(PATIENCE)
    assert got == data


def test_links_are_used_again(bench: Bench) -> None:
    """A hundred connections one after another need no more links than the first few."""
    server = bench.relay()
    for number in range(100):
        with bench.connect(server) as sock:
            sock.sendall(b"%d" % number)
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock) == b"%d" % number
    bench.client_events.wait(ConnectionClosed, 100)
    bench.server_events.wait(ConnectionClosed, 100)
    assert server.counters["links_idle"] <= 4
    assert server.counters["connections"] == 100


def test_each_connection_has_one_closing_record(bench: Bench) -> None:
    """Both relays tell the same connection under the same id, with its bytes each way."""
    server = bench.relay(lambda s: s.sendall(read_exactly(s, 5) * 2))
    sock = bench.connect(server)
    address = "{}:{}".format(*sock.getsockname())
    sock.sendall(b"12345")
    assert read_all(sock) == b"1234512345"
    sock.close()
    [at_server] = bench.server_events.wait(ConnectionClosed)
    [at_client] = bench.client_events.wait(ConnectionClosed)
    assert (at_server.bytes_in, at_server.bytes_out, at_server.reason) == (5, 10, "")
    assert (at_client.bytes_in, at_client.bytes_out, at_client.reason) == (5, 10, "")
    assert at_server.id == at_client.id == bench.server_events.of(ConnectionOpened)[0].id
    assert at_server.peer == at_client.peer == address


@pytest.mark.parametrize("wire", ["v1", "raw"])
def test_a_reset_of_the_service_reaches_the_service_client(bench: Bench, wire: str) -> None:
    """What the service sent before its RST arrives, and then an error, never an end."""

    def serve(sock: socket.socket) -> None:
        read_exactly(sock, 1)
        sock.sendall(b"x" * 100_000)
        read_exactly(sock, 1)  # the service client has got it all
        reset(sock)

    sock = bench.connect(bench.relay(serve, wire=wire))
    sock.sendall(b"1")
    assert read_exactly(sock, 100_000) == b"x" * 100_000
    sock.sendall(b"2")
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    [closed] = bench.server_events.wait(ConnectionClosed)
    assert "connection reset by peer" in closed.reason


@pytest.mark.parametrize("wire", ["v1", "raw"])
def test_a_reset_of_the_service_client_reaches_the_service(bench: Bench, wire: str) -> None:
    """The service gets what was sent before the RST, and then an error."""
    error: list[BaseException] = []
    got = threading.Event()

    def serve(sock: socket.socket) -> None:
        read_exactly(sock, 5)
        got.set()
        try:
            sock.recv(1)
        except OSError as problem:
            error.append(problem)

    sock = bench.connect(bench.relay(serve, wire=wire))
    sock.sendall(b"12345")
    assert got.wait(PATIENCE)
    reset(sock)
    wait_until(lambda: error)
    assert isinstance(error[0], ConnectionResetError)


def test_a_link_survives_aborts(bench: Bench) -> None:
    """Connections that are broken off leave their links in the pool."""
    server = bench.relay()
    for _ in range(20):
        sock = bench.connect(server)
        sock.sendall(b"x")
        read_exactly(sock, 1)
        reset(sock)
    bench.server_events.wait(ConnectionClosed, 20)
    wait_until(lambda: server.counters["links_idle"] >= 2)
    assert len(bench.server_events.of(ConnectionClosed)) == 20
    assert not bench.server_events.of(LinkDown)


def test_data_before_an_abort_is_delivered_to_a_slow_reader(bench: Bench) -> None:
    """A reader that begins late gets every byte that the service sent before its RST."""
    sent = threading.Event()

    def serve(sock: socket.socket) -> None:
        sock.sendall(b"x" * 200_000)
        wait_until(lambda: unsent_bytes(sock) == 0)  # its own RST would discard them
        sent.set()
        read_exactly(sock, 1)
        reset(sock)

    sock = bench.connect(bench.relay(serve))
    assert sent.wait(PATIENCE)
    sock.sendall(b"1")
    count = 0
    with pytest.raises(ConnectionResetError):
        while piece := sock.recv(1000):
            count += len(piece)
    assert count == 200_000


def test_a_stalled_reader_stalls_the_writer(bench: Bench) -> None:
    """Nothing piles up in the relay: the service can send only as much as the kernel's buffers take."""
    sent = 0
    data = pseudo_random(1 << 20)
    resume = threading.Event()

    def serve(sock: socket.socket) -> None:
        nonlocal sent
        sock.setblocking(False)
        while not resume.is_set():
            try:
                sent += sock.send(data[sent % len(data) :])
            except BlockingIOError:
                resume.wait(0.01)
        sock.setblocking(True)
        sock.sendall(b"the end")

    server = bench.relay(serve)
    sock = bench.connect(server)
    last = -1
    pause = threading.Event()
    while last != sent or not sent:
        last = sent
        pause.wait(0.3)
    counters = server.counters
    resume.set()
    got = read_all(sock)
    assert got[-7:] == b"the end"
    assert len(got) == sent + 7
    assert hashlib.sha256(got[:-7]).digest() == hashlib.sha256((data * (sent // len(data) + 1))[:sent]).digest()
    assert counters["bytes_out"] <= sent


def test_many_at_once(bench: Bench) -> None:
    """Connections side by side do not mix their bytes, and links are opened as they are needed."""
    server = bench.relay()
    socks = [bench.connect(server) for _ in range(50)]
    for number, sock in enumerate(socks):
        sock.sendall(pseudo_random(10_000, number))
        sock.shutdown(socket.SHUT_WR)
    for number, sock in enumerate(socks):
        assert read_all(sock) == pseudo_random(10_000, number)


def test_a_service_that_is_down_is_told_promptly(bench: Bench) -> None:
    """The service client gets an RST, both logs say why, once, and the links stay."""
    service = bench.service()
    server = bench.server()
    bench.client(server, service.port)
    service.close()
    sock = bench.connect(server)
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    [failed] = bench.server_events.wait(ConnectionFailed)
    assert "cannot be reached" in failed.reason
    assert f"cannot reach 127.0.0.1:{service.port}: connection refused" in failed.reason
    assert len(bench.client_events.of(ConnectionFailed)) == 1
    wait_until(lambda: server.counters["links_idle"] >= 2)
    assert not bench.server_events.of(LinkDown)


def test_traffic_figures_move_while_a_connection_lives(bench: Bench) -> None:
    """The counters include the bytes of open connections."""
    server = bench.relay()
    sock = bench.connect(server)
    sock.sendall(b"12345")
    read_exactly(sock, 5)
    expected = {"bytes_in": 5, "bytes_out": 5, "open": 1, "connections": 1}
    wait_until(lambda: expected.items() <= server.counters.items())


def test_idle_timeout(bench: Bench) -> None:
    """A connection without bytes is broken off; one with bytes is not."""
    server = bench.server(idle_timeout=0.4)
    bench.client(server, bench.service().port)
    quiet, busy = bench.connect(server), bench.connect(server)
    quiet.settimeout(0.02)
    for _ in range(1000):
        busy.sendall(b"x")
        assert busy.recv(1) == b"x"
        try:
            quiet.recv(1)
        except TimeoutError:
            continue
        except ConnectionResetError:
            break
    busy.sendall(b"y")
    assert busy.recv(1) == b"y"
    [closed] = bench.server_events.wait(ConnectionClosed)
    assert closed.reason == "idle for 0.4 s"
    assert 0.4 <= closed.seconds < 2


def read_until_error(sock: socket.socket) -> str:
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        return "reset"
    return "end"


def test_half_close_timeout_breaks_off(bench: Bench) -> None:
    """With one direction ended and no byte in the other, the service client gets an RST."""
    release = threading.Event()
    server = bench.relay(lambda _: release.wait(PATIENCE), half_close_timeout=0.3)
    sock = bench.connect(server)
    sock.shutdown(socket.SHUT_WR)
    assert read_until_error(sock) == "reset"
    release.set()
    [closed] = bench.server_events.wait(ConnectionClosed)
    assert "half closed" in closed.reason


def test_several_services(bench: Bench) -> None:
    """One server and one client carry several services, each under its name."""
    server = bench.server(service_port=None, service=["one=0", "two=127.0.0.1:0"])
    one, two = bench.service(lambda s: s.sendall(b"1")), bench.service(lambda s: s.sendall(b"2"))
    bench.client(server, None, publish=[f"one=127.0.0.1:{one.port}", f"two=localhost:{two.port}"])
    assert read_all(bench.connect(server, "one")) == b"1"
    assert read_all(bench.connect(server, "two")) == b"2"


def test_a_service_on_a_unix_socket(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The client dials unix:PATH, given as host or in --publish."""
    path = str(tmp_path_factory.mktemp("s") / "app.sock")
    listener = bench.enter(socket.socket(socket.AF_UNIX))
    listener.bind(path)
    listener.listen()

    def serve() -> None:
        for _ in range(2):
            sock, _ = listener.accept()
            with sock:
                sock.sendall(read_exactly(sock, 4).upper())

    thread = threading.Thread(target=serve)
    thread.start()
    server = bench.server(service=["app=0"])
    bench.enter(
        RelayClient(
            f"unix:{path}",
            None,
            "127.0.0.1",
            server.relay_address[1],
            1,
            publish=[f"app=unix:{path}"],
            try_service=False,
        )
    )
    for name in ("default", "app"):
        sock = bench.connect(server, name)
        sock.sendall(b"unix")
        assert read_all(sock) == b"UNIX"
    thread.join(PATIENCE)


def test_an_upload_to_a_unix_socket_that_is_read_late(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The service ends its direction first, and many small pieces fill its socket long before 64 KiB: the relay client
    is still passing them on when the connection is over for the server.  Nothing is lost, and nobody else is given
    that link meanwhile."""
    path = str(tmp_path_factory.mktemp("s") / "app.sock")
    listener = bench.enter(socket.socket(socket.AF_UNIX))
    listener.bind(path)
    listener.listen()
    read_on, received = threading.Event(), []

    def serve() -> None:
        with listener.accept()[0] as sock:
            sock.shutdown(socket.SHUT_WR)
            assert read_on.wait(PATIENCE)
            received.append(read_all(sock))

    thread = threading.Thread(target=serve)
    thread.start()
    server = bench.server(service=["app=0"], heartbeat=0.1, pair_timeout=5)
    client = RelayClient(f"unix:{path}", None, "127.0.0.1", server.relay_address[1], 2, on_event=bench.client_events,
                         try_service=False)  # fmt: skip
    bench.enter(client)
    wait_until(lambda: server.counters["links_idle"] == 2)
    sock = bench.connect(server)
    assert sock.recv(1) == b""
    data, moment, full = pseudo_random(60_000), threading.Event(), False
    for start in range(0, len(data), 100):
        sock.sendall(data[start : start + 100])
        for _ in range(0 if full else 1000):  # until it has been passed on by itself, or no more is
            if client.counters["bytes_in"] > start:
                break
            moment.wait(0.001)
        else:
            full = True
    sock.shutdown(socket.SHUT_WR)
    [closed] = bench.server_events.wait(ConnectionClosed)
    assert (closed.bytes_in, closed.reason) == (60_000, "")
    assert client.counters["bytes_in"] < 60_000  # it is blocked
    thread.join(0.5)  # five heartbeats, after which a silent idle link would be dropped
    assert thread.is_alive()
    answer = threading.Thread(target=lambda: listener.accept()[0].close())
    answer.start()
    with bench.connect(server) as other:
        assert other.recv(1) == b""  # another link serves the next one
    answer.join(PATIENCE)
    read_on.set()
    thread.join(PATIENCE)
    assert received == [data]
    assert {event.bytes_in for event in bench.client_events.wait(ConnectionClosed, 2)} == {0, 60_000}
    assert not bench.client_events.of(LinkDown)
    wait_until(lambda: server.counters["links_idle"] == 3)


def test_both_records_agree_where_the_service_closes_first(bench: Bench) -> None:
    """The service client's last words, TLS's close_notify say, find nobody there: that is no error, the link is used
    again, and both relays tell the same."""
    server = bench.relay(lambda sock: sock.sendall(read_exactly(sock, 8)))
    for _ in range(5):
        sock = bench.connect(server)
        sock.sendall(b"question")
        assert read_all(sock) == b"question"
        for piece in (b"bye", b"bye again"):
            sock.sendall(piece)
            wait_until(lambda: unsent_bytes(sock) == 0)  # noqa: B023
        sock.close()
    at_server = {event.id: event for event in bench.server_events.wait(ConnectionClosed, 5)}
    at_client = {event.id: event for event in bench.client_events.wait(ConnectionClosed, 5)}
    assert {event.reason for event in at_server.values()} == {""}
    for id, event in at_client.items():
        there = at_server[id]
        assert (event.bytes_in, event.bytes_out, event.reason) == (there.bytes_in, there.bytes_out, "")
    assert not bench.server_events.of(LinkDown)


def test_clients_of_one_service_take_turns(bench: Bench) -> None:
    """Connections are spread evenly over the relay clients of a service."""
    server = bench.server()
    services = [bench.service(lambda s, n=n: s.sendall(b"%d" % n)) for n in range(3)]  # type: ignore[misc]
    for service in services:
        bench.client(server, service.port)
    answers = []
    for _ in range(30):
        with bench.connect(server) as sock:
            answers.append(read_all(sock))
        bench.server_events.wait(ConnectionClosed, len(answers))
    assert sorted(set(answers)) == [b"0", b"1", b"2"]
    assert all(answers.count(answer) == 10 for answer in set(answers))


def test_a_timeout_is_told_to_the_other_relay(bench: Bench) -> None:
    """A relay that breaks a connection off says why, and the link goes back to the pool."""
    server = bench.server()
    bench.client(server, bench.service().port, idle_timeout=0.3)
    assert read_until_error(bench.connect(server)) == "reset"
    [at_server] = bench.server_events.wait(ConnectionClosed)
    [at_client] = bench.client_events.wait(ConnectionClosed)
    assert at_client.reason == "idle for 0.3 s"
    assert at_server.reason.endswith("idle for 0.3 s")
    assert not bench.server_events.of(LinkDown)


@pytest.mark.parametrize("wire", ["v1", "raw"])
def test_an_answer_before_a_reset_still_arrives(bench: Bench, wire: str) -> None:
    """A service that answers and closes while the service client still sends: the answer is not lost."""

    def serve(sock: socket.socket) -> None:
        read_exactly(sock, 100_000)
        sock.sendall(b"too large" * 10_000)
        wait_until(lambda: unsent_bytes(sock) == 0)
        # closing with unread bytes resets the connection

    server = bench.relay(serve, wire=wire)
    sock = bench.connect(server)
    errors: list[OSError] = []

    def send() -> None:
        try:
            while True:
                sock.sendall(bytes(65536))
        except OSError as error:
            errors.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    assert read_exactly(sock, 90_000) == b"too large" * 10_000
    sender.join(PATIENCE)
    assert isinstance(errors[0], (ConnectionResetError, BrokenPipeError))
    assert bench.server_events.wait(ConnectionClosed)[0].reason


def test_a_reset_after_an_end_is_no_success(bench: Bench) -> None:
    """The service answers, ends its direction, and resets while the service client still sends: nobody may
    take the service client's bytes for delivered."""
    errors: list[OSError] = []

    def serve(sock: socket.socket) -> None:
        sock.sendall(b"answer")
        sock.shutdown(socket.SHUT_WR)
        wait_until(lambda: unsent_bytes(sock) == 0)
        read_exactly(sock, 1)
        reset(sock)

    sock = bench.connect(bench.relay(serve))
    assert read_all(sock) == b"answer"
    try:
        while True:
            sock.sendall(b"x" * 1000)
    except OSError as error:
        errors.append(error)
    [at_server] = bench.server_events.wait(ConnectionClosed)
    [at_client] = bench.client_events.wait(ConnectionClosed)
    assert at_server.reason
    assert at_client.reason
    assert isinstance(errors[0], (ConnectionResetError, BrokenPipeError))


def test_a_host_name_that_cannot_be_one(bench: Bench) -> None:
    """It is a service that cannot be reached, not a crash."""
    server = bench.server()
    bench.enter(RelayClient("a..b", 1, "127.0.0.1", server.relay_address[1], 1))
    with pytest.raises(ConnectionResetError):
        bench.connect(server).recv(1)
    [failed] = bench.server_events.wait(ConnectionFailed)
    assert "a..b is not a host name" in failed.reason


def test_a_name_of_any_length(bench: Bench) -> None:
    """What the client calls itself is cut, not refused."""
    server = bench.server()
    bench.client(server, bench.service().port, name="x" * 10_000)
    sock = bench.connect(server)
    sock.sendall(b"x")
    assert sock.recv(1) == b"x"
