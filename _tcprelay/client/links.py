"""A relay client's links, each in a thread of its own from dialling to its end:

    keeper ─▶ open ─▶ run: Greeting.connect (dial, HELLO … WELCOME)
                _serve_idle: PING ─▶ PONG
                             START ─▶ _serve: dial the service, READY, Splice.run ─▶ idle again
                             BYE, silence, loss ─▶ closed; the keeper opens another

An idle link's thread blocks in ``poll`` on its link and on the `stop` of its service.
"""

from __future__ import annotations

import contextlib
import functools
import select
import time
from collections.abc import Callable

from ..addresses import Endpoint
from ..events import (
    ConnectionClosed, ConnectionFailed, ConnectionOpened, LinkDown, LinkUp, Published, ServiceUnreachable, Unpublished,
)  # fmt: skip
from ..link import AnyLink, Link, RawLink
from ..client_options import ClientOptions
from ..protocol import BYE, IDLE, PING, PONG, READY, SILENCE, START, Frame
from ..proxy_header import encode_proxy_header
from ..runtime import Runtime
from ..sockets import DIAL_TIMEOUT
from ..splice import Splice
from ..streams import Stream
from ..tcp import is_near, round_trip, say_path
from ..text import connection_id, say_error, shown
from ..waiting import Deadline, Stop, Stopping, wait_for
from .greeting import Greeting, refused
from .loops import OwnConnections, RelayPlace, Way, ends_of
from .offers import choose_offer, secure
from .refill import WITHDRAWN_TIME
from .stock import RefusedByServer, Service, Stock, longest_backoff
from .wandering import Doubts, Whereabouts

LOOK_TIME = 0.5
"""Seconds between two looks whether this host has slept or moved."""
BYE_TIMEOUT = 2.0
"""Seconds that the server has to close a link after BYE; meanwhile a START that crossed it is still served."""


LOST_BEFORE = "the link was lost before its connection began"
LOOP = "that is a port of the relay's own, and leads back here; name the port of the service itself"


class Links:
    """Opens links to one relay server, answers on them, and connects them to services.

    Parameters: the runtime; the stock that counts them; what opens one; this relay client's id; and its connections to
    services, in all its processes.
    """

    def __init__(
        self, runtime: Runtime[ClientOptions], stock: Stock, greeting: Greeting, id: str, own: OwnConnections
    ) -> None:
        self._own = own
        self._runtime = runtime
        self._stock = stock
        self._greeting = greeting
        self._relay = str(greeting.relay)
        self._id = id
        self._whereabouts, self._doubts = Whereabouts(), Doubts()
        self._next_look = 0.0
        """When the keeper looks for the former again."""
        self.told_unreachable: Callable[[Service], object] = lambda service: None
        """Called where a connection to a service could not be made."""

    def withdraw(self, key: str, reason: str) -> None:
        """Withdraw the service whose publication reads like that; or have it back, without a reason."""
        if reason:
            self._stock.withdraw(key, reason)
        else:
            self._stock.restore(key)

    def look_around(self) -> float:
        """Where this host has slept or moved have idle links prove that they live, and give up those that have not;
        returns when to look again."""
        now = time.monotonic()
        if now >= self._next_look or not self._whereabouts.is_known:
            self._next_look = now + LOOK_TIME
            if why := self._whereabouts.look(self._greeting.place):
                count = self._doubts.doubt_all()
                self._greeting.in_doubt = now
                self._stock.hasten()
                self._runtime.log.info(
                    "%s: its %d idle links with the relay at %s are replaced unless they show that they live", why,
                    count, self._relay,
                )  # fmt: skip
            self._greeting.hurry(self._stock.is_eager)
        return min(self._next_look, self._doubts.give_up())

    def open(self, service: Service) -> None:
        """Open a link, which counts as connecting, and has a place."""
        try:
            self._runtime.threads.start(self.run, service)
        except (RuntimeError, MemoryError) as error:
            self._runtime.places.leave()
            self._note_failure(service, time.monotonic(), error)

    def _note_failure(self, service: Service, began: float, error: Exception) -> None:
        reason = say_error(error)
        if self._stock.fail(service, began, reason, longest_backoff(error), self._runtime.stop.requested):
            self._tell_down(service, reason, isinstance(error, RefusedByServer) and error.lasting)
        elif isinstance(error, RefusedByServer) and not error.passing and self._stock.remark(service, reason):
            self._runtime.log.warning("service %s: no further link: %s", service.name, reason)

    def _doubt(self, service: Service, reason: str) -> None:
        if self._stock.doubt(service, reason):
            self._tell_down(service, reason)

    def _tell_down(self, service: Service, reason: str, lasting: bool = False) -> None:
        self._runtime.emit(Unpublished(service=service.name, relay=self._relay, reason=reason, lasting=lasting))

    # A link

    def run(self, service: Service) -> None:
        """A link from dialling to its end; the top of its thread.  It counts as connecting up to `_use`."""
        try:
            problem: Exception
            link, problem, began = None, RuntimeError("unexpected error"), time.monotonic()
            doubt = self._greeting.in_doubt
            try:
                link, address, waiting = self._greeting.connect(service, functools.partial(self._doubt, service))
            except (OSError, EOFError) as error:
                problem = error.with_traceback(None)
            finally:
                if link is None:
                    self._note_failure(service, began, problem)
            if link is not None:
                if doubt:
                    self._doubts.begin(round_trip(link.sock))
                    if self._greeting.in_doubt == doubt:
                        self._greeting.in_doubt = 0.0
                self._use(link, service, address, waiting)
        finally:
            self._stock.leave()

    def _use(self, link: AnyLink, service: Service, address: str, waiting: int) -> None:
        """A link from its first idle moment to its end."""
        since, carried, idle, reason = time.monotonic(), service.carried, True, "unexpected error"
        self._stock.add(link, service, waiting)
        self._doubts.settle(link)
        try:
            self._tell_up(link, service, address)
            if isinstance(link, RawLink):
                reason, idle = self._serve_raw(link, service), False
            else:
                reason, idle = self._serve_idle(link, service)
        except TimeoutError:
            reason = "no PING in time"
            link.stream.reset_on_close()  # it is dead: see `Splice.check_time`
        except (OSError, EOFError) as error:
            reason = say_error(error)
        finally:
            if self._doubts.leave(link):
                reason, idle = "this host has slept or moved, and nothing has come on it since", False
            self._stock.remove(link, service, since, carried, idle)
            link.close()
            down = LinkDown(service=service.name, peer=self._relay, client=self._id, reason=reason)
            self._runtime.emit(down)

    def _tell_up(self, link: AnyLink, service: Service, address: str) -> None:
        emit = self._runtime.emit
        host, _, port = address.rpartition(":")
        where = address or f"the relay {self._relay}, on a port that it does not tell (--wire raw)"
        if host in ("[::]", "0.0.0.0") and port.isdigit():
            where = str(Endpoint(self._greeting.relay.host, int(port)))
        if self._stock.tell_up(service, where):
            emit(Published(service=service.name, target=str(service.target), relay=self._relay, address=where))
            options = self._runtime.options
            if options.try_service and not options.check_service and self._greeting.worker == 0:
                with contextlib.suppress(RuntimeError, MemoryError):  # it is only a look
                    self._runtime.threads.start(self._try, service)
            if remark := say_path(link.sock):
                self._runtime.log.info("a link with %s is up%s", self._relay, remark)
        emit(LinkUp(service=service.name, peer=self._relay, client=self._id))

    def _try(self, service: Service) -> None:
        """Reach for a service that has just been published, so that a wrong port is told before anybody needs it."""
        try:
            stream = self.reach(service)
            stream.close_normally()
            stream.close()
            self._runtime.log.info("service %s: something listens at %s", service.name, service.target)
        except Stopping:
            pass
        except (OSError, EOFError) as error:
            reason = say_error(error)
            self._runtime.emit(ServiceUnreachable(service=service.name, target=str(service.target), reason=reason))

    def reach(self, service: Service) -> Stream:
        """A connection to a service that is for no service client.  Raises `OSError`, `EOFError`, and `Stopping`."""
        # Where a PROXY protocol header is waited for, one that says nothing makes less noise than none.
        return self._dial_service(service, self._runtime.stop, False, self._header(service))

    def _serve_idle(self, link: Link, service: Service) -> tuple[str, bool]:
        """Answer on an idle link, and carry connections on it, until it ends in peace; returns why it did, and
        whether it was idle then.

        Raises `OSError`, `EOFError`, `LinkFault`, `TimeoutError` where it is lost while it is idle.
        """
        patience = SILENCE * link.heartbeat
        settled, place = True, RelayPlace(link.sock, self._greeting.beyond)
        while True:
            try:
                frame = link.receive(Deadline(patience), service.stop)
                settled = True
            except Stopping:
                if service.stop is not None and not service.stop.requested:
                    continue  # the service was withdrawn for a moment
                ending = self._runtime.stop.requested
                reason = "the relay client is ending" if ending else "it publishes this service no more"
                down = 0 if ending else WITHDRAWN_TIME * bool(service.down)
                reason = service.down if down else reason
                self._say_bye(link, service, Deadline(BYE_TIMEOUT if settled else None), reason=reason, down=down)
                return reason, not down
            except TimeoutError:
                if settled:
                    raise
                self._leave_to_server(link, service)
                return "no PING in time after its connection", False
            if frame.kind == PING:
                self._greeting.keep_nonces(frame)
                link.send_now(PONG)
                self._doubts.settle(link)
            elif frame.kind == START:
                if not self._serve(link, frame, service, place):
                    return "its connection was broken off", False
                if link.spent:
                    self._leave_to_server(link, service)
                    return link.spent, False
                settled = False
                self._doubts.settle(link, False)
            elif frame.kind == BYE:
                return "the relay server said BYE", frame.fields.get("again") is not True
            else:
                raise refused(frame)

    def _leave_to_server(self, link: Link, service: Service) -> None:
        """Give up a link after a connection, however long that takes; it no longer counts as idle.

        The server may still be passing bytes on to a slow reader, and has nothing to say meanwhile: it
        alone can close this link without losing them.
        """
        self._stock.shift(service, idle=-1)
        try:
            self._say_bye(link, service, Deadline(None), idle=0)
        finally:
            self._stock.shift(service, idle=1)

    def _say_bye(
        self, link: Link, service: Service, deadline: Deadline, idle: int = 1, reason: str = "", down: int = 0
    ) -> None:
        """Give a link up, and wait for the server to close it: a START that crosses BYE is still served.  The service
        is `down`, which holds for so many seconds; 0 where it is not."""
        cut, fields = self._runtime.cut, {"reason": shown(reason, 400)} if reason else {}
        try:
            out = bytearray(link.pack_control(BYE, fields | {"down": down} if down else fields))
            while not link.stream.send_now(out):
                wait_for(link.fd, select.POLLOUT, deadline, cut)
            while (frame := link.receive(deadline, cut)).kind != START:
                pass
            self._serve(link, frame, service, RelayPlace(link.sock, self._greeting.beyond), idle)
        except (OSError, EOFError):
            pass  # the server has closed it, as BYE asks it to

    # A connection

    def _serve(self, link: Link, start: Frame, service: Service, place: RelayPlace, idle: int = 1) -> bool:
        """Connect a started link, which leads to that place and counts as so many `idle` ones, to the service; True
        where it is idle again afterwards."""
        record = {"id": shown(start.text("id"), 32), "service": service.name, "peer": shown(start.text("client"), 64)}
        began = time.monotonic()
        self._stock.use(service, int(start.number("waiting", 0, 1e6)), idle)
        try:
            # START was read late: its service client has been refused, and must not be served now.  And from here on it
            # is no idle link, which could be given up.
            if self._doubts.leave(link) or is_lost(link):
                raise EOFError(LOST_BEFORE)
            port = shown(start.text("port"), 64)
            times = self._own.times(record["peer"], port) if place.shares(port) else 0
            way, agreed = Way(place, port, times), start.text("alpn")
            if stream := self._dial(service, link, record, began, way, agreed):
                held = self._own.hold(*way.ends, times) if place.may_return(*way.ends) else None
                del way  # many connections last, and need it no more
                try:
                    self._splice(stream, link, service, record, began, link.pack_control(READY))
                finally:
                    if held:
                        self._own.release(held)
        finally:
            self._stock.shift(service, busy=-1, idle=idle)
        return link.machine.state == IDLE

    def _serve_raw(self, link: RawLink, service: Service) -> str:
        """Carry one connection on a raw link: the first bytes start it.  Raises as `_serve_idle` does."""
        early = bytearray(4096)
        while (count := link.stream.recv_now(memoryview(early))) is None:
            try:
                wait_for(link.fd, select.POLLIN, Deadline(None), service.stop)
            except Stopping:
                return "the relay client is ending, or publishes this service no more"
        if count == 0:
            raise EOFError("the relay closed it")
        record = {"id": connection_id(), "service": service.name, "peer": f"relay {self._relay}"}
        began = time.monotonic()
        if self._doubts.leave(link):
            raise EOFError(LOST_BEFORE)
        self._stock.use(service, waiting=0)
        link.stream.reset_on_close()
        try:
            if stream := self._dial(service, link, record, began):
                self._splice(stream, link, service, record, began, early=bytes(early[:count]))
        finally:
            self._stock.shift(service, idle=1, busy=-1)
        return "its connection is over"

    def _dial(
        self, service: Service, link: AnyLink, record: dict[str, str], began: float, way: Way | None = None,
        agreed: str = "",
    ) -> Stream | None:  # fmt: skip
        """Connect to the service for a link, on which a service client has come that `way`, and has `agreed` with the
        relay server on a protocol.  ``None`` where that cannot be done: which is told, and the server too.  Raises
        `OSError` where the link is lost over that."""
        try:
            if way and way.times >= len(self._stock.services) * len(self._runtime.options.relays):
                raise ConnectionError(LOOP)
            header = self._header(service, record["peer"], way.port if way else "")
            is_far = self._greeting.beyond is not None or not is_near(link.sock)  # a near proxy says nothing of that
            stream = self._dial_service(service, self._runtime.cut, is_far, header, agreed)
            if way:
                way.ends = ends_of(stream.sock)
                if way.place.is_at(way.ends[1], way.port):
                    stream.close()
                    raise ConnectionError(LOOP)
            return stream
        except (OSError, EOFError) as error:
            reason = f"cannot reach {service.target}: {say_error(error)}"
            took = time.monotonic() - began
            self._runtime.emit(ConnectionFailed(code="unreachable", reason=reason, seconds=took, **record))
            self.told_unreachable(service)
            link.fail(reason, self._runtime.cut)
        return None

    def _header(self, service: Service, client: str = "", port: str = "") -> bytes:
        """What a connection to the service begins with, where it is to be told of its client: a PROXY protocol header,
        with the addresses from which that has come and at which it has connected."""
        version = self._runtime.options.proxy_version(service.name)
        return encode_proxy_header(version, client, port) if version else b""

    def _dial_service(self, service: Service, stop: Stop, little: bool, header: bytes, agreed: str = "") -> Stream:
        """The same, with the header before everything else, and TLS where it is asked for.  Raises `OSError`,
        `EOFError`, and `Stopping`."""
        deadline = Deadline(DIAL_TIMEOUT)
        offer = choose_offer(self._runtime, service, agreed)
        sock = service.dialer.dial(stop, little=little)
        stream = Stream(sock, f"service {service.target}")
        stream.reset_on_close()
        if header:
            try:
                stream.send(header)
            except BaseException:
                sock.close()
                raise
        return stream if offer is None else secure(stream, offer, deadline, stop)

    def _splice(
        self,
        stream: Stream,
        link: AnyLink,
        service: Service,
        record: dict[str, str],
        began: float,
        first: bytes = b"",
        early: bytes = b"",
    ) -> None:
        """Carry a connection between a link and the service, which was dialled from `began` on, and tell its record.

        The link gets what is `first`, and the service what came `early`.
        """
        runtime = self._runtime
        splice = Splice(record["id"], service.name, stream, link, first, record["peer"])
        splice.from_link.carried = len(early)
        runtime.splices.add(splice)
        try:
            took = time.monotonic() - began
            runtime.emit(ConnectionOpened(via=str(service.target), name="", seconds=took, **record))
            try:
                stream.send(early)
            except OSError as error:
                splice.break_off(f"{stream.name}: {say_error(error)}")
            splice.run(runtime.threads)
        finally:
            runtime.splices.remove(splice)
            stream.close()
            runtime.emit(ConnectionClosed(
                bytes_in=splice.from_link.carried, bytes_out=splice.to_link.carried,
                seconds=time.monotonic() - splice.opened, reason=splice.reason, **record,
            ))  # fmt: skip


def is_lost(link: Link) -> bool:
    """Whether the other side has closed or reset a link by now."""
    poller = select.poll()
    poller.register(link.fd, link.END_EVENTS)
    return bool(poller.poll(0))
