"""A relay client's links while no service client uses them.

    serve        one thread each, from accept to the pool; then it is parked again
    keeper       one thread; blocks in a selector over all idle links and `Runtime.stop`; hears PONG and BYE, sends
                 PING, closes dead and surplus links, and sweeps over the connections

A link out of the pool is owned by the thread that took it: a service client's, or the keeper while it looks at it.
"""

from __future__ import annotations

import logging
import selectors
import socket
import time
from typing import Any

from ..addresses import show_address
from ..events import ClientDown, ClientUp, LinkDown, LinkRefused, LinkUp
from ..server_options import ServerOptions
from ..protocol import REFUSED, SILENCE, LinkFault
from ..runtime import Runtime
from ..splice import Splice
from ..system import ignore_oserror
from ..tcp import path_is_dead
from ..text import say_error, shown
from ..waiting import Deadline
from ..watch import in_batches
from .clients import GONE, NOBODY, NoLinkHere, Refusal, make_stream
from .greeting import Greeting, lost_right, renew_rights
from .intake import Intake
from .limits import TOO_MANY_HANDSHAKES, Handshakes, Quotas
from .nonces import Nonces
from .pool import Pool
from .pooled import PooledLink
from .proxies import Proxies, Unsaid

SILENT = "acknowledges nothing"
"""Why a relay client is suspected whose host has not acknowledged a START."""
REVOKE_TIMEOUT = 10.0
"""Seconds that what has lost its right is waited for; a thread that sends looks up within one."""
SURPLUS_TIME = 60.0
"""Seconds after which an idle link beyond what its client asked for is retired."""


class Links:
    """Takes links in, keeps them while they are idle, and closes them.

    Parameters: the runtime, the pool, where connections come from, the handshakes under way, the nonces that are handed
    out, and how many links and connections each identity has.
    """

    PING_NONCES = 2
    """So many are handed out with a PING, where there is a token: a relay client has fresh ones at any time, then."""

    def __init__(
        self, runtime: Runtime[ServerOptions], pool: Pool, intake: Intake, handshakes: Handshakes, nonces: Nonces,
        links: Quotas, connections: Quotas,
    ) -> None:  # fmt: skip
        self._runtime = runtime
        self._pool = pool
        self._intake = intake
        self._handshakes = handshakes
        self._proxies = Proxies(runtime, handshakes, intake.refuses)
        self.keeper = runtime.own_thread(self._keep, "keeper", runtime.cut)
        """The thread that keeps what is idle; it lives as long as the server."""
        self._nonces = nonces
        self._quota = links
        self._connections = connections
        self._greeting = Greeting(runtime, intake, handshakes, nonces, self._join, self._forget)

    def start(self) -> None:
        """Begin to keep what is idle."""
        self._pool.selector.register(self._runtime.stop.fileno(), selectors.EVENT_READ)
        self.keeper.start()

    def serve(self, sock: socket.socket, address: Any) -> None:
        """A relay client's connection from accept to the pool; the top of its thread."""
        stream, pooled, credentials, origin = None, None, self._runtime.credentials, address
        try:
            origin, count = self._proxies.origin("", sock, address)
            if count and (reason := self._intake.refuses("", origin)):
                self._proxies.judge(reason, address, origin)
            stream = make_stream(sock, f"link with {show_address(origin)}", origin, credentials.links)
            stream.received = count
            self._handshakes.enter(stream)
            pooled = self._greeting.receive(stream, credentials)
        except Unsaid as error:
            self._runtime.log.debug("link from %s did not come about: %s", show_address(address), error)
        except Refusal as error:
            self._runtime.emit(LinkRefused(peer=show_address(origin), code=error.code, reason=str(error)))
        finally:
            if stream is not None:
                self._handshakes.leave(stream)
            if pooled is None:
                (stream or sock).close()
                self._intake.leave("", address)
        if pooled is not None:
            pooled.address = address  # by which it was counted in
            self.give_back(pooled)

    def _join(self, pooled: PooledLink) -> None:
        """Count a link in, before its client is told WELCOME.  Raises `Refusal`."""
        if not self._handshakes.leave(pooled.link.stream):
            raise Refusal(TOO_MANY_HANDSHAKES, "lost")
        identity = pooled.identity
        if identity and not self._quota.enter(identity.name, identity.max_links):
            raise Refusal(f"{identity.name} has as many links as it may have (max-links)", "quota")
        try:
            first = self._pool.join(pooled)
        except Refusal:
            if identity:
                self._quota.leave(identity.name)
            raise
        where = {"service": pooled.service, "client": pooled.client}
        try:
            if pooled.is_doubtful or pooled.moved:  # before anybody hears that it is there again
                why = "has slept or moved" if pooled.is_doubtful else f"comes from {pooled.host} now"
                self.suspect(pooled.client, why)
                self._intake.suspect(pooled.client, why)
            if first:
                self._runtime.emit(ClientUp(name=pooled.name, peer=pooled.host, **where))
            self._intake.note_back(pooled.service, pooled.client)
            self._runtime.emit(LinkUp(peer=pooled.peer, **where))
        except BaseException as error:
            self._forget(pooled, say_error(error))
            raise

    def _forget(self, pooled: PooledLink, reason: str) -> None:
        """Count a link out, and tell that it is down."""
        if pooled.identity:
            self._quota.leave(pooled.identity.name)
        last = self._pool.leave(pooled)
        where = {"service": pooled.service, "client": pooled.client, "reason": reason}
        self._runtime.emit(LinkDown(peer=pooled.peer, **where))
        if last:
            self._runtime.emit(ClientDown(name=pooled.name, peer=pooled.host, **where))

    # For the owner of a link

    def give_back(self, pooled: PooledLink, readable: bool = False) -> None:
        """Hear what has come in on an idle link, and put it into the pool; or close it, where it has ended.

        A frame can be in the link's own buffer already, where the keeper's selector does not see it: BYE right behind
        END.  What is in its socket the keeper hears later, unless a service client waits for a link and gets it at
        once.
        """
        link = pooled.link
        self._uncount(pooled)
        try:
            if pooled.blocked:
                pooled.flush()
            ask = readable or self._pool.has_waiting(pooled.service)
            while (frame := link.receive_now() if ask else link.receive_held()) is not None:
                if frame.kind == REFUSED:
                    raise EOFError(f"the relay client gave it up: {shown(frame.text('reason'))}")
                pooled.take(frame)
            kept = self._pool.put(pooled)
        except LinkFault as error:
            link.refuse("protocol", str(error))
            self.drop(pooled, str(error))
        except (OSError, EOFError) as error:
            self.drop(pooled, pooled.farewell if link.leaving else say_error(error))
        except BaseException:
            self.drop(pooled, "unexpected error")
            raise
        else:
            if kept:
                self._intake.offer(pooled.service)
            elif pooled.revoked:
                self._say_revoked(pooled)
            elif link.leaving and pooled.down:
                self._intake.withdraw(pooled.service, pooled.client, pooled.down, pooled.farewell)
                self.drop(pooled, pooled.farewell)
            elif link.spent:
                self._retire(pooled, link.spent, again=True)
            else:
                self._retire(pooled, pooled.farewell if link.leaving else "this relay server is ending")

    def count(self, pooled: PooledLink) -> str:
        """Count the connection that a link is about to carry, until the link is given back; returns why that may not
        be."""
        identity = pooled.identity
        if identity is None:
            return ""
        pooled.is_counted = self._connections.enter(identity.name, identity.max_connections)
        return "" if pooled.is_counted else f"{identity.name} has as many connections as it may have (max-connections)"

    def _uncount(self, pooled: PooledLink) -> None:
        if pooled.identity and pooled.is_counted:
            pooled.is_counted = False
            self._connections.leave(pooled.identity.name)

    def ping(self, pooled: PooledLink) -> None:
        """PING on an idle link, and put it back."""
        pooled.last_pinged = time.monotonic()
        pooled.pongs_due += 1
        identity = pooled.identity
        has_token = bool(identity.token if identity else self._runtime.credentials.token)
        count = self.PING_NONCES if has_token else 0
        try:
            pooled.send(pooled.link.pack_ping(self._nonces.hand_out(pooled.client, pooled.host, count)))
        except OSError as error:
            self.drop(pooled, say_error(error))
        else:
            self.give_back(pooled)

    def drop(self, pooled: PooledLink, reason: str, dead: bool = False) -> None:
        """Close a link that is not in the pool.

        A link between connections is closed normally, since bytes of the last one may still be on their way, unless
        it is `dead`; otherwise it is reset.
        """
        link, reason = pooled.link, pooled.revoked or reason
        self._uncount(pooled)
        if link.is_between and not dead:
            link.stream.close_normally()
        link.close()
        self._intake.leave("", pooled.address)
        self._forget(pooled, reason)

    def _retire(self, pooled: PooledLink, reason: str, again: bool = False) -> None:
        """Close an idle link in peace, with BYE where the client has not said it; it may open one `again` at once."""
        if not pooled.link.leaving:
            ignore_oserror(lambda: pooled.send(pooled.link.pack_bye(again)))
        self.drop(pooled, reason)

    # From outside

    def retire_all(self) -> None:
        """Turn waiting service clients away, and close all idle links in peace."""
        for pooled in self._pool.close():
            self._retire(pooled, "this relay server is ending")

    def drop_all(self, links: list[PooledLink]) -> None:
        """Close idle links whose port was given back."""
        for pooled in links:
            pooled.link.refuse("port", GONE)
            self.drop(pooled, GONE)

    def give_up_one(self, service: str) -> None:
        """Close an idle link in peace, because service clients that cannot be passed on wait in another worker."""
        try:
            pooled, _ = self._pool.take(service, NOBODY, Deadline(0), wait=False)
        except (Refusal, NoLinkHere):
            return
        self._retire(pooled, "another worker needs it")

    def revoke(self) -> None:
        """Close what has lost its right by the credentials that are in force now, living connections too, and wait
        until all of it is gone."""
        lost = list[PooledLink]()
        for pooled in self._pool.members():
            if not (reason := lost_right(pooled, self._runtime)):
                renew_rights(pooled, self._runtime)
            else:
                lost.append(pooled)
                pooled.revoked = reason  # before the look at where it is: see `Pool.put` and `carry`
                if self._pool.hold(pooled):
                    self._say_revoked(pooled)
                elif splice := pooled.splice:
                    splice.break_off(reason, hurry=True, close_link=True)
                else:  # between START and its answer
                    pooled.link.stream.abort(hurry=True)
        if (
            lost
            and not self._runtime.threads.is_mine()
            and not self._pool.wait_until_gone(lost, Deadline(REVOKE_TIMEOUT))
        ):
            self._runtime.log.error("links that were revoked are still there")

    def _say_revoked(self, pooled: PooledLink) -> None:
        pooled.link.refuse("rights", pooled.revoked)
        self.drop(pooled, pooled.revoked)

    def carry(self, pooled: PooledLink, splice: Splice | None) -> None:
        """A link begins to carry a connection that has been opened, or has done so."""
        pooled.splice = splice
        if splice and pooled.revoked:
            splice.break_off(pooled.revoked, hurry=True, close_link=True)

    def suspect(self, client: str, why: str) -> None:
        """A relay client may be out of reach: have each of its idle links answer a PING before it is used."""
        doubtful = self._pool.hold_all(client)
        if doubtful:
            self._runtime.log.log(
                logging.WARNING if why == SILENT else logging.INFO,
                "relay client %s at %s %s: its %d idle links are not used before they answer",
                doubtful[0].name, doubtful[0].host, why, len(doubtful),
            )  # fmt: skip
        for pooled in doubtful:
            pooled.unproven = True
            self.ping(pooled)

    # The keeper

    def _keep(self) -> None:
        """Watch idle links, and every so often look at the time, until `Runtime.cut` is requested."""
        runtime, selector = self._runtime, self._pool.selector
        splices = runtime.splices
        interval = min(splices.interval, runtime.options.heartbeat / 5)
        next_look = time.monotonic() + interval
        while not runtime.stop.requested:
            for key, _ in selector.select(max(0.0, next_look - time.monotonic())):
                if key.data is not None and self._pool.hold(key.data):
                    self.give_back(key.data, readable=True)
            runtime.pulse.keep("keeper")
            if time.monotonic() >= next_look:
                splices.sweep()
                runtime.emit.tell_floods()
                for batch in in_batches(self._pool.idle_links()):
                    for pooled in batch:
                        self._look_after(pooled, interval)
                next_look = time.monotonic() + interval
        while not runtime.cut.requested:  # while connections drain, their time-outs still count
            runtime.pulse.keep("keeper")
            runtime.cut.wait(splices.interval)
            splices.sweep()

    def _look_after(self, pooled: PooledLink, interval: float) -> None:
        """Close an idle link that is dead or surplus, and PING it when it is time: by the next look, `interval`
        seconds from now, it would be too late."""
        if not pooled.link.speaks:
            return
        now, heartbeat = time.monotonic() + interval, self._runtime.options.heartbeat
        dead = now - pooled.last_heard > SILENCE * heartbeat
        due = not pooled.blocked and now - max(pooled.last_pinged, pooled.last_heard) > heartbeat
        if pooled.settling:  # silence says nothing: it may have to wait for a slow service before it reads on
            dead, due = path_is_dead(pooled.link.sock, self._runtime.options.dead_path), False
        unused = now - pooled.last_used >= SURPLUS_TIME and not pooled.settling
        surplus = unused and self._pool.has_surplus(pooled)
        if not (dead or due or surplus) or not self._pool.hold(pooled):
            return
        if dead and pooled.settling:
            self.drop(pooled, "sent bytes are no longer acknowledged", dead=True)
        elif dead:
            self.drop(pooled, f"silent for {SILENCE * heartbeat:g} s", dead=True)
        elif surplus:
            self._retire(pooled, "surplus")
        else:
            self.ping(pooled)
