"""How servers and clients begin and end: from any thread, at any time, with nothing left behind."""

from __future__ import annotations

import _thread
import contextlib
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from _tcprelay.openssl import run_openssl
from _tcprelay.server.account import Account, WorkerAccount
from _tcprelay.server.intake import ParentIntake
from _tcprelay.server.pool import Pool
from _tcprelay.sockets import listen
from _tcprelay.tcp import RESET_ON_CLOSE, Probing
from _tcprelay.threads import Threads
from _tcprelay.waiting import Deadline
from tcprelay import (
    AcceptPaused, ConnectionClosed, ConnectionFailed, ConnectionOpened, Draining, Event, Listening, RelayClient,
    RelayServer, create_relay_client, create_relay_server,
)  # fmt: skip

from .certificates import Certificates
from .conftest import PATIENCE, connect, read_all, read_exactly, replace, wait_until, Bench


def test_the_reference_s_functions(bench: Bench) -> None:
    """`create_relay_server` and `create_relay_client` start at once; `end` is the word for stopping."""
    service = bench.service()
    server = create_relay_server(0, 0)
    client = create_relay_client("localhost", service.port, "localhost", server.relay_address[1], 1)
    with connect(server.service_addresses["default"]) as sock:
        sock.sendall(b"hello")
        assert read_exactly(sock, 5) == b"hello"
    client.end()
    server.end()
    with pytest.raises(ConnectionRefusedError):
        connect(server.service_addresses["default"])


def test_ending_before_starting_and_twice(bench: Bench) -> None:
    """`end` may come at any time and any number of times; a relay that has ended cannot be started."""
    server = RelayServer(0, 0)
    server.end()
    server.end()
    with pytest.raises(RuntimeError):
        server.start()
    client = RelayClient("localhost", 1, "localhost", 1, 1)
    client.end()
    client.end()


def test_ending_from_many_threads_at_once(bench: Bench) -> None:
    """Each caller returns when the relay has ended."""
    server = bench.relay()
    sock = bench.connect(server)
    sock.sendall(b"x")
    assert sock.recv(1) == b"x"
    threads = [threading.Thread(target=server.end) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.mark.parametrize("kind", [ConnectionOpened, ConnectionClosed])
def test_ending_from_an_event(bench: Bench, kind: type[Event]) -> None:
    """`end` may be called in the thread that tells an event, and does not wait for itself."""
    took: list[float] = []

    def on_event(event: Event) -> None:
        if isinstance(event, kind):
            began = time.monotonic()
            server.end(0)
            took.append(time.monotonic() - began)

    server = bench.server(on_event=on_event)
    bench.client(server, bench.service().port)
    try:
        sock = bench.connect(server)
        sock.sendall(b"x")
        sock.recv(1)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)
    except OSError:
        pass  # reset, wherever the end caught it
    wait_until(lambda: took)
    assert took[0] < 3
    server.end()  # from outside, to wait for the thread that ended it


def test_an_event_listener_that_fails_disturbs_nothing(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """The error is logged, the connection goes on."""

    def on_event(event: Event) -> None:
        raise RuntimeError("a listener's own fault")

    server = bench.server(on_event=on_event)
    bench.client(server, bench.service().port)
    sock = bench.connect(server)
    sock.sendall(b"x")
    assert sock.recv(1) == b"x"
    assert "on_event failed for ConnectionOpened" in caplog.text


def test_connections_finish_while_the_server_drains(bench: Bench) -> None:
    """`end` accepts nothing new and lets what is open come to its end."""
    server = bench.relay(drain_timeout=PATIENCE)
    sock = bench.connect(server)
    sock.sendall(b"before")
    assert read_exactly(sock, 6) == b"before"
    ender = threading.Thread(target=server.end)
    ender.start()
    bench.server_events.wait(Draining)
    with pytest.raises(OSError):
        connect(server.service_addresses["default"]).close()
    sock.sendall(b"after")
    sock.shutdown(socket.SHUT_WR)
    assert read_all(sock) == b"after"
    ender.join(PATIENCE)
    assert not ender.is_alive()
    [closed] = bench.server_events.of(ConnectionClosed)
    assert closed.reason == ""


def test_what_does_not_finish_is_reset_at_the_drain_deadline(bench: Bench) -> None:
    """The service client sees an error, not an end, and the record says why."""
    server = bench.relay(drain_timeout=0.3)
    sock = bench.connect(server)
    sock.sendall(b"x")
    assert sock.recv(1) == b"x"
    began = time.monotonic()
    server.end()
    assert 0.3 <= time.monotonic() - began < 3
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    [closed] = bench.server_events.of(ConnectionClosed)
    assert closed.reason == "this relay is ending"


def test_a_second_end_hurries(bench: Bench) -> None:
    """A further call with a shorter time-out ends the draining."""
    server = bench.relay(drain_timeout=60)
    sock = bench.connect(server)
    sock.sendall(b"x")
    assert sock.recv(1) == b"x"
    ender = threading.Thread(target=server.end)
    ender.start()
    bench.server_events.wait(Draining)
    began = time.monotonic()
    server.end(0)
    ender.join(PATIENCE)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("ends_first", ["server", "client"])
def test_blocked_senders_are_woken(bench: Bench, ends_first: str) -> None:
    """Neither a stalled service client nor a stalled service keeps a relay from ending."""
    stop = threading.Event()

    def serve(sock: socket.socket) -> None:
        sock.settimeout(0.2)
        try:
            while not stop.is_set():
                sock.sendall(b"x" * 65536)
        except TimeoutError:
            stop.wait(PATIENCE)

    server = bench.server()
    client = bench.client(server, bench.service(serve).port)
    sock = bench.connect(server)
    sock.settimeout(0.2)
    try:
        while True:
            sock.sendall(b"y" * 65536)  # nobody reads on either side
    except TimeoutError:
        pass
    began = time.monotonic()
    assert (server if ends_first == "server" else client).end(0) == []
    assert time.monotonic() - began < 3
    stop.set()


def test_a_port_in_use_is_an_error_with_nothing_left_bound(bench: Bench) -> None:
    """The message names the address; the ports that had been bound are free again."""
    taken = bench.enter(socket.create_server(("127.0.0.1", 0)))
    port = taken.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as free:
        relay_port = free.getsockname()[1]
    server = RelayServer(relay_port, port, hostname="127.0.0.1")
    with pytest.raises(OSError, match=rf"cannot listen on 127.0.0.1:{port}: address already in use"):
        server.start()
    socket.create_server(("127.0.0.1", relay_port)).close()


def test_listening_addresses(bench: Bench) -> None:
    """Port 0 takes a free port, which the API and the events tell; by default IPv4 and IPv6 reach it."""
    server = bench.server(service=["other=127.0.0.1:0"])
    assert set(server.service_addresses) == {"default", "other"}
    told = {event.service: event.address for event in bench.server_events.of(Listening)}
    assert told[""].endswith(f":{server.relay_address[1]}")
    assert told["other"] == "127.0.0.1:{}".format(server.service_addresses["other"][1])
    hosts = ["127.0.0.1", "::1"] if socket.has_dualstack_ipv6() else ["127.0.0.1"]
    for host in hosts:
        socket.create_connection((host, server.service_addresses["default"][1]), PATIENCE).close()


def test_accepted_sockets_inherit_the_options(bench: Bench) -> None:
    """No delay, keepalive and RST on close are set on the listener, once, and hold for what it accepts."""
    [listener] = map(bench.enter, listen("127.0.0.1", 0))
    bench.enter(connect(listener.getsockname()))
    listener.setblocking(True)
    sock, _ = listener.accept()
    with sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == RESET_ON_CLOSE


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="this system has no TCP_KEEPIDLE")
def test_keepalive_begins_at_different_moments(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that are opened together must not all be probed together; accepted and dialled ones alike, and not
    before they have lasted until a sweep."""
    spread: list[int] = []
    real = Probing.spread

    def note(probing: Probing, sock: socket.socket) -> None:
        real(probing, sock)
        spread.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE))

    monkeypatch.setattr(Probing, "spread", note)
    server = bench.relay()
    spread.clear()
    for _ in range(10):
        sock = bench.connect(server)
        sock.sendall(b"x")
        assert read_exactly(sock, 1) == b"x"
    wait_until(lambda: len(spread) >= 20)  # the service clients' and the services'
    assert len(set(spread)) == 10
    assert (min(spread), max(spread)) == (20, 29)


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's options")
@pytest.mark.parametrize(
    ("keepalive", "dead_path", "begins", "interval", "count"),
    [(20, 900, range(20, 30), 15, 60), (6, 120, range(6, 9), 6, 20), (1, 20, range(1, 2), 1, 20),
     (20, 0, range(20, 30), 20, 127), (60, 20, range(60, 90), 10, 2), (2, 900, range(2, 3), 2, 127)],
)  # fmt: skip
def test_keepalive_and_dead_path(
    bench: Bench, keepalive: float, dead_path: float, begins: range, interval: int, count: int
) -> None:
    """When the first question comes, and how many of them, from option to socket; of all four legs."""
    server = bench.server(keepalive=keepalive, dead_path=dead_path)
    client = bench.client(server, bench.service().port, keepalive=keepalive, dead_path=dead_path)
    sock = bench.connect(server)
    sock.sendall(b"x")
    assert read_exactly(sock, 1) == b"x"
    for role in (server, client):
        [splice] = role.runtime.splices.snapshot()
        role.runtime.splices.sweep()
        for leg in (splice.stream.sock, splice.link.sock):
            options = [leg.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"))
                       for name in ("KEEPIDLE", "KEEPINTVL", "KEEPCNT")]  # fmt: skip
            assert options[0] in begins
            assert options[1:] == [interval, count]


def test_accepting_survives_a_lack_of_threads(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection for which no thread can be had is refused; when there are threads again, the next is served."""
    server = bench.relay()

    def start(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", start)
        for _ in range(20):  # more than threads are parked
            try:
                bench.connect(server)
            except ConnectionResetError:
                pass
        [paused, *_] = bench.server_events.wait(AcceptPaused)
        assert paused.reason == "cannot start a thread"
        assert len(bench.server_events.of(AcceptPaused)) <= 2
        for sock in bench.connections:
            sock.close()
    with bench.connect(server) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"


@pytest.mark.parametrize("place", ["hand_on", "accept", "selector"])
def test_an_unexpected_error_does_not_end_the_acceptor(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    """It is logged, and what comes next is accepted, as many from one address as before."""
    server = bench.server(max_per_address=1)
    bench.client(server, bench.service().port)
    failed: list[int] = []

    def fail_once(real: Callable[..., Any]) -> Callable[..., Any]:
        def function(*words: Any) -> Any:
            if not failed:
                failed.append(1)
                raise ZeroDivisionError
            return real(*words)

        return function

    if place == "selector":
        real = selectors.DefaultSelector.select
        monkeypatch.setattr(selectors.DefaultSelector, "select", fail_once(real))
        wait_until(lambda: failed)
    else:
        monkeypatch.setattr(server._listeners, place, fail_once(getattr(server._listeners, place)))
        with contextlib.suppress(ConnectionResetError):
            bench.connect(server).recv(1) if place == "hand_on" else bench.connect(server).close()
        wait_until(lambda: failed)

    def is_served() -> bool:
        with contextlib.suppress(ConnectionResetError), connect(server.service_addresses["default"]) as sock:
            sock.sendall(b"x")
            return sock.recv(1) == b"x"
        return False

    wait_until(is_served)
    assert "ZeroDivisionError" in caplog.text


def test_a_reload_that_fails_in_a_way_nobody_expected(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The old credentials stay in force; where openssl does not come back it is one line."""
    server = bench.server(token="a")
    before = server.runtime.credentials

    def raise_error(error: Exception) -> None:
        raise error

    monkeypatch.setattr(server, "_load_credentials", lambda options: raise_error(ZeroDivisionError()))
    assert not server.reload()
    assert "ZeroDivisionError" in caplog.text
    caplog.clear()
    monkeypatch.setattr(
        "_tcprelay.system.subprocess.run", lambda *_, **__: raise_error(subprocess.TimeoutExpired("openssl", 60))
    )
    monkeypatch.setattr(server, "_load_credentials", lambda options: run_openssl(["version"], instead=""))
    assert not server.reload()
    assert caplog.messages == ["cannot reload, all stays as it was: the openssl command does not come to an end"]
    assert server.runtime.credentials is before


def test_threads_that_finish_while_their_names_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task is taken away by its thread at any moment, also between two looks at it."""

    class Fleeting:
        """A thread whose task is there once."""

        ident = 0

        def __init__(self) -> None:
            self.looks = 0

        @property
        def task(self) -> object:
            self.looks += 1
            return (print, ()) if self.looks == 1 else None

    threads = Threads()
    threads._workers.add(Fleeting())  # type: ignore[arg-type]
    assert threads.end(Deadline(0)) == ["print"]


def test_threads_are_parked_and_used_again() -> None:
    """A thread that has done its work runs the next function, and all end together."""
    threads = Threads()
    seen = []
    for _ in range(20):
        done = threading.Event()
        threads.start(lambda done=done: (seen.append(threading.get_ident()), done.set()))  # type: ignore[func-returns-value]
        assert done.wait(PATIENCE)
        wait_until(lambda: threads._parked)
    assert len(set(seen)) == 1
    assert threads.end(Deadline(PATIENCE)) == []
    with pytest.raises(RuntimeError, match="ending"):
        threads.start(print)


def test_parked_threads_go_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a burst has left behind does not stay."""
    monkeypatch.setattr(Threads, "PARKED", 0.05)
    threads = Threads()
    barrier = threading.Barrier(11)
    for _ in range(10):
        threads.start(barrier.wait)
    barrier.wait(PATIENCE)
    wait_until(lambda: len(threads) == 0)
    threads.end(Deadline(0))


def test_an_error_in_a_thread_is_logged_and_the_thread_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """A bug in one connection's thread does not take the thread away from the next."""
    threads = Threads()
    threads.start(lambda: 1 // 0)
    wait_until(lambda: threads._parked)
    assert "ZeroDivisionError" in caplog.text
    assert len(threads) == 1
    assert threads.end(Deadline(PATIENCE)) == []


@pytest.mark.parametrize("role", ["server", "client"])
def test_an_unexpected_error_does_not_end_the_keeper(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, role: str
) -> None:
    """It is logged, and the keeper goes on."""
    server = bench.server(idle_timeout=0.2)
    client = bench.client(server, bench.service().port, idle_timeout=0.2)
    splices = (server if role == "server" else client).runtime.splices
    real, calls = splices.sweep, []

    def sweep() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError
        real()

    monkeypatch.setattr(splices, "sweep", sweep)
    wait_until(lambda: len(calls) >= 3)
    assert "unexpected error in the keeper" in caplog.text


def test_an_unexpected_error_does_not_end_the_intake(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that has no memory for what its parent sends takes it when there is some again."""
    server = bench.server()
    answers: list[tuple[bytes, list[int]]] = [(b"", [])]

    def receive_message(_: object) -> tuple[bytes, list[int]]:
        replace(monkeypatch, "receive_message", lambda _: answers.pop())
        raise MemoryError

    ours, peer = socket.socketpair()
    account = WorkerAccount(Account(1, ["default"]), 0)
    intake = ParentIntake(server.runtime, Pool(["default"], 1, 1), server._listeners, ours, account)
    monkeypatch.setattr(server.runtime.stop, "wait", lambda _: None)
    replace(monkeypatch, "receive_message", receive_message)
    intake._take()
    assert answers == []
    assert "unexpected error in the intake" in caplog.text
    intake._pool.selector.close()
    ours.close()
    peer.close()


IMPORTS = """
import socket, sys, tcprelay
from tcprelay import RelayClient, RelayServer

TLS = dict(zip(["cert", "key", "ca_file"], sys.argv[1:4]))
with socket.create_server(("127.0.0.1", 0)) as service:
    links = {"token": "a", "tls": "relay", "drain_timeout": 0}
    server = RelayServer(0, 0, cert=TLS["cert"], key=TLS["key"], **links).start()
    client = RelayClient("localhost", service.getsockname()[1], "localhost", server.relay_address[1],
                         ca_file=TLS["ca_file"], try_service=False, **links).start()
    before = set(sys.modules)
    with socket.create_connection(("127.0.0.1", server.service_addresses["default"][1])) as sock:
        far = service.accept()[0]
        far.sendall(bytes(1 << 20))
        have = 0
        while have < 1 << 20:
            have += len(sock.recv(1 << 16))
        far.close()
    wrong = RelayClient("localhost", 1, "localhost", 1, token="b", drain_timeout=0).start()
    while not wrong._branches._all[0].stock.services[0].failures:
        wrong.runtime.stop.wait(0.01)
    late = set(sys.modules) - before
    for relay in (wrong, client, server):
        relay.end()
print("late:", sorted(late))
"""


def test_nothing_is_imported_while_serving(certificates: Certificates) -> None:
    """What is imported late must be so at the start: later, an import can fail for want of a descriptor."""
    files = [certificates.path(name) for name in ("server.pem", "server.key", "ca.pem")]
    done = subprocess.run([sys.executable, "-c", IMPORTS, *files], capture_output=True, text=True, timeout=60)
    assert done.stdout == "late: []\n", done.stdout + done.stderr


def test_a_flood_does_not_fill_the_log(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """Ten refusals a second are told one by one, the others by their number; ``on_event`` and the counters get all."""
    server = bench.server(max_connections=1)
    bench.client(server, bench.service().port, num_conn=1)
    with bench.connect(server) as held:
        held.sendall(b"x")
        assert read_exactly(held, 1) == b"x"
        for _ in range(25):
            with contextlib.suppress(ConnectionResetError):  # it may be refused while it connects
                bench.connect(server)
        bench.server_events.wait(ConnectionFailed, 25)
        wait_until(lambda: any("more lines like that" in record.getMessage() for record in caplog.records))
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    told = sum("too many connections" in line for line in lines)
    left_out = sum(int(line.split()[0]) for line in lines if "more lines like that (ConnectionFailed)" in line)
    assert told + left_out == 25
    assert told in (10, 20), "in one second, or in two"
    assert server.counters["failed"] == 25


@pytest.mark.parametrize("trust", [{"token": "t"}, {"allow_unauthenticated": True}])
@pytest.mark.parametrize("last", [False, True])
def test_a_server_may_be_ended_by_who_hears_that_it_listens(last: bool, trust: dict[str, Any]) -> None:
    """Of the first port or of the last: `start` returns, and nothing is left."""

    def on_event(event: Event) -> None:
        if isinstance(event, Listening) and bool(event.service) == last:
            server.end(0)

    server = RelayServer(0, 0, hostname="127.0.0.1", on_event=on_event, **trust)
    if not last:
        with contextlib.suppress(OSError):  # the other port's listener is closed by now
            server.start()
    else:
        server.start()
    assert server.end() == []


def test_the_invitation_before_the_start() -> None:
    """There is none where nothing was made, and the port is the option's where it is not bound yet."""
    assert RelayServer(10080, 0, token="t").invitation(with_secrets=True) == ""


@pytest.mark.parametrize("wire", ["v1", "raw"])
def test_nobody_takes_a_part_for_the_whole(bench: Bench, wire: str) -> None:
    """While a connection lives, the death of either relay resets its ends."""
    server = bench.server(wire=wire)
    client = bench.client(server, bench.service().port, wire=wire)
    sock = bench.connect(server)
    sock.sendall(b"x")
    assert read_exactly(sock, 1) == b"x"
    for role in (server, client):
        [splice] = role.runtime.splices.snapshot()
        for leg in [splice.stream, *([splice.link] if wire == "raw" else [])]:
            assert leg.sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == RESET_ON_CLOSE


def test_what_a_relay_tells_before_its_start() -> None:
    """Counters are there, addresses not yet."""
    server, client = RelayServer(0, 0, token="t"), RelayClient("localhost", 1, "localhost", 1)
    assert {**server.counters, "waiting": 0} == {**client.counters, "waiting": 0}
    assert set(server.counters.values()) == {0}
    for name in ("relay_address", "service_addresses"):
        with pytest.raises(RuntimeError, match="has not been started"):
            getattr(server, name)
