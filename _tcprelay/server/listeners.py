"""The ports of a relay server, and what each address may have of them.

One thread accepts; the thread that serves a connection tells `Shares` when it is gone.
"""

from __future__ import annotations

import errno
import functools
import math
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ..addresses import Endpoint, host_of, is_among, show_address
from ..events import AcceptPaused, ConnectionFailed, LinkRefused, Listening
from ..server_options import ServerOptions
from ..protocol import REFUSED, encode_frame
from ..runtime import Runtime
from ..sockets import listen
from ..streams import Stream
from ..system import ignore_oserror
from ..text import connection_id, say_error
from ..tls import ACCESS_DENIED
from ..waiting import Bell, Stopping, Wakes
from .access import Access
from .clients import Refusal
from .limits import Shares

LOOK_FOR_ROOM = 0.002
"""Seconds from one look to the next whether the queue of a service has room again, while the kernel holds new
connections."""

FIRST_PAUSE = 0.005
"""Seconds for which none is accepted after an error; after the next one twice as many, up to one."""

HINTS = {
    errno.EACCES: "; a port below 1024 needs CAP_NET_BIND_SERVICE (systemd: AmbientCapabilities=): take a higher one",
    errno.EADDRINUSE: "; another program has it, or another tcprelays",
    errno.EADDRNOTAVAIL: "; this host does not have that address",
}
"""What to do where a port cannot be listened on."""


class Listeners:
    """The listening sockets, and the counts of what each address has.

    Parameters: the runtime; whether a service is full, so that new connections are left to the kernel for a moment; and
    what is done with a connection: its service ("" for the relay port), socket and address.  That may raise `OSError`,
    `RuntimeError` and `MemoryError`, where the connection cannot be taken; then it is reset.
    """

    def __init__(
        self,
        runtime: Runtime[ServerOptions],
        is_full: Callable[[str], bool] = lambda service: False,
        hand_on: Callable[[str, socket.socket, Any], None] = lambda service, sock, address: sock.close(),
    ) -> None:
        self._runtime = runtime
        self.is_full = is_full
        self.hand_on = hand_on
        self.services: dict[socket.socket, str] = {}
        """Of each listener; "" for the relay port."""
        self.addresses: dict[str, tuple[str, int]] = {}
        """Of each service, and of the relay port under "": the first of several."""
        self._selector: selectors.BaseSelector
        self._watched: set[socket.socket] = set()
        """Those that are accepted from now."""
        self._resume_at = 0.0
        """When to accept again, after an error; 0 while nothing is wrong."""
        self._pause, self._told = FIRST_PAUSE, 0.0
        self._arrived: deque[tuple[socket.socket, str]] = deque()
        """Listeners that are to be looked after, from whichever thread."""
        self._is_closed = False
        self.bell: Bell | None = None
        """Wakes the thread that accepts."""
        self.of_clients, self.of_links = Shares(0), Shares(0)
        self.set_shares()
        self.access = Access()
        """Who may connect; replaced at a reload, in whichever thread that is."""

    def set_shares(self) -> None:
        """Have what the options say count from now on."""
        options = self._runtime.options
        self.of_clients.set(options.max_per_address, options.accept_proxy_protocol)
        self.of_links.set(options.max_links_per_address, options.accept_proxy_protocol)

    def bind(self, signals: Wakes | None) -> None:
        """Listen on all ports.  Raises `OSError` that names the address, and `Stopping` at a signal."""
        options = self._runtime.options
        wanted = [("", options.hostname, options.relay_port or 0)]
        wanted += [(service.name, service.host or options.hostname, service.port) for service in options.services]
        for name, host, port in wanted:
            try:
                self.services.update(dict.fromkeys(listen(host, port, signals, self._runtime.probing), name))
            except Stopping:
                raise
            except OSError as error:
                where = Endpoint(host or "*", port)
                hint = HINTS.get(error.errno or 0, "")
                raise OSError(error.errno, f"cannot listen on {where}: {say_error(error)}{hint}") from error
        for listener, name in self.services.items():
            address = listener.getsockname()
            self.addresses.setdefault(name, (host_of(address), address[1]))
            self._runtime.emit(Listening(service=name, address=show_address(address)))

    def add(self, service: str, listeners: list[socket.socket]) -> None:
        """Accept from these, too, for a service that there was not before; any thread."""
        address = listeners[0].getsockname()
        self.addresses[service] = host_of(address), address[1]
        self._arrived.extend((listener, service) for listener in listeners)
        if self._is_closed:
            self.close()
            return
        if self.bell is not None:
            self.bell.ring()

    def remove(self, service: str) -> None:
        """Listen no more for such a service; in the thread that accepts."""
        self._admit()
        for listener in [listener for listener, name in self.services.items() if name == service]:
            del self.services[listener]
            if listener in self._watched:
                self._watched.discard(listener)
                self._selector.unregister(listener)
            listener.close()
        self.addresses.pop(service, None)

    def _admit(self) -> None:
        while self._arrived:
            self.services.update([self._arrived.popleft()])

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Accept when this selector says so: the data of its keys are what to call then.  See `look`, too."""
        self._selector = selector
        self._watched.clear()
        self._resume_at, self._pause = 0.0, FIRST_PAUSE
        self.look()

    def look(self) -> float:
        """Accept from the listeners where that is possible now: not from those of full services, and from none for a
        moment after an error.  Returns the seconds after which this is to be called again."""
        self._admit()
        now = time.monotonic()
        if now < self._resume_at:
            return self._resume_at - now
        for listener, service in self.services.items():
            if listener not in self._watched and not self.is_full(service):
                self._selector.register(listener, selectors.EVENT_READ, functools.partial(self._accept, listener))
                self._watched.add(listener)
        return LOOK_FOR_ROOM if len(self._watched) < len(self.services) else math.inf

    def ignore(self, seconds: float = math.inf) -> None:
        """Accept from none of them for so many seconds."""
        for listener in self._watched:
            self._selector.unregister(listener)
        self._watched.clear()
        self._resume_at = time.monotonic() + seconds

    def close(self) -> None:
        self._is_closed = True
        self._admit()
        for listener in self.services:
            listener.close()

    def forget(self) -> None:
        """In a worker: these are its parent's, and so are the ports that relay clients have asked for; the worker hears
        of those that it needs."""
        names = {service.name for service in self._runtime.options.services} | {""}
        self.close()
        for service in [service for service in self.addresses if service not in names]:
            del self.addresses[service]

    def _accept(self, listener: socket.socket) -> None:
        if listener not in self._watched:
            return  # ignored, or gone, since this round of events has begun
        try:
            self.accept(listener)
            self._pause = FIRST_PAUSE
            if self.is_full(self.services[listener]):
                self._selector.unregister(listener)
                self._watched.discard(listener)
        except (OSError, RuntimeError, MemoryError) as error:
            # Out of descriptors, memory or threads: the connection stays queued, or is reset.
            if time.monotonic() - self._told >= 1.0:
                self._told = time.monotonic()
                self._runtime.emit(AcceptPaused(reason=say_error(error)))
            self.ignore(self._pause)
            self._pause = min(2 * self._pause, 1.0)

    def share(self, service: str) -> Shares:
        """What counts the connections to this service, or to the relay port, by address."""
        return self.of_clients if service else self.of_links

    def accept(self, listener: socket.socket) -> None:
        """Take what has connected, and hand it on.  Raises `OSError` and `RuntimeError` where that cannot be done."""
        service = self.services[listener]
        share, proxies = self.share(service), self._runtime.options.accept_proxy_protocol
        for _ in range(64):  # then look at the other listeners
            if self.is_full(service):
                return
            try:
                sock, address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            counted = False
            try:
                if not is_among(address, proxies) and (reason := self.access.refuses(service, address)):
                    self._turn_away(service, sock, address, Refusal(reason, "address"))
                    continue
                sock.setblocking(True)  # whatever default a program has set, or the listener handed down
                if not service:  # of service clients those that last: see `Splices`
                    self._runtime.probing.spread(sock)
                counted = share.enter(address)
                if counted:
                    self.hand_on(service, sock, address)
                else:
                    self._turn_away(service, sock, address, TOO_MANY_CLIENTS if service else TOO_MANY_LINKS)
            except BaseException:
                if counted:
                    share.leave(address)
                sock.close()
                raise

    def _turn_away(self, service: str, sock: socket.socket, address: Any, refusal: Refusal) -> None:
        """Close what an address may not have, at all or any more; a relay client is told why, as far as it can be
        without waiting for it: over TLS by an alert, which has no words."""
        runtime, peer, reason = self._runtime, show_address(address), str(refusal)
        if service:
            sock.close()
            record = {"id": connection_id(), "service": service, "peer": peer, "code": refusal.code, "reason": reason}
            runtime.emit(ConnectionFailed(seconds=0.0, **record))
            return
        word = b""
        if runtime.credentials.links is not None:
            word = ACCESS_DENIED if refusal.code == "address" else b""
        elif runtime.options.wire == "v1":
            word = encode_refused(refusal.code, reason)
        if word:
            stream = Stream(sock, f"link with {peer}", address)
            ignore_oserror(stream.send_now, bytearray(word))
            stream.close_normally()
        sock.close()
        runtime.emit(LinkRefused(peer=peer, code=refusal.code, reason=reason))


@functools.lru_cache(maxsize=16)
def encode_refused(code: str, reason: str) -> bytes:
    """A REFUSED, made once for each reason: strangers may come by the thousand."""
    return encode_frame(REFUSED, {"code": code, "reason": reason})


TOO_MANY_CLIENTS = Refusal("too many connections from its address at once (--max-per-address)", "limit")
TOO_MANY_LINKS = Refusal("there are too many links from its address (--max-links-per-address)", "limit")
