"""Listening and dialling."""

from __future__ import annotations

import errno
import ipaddress
import itertools
import os
import select
import socket
import time
from collections import deque
from typing import Any

from .addresses import Endpoint
from .names import Addresses, Name
from .system import LINUX, ignore_oserror
from .tcp import NEAR_SEGMENT, RESET_ON_CLOSE, Probing, hold_little, limit_sends, set_tcp_options
from .text import say_error
from .waiting import Deadline, Stop, Stopping, Wakes

DIAL_TIMEOUT = 10.0
"""Seconds to reach the service or the relay server, over all their addresses."""
BACKLOG = 4096
"""Connections that the kernel holds until they are accepted: a flood that fills it up costs others a second, until
their SYN is sent again.  Linux caps it at net.core.somaxconn, which is as much."""


def listen(host: str, port: int, stop: Wakes | None = None, probing: Probing | None = None) -> list[socket.socket]:
    """Non-blocking listening TCP sockets, one for each address of the host that this machine has, all with the same
    port; host "" is every address, IPv6 and IPv4 together where both exist.

    Accepted sockets inherit their options (Linux and BSD copy them): no delay, keepalive (see `Probing.spread`),
    and RST on close until that is disarmed.  Raises `OSError`, and `Stopping` while a name is looked up.
    """
    if not host:
        both = socket.has_dualstack_ipv6()
        addresses: Addresses = [(socket.AF_INET6, ("::", port)) if both else (socket.AF_INET, ("", port))]
    else:
        addresses = Name(host, port).addresses(Deadline(DIAL_TIMEOUT), DIAL_TIMEOUT, stop)
    probing = probing or Probing()
    for _ in range(16):
        try:
            return _listen_at(addresses, probing)
        except OSError as error:
            if port or error.errno != errno.EADDRINUSE:
                raise
    return _listen_at(addresses, probing)  # a port that was free at one address was taken at another each time


def public_address() -> str:
    """The address by which this host goes out to the internet, if others can reach it there; "" where a NAT or no
    network is in between."""
    for family, beyond in ((socket.AF_INET, "198.51.100.1"), (socket.AF_INET6, "2001:db8::1")):  # RFC 5737, RFC 3849
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.connect((beyond, 9))  # looks for the way, and sends nothing
                host: str = sock.getsockname()[0]
        except OSError:
            continue
        if ipaddress.ip_address(host).is_global:
            return host
    return ""


def _listen_at(addresses: Addresses, probing: Probing) -> list[socket.socket]:
    """Listen at all the addresses, at the port that the first one gets.  Raises `OSError` where one is taken, or
    none is this machine's."""
    listeners: list[socket.socket] = []
    problem = OSError("no address")
    try:
        for family, (host, port, *scope) in addresses:
            if listeners:
                port = listeners[0].getsockname()[1]
            try:
                listeners.append(_listen_on(family, (host, port, *scope), probing))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                problem = error  # localhost has an IPv6 address where this machine has none
        if not listeners:
            raise problem
        return listeners
    except BaseException:
        for listener in listeners:
            listener.close()
        raise


def _listen_on(family: int, address: Any, probing: Probing) -> socket.socket:
    both = address[0] == "::" and socket.has_dualstack_ipv6()
    listener = socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=both)
    limit_sends(listener)
    set_tcp_options(listener)
    probing.apply(listener)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    listener.setblocking(False)
    return listener


class Dialer:
    """Connects to one endpoint again and again, first to the address where that succeeded last."""

    MOVING_TIME = 1.0
    """Seconds that a name server has to say other addresses, where none of the known ones answers."""

    def __init__(
        self,
        target: Endpoint,
        timeout: float = DIAL_TIMEOUT,
        probing: Probing | None = None,
        again: float | None = None,
    ) -> None:
        """Without `probing` that is left for when a connection turns out to last.  With `again` each address is tried
        once more after so many seconds without an answer: where a path is back, the kernel's own next attempt may be
        far away."""
        self._target = target
        self._timeout = timeout
        self._probing = probing
        self.again = again
        self._name = Name(target.host, target.port)
        self._favourite: tuple[int, Any] | None = None
        """The address that was connected to last."""

    @property
    def favourite(self) -> tuple[int, Any] | None:
        """The family and the socket address that was connected to last."""
        return self._favourite

    def dial(self, stop: Stop | None = None, little: bool = False) -> socket.socket:
        """Connect, trying the addresses as RFC 8305 says, all within the time-out.

        With `little` neither system is to hold more than a little of what a near peer sends: see `Queue`.  Raises
        `OSError` (of the last address that failed, or the name server's) and `Stopping`.
        """
        deadline, began = Deadline(self._timeout), time.monotonic()
        if self._target.path:
            return connect_to_path(self._target.path, deadline, stop)
        known = self._name.addresses(deadline, self._timeout, stop)
        try:
            return self._connect(known, deadline, stop, little)
        except Stopping:
            raise
        except OSError as error:
            problem = error
        try:  # it may have moved
            found = self._name.ask_again(began, deadline, self.MOVING_TIME, stop)
        except Stopping:
            raise
        except OSError:
            raise problem from None
        if set(found) <= set(known):
            raise problem
        return self._connect(found, deadline, stop, little)

    def _connect(self, addresses: Addresses, deadline: Deadline, stop: Stop | None, little: bool) -> socket.socket:
        race = Race(in_turns(addresses, self._favourite), deadline, stop, self._probing, self.again, little)
        sock = race.run()
        self._favourite = race.winner
        return sock


def in_turns(addresses: Addresses, favourite: tuple[int, Any] | None = None) -> Addresses:
    """The addresses in the order in which they are tried: the favourite first, then IPv6 and IPv4 in turns."""
    if len(addresses) == 1:
        return addresses
    addresses = sorted(addresses, key=lambda address: address != favourite)
    same = [address for address in addresses if address[0] == addresses[0][0]]
    other = [address for address in addresses if address[0] != addresses[0][0]]
    return [address for pair in itertools.zip_longest(same, other) for address in pair if address is not None]


def connect_to_path(path: str, deadline: Deadline, stop: Stop | None) -> socket.socket:
    """Connect to a Unix socket.  Raises `OSError`, `TimeoutError` and `Stopping`.

    Where its backlog is full that fails with EAGAIN, on Linux after the time-out of sends; it is not under way then,
    so that nothing could be polled for.
    """
    pause = 0.01
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        limit_sends(sock)
        sock.setblocking(True)  # whatever default a program has set
        while (code := sock.connect_ex(path)) == errno.EAGAIN:
            if stop is not None and stop.requested:
                raise Stopping("ending")
            if not (left := deadline.remaining() or 0.0):
                raise TimeoutError("timed out, its queue of connections is full")
            (time.sleep if stop is None else stop.wait)(min(pause, left))
            pause = min(2 * pause, 0.25)
        if code:
            raise OSError(code, os.strerror(code))
        return sock
    except BaseException:
        sock.close()
        raise


class Race:
    """Connects to whichever of several TCP addresses answers first ("happy eyeballs", RFC 8305).

    Each is begun `HEAD_START` after the one before it, or as soon as one has failed.  The losers are closed.  Where
    there is one address, or the first answers in time, all is over with one call.
    """

    HEAD_START = 0.25
    """Seconds, as RFC 8305 recommends.  It is the time-out of sends, too: see `_begin`."""

    def __init__(
        self,
        addresses: Addresses,
        deadline: Deadline,
        stop: Stop | None,
        probing: Probing | None,
        again: float | None = None,
        little: bool = False,
    ) -> None:
        self._addresses = addresses
        self._rest = deque(addresses)
        """Those that are not begun yet."""
        self._deadline = deadline
        self._stop = stop
        self._probing = probing
        self._again = again
        """Seconds without an answer from any of them after which all are begun once more."""
        self._little = little
        self._running: dict[int, tuple[socket.socket, tuple[int, Any]]] = {}
        """The connections that are under way, by their descriptors, and to where."""
        self.winner: tuple[int, Any] | None = None

    def run(self) -> socket.socket:
        """The first connection that comes about, on a blocking socket.

        Raises the `OSError` of the address that has failed last; `TimeoutError` where one has not answered; and
        `Stopping`.
        """
        problem: OSError = TimeoutError("timed out")
        try:
            while self._rest or self._running:
                try:
                    if sock := self._advance():
                        return sock
                    if not self._rest and self._again is not None:
                        self._rest.extend(self._addresses)
                except Stopping:
                    raise
                except OSError as error:
                    problem = error
                if self._deadline.remaining() == 0:
                    break
            if self._running and not isinstance(problem, TimeoutError):  # one that is silent tells more than one that
                problem = TimeoutError(f"timed out; another address: {say_error(problem)}")  # cannot be there
            raise problem
        finally:
            for sock, _ in self._running.values():
                sock.close()

    def _advance(self) -> socket.socket | None:
        """Begin the next connection, if one is left, and wait for any of them; ``None`` when the next is to begin."""
        patience = Deadline(self.HEAD_START)
        if self._rest and (sock := self._begin(self._rest.popleft())):
            return sock
        if not self._rest:
            left = self._deadline.remaining()
            patience = self._deadline if self._again is None else Deadline(min(self._again, left or 0.0))
        return self._wait(patience)

    def _begin(self, to: tuple[int, Any]) -> socket.socket | None:
        """Begin to connect; ``None`` where that goes on.  Raises `OSError`."""
        family, address = to
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            # Linux limits a blocking connect like a send, and then it goes on by itself: most are over with this call.
            limit_sends(sock)
            alone = LINUX and not self._running
            if sock.gettimeout() is not None or not alone:
                sock.setblocking(alone)
            if self._little and hasattr(socket, "TCP_MAXSEG"):
                ignore_oserror(sock.setsockopt, socket.IPPROTO_TCP, socket.TCP_MAXSEG, NEAR_SEGMENT)
            code = sock.connect_ex(address)
            if code == errno.EINPROGRESS:
                self._running[sock.fileno()] = sock, to
                return None
            return self._finish(sock, to, code)
        except BaseException:
            sock.close()
            raise

    def _wait(self, patience: Deadline) -> socket.socket | None:
        """Wait until a connection has come about, which is returned, or has failed: raises `OSError`."""
        poller = select.poll()
        for fd in self._running:
            poller.register(fd, select.POLLOUT)
        if self._stop is not None:
            poller.register(self._stop.fileno(), select.POLLIN)
        left = patience.remaining()
        for fd, _ in poller.poll(None if left is None else left * 1000):
            if fd not in self._running:
                raise Stopping("ending")
            sock, to = self._running.pop(fd)
            try:
                return self._finish(sock, to, sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
            except BaseException:
                sock.close()
                raise
        return None

    def _finish(self, sock: socket.socket, to: tuple[int, Any], code: int) -> socket.socket:
        """Make a connection ready for use, or raise the `OSError` with which it has failed."""
        if code:
            raise OSError(code, os.strerror(code))
        if sock.gettimeout() is not None:
            sock.setblocking(True)
        # A port of the ephemeral range on this host where nothing listens can connect to itself.
        if to[1][1] in EPHEMERAL_PORTS and connected_to_itself(sock):
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        set_tcp_options(sock)
        if self._probing is not None:
            self._probing.apply(sock)
        if self._little:
            hold_little(sock)
        self.winner = to
        return sock


def ephemeral_ports() -> range:
    """The ports that this system gives to those that connect."""
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
            first, last = file.read().split()
        return range(int(first), int(last) + 1)
    except (OSError, ValueError):
        return range(65536)


EPHEMERAL_PORTS = ephemeral_ports()


def connected_to_itself(sock: socket.socket) -> bool:
    try:
        return bool(sock.getpeername() == sock.getsockname())
    except OSError:  # reset already, as its user will see
        return False
