"""The relay server: accepts links and service clients, and pairs them.

    tcprelays --relay-port 10080 --service-port 10081

Threads, beside one for each link in its handshake and one or two for each connection:

    acceptor   blocks in a selector over all listeners and `_stop`; hands every socket to a thread of its own;
               joined by `RelayServer.end`
    keeper     blocks in a selector over all idle links and `_stop`; hears PONG and BYE, sends PING, closes
               dead and surplus links, and sweeps over the connections; joined by `RelayServer.end`

An idle link needs no thread: the keeper watches all of them.  A link's life:

    _accept ─▶ _serve_link: HELLO … WELCOME ─▶ Pool.put ─▶ its thread is parked again
                                                 │   ▲
    _accept ─▶ _serve_client: Pool.take ◀────────┘   │      the service client's thread now owns the link:
                 _start: START, first bytes … READY   │      it sends and receives alone until READY,
                 Splice.run: the opening exchange,   │      then carries the opening exchange, and
                 then two pumps                      │      is one of the two pumps of what lasts
                 └── idle again ─────────────────────┘

Who holds a link out of the pool owns it: the service client's thread, or the keeper while it looks at it.
Ending: stop and join the acceptor, close the listeners, drop who waits, say BYE on idle links, let
connections finish until the drain deadline, wake the rest, join everything.

With --workers, `ServerWorkers` accepts in a process of its own, and each worker is a `RelayServer` whose acceptor is
replaced by threads that take what the parent sends (`RelayServer._take_connections`); see "Workers" below.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import math
import mmap
import os
import select
import selectors
import shlex
import socket
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import tcprelay
from tcprelay import (
    ABORT, BYE, CHALLENGE, CLIENT, FAIL, HELLO, IDLE, PING, PONG, READY, SERVER, START, WELCOME,
    ConnectionClosed, ConnectionFailed, ConnectionOpened, Credentials, Deadline, Endpoint, Event, Link, LinkDown,
    LinkFault, LinkUp, Options, Relay, Splice, Stopping, Stream, TLSStream, WorkerProcess, Workers, encode_frame,
    option, parse_count, parse_endpoint, parse_flag, parse_heartbeat, parse_host, parse_name,
    parse_path, parse_port, parse_seconds, say_error, show_address, shown,
)  # fmt: skip

if TYPE_CHECKING:
    import ssl
else:
    ssl = tcprelay.ssl  # imported when it is used

__all__ = ["RelayServer", "ServerOptions", "create_relay_server", "main"]

EARLY_BYTES = 65536
"""How much a service client may send before READY; it is kept, to be offered to another link after a FAIL."""
LEAST_HANDSHAKES, MOST_HANDSHAKES = 256, 2048
"""Handshakes under way at once, on the relay port and (with TLS) on the service ports each: a quarter of the
connections that there may be, within these bounds.  A silent one costs a thread and 16 KiB, with TLS 60 (measured):
where the limit on open files is high, a flood must not take all the memory of a small machine."""
TOO_MANY_HANDSHAKES = "too many handshakes at once"
ACCESS_DENIED = b"\x15\x03\x03\x00\x02\x02\x31"
"""A TLS alert before the handshake: fatal, access_denied (RFC 8446, 6)."""
SPARE_TAKERS = 8
"""Threads of a worker that wait for connections, at most."""
SUSPICION = 3.0
"""Seconds without any acknowledgement of START after which its relay client's idle links are to be proven alive, where
the kernel has sent it again by then: on a slow path an acknowledgement takes longer."""
STANDSTILL = 5.0
"""Seconds without a link for anybody after which a service counts as not served, where service clients wait."""
LOOK_FOR_ROOM = 0.002
"""Seconds from one look to the next whether the queue of a service has room again, while the kernel holds who comes."""
SURPLUS_TIME = 60.0
"""Seconds after which an idle link beyond what its client asked for is retired."""


# --- Options and events ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ServicePort:
    """A service and where its clients connect; host "" means the server's ``hostname``."""

    name: str
    host: str
    port: int


def parse_service(text: str) -> ServicePort:
    """``NAME=[ADDRESS:]PORT``.  Raises `ValueError` that says what is accepted."""
    name, equals, where = text.partition("=")
    if not equals:
        raise ValueError("NAME=PORT or NAME=ADDRESS:PORT")
    endpoint = parse_endpoint(where, default_host="")
    if endpoint.path:
        raise ValueError("NAME=PORT or NAME=ADDRESS:PORT")
    return ServicePort(parse_name(name), endpoint.host, endpoint.port)


@dataclass(frozen=True, kw_only=True)
class ServerOptions(Options):
    """The options of `RelayServer` and of ``tcprelays``."""

    relay_port: int | None = option(
        None, parse_port, "port for relay clients; 0 takes a free one",
        group="Addresses", metavar="PORT", spelling="relayPort")  # fmt: skip
    service_port: int | None = option(
        None, parse_port, "port for the clients of the service named default; 0 takes a free one",
        group="Addresses", metavar="PORT", spelling="servicePort")  # fmt: skip
    service: tuple[ServicePort, ...] = option(
        (), parse_service, "a further service and its port; may be repeated",
        group="Addresses", metavar="NAME=[ADDRESS:]PORT", many=True)  # fmt: skip
    hostname: str = option(
        "", parse_host, "address to listen on; a name is all its addresses, :: is IPv4 too",
        group="Addresses", metavar="ADDRESS", secures=True,
        shown_default="all, IPv6 and IPv4")  # fmt: skip
    pair_timeout: float = option(
        20.0, parse_seconds, "seconds that a service client waits for a link and its service",
        group="Connections", metavar="SECONDS")  # fmt: skip
    max_pending: int = option(
        512, parse_count, "service clients of one service that may wait for a link at once; who comes next waits in "
        "the system's queue, or is refused where no link comes free",
        group="Connections", metavar="N")  # fmt: skip
    max_connections: int = option(
        0, parse_count, "connections at once", group="Connections", metavar="N",
        shown_default="a quarter of the limit on open files")  # fmt: skip
    max_per_address: int = option(
        0, parse_count, "connections at once from one address (IPv6: one /64 network); 0 is no limit",
        group="Connections", metavar="N", secures=True)  # fmt: skip
    heartbeat: float = option(
        15.0, parse_heartbeat, "seconds between two PINGs on an idle link; it is dead after 2.5 silent ones",
        group="Links", metavar="SECONDS")  # fmt: skip
    max_links_per_address: int = option(
        0, parse_count, "connections to the relay port at once from one address (as above); 0 is no limit",
        group="Links", metavar="N", secures=True)  # fmt: skip
    auth: bool = option(
        False, parse_flag, "ask relay clients for a certificate, verified against --ca-file; implies --tls",
        group="Trust", spelling="auth")  # fmt: skip
    service_cert: str = option(
        "", parse_path, "certificate for the service ports, PEM, if it is not to be --cert or --pfx",
        group="TLS", metavar="FILE")  # fmt: skip
    service_key: str = option(
        "", parse_path, "its private key, PEM", group="TLS", metavar="FILE")  # fmt: skip
    service_pfx: str = option(
        "", parse_path, "both in one PFX file, with the same passphrase", group="TLS", metavar="FILE")  # fmt: skip
    state_dir: str = option(
        "", parse_path, "where the self-signed certificate and the token of a start with --tls alone are kept",
        group="TLS", metavar="DIRECTORY",
        shown_default="systemd's state directory, or ~/.local/state/tcprelay")  # fmt: skip
    allow_unauthenticated: bool = option(
        False, parse_flag, "accept links from other hosts although neither token nor certificates are asked for",
        group="Trust")  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relay_port is None:
            raise ValueError("--relay-port is required")
        if not self.pair_timeout:
            raise ValueError("--pair-timeout must be more than 0")
        services = self.services
        if not services:
            raise ValueError("--service-port or --service is required")
        names = [service.name for service in services]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two services are named {twice[0]}")
        ports = [(self.hostname, self.relay_port)] + [(s.host or self.hostname, s.port) for s in services]
        if taken := [port for host, port in ports if port and ports.count((host, port)) > 1]:
            raise ValueError(f"two ports are {taken[0]}")
        if self.wire == "raw" and len(services) > 1:
            raise ValueError("--wire raw carries one service: links have no name there")
        if self.auth and not self.ca_file:
            raise ValueError("--auth needs --ca-file: the CA certificates that relay clients' certificates come from")
        if self.service_cert and self.service_pfx:
            raise ValueError("give --service-cert or --service-pfx, not both")
        # What secures nothing as it stands must not look as if it did.
        for name in ("cert", "pfx"):
            if getattr(self, name) and not (self.tls or self.auth):
                raise ValueError(f"--{name} is of no use without --tls")
        for name in ("service_cert", "service_key", "service_pfx"):
            if getattr(self, name) and self.tls not in ("both", "service"):
                raise ValueError(f"--{name.replace('_', '-')} is of no use without --tls both or --tls service")
        if self.ca_file and not self.auth:
            raise ValueError("--ca-file is of no use without --auth")

    @property
    def is_improvised(self) -> bool:
        """TLS without a certificate: one is made, and a token too."""
        given = self.cert or self.pfx or (self.tls == "service" and (self.service_cert or self.service_pfx))
        return bool(self.tls or self.auth) and not given

    @property
    def services(self) -> list[ServicePort]:
        """All services, ``--service-port`` first."""
        first = [] if self.service_port is None else [ServicePort("default", "", self.service_port)]
        return first + list(self.service)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening(Event):
    """The server listens for the clients of `service`, or for relay clients where that is empty.  Told of each address
    where ``hostname`` has several."""

    service: str
    address: str

    def __str__(self) -> str:
        return f"listening for {f'clients of {self.service}' if self.service else 'relay clients'} on {self.address}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientUp(Event):
    """The first link of a relay client for a service is in the pool."""

    says = "service {service}: relay client {name} at {peer} is connected"
    of_all = True
    service: str
    client: str
    name: str
    peer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientDown(Event):
    """The last link of a relay client for a service is gone."""

    says = "service {service}: relay client {name} at {peer} is gone: {reason}"
    of_all = True
    service: str
    client: str
    name: str
    peer: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRefused(Event):
    """Somebody who connected to the relay port got no link."""

    level = logging.WARNING
    says = "link from {peer} refused: {reason}"
    floods = True
    peer: str
    code: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkNotMade(LinkRefused):
    """Its client, or the path, gave the link up before the handshake was complete; nobody here has refused it."""

    level = logging.INFO
    says = "link from {peer} did not come about: {reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptPaused(Event):
    """Connections cannot be taken for a moment.  Told once a second at most."""

    level = logging.WARNING
    says = "cannot take a connection, trying again: {reason}"
    reason: str


class Refusal(Exception):
    """Why a service client or a link is turned away: for the log, and (with a code) in REFUSED for the client."""

    def __init__(self, reason: str, code: str = "", told: str = "") -> None:
        super().__init__(reason)
        self.code = code
        self.told = told or reason

    def apart(self) -> Refusal:
        """The same without a traceback: kept in a variable, that would hold the connection until the collector runs."""
        return Refusal(str(self), self.code, self.told)


class Unacknowledged(ConnectionError):
    """Nothing that was sent on a link has been acknowledged for a while, and no byte of the service client's was."""


class NoLinkHere(Exception):
    """In a worker: it has no link for a service client now, but its parent may find one elsewhere."""


# --- The server -----------------------------------------------------------------------------------------------


class RelayServer(Relay):
    """A relay server.

    Parameters: the relay port, the port of the service named ``default`` (or ``None``), ``on_event``, which is
    called with each `tcprelay.Event` in the thread where it happens and must not block; and every option of
    ``tcprelays`` by its name with underscores (``pair_timeout=5``, ``token="…"``), times in seconds.
    ``service=`` takes strings (``"web=8080"``) or `ServicePort` objects.

    Raises `ValueError` for options that do not fit, and `OSError` where the token file cannot be read.
    """

    options: ServerOptions

    def __init__(
        self,
        relay_port: int,
        service_port: int | None = None,
        *,
        on_event: Callable[[Event], object] | None = None,
        **options: Any,
    ) -> None:
        options["service"] = tuple(
            parse_service(item) if isinstance(item, str) else item for item in options.get("service", ())
        )
        checked = ServerOptions(relay_port=relay_port, service_port=service_port, **options)
        super().__init__("tcprelay.server", checked, checked.max_connections, on_event)
        self._pool: Pool
        self._handshakes: dict[str, Handshakes]
        """Those of links, and the TLS handshakes of service clients, by "link" and "client"."""
        self._bound_handshakes(1)
        self.shares = {"client": Shares(checked.max_per_address), "link": Shares(checked.max_links_per_address)}
        self.listeners: dict[socket.socket, str] = {}
        """Their services, "" for the relay port."""
        self._bound: dict[str, tuple[str, int]] = {}
        self.hand_on = self._start_serving
        """What is done with a connection that was accepted."""
        self.is_full: Callable[[str], bool] = lambda service: self._pool.is_full(service)
        """Whether who comes to a service is left to the kernel for a moment."""
        self._gauges: WorkerGauges | None = None
        """In a worker process; see `ServerWorkers`."""
        self._intake_lock = threading.Lock()  # over the next
        self._takers = 0
        """There, the threads that wait for a connection."""
        self._tell_at = 0.0
        """When the next connection that cannot be taken is to be told."""
        self._make_threads()

    # Beginning and ending

    def _bound_handshakes(self, processes: int) -> None:
        """Let as many handshakes be under way as one of so many processes may have."""
        connections = self._splices.most
        links = max(16, most_handshakes(connections) // processes)
        # Half of the connections are there for service clients that have done theirs.
        clients = min(links, max(1, connections // 2 // processes))
        self._handshakes = {"link": Handshakes(links), "client": Handshakes(clients)}

    def _make_threads(self) -> None:
        self._acceptor = threading.Thread(target=self._accept, name="tcprelay-server acceptor", daemon=True)
        self._keeper = threading.Thread(target=self._keep, name="tcprelay-server keeper", daemon=True)
        self._own_threads = [self._acceptor, self._keeper]

    def _load_credentials(self) -> Credentials:
        options = self.options
        token = options.read_token()
        on_links = options.tls in ("relay", "both") or options.auth
        on_services = options.tls in ("both", "service")
        if not (on_links or on_services):
            return Credentials(token, None, None)
        cert, key, pin = options.cert, options.key, ""
        if options.is_improvised:
            directory = options.state_dir or tcprelay.state_directory()
            cert, key = tcprelay.make_self_signed(directory), ""
            open_to_all = options.auth or options.allow_unauthenticated or options.wire == "raw" or not on_links
            if not (token or open_to_all):
                token = make_token(directory)
        links = services = None
        if on_links:
            links = tcprelay.make_context(options, True, cert, key, options.pfx)
        if links is not None and options.auth:
            tcprelay.trust(links, options.ca_file)
            links.verify_mode = ssl.CERT_REQUIRED
        if on_services:
            own = options.service_cert or options.service_pfx
            files = (
                (options.service_cert, options.service_key, options.service_pfx) if own else (cert, key, options.pfx)
            )
            services = tcprelay.make_context(options, True, *files, prefix="--service-" if own else "--")
        if options.is_improvised:
            with open(cert) as file:
                certificate = file.read().partition("-----BEGIN CERTIFICATE")[1:]
            pin = tcprelay.pin_of(ssl.PEM_cert_to_DER_cert("".join(certificate)))
        return Credentials(token, links, services, pin)

    def invitation(self, with_secrets: bool) -> str:
        """After a start with ``--tls`` alone: the command for the other side."""
        options = self.options
        if not options.is_improvised or self._credentials.links is None:
            return ""
        directory = options.state_dir or tcprelay.state_directory()
        host = socket.gethostname() if options.hostname in ("", "::", "0.0.0.0") else options.hostname
        words = ["tcprelayc", "--relay-host", host, "--relay-port", str(self.relay_address[1]), "--tls"]
        words += ["--pin", self._credentials.pin]
        note = ""
        token_path = os.path.join(directory, "token")
        if options.token_file:
            words += ["--token-file", "FILE"]
            note = f"  (FILE: a copy of {options.token_file})"
        elif self._credentials.token and with_secrets:
            words += ["--token", self._credentials.token.decode(errors="replace")]
        elif self._credentials.token and not options.token:
            words += ["--token-file", "FILE"]
            note = f"  (FILE: a copy of {token_path})"
        if options.wire == "raw":
            words += ["--wire", "raw"]
        for service in options.services:
            words += ["--port", "PORT"] if service.name == "default" else ["--publish", f"{service.name}=HOST:PORT"]
        return f"on the other side, run:{note}\n  {shlex.join(words)}"

    @property
    def relay_address(self) -> tuple[str, int]:
        """The bound host and port for relay clients, after `start`; the first of several (see `Listening`)."""
        return self._bound[""]

    @property
    def service_addresses(self) -> dict[str, tuple[str, int]]:
        """The bound host and port of each service, after `start`; the first of several (see `Listening`)."""
        return {name: address for name, address in self._bound.items() if name}

    @property
    def counters(self) -> dict[str, int]:
        """What has been counted since the start, and how many connections and links there are now."""
        return {
            **self._count(inbound_is_to_link=True),
            "links_idle": self._pool.count_idle(),
            "waiting": self._pool.count_waiting(),
        }

    def prepare(self) -> None:
        """Bind all ports.  Raises `OSError` that names the address, and `Stopping` at a signal."""
        options = self.options
        wanted = [("", options.hostname, options.relay_port or 0)]
        wanted += [(service.name, service.host or options.hostname, service.port) for service in options.services]
        for name, host, port in wanted:
            try:
                self.listeners.update(dict.fromkeys(tcprelay.listen(host, port, self.signals, self._probing), name))
            except Stopping:
                raise
            except OSError as error:
                raise OSError(
                    error.errno, f"cannot listen on {Endpoint(host or '*', port)}: {say_error(error)}"
                ) from error
        for listener, name in self.listeners.items():
            address = listener.getsockname()
            self._bound.setdefault(name, (tcprelay.host_of(address), address[1]))
            self._emit(Listening(service=name, address=show_address(address)))
        if not self._credentials.token and not options.auth:
            self._warn_about_trust()

    def _open(self) -> None:
        """Begin to accept; in a worker, to take what the parent has accepted.  Raises `OSError`."""
        names = [service.name for service in self.options.services]
        # One for each connection, and as many idle ones, which take half as many descriptors.
        self._pool = Pool(names, self.options.max_pending, 2 * self._splices.most, self._gauges)
        if self._gauges is None:
            self.prepare()
        if self._stop.requested:
            return  # a listener of the first events has ended it
        self._pool.selector.register(self._stop.fileno(), selectors.EVENT_READ)
        if self._gauges is None:
            self._acceptor.start()
        else:
            self._takers = 1
            tcprelay.set_timeout(self._intake, socket.SO_RCVTIMEO, tcprelay.Threads.PARKED)
            self._threads.start(self._take_connections)
        self._keeper.start()

    def _warn_about_trust(self) -> None:
        if self.options.secret:
            self._log.warning("--secret crosses the wire readable: whoever can listen in can become a relay client")
        elif self.options.allow_unauthenticated:
            self._log.warning("--allow-unauthenticated: any host that reaches the relay port can become a relay client")
        else:
            addresses = [listener.getsockname() for listener, name in self.listeners.items() if not name]
            local = all(tcprelay.is_loopback(address) for address in addresses)
            level = logging.INFO if local else logging.WARNING
            self._log.log(
                level, "no token is set: links are accepted from this machine alone; others need --token-file"
            )

    def _stop_intake(self) -> None:
        tcprelay.join(self._acceptor, tcprelay.JOIN_TIMEOUT)
        self.close_listeners()
        if self._gauges is not None:
            tcprelay.ignore_oserror(self._intake.shutdown, socket.SHUT_RD)  # wakes who waits there
        for pooled in self._pool.close():
            self._retire(pooled, "this relay server is ending")

    def close_listeners(self) -> None:
        for listener in self.listeners:
            listener.close()

    def _close(self) -> None:
        super()._close()
        self._pool.selector.close()

    # In a worker

    def make_workers(self, count: int) -> Workers:
        return ServerWorkers(self, count)

    def become_one_of(self, count: int, gauges: WorkerGauges) -> None:
        """Be one worker: what is accepted, bounded and counted over all of them is its parent's business."""
        self.close_listeners()
        self.listeners.clear()
        self._make_threads()  # since Python 3.13 those that were made before the fork cannot be started
        self._gauges = gauges
        self._bound_handshakes(count)
        self.shares = {kind: RemoteShares(self, kind) for kind in self.shares}
        self._splices.show = gauges.show_open

    def _take_connections(self) -> None:
        """Serve what the parent sends, one connection after another; the top of its thread.

        There is always one that waits for the next: who takes a connection starts another first, if nobody else
        waits.  So each connection wakes the thread that serves it, and no other.
        """
        while True:
            try:
                message, descriptors = tcprelay.receive_message(self._intake)
            except BlockingIOError:
                with self._intake_lock:
                    if self._takers > 1:  # what a burst has left behind goes
                        self._takers -= 1
                        return
                continue
            except ConnectionResetError:
                return  # the parent was killed
            except Exception:  # out of memory, most likely; nobody else would take what comes
                self._log.exception("unexpected error in the intake")
                self._stop.wait(1.0)
                if self._stop.requested:
                    return
                continue
            if not message:
                return  # it was, or `_stop_intake`
            if not descriptors:  # the kernel had no number for it here
                self._adopt(message, descriptors, os.strerror(errno.EMFILE).lower())
                continue
            with self._intake_lock:
                self._takers -= 1
                alone = not self._takers
                self._takers += alone
            try:
                if alone:
                    self._threads.start(self._take_connections)
            except RuntimeError as error:
                ending = self._stop.requested
                self._adopt(message, descriptors, "the relay server is ending" if ending else str(error))
                continue
            self._adopt(message, descriptors)
            with self._intake_lock:
                if self._takers == SPARE_TAKERS:
                    return
                self._takers += 1

    def _adopt(self, message: bytes, descriptors: list[int], problem: str = "") -> None:
        """Serve a connection that the parent has accepted; or refuse it, where there is a problem."""
        fields, early = tcprelay.decode_message(message)
        assert self._gauges is not None
        service, address = fields["service"], tuple(fields["address"])
        sock, served = None, False
        try:
            if problem:
                self._cannot_take(problem)
                return
            problem = "unexpected error"
            sock = tcprelay.adopt_socket(descriptors[0], address)
            if not service:
                served = True
                self._serve_link(sock, address)
                return
            client = ServiceClient(service, sock, address, self._credentials.services)
            client.resume(fields, early)
            served = True
            if isinstance(client.stream, TLSStream):
                self._settle(client)  # or silent handshakes would seem to take all the links
            self._serve_client(client)
        finally:
            if not served:  # it is reset
                if sock is not None:
                    sock.close()
                elif descriptors:
                    os.close(descriptors[0])
                if service:
                    self._gauges.settle(service)
                    self._leave(address)
                    record = {"id": fields.get("id") or tcprelay.connection_id(), "service": service}
                    seconds = time.monotonic() - fields["since"]
                    self._emit(ConnectionFailed(peer=show_address(address), seconds=seconds, reason=problem, **record))
                else:
                    self.shares["link"].leave(address)
            if not service:
                self._gauges.links_arrived()  # while its handshake lasts it counts as under way, for the balance

    def obey(self, order: dict[str, Any]) -> None:
        if "suspect" in order:
            self._suspect(order["suspect"])
        else:
            self._give_up_one(order["give_up"])

    def _cannot_take(self, reason: str) -> None:
        """Tell that a connection is reset for want of something, once a second at most."""
        if time.monotonic() >= self._tell_at:
            self._tell_at = time.monotonic() + 1.0
            self._log.warning("cannot take a connection: %s", reason)

    def _expect(self, client: ServiceClient) -> None:
        """Count a service client in as one that has no link yet; up to `_settle`."""
        if self._gauges is None and not client.expected:
            client.expected = True
            self._pool.expect(client.service, 1)

    def _settle(self, client: ServiceClient) -> None:
        """A service client has a link, or is gone: the pool knows, and the gauges do where the parent has sent it."""
        if client.expected:
            client.expected = False
            self._pool.expect(client.service, -1)
        if self._gauges is not None and not client.settled:
            client.settled = True
            self._gauges.settle(client.service)
            self._tell_idle(client.service)

    def _leave(self, address: Any) -> None:
        """A service client from this address has left."""
        if self._gauges is not None:
            self._gauges.client_left()
        self.shares["client"].leave(address)

    def _tell_idle(self, service: str) -> None:
        """Where service clients wait elsewhere for a link, and one is idle here: have the parent look."""
        if self._gauges is not None and self._gauges.are_links_wanted(service):
            self.send_to_parent({"look": service})

    def _send_back(self, client: ServiceClient, failed: frozenset[str], reason: str) -> None:
        """Have the parent find another worker that has a link for a service client.  Raises `Refusal`."""
        message = tcprelay.encode_message(client.state(failed, reason), bytes(client.early))
        if len(message) > tcprelay.MESSAGE_SIZE - tcprelay.MESSAGE_ROOM:  # with the ids of hundreds of relay clients
            raise Refusal(f"the service cannot be reached: {reason}")
        assert self._channel is not None
        try:
            tcprelay.send_message(self._channel, message, [client.stream.fd])
        except OSError as error:  # too many descriptors under way, say
            raise Refusal(f"it cannot be passed on to another worker: {say_error(error)}") from error
        client.passed_on = True

    def _give_up_one(self, service: str) -> None:
        """Close an idle link in peace, because service clients that cannot be passed on wait in another worker."""
        with contextlib.suppress(Refusal, NoLinkHere):
            pooled, _ = self._pool.take(service, NOBODY, Deadline(0), wait=False)
            self._retire(pooled, "another worker needs it")

    # Accepting

    def _accept(self) -> None:
        """The acceptor's life, which no unexpected error may end.  It only accepts: whatever could wait happens in the
        connection's thread."""
        while not self._stop.requested:
            try:
                self._accept_all()
            except Exception:
                self._log.exception("unexpected error in the acceptor")
                self._stop.wait(1.0)

    def _accept_all(self) -> None:
        """Accept until `_stop` is requested."""
        pause, told = 0.005, 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self._stop.fileno(), selectors.EVENT_READ)
            for listener in self.listeners:
                selector.register(listener, selectors.EVENT_READ, listener)
            full: list[socket.socket] = []
            while not self._stop.requested:
                for key, _ in selector.select(LOOK_FOR_ROOM if full else None):
                    if key.data is None:
                        continue
                    try:
                        self.accept_from(key.data)
                        pause = 0.005
                        if self.is_full(self.listeners[key.data]):
                            selector.unregister(key.data)
                            full.append(key.data)
                    except (OSError, RuntimeError, MemoryError) as error:
                        # Out of descriptors, memory or threads: the connection stays queued, or is reset.
                        if time.monotonic() - told >= 1.0:
                            told = time.monotonic()
                            self._emit(AcceptPaused(reason=say_error(error)))
                        self._stop.wait(pause)
                        pause = min(2 * pause, 1.0)
                for listener in [one for one in full if not self.is_full(self.listeners[one])]:
                    full.remove(listener)
                    selector.register(listener, selectors.EVENT_READ, listener)

    def accept_from(self, listener: socket.socket) -> None:
        """Take what has connected, and hand it on.  Raises `OSError` and `RuntimeError` where that cannot be done."""
        service = self.listeners[listener]
        for _ in range(64):  # then look at the other listeners
            if self.is_full(service):
                return
            try:
                sock, address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            shares, counted = self.shares["client" if service else "link"], False
            try:
                sock.setblocking(True)  # whatever default a program has set, or the listener handed down
                self._probing.spread(sock)
                counted = shares.enter(address)
                if counted:
                    self.hand_on(service, sock, address)
                else:
                    self._turn_away(service, sock, address)
            except BaseException:
                if counted:
                    shares.leave(address)
                sock.close()
                raise

    def _start_serving(self, service: str, sock: socket.socket, address: Any) -> None:
        if service:
            client = ServiceClient(service, sock, address, self._credentials.services)
            if not isinstance(client.stream, TLSStream):  # or silent handshakes would keep others out
                self._expect(client)
            try:
                self._threads.start(self._serve_client, client)
            except BaseException:
                self._settle(client)
                raise
        else:
            self._threads.start(self._serve_link, sock, address)

    def _turn_away(self, service: str, sock: socket.socket, address: Any) -> None:
        """Close what an address may not have any more; a plain relay client is told why."""
        peer = show_address(address)
        if service:
            sock.close()
            reason = "too many connections from its address at once (--max-per-address)"
            record = {"id": tcprelay.connection_id(), "service": service, "peer": peer}
            self._emit(ConnectionFailed(reason=reason, seconds=0.0, **record))
            return
        refusal = Refusal("there are too many links from its address (--max-links-per-address)", "limit")
        if self.options.wire == "v1" and self._credentials.links is None:
            stream = Stream(sock, f"link with {peer}", address)
            Link(stream, SERVER).refuse(refusal.code, refusal.told)
            stream.complete()
        sock.close()
        self._emit(LinkRefused(peer=peer, code=refusal.code, reason=str(refusal)))

    # Links

    def _serve_link(self, sock: socket.socket, address: Any) -> None:
        """A relay client's connection from accept to the pool; the top of its thread."""
        handshakes, stream, pooled = self._handshakes["link"], None, None
        try:
            stream = make_stream(sock, f"link with {show_address(address)}", address, self._credentials.links)
            handshakes.enter(stream)
            pooled = self._take_in(Link(stream, SERVER))
        finally:
            if stream is not None:
                handshakes.leave(stream)
            if pooled is None:
                (stream or sock).close()
                self.shares["link"].leave(address)
        if pooled is not None:
            self._give_back(pooled)

    def _take_in(self, link: Link) -> PooledLink | None:
        """A link's handshake; ``None`` where it came to nothing, and its client has been told why."""
        stream, deadline = link.stream, Deadline(tcprelay.HANDSHAKE_TIMEOUT)
        gave_up = False
        try:
            self._check_protected_mode(stream)
            if isinstance(stream, TLSStream):
                stream.handshake(deadline.within(tcprelay.HANDSHAKE_STEP), self._stop)
            raw = self.options.wire == "raw"
            return self._greet_raw(stream, deadline) if raw else self._greet(link, deadline)
        except Refusal as error:
            refusal = error.apart()
        except LinkFault as error:
            spoken = tcprelay.guess_protocol(link.unread())
            known = link.machine.state == tcprelay.NEW and spoken != "something else"
            first = f"it speaks {spoken}, not the link protocol: " if known else ""
            refusal = Refusal(f"{first}{error}", "protocol")
        except TimeoutError:
            step = f"{tcprelay.HANDSHAKE_STEP:g} s for each answer and {tcprelay.HANDSHAKE_TIMEOUT:g} s in all"
            path = tcprelay.say_path(stream.sock)
            refusal = Refusal(f"its handshake was not complete in time ({step}){path}", "timeout")
        except Stopping:
            refusal = Refusal("the relay server is ending", "draining")
        except (OSError, EOFError) as error:
            evicted = self._handshakes["link"].was_evicted(stream)
            gave_up = not evicted and (isinstance(error, EOFError) or error.errno is not None)  # or we have
            reason = "closed before its handshake was complete" if isinstance(error, EOFError) else say_error(error)
            refusal = Refusal(TOO_MANY_HANDSHAKES if evicted else reason, "lost")
            if tcprelay.is_tls_error(error):
                refusal, gave_up = Refusal(explain_tls(error), "tls"), False
                if error.reason in NOT_TLS:  # a plain relay client may be told in its own language
                    plain = encode_frame(tcprelay.REFUSED, {"code": "tls", "reason": "it speaks TLS; add --tls"})
                    tcprelay.ignore_oserror(link.sock.sendall, plain)
        self._refuse_link(link, refusal, gave_up)
        return None

    def _refuse_link(self, link: Link, refusal: Refusal, gave_up: bool) -> None:
        """Tell why there is no link, in the log and, as far as it can be told there, to the relay client, unless that
        (or the path) gave it up."""
        stream = link.stream
        # Who has not said a byte may be a raw client, which would take REFUSED for a connection's bytes; or
        # only looked whether the port is open, which is nobody's refusal.
        silent = type(stream) is Stream and not link.unread() and link.machine.state == tcprelay.NEW
        kind = LinkNotMade if gave_up else LinkRefused
        event = kind(peer=show_address(stream.peer), code=refusal.code, reason=str(refusal))
        if silent and gave_up:
            self._log.debug("%s", event)
        else:
            self._emit(event)
        if isinstance(stream, TLSStream) and refusal.code == "protected":
            tcprelay.ignore_oserror(link.sock.sendall, ACCESS_DENIED)
            stream.linger()
            return
        mute = self.options.wire == "raw" or refusal.code == "lost" or (silent and refusal.code == "timeout")
        if not mute and refusal.code != "tls":  # then an alert has been sent
            link.refuse(refusal.code, refusal.told)
        if not mute:
            stream.linger()

    def _greet(self, link: Link, deadline: Deadline) -> PooledLink:
        """HELLO, CHALLENGE, AUTH, WELCOME.  Raises `Refusal`, `LinkFault`, `OSError`, `EOFError`."""
        hello = link.receive(deadline.within(tcprelay.HANDSHAKE_STEP), self._stop)
        if hello.kind != HELLO:
            raise LinkFault("the first frame is not HELLO")
        if hello.fields.get("version") != tcprelay.PROTOCOL_VERSION:
            raise Refusal("the versions differ: this relay server speaks link protocol 1", "version")
        service, client, nonce = hello.text("service"), hello.text("client")[:64], hello.text("nonce")
        proof, token = "", self._credentials.token
        if token:
            own_nonce = tcprelay.new_nonce()
            link.send(CHALLENGE, {"nonce": own_nonce})
            auth = link.receive(deadline.within(tcprelay.HANDSHAKE_STEP), self._stop)
            expected = tcprelay.prove(token, CLIENT, nonce, own_nonce, service, client)
            if not tcprelay.is_proof(auth.text("proof"), expected):
                raise Refusal(
                    "its token is not this server's", "token",
                    "this client's token is not the server's: copy the server's, and name it in --token-file",
                )  # fmt: skip
            proof = tcprelay.prove(token, SERVER, nonce, own_nonce, service, client)
        elif hello.fields.get("token") is True:
            raise Refusal(
                "it wants a token to be proven, and none is set here; set --token-file", "token",
                "the relay server has no token to prove: set the same --token-file there",
            )  # fmt: skip
        if service not in self.service_addresses:
            raise Refusal(f"there is no service {shown(service, 64)} here; add --service to the server", "service")
        name, proven = shown(hello.text("name"), 64), tcprelay.certificate_name(link.stream)
        name = f"{name} (certificate {proven})" if proven else name
        pooled = PooledLink(link, service, client, name, link.stream.peer)
        pooled.worker = int(hello.number("worker", 0, 1e6))
        pooled.wanted = int(hello.number("idle", 1, 1e6))
        if self._gauges is not None:
            pooled.wanted = math.ceil(pooled.wanted / self._gauges.workers)
        welcome = {
            "heartbeat": self.options.heartbeat,
            "address": show_address(self._bound[service]),
            "waiting": self._count_waiting(service),
        }
        self._join_pool(pooled)
        pooled.pongs_due += 1  # until it has answered once, others are given out first: its client may have given up
        try:
            out = link.pack_control(WELCOME, {"proof": proof, **welcome} if proof else welcome)
            link.stream.send(out + link.pack_control(PING))
        except BaseException as error:
            self._forget(pooled, say_error(error))
            raise
        return pooled

    def _greet_raw(self, stream: Stream, deadline: Deadline) -> PooledLink:
        """Raw wire has no handshake, except for the key of node-tcp-relay 0.0.13 where one is set."""
        key = self.options.secret.encode("utf-8", "surrogateescape")
        given = bytearray(len(key))
        have = 0
        while have < len(key):
            count = stream.recv_now(memoryview(given)[have:])
            if count is None:
                tcprelay.wait_for(stream.fd, select.POLLIN, deadline, self._stop)
            elif count == 0:
                raise EOFError("the link was closed")
            have += count or 0
        if not tcprelay.is_same(bytes(given), key):
            raise Refusal("the secret is wrong or missing", "token")
        host = show_address(stream.peer).rpartition(":")[0]
        name = tcprelay.certificate_name(stream) or "raw"
        pooled = PooledLink(stream, self.options.services[0].name, host, name, stream.peer)
        self._join_pool(pooled)
        return pooled

    def _check_protected_mode(self, stream: Stream) -> None:
        """Before a byte is read, and before TLS, whose handshake costs the most.  Raises `Refusal`."""
        options = self.options
        guarded = self._credentials.token or options.auth or options.secret or options.allow_unauthenticated
        if guarded or tcprelay.is_loopback(stream.peer):
            return
        raise Refusal(
            "this relay server asks for neither a token nor certificates, so it accepts links from its own machine "
            "alone; set --token-file on both sides (or --allow-unauthenticated on the server)", "protected",
        )  # fmt: skip

    def _join_pool(self, pooled: PooledLink) -> None:
        """Count a link in, before its client is told WELCOME.  Raises `Refusal`."""
        if not self._handshakes["link"].leave(tcprelay.carrier(pooled.link)):
            raise Refusal(TOO_MANY_HANDSHAKES, "lost")
        first = self._pool.join(pooled)
        where = {"service": pooled.service, "client": pooled.client, "peer": pooled.peer}
        try:
            if first:
                self._emit(ClientUp(name=pooled.name, **{**where, "peer": pooled.host}))
            self._emit(LinkUp(**where))
        except BaseException as error:
            self._forget(pooled, say_error(error))
            raise

    def _give_back(self, pooled: PooledLink, readable: bool = False) -> None:
        """Hear what has come in on an idle link, and put it into the pool; or close it, where it has ended.

        The caller owns the link.  A frame can be in the link's own buffer already, where the keeper's selector
        does not see it: BYE right behind END.  What is in its socket the keeper is told, unless somebody waits
        for a link and gets it at once.
        """
        link = pooled.link
        try:
            if isinstance(link, Stream):
                self._hear_raw(link)
            else:
                if pooled.blocked:
                    pooled.flush()
                ask = readable or self._pool.has_waiting(pooled.service)
                while (frame := link.receive_now() if ask else link.receive_held()) is not None:
                    if frame.kind == tcprelay.REFUSED:
                        raise EOFError(f"the relay client gave it up: {shown(frame.text('reason'))}")
                    pooled.take_pong(frame.kind)
            kept = self._pool.put(pooled)
        except LinkFault as error:
            if isinstance(link, Link):
                link.refuse("protocol", str(error))
            self._drop_link(pooled, str(error))
        except (OSError, EOFError) as error:
            self._drop_link(pooled, say_error(error))
        except BaseException:
            self._drop_link(pooled, "unexpected error")
            raise
        else:
            if kept:
                self._tell_idle(pooled.service)
            elif isinstance(link, Link) and link.spent:
                self._retire(pooled, "it has lost packets, and a new one will be faster", again=True)
            else:
                left = isinstance(link, Link) and link.machine.leaving
                self._retire(pooled, "the relay client gave it up" if left else "this relay server is ending")

    def _hear_raw(self, stream: Stream) -> None:
        """An idle raw link has nothing to say."""
        count = stream.recv_now(memoryview(bytearray(1)))
        if count == 0:
            raise EOFError("the link was closed")
        if count is not None:
            raise LinkFault("bytes on an idle link; does the other side speak --wire v1?")

    def _retire(self, pooled: PooledLink, reason: str, again: bool = False) -> None:
        """Close an idle link in peace, with BYE where the client has not said it; it may open one `again` at once."""
        if isinstance(pooled.link, Link) and not pooled.link.machine.leaving:
            tcprelay.ignore_oserror(pooled.send, BYE, {"again": True} if again else None)
        self._drop_link(pooled, reason)

    def _drop_link(self, pooled: PooledLink, reason: str, dead: bool = False) -> None:
        """Close a link that is not in the pool; its owner calls this.

        A link between connections is closed normally, since bytes of the last one may still be on their way, unless
        it is `dead`; otherwise it is reset.
        """
        link = pooled.link
        if isinstance(link, Link) and link.machine.state in (IDLE, tcprelay.CLOSED) and not dead:
            link.stream.complete()
        link.close()
        self.shares["link"].leave(pooled.address)
        self._forget(pooled, reason)

    def _forget(self, pooled: PooledLink, reason: str) -> None:
        """Count a link out, and tell that it is down."""
        last = self._pool.leave(pooled)
        where = {"service": pooled.service, "client": pooled.client, "peer": pooled.peer, "reason": reason}
        self._emit(LinkDown(**where))
        if last:
            self._emit(ClientDown(name=pooled.name, **{**where, "peer": pooled.host}))

    # The keeper

    def _keep(self) -> None:
        """The keeper's life, which no unexpected error may end: nobody else finds what is dead."""
        while not self._cut.requested:
            try:
                self._watch()
            except Exception:
                self._log.exception("unexpected error in the keeper")
                self._cut.wait(1.0)

    def _watch(self) -> None:
        """Watch idle links, and every so often look at the time, until `_cut` is requested."""
        interval = min(self._splices.interval, self.options.heartbeat / 5)
        next_look = time.monotonic() + interval
        selector = self._pool.selector
        while not self._stop.requested:
            for key, _ in selector.select(max(0.0, next_look - time.monotonic())):
                if key.data is not None and self._pool.hold(key.data):
                    self._give_back(key.data, readable=True)
            if time.monotonic() >= next_look:
                self._splices.sweep()
                self._emit.tell_floods()
                for batch in tcprelay.in_batches(self._pool.idle_links()):
                    for pooled in batch:
                        self._look_after(pooled, interval)
                next_look = time.monotonic() + interval
        while not self._cut.requested:  # while connections drain, their time-outs still count
            self._cut.wait(self._splices.interval)
            self._splices.sweep()

    def _look_after(self, pooled: PooledLink, interval: float) -> None:
        """Close an idle link that is dead or surplus, and PING it when it is time: by the next look, `interval`
        seconds from now, it would be too late."""
        now, heartbeat = time.monotonic() + interval, self.options.heartbeat
        if not isinstance(pooled.link, Link):
            return
        dead = now - pooled.last_heard > tcprelay.SILENCE * heartbeat
        due = not pooled.blocked and now - max(pooled.last_pinged, pooled.last_heard) > heartbeat
        if pooled.settling:  # silence says nothing: it may have to wait for a slow service before it reads on
            dead, due = tcprelay.path_is_dead(pooled.link.sock, self.options.dead_path), False
        unused = now - pooled.last_used >= SURPLUS_TIME and not pooled.settling
        surplus = unused and self._pool.has_surplus(pooled)
        if not (dead or due or surplus) or not self._pool.hold(pooled):
            return
        if dead and pooled.settling:
            self._drop_link(pooled, "sent bytes are no longer acknowledged", dead=True)
        elif dead:
            self._drop_link(pooled, f"silent for {tcprelay.SILENCE * heartbeat:g} s", dead=True)
        elif surplus:
            self._retire(pooled, "surplus")
        else:
            self._ping(pooled)

    def _ping(self, pooled: PooledLink) -> None:
        """PING on an idle link, and put it back."""
        pooled.last_pinged = time.monotonic()
        pooled.pongs_due += 1
        try:
            pooled.send(PING)
        except OSError as error:
            self._drop_link(pooled, say_error(error))
        else:
            self._give_back(pooled)

    # Service clients

    def _serve_client(self, client: ServiceClient) -> None:
        """A service client's connection from accept to its closing record; the top of its thread."""
        reason = "too many connections at once (--max-connections)"
        admitted = self._splices.admit()
        try:
            if admitted:
                self._shake_hands(client)
                self._expect(client)
                self._splice(client, self._find_link(client))
                return
        except NoLinkHere:
            client.stream.close()  # this process's descriptor; the parent has another
            return
        except Refusal as error:
            reason = str(error)
        finally:
            self._settle(client)
            client.stream.close()
            if not client.passed_on:
                self._leave(client.address)
            if admitted:
                self._splices.leave()
        self._emit(ConnectionFailed(reason=reason, seconds=client.seconds, **client.record))

    def _shake_hands(self, client: ServiceClient) -> None:
        """TLS with a service client, where its port speaks it.  Raises `Refusal`."""
        if not isinstance(client.stream, TLSStream):
            return
        handshakes, reason = self._handshakes["client"], ""
        handshakes.enter(client.stream)
        try:
            client.stream.handshake(Deadline(tcprelay.HANDSHAKE_STEP), self._stop)
        except (OSError, EOFError) as error:
            reason = explain_tls(error) if tcprelay.is_tls_error(error) else say_error(error)
        finally:
            if not handshakes.leave(client.stream):
                reason = TOO_MANY_HANDSHAKES
        if reason:
            raise Refusal(f"no TLS handshake: {reason}")

    def _find_link(self, client: ServiceClient) -> PooledLink:
        """Offer the service client to one idle link after another until a service answers.  Raises `Refusal`."""
        deadline = Deadline(max(0.0, self.options.pair_timeout - client.waited))
        failed = client.failed  # relay clients, not links: what one cannot dial on one link it cannot on others
        reason, again = client.reason, False
        while True:
            wanted = client.service, failed, deadline, reason
            try:
                pooled, waited = self._pool.take(*wanted, wait=self._gauges is None, first=again)
            except NoLinkHere:
                if not isinstance(client.stream, TLSStream):
                    self._send_back(client, failed, reason)
                    raise
                self.send_to_parent({"look": client.service})
                pooled, waited = self._pool.take(*wanted, first=again)
            again = True
            self._settle(client)
            pooled.last_used = time.monotonic()
            try:
                client.look(waited or client.queued or isinstance(pooled.link, Stream))
            except Refusal:
                self._give_back(pooled)
                raise
            try:
                if isinstance(pooled.link, Stream):
                    pooled.link.send(client.early)
                    return pooled
                reason = self._start(pooled, pooled.link, client, deadline)
            except (OSError, EOFError) as error:
                unanswered = f"no answer from the service within {self.options.pair_timeout:g} s{say_received(pooled)}"
                self._drop_link(pooled, say_error(error))
                if isinstance(error, Unacknowledged):
                    continue
                if isinstance(error, TimeoutError):
                    raise Refusal(unanswered) from error
                if (client.early and client.exposed) or isinstance(error, Stopping):
                    # Bytes that may have arrived are never delivered twice.
                    raise Refusal(f"the link was lost before the service answered: {say_error(error)}") from error
                continue
            except BaseException:
                self._drop_link(pooled, "unexpected error")
                raise
            pooled.last_heard = time.monotonic()
            if not reason:
                return pooled
            self._give_back(pooled)
            if client.gone:
                raise Refusal(client.gone)
            failed |= {pooled.client}

    def _start(self, pooled: PooledLink, link: Link, client: ServiceClient, deadline: Deadline) -> str:
        """START a connection on a link, with what the client has sent and goes on to send; wait for the answer.

        Returns why the service could not be reached, "" when it answered.  Nothing here can block beyond the
        deadline.  Raises `TimeoutError`, `Stopping`, `EOFError`, `LinkFault`, `OSError`: the link is lost.
        """
        fields = {"id": client.id, "client": client.peer, "port": show_address(self._bound[client.service]),
                  "waiting": self._count_waiting(client.service)}  # fmt: skip
        out = bytearray(link.pack_control(START, fields))
        client.pass_early(link, out, 0)
        ready: dict[int, int] = {}
        trust, suspicion = True, Deadline(SUSPICION)
        client.exposed = isinstance(link.stream, TLSStream)  # which may fail after it has sent some
        while True:
            sent = link.stream.send_now(out)
            client.exposed = True
            frame = link.receive_now() if link.fd in ready else link.receive_held()
            if frame is not None and frame.kind in (READY, FAIL):
                break
            if frame is not None and frame.kind == tcprelay.REFUSED:
                raise EOFError(f"the relay client gave it up: {shown(frame.text('reason'))}")
            if frame is not None:
                pooled.take_pong(frame.kind)
                continue
            if sent and client.may_send_more and (client.stream.fd in ready or client.may_hold_more):
                before = len(client.early)
                client.read_early()
                client.pass_early(link, out, before)
                if out:
                    continue
            poller = select.poll()
            poller.register(link.fd, select.POLLIN | (0 if sent else select.POLLOUT))
            poller.register(self._cut.fileno(), select.POLLIN)
            if sent and client.may_send_more:
                poller.register(client.stream.fd, select.POLLIN)
            left = min(deadline.remaining() or 0.0, suspicion.remaining() or 0.0 if trust else math.inf)
            ready = dict(poller.poll(left * 1000))
            if trust and suspicion.remaining() == 0:
                trust = False
                if tcprelay.path_is_dead(link.sock, SUSPICION) and tcprelay.is_resent(link.sock):
                    self._suspect(pooled.client)
                    if self._gauges is not None:
                        self.send_to_parent({"suspect": pooled.client})
                    if not client.early:
                        raise Unacknowledged("START is not acknowledged")
            if not ready and deadline.remaining() == 0:
                raise TimeoutError("timed out")
            if self._cut.fileno() in ready:
                raise Stopping("the relay server is ending")
        if frame.kind == FAIL and not link.machine.has_ended(SERVER):
            out += link.pack_end()
        while not link.stream.send_now(out):
            tcprelay.wait_for(link.fd, select.POLLOUT, deadline, self._cut)
        return "" if frame.kind == READY else shown(frame.text("reason")) or "no reason given"

    def _suspect(self, client: str) -> None:
        """A relay client may be out of reach: have each of its idle links answer a PING before it is used."""
        doubtful = self._pool.hold_all(client)
        if doubtful:
            self._log.warning(
                "relay client %s at %s acknowledges nothing: its %d idle links are not used before they answer",
                doubtful[0].name, doubtful[0].host, len(doubtful),
            )  # fmt: skip
        for pooled in doubtful:
            pooled.unproven = True
            self._ping(pooled)

    def _count_waiting(self, service: str) -> int:
        """How many service clients wait for a link, in all processes."""
        if self._gauges is not None:
            return self._gauges.count_waiting(service)
        return self._pool.count_waiting(service)

    def _splice(self, client: ServiceClient, pooled: PooledLink) -> None:
        """Carry a connection whose service has answered, tell its record, and give the link back."""
        link = pooled.link
        splice = Splice(client.id, client.service, client.stream, link)
        splice.to_link = len(client.early)
        splice.to_link_ended = isinstance(link, Link) and link.machine.has_ended(SERVER)
        splice.said_end = splice.to_link_ended and client.ended
        if client.gone:
            splice.break_off(client.gone)
        client.early = bytearray()
        self._splices.add(splice)
        try:
            self._emit(ConnectionOpened(via=f"{pooled.name} at {pooled.host}", **client.record))
            splice.run(self._threads)
        finally:
            self._splices.remove(splice)
            closed = ConnectionClosed(
                bytes_in=splice.to_link, bytes_out=splice.from_link, seconds=client.seconds,
                reason=splice.reason, **client.record,
            )  # fmt: skip
            client.stream.close()
            if isinstance(link, Link) and link.machine.state == IDLE:
                pooled.last_heard = pooled.last_used = time.monotonic()
                if link.passed < splice.to_link or splice.reason:
                    pooled.unproven = pooled.settling = True
                    self._ping(pooled)
                else:
                    self._give_back(pooled)
            else:
                self._drop_link(pooled, splice.reason or "its connection is over")
            self._emit(closed)


def most_handshakes(connections: int) -> int:
    """How many may be under way where there may be so many connections."""
    return min(MOST_HANDSHAKES, max(LEAST_HANDSHAKES, connections // 4))


def say_received(pooled: PooledLink) -> str:
    """For the log, where a link brought no answer: an answer that is too large for the path never arrives."""
    if tcprelay.unsent_bytes(pooled.link.sock):
        return "; the relay client's host does not acknowledge what was sent to it"
    return "; the relay client's host has received the request: is tcprelayc stopped there, or the path too narrow?"


def make_stream(sock: socket.socket, name: str, address: Any, context: ssl.SSLContext | None) -> Stream:
    """The stream over an accepted socket, with TLS where there is a context; before its handshake."""
    if context is None:
        return Stream(sock, name, address)
    return TLSStream(sock, name, context, address, server_side=True)


def make_token(directory: str) -> bytes:
    """The token kept in `directory`, made there if it is not yet.  Raises `OSError` and `ValueError`."""
    path = tcprelay.private_file(os.path.join(directory, "token"), lambda: tcprelay.random_id(32).encode() + b"\n")
    return tcprelay.read_secret("--state-dir", path)


NOT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "UNEXPECTED_MESSAGE", "NO_PROTOCOLS_AVAILABLE")
"""OpenSSL's reasons for a peer whose first bytes are not a TLS ClientHello."""


def explain_tls(error: ssl.SSLError) -> str:
    """What a failed TLS handshake means for whoever reads the log."""
    if error.reason in NOT_TLS:
        return "it does not speak TLS; if it is a tcprelayc, add --tls there"
    if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "it showed no certificate, which --auth asks for; give the client --cert and --key, or --pfx"
    return say_error(error)


NOBODY: frozenset[str] = frozenset()


class ServiceClient:
    """A service client until its service has answered: its stream, and the bytes that it sent early."""

    def __init__(self, service: str, sock: socket.socket, address: Any, context: ssl.SSLContext | None = None) -> None:
        self.id = tcprelay.connection_id()
        self.service = service
        self.address = address
        self.peer = show_address(address)
        self.stream = make_stream(sock, f"service client {self.peer}", address, context)
        self.early = bytearray()
        self.ended = False
        """It has ended its direction: all that it sends is in `early`."""
        self.exposed = False
        """The link that it is offered to has taken bytes."""
        self.gone = ""
        """Why it is no longer there."""
        self.failed = NOBODY
        """Ids of relay clients that could not reach their service."""
        self.reason = ""
        """Why the last of them could not."""
        self.waited, self.queued = 0.0, False
        """Seconds that it has been in the parent and in other workers, and whether the parent had no link for it."""
        self.visited: list[int] = []
        """For the parent: the workers none of whose relay clients could reach the service."""
        self.expected = False
        """It counts among those that have no link yet; see `Pool.expect`."""
        self.settled = self.passed_on = False
        """The parent knows from the gauges what became of it; it has been sent back to the parent."""
        self.may_hold_more = True
        """To be asked again without poll: TLS may hold more, or there was more than fitted."""
        self._since = time.monotonic()
        self.record = {"id": self.id, "service": service, "peer": self.peer}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._since

    def state(self, failed: frozenset[str], reason: str) -> dict[str, Any]:
        """What another worker has to know of it, beside its early bytes."""
        return {"service": self.service, "address": self.address, "id": self.id, "since": self._since,
                "ended": self.ended, "failed": list(failed), "reason": reason, "visited": self.visited}  # fmt: skip

    def resume(self, fields: dict[str, Any], early: bytes) -> None:
        """Go on from such a state."""
        self._since, self.waited, self.queued = fields["since"], fields["waited"], fields["queued"]
        if "id" in fields:
            self.id = self.record["id"] = fields["id"]
            self.ended, self.failed, self.reason = fields["ended"], frozenset(fields["failed"]), fields["reason"]
            self.visited = fields["visited"]
            self.early = bytearray(early)
            self.stream.received = len(early)

    @property
    def may_send_more(self) -> bool:
        return not self.ended and not self.gone and len(self.early) < EARLY_BYTES

    def read_early(self) -> None:
        """Take some of what it has sent, without waiting; a little, so that sending it on never blocks."""
        piece = bytearray(min(4096, EARLY_BYTES - len(self.early)))
        try:
            count = self.stream.recv_now(memoryview(piece))
        except OSError as error:
            self.gone = f"{self.stream.name}: {say_error(error)}"
            return
        if count == 0:
            self.ended = True
        self.may_hold_more = count == len(piece) or (count is not None and self.stream.holds_bytes())
        self.early += piece[: count or 0]

    def look(self, waited: bool) -> None:
        """Before a link is spent on it: is it still there?  Raises `Refusal`."""
        if not self.early and not self.ended:
            self.read_early()
        if self.gone:
            raise Refusal(self.gone)
        if self.ended and not self.early and waited:
            # It may be waiting for a greeting with its own direction ended (on the raw wire in vain: nothing would
            # start the link); far more often it has left.
            raise Refusal("the service client went away while it waited")

    def pass_early(self, link: Link, out: bytearray, start: int) -> None:
        """Append to `out` the frames for the early bytes from `start` on, and for its end."""
        if len(self.early) > start:
            out += link.pack(memoryview(self.early[start:]))
        if self.gone and not link.machine.has_ended(SERVER):
            out += link.pack_control(ABORT, {"reason": shown(self.gone)})
        elif self.ended and not link.machine.has_ended(SERVER):
            out += link.pack_end()


class Shares:
    """How many connections each address has (see `tcprelay.address_group`), up to `most`; 0 is no limit, and nothing
    is counted."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.Lock()  # over what follows
        self._counts: dict[str, int] = {}

    def enter(self, address: Any) -> bool:
        """Count one in; False where the address has as many as it may have.  Each one counted in calls `leave`."""
        if not self.most:
            return True
        group = tcprelay.address_group(address)
        with self._lock:
            count = self._counts.get(group, 0)
            if self.most <= count:
                return False
            self._counts[group] = count + 1
            return True

    def leave(self, address: Any) -> None:
        if not self.most:
            return
        group = tcprelay.address_group(address)
        with self._lock:
            self._counts[group] -= 1
            if not self._counts[group]:
                del self._counts[group]


Ball = TypeVar("Ball")


class Handshakes:
    """Handshakes under way: a bounded number.

    Beyond it one gives way, and chance decides which, among those of the address that has the most, or of all that
    have as many.  So a flood hits itself; and of a storm of honest ones, each from an address of its own, some are lost
    and the others get through: the oldest is the one nearest to done.

    Parameters: how many; and what gives random numbers from 0 to 1.
    """

    def __init__(self, most: int, fraction: Callable[[], float] = tcprelay.random_fraction) -> None:
        self._most = most
        self._fraction = fraction
        self._lock = threading.Lock()  # over what follows
        self._count = 0
        self._streams: dict[str, Urn[Stream]] = {}  # by address
        self._addresses: dict[int, Urn[str]] = {}  # by how many they have
        self._evicted: set[Stream] = set()

    def enter(self, stream: Stream) -> None:
        """Count one in; another may have to give way: it is woken.  Each one calls `leave`, once at least."""
        with self._lock:
            self._add(stream)
            if self._count > self._most:
                greediest = self._addresses[max(self._addresses)].draw(self._fraction())
                unlucky = self._streams[greediest].draw(self._fraction())
                self._remove(unlucky)
                self._evicted.add(unlucky)
                unlucky.wake()  # under the lock, which never blocks: once it has left, it is closed

    def leave(self, stream: Stream) -> bool:
        """Count one out, if it has not left; False where it had given way: then it must not go on."""
        with self._lock:
            if stream in self._evicted:
                self._evicted.discard(stream)
                return False
            if stream in self._streams.get(tcprelay.address_group(stream.peer), ()):
                self._remove(stream)
            return True

    def was_evicted(self, stream: Stream) -> bool:
        with self._lock:
            return stream in self._evicted

    def _add(self, stream: Stream) -> None:
        address = tcprelay.address_group(stream.peer)
        streams = self._streams.setdefault(address, Urn())
        streams.add(stream)
        self._count += 1
        self._move(address, len(streams) - 1, len(streams))

    def _remove(self, stream: Stream) -> None:
        address = tcprelay.address_group(stream.peer)
        streams = self._streams[address]
        streams.remove(stream)
        self._count -= 1
        self._move(address, len(streams) + 1, len(streams))
        if not streams:
            del self._streams[address]

    def _move(self, address: str, before: int, now: int) -> None:
        """An address that had so many has so many now."""
        if before:
            self._addresses[before].remove(address)
            if not self._addresses[before]:
                del self._addresses[before]
        if now:
            self._addresses.setdefault(now, Urn()).add(address)


class Urn(Generic[Ball]):
    """What can be drawn from by chance: adding, removing and drawing take the same time however full it is."""

    def __init__(self) -> None:
        self._balls: list[Ball] = []
        self._places: dict[Ball, int] = {}

    def __len__(self) -> int:
        return len(self._balls)

    def __contains__(self, ball: object) -> bool:
        return ball in self._places

    def add(self, ball: Ball) -> None:
        self._places[ball] = len(self._balls)
        self._balls.append(ball)

    def remove(self, ball: Ball) -> None:
        """Take one out; the last one takes its place."""
        place, last = self._places.pop(ball), self._balls.pop()
        if place < len(self._balls):
            self._balls[place] = last
            self._places[last] = place

    def draw(self, fraction: float) -> Ball:
        """The one at that part of the whole, from 0 to 1."""
        return self._balls[min(int(fraction * len(self._balls)), len(self._balls) - 1)]


# --- The pool -------------------------------------------------------------------------------------------------


class PooledLink:
    """A link (raw: a plain stream) and what the pool knows of it."""

    def __init__(self, link: Link | Stream, service: str, client: str, name: str, address: Any) -> None:
        self.link = link
        self.address = address
        self.service = service
        self.client = client
        """The relay client's id, random per process; of a raw link, its host."""
        self.worker = 0
        """Which of its relay client's processes it leads to."""
        self.name = name
        self.peer = show_address(address)
        self.host = self.peer.rpartition(":")[0]
        self.wanted = 1
        """How many idle links its client wants."""
        self.last_heard = self.last_used = self.last_pinged = time.monotonic()
        self.pongs_due = 0
        """PINGs without an answer so far."""
        self.unproven = False
        """Not to be used before the PONG that is due."""
        self.settling = False
        """Unproven since its connection is over here, but the relay client has not shown that it has passed all bytes
        on: to a service that reads slowly, say, and hears nothing else meanwhile.  Silence says nothing then."""
        self.blocked = False
        """Its socket has not taken all of what `send` was given."""
        self._unsent = bytearray()  # of that; TLS keeps it itself

    @property
    def origin(self) -> Origin:
        return self.client, self.worker

    def send(self, kind: int, fields: dict[str, Any] | None = None) -> None:
        """Send a frame on an idle link, now or, where its socket is full, later by `flush`."""
        assert isinstance(self.link, Link)
        self._unsent += self.link.pack_control(kind, fields)
        self.flush()

    def flush(self) -> None:
        """Send what can go now of what was to be sent.  Raises `OSError`."""
        self.blocked = not tcprelay.carrier(self.link).send_now(self._unsent)

    def take_pong(self, kind: int) -> None:
        """Note a frame between connections.  Raises `LinkFault` for a PONG that nobody asked for: a flood of
        them would keep the keeper busy."""
        self.last_heard = time.monotonic()
        if kind == PONG:
            self.pongs_due -= 1
            if self.pongs_due < 0:
                raise LinkFault("PONG without PING")
            if not self.pongs_due:
                self.unproven = self.settling = False


Origin = tuple[str, int]
"""A relay client, and which of its processes: links are handed out from each in turn."""


class Pool:
    """Idle links and waiting service clients of all services: the queue that pairs them.

    Service clients are served in the order in which they came, each waiting on a condition of its own, so that
    a link goes to the first and nobody can overtake.  Links are handed out from each relay client's processes in
    turn, and of those of one the most recently proven alive.  Nothing here does I/O or calls back.
    """

    def __init__(
        self, services: Sequence[str], max_pending: int, most: int, gauges: WorkerGauges | None = None
    ) -> None:
        self.selector = selectors.DefaultSelector()
        """Watches the idle links, for the keeper; links are entered and removed under the lock."""
        self._max_pending = max_pending
        self._most = most
        """Links at once, idle or not."""
        self._lock = threading.Lock()  # over all that follows
        self._waiting: dict[str, deque[_Waiter]] = {name: deque() for name in services}
        self._idle: dict[str, OrderedDict[Origin, OrderedDict[PooledLink, None]]] = {n: OrderedDict() for n in services}
        self._idle_counts = dict.fromkeys(services, 0)
        self._expected = dict.fromkeys(services, 0)
        """Service clients that have come and have no link yet, those included that wait for one."""
        self._given_at = dict.fromkeys(services, 0.0)
        """When a service client was last given a link."""
        self._gauges = gauges
        self._aside: set[PooledLink] = set()
        """Idle links that are not to be given out now."""
        self._members: dict[tuple[str, str], int] = {}  # links of (service, client), idle or not
        self._closed = False

    def join(self, pooled: PooledLink) -> bool:
        """Count a link in; True for the first one of its relay client.  Raises `Refusal` at the limit."""
        with self._lock:
            if sum(self._members.values()) >= self._most:
                raise Refusal("there are too many links", "limit")
            key = pooled.service, pooled.client
            self._members[key] = self._members.get(key, 0) + 1
            return self._members[key] == 1

    def leave(self, pooled: PooledLink) -> bool:
        """Count a link out; True for the last one of its relay client."""
        with self._lock:
            key = pooled.service, pooled.client
            self._members[key] -= 1
            if self._members[key]:
                return False
            del self._members[key]
            return True

    def put(self, pooled: PooledLink) -> bool:
        """Hand an idle link to the first who waits for one, or keep it; False where it is not wanted any more."""
        with self._lock:
            link = pooled.link
            if self._closed or (isinstance(link, Link) and link.machine.leaving):
                return False
            if isinstance(link, Link) and link.spent and not pooled.unproven:
                return False
            if pooled.unproven or pooled.blocked:
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if pooled.blocked else 0)
                self.selector.register(pooled.link.fd, events, pooled)
                self._aside.add(pooled)
                return True
            for waiter in self._waiting[pooled.service]:
                if pooled.client not in waiter.failed:
                    self._waiting[pooled.service].remove(waiter)
                    self._given_at[pooled.service] = time.monotonic()
                    waiter.pooled = pooled
                    waiter.condition.notify()
                    return True
            self.selector.register(pooled.link.fd, selectors.EVENT_READ, pooled)
            links = self._idle[pooled.service].setdefault(pooled.origin, OrderedDict())
            links[pooled] = None
            if pooled.pongs_due:  # the last one is taken first: let it be one that is known to be alive
                links.move_to_end(pooled, last=False)
            self._count(pooled.service, 1)
            return True

    def take(
        self,
        service: str,
        failed: frozenset[str],
        deadline: Deadline,
        reason: str = "",
        *,
        wait: bool = True,
        first: bool = False,
    ) -> tuple[PooledLink, bool]:
        """An idle link of a relay client that is not in `failed`, waited for until the deadline; and whether it was.

        Where one has failed already nobody waits: `reason` says why the last one did.  Who had a link before, in
        vain, is `first` in the queue.  Raises `Refusal`, and without `wait` `NoLinkHere`.
        """
        with self._lock:
            if self._closed:
                raise Refusal("the relay server is ending")
            if (pooled := self._pick(service, failed)) is not None:
                return pooled, False
            if not wait:
                raise NoLinkHere
            if failed and not any(p.service == service and p.client not in failed for p in self._aside):
                raise Refusal(f"the service cannot be reached: {reason}")
            waiting = self._gauges.count_waiting(service) if self._gauges else len(self._waiting[service])
            if waiting >= self._max_pending and not (first or self._is_served(service)):
                raise Refusal("too many service clients wait for a link (--max-pending)")
            waiter = _Waiter(threading.Condition(self._lock), failed)
            if first:
                waiter.since = 0.0  # it says nothing about how long others have waited
            self._waiting[service].insert(0 if first else len(self._waiting[service]), waiter)
            self._count(service, 0)
            try:
                waiter.condition.wait_for(lambda: waiter.pooled or self._closed, deadline.remaining())
                if waiter.pooled is not None:
                    return waiter.pooled, True
                self._waiting[service].remove(waiter)
            finally:
                self._count(service, 0)
            if self._closed:
                raise Refusal("the relay server is ending")
            raise Refusal("no link was idle in time (--pair-timeout); is a relay client connected?")

    def expect(self, service: str, more: int) -> None:
        """So many more service clients have no link yet, which has been found out before they ask for one."""
        with self._lock:
            self._expected[service] += more

    def is_full(self, service: str) -> bool:
        """Whether as many service clients have no link as may wait for one, while others still get theirs: then the
        kernel holds who comes next.  Where nobody is served they are refused instead (see `take`)."""
        if not service or self._expected[service] < self._max_pending:
            return False
        with self._lock:
            return not self._closed and self._is_served(service)

    def _is_served(self, service: str) -> bool:
        """Whether there is a relay client, and links are given out; under the lock."""
        has_client = any(name == service for name, _ in self._members)
        waiting = self._waiting[service]
        oldest = waiting[0].since if waiting else math.inf
        return has_client and are_links_given(self._max_pending, self._given_at[service], oldest)

    def hold(self, pooled: PooledLink) -> bool:
        """Take one certain link out of the pool; False where it is not in it."""
        with self._lock:
            if pooled in self._aside:
                self._aside.discard(pooled)
                self.selector.unregister(pooled.link.fd)
                return True
            if pooled not in self._idle[pooled.service].get(pooled.origin, ()):
                return False
            self._remove(pooled)
            return True

    def hold_all(self, client: str) -> list[PooledLink]:
        """Take all idle links of a relay client out of the pool, except those that are not given out anyway."""
        with self._lock:
            held = [
                pooled
                for origins in self._idle.values()
                for origin, links in origins.items()
                if origin[0] == client
                for pooled in links
            ]
            for pooled in held:
                self._remove(pooled)
            return held

    def idle_links(self) -> list[PooledLink]:
        """All links that nobody uses, settling ones included."""
        with self._lock:
            return self._all_idle()

    def has_surplus(self, pooled: PooledLink) -> bool:
        """Whether the relay client of this link has more idle ones than it wants."""
        with self._lock:
            return len(self._idle[pooled.service].get(pooled.origin, ())) > pooled.wanted

    def count_idle(self) -> int:
        with self._lock:
            return sum(self._idle_counts.values())

    def has_waiting(self, service: str) -> bool:
        """Whether a service client waits for a link of this service."""
        return bool(self._waiting[service])

    def count_waiting(self, service: str | None = None) -> int:
        """How many service clients wait, for one service or for all."""
        with self._lock:
            return sum(len(queue) for name, queue in self._waiting.items() if service in (None, name))

    def close(self) -> list[PooledLink]:
        """Turn everybody away from now on; returns the links that were idle."""
        with self._lock:
            self._closed = True
            for waiters in self._waiting.values():
                for waiter in waiters:
                    waiter.condition.notify()
            idle = self._all_idle()
            for pooled in idle:
                if pooled not in self._aside:
                    self._remove(pooled)
            self._aside.clear()
            return idle

    def _all_idle(self) -> list[PooledLink]:
        idle = [p for clients in self._idle.values() for links in clients.values() for p in links]
        return idle + list(self._aside)

    def _pick(self, service: str, failed: frozenset[str]) -> PooledLink | None:
        """The best link of the next origin in turn; one that still owes a PONG only if there is no other."""
        origins, last_resort = self._idle[service], None
        for origin, links in origins.items():
            if origin[0] not in failed:
                pooled = next(reversed(links))
                if not pooled.pongs_due:
                    break
                last_resort = last_resort or pooled
        else:
            if last_resort is None:
                return None
            pooled = last_resort
        self._remove(pooled)
        self._given_at[service] = time.monotonic()
        if pooled.origin in origins:
            origins.move_to_end(pooled.origin)
        return pooled

    def _remove(self, pooled: PooledLink) -> None:
        origins = self._idle[pooled.service]
        links = origins[pooled.origin]
        del links[pooled]
        if not links:
            del origins[pooled.origin]
        self._count(pooled.service, -1)
        self.selector.unregister(pooled.link.fd)

    def _count(self, service: str, more: int) -> None:
        """So many more links of this service are idle; under the lock."""
        self._idle_counts[service] += more
        if self._gauges is not None:
            self._gauges.show(service, self._idle_counts[service], len(self._waiting[service]))


def are_links_given(max_pending: int, last: float, oldest: float) -> bool:
    """Whether those who wait for a link of a service can hope for one: somebody was given one of late, or nobody has
    waited for long.  Where nobody may wait, nobody can."""
    return max_pending > 0 and time.monotonic() - max(last, oldest) < STANDSTILL


class _Waiter:
    """A service client that waits in the pool's queue."""

    __slots__ = ("condition", "failed", "pooled", "since")

    def __init__(self, condition: threading.Condition, failed: frozenset[str]) -> None:
        self.since = time.monotonic()
        self.condition = condition
        self.failed = failed
        self.pooled: PooledLink | None = None


# --- Workers --------------------------------------------------------------------------------------------------
#
# With --workers the parent accepts and the workers serve.  A link goes to the worker with the fewest idle ones, before
# its handshake, and stays there.  A service client goes to a worker that has an idle link for its service, and where
# none has it waits in the parent, so that there is one queue.  How many links are idle where the parent reads from
# memory that it shares with the workers: no message is needed for that, and two for a connection in all.
#
# What the parent has read may be over when a service client arrives: then it is sent back, and so is one whose relay
# client cannot reach the service, with the bytes that it has sent: another worker may have a link of another relay
# client.  Only where the service port speaks TLS, a service client stays where its handshake was: it waits in the
# worker, new links go there first, and if idle links are elsewhere, one of them is closed to be opened anew.


class WorkerGauges:
    """What workers and their parent show each other in shared memory; each number has one writer.

    A worker shows how many links are idle, how many service clients wait, how many of those that the parent has sent
    are settled (they have a link, or are gone), for each service; how many links have arrived, how many service
    clients have left, and how many connections there are.  The parent shows how many service clients wait with it.
    The order counts: who takes a link shows first that there is one less, and then that the service client is settled;
    so what the parent reads, in the opposite order, is never more than there is.
    """

    IDLE, WAITING, SETTLED, OF_SERVICE = 0, 1, 2, 3

    def __init__(self, workers: int, services: Sequence[str]) -> None:
        self.workers = workers
        self._services = {name: number for number, name in enumerate(services)}
        self._row = len(services) * self.OF_SERVICE + 3
        self._memory = mmap.mmap(-1, 8 * (workers * self._row + len(services)))
        self._numbers = memoryview(self._memory).cast("q")
        self._me = 0
        self._lock = threading.Lock()  # over the numbers that `settle` and the two behind it count up

    # In a worker

    def become(self, number: int) -> None:
        self._me = number
        for index in range(number * self._row, (number + 1) * self._row):
            self._numbers[index] = 0

    def show(self, service: str, idle: int, waiting: int) -> None:
        start = self._start(self._me, service)
        self._numbers[start + self.IDLE] = idle
        self._numbers[start + self.WAITING] = waiting

    def settle(self, service: str) -> None:
        with self._lock:
            self._numbers[self._start(self._me, service) + self.SETTLED] += 1

    def links_arrived(self) -> None:
        with self._lock:
            self._numbers[(self._me + 1) * self._row - 2] += 1

    def client_left(self) -> None:
        with self._lock:
            self._numbers[(self._me + 1) * self._row - 3] += 1

    def show_open(self, count: int) -> None:
        self._numbers[(self._me + 1) * self._row - 1] = count

    def are_links_wanted(self, service: str) -> bool:
        """Whether service clients wait elsewhere."""
        return self.count_waiting(service) > self._numbers[self._start(self._me, service) + self.WAITING]

    # Anywhere

    def count_waiting(self, service: str) -> int:
        own = self._numbers[self.workers * self._row + self._services[service]]
        return own + sum(self.waiting(number, service) for number in range(self.workers))

    # In the parent

    def idle(self, number: int, service: str, sent: int) -> int:
        """How many links are idle in a worker beyond those for the service clients that are on their way to it."""
        under_way = self.under_way(number, service, sent)
        return self._numbers[self._start(number, service) + self.IDLE] - under_way

    def under_way(self, number: int, service: str, sent: int) -> int:
        return sent - self._numbers[self._start(number, service) + self.SETTLED]

    def waiting(self, number: int, service: str) -> int:
        return self._numbers[self._start(number, service) + self.WAITING]

    def links_under_way(self, number: int, sent: int) -> int:
        return sent - self._numbers[(number + 1) * self._row - 2]

    def clients(self, number: int, sent: int) -> int:
        """How many of the service clients that a worker was sent, and has not sent back, have not left."""
        return sent - self._numbers[(number + 1) * self._row - 3]

    def open(self, number: int) -> int:
        return self._numbers[(number + 1) * self._row - 1]

    def show_queue(self, service: str, length: int) -> None:
        self._numbers[self.workers * self._row + self._services[service]] = length

    def _start(self, number: int, service: str) -> int:
        return number * self._row + self._services[service] * self.OF_SERVICE


class RemoteShares(Shares):
    """In a worker: the parent counts what each address has, and hears who has left."""

    def __init__(self, server: RelayServer, kind: str) -> None:
        super().__init__(server.shares[kind].most)
        self._server = server
        self._kind = kind

    def leave(self, address: Any) -> None:
        if self.most:
            self._server.send_to_parent({"left": self._kind, "address": address})


class Visitor:
    """A service client in the parent."""

    __slots__ = ("address", "deadline", "early", "queued", "service", "since", "sock", "state", "visited")

    def __init__(self, service: str, sock: socket.socket, address: Any, since: float, patience: float) -> None:
        self.service = service
        self.sock = sock
        self.address = address
        self.since = since
        self.deadline = since + patience
        self.queued = False
        self.state: dict[str, Any] = {}
        """What a worker that has sent it back knows of it."""
        self.early = b""
        self.visited: set[int] = set()
        """The workers none of whose relay clients could reach the service."""


class ServerWorkers(Workers):
    """The parent of a relay server's workers: see above."""

    role: RelayServer
    LOOK_AGAIN = 0.25
    """Seconds after which who waits is looked after even if no worker has said a word."""

    def __init__(self, server: RelayServer, count: int) -> None:
        super().__init__(server, count)
        services = [service.name for service in server.options.services]
        self._gauges = WorkerGauges(count, services)
        self._queues: dict[str, deque[Visitor]] = {name: deque() for name in services}
        self._sent = [dict.fromkeys([*services, ""], 0) for _ in range(count)]
        """How many service clients, and under "" links, each worker has been sent."""
        self._clients = [0] * count
        """How many service clients each worker has been sent, without those that it has sent back."""
        self._held: list[Counter[tuple[str, Any]]] = [Counter() for _ in range(count)]
        """What of the addresses' shares is in each worker, by kind and address."""
        self._present: dict[tuple[str, str], tuple[ClientUp, set[int]]] = {}
        """The relay clients, and which workers have links of them."""
        self._given_at = dict.fromkeys(services, 0.0)
        """When a service client was last sent to a worker that has a link for it."""
        self._watched: set[socket.socket] = set()
        """The listeners that are accepted from now: not those of services whose queue is full."""
        self._resume_at = 0.0
        """When to accept again, after an error; 0 while nothing is wrong."""
        self._pause, self._told = 0.005, 0.0
        self._next_give_up = 0.0
        server.hand_on, server.is_full = self._receive_connection, self._is_full

    def open(self) -> None:
        self._watch_listeners()

    def become(self, worker: WorkerProcess) -> None:
        for queue in self._queues.values():
            for visitor in queue:
                visitor.sock.close()
        self._gauges.become(worker.number)
        self.role.become_one_of(len(self.workers), self._gauges)

    def stop_intake(self) -> None:
        self._ignore_listeners()
        self._resume_at = math.inf
        self.role.close_listeners()
        for service in self._queues:
            while visitor := self._next(service):
                self._refuse(visitor, "the relay server is ending")

    # Accepting

    def _watch_listeners(self) -> None:
        """Accept from all listeners, without those of services whose queue is full."""
        for listener, service in self.role.listeners.items():
            if listener not in self._watched and not self._is_full(service):
                self.selector.register(listener, selectors.EVENT_READ, functools.partial(self._accept, listener))
                self._watched.add(listener)

    def _ignore_listeners(self) -> None:
        for listener in self._watched:
            self.selector.unregister(listener)
        self._watched.clear()

    def _is_full(self, service: str) -> bool:
        """As `Pool.is_full`."""
        queue, most = self._queues.get(service, ()), self.role.options.max_pending
        if not service or len(queue) < most or all(name != service for name, _ in self._present):
            return False
        return are_links_given(most, self._given_at[service], queue[0].since if queue else math.inf)

    def _accept(self, listener: socket.socket) -> None:
        if listener not in self._watched:
            return  # since this round of events has begun
        try:
            self.role.accept_from(listener)
            self._pause = 0.005
            if self._is_full(self.role.listeners[listener]):
                self.selector.unregister(listener)
                self._watched.discard(listener)
        except (OSError, RuntimeError, MemoryError) as error:
            if time.monotonic() - self._told >= 1.0:
                self._told = time.monotonic()
                self.emit(AcceptPaused(reason=say_error(error)))
            self._ignore_listeners()
            self._resume_at = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, 1.0)

    def _receive_connection(self, service: str, sock: socket.socket, address: Any) -> None:
        """A connection was accepted.  Raises `RuntimeError` where it cannot be taken."""
        if service:
            self._receive_client(Visitor(service, sock, address, time.monotonic(), self.role.options.pair_timeout))
            return

        def load(worker: WorkerProcess) -> tuple[int, int]:
            number, sent = worker.number, self._sent[worker.number]
            balance = self._gauges.links_under_way(number, sent[""])
            for name in self._queues:
                balance += self._gauges.idle(number, name, sent[name]) - self._gauges.waiting(number, name)
            return balance, self._gauges.open(number)

        for worker in sorted(self._living(), key=load):
            if worker.hand(tcprelay.encode_message({"service": "", "address": address}), sock.fileno()):
                self._sent[worker.number][""] += 1
                self._hold(worker, "link", address, 1)
                sock.close()
                return
        raise RuntimeError("no worker takes it")

    def _living(self) -> list[WorkerProcess]:
        return [worker for worker in self.workers if worker.pid]

    # Service clients

    def _receive_client(self, visitor: Visitor) -> None:
        queue, options = self._queues[visitor.service], self.role.options
        if options.max_connections and self._count_clients() >= options.max_connections:
            self._refuse(visitor, "too many connections at once (--max-connections)")
        elif queue or not self._send(visitor):
            if len(queue) >= options.max_pending:
                self._refuse(visitor, "too many service clients wait for a link (--max-pending)")
                return
            visitor.queued = True
            queue.append(visitor)
            self._guard(functools.partial(self._serve_queue, visitor.service))  # from here on it is not the acceptor's

    def _count_clients(self) -> int:
        waiting = sum(map(len, self._queues.values()))
        return waiting + sum(self._gauges.clients(number, sent) for number, sent in enumerate(self._clients))

    def _send(self, visitor: Visitor) -> bool:
        """Send a service client to a worker that has a link for it; False where there is none."""
        service, best, most = visitor.service, None, (0, 0)
        for worker in self.workers:
            if worker.pid and worker.number not in visitor.visited:
                idle = self._gauges.idle(worker.number, service, self._sent[worker.number][service])
                rank = idle, -self._gauges.open(worker.number)
                if idle > 0 and (best is None or rank > most):
                    best, most = worker, rank
        if best is None:
            return False
        fields = {**visitor.state, "service": service, "address": visitor.address, "since": visitor.since,
                  "waited": time.monotonic() - visitor.since, "queued": visitor.queued}  # fmt: skip
        if not best.hand(tcprelay.encode_message(fields, visitor.early), visitor.sock.fileno()):
            return False
        self._sent[best.number][service] += 1
        self._given_at[service] = time.monotonic()
        self._clients[best.number] += 1
        self._hold(best, "client", visitor.address, 1)
        visitor.sock.close()
        return True

    def _serve_queue(self, service: str) -> None:
        """Pair who waits with what is idle; the queue's length is shown before that is looked at."""
        queue = self._queues[service]
        self._gauges.show_queue(service, len(queue))
        while queue and self._send(queue[0]):
            queue.popleft()
            self._gauges.show_queue(service, len(queue))

    def _next(self, service: str) -> Visitor | None:
        queue = self._queues[service]
        visitor = queue.popleft() if queue else None
        self._gauges.show_queue(service, len(queue))
        return visitor

    def _refuse(self, visitor: Visitor, reason: str) -> None:
        visitor.sock.close()
        state = {"service": visitor.service, "since": visitor.since, **visitor.state}
        self._note_refused(state, visitor.address, reason)

    def _note_refused(self, state: dict[str, Any], address: Any, reason: str) -> None:
        self.role.shares["client"].leave(address)
        record = {"id": state.get("id") or tcprelay.connection_id(), "service": state["service"]}
        seconds = time.monotonic() - state["since"]
        self.emit(ConnectionFailed(peer=show_address(address), seconds=seconds, reason=reason, **record))

    def _balance(self, service: str) -> None:
        """Where service clients wait in one worker, and links are idle in another: have one opened anew."""
        now = time.monotonic()
        if now < self._next_give_up:
            return
        waiting = {worker.number: self._gauges.waiting(worker.number, service) for worker in self._living()}
        if not any(waiting.values()):
            return  # who is on its way to a link that was lost comes back
        spare = {number: self._gauges.idle(number, service, self._sent[number][service]) - count
                 for number, count in waiting.items()}  # fmt: skip
        if min(spare.values()) < 0 < max(spare.values()):
            richest = max(spare, key=lambda number: spare[number])
            self.workers[richest].order(tcprelay.encode_message({"give_up": service}))
            self._next_give_up = now + self.LOOK_AGAIN

    # Workers

    def hear(self, worker: WorkerProcess, message: dict[str, Any], payload: bytes, descriptors: list[int]) -> None:
        if "look" in message:
            self._serve_queue(message["look"])
            self._balance(message["look"])
        elif "suspect" in message:
            for other in self._living():
                if other is not worker:
                    other.order(tcprelay.encode_message(message))
        elif "left" in message:
            address = tuple(message["address"])
            self._hold(worker, message["left"], address, -1)
            self.role.shares[message["left"]].leave(address)
        else:
            self._hold(worker, "client", tuple(message["address"]), -1)
            self._clients[worker.number] -= 1
            if descriptors:
                self._take_back(worker, message, payload, descriptors)
            else:  # the kernel had no number for it here, and has reset it
                self._note_refused(message, tuple(message["address"]), os.strerror(errno.EMFILE).lower())

    def _take_back(self, worker: WorkerProcess, state: dict[str, Any], early: bytes, descriptors: list[int]) -> None:
        address = tuple(state["address"])
        try:
            sock, patience = tcprelay.adopt_socket(descriptors[0], address), self.role.options.pair_timeout
            descriptors.clear()
            visitor = Visitor(state["service"], sock, address, state["since"], patience)
            visitor.state, visitor.early, visitor.visited = state, early, set(state["visited"])
        except BaseException:
            self._note_refused(state, address, "unexpected error")
            raise
        if self._kill is not None:
            self._refuse(visitor, "the relay server is ending")
            return
        if state["failed"]:
            visitor.visited.add(worker.number)
            state["visited"] = list(visitor.visited)
            if not self._send(visitor):
                self._refuse(visitor, f"the service cannot be reached: {state['reason']}")
            return
        queue = self._queues[visitor.service]  # where it has its place by the moment at which it came
        queue.insert(sum(other.since < visitor.since for other in queue), visitor)
        self._serve_queue(visitor.service)

    def _hold(self, worker: WorkerProcess, kind: str, address: Any, more: int) -> None:
        """So much more of an address's share is in a worker."""
        if self.role.shares[kind].most:
            held = self._held[worker.number]
            held[kind, address] += more
            if not held[kind, address]:
                del held[kind, address]

    def tell(self, event: str, fields: dict[str, Any], worker: WorkerProcess) -> None:
        """A relay client is connected while one of the workers has links of it."""
        key = fields["service"], fields["client"]
        if event == "ClientUp":
            if key not in self._present:
                self._present[key] = ClientUp(**fields), set()
                self.emit(self._present[key][0])
            self._present[key][1].add(worker.number)
        elif key in self._present:
            self._absent(key, worker, fields["reason"])

    def _absent(self, key: tuple[str, str], worker: WorkerProcess, reason: str) -> None:
        up, numbers = self._present[key]
        numbers.discard(worker.number)
        if not numbers:
            del self._present[key]
            self.emit(ClientDown(service=up.service, client=up.client, name=up.name, peer=up.peer, reason=reason))

    def lost(self, worker: WorkerProcess) -> None:
        for kind, address in self._held[worker.number].elements():
            self.role.shares[kind].leave(address)
        self._held[worker.number].clear()
        self._sent[worker.number] = dict.fromkeys(self._sent[worker.number], 0)
        self._clients[worker.number] = 0
        self._gauges.become(worker.number)
        for key in [key for key, (_, numbers) in self._present.items() if worker.number in numbers]:
            self._absent(key, worker, "its worker has died")

    def look_at_time(self) -> float:
        now, wait = time.monotonic(), 1.0
        if now >= self._resume_at:
            self._resume_at = 0.0
            self._watch_listeners()
            if len(self._watched) < len(self.role.listeners):
                wait = LOOK_FOR_ROOM
        else:
            wait = min(wait, self._resume_at - now)
        self.emit.tell_floods()
        for service, queue in self._queues.items():
            while queue and queue[0].deadline <= now:  # first of all: they leave whatever goes wrong with the queue
                reason = "no link was idle in time (--pair-timeout); is a relay client connected?"
                self._refuse(queue.popleft(), reason)
            self._serve_queue(service)
            self._balance(service)
            if self._gauges.count_waiting(service):
                wait = min(wait, self.LOOK_AGAIN)
            if queue:
                wait = min(wait, queue[0].deadline - now)
        return wait


# --- The command ----------------------------------------------------------------------------------------------


def create_relay_server(relay_port: int, service_port: int, **options: Any) -> RelayServer:
    """A `RelayServer` that has been started, as node-tcp-relay's ``createRelayServer``.  Raises `OSError`."""
    return RelayServer(relay_port, service_port, **options).start()


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``tcprelays``.  Returns its exit status."""
    return tcprelay.run_command(
        "tcprelays",
        "Relay server: for a host that everybody can reach. Relay clients connect to the relay port and service "
        "clients to a service port; tcprelays connects them.",
        ServerOptions,
        lambda options: RelayServer(**vars(options)),
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
