"""A service client from accept to its closing record: paired with a link, started on it, and spliced.

serve          the top of its thread, which from `Pool.take` on owns the link as well
  Proxies.introduce  the header of a proxy, where one is believed
  _shake_hands     TLS, where the service port speaks it
  _find_link       one idle link after another, until a service answers:
    _start             START, the first bytes … READY or FAIL; alone on the link, in both directions
  _carry           `Splice.run`; then the link goes back to the pool
"""

from __future__ import annotations

import math
import select

from ..addresses import show_own
from ..events import ConnectionClosed, ConnectionFailed, ConnectionOpened
from ..link import Link, RawLink
from ..server_options import ServerOptions
from ..protocol import FAIL, PROXY, READY, REFUSED, START, guess_protocol
from ..runtime import Runtime
from ..splice import Splice
from ..tcp import is_resent, path_is_dead, unsent_bytes
from ..text import say_error, shown
from ..waiting import Deadline, Stopping, wait_for
from .clients import TOO_MANY_CONNECTIONS, UNTRUSTED, NoLinkHere, Refusal, ServiceClient, Unacknowledged
from .greeting import HANDSHAKE_STEP
from .intake import Intake
from .leases import name_in
from .limits import TOO_MANY_HANDSHAKES, Handshakes
from .links import SILENT, Links
from .pool import Pool
from .pooled import PooledLink
from .proxies import Proxies, Unsaid
from .trust import explain_service_tls

SUSPICION = 3.0
"""Seconds without any acknowledgement of START after which its relay client's idle links are to be proven alive, where
the kernel has sent it again by then: on a slow path an acknowledgement takes longer."""


class Pairing:
    """Serves service clients.

    Parameters: the runtime, the pool, where connections come from, the TLS handshakes under way on service ports, and
    the links.
    """

    def __init__(
        self, runtime: Runtime[ServerOptions], pool: Pool, intake: Intake, handshakes: Handshakes, links: Links
    ) -> None:
        self._runtime = runtime
        self._pool = pool
        self._intake = intake
        self._handshakes = handshakes
        self._proxies = Proxies(runtime, handshakes, intake.refuses)
        self._links = links

    def serve(self, client: ServiceClient) -> None:
        """A service client's connection, up to its end; the top of its thread."""
        places, refusal = self._runtime.places, TOO_MANY_CONNECTIONS
        admitted = places.enter()
        try:
            if admitted:
                self._proxies.introduce(client)
                self._shake_hands(client)
                self._intake.arrive(client)
                self._carry(client, self._find_link(client))
                return
            self._proxies.glance_at(client)
        except NoLinkHere:
            return  # this process's descriptor is closed; the parent has another
        except Unsaid as error:
            self._note_check(client, str(error))
            return
        except Refusal as error:
            refusal = error.apart()
        finally:
            self._intake.settle(client)
            client.stream.close()
            if not client.passed_on:
                self._intake.leave(client.service, client.address)
            if admitted:
                places.leave()
        if client.was_check:
            self._note_check(client, str(refusal))
            return
        why = {"code": refusal.code, "reason": str(refusal)}
        self._runtime.emit(ConnectionFailed(seconds=client.seconds, **why, **client.record))

    def _note_check(self, client: ServiceClient, reason: str) -> None:
        self._runtime.log.debug("service %s: connection from %s did not last: %s", client.service, client.peer, reason)

    def _shake_hands(self, client: ServiceClient) -> None:
        """TLS with a service client, where its port speaks it.  Raises `Refusal`."""
        if not client.stream.secure:
            return
        reason, code = "", "tls"
        self._handshakes.enter(client.stream)
        try:
            client.stream.handshake(Deadline(HANDSHAKE_STEP), self._runtime.stop)
        except (OSError, EOFError) as error:
            forged = client.is_wary and guess_protocol(client.stream.beginning) == PROXY
            reason = UNTRUSTED if forged else explain_service_tls(error)
        finally:
            if not self._handshakes.leave(client.stream):
                reason, code = TOO_MANY_HANDSHAKES, "limit"
        if reason:
            raise Refusal(f"no TLS handshake: {reason}", code)

    def _find_link(self, client: ServiceClient) -> PooledLink:
        """Offer the service client to one idle link after another until a service answers.  Raises `Refusal`."""
        patience = self._runtime.options.pair_timeout
        deadline, again = Deadline(max(0.0, patience - client.waited)), False
        while True:
            pooled, waited = self._take(client, deadline, again)
            again = True
            link = pooled.link
            self._intake.settle(client)
            pooled.use()
            try:
                client.look(waited or client.queued or not link.speaks)
            except Refusal:
                self._links.give_back(pooled)
                raise
            if reason := self._links.count(pooled):
                self._links.give_back(pooled)
                client.reason = reason
                client.failed |= {pooled.client}
                continue
            try:
                if isinstance(link, RawLink):
                    link.stream.send(client.early)
                    return pooled
                reason = self._start(pooled, link, client, deadline)
            except (OSError, EOFError) as error:
                unanswered = f"no answer from the service within {patience:g} s{say_received(pooled)}"
                self._links.drop(pooled, say_error(error))
                if isinstance(error, Unacknowledged):
                    continue
                if isinstance(error, TimeoutError):
                    raise Refusal(unanswered, "unanswered") from error
                if (client.early and client.exposed) or isinstance(error, Stopping):
                    # Bytes that may have arrived are never delivered twice.
                    lost = f"the link was lost before the service answered: {say_error(error)}"
                    raise Refusal(lost, "draining" if isinstance(error, Stopping) else "lost") from error
                continue
            except BaseException:
                self._links.drop(pooled, "unexpected error")
                raise
            pooled.hear()
            if reason or pooled.member.problem:
                self._note_answer(pooled, reason)
            if not reason:
                return pooled
            self._links.give_back(pooled)
            if client.gone:
                raise Refusal(client.gone, client.fault)
            client.reason = reason
            client.failed |= {pooled.client}

    def _note_answer(self, pooled: PooledLink, reason: str) -> None:
        """Tell that a relay client cannot reach its service, once until it can: its service clients are served by
        others, and nothing else here shows it."""
        if self._pool.note_answer(pooled, reason):
            self._runtime.log.warning(
                "service %s: relay client %s at %s cannot serve: %s", pooled.service, pooled.name, pooled.host, reason
            )

    def _take(self, client: ServiceClient, deadline: Deadline, first: bool) -> tuple[PooledLink, bool]:
        """As `Pool.take`, unless another process has a link: raises `NoLinkHere`."""
        wanted = client.service, client.failed, deadline, client.reason
        try:
            return self._pool.take(*wanted, wait=False)
        except NoLinkHere:
            self._intake.pass_on(client)
            self._intake.note_unserved(client)
        return self._pool.take(*wanted, first=first)

    def _start(self, pooled: PooledLink, link: Link, client: ServiceClient, deadline: Deadline) -> str:
        """START a connection on a link, with what the client has sent and goes on to send; wait for the answer.

        Returns why the service could not be reached, "" when it answered.  Nothing here can block beyond the
        deadline.  Raises `TimeoutError`, `Stopping`, `EOFError`, `LinkFault`, `OSError`: the link is lost.
        """
        cut, stream = self._runtime.cut, link.stream
        fields = {"id": client.id, "client": client.peer, "port": show_own(client.stream.sock),
                  "waiting": self._intake.count_waiting(client.service)}  # fmt: skip
        if client.stream.protocol:
            fields["alpn"] = client.stream.protocol
        out = bytearray(link.pack_control(START, fields))
        client.pass_early(link, out, 0)
        ready: dict[int, int] = {}
        trust, suspicion = True, Deadline(SUSPICION)
        client.exposed = stream.secure  # which may fail after it has sent some
        while True:
            sent = stream.send_now(out)
            client.exposed = True
            frame = link.receive_now() if link.fd in ready else link.receive_held()
            if frame is not None and frame.kind in (READY, FAIL):
                break
            if frame is not None and frame.kind == REFUSED:
                raise EOFError(f"the relay client gave it up: {shown(frame.text('reason'))}")
            if frame is not None:
                pooled.take(frame)
                continue
            if sent and client.may_send_more and (client.stream.fd in ready or client.may_hold_more):
                before = len(client.early)
                client.read_early()
                client.pass_early(link, out, before)
                if out:
                    continue
            poller = select.poll()
            poller.register(link.fd, select.POLLIN | (0 if sent else select.POLLOUT))
            poller.register(cut.fileno(), select.POLLIN)
            if sent and client.may_send_more:
                poller.register(client.stream.fd, select.POLLIN)
            left = min(deadline.remaining() or 0.0, suspicion.remaining() or 0.0 if trust else math.inf)
            ready = dict(poller.poll(left * 1000))
            if trust and suspicion.remaining() == 0:
                trust = False
                self._suspect(pooled, client)
            if not ready and deadline.remaining() == 0:
                raise TimeoutError("timed out")
            if cut.fileno() in ready:
                raise Stopping("the relay server is ending")
        if frame.kind == FAIL:
            out += link.pack_end()
        while not stream.send_now(out):
            wait_for(link.fd, select.POLLOUT, deadline, cut)
        return "" if frame.kind == READY else shown(frame.text("reason"), 240) or "no reason given"

    def _suspect(self, pooled: PooledLink, client: ServiceClient) -> None:
        """START has had no answer for a while: where it was not even acknowledged, its relay client may be out of
        reach.

        Raises `Unacknowledged` where another link is to be tried instead.
        """
        sock = pooled.link.sock
        if path_is_dead(sock, SUSPICION) and is_resent(sock):
            self._links.suspect(pooled.client, SILENT)
            self._intake.suspect(pooled.client, SILENT)
            if not client.early:
                raise Unacknowledged("START is not acknowledged")

    def _carry(self, client: ServiceClient, pooled: PooledLink) -> None:
        """Carry a connection whose service has answered, tell its record, and give the link back."""
        runtime, link = self._runtime, pooled.link
        splice = Splice(client.id, client.service, client.stream, link, peer=client.peer, name=pooled.known_as)
        rates = runtime.options.rate_of(name_in(client.service)), pooled.identity.limit_rate if pooled.identity else 0
        if any(rates):
            splice.limit_rate(min(filter(None, rates)))
        splice.to_link.carried = len(client.early)
        splice.to_link.done = link.has_ended
        splice.said_end = link.has_ended and client.ended
        if client.gone:
            splice.break_off(client.gone)
        client.early = bytearray()
        runtime.splices.add(splice)
        self._links.carry(pooled, splice)
        try:
            runtime.emit(ConnectionOpened(
                via=f"{pooled.name} at {pooled.host}", name=pooled.name, seconds=client.seconds, **client.record
            ))  # fmt: skip
            splice.run(runtime.threads)
        finally:
            runtime.splices.remove(splice)
            self._links.carry(pooled, None)
            pooled.carried.add(splice)
            pooled.carried.broken += bool(splice.reason)
            closed = ConnectionClosed(
                bytes_in=splice.to_link.carried, bytes_out=splice.from_link.carried, seconds=client.seconds,
                reason=splice.reason, **client.record,
            )  # fmt: skip
            client.stream.close()
            if not link.is_idle:
                broken = f"its connection was broken off: {splice.reason}"
                self._links.drop(pooled, broken if splice.reason else "its connection is over")
            else:
                pooled.use()
                pooled.hear()
                if link.passed < splice.to_link.carried or splice.reason:
                    pooled.unproven = pooled.settling = True
                    self._links.ping(pooled)
                else:
                    self._links.give_back(pooled)
            runtime.emit(closed)


def say_received(pooled: PooledLink) -> str:
    """For the log, where a link brought no answer: an answer that is too large for the path never arrives."""
    if unsent_bytes(pooled.link.sock):
        return "; the relay client's host does not acknowledge what was sent to it"
    return "; the relay client's host has received the request: is tcprelayc stopped there, or the path too narrow?"
