"""Ports on demand: which relay client has been given which port, and for how long.

A relay client asks for a port when it opens a link, for a certain one or for any.  What it gets is a service of its
own, whose key is its name and its port, ``web@20001``; no service that a server has by itself has such a name.  The
port is listened on while there are links of the service, and for `--port-lease` beyond, so that the relay client gets
the same one again after a break.

Who asks for a certain port shares it with others of the same identity and service name.  Who asks for any has one of
its own: all its links, in whichever of its processes, and later a relay client of the same name, from the same host,
that comes in its place.

Used by the process that listens: the threads of handshakes ask, and the one that accepts gives ports back.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..addresses import host_of, is_ipv6, show_address
from ..events import Listening
from ..protocol import Frame, LinkFault
from ..runtime import Runtime
from ..server_options import ServerOptions
from ..sockets import listen
from ..text import say_error
from ..values import PortRange
from .clients import Refusal
from .listeners import Listeners

MOST_LEASES = 1024
"""Ports that are given out at once, at most."""
MARK = "@"
"""Between the name and the port in a key; no service's name has it (see `values.parse_name`)."""


def name_in(key: str) -> str:
    """The name of a service, without the port that it was given."""
    return key.partition(MARK)[0]


def asked_port(hello: Frame) -> int | None:
    """The port that a HELLO asks for, 0 being any; ``None`` for none.  Raises `LinkFault`."""
    return int(hello.number("service_port", 0, 1e6)) if "service_port" in hello.fields else None


def is_among(port: int, ports: tuple[PortRange, ...]) -> bool:
    return any(port in one for one in ports)


def say_ports(ports: tuple[PortRange, ...]) -> str:
    return ", ".join(map(str, ports))


@dataclass(frozen=True)
class Ask:
    """What a relay client asks for."""

    name: str
    """Of its service."""
    port: int
    """0 is any."""
    had: int
    """Which it had before, where it asks for any; 0 is none."""
    client: str
    """Its id."""
    called: str
    """The name that it gives."""
    owner: str
    """The identity that it has proven; "" where all who may come are one."""
    host: str
    """Where it has come from."""

    @classmethod
    def read(cls, hello: Frame, name: str, client: str, owner: str, host: str) -> Ask | None:
        """What stands in HELLO; ``None`` where no port is asked for.  Raises `LinkFault`."""
        port, had = asked_port(hello), int(hello.number("had_port", 0, 1e6))
        if port is None:
            return None
        if max(port, had) > 65535:
            raise LinkFault("HELLO: there is no such port")
        return cls(name, port, had, client, hello.text("name")[:64], owner, host)


@dataclass
class Lease:
    """A port that is given out."""

    key: str
    port: int
    ask: Ask
    seen: float
    """When there was a link of it last, or it was asked for."""
    revoked: bool = False
    """It goes as soon as there is no link."""
    is_fresh: bool = True
    """Nobody has been told of it yet."""
    was_used: bool = False
    """There have been links of it."""


class Leases:
    """The ports that are given out.

    Parameters: the runtime; the listeners; whether there are links of a service; and what is called with a key and its
    address before its port is listened on, and with the key when it is given back.
    """

    LOOK = 1.0
    """Seconds from one look to the next whether one is over."""
    UNUSED = 10.0
    """Seconds after which one is over of which there never was a link: who had asked for it was refused in the end."""

    def __init__(
        self, runtime: Runtime[ServerOptions], listeners: Listeners, has_client: Callable[[str], bool],
        begin: Callable[[str, tuple[str, int]], object], over: Callable[[str], object],
    ) -> None:  # fmt: skip
        self._runtime = runtime
        self._listeners = listeners
        self._has_client = has_client
        self._begin = begin
        self._over = over
        self._lock = threading.Lock()  # over the next; the pool's, and what tells the workers, are taken under it
        self._leases: dict[int, Lease] = {}  # by port
        self._next_look = 0.0

    @property
    def may_be_given(self) -> bool:
        """Whether relay clients may ask for ports at all, or have some still."""
        return bool(self._leases or self._runtime.options.client_ports or self._runtime.credentials.rights)

    def ask(self, ask: Ask) -> str:
        """Give a port; returns the key of its service.  Raises `Refusal`."""
        ports = self._ports_of(ask.owner)
        if not ports:
            raise Refusal("this relay server gives no ports to relay clients (--client-ports)", "rights")
        if ask.port and not is_among(ask.port, ports):
            said = say_ports(ports)
            raise Refusal(f"port {ask.port} is not among those that relay clients may ask for: {said}", "rights")
        with self._lock:
            lease = self._certain(ask) if ask.port else self._any(ask, ports)
            fresh, lease.is_fresh, lease.seen = lease.is_fresh, False, time.monotonic()
        if fresh:
            address = show_address(self._listeners.addresses[lease.key])
            self._runtime.emit(Listening(service=lease.key, address=address))
        return lease.key

    def look(self) -> float:
        """Give back what is over; in the thread that accepts.  Returns the seconds until the next look."""
        patience, now, over = self._runtime.options.port_lease, time.monotonic(), list[Lease]()
        pause = min(self.LOOK, patience / 4)
        if now < self._next_look:
            return self._next_look - now
        self._next_look = now + pause
        with self._lock:
            for lease in list(self._leases.values()):
                if self._has_client(lease.key):
                    lease.seen, lease.was_used = now, True
                elif lease.revoked or now - lease.seen >= (patience if lease.was_used else min(patience, self.UNUSED)):
                    del self._leases[lease.port]
                    self._listeners.remove(lease.key)
                    self._over(lease.key)
                    over.append(lease)
        for lease in over:
            self._runtime.log.info("port %d of service %s is given back", lease.port, lease.ask.name)
        return pause

    def _ports_of(self, owner: str) -> tuple[PortRange, ...]:
        """Those that may be asked for by this identity, by what is in force now."""
        rights = self._runtime.credentials.rights
        if rights is None:
            return self._runtime.options.client_ports
        identity = rights.get(owner)
        return identity.ports if identity else ()

    def revoke(self) -> None:
        """Have those go soon that may not be asked for any more by what is in force now."""
        with self._lock:
            for lease in self._leases.values():
                lease.revoked = lease.revoked or not is_among(lease.port, self._ports_of(lease.ask.owner))
            self._next_look = 0.0
        if self._listeners.bell is not None:
            self._listeners.bell.ring()

    def _certain(self, ask: Ask) -> Lease:
        lease = self._leases.get(ask.port)
        if lease is None or lease.revoked:
            return self._open(ask, ask.port)
        if (lease.ask.owner, lease.ask.name) != (ask.owner, ask.name):
            whose = "another relay client" if lease.ask.owner != ask.owner else f"service {lease.ask.name}"
            how = "is taken by" if self._has_client(lease.key) else "is kept for a while (--port-lease) for"
            raise Refusal(f"port {ask.port} {how} {whose}", "port")
        if not lease.ask.port and lease.ask.client != ask.client:
            raise Refusal(f"port {ask.port} is taken by another relay client, which had asked for any", "port")
        return lease

    def _any(self, ask: Ask, ports: tuple[PortRange, ...]) -> Lease:
        mine = [
            lease
            for lease in self._leases.values()
            if not (lease.ask.port or lease.revoked) and (lease.ask.owner, lease.ask.name) == (ask.owner, ask.name)
        ]
        for lease in mine:
            if lease.ask.client == ask.client:
                return lease
        for lease in mine:
            anew = not ask.had and (lease.ask.called, lease.ask.host) == (ask.called, ask.host)
            if anew and lease.was_used and not self._has_client(lease.key):
                lease.ask = ask
                return lease
        if len(self._leases) >= MOST_LEASES:
            raise Refusal("too many ports are given out", "port")
        problem: Refusal | None = None
        for port in self._candidates(ask, ports):
            try:
                return self._open(ask, port)
            except Refusal as refusal:
                problem = refusal.apart()
        raise Refusal(f"all ports that it may have are taken ({say_ports(ports)})", "port") from problem

    def _candidates(self, ask: Ask, ports: tuple[PortRange, ...]) -> Iterator[int]:
        """The one that it had, and all that it may have."""
        if ask.had and is_among(ask.had, ports) and ask.had not in self._leases:
            yield ask.had
        for one in ports:
            yield from (port for port in range(one.first, one.last + 1) if port not in self._leases)

    def _open(self, ask: Ask, port: int) -> Lease:
        """Listen on a port.  Raises `Refusal` where it cannot be had."""
        if len(self._leases) >= MOST_LEASES:
            raise Refusal("too many ports are given out", "port")
        if port in self._leases:
            raise Refusal(f"port {port} is about to be given back", "port")
        for name, (_, taken) in list(self._listeners.addresses.items()):
            if taken == port:
                whose = f"of its service {name}" if name else "for relay clients"
                raise Refusal(f"port {port} is the server's own, {whose}", "port")
        listeners: list[socket.socket] = []
        try:
            for host in self._hosts():
                listeners += listen(host, port, None, self._runtime.probing)
        except OSError as error:
            for listener in listeners:
                listener.close()
            hint = HINTS.get(error.errno or 0) or say_error(error)
            raise Refusal(f"port {port} cannot be had there: {hint}", "port") from error
        lease = Lease(f"{ask.name}{MARK}{port}", port, ask, time.monotonic())
        self._leases[port] = lease
        address = listeners[0].getsockname()
        self._begin(lease.key, (host_of(address), port))
        self._listeners.add(lease.key, listeners)
        return lease

    def _hosts(self) -> list[str]:
        """Where to listen: as for relay clients.  No name is looked up for that."""
        host = self._runtime.options.hostname
        if not host or is_ipv6(host) or host.replace(".", "").isdigit():
            return [host]
        return [
            host_of(listener.getsockname()) for listener, name in list(self._listeners.services.items()) if not name
        ]


HINTS = {errno.EADDRINUSE: "another program has it", errno.EACCES: "a port below 1024 needs CAP_NET_BIND_SERVICE"}
"""What a relay client is told."""
