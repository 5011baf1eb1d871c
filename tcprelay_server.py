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
import os
import select
import selectors
import shlex
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from _tcprelay.addresses import Endpoint, host_of, is_loopback, show_address
from _tcprelay.certificates import certificate_name, make_context, make_self_signed, pin_of, trust
from _tcprelay.command import run_command
from _tcprelay.events import (
    AcceptPaused,
    ClientDown,
    ClientUp,
    ConnectionClosed,
    ConnectionFailed,
    ConnectionOpened,
    Event,
    LinkDown,
    LinkNotMade,
    LinkRefused,
    LinkUp,
    Listening,
)
from _tcprelay.link import Link, carrier
from _tcprelay.messages import (
    MESSAGE_ROOM,
    MESSAGE_SIZE,
    adopt_socket,
    decode_message,
    encode_message,
    receive_message,
    send_message,
)
from _tcprelay.options import ServerOptions, read_secret
from _tcprelay.processes import WorkerProcess, Workers
from _tcprelay.protocol import (
    BYE,
    CHALLENGE,
    CLIENT,
    CLOSED,
    FAIL,
    HELLO,
    IDLE,
    NEW,
    PING,
    PROTOCOL_VERSION,
    READY,
    REFUSED,
    SERVER,
    SILENCE,
    START,
    WELCOME,
    LinkFault,
    encode_frame,
    guess_protocol,
    is_proof,
    is_same,
    new_nonce,
    prove,
)
from _tcprelay.role import Credentials, Relay
from _tcprelay.server.clients import NOBODY, NoLinkHere, Refusal, ServiceClient, Unacknowledged, make_stream
from _tcprelay.server.gauges import WorkerGauges
from _tcprelay.server.limits import TOO_MANY_HANDSHAKES, Handshakes, Shares, most_handshakes
from _tcprelay.server.pool import Pool, PooledLink, are_links_given
from _tcprelay.sockets import listen
from _tcprelay.splice import Splice
from _tcprelay.state import private_file, state_directory
from _tcprelay.streams import Stream
from _tcprelay.system import ignore_oserror, ssl
from _tcprelay.tcp import is_resent, path_is_dead, say_path, set_timeout, unsent_bytes
from _tcprelay.text import connection_id, is_tls_error, random_id, say_error, shown
from _tcprelay.threads import JOIN_TIMEOUT, Threads, join
from _tcprelay.tls import TLSStream
from _tcprelay.values import parse_service
from _tcprelay.waiting import Deadline, Stopping, wait_for
from _tcprelay.watch import in_batches

ACCESS_DENIED = b"\x15\x03\x03\x00\x02\x02\x31"
"""A TLS alert before the handshake: fatal, access_denied (RFC 8446, 6)."""


HANDSHAKE_TIMEOUT, HANDSHAKE_STEP = 20.0, 10.0
"""Seconds that a server gives a handshake as a whole, and each answer in it: three round trips of a saturated uplink
take that long, and who says nothing is not waited for longer."""


SPARE_TAKERS = 8
"""Threads of a worker that wait for connections, at most."""


SUSPICION = 3.0
"""Seconds without any acknowledgement of START after which its relay client's idle links are to be proven alive, where
the kernel has sent it again by then: on a slow path an acknowledgement takes longer."""


LOOK_FOR_ROOM = 0.002
"""Seconds from one look to the next whether the queue of a service has room again, while the kernel holds who comes."""


SURPLUS_TIME = 60.0
"""Seconds after which an idle link beyond what its client asked for is retired."""


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
            directory = options.state_dir or state_directory()
            cert, key = make_self_signed(directory), ""
            open_to_all = options.auth or options.allow_unauthenticated or options.wire == "raw" or not on_links
            if not (token or open_to_all):
                token = make_token(directory)
        links = services = None
        if on_links:
            links = make_context(options, True, cert, key, options.pfx)
        if links is not None and options.auth:
            trust(links, options.ca_file)
            links.verify_mode = ssl.CERT_REQUIRED
        if on_services:
            own = options.service_cert or options.service_pfx
            files = (
                (options.service_cert, options.service_key, options.service_pfx) if own else (cert, key, options.pfx)
            )
            services = make_context(options, True, *files, prefix="--service-" if own else "--")
        if options.is_improvised:
            with open(cert) as file:
                certificate = file.read().partition("-----BEGIN CERTIFICATE")[1:]
            pin = pin_of(ssl.PEM_cert_to_DER_cert("".join(certificate)))
        return Credentials(token, links, services, pin)

    def invitation(self, with_secrets: bool) -> str:
        """After a start with ``--tls`` alone: the command for the other side."""
        options = self.options
        if not options.is_improvised or self._credentials.links is None:
            return ""
        directory = options.state_dir or state_directory()
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
                self.listeners.update(dict.fromkeys(listen(host, port, self.signals, self._probing), name))
            except Stopping:
                raise
            except OSError as error:
                raise OSError(
                    error.errno, f"cannot listen on {Endpoint(host or '*', port)}: {say_error(error)}"
                ) from error
        for listener, name in self.listeners.items():
            address = listener.getsockname()
            self._bound.setdefault(name, (host_of(address), address[1]))
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
            set_timeout(self._intake, socket.SO_RCVTIMEO, Threads.PARKED)
            self._threads.start(self._take_connections)
        self._keeper.start()

    def _warn_about_trust(self) -> None:
        if self.options.secret:
            self._log.warning("--secret crosses the wire readable: whoever can listen in can become a relay client")
        elif self.options.allow_unauthenticated:
            self._log.warning("--allow-unauthenticated: any host that reaches the relay port can become a relay client")
        else:
            addresses = [listener.getsockname() for listener, name in self.listeners.items() if not name]
            local = all(is_loopback(address) for address in addresses)
            level = logging.INFO if local else logging.WARNING
            self._log.log(
                level, "no token is set: links are accepted from this machine alone; others need --token-file"
            )

    def _stop_intake(self) -> None:
        join(self._acceptor, JOIN_TIMEOUT)
        self.close_listeners()
        if self._gauges is not None:
            ignore_oserror(self._intake.shutdown, socket.SHUT_RD)  # wakes who waits there
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
                message, descriptors = receive_message(self._intake)
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
        fields, early = decode_message(message)
        assert self._gauges is not None
        service, address = fields["service"], tuple(fields["address"])
        sock, served = None, False
        try:
            if problem:
                self._cannot_take(problem)
                return
            problem = "unexpected error"
            sock = adopt_socket(descriptors[0], address)
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
                    record = {"id": fields.get("id") or connection_id(), "service": service}
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
        message = encode_message(client.state(failed, reason), bytes(client.early))
        if len(message) > MESSAGE_SIZE - MESSAGE_ROOM:  # with the ids of hundreds of relay clients
            raise Refusal(f"the service cannot be reached: {reason}")
        assert self._channel is not None
        try:
            send_message(self._channel, message, [client.stream.fd])
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
            record = {"id": connection_id(), "service": service, "peer": peer}
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
        stream, deadline = link.stream, Deadline(HANDSHAKE_TIMEOUT)
        gave_up = False
        try:
            self._check_protected_mode(stream)
            if isinstance(stream, TLSStream):
                stream.handshake(deadline.within(HANDSHAKE_STEP), self._stop)
            raw = self.options.wire == "raw"
            return self._greet_raw(stream, deadline) if raw else self._greet(link, deadline)
        except Refusal as error:
            refusal = error.apart()
        except LinkFault as error:
            spoken = guess_protocol(link.unread())
            known = link.machine.state == NEW and spoken != "something else"
            first = f"it speaks {spoken}, not the link protocol: " if known else ""
            refusal = Refusal(f"{first}{error}", "protocol")
        except TimeoutError:
            step = f"{HANDSHAKE_STEP:g} s for each answer and {HANDSHAKE_TIMEOUT:g} s in all"
            path = say_path(stream.sock)
            refusal = Refusal(f"its handshake was not complete in time ({step}){path}", "timeout")
        except Stopping:
            refusal = Refusal("the relay server is ending", "draining")
        except (OSError, EOFError) as error:
            evicted = self._handshakes["link"].was_evicted(stream)
            gave_up = not evicted and (isinstance(error, EOFError) or error.errno is not None)  # or we have
            reason = "closed before its handshake was complete" if isinstance(error, EOFError) else say_error(error)
            refusal = Refusal(TOO_MANY_HANDSHAKES if evicted else reason, "lost")
            if is_tls_error(error):
                refusal, gave_up = Refusal(explain_tls(error), "tls"), False
                if error.reason in NOT_TLS:  # a plain relay client may be told in its own language
                    plain = encode_frame(REFUSED, {"code": "tls", "reason": "it speaks TLS; add --tls"})
                    ignore_oserror(link.sock.sendall, plain)
        self._refuse_link(link, refusal, gave_up)
        return None

    def _refuse_link(self, link: Link, refusal: Refusal, gave_up: bool) -> None:
        """Tell why there is no link, in the log and, as far as it can be told there, to the relay client, unless that
        (or the path) gave it up."""
        stream = link.stream
        # Who has not said a byte may be a raw client, which would take REFUSED for a connection's bytes; or
        # only looked whether the port is open, which is nobody's refusal.
        silent = type(stream) is Stream and not link.unread() and link.machine.state == NEW
        kind = LinkNotMade if gave_up else LinkRefused
        event = kind(peer=show_address(stream.peer), code=refusal.code, reason=str(refusal))
        if silent and gave_up:
            self._log.debug("%s", event)
        else:
            self._emit(event)
        if isinstance(stream, TLSStream) and refusal.code == "protected":
            ignore_oserror(link.sock.sendall, ACCESS_DENIED)
            stream.linger()
            return
        mute = self.options.wire == "raw" or refusal.code == "lost" or (silent and refusal.code == "timeout")
        if not mute and refusal.code != "tls":  # then an alert has been sent
            link.refuse(refusal.code, refusal.told)
        if not mute:
            stream.linger()

    def _greet(self, link: Link, deadline: Deadline) -> PooledLink:
        """HELLO, CHALLENGE, AUTH, WELCOME.  Raises `Refusal`, `LinkFault`, `OSError`, `EOFError`."""
        hello = link.receive(deadline.within(HANDSHAKE_STEP), self._stop)
        if hello.kind != HELLO:
            raise LinkFault("the first frame is not HELLO")
        if hello.fields.get("version") != PROTOCOL_VERSION:
            raise Refusal("the versions differ: this relay server speaks link protocol 1", "version")
        service, client, nonce = hello.text("service"), hello.text("client")[:64], hello.text("nonce")
        proof, token = "", self._credentials.token
        if token:
            own_nonce = new_nonce()
            link.send(CHALLENGE, {"nonce": own_nonce})
            auth = link.receive(deadline.within(HANDSHAKE_STEP), self._stop)
            expected = prove(token, CLIENT, nonce, own_nonce, service, client)
            if not is_proof(auth.text("proof"), expected):
                raise Refusal(
                    "its token is not this server's", "token",
                    "this client's token is not the server's: copy the server's, and name it in --token-file",
                )  # fmt: skip
            proof = prove(token, SERVER, nonce, own_nonce, service, client)
        elif hello.fields.get("token") is True:
            raise Refusal(
                "it wants a token to be proven, and none is set here; set --token-file", "token",
                "the relay server has no token to prove: set the same --token-file there",
            )  # fmt: skip
        if service not in self.service_addresses:
            raise Refusal(f"there is no service {shown(service, 64)} here; add --service to the server", "service")
        name, proven = shown(hello.text("name"), 64), certificate_name(link.stream)
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
                wait_for(stream.fd, select.POLLIN, deadline, self._stop)
            elif count == 0:
                raise EOFError("the link was closed")
            have += count or 0
        if not is_same(bytes(given), key):
            raise Refusal("the secret is wrong or missing", "token")
        host = show_address(stream.peer).rpartition(":")[0]
        name = certificate_name(stream) or "raw"
        pooled = PooledLink(stream, self.options.services[0].name, host, name, stream.peer)
        self._join_pool(pooled)
        return pooled

    def _check_protected_mode(self, stream: Stream) -> None:
        """Before a byte is read, and before TLS, whose handshake costs the most.  Raises `Refusal`."""
        options = self.options
        guarded = self._credentials.token or options.auth or options.secret or options.allow_unauthenticated
        if guarded or is_loopback(stream.peer):
            return
        raise Refusal(
            "this relay server asks for neither a token nor certificates, so it accepts links from its own machine "
            "alone; set --token-file on both sides (or --allow-unauthenticated on the server)", "protected",
        )  # fmt: skip

    def _join_pool(self, pooled: PooledLink) -> None:
        """Count a link in, before its client is told WELCOME.  Raises `Refusal`."""
        if not self._handshakes["link"].leave(carrier(pooled.link)):
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
                    if frame.kind == REFUSED:
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
            ignore_oserror(pooled.send, BYE, {"again": True} if again else None)
        self._drop_link(pooled, reason)

    def _drop_link(self, pooled: PooledLink, reason: str, dead: bool = False) -> None:
        """Close a link that is not in the pool; its owner calls this.

        A link between connections is closed normally, since bytes of the last one may still be on their way, unless
        it is `dead`; otherwise it is reset.
        """
        link = pooled.link
        if isinstance(link, Link) and link.machine.state in (IDLE, CLOSED) and not dead:
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
                for batch in in_batches(self._pool.idle_links()):
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
        dead = now - pooled.last_heard > SILENCE * heartbeat
        due = not pooled.blocked and now - max(pooled.last_pinged, pooled.last_heard) > heartbeat
        if pooled.settling:  # silence says nothing: it may have to wait for a slow service before it reads on
            dead, due = path_is_dead(pooled.link.sock, self.options.dead_path), False
        unused = now - pooled.last_used >= SURPLUS_TIME and not pooled.settling
        surplus = unused and self._pool.has_surplus(pooled)
        if not (dead or due or surplus) or not self._pool.hold(pooled):
            return
        if dead and pooled.settling:
            self._drop_link(pooled, "sent bytes are no longer acknowledged", dead=True)
        elif dead:
            self._drop_link(pooled, f"silent for {SILENCE * heartbeat:g} s", dead=True)
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
            client.stream.handshake(Deadline(HANDSHAKE_STEP), self._stop)
        except (OSError, EOFError) as error:
            reason = explain_tls(error) if is_tls_error(error) else say_error(error)
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
            if frame is not None and frame.kind == REFUSED:
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
                if path_is_dead(link.sock, SUSPICION) and is_resent(link.sock):
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
            wait_for(link.fd, select.POLLOUT, deadline, self._cut)
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


def say_received(pooled: PooledLink) -> str:
    """For the log, where a link brought no answer: an answer that is too large for the path never arrives."""
    if unsent_bytes(pooled.link.sock):
        return "; the relay client's host does not acknowledge what was sent to it"
    return "; the relay client's host has received the request: is tcprelayc stopped there, or the path too narrow?"


def make_token(directory: str) -> bytes:
    """The token kept in `directory`, made there if it is not yet.  Raises `OSError` and `ValueError`."""
    path = private_file(os.path.join(directory, "token"), lambda: random_id(32).encode() + b"\n")
    return read_secret("--state-dir", path)


NOT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "UNEXPECTED_MESSAGE", "NO_PROTOCOLS_AVAILABLE")
"""OpenSSL's reasons for a peer whose first bytes are not a TLS ClientHello."""


def explain_tls(error: ssl.SSLError) -> str:
    """What a failed TLS handshake means for whoever reads the log."""
    if error.reason in NOT_TLS:
        return "it does not speak TLS; if it is a tcprelayc, add --tls there"
    if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "it showed no certificate, which --auth asks for; give the client --cert and --key, or --pfx"
    return say_error(error)


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
            if worker.hand(encode_message({"service": "", "address": address}), sock.fileno()):
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
        if not best.hand(encode_message(fields, visitor.early), visitor.sock.fileno()):
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
        record = {"id": state.get("id") or connection_id(), "service": state["service"]}
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
            self.workers[richest].order(encode_message({"give_up": service}))
            self._next_give_up = now + self.LOOK_AGAIN

    # Workers

    def hear(self, worker: WorkerProcess, message: dict[str, Any], payload: bytes, descriptors: list[int]) -> None:
        if "look" in message:
            self._serve_queue(message["look"])
            self._balance(message["look"])
        elif "suspect" in message:
            for other in self._living():
                if other is not worker:
                    other.order(encode_message(message))
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
            sock, patience = adopt_socket(descriptors[0], address), self.role.options.pair_timeout
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


def create_relay_server(relay_port: int, service_port: int, **options: Any) -> RelayServer:
    """A `RelayServer` that has been started, as node-tcp-relay's ``createRelayServer``.  Raises `OSError`."""
    return RelayServer(relay_port, service_port, **options).start()


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``tcprelays``.  Returns its exit status."""
    return run_command(
        "tcprelays",
        "Relay server: for a host that everybody can reach. Relay clients connect to the relay port and service "
        "clients to a service port; tcprelays connects them.",
        ServerOptions,
        lambda options: RelayServer(**vars(options)),
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
