"""The relay client: keeps idle links to the relay server, and connects them to services when they are started.

    tcprelayc --host localhost --port 22 --relay-host relay.example.net --relay-port 10080

Threads, beside the second one of each connection that lasts:

    keeper     waits on a condition; opens links where some are missing, sweeps over the connections; joined by
               `RelayClient.end`
    links      one each, from dialling to its end; an idle one blocks in ``poll`` on its link and on `_stop`
    look-ups   one for each name at most, while a name server is asked; blocks in getaddrinfo, which nothing ends
               early, so nobody joins it (see `tcprelay.Name`)

A link's life, in one thread:

    keeper ─▶ _run_link: _connect (dial, HELLO … WELCOME)
                _serve_idle: PING ─▶ PONG
                             START ─▶ _serve: dial the service, READY, Splice.run ─▶ idle again
                             BYE, silence, loss ─▶ closed; the keeper opens another

Backing off: after a failure, one link at a time tries again, at a random moment within a span that doubles.  The
first that gets through, or that is left after losses, brings the others after it at a measured pace, so that a
thousand clients do not fall upon a relay server that has just been restarted.  A link that START takes is replaced
at once.

With --workers, each worker process is a `RelayClient` that keeps its share of the links (`ClientWorkers`).
"""

from __future__ import annotations

import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from _tcprelay.addresses import Endpoint
from _tcprelay.certificates import make_context, pin_of, trust
from _tcprelay.client.pace import FIRST_BACKOFF, LAST_BACKOFF, RefusedByServer, Service, Unreachable, longest_backoff
from _tcprelay.command import run_command
from _tcprelay.events import (
    ConnectionClosed,
    ConnectionFailed,
    ConnectionOpened,
    Event,
    LinkDown,
    LinkUp,
    Published,
    Unpublished,
)
from _tcprelay.link import Link, carrier
from _tcprelay.options import ClientOptions
from _tcprelay.processes import WorkerProcess, Workers
from _tcprelay.protocol import (
    AUTH,
    BYE,
    CHALLENGE,
    CLIENT,
    FAIL,
    HELLO,
    IDLE,
    PING,
    PONG,
    PROTOCOL_VERSION,
    READY,
    REFUSED,
    SERVER,
    SILENCE,
    START,
    Frame,
    LinkFault,
    guess_protocol,
    is_proof,
    new_nonce,
    prove,
)
from _tcprelay.role import Credentials, Parent, Relay
from _tcprelay.sockets import DIAL_TIMEOUT, Dialer
from _tcprelay.splice import Splice
from _tcprelay.streams import FLUSH_TIMEOUT, Stream
from _tcprelay.system import random_fraction, ssl
from _tcprelay.tcp import is_near, say_path
from _tcprelay.text import connection_id, is_tls_error, random_id, say_error, shown
from _tcprelay.threads import JOIN_TIMEOUT, join
from _tcprelay.tls import TLSStream
from _tcprelay.values import parse_publication
from _tcprelay.waiting import Deadline, Stopping, wait_for

MOST_HANDSHAKES = 256
"""Links that are being opened at once: as many handshakes as each relay server takes."""


RELAY_DIAL_TIMEOUT, DIAL_AGAIN = 15.0, 5.0
"""Seconds to reach the relay server, and after how many without an answer it is tried once more beside the first
attempt: a saturated uplink has round trips of seconds, and a path that is back is found soon."""


LINK_TIMEOUT = 30.0
"""Seconds from a link's TCP connection to WELCOME; clearly more than the relay server gives it, so that a link that
is in the server's pool has not been given up here."""


BYE_TIMEOUT = 2.0
"""Seconds that the server has to close a link after BYE; meanwhile a START that crossed it is still served."""


GROWTH = 4
"""Links that may be opened at once for each one in use, beyond the idle ones, where the server says that more service
clients wait: 200 that come together have theirs after two rounds from a pool of 8, and a number that the server merely
says opens a second pool at most."""


STABLE_TIME = 10.0
"""Seconds that a link must have been up for its loss to count as the first."""


class RelayClient(Relay):
    """A relay client.

    Parameters: where the service is (``host`` may be ``unix:PATH``), where the relay server is, how many idle
    links to keep; ``on_event``, which is called with each `tcprelay.Event` in the thread where it happens and
    must not block; and every option of ``tcprelayc`` by its name with underscores (``token="…"``), times in
    seconds.  ``publish=`` takes strings (``"web=localhost:80"``) or `Publication` objects.

    Raises `ValueError` for options that do not fit, and `OSError` where the token file cannot be read.
    """

    options: ClientOptions
    FIRST_PROCESSOR, NEXT_PROCESSOR = -1, -1  # the last first: on one host with a relay server, that has the others

    def __init__(
        self,
        host: str,
        port: int | None,
        relay_host: str,
        relay_port: int,
        num_conn: int = 8,
        *,
        on_event: Callable[[Event], object] | None = None,
        **options: Any,
    ) -> None:
        options["publish"] = tuple(
            parse_publication(item) if isinstance(item, str) else item for item in options.get("publish", ())
        )
        checked = ClientOptions(
            host=host, port=port, relay_host=relay_host, relay_port=relay_port, num_conn=num_conn, **options
        )
        super().__init__("tcprelay.client", checked, checked.max_conn, on_event)
        self._id = random_id(8)
        self._name = (checked.name or socket.gethostname())[:64]
        self._relay = Endpoint(relay_host, relay_port)
        self._dialer = self._make_dialer()
        self._worker = 0
        """Which of several worker processes this is."""
        self._num_conn = checked.num_conn
        self._most_handshakes = MOST_HANDSHAKES
        self._handshakes = MOST_HANDSHAKES
        """Links that may be opened at once, under `_condition`: half as many after a failure, and with each that is up
        one more, up to the limit above."""
        self._services = [Service(publication, self._num_conn, self._probing) for publication in checked.services]
        self._condition = threading.Condition()  # over the links' states in _services, and _links
        self._links: set[Link | Stream] = set()
        self._make_threads()

    @property
    def counters(self) -> dict[str, int]:
        """What has been counted since the start, and how many connections and links there are now."""
        with self._condition:
            idle = sum(service.idle for service in self._services)
        return {**self._count(inbound_is_to_link=False), "links_idle": idle}

    def _load_credentials(self) -> Credentials:
        options = self.options
        token = options.read_token()
        links = services = None
        if options.tls in ("relay", "both"):
            links = make_context(options, False, options.cert, options.key, options.pfx)
            if options.pin or not options.reject_unauthorized:
                links.check_hostname, links.verify_mode = False, ssl.CERT_NONE
            else:
                trust(links, options.ca_file)
        if options.tls in ("both", "service"):
            services = make_context(options, False)
            if options.service_insecure:
                services.check_hostname, services.verify_mode = False, ssl.CERT_NONE
            else:
                trust(services, options.service_ca_file)
        return Credentials(token, links, services)

    def prepare(self) -> None:
        """Warns of what is not secure.  No name is looked up here: at boot the name server may not answer yet."""
        options = self.options
        if options.tls in ("relay", "both") and not options.reject_unauthorized and not options.pin:
            self._log.warning("--reject-unauthorized false: whoever is on the way can pose as the relay server")
        if options.tls in ("both", "service") and options.service_insecure:
            self._log.warning("--service-insecure: whoever is on the way can pose as the service")

    def _open(self) -> None:
        """Begin."""
        if self._channel is None:
            self.prepare()
        self._keeper.start()

    def make_workers(self, count: int) -> Parent | None:
        """As many as there are idle links to keep, at most.  With --max-conn there are none by default: one process
        may need what another has left."""
        options = self.options
        if options.max_conn and options.workers is None:
            return None
        count = min(count, options.num_conn, options.max_conn or count)
        return ClientWorkers(self, count) if count > 1 else None

    def _make_dialer(self) -> Dialer:
        return Dialer(self._relay, RELAY_DIAL_TIMEOUT, self._probing, DIAL_AGAIN)

    def _make_threads(self) -> None:
        self._keeper = threading.Thread(target=self._keep, name="tcprelay-client keeper", daemon=True)
        self._own_threads = [self._keeper]

    def become_one_of(self, number: int, count: int) -> None:
        """Keep one worker's share of the links."""
        options = self.options

        def share(whole: int) -> int:
            return whole // count + (number < whole % count)

        self._make_threads()  # since Python 3.13 those that were made before the fork cannot be started
        self._dialer = self._make_dialer()  # a look-up that was under way is not, in this process
        self._worker = number
        self._num_conn = share(options.num_conn)
        self._handshakes = self._most_handshakes = max(1, share(MOST_HANDSHAKES))
        self._services = [
            Service(publication, self._num_conn, self._probing, count) for publication in options.services
        ]
        if options.max_conn:
            self._splices.most = share(options.max_conn)

    def _stop_intake(self) -> None:
        with self._condition:
            self._condition.notify_all()
        join(self._keeper, JOIN_TIMEOUT)

    def _wake_all(self) -> None:
        with self._condition:  # a link is closed after it has left the set
            for link in self._links:
                link.wake()

    # The keeper

    def _keep(self) -> None:
        """The keeper's life, which no unexpected error may end: nobody else opens links."""
        while not self._stop.requested:
            try:
                self._watch()
            except Exception:
                self._log.exception("unexpected error in the keeper")
                self._stop.wait(1.0)

    def _watch(self) -> None:
        """Open the links that are missing, and look at the time every so often, until `_stop` is requested."""
        next_sweep = time.monotonic() + self._splices.interval
        while not self._stop.requested:
            now = time.monotonic()
            with self._condition:
                missing = [(service, *self._take_missing(service, now)) for service in self._services]
                if not any(count for _, count, _ in missing):
                    self._condition.wait(max(0.0, min([next_sweep, *(moment for *_, moment in missing)]) - now))
            for service, count, _ in missing:
                for _ in range(count):
                    self._start_link(service)
            if time.monotonic() >= next_sweep:
                self._splices.sweep()
                self._emit.tell_floods()
                next_sweep = time.monotonic() + self._splices.interval

    def _take_missing(self, service: Service, now: float) -> tuple[int, float]:
        """How many links to open now, and when to look again; those count as connecting.  Under the lock."""
        if now < service.retry_at:
            return 0, service.retry_at
        wanted, moment = service.pace.wanted(now)
        wanted += min(service.asked, self._num_conn + GROWTH * service.busy) - service.idle - service.connecting
        room = self._handshakes - sum(other.connecting for other in self._services)
        if service.probing:
            wanted = min(wanted, 1 - service.connecting)
        elif wanted <= room:
            service.asked = 0
        count = 0
        while count < min(wanted, room) and self._splices.admit():
            count += 1
        service.connecting += count
        return count, moment

    def _start_link(self, service: Service) -> None:
        try:
            self._threads.start(self._run_link, service)
        except (RuntimeError, MemoryError) as error:
            self._splices.leave()
            self._note_failure(service, time.monotonic(), say_error(error))

    def _note_failure(self, service: Service, began: float, reason: str, longest: float = LAST_BACKOFF) -> None:
        """An attempt has failed: wait, longer each time, and tell once."""
        with self._condition:
            service.connecting -= 1
            self._back_off(service, began, longest)
            tell = service.idle + service.busy == 0 and service.told != reason and not self._stop.requested
            if tell:
                service.told = reason
        if tell:
            self._emit(Unpublished(service=service.name, relay=str(self._relay), reason=reason))

    def _back_off(self, service: Service, began: float, longest: float = LAST_BACKOFF) -> None:
        """Set the moment of the next attempt, after one that began then has failed.  Under the lock."""
        if began >= service.failed_at:  # those under way at the same time count once
            service.failed_at = time.monotonic()
            service.failures += 1
            self._handshakes = max(len(self._services), self._handshakes // 2)  # each service may try one
            service.span = FIRST_BACKOFF if service.failures == 1 else min(longest, 2 * service.span)
            # Measured from its beginning: one that took long to fail has been waiting already.
            service.retry_at = max(service.failed_at, began + service.span * random_fraction())
            service.probing = True
        self._condition.notify_all()

    # Links

    def _run_link(self, service: Service) -> None:
        """A link from dialling to its end; the top of its thread.  It counts as connecting up to `_use_link`."""
        try:
            link, reason, longest, began = None, "unexpected error", LAST_BACKOFF, time.monotonic()
            try:
                link, address, waiting = self._connect(service)
            except (OSError, EOFError) as error:
                reason, longest = say_error(error), longest_backoff(error)
            finally:
                if link is None:
                    self._note_failure(service, began, reason, longest)
            if link is not None:
                self._use_link(link, service, address, waiting)
        finally:
            self._splices.leave()
            with self._condition:
                self._condition.notify_all()

    def _use_link(self, link: Link | Stream, service: Service, address: str, waiting: int) -> None:
        """A link from its first idle moment to its end."""
        since, carried, idle, reason = time.monotonic(), service.carried, True, "unexpected error"
        self._count_in(link, service, waiting)
        try:
            self._tell_up(link, service, address)
            if isinstance(link, Stream):
                reason, idle = self._serve_raw(link, service), False
            else:
                reason, idle = self._serve_idle(link, service)
        except TimeoutError:
            reason = "no PING in time"
            carrier(link).reset_on_close()  # it is dead: see `tcprelay.Splice.check_time`
        except (OSError, EOFError) as error:
            reason = say_error(error)
        finally:
            with self._condition:
                self._links.discard(link)
                service.idle -= 1
                if idle:
                    service.pace.lose(time.monotonic())
                # A relay that takes links and drops them is no better than one that refuses them; but a link
                # that was lost with a connection says nothing about the relay.
                if time.monotonic() - since >= STABLE_TIME or service.carried != carried:
                    service.failures, service.retry_at = 0, 0.0
                elif not self._stop.requested:
                    self._back_off(service, since)
            link.close()
            self._emit(LinkDown(service=service.name, peer=str(self._relay), client=self._id, reason=reason))

    def _connect(self, service: Service) -> tuple[Link | Stream, str, int]:
        """Dial the relay server and bring the link to its idle state; with the service's address there, and how many
        service clients wait.

        Raises `OSError`, `EOFError`, and `RefusedByServer` with the server's reason.
        """
        deadline = Deadline(None)
        stream = self._dial_relay(deadline)
        try:
            if self.options.wire == "raw":
                stream.send(self.options.secret.encode("utf-8", "surrogateescape"))
                return stream, "", 0
            link = Link(stream, CLIENT)
            welcome = self._greet(link, service, deadline)
            link.heartbeat = max(0.05, welcome.number("heartbeat", 15, 3600))
            return link, shown(welcome.text("address")), int(welcome.number("waiting", 0, 1e6))
        except BaseException as error:
            late = self._say_late(stream.sock)
            stream.close()
            if isinstance(error, TimeoutError):
                raise late from None
            raise

    def _say_late(self, sock: socket.socket) -> TimeoutError:
        """What to raise where the relay has not answered in time."""
        why = say_path(sock) or f"; is {self._relay} the relay port of a tcprelays?"
        return TimeoutError(f"no answer within {LINK_TIMEOUT:g} s{why}")

    def _dial_relay(self, deadline: Deadline) -> Stream:
        """Connect to the relay server, with TLS where it is asked for; the deadline begins when there is a connection.
        Raises `OSError`, `EOFError`; `Unreachable` where there is none."""
        try:
            sock = self._dialer.dial(self._stop)
        except OSError as error:
            raise Unreachable(say_error(error)) from error
        deadline.shorten(LINK_TIMEOUT)
        name, context, options = f"link with relay {self._relay}", self._credentials.links, self.options
        if context is None:
            return Stream(sock, name)
        expected = options.tls_server_name or options.relay_host
        try:
            stream = TLSStream(sock, name, context, server_hostname=expected)
            stream.handshake(deadline, self._stop)
            found = pin_of(stream.tls.getpeercert(binary_form=True) or b"")
            if options.pin and found != options.pin:
                raise RefusedByServer(f"the relay's certificate has another pin than --pin says: {found}")
        except BaseException as error:
            late = self._say_late(sock)
            sock.close()
            if isinstance(error, TimeoutError):
                raise late from None
            if not is_tls_error(error):
                raise
            if isinstance(error, ssl.SSLCertVerificationError):
                hint = "give --ca-file or --pin, or --tls-server-name where the name differs"
                raise RefusedByServer(f"{say_error(error)}; {hint}") from error
            if error.reason == "TLSV1_ALERT_ACCESS_DENIED":
                raise RefusedByServer(
                    "refused by the relay: it asks for neither a token nor certificates, so it accepts links from its "
                    "own machine alone; set --token-file on both sides"
                ) from error
            if error.reason == "WRONG_VERSION_NUMBER":
                raise RefusedByServer(
                    "the relay does not speak TLS: start it with --tls, or leave --tls out"
                ) from error
            raise
        return stream

    def _greet(self, link: Link, service: Service, deadline: Deadline) -> Frame:
        """HELLO, CHALLENGE, AUTH; returns WELCOME.  The server proves that it knows the token, too."""
        nonce, token = new_nonce(), self._credentials.token
        hello = {"version": PROTOCOL_VERSION, "service": service.name, "client": self._id,
                 "worker": self._worker, "name": self._name, "idle": self._num_conn, "nonce": nonce,
                 "token": bool(token)}  # fmt: skip
        link.send(HELLO, hello)
        # Once WELCOME may be on its way, so may START behind it: then nothing but BYE ends a link in peace.
        try:
            answer = link.receive(deadline, self._stop if token else self._cut)
        except LinkFault as error:
            spoken = guess_protocol(link.unread())
            raise LinkFault(f"the relay port answers with {spoken}, not the link protocol ({error})") from error
        except OSError as error:
            if not is_tls_error(error):
                raise
            # With TLS 1.3 a client learns only now that its certificate was not accepted.
            reason = f"refused by the relay, maybe for this client's certificate: {say_error(error)}"
            raise RefusedByServer(reason) from error
        except EOFError:
            raise EOFError("the relay closed the link without a word; does it use --wire raw, or TLS?") from None
        expected = ""
        if answer.kind == CHALLENGE:
            if not token:
                raise RefusedByServer("the relay asks for a token; set --token-file or --token")
            server_nonce = answer.text("nonce")
            parts = (nonce, server_nonce, service.name, self._id)
            expected = prove(token, SERVER, *parts)
            link.send(AUTH, {"proof": prove(token, CLIENT, *parts)})
            answer = link.receive(deadline, self._cut)
        if answer.kind == REFUSED:
            raise RefusedByServer(f"refused by the relay: {shown(answer.text('reason'), 240)}", answer.text("code"))
        if token and not (expected and is_proof(answer.text("proof"), expected)):
            raise RefusedByServer("the relay did not prove that it knows the token; is --token-file set there?")
        return answer

    def _count_in(self, link: Link | Stream, service: Service, waiting: int) -> None:
        """A link is up: it counts as idle, and others may follow it."""
        with self._condition:
            self._links.add(link)
            service.connecting -= 1
            self._handshakes = min(self._most_handshakes, self._handshakes + 1)
            service.idle += 1
            service.asked = max(0, waiting - 1)  # this one serves the first
            if service.probing and service.failures:
                service.pace.begin(time.monotonic())
            service.probing = False
            self._condition.notify_all()

    def _tell_up(self, link: Link | Stream, service: Service, address: str) -> None:
        with self._condition:
            tell, service.told = service.told != "", ""
        if tell:
            host, _, port = address.rpartition(":")
            where = address or f"the relay {self._relay}, on a port that it does not tell (--wire raw)"
            if host in ("[::]", "0.0.0.0") and port.isdigit():
                where = str(Endpoint(self._relay.host, int(port)))
            self._emit(
                Published(service=service.name, target=str(service.target), relay=str(self._relay), address=where)
            )
            if remark := say_path(link.sock):
                self._log.info("a link with %s is up%s", self._relay, remark)
        self._emit(LinkUp(service=service.name, peer=str(self._relay), client=self._id))

    def _serve_idle(self, link: Link, service: Service) -> tuple[str, bool]:
        """Answer on an idle link, and carry connections on it, until it ends in peace; returns why it did, and
        whether it was idle then.

        Raises `OSError`, `EOFError`, `LinkFault`, `TimeoutError` where it is lost while it is idle.
        """
        patience = SILENCE * link.heartbeat
        settled = True
        while True:
            try:
                frame = link.receive(Deadline(patience), self._stop)
                settled = True
            except Stopping:
                self._say_bye(link, service, Deadline(BYE_TIMEOUT if settled else None))
                return "ending", True
            except TimeoutError:
                if settled:
                    raise
                self._leave_to_server(link, service)
                return "no PING in time after its connection", False
            if frame.kind == PING:
                link.send_now(PONG)
            elif frame.kind == START:
                if not self._serve(link, frame, service):
                    return "its connection was broken off", False
                if link.spent:
                    self._leave_to_server(link, service)
                    return "it has lost packets, and a new one will be faster", False
                settled = False
            elif frame.kind == BYE:
                return "the relay server said BYE", frame.fields.get("again") is not True
            else:
                raise RefusedByServer(f"refused by the relay: {shown(frame.text('reason'), 240)}")

    def _leave_to_server(self, link: Link, service: Service) -> None:
        """Give up a link after a connection, however long that takes; it no longer counts as idle.

        The server may still be passing bytes on to somebody who reads slowly, and has nothing to say meanwhile: it
        alone can close this link without losing them.
        """
        self._shift(service, idle=-1)
        try:
            self._say_bye(link, service, Deadline(None), idle=0)
        finally:
            self._shift(service, idle=1)

    def _say_bye(self, link: Link, service: Service, deadline: Deadline, idle: int = 1) -> None:
        """Give a link up, and wait for the server to close it: a START that crosses BYE is still served."""
        try:
            out = bytearray(link.pack_control(BYE))
            while not link.stream.send_now(out):
                wait_for(link.fd, select.POLLOUT, deadline, self._cut)
            while (frame := link.receive(deadline, self._cut)).kind != START:
                pass
            self._serve(link, frame, service, idle)
        except (OSError, EOFError):
            pass  # the server has closed it, as BYE asks it to

    def _serve(self, link: Link, start: Frame, service: Service, idle: int = 1) -> bool:
        """Connect a started link, which counts as so many `idle` ones, to the service; True where it is idle again
        afterwards."""
        record = {"id": shown(start.text("id"), 32), "service": service.name, "peer": shown(start.text("client"), 64)}
        began = time.monotonic()
        self._set_busy(service, waiting=int(start.number("waiting", 0, 1e6)), idle=idle)
        try:
            if is_lost(link):  # START was read late: whoever it is for has been refused, and must not be served now
                raise EOFError("the link was lost before its connection began")
            try:
                stream = self._dial_service(service, link)
            except (OSError, EOFError) as error:
                reason = f"cannot reach {service.target}: {say_error(error)}"
                self._emit(ConnectionFailed(reason=reason, seconds=time.monotonic() - began, **record))
                self._fail(link, reason)
            else:
                self._splice(stream, link, service, record)
        finally:
            self._shift(service, busy=-1, idle=idle)
        return link.machine.state == IDLE

    def _fail(self, link: Link, reason: str) -> None:
        """Answer that the service cannot be reached, and drop what still comes.  Raises `OSError`."""
        link.send(FAIL, {"reason": shown(reason, 400)})
        try:
            link.discard(Deadline(FLUSH_TIMEOUT), self._cut)
        except ConnectionAbortedError:
            pass  # the service client has gone; the link is idle
        except TimeoutError:
            raise ConnectionResetError("the relay server did not end the connection after FAIL") from None

    def _serve_raw(self, link: Stream, service: Service) -> str:
        """Carry one connection on a raw link: the first bytes start it.  Raises as `_serve_idle` does."""
        early = bytearray(4096)
        while (count := link.recv_now(memoryview(early))) is None:
            try:
                wait_for(link.fd, select.POLLIN, Deadline(None), self._stop)
            except Stopping:
                return "ending"
        if count == 0:
            raise EOFError("the relay closed it")
        record = {"id": connection_id(), "service": service.name, "peer": f"relay {self._relay}"}
        self._set_busy(service, waiting=0)
        link.reset_on_close()
        try:
            stream = self._dial_service(service, link)
        except (OSError, EOFError) as error:
            reason = f"cannot reach {service.target}: {say_error(error)}"
            self._emit(ConnectionFailed(reason=reason, seconds=0.0, **record))
        else:
            self._splice(stream, link, service, record, early[:count])
        finally:
            self._shift(service, idle=1, busy=-1)
        return "its connection is over"

    def _dial_service(self, service: Service, link: Link | Stream) -> Stream:
        """Connect to the service for a link, with TLS where it is asked for.  Raises `OSError`, `EOFError`."""
        deadline = Deadline(DIAL_TIMEOUT)
        sock = service.dialer.dial(self._cut, little=not is_near(link.sock))
        name, context = f"service {service.target}", self._credentials.services
        if context is None:
            stream = Stream(sock, name)
            stream.reset_on_close()
            return stream
        try:
            secure = TLSStream(sock, name, context, server_hostname=service.target.host or None)
            secure.reset_on_close()
            secure.handshake(deadline, self._cut)
        except BaseException:
            sock.close()
            raise
        return secure

    def _splice(
        self,
        stream: Stream,
        link: Link | Stream,
        service: Service,
        record: dict[str, str],
        early: bytes | bytearray = b"",
    ) -> None:
        """Carry a connection between a link and the service that was dialled, and tell its record."""
        ready = link.pack_control(READY) if isinstance(link, Link) else b""
        splice = Splice(record["id"], service.name, stream, link, ready)
        splice.from_link = len(early)
        self._splices.add(splice)
        try:
            self._emit(ConnectionOpened(via=str(service.target), **record))
            try:
                stream.send(early)
            except OSError as error:
                splice.break_off(f"{stream.name}: {say_error(error)}")
            splice.run(self._threads)
        finally:
            self._splices.remove(splice)
            stream.close()
            self._emit(
                ConnectionClosed(
                    bytes_in=splice.from_link, bytes_out=splice.to_link, seconds=time.monotonic() - splice.opened,
                    reason=splice.reason, **record,
                )
            )  # fmt: skip

    def _set_busy(self, service: Service, waiting: int, idle: int = 1) -> None:
        with self._condition:
            service.idle -= idle
            service.busy += 1
            service.carried += 1
            service.asked = waiting
            if service.idle + service.connecting < self._num_conn + waiting:
                self._condition.notify_all()  # the keeper opens more

    def _shift(self, service: Service, idle: int = 0, busy: int = 0) -> None:
        """Count so many more links as idle and as busy."""
        with self._condition:
            service.idle += idle
            service.busy += busy
            if idle < 0:
                self._condition.notify_all()  # the keeper opens another


def is_lost(link: Link) -> bool:
    """Whether the other side has closed or reset a link by now."""
    poller = select.poll()
    poller.register(link.fd, getattr(select, "POLLRDHUP", 0))
    return bool(poller.poll(0))


class ClientWorkers(Workers):
    """The parent of a relay client's workers.  Each keeps its share of the links; nothing else is between them."""

    role: RelayClient

    def __init__(self, role: RelayClient, count: int) -> None:
        super().__init__(role, count)
        self._published: dict[str, set[int]] = {service.name: set() for service in role.options.services}
        self._told: dict[str, str | None] = dict.fromkeys(self._published)
        """As `Service.told`."""

    def become(self, worker: WorkerProcess) -> None:
        self.role.become_one_of(worker.number, len(self.workers))

    def lost(self, worker: WorkerProcess) -> None:
        for numbers in self._published.values():
            numbers.discard(worker.number)

    def tell(self, event: str, fields: dict[str, Any], worker: WorkerProcess) -> None:
        """A service is published while one of the workers has links for it."""
        service, reason = fields["service"], fields.get("reason", "")
        if event == "Published":
            self._published[service].add(worker.number)
        else:
            self._published[service].discard(worker.number)
            if self._published[service]:
                return
        if self._told[service] != reason:
            self._told[service] = reason
            self.emit(Unpublished(**fields) if reason else Published(**fields))


def create_relay_client(
    host: str, port: int, relay_host: str, relay_port: int, num_conn: int = 1, **options: Any
) -> RelayClient:
    """A `RelayClient` that has been started, as node-tcp-relay's ``createRelayClient``.  Raises `OSError`."""
    return RelayClient(host, port, relay_host, relay_port, num_conn, **options).start()


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``tcprelayc``.  Returns its exit status."""
    return run_command(
        "tcprelayc",
        "Relay client: for a host behind a NAT. It makes a service that it can reach available at the relay server.",
        ClientOptions,
        lambda options: RelayClient(**vars(options)),
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
