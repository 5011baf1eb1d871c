"""Fixtures for all tests: relays on free ports, services to put behind them, and a watch for what is left over."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from _tcprelay.client.stock import Stock
from tcprelay import Event, RelayClient, RelayServer

from .certificates import Certificates, make_all
from .watch import WATCH
from .wire import Wire, without_wire

if TYPE_CHECKING:
    from .peers import Peers
    from .rigs import Rig

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as of what a shell has started in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what the tests start does not ignore it either

PATIENCE = 10.0
"""Seconds within which anything that a test waits for must happen."""


def wait_until(condition: Callable[[], Any], timeout: float = PATIENCE) -> Any:
    """The first true value of `condition`; fails at the deadline.  For state that no descriptor announces."""
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while not (value := condition()):
        if time.monotonic() >= deadline:
            WATCH.tell(why := f"not within {timeout} s: {condition}")
            raise AssertionError(why)
        pause.wait(0.005)
    return value


def unused_port() -> int:
    """A port of this host where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def connect(address: tuple[str, int], timeout: float = PATIENCE, source: str = "") -> socket.socket:
    """A connection to a port on loopback, with a deadline on every call, from another address of loopback where one is
    named.  One that is reset before it is made is given out reset: a test sees the same, whoever was faster."""
    try:
        return socket.create_connection(("127.0.0.1", address[1]), timeout, (source, 0) if source else None)
    except ConnectionResetError:
        return _reset_connection(timeout)


def _reset_connection(timeout: float) -> socket.socket:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sock = socket.create_connection(listener.getsockname(), timeout)
        far, _ = listener.accept()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.close()
    return sock


def read_all(sock: socket.socket) -> bytes:
    """Everything up to the end; raises what breaks it."""
    pieces = []
    while piece := sock.recv(1 << 20):
        pieces.append(piece)
    return b"".join(pieces)


def read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        assert piece, f"the end after {len(data)} of {count} bytes"
        data += piece
    return data


class Recorder:
    """Collects events for a test to look at and wait for."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def wait(self, kind: type[Event], count: int = 1, timeout: float = PATIENCE) -> list[Any]:
        return list(wait_until(lambda: len(found := self.of(kind)) >= count and found, timeout))


class Service:
    """A service on a free port, or at a Unix socket: calls `serve` with each connection, in a thread of its own."""

    def __init__(self, serve: Callable[[socket.socket], object], path: str = "", address: str = "127.0.0.1",
                 port: int = 0) -> None:  # fmt: skip
        self._serve = serve
        self.port = 0
        if path:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(path)
            self._listener.listen()
        else:
            self._listener = socket.create_server((address, port))
            self.port = self._listener.getsockname()[1]
        self.connections = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._run, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _run(self, sock: socket.socket) -> None:
        with sock:
            sock.settimeout(PATIENCE)
            try:
                self._serve(sock)
            except OSError:
                pass

    def refuse(self) -> None:
        """Take no further connection; those that live go on."""
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # closed before
        self._listener.close()

    def close(self) -> None:
        self.refuse()
        for thread in self._threads:
            thread.join(2 * PATIENCE)


def echo(sock: socket.socket) -> None:
    """Sends back what it gets, to the end."""
    while data := sock.recv(65536):
        sock.sendall(data)


class Bench:
    """Makes services, relays and connections for a test, and takes them away again in reverse order."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.server_events = Recorder()
        self.client_events = Recorder()
        self.connections: list[socket.socket] = []

    def service(self, serve: Callable[[socket.socket], object] = echo) -> Service:
        service = Service(serve)
        self._stack.callback(service.close)
        return service

    def server(self, **options: Any) -> RelayServer:
        options = {"service_port": 0, "drain_timeout": 0.0, "on_event": self.server_events, **options}
        return self._stack.enter_context(RelayServer(0, **options))

    def client(self, server: RelayServer, port: int | None, **options: Any) -> RelayClient:
        """A client with (by default) two links, once both sides count them as idle."""
        own = {"num_conn": 2, "drain_timeout": 0.0, "on_event": self.client_events, "try_service": False}
        options = {**own, **options}
        idle = server.counters["links_idle"]
        client = self._stack.enter_context(
            RelayClient("127.0.0.1", port, "127.0.0.1", server.relay_address[1], **options)
        )
        wanted = options["num_conn"] * len(client.options.services)
        wait_until(lambda: server.counters["links_idle"] >= idle + wanted and client.counters["links_idle"] >= wanted)
        return client

    def relay(self, serve: Callable[[socket.socket], object] = echo, **options: Any) -> RelayServer:
        """A server and a client with a service behind it; options common to both."""
        server = self.server(**options)
        self.client(server, self.service(serve).port, **options)
        return server

    def connect(self, server: RelayServer, service: str = "default") -> socket.socket:
        self.connections.append(self._stack.enter_context(connect(server.service_addresses[service])))
        return self.connections[-1]

    def enter(self, context: Any) -> Any:
        return self._stack.enter_context(context)


def replace(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    """Put a value in the place of a constant or a function, in every room that has it."""
    house = [module for place, module in sys.modules.items() if place.startswith(("_tcprelay", "tcprelay_"))]
    rooms = [module for module in house if name in vars(module)]
    assert rooms, f"no room has {name}"
    for module in rooms:
        monkeypatch.setattr(module, name, value)


def stock_of(client: RelayClient) -> Stock:
    """The links of a client to its first relay server, also where it has not been started."""
    branches = client._branches
    if not branches._all:
        [relay, *_] = client.options.relays
        branches._all.append(client._make_branch(relay, relay, branches))
    return branches._all[0].stock


def connect_from(bench: Bench, host: str, port: int) -> socket.socket:
    """A connection from another address of loopback."""
    sock: socket.socket = bench.enter(connect(("", port), source=host))
    return sock


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Peers]:
    """Starts relays and real programs for a test; with `workers` as well, relays with and without."""
    from .peers import Peers

    with ExitStack() as stack:
        yield Peers(stack, tmp_path)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Path]:
    """A directory for large files, which do not outlive the test."""
    path = tmp_path / "files"
    path.mkdir()
    yield path
    for file in path.iterdir():
        file.unlink()


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A connection that is being carried."""
    from .rigs import Rig

    with ExitStack() as stack:
        made = Rig(stack)
        stack.callback(made.close)
        yield made


@pytest.fixture
def later_rig() -> Iterator[Rig]:
    """One that the test starts."""
    from .rigs import Rig

    with ExitStack() as stack:
        made = Rig(stack, start=False)
        stack.callback(made.close)
        yield made


@pytest.fixture
def long_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    """The opening exchange does not end because of the time."""
    replace(monkeypatch, "OPENING_TIME", 6 * PATIENCE)


@pytest.fixture
def bench() -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(stack)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """A CA, a foreign one, and what they have signed."""
    return make_all(tmp_path_factory.mktemp("certificates"))


def pytest_sessionstart() -> None:
    WATCH.start()


def pytest_sessionfinish() -> None:
    WATCH.stop()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """Beside each failure stands what the watch sees; the stacks, too, where a deadline was met."""
    report = (yield).get_result()
    if report.failed:
        report.sections.append(("watch", WATCH.look()))
        if call.excinfo and call.excinfo.errisinstance(TimeoutError):
            report.sections.append(("stacks", WATCH.stacks()))


def _descriptors() -> dict[str, str]:
    found = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            pass  # the descriptor of the listing itself
    return found


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    """Fails a test that leaves a thread or a descriptor behind."""
    WATCH.renew()
    threads, descriptors = _count_threads(), _descriptors() if os.path.isdir("/proc/self/fd") else None
    yield
    wait_until(lambda: _count_threads() <= threads)
    if descriptors is not None:
        left = {n: what for n, what in _descriptors().items() if n not in descriptors}
        assert not left, f"descriptors left open: {left}"


def _count_threads() -> int:
    """The threads of this process; the relay's own are not all known to `threading`."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return threading.active_count()


@pytest.fixture(scope="session")
def runtime_directory() -> Iterator[Path]:
    """For all tests: its path has to be short (see `places.LONGEST_PATH`)."""
    with tempfile.TemporaryDirectory(prefix="relay-") as path:
        yield Path(path)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runtime_directory: Path) -> None:
    """No option comes from the environment or from the configuration of whoever runs the tests, and nothing is kept
    where this host keeps things."""
    for name in list(os.environ):
        if name.startswith("TCPRELAY_") and name != "TEST_REQUIRE_PEERS":
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "own-state"))
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "RUNTIME_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime_directory))


@pytest.fixture(params=[os.environ["TEST_WORKERS"]] if os.environ.get("TEST_WORKERS") else ["0", "2"])
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """``--workers`` of each relay command that the test starts: none and two, or what TEST_WORKERS says."""
    monkeypatch.setenv("TEST_WORKERS", request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def _real_peer(request: pytest.FixtureRequest) -> None:
    """Skips a test whose real peer is not installed, or fails it where peers are required."""
    for marker in request.node.iter_markers("peer"):
        if missing := [program for program in marker.args if not shutil.which(program, path=PEER_PATH)]:
            no_peer(f"program not found: {', '.join(missing)}")


def no_peer(reason: str) -> NoReturn:
    """Skip the test, or fail it where all that it needs must be there."""
    if os.environ.get("TEST_REQUIRE_PEERS"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def lay_wire() -> Iterator[Callable[..., Wire]]:
    """Lays a `Wire` for the test; its arguments are those behind the first one of that."""
    if missing := without_wire():
        no_peer(missing)
    with ExitStack() as stack:
        yield partial(Wire, stack)


PEER_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

__all__ = ["PATIENCE", "PEER_PATH", "Bench", "Recorder", "Service", "connect", "echo", "read_all", "read_exactly"]


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Takes away what the commands set up for the whole process."""
    yield
    logger = logging.getLogger("tcprelay")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = True
