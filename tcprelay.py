"""tcprelay: what the relay server and the relay client both stand on.

    service client ──▶ service port ┐                              ┌ dials ──▶ service
    (anywhere)                      │ relay server ◀══ link ══ relay client   (behind the NAT)
                        relay port ─┘ (public host)                └ keeps idle links in a pool

A relay client keeps a pool of idle links to a relay server. When a service client connects to a service
port, the server pairs it with an idle link, the client dials the service, and the two are spliced until
both directions have ended; then the link goes back to the pool.

This file, from top to bottom:

    addresses, deadlines     endpoints, listening, dialling, and waiting for a descriptor with a deadline
    the link protocol        frames, and the machine that says which frame may come when; no I/O
    streams and links        the legs of a connection: a byte stream, plain or TLS, or a link that carries one
                             in frames
    splicing                 the opening exchange, then two pumps, one a direction; the watch that ends what is
                             idle or dead
    threads                  a cache of parked threads, and the processor on which they stay
    events                   what happens, told once: the log, the counters and ``on_event`` listen
    options                  one table for the command line, the environment and the configuration file
    certificates             TLS contexts, PFX files, self-signed certificates, pins
    running                  what both roles are built on, signals, systemd, how a command starts and ends
    workers                  several processes for one role: the parent that forks them and replaces those that die

Threads and sockets, in both roles:

    - Every connection is served by a thread of its own from `Threads`.  That thread alone carries the opening
      exchange of a spliced one, both ways (`Splice._converse`: it waits in one ``poll`` and nowhere else), which
      is all that most short connections are.  What goes on longer is carried by two, one a direction: a pump
      blocks in a plain ``recv``, ``send`` or ``splice`` and in nothing else.
    - The thread that serves a connection owns its socket: it closes it, after the other pump has left.
      Everybody else only *wakes* it (see `Stream.wake`).  ``close`` would not wake a blocked ``recv``, and
      the number of a closed descriptor may already belong to another connection.
    - Sockets are blocking.  Where time matters before a connection is spliced, a thread waits in ``poll``
      with a `Deadline`; once it is spliced, time is watched from outside (`Splices.sweep`).
    - No lock is held across a callback, a join, logging, or I/O that may wait: decide under the lock, act
      after it.  (`TLSStream` has a lock for its one sender, to keep records in order.)
    - Nobody waits for the log: in the commands a thread of its own writes it (`LogWriter`).
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036  (RHEL 9's python3, of a source tree, which nothing else has checked)
    raise ImportError(f"tcprelay needs Python 3.10 or later, and this is {sys.version_info[0]}.{sys.version_info[1]}")

import _thread
import abc
import contextlib
import dataclasses
import errno
import functools
import gc
import glob
import importlib
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import queue
import re
import select
import selectors
import signal
import socket
import stat
import struct
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, NoReturn, Protocol, TypeGuard, TypeVar

try:
    import fcntl
    import termios
except ImportError:  # not a Unix: then nothing here asks for them
    fcntl = termios = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import hashlib
    import hmac
    import ssl
    import subprocess
    import tempfile

    from tcprelay_client import RelayClient, create_relay_client
    from tcprelay_server import RelayServer, create_relay_server
else:

    class Lazy:
        """A module that is imported when it is used: these five take 6 MiB (measured), which a small host that
        relays without token and TLS need not spend."""

        def __init__(self, name):
            self._name = name

        def __getattr__(self, attribute):
            value = getattr(importlib.import_module(self._name), attribute)
            setattr(self, attribute, value)
            return value

    hashlib, hmac, ssl = Lazy("hashlib"), Lazy("hmac"), Lazy("ssl")
    subprocess, tempfile = Lazy("subprocess"), Lazy("tempfile")

__version__ = "0.1.0"
__all__ = ["RelayClient", "RelayServer", "create_relay_client", "create_relay_server"]

HANDSHAKE_TIMEOUT, HANDSHAKE_STEP = 20.0, 10.0
"""Seconds that a server gives a handshake as a whole, and each answer in it: three round trips of a saturated uplink
take that long, and who says nothing is not waited for longer."""
DIAL_TIMEOUT = 10.0
"""Seconds to reach the service or the relay server, over all their addresses."""
SILENCE = 2.5
"""Heartbeat intervals without a frame after which an idle link is dead: two PINGs may be lost."""
FLUSH_TIMEOUT = 5.0
"""Seconds that the bytes sent before an abort have to leave, before the RST that would discard them."""
JOIN_TIMEOUT = 5.0
"""Seconds that threads have to leave after their sockets were woken."""
BACKLOG = 4096
"""Connections that the kernel holds until they are accepted: a flood that fills it up costs others a second, until
their SYN is sent again.  Linux caps it at net.core.somaxconn, which is as much."""
SWITCH_INTERVAL = 1.0
"""Seconds for which a thread may keep the interpreter lock (`sys.setswitchinterval`).  Ours give it up at every system
call; but each of those that wait for it wakes so often to ask for it, and of 3,000 nobody gets anything else done
(measured: an echo on 3,000 connections at once took 3.0 s at Python's 5 ms, and 0.42 s at 100 ms; the end of 5,000
sometimes took minutes even so, and seconds at 1 s)."""


# --- Addresses and deadlines ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Endpoint:
    """Where to listen or what to dial: a host and a port, or the path of a Unix socket."""

    host: str
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_port(text: str) -> int:
    """A TCP port, 0 to 65535.  Raises `ValueError` that says what is accepted."""
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise ValueError("a port number from 0 to 65535")
    return int(text)


def parse_endpoint(text: str, default_host: str | None = None) -> Endpoint:
    """``HOST:PORT``, ``[IPV6]:PORT``, ``unix:PATH`` or, where there is a default host, ``PORT``.

    Raises `ValueError` that says what is accepted.
    """
    if text.startswith("unix:"):
        if not text[5:] or has_controls(text):
            raise ValueError("unix:PATH")
        return Endpoint("", 0, text[5:])
    host, colon, port = text.rpartition(":")
    if not colon and default_host is not None:
        return Endpoint(default_host, parse_port(port))
    bracketed = host.startswith("[") and host.endswith("]")
    if not host or (":" in host and not bracketed):
        raise ValueError("HOST:PORT, of an IPv6 address [HOST]:PORT")
    return Endpoint(parse_host(host), parse_port(port))


def show_address(address: Any) -> str:
    """A socket address as users write it; an IPv4 address mapped into IPv6 as the IPv4 one."""
    if not isinstance(address, tuple):
        return f"unix:{address}" if address else "a Unix socket"
    return str(Endpoint(host_of(address), address[1]))


def host_of(address: Any) -> str:
    """The host of an Internet socket address, with the zone that a link-local one needs to be connected to."""
    host = str(address[0].removeprefix("::ffff:"))
    if len(address) < 4 or not address[3] or "%" in host:
        return host
    try:
        return f"{host}%{socket.if_indextoname(address[3])}"
    except OSError:  # that interface is gone
        return f"{host}%{address[3]}"


def is_loopback(address: Any) -> bool:
    """Whether a peer's socket address is on this machine's loopback (or a Unix socket)."""
    if not isinstance(address, tuple):
        return True
    try:
        return ipaddress.ip_address(address[0].removeprefix("::ffff:").partition("%")[0]).is_loopback
    except ValueError:
        return False


def address_group(address: Any) -> str:
    """What counts as one address where each may have only so much: of IPv6 the first 64 bits, since one
    customer gets at least that many (RFC 6177)."""
    if not isinstance(address, tuple):
        return "unix"
    host = address[0].removeprefix("::ffff:").partition("%")[0]
    if ":" not in host:
        return str(host)
    return str(ipaddress.ip_network(f"{host}/64", strict=False))


for codec in ("unicode_escape", "idna"):  # the latter is what host names are encoded with
    "".encode(codec)  # imports it now: later descriptors may have run out


def shown(text: object, limit: int = 120) -> str:
    """A string from a peer, made safe for the log: escaped, and cut to `limit` characters."""
    return str(text)[: 4 * limit].encode("unicode_escape").decode("ascii")[:limit]


def say_error(error: BaseException) -> str:
    """An exception in the words of a log line: the system's sentence without numbers and class names."""
    if is_tls_error(error):
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"the certificate is not accepted: {error.verify_message}"
        return f"TLS: {(error.reason or str(error)).lower().replace('_', ' ')}"
    if not isinstance(error, OSError) or not error.strerror:
        return str(error) or type(error).__name__
    # Python puts the address behind some of the system's sentences; here the caller names it.
    said = error.strerror.partition(" (while attempting")[0]
    return said[:1].lower() + said[1:] if said[1:2].islower() else said


def is_tls_error(error: BaseException) -> TypeGuard[ssl.SSLError]:
    """Whether it is an `ssl.SSLError`; without importing ssl for those that are not."""
    return type(error).__module__ == "ssl" and isinstance(error, ssl.SSLError)


class Deadline:
    """A moment by which several steps together must be done; ``None`` seconds is never."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def remaining(self) -> float | None:
        """Seconds left, 0 when it has passed, ``None`` when there is no end."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def within(self, seconds: float) -> Deadline:
        """A deadline of its own for one step: so many seconds from now, and no later than this one."""
        left = self.remaining()
        return Deadline(seconds if left is None else min(seconds, left))

    def shorten(self, seconds: float) -> None:
        """Let it be no later than `seconds` from now."""
        end = time.monotonic() + seconds
        self._end = end if self._end is None else min(self._end, end)


class Stop:
    """A flag that threads can wait for in ``poll``: its descriptor turns readable once, for all, for ever."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(True)  # whatever default a program has set
        self._writer.setblocking(True)
        self.requested = False

    def fileno(self) -> int:
        return self._reader.fileno()

    def request(self) -> None:
        """Set the flag and wake everybody who waits for it; any thread, any number of times."""
        self.requested = True
        self._writer.send(b"\0", socket.MSG_DONTWAIT)

    def wait(self, seconds: float) -> None:
        """Wait for the request, up to `seconds`."""
        try:
            wait_for(self.fileno(), select.POLLIN, Deadline(seconds))
        except TimeoutError:
            pass

    def close(self) -> None:
        """Give the descriptors back, when no thread waits any more."""
        self._reader.close()
        self._writer.close()


class Stopping(ConnectionError):
    """A wait was cut short because this role is ending."""


def wait_for(fd: int, events: int, deadline: Deadline, stop: Stop | _Signals | None = None) -> None:
    """Block until `fd` has one of the poll `events` (or an error, or its end).

    Raises `TimeoutError` at the deadline and `Stopping` when `stop` is requested (or a signal comes) first.
    """
    poller = select.poll()
    poller.register(fd, events)
    if stop is not None:
        poller.register(stop.fileno(), select.POLLIN)
    left = deadline.remaining()
    # A peer that always has one more byte does not get beyond the deadline either.
    if left == 0 or not (ready := poller.poll(None if left is None else left * 1000)):
        raise TimeoutError("timed out")
    if all(number != fd for number, _ in ready):
        raise Stopping("ending")


Addresses = list[tuple[int, Any]]
"""Pairs of family and socket address."""


def resolve(host: str, port: int) -> Addresses:
    """The addresses of a host, each once.  May ask a name server, and wait for it.

    Raises `OSError` that says in words why there are none.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except ValueError as error:  # a label that is empty or too long
        raise socket.gaierror(socket.EAI_NONAME, f"{shown(host)} is not a host name") from error
    except socket.gaierror as error:
        raise socket.gaierror(error.errno, say_why_not_found(host, error)) from error
    except OSError as error:
        raise OSError(error.errno, f"cannot look up {shown(host)}: {say_error(error)}") from error
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def say_why_not_found(host: str, error: socket.gaierror) -> str:
    """Why a host has no addresses, from the error of getaddrinfo."""
    nowhere = ("EAI_NONAME", "EAI_NODATA", "EAI_ADDRFAMILY")  # not every system has all of them
    if any(error.errno == getattr(socket, name, 0) for name in nowhere):
        return f"unknown host {shown(host)}"
    reasons = {socket.EAI_AGAIN: NO_ANSWER, socket.EAI_FAIL: "the name server has failed"}
    return f"cannot look up {shown(host)}: {reasons.get(error.errno or 0) or say_error(error)}"


NO_ANSWER = "the name server does not answer"


def resolve_here(host: str, port: int) -> Addresses:
    """The addresses of a host for which nobody has to be asked: numeric ones, and those of localhost (RFC 6761).
    None for other hosts."""
    numbers = ["::1", "127.0.0.1"] if host.lower().removesuffix(".") == "localhost" else [host]
    try:
        found = [socket.getaddrinfo(number, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
                 for number in numbers]  # fmt: skip
    except (OSError, ValueError):
        return []
    return [(family, address) for [(family, _, _, _, address), *_] in found]


class Name:
    """The addresses of a host, as far as they are known.

    The name server is asked beside, in a thread of its own: getaddrinfo takes as long as that lets it, and cannot be
    interrupted.  Nobody waits for this thread longer than he means to, not even the interpreter at its end, and there
    is one for each name at most.  Addresses that need no name server never come near it.
    """

    KNOWN_TIME = 30.0
    """Seconds after which the name server is asked again; meanwhile what is known is used."""
    FAILED_TIME = 2.0
    """Seconds for which a failure is remembered: a connection every millisecond need not ask as often."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._lock = threading.Lock()  # over what follows
        self._known: Addresses = []
        """What was found last."""
        self._problem: OSError | None = None
        """Why the last look-up has failed."""
        self._asked_at, self._due = 0.0, 0.0
        """When the last look-up began, and when the next one is to begin."""
        self._asking = False
        """A look-up is under way."""
        self._waiters: set[Stop] = set()
        """Who waits for it; each owns what wakes it."""

    def addresses(self, deadline: Deadline, patience: float, stop: Stop | _Signals | None = None) -> Addresses:
        """What is known, at once; where that is nothing, what the name server says.

        Waits until the deadline, but for no look-up that has gone on for `patience` seconds.  Raises `OSError` that
        names the name server, and `Stopping`.
        """
        self._refresh()
        return self._known or self._wait(deadline, patience, stop)

    def ask_again(self, since: float, deadline: Deadline, patience: float, stop: Stop | None = None) -> Addresses:
        """The same, but what was found before the moment `since` (of the monotonic clock) does not count."""
        self._refresh(since)
        return self._wait(deadline, patience, stop)

    def _refresh(self, since: float = 0.0) -> None:
        """Begin a look-up where one is due, or the last that succeeded had begun before `since`."""
        now = time.monotonic()
        with self._lock:
            is_old = now >= self._due or (self._asked_at < since and self._problem is None)
            if self._asking or not is_old:
                return
            self._asked_at, self._asking = now, True
        try:
            if here := resolve_here(self._host, self._port):
                self._settle(here, None)
            else:  # not one of `threading`, whose start waits for the new thread: see `Threads`
                _thread.start_new_thread(self._look_up, ())
        except (RuntimeError, MemoryError) as error:
            self._settle([], OSError(f"cannot look up {shown(self._host)}: {say_error(error)}"))

    def _look_up(self) -> None:
        """The life of the thread: it ends, and that is known, whatever happens."""
        try:
            self._settle(resolve(self._host, self._port), None)
        except OSError as error:
            self._settle([], error)
        except Exception as error:  # out of memory, most likely
            self._settle([], OSError(f"cannot look up {shown(self._host)}: {say_error(error)}"))

    def _settle(self, found: Addresses, problem: OSError | None) -> None:
        with self._lock:
            self._asking, self._problem, self._known = False, problem, found or self._known
            self._due = time.monotonic() + (self.FAILED_TIME if problem else self.KNOWN_TIME)
            for waiter in self._waiters:
                waiter.request()

    def _wait(self, deadline: Deadline, patience: float, stop: Stop | _Signals | None) -> Addresses:
        """What the look-up under way finds, or the last one has found."""
        if self._asking:
            self._wait_for_answer(deadline, patience, stop)
        with self._lock:
            asking, problem, known = self._asking, self._problem, self._known
        if asking:
            raise socket.gaierror(socket.EAI_AGAIN, f"cannot look up {shown(self._host)}: {NO_ANSWER}")
        if problem is not None:
            raise type(problem)(*problem.args)  # several may raise it, each with a traceback of its own
        return known

    def _wait_for_answer(self, deadline: Deadline, patience: float, stop: Stop | _Signals | None) -> None:
        answered, left = Stop(), deadline.remaining()
        try:
            with self._lock:
                if not self._asking:
                    return
                self._waiters.add(answered)
                patience = max(0.0, self._asked_at + patience - time.monotonic())
            patient = Deadline(patience if left is None else min(patience, left))
            wait_for(answered.fileno(), select.POLLIN, patient, stop)
        except TimeoutError:
            pass
        finally:
            with self._lock:
                self._waiters.discard(answered)
            answered.close()


def listen(
    host: str, port: int, stop: Stop | _Signals | None = None, probing: Probing | None = None
) -> list[socket.socket]:
    """Non-blocking listening TCP sockets, one for each address of the host that this machine has, all with the same
    port; host "" is every address, IPv6 and IPv4 together where both exist.

    Accepted sockets inherit their options (Linux and BSD copy them): no delay, keepalive (see `Probing.spread`),
    and RST on close until somebody disarms it.  Raises `OSError`, and `Stopping` while a name is looked up.
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
    set_tcp_options(listener, probing)
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
        """With `again` each address is tried once more after so many seconds without an answer: where a path is back,
        the kernel's own next attempt may be far away."""
        self._target = target
        self._timeout = timeout
        self._probing = probing or Probing()
        self._again = again
        self._name = Name(target.host, target.port)
        self._favourite: tuple[int, Any] | None = None
        """The address that was connected to last."""

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
        race = Race(in_turns(addresses, self._favourite), deadline, stop, self._probing, self._again, little)
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
        probing: Probing,
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

        Raises the `OSError` of the address that has failed last; `TimeoutError` where none has; and `Stopping`.
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
        # A port of the ephemeral range on this host where nobody listens can connect to itself.
        if to[1][1] in EPHEMERAL_PORTS and connected_to_itself(sock):
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        set_tcp_options(sock, self._probing)
        if self._little:
            hold_little(sock)
        self.winner = to
        return sock


def name_in_certificate(host: str) -> str:
    """A host as its certificate names it: without a trailing dot, or the zone of an IPv6 address."""
    return host.partition("%")[0].removesuffix(".")


LINUX = sys.platform == "linux"


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
    except OSError:  # reset already: whoever uses it will see
        return False


RESET_ON_CLOSE = struct.pack("ii", 1, 0)
CLOSE_NORMALLY = struct.pack("ii", 0, 0)


def limit_sends(sock: socket.socket) -> None:
    """Have a blocked send return every quarter of a second, to see whether it is to give up."""
    set_timeout(sock, socket.SO_SNDTIMEO, 0.25)


def set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    """Limit blocking sends (SO_SNDTIMEO) or receives (SO_RCVTIMEO), which fail with `BlockingIOError` then."""
    for timeval in ("ll", "qq"):  # the latter where time is wider than the machine's words
        try:
            sock.setsockopt(socket.SOL_SOCKET, option, struct.pack(timeval, *divmod(round(seconds * 1e6), 1_000_000)))
            return
        except OSError:
            pass


@dataclass(frozen=True)
class Probing:
    """How TCP is to find out that a silent peer is no longer there."""

    keepalive: float = 20.0
    """Seconds of silence after which the peer is asked, and up to half as much again: each connection at another
    moment.  There are NATs that forget a connection after 30 s without a packet; a dead one is not missed before."""
    dead_path: float = 900.0
    """Seconds without any answer after which the connection is given up; 0 is never.  But a silent one is asked 127
    times at most, which is all that Linux allows."""
    INTERVAL = 15
    """Seconds from one question to the next, where that is not more than `keepalive`: Linux lets the greater of the
    two pass between questions that are answered."""

    def apply(self, sock: socket.socket) -> None:
        """Set what accepted sockets inherit from a listener, and the rest."""
        most = self.INTERVAL if self.dead_path else self.keepalive
        interval = max(1, int(min(most, self.keepalive, self.dead_path / 2 or most)))
        count = min(127, math.ceil(self.dead_path / interval)) if self.dead_path else 127
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPINTVL", interval), ("TCP_KEEPCNT", count)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.spread(sock)

    def spread(self, sock: socket.socket) -> None:
        """Choose the moment of the first question.

        Thousands at once overflow the kernel's queues, on loopback at 1,000 packets, and so do their repetitions:
        connections to living peers timed out (measured: 8 to 29 of 3,000 that were opened together).
        """
        if hasattr(socket, "TCP_KEEPIDLE"):
            idle = int(self.keepalive) + 37 * next(_turns) % (int(self.keepalive) // 2 or 1)
            ignore_oserror(sock.setsockopt, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)


def set_tcp_options(sock: socket.socket, probing: Probing) -> None:
    """No delay, urgent bytes among the others, and keepalive.

    Without SO_OOBINLINE an urgent byte (Telnet's and FTP's interrupt) would be taken out of the stream and lost.

    TCP_USER_TIMEOUT is left alone: on Linux it also ends a connection whose living peer merely does not read
    (measured: a stalled reader was cut off after 3.5 s with a time-out of 3 s), and stalling is no fault.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    limit_unsent(sock)
    probing.apply(sock)


UNSENT = 1 << 15
"""Bytes that a socket takes beyond what the path and its peer's window allow: see `Queue`."""
NEAR = 0.002
"""Seconds of a round trip: what is nearer gives whatever it has in no time, and needs no large window for that."""
NEAR_BUFFER = 1 << 15
"""Bytes of the receive buffer for a near service behind a far link; Linux doubles what it is told."""
NEAR_SEGMENT = 7_400
"""Bytes of its segments at most.  The send buffer of a service on this host takes 20 segments at least, each rounded up
to a power of two with some 700 bytes of the kernel's own: with loopback's 65,483 these are 2.6 MB."""
_SO_BUF_LOCK = 72


def limit_unsent(sock: socket.socket, most: int = UNSENT) -> None:
    """Set TCP_NOTSENT_LOWAT, where there is such a thing; 0 leaves it to the system."""
    if sock.family != socket.AF_UNIX and hasattr(socket, "TCP_NOTSENT_LOWAT"):
        ignore_oserror(sock.setsockopt, socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, most)


def hold_little(sock: socket.socket) -> None:
    """Have the system not hold more and more of what comes, where the peer is near, until `hold_much` leaves that to it
    again; for which there is no way before Linux 5.14, so that nothing is done there."""
    if LINUX and sock.family != socket.AF_UNIX and is_near(sock):
        try:
            sock.getsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, NEAR_BUFFER)
        except OSError:
            pass


def hold_much(sock: socket.socket) -> None:
    if LINUX and sock.family != socket.AF_UNIX:
        ignore_oserror(sock.setsockopt, socket.SOL_SOCKET, _SO_BUF_LOCK, 0)


_turns = itertools.count()


# --- The link protocol ----------------------------------------------------------------------------------------
#
# docs/protocol.md tells it for people who write another implementation.  A frame is a type (1 byte), a length
# (3 bytes, big-endian) and a body.  Control frames carry a JSON object, or nothing, which means {}.

HEADER = 4
MAX_CONTROL = 4096
MAX_DATA = (1 << 24) - 1
PROTOCOL_VERSION = 1

HELLO, CHALLENGE, AUTH, WELCOME, REFUSED = 1, 2, 3, 4, 5
PING, PONG = 6, 7
START, READY, FAIL, DATA, END, ABORT, BYE = 8, 9, 10, 11, 12, 13, 14
FRAME_NAMES = {
    HELLO: "HELLO", CHALLENGE: "CHALLENGE", AUTH: "AUTH", WELCOME: "WELCOME", REFUSED: "REFUSED",
    PING: "PING", PONG: "PONG", START: "START", READY: "READY", FAIL: "FAIL",
    DATA: "DATA", END: "END", ABORT: "ABORT", BYE: "BYE",
}  # fmt: skip

CLIENT, SERVER = "client", "server"

NEW, GREETED, CHALLENGED, PROVEN = "new", "greeted", "challenged", "proven"
IDLE, OPENING, SPLICED, FAILED, CLOSED = "idle", "opening", "spliced", "failed", "closed"

TRANSITIONS = {
    # (state, sender, frame): the next state.  END and ABORT count separately: see `LinkMachine`.
    (NEW, CLIENT, HELLO): GREETED,
    (GREETED, SERVER, CHALLENGE): CHALLENGED,
    (CHALLENGED, CLIENT, AUTH): PROVEN,
    (GREETED, SERVER, WELCOME): IDLE,
    (PROVEN, SERVER, WELCOME): IDLE,
    (IDLE, SERVER, PING): IDLE,
    (IDLE, CLIENT, PONG): IDLE,
    (IDLE, SERVER, BYE): CLOSED,
    (IDLE, CLIENT, BYE): IDLE,  # and leaving: a START that crossed it is still served
    (IDLE, SERVER, START): OPENING,
    (OPENING, CLIENT, PONG): OPENING,  # crossed START
    (OPENING, CLIENT, BYE): OPENING,  # crossed START
    (OPENING, CLIENT, READY): SPLICED,
    (OPENING, CLIENT, FAIL): FAILED,
    **{(state, SERVER, frame): state for state in (OPENING, SPLICED, FAILED) for frame in (DATA, END, ABORT)},
    **{(SPLICED, CLIENT, frame): SPLICED for frame in (DATA, END, ABORT)},
}


class LinkFault(ConnectionError):
    """The peer broke the link protocol; the message says how, in words that it may be told."""


class LinkMachine:
    """What may be sent and received on one link, at either end; no I/O.

    A frame that the state does not allow raises `LinkFault`.  A connection is over, and the link idle again,
    when both sides have ended their direction (`END` or `ABORT`; `FAIL` is the client's end as well).  In
    between, one thread sends and another receives, so the transitions happen under a lock; DATA needs none.
    """

    def __init__(self, role: str) -> None:
        self.role = role
        self.peer = SERVER if role == CLIENT else CLIENT
        self.state = NEW
        self.leaving = False
        """The client has said BYE: no further connection after this one."""
        self._ended: tuple[str, ...] = ()
        self._lock = threading.Lock()

    def send(self, kind: int) -> None:
        """Note that a frame of this kind goes out.  Raises `LinkFault` where it may not."""
        self._step(self.role, kind)

    def receive(self, kind: int) -> None:
        """Note that a frame of this kind came in.  Raises `LinkFault` where it may not."""
        self._step(self.peer, kind)

    def check(self, kind: int, length: int) -> None:
        """Whether a frame with this header may come in now, before its body is read.  Raises `LinkFault`."""
        if kind not in FRAME_NAMES:
            raise LinkFault(f"unknown frame type {kind}")
        if kind != DATA and length > MAX_CONTROL:
            raise LinkFault(f"{FRAME_NAMES[kind]} of {length} bytes is longer than {MAX_CONTROL}")
        self._next_state(self.peer, kind)

    def has_ended(self, who: str) -> bool:
        """Whether that side has ended its direction of the present connection."""
        return who in self._ended or self.state in (IDLE, CLOSED)

    def _next_state(self, sender: str, kind: int) -> str:
        if kind == REFUSED:
            return CLOSED
        state = TRANSITIONS.get((self.state, sender, kind))
        if state is None or sender in self._ended or (kind == BYE and self.leaving):
            raise LinkFault(f"{FRAME_NAMES[kind]} from the {sender} where the link is {self.state}")
        return state

    def _step(self, sender: str, kind: int) -> None:
        if kind == DATA:
            self._next_state(sender, kind)
            return
        with self._lock:
            self.state = self._next_state(sender, kind)
            if kind == BYE and sender == CLIENT:
                self.leaving = True
            if kind in (END, ABORT):
                self._ended += (sender,)
            if kind == FAIL:
                self._ended += (CLIENT,)
            if len(self._ended) == 2:
                self.state = IDLE  # first: `has_ended` looks without the lock
                self._ended = ()


@dataclass(frozen=True, slots=True)
class Frame:
    """A control frame (`fields` is its JSON object), or the head of a DATA frame of `length` bytes."""

    kind: int
    length: int = 0
    fields: dict[str, Any] = field(default_factory=dict)

    def text(self, name: str, default: str = "") -> str:
        """A string field.  Raises `LinkFault` where it is something else."""
        value = self.fields.get(name, default)
        if not isinstance(value, str):
            raise LinkFault(f"{FRAME_NAMES[self.kind]}: {name} is not a string")
        return value

    def number(self, name: str, default: float, most: float) -> float:
        """A number field, at least 0 and at most `most`.  Raises `LinkFault` where it is something else."""
        value = self.fields.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise LinkFault(f"{FRAME_NAMES[self.kind]}: {name} is not a number from 0")
        return min(value, most)


def encode_frame(kind: int, fields: dict[str, Any] | None = None) -> bytes:
    """The bytes of a control frame.  Raises `ValueError` where the body is longer than `MAX_CONTROL`."""
    body = json.dumps(fields, separators=(",", ":")).encode() if fields else b""
    if len(body) > MAX_CONTROL:
        raise ValueError(f"{FRAME_NAMES[kind]} of {len(body)} bytes is longer than {MAX_CONTROL}")
    return encode_header(kind, len(body)) + body


def encode_header(kind: int, length: int) -> bytes:
    """The four bytes before a frame's body."""
    return struct.pack("!I", kind << 24 | length)


def decode_fields(kind: int, body: bytes) -> dict[str, Any]:
    """The JSON object of a control frame.  Raises `LinkFault`."""
    if not body:
        return {}
    # The decoder is recursive, and a thread's stack is small: no frame has a reason to nest.
    if body.count(b"{") + body.count(b"[") > 32:
        raise LinkFault(f"{FRAME_NAMES[kind]}: too many brackets")
    try:
        fields = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise LinkFault(f"{FRAME_NAMES[kind]}: the body is not JSON") from error
    if not isinstance(fields, dict):
        raise LinkFault(f"{FRAME_NAMES[kind]}: the body is not a JSON object")
    return fields


def random_id(count: int) -> str:
    """So many random bytes in hexadecimal."""
    return os.urandom(count).hex()


def connection_id() -> str:
    """A name for a connection in the log: eight hexadecimal digits, from a random one on."""
    return f"{next(_connection_ids) & 0xFFFFFFFF:08x}"


def _begin_ids() -> None:
    global _connection_ids
    _connection_ids = itertools.count(int.from_bytes(os.urandom(4), "big"))


_connection_ids = itertools.count()
_begin_ids()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_ids)  # each process from another one on


def random_fraction() -> float:
    """A random number from 0 to 1.  (The module random would cost 1 MiB.)"""
    return int.from_bytes(os.urandom(4), "big") / 0xFFFFFFFF


def new_nonce() -> str:
    return random_id(16)


def prove(token: bytes, role: str, client_nonce: str, server_nonce: str, service: str, client: str) -> str:
    """What `role` shows to prove that it knows the token: HMAC-SHA256 (RFC 2104), in hexadecimal.

    Each part is preceded by its length, so that no two lists of parts give the same message.
    """
    message = b""
    for part in ("tcprelay link 1", role, client_nonce, server_nonce, service, client):
        encoded = part.encode("utf-8", "surrogatepass")
        message += struct.pack("!I", len(encoded)) + encoded
    return hmac.new(token, message, hashlib.sha256).hexdigest()


def is_proof(given: str, expected: str) -> bool:
    """Compare in constant time; as bytes, since `hmac.compare_digest` refuses text outside ASCII."""
    return is_same(given.encode("utf-8", "surrogatepass"), expected.encode())


def is_same(given: bytes, expected: bytes) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(given, expected)


def guess_protocol(start: bytes) -> str:
    """What a peer that does not speak the link protocol seems to speak, from its first bytes."""
    if start[:1] in (b"\x15", b"\x16") and (len(start) < 2 or start[1] == 3):  # an alert, or a handshake's beginning
        return "TLS"
    if start[:4] in (b"GET ", b"HEAD", b"POST", b"PUT ", b"OPTI", b"CONN", b"PRI ", b"HTTP"):
        return "HTTP"
    if start[:4] == b"SSH-":
        return "SSH"
    return "something else"


# --- Streams and links ----------------------------------------------------------------------------------------


class Leg(Protocol):
    """One side of a spliced connection, as a pump sees it.

    A pump's buffer has `HEADER` free bytes before the data: a leg that sends frames puts its header there, so
    that header and bytes leave in one system call and are never copied together.
    """

    name: str
    fd: int
    spliceable: bool
    """Whether its bytes can pass inside the kernel, from and to `fd`."""

    def recv_into(self, view: memoryview) -> int:
        """Receive at least a byte; 0 is the end, and one that can be believed.  Raises `OSError`."""

    def recv_now(self, view: memoryview) -> int | None:
        """Like `recv_into`, but ``None`` where it would have to wait."""

    def holds_bytes(self) -> bool:
        """Whether there may be bytes, or the end, that the socket has given already, so that poll does not tell."""

    def send_buffer(self, view: memoryview, count: int) -> None:
        """Send the `count` bytes behind the header space of `view`, all of them.  Raises `OSError`."""

    def bulk_ahead(self) -> int:
        """How many bytes may be taken from `fd` directly; 0: use `recv_into`.  Raises `OSError`."""

    def took_bulk(self, count: int) -> None:
        """So many of them were taken; 0 at the end of the descriptor.  Raises `OSError` if that is no end."""

    def announce_bulk(self, count: int) -> None:
        """`count` bytes are about to be written to `fd` directly.  Raises `OSError`."""

    def keep_trying(self) -> None:
        """A send has been blocked for a while.  Raises `OSError` to give up."""

    def end(self, passed: int = 0) -> None:
        """End the sending direction: the other side has got everything.  So many bytes of the other direction
        were `passed` on by now, which a relay client tells its server.  Raises `OSError`."""

    def pack(self, data: memoryview) -> bytes | memoryview:
        """These bytes as they cross the leg's socket, to be sent by `carrier`.  They have to be sent now."""

    def pack_end(self, passed: int = 0) -> bytes:
        """What says there that nothing more will come (see `end`); maybe nothing."""

    def end_now(self) -> bool:
        """When that has been sent: `end`, as far as it goes without waiting; False where `end` has to be called."""


class Stream:
    """A byte stream over one TCP or Unix socket.

    While it carries a connection it is to be reset when it is closed, or when the process dies, until
    `complete` says that both directions are whole: nobody must take a part for the whole.  What a relay
    accepts is like that from the start (see `listen`), what it dials from `reset_on_close` on.
    """

    spliceable = hasattr(os, "splice")

    def __init__(self, sock: socket.socket, name: str, peer: Any = None) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.name = name
        """What it is in a log line: "service client 192.0.2.7:50312"."""
        self.peer = peer
        self.given_up = False
        """Blocked sends are to return with an error, and what was sent need not be delivered any more."""
        self._tcp = sock.family != socket.AF_UNIX
        self._fin_sent = False
        self.received = 0
        """Bytes that were taken from the socket, in whichever process, for `_believe_end`."""

    def recv_into(self, view: memoryview) -> int:
        count = self.sock.recv_into(view)
        self.received += count
        return count or self._believe_end()

    def recv_now(self, view: memoryview) -> int | None:
        """Like `recv_into`, but ``None`` where it would have to wait."""
        try:
            count = self.sock.recv_into(view, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        self.received += count
        return count or self._believe_end()

    def holds_bytes(self) -> bool:
        return False

    def _believe_end(self) -> int:
        """0, where a receive that gave 0 means the end.  Raises `ConnectionResetError` where it does not.

        The error of an RST is told once.  Where another thread's send takes it, a receive gives 0, as at a FIN;
        but only after an RST is the connection closed (TCP_CLOSE, byte 0 of Linux's tcp_info) while this side
        has not sent its own FIN.  Then a FIN may have come before the RST, as from a peer that has closed and is
        sent more: it counts as one more byte in tcpi_bytes_received, at byte 128.
        """
        if self._tcp and not self._fin_sent:
            try:
                info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
                closed = info[0] == 7 and struct.unpack_from("Q", info, 128)[0] <= self.received
            except (OSError, AttributeError):
                closed = False
            except struct.error:  # Linux before 4.1
                closed = info[0] == 7
            if closed:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        return 0

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it, however long the peer takes.  Raises `OSError`."""
        self._send_all(memoryview(data))

    def _send_all(self, view: memoryview, flags: int = 0) -> None:
        while view:
            try:
                view = view[self.sock.send(view, flags) :]
            except BlockingIOError:
                self.keep_trying()

    def keep_trying(self) -> None:
        """Called when a send has been blocked for a while.  Raises `ConnectionAbortedError` to give up."""
        if self.given_up:
            raise ConnectionAbortedError("given up")

    def send_now(self, data: bytearray, end_follows: bool = False) -> bool:
        """Send what can go without waiting, and remove it from `data`; True when all has gone.  Raises `OSError`.

        Where the end follows at once (not otherwise: a part is held back), both leave in one segment.
        """
        if data:
            try:
                del data[: self.sock.send(data, _NOW_WITH_END if end_follows else socket.MSG_DONTWAIT)]
            except BlockingIOError:
                pass
        return not data

    def send_buffer(self, view: memoryview, count: int) -> None:
        self._send_all(view[HEADER : HEADER + count])

    def bulk_ahead(self) -> int:
        return PIPE_SIZE

    def took_bulk(self, count: int) -> None:
        self.received += count

    def announce_bulk(self, count: int) -> None:
        pass

    def end(self, passed: int = 0) -> None:
        self._fin_sent = True
        self.sock.shutdown(socket.SHUT_WR)

    def pack(self, data: memoryview) -> bytes | memoryview:
        return data

    def pack_end(self, passed: int = 0) -> bytes:
        return b""

    def end_now(self) -> bool:
        self.end()
        return True

    def reset_on_close(self) -> None:
        """Have `close`, or the death of this process, reset the connection."""
        if self._tcp:
            ignore_oserror(self.sock.setsockopt, socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)

    def abort(self, force: bool = False) -> None:
        """Have `close` reset the connection, and wake whoever uses it."""
        self.reset_on_close()
        self.wake(force)

    def complete(self) -> None:
        """Both directions are whole: close normally, and let the kernel deliver what it still has."""
        if self._tcp:
            ignore_oserror(self.sock.setsockopt, socket.SOL_SOCKET, socket.SO_LINGER, CLOSE_NORMALLY)

    def wake(self, force: bool = False) -> None:
        """Make other threads' blocked receives return with an end; with `force` blocked sends soon give up.

        Only the receiving side is shut down, which sends nothing.  Shutting down the sending side would wake a
        blocked sender, too; but it sends a FIN, and that says "complete".
        """
        self.given_up = self.given_up or force
        ignore_oserror(self.sock.shutdown, socket.SHUT_RD)

    def close(self) -> None:
        """Close the socket; only its owner does, when no other thread uses it."""
        self.sock.close()

    def flush(self, timeout: float = FLUSH_TIMEOUT) -> None:
        """Wait until the peer has acknowledged what was sent: an RST would discard the rest.

        No descriptor turns readable at that moment, so this looks again and again, at growing intervals; only
        connections that end in an error come here.  It ends at once where the peer has reset the connection.
        """
        deadline, pause = Deadline(timeout), 1.0
        poller = select.poll()
        try:
            poller.register(self.sock, 0)
            while not self.given_up and unsent_bytes(self.sock) and deadline.remaining() and not poller.poll(pause):
                pause = min(2 * pause, 50.0)
        except (OSError, ValueError):
            pass  # gone already

    def rest(self) -> None:
        """Give back what a connection took and an idle link does not need."""

    def linger(self) -> None:
        """End, and wait a little for the peer's end: with its bytes unread, `close` would reset the connection,
        and the peer might lose what was sent to it last."""
        try:
            self.complete()
            self.sock.shutdown(socket.SHUT_WR)
            deadline, scrap = Deadline(1.0), memoryview(bytearray(4096))
            for _ in range(64):
                wait_for(self.fd, select.POLLIN, deadline)
                if self.sock.recv_into(scrap, 0, socket.MSG_DONTWAIT) == 0:
                    break
        except OSError:
            pass


_NOW_WITH_END = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_MORE", 0)


def carrier(leg: Leg) -> Stream:
    """The stream whose socket a leg's bytes go through."""
    if isinstance(leg, Link):
        return leg.stream
    assert isinstance(leg, Stream)
    return leg


def unsent_bytes(sock: socket.socket) -> int:
    """How many sent bytes the peer has not acknowledged (SIOCOUTQ); 0 where nobody can tell, or it is closed."""
    try:
        return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0\0\0\0"))[0])
    except (AttributeError, OSError, ValueError):
        return 0


def waiting_bytes(sock: socket.socket) -> int:
    """How many bytes a socket has taken and not sent yet (SIOCOUTQNSD); 0 where nobody can tell."""
    try:
        return int(struct.unpack("i", fcntl.ioctl(sock, 0x894B, b"\0\0\0\0"))[0]) if LINUX else 0
    except (OSError, ValueError):
        return 0


def ignore_oserror(function: Callable[..., Any], *args: Any) -> None:
    try:
        function(*args)
    except OSError:
        pass


def tls_fault(error: ssl.SSLError) -> OSError:
    """What the receiver of a TLS stream is to be told: `error`, or that the stream was cut off."""
    # Only Pythons from 3.10.11 and 3.11.3 on have SSLEOFError for it with OpenSSL 3.
    cut = isinstance(error, ssl.SSLEOFError) or error.reason == "UNEXPECTED_EOF_WHILE_READING"
    return ConnectionResetError("cut off without TLS close_notify") if cut else error


class TLSStream(Stream):
    """A TLS connection over one TCP socket: `ssl.SSLObject` between two memory BIOs.

    Two threads on one `ssl.SSLSocket` crash, and it cannot end one direction; so the TLS state is worked on
    under `_tls_lock`, and bytes go to and from the socket outside of it:

        receive   socket ─▶ _incoming ─▶ SSLObject.read ─▶ caller        one thread
        send      caller ─▶ SSLObject.write ─▶ _outgoing ─▶ socket       one thread, which holds _send_lock

    What reading makes the TLS state want to send (answers to KeyUpdate) stays in `_outgoing` for the next
    send, so that a receiver never waits for a peer that does not read; its amount is bounded.
    """

    spliceable = False

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        context: ssl.SSLContext,
        peer: Any = None,
        server_hostname: str | None = None,
        server_side: bool = False,
    ) -> None:
        super().__init__(sock, name, peer)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        try:
            self.tls = context.wrap_bio(
                self._incoming, self._outgoing, server_side=server_side,
                server_hostname=server_hostname and name_in_certificate(server_hostname),
            )  # fmt: skip
        except ValueError as error:
            raise OSError(f"{shown(server_hostname)} cannot be the name in a certificate") from error
        self._tls_lock = threading.Lock()  # over tls, both BIOs, _stash, _error, _answers
        self._send_lock = threading.Lock()  # keeps records in order on their way from _outgoing to the socket
        self._unsent = b""  # taken from _outgoing, not yet by the socket; under _send_lock
        self._stash = bytearray()  # decrypted when the sending direction was ended
        self._error: OSError | None = None
        self._answers = 0  # bytes in _outgoing that receiving has put there
        self._fruitless = 0  # encrypted bytes since the last decrypted one
        self._peer_ended = False  # it has sent close_notify
        self._raw = bytearray(SMALL_TLS_BUFFER)
        self._small_reads = 0

    def handshake(self, deadline: Deadline, stop: Stop | None = None) -> None:
        """Shake hands.  Raises `ssl.SSLError` (an `OSError`), `TimeoutError`, `EOFError` and `Stopping`."""
        while True:
            try:
                with self._tls_lock:
                    self.tls.do_handshake()
                    self._fruitless = 0
                return
            except ssl.SSLWantReadError:
                pass
            finally:
                self._flush_records()  # also the alert that says why it failed
            wait_for(self.fd, select.POLLIN, deadline, stop)
            if not self._receive(socket.MSG_DONTWAIT):
                raise EOFError("the connection was closed during the TLS handshake")

    def recv_into(self, view: memoryview) -> int:
        while (count := self._decrypt(view)) is None:
            self._receive()
        return count

    def recv_now(self, view: memoryview) -> int | None:
        try:
            while (count := self._decrypt(view)) is None:
                self._receive(socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        return count

    def holds_bytes(self) -> bool:
        return True

    def send(self, data: bytes | bytearray | memoryview) -> None:
        if data:
            with self._tls_lock:
                self.tls.write(data)
        self._flush_records()

    def send_now(self, data: bytearray, end_follows: bool = False) -> bool:
        if data:
            with self._tls_lock:
                self.tls.write(data)
            data.clear()
        return self._flush_records(socket.MSG_DONTWAIT)

    def send_buffer(self, view: memoryview, count: int) -> None:
        self.send(view[HEADER : HEADER + count])

    def end(self, passed: int = 0) -> None:
        self._end(0)

    def end_now(self) -> bool:
        return self._end(socket.MSG_DONTWAIT)

    def _end(self, flags: int) -> bool:
        """Send close_notify and FIN; False where it would have to wait, and is to be called again.

        What the peer has sent before is kept: `unwrap` would drop it.
        """
        with self._tls_lock:
            piece = memoryview(bytearray(BULK))
            try:
                while self._error is None and (count := self._read(piece)):
                    self._stash += piece[:count]
                self._peer_ended = self._error is None
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLZeroReturnError:
                self._peer_ended = True
            except ssl.SSLError as error:
                self._error = tls_fault(error)  # for the receiver, behind the stash
            try:
                self.tls.unwrap()
            except ssl.SSLError:
                pass  # the peer's own close_notify comes when it comes
            peer_ended = self._peer_ended
        try:
            if not self._flush_records(flags):
                return False
            super().end()
        except OSError as error:
            # Who has sent close_notify may close without waiting for ours, which its system answers with an RST.
            if not peer_ended or error.errno not in (errno.ENOTCONN, errno.EPIPE, errno.ECONNRESET):
                raise
        return True

    def _decrypt(self, view: memoryview) -> int | None:
        """Decrypted bytes that are here already: as many records as fit; 0 at close_notify, ``None`` for none."""
        with self._tls_lock:
            if self._stash:
                count = min(len(self._stash), len(view))
                view[:count] = self._stash[:count]
                del self._stash[:count]
                return count
            if self._error is not None:
                raise self._error
            have, before = 0, self._outgoing.pending
            try:
                while have < len(view) and (count := self._read(view[have:])):
                    have += count
                self._peer_ended = self._peer_ended or have < len(view)
            except ssl.SSLWantReadError:
                if not have and self._fruitless > MAX_FRUITLESS:
                    self._error = ConnectionResetError("the peer sends TLS messages without data again and again")
                    raise self._error from None
                return have or None
            except ssl.SSLZeroReturnError:
                self._peer_ended = True
                return have
            except ssl.SSLError as error:
                # Once only: after a fatal alert OpenSSL would call the next attempt a clean end.
                self._error = tls_fault(error)
                if not have:
                    raise self._error from None  # (an error that is its own cause would be a ring of its own)
            finally:
                self._answers += self._outgoing.pending - before
                if self._answers > MAX_ANSWERS:
                    self._error = ConnectionResetError("the peer makes TLS answer again and again")
            return have

    def _read(self, view: memoryview) -> int:
        """At close_notify this returns 0, or raises `ssl.SSLZeroReturnError` where ours has been sent."""
        count: int = self.tls.read(len(view), view)  # type: ignore[assignment]
        if count:
            self._fruitless = 0
        return count

    def _receive(self, flags: int = 0) -> bool:
        """Take encrypted bytes from the socket; False at its end.  Raises `BlockingIOError` where flags say so."""
        count = self.sock.recv_into(self._raw, 0, flags)
        with self._tls_lock:
            if count:
                self._fruitless += count
                self._incoming.write(memoryview(self._raw)[:count])
            else:
                self._incoming.write_eof()
        if count == len(self._raw) < LARGE_TLS_BUFFER:
            self._raw, self._small_reads = bytearray(8 * count), 0
        elif count < SMALL_TLS_BUFFER < len(self._raw):
            self._small_reads += 1
            if self._small_reads == SMALL_READS:
                self.rest()
        return count > 0

    def rest(self) -> None:
        """Give back the memory that bulk traffic took; by the receiving thread, when there is none any more."""
        self._raw = bytearray(SMALL_TLS_BUFFER)

    def close(self) -> None:
        super().close()
        # Its traceback leads back here: such a ring waits for the collector, with all that OpenSSL has allocated.
        self._error = None

    def _flush_records(self, flags: int = 0) -> bool:
        """Send what TLS has ready; True when nothing is left of it."""
        with self._send_lock:
            while True:
                if not self._unsent:
                    with self._tls_lock:
                        self._unsent, self._answers = self._outgoing.read(), 0
                if not self._unsent:
                    return True
                try:
                    while self._unsent:
                        self._unsent = self._unsent[self.sock.send(self._unsent, flags) :]
                except BlockingIOError:
                    if flags:
                        return False
                    self.keep_trying()


class Link:
    """A link that speaks protocol 1: control frames, and one connection at a time as a `Leg`.

    Between connections one thread uses it (on the server, whoever has taken it out of the pool); while
    it is spliced, one thread sends and one receives.  `close` is for the last of them.
    """

    def __init__(self, stream: Stream, role: str) -> None:
        self.stream = stream
        self.sock = stream.sock
        self.fd = stream.fd
        self.name = stream.name
        self.spliceable = stream.spliceable
        self.machine = LinkMachine(role)
        self.heartbeat = 0.0
        """Seconds between the server's PINGs, as it said in WELCOME."""
        self.passed = 0
        """Bytes of the present connection, or the last, that the relay client had passed on when it sent END."""
        self.spent = False
        """Not to be used again, since a new link would be faster: see `is_held_back`."""
        self._buffer = bytearray(512)  # what has been received beyond the last frame: [_start:_end]
        self._start = self._end = 0
        self._left = 0  # bytes of the present DATA frame that are still to come out of here

    def __repr__(self) -> str:
        return f"<Link {self.name} {self.machine.state}>"

    # Control frames

    def pack_control(self, kind: int, fields: dict[str, Any] | None = None) -> bytes:
        """A control frame, which has to be sent now."""
        self.machine.send(kind)
        if kind == START:
            self.passed = 0
        return encode_frame(kind, fields)

    def send(self, kind: int, fields: dict[str, Any] | None = None, also: bytes = b"") -> None:
        """Send a control frame, with further encoded frames behind it in the same call.  Raises `OSError`."""
        self.stream.send(self.pack_control(kind, fields) + also)

    def receive(self, deadline: Deadline, stop: Stop | None = None) -> Frame:
        """The next frame, waited for.  Raises `EOFError` at the end of the link, `LinkFault`, `OSError`."""
        frame = self.receive_held()
        while frame is None:
            wait_for(self.fd, select.POLLIN, deadline, stop)
            frame = self.receive_now()
        return frame

    def receive_held(self) -> Frame | None:
        """The next frame if the socket need not be asked for it; what is in the socket, poll tells."""
        return self.receive_now() if self.stream.holds_bytes() else self._decode()

    def receive_now(self) -> Frame | None:
        """The next frame if it is here, as a whole.  Raises as `receive` does."""
        while (frame := self._decode()) is None:
            count = self.stream.recv_now(self._space())
            if count is None:
                return None
            if count == 0:
                raise EOFError("the link was closed")
            self._end += count
        return frame

    def send_now(self, kind: int, fields: dict[str, Any] | None = None) -> None:
        """Send a control frame on an idle link.  Raises `OSError`, also where it would have to wait: a peer that
        does not even read that much is as good as dead, and must not hold up who looks after many links."""
        if not self.stream.send_now(bytearray(self.pack_control(kind, fields))):
            raise TimeoutError("the other side does not read")

    def refuse(self, code: str, reason: str) -> None:
        """Tell the peer why, as far as it listens.  The caller owns the link, and closes it."""
        ignore_oserror(self.stream.send_now, bytearray(encode_frame(REFUSED, {"code": code, "reason": reason})))

    def unread(self) -> bytes:
        """The bytes that have come in and are no frame yet."""
        return bytes(self._buffer[self._start : self._end])

    # The leg

    def recv_into(self, view: memoryview) -> int:
        count = self._recv(view, self.stream.recv_into)
        assert count is not None
        return count

    def recv_now(self, view: memoryview) -> int | None:
        return self._recv(view, self.stream.recv_now)

    def holds_bytes(self) -> bool:
        return self._start < self._end or self.stream.holds_bytes()

    def _recv(self, view: memoryview, receive: Callable[[memoryview], int | None]) -> int | None:
        """Bytes out of DATA frames; ``None`` where `receive` gives that."""
        while self._left == 0:
            if (frame := self._decode()) is None:
                count = receive(self._space())
                if count is None:
                    return None
                if count == 0:
                    raise ConnectionResetError("the link was lost")
                self._end += count
            elif frame.kind == END:
                self.passed = int(frame.number("passed", 0, 1 << 62))
                return 0
            elif frame.kind == ABORT:
                raise ConnectionAbortedError(shown(frame.text("reason") or "broken off by the other relay"))
        ahead = self._end - self._start
        if ahead:
            count = min(ahead, self._left, len(view))
            view[:count] = memoryview(self._buffer)[self._start : self._start + count]
            self._start += count
            rest = min(self._left, len(view)) - count
            if rest:  # it came with the header, most likely: so one message stays one
                try:
                    count += self.stream.recv_now(view[count : count + rest]) or 0
                except OSError:
                    pass  # the next call meets it again, or the end of the link
        else:
            count = receive(view[: self._left])
            if count is None:
                return None
            if count == 0:
                raise ConnectionResetError("the link was lost")
        self._left -= count
        return count

    def send_buffer(self, view: memoryview, count: int) -> None:
        self.machine.send(DATA)
        view[:HEADER] = encode_header(DATA, count)
        self.stream.send(view[: HEADER + count])

    def bulk_ahead(self) -> int:
        # Read exactly a header, nothing behind it: those bytes are to go from socket to socket.
        while self._left == 0 and self._end - self._start < HEADER:
            self._space()
            view = memoryview(self._buffer)[self._end : self._start + HEADER]
            count = self.stream.recv_into(view)
            if count == 0:
                raise ConnectionResetError("the link was lost")
            self._end += count
        if self._left == 0 and self._buffer[self._start] == DATA:
            self._decode()
        return self._left if self._start == self._end else 0

    def took_bulk(self, count: int) -> None:
        if count == 0:
            raise ConnectionResetError("the link was lost")
        self._left -= count

    def announce_bulk(self, count: int) -> None:
        self.machine.send(DATA)
        self.stream._send_all(memoryview(encode_header(DATA, count)), socket.MSG_MORE)

    def keep_trying(self) -> None:
        self.stream.keep_trying()

    def end(self, passed: int = 0) -> None:
        if not self.machine.has_ended(self.machine.role):  # otherwise `pack_end` was before this
            self.stream.send(self.pack_end(passed))

    def pack(self, data: memoryview) -> bytes | memoryview:
        self.machine.send(DATA)
        return encode_header(DATA, len(data)) + data

    def pack_end(self, passed: int = 0) -> bytes:
        return self.pack_control(END, {"passed": passed} if passed and self.machine.role == CLIENT else None)

    def end_now(self) -> bool:
        return True

    def abort(self, reason: str) -> None:
        if not self.machine.has_ended(self.machine.role):
            self.send(ABORT, {"reason": shown(reason)})

    def discard(self, deadline: Deadline, stop: Stop | None = None) -> int:
        """Receive and drop until the other side has ended its direction by END; returns how many bytes it were.

        Raises `ConnectionAbortedError` where it did so by ABORT, and `OSError`, also when more than `MOST_DISCARDED`
        bytes come after this side has ended its own direction: then a new link costs less than the rest.
        """
        scrap, dropped, after = memoryview(bytearray(4 * BULK)), 0, 0
        while not self.machine.has_ended(self.machine.peer):
            count = self.recv_now(scrap)
            if count is None:
                wait_for(self.fd, select.POLLIN, deadline, stop)
                continue
            dropped += count
            after += count if self.machine.has_ended(self.machine.role) else 0
            if after > MOST_DISCARDED:
                raise ConnectionResetError("the other side did not stop sending")
        return dropped

    def wake(self) -> None:
        """Make blocked calls of other threads return.  A FIN here deceives nobody: only END is an end."""
        ignore_oserror(self.sock.shutdown, socket.SHUT_RDWR)

    def close(self) -> None:
        self.stream.close()

    # Decoding

    def _decode(self) -> Frame | None:
        """The next frame out of the buffer, if it is there; of DATA, its head."""
        buffer, start = self._buffer, self._start
        if self._end - start < HEADER:
            return None
        kind, length = buffer[start], int.from_bytes(buffer[start + 1 : start + HEADER], "big")
        self.machine.check(kind, length)
        if kind == DATA:
            self._start += HEADER
            self._left = length
            return Frame(DATA, length)
        if self._end - start < HEADER + length:
            return None
        self._start += HEADER + length
        fields = decode_fields(kind, bytes(buffer[start + HEADER : start + HEADER + length]))
        self.machine.receive(kind)
        return Frame(kind, length, fields)

    def _space(self) -> memoryview:
        """Where the next bytes go; the buffer grows to one control frame and no further."""
        if self._start:
            self._buffer[: self._end - self._start] = self._buffer[self._start : self._end]
            self._end -= self._start
            self._start = 0
        if self._end == len(self._buffer):
            self._buffer.extend(bytes(HEADER + MAX_CONTROL - len(self._buffer)))
        return memoryview(self._buffer)[self._end :]


# --- Splicing -------------------------------------------------------------------------------------------------

OPENING_TIME = 0.25
"""Seconds for which one thread carries both directions of a connection: a round trip or two, also through the
internet and under load (measured: 64 connections at a time, 1,680 a second, and with 20 ms 1,180)."""
GREETING_DELAY = 0.002
"""Seconds for which a relay client's READY waits for the service's first bytes, to go with them in one message.
Where the service speaks TLS it does not wait: whether there are bytes is known only after the first look."""
OPENING_BYTES = 16384
"""Bytes that it carries each way at most: what is larger is worth a second thread, and the pumps' buffers."""
OPENING_BUFFER = 4096
"""Bytes that it takes at once; four times as many cost each of 2,000 held connections 3 KiB afterwards (measured)."""
SMALL_BUFFER = 256
"""A pump's first buffer: what an idle connection costs is mostly its two buffers and two stacks."""
LARGE_BUFFER = 8**3 * SMALL_BUFFER
"""A pump's buffer when reads fill the smaller ones: each has eight times as much."""
LARGE_TLS_BUFFER = 1 << 18
"""The same for bulk traffic where TLS is in between: it is twice as fast as 16 KiB."""
SMALL_TLS_BUFFER = 4096
"""What a TLS connection takes from its socket at once; filled, it grows by eight times and by eight times again."""
MAX_ANSWERS = 65536
"""Bytes of answers that a peer may make TLS prepare while there is nothing else to send."""
MAX_FRUITLESS = 65536
"""Bytes of TLS messages without data (KeyUpdate) in a row: more than a record, which may come in pieces."""
BULK = 16384
"""Reads of this size on are bulk traffic, worth passing through a pipe inside the kernel."""
PIPE_SIZE = 1 << 20
"""Bytes that a pipe for bulk traffic takes: Linux's limit for ordinary users.  It holds a page for each of the
fragments that packets come in, so less would fill up early (measured: 256 KiB cost 30 % more processor time)."""
PIPE_AGAIN = 256
"""So many large reads without one, since none was to be had, until it is asked for again."""
SMALL_READS = 4
"""So many small reads in a row end bulk traffic."""
SPARSE_READS = 16
"""So many reads in a row that the buffer before would have held have a pump begin with its first one again."""
HEAR_OUT_TIME = 1.0
"""Seconds for which the other side's end is waited for where its bytes can no longer be passed on; two round trips of
the link where that is more."""
MOST_DISCARDED = 1 << 20
"""Bytes that are received only to be dropped, behind this side's own end; for more, a link is closed."""


class LegError(ConnectionError):
    """A leg broke; the message names it."""

    def __init__(self, leg: Leg, error: OSError, held: int = 0) -> None:
        super().__init__(f"{leg.name}: {say_error(error)}")
        self.leg = leg
        self.cause = error
        self.held = held
        """Bytes of the other leg that this one did not take."""


class Flow:
    """One direction of a connection in its opening exchange, and what that leaves for the pump."""

    __slots__ = ("count", "ended", "error", "out", "sink", "source")

    def __init__(self, source: Leg, sink: Leg) -> None:
        self.source = source
        self.sink = sink
        self.out = bytearray()
        """For the sink, and not taken by its socket yet; so far `count` bytes of the connection."""
        self.count = 0
        self.ended = False
        """The source has come to its end."""
        self.error: OSError | None = None
        """What is to be raised when `out` has been sent."""


class Splice:
    """A stream and a link that carry one connection: the opening exchange, two pumps, and the record they share.

    Each direction ends by itself.  Where one breaks, the other is woken, what was read before is still sent,
    and nobody sees a clean end: the stream gets an RST, the link an ABORT or its own end.
    """

    def __init__(self, id: str, service: str, stream: Stream, link: Link | Stream, greeting: bytes = b"") -> None:
        """The `greeting` goes to the link first, with the stream's first bytes or soon."""
        self.id = id
        self.service = service
        self.stream = stream
        self.link = link
        self.reason = ""
        """Why it was broken off; empty while all is well."""
        self.to_link = self.from_link = 0
        """Bytes carried from the stream to the link and back; each is written by one pump."""
        self.opened = time.monotonic()
        self.thread = threading.get_ident()
        self.to_link_ended = False
        """The pump to the link has left, or there was nothing left for it to do."""
        self.said_end = False
        """The link was told that the stream has ended, and is complete."""
        self.from_link_ended = False
        self._flow_to_link, self._flow_from_link = Flow(stream, link), Flow(link, stream)
        self._flow_to_link.out += greeting
        self._lock = threading.Lock()  # reason, said_end, _broken_at, _over, _halted
        self._broken_at = 0.0
        self._over = False
        self._halted = False  # the pumps stop, whatever there is to carry
        # For the sweep alone: what was carried when it last looked, since when; and when it saw the stream lost.
        self._lost_at = 0.0
        self._seen = 0
        self._quiet_since = self.opened

    def run(self, threads: Threads) -> None:
        """Carry the connection until both directions have ended; then no other thread uses the legs.

        The caller owns both legs.  Afterwards a `Link` whose machine is not idle is of no further use.
        """
        self._converse()
        left = threading.Lock()
        left.acquire()
        if self.to_link_ended:
            left.release()
        elif self.from_link_ended:
            self._carry_to_link(left)
        else:
            try:
                threads.start(self._carry_to_link, left)
            except RuntimeError as error:
                self.break_off(str(error), close_link=True)
                return
        try:
            if not self.from_link_ended:
                self._carry_from_link()
        finally:
            left.acquire()
            with self._lock:
                self._over = True
        for leg in (self.stream, self.link):
            if not isinstance(leg, Stream):
                continue
            if not self.reason:
                leg.complete()
            elif not leg.given_up:
                leg.flush()
        if isinstance(self.link, Link):
            self.link.stream.rest()
            self.link.spent = is_held_back(self.link.sock, self.to_link)

    def break_off(self, reason: str, force: bool = False, close_link: bool = False) -> None:
        """End both directions with an error; any thread, any number of times, the first reason counts.

        Bytes that were read before still go out, for `FLUSH_TIMEOUT` at most; with `force` they do not.
        The pumps tell the other side by ABORT, and the link lives on, unless it is to be closed.
        """
        self._note(reason)
        with self._lock:
            # The legs are woken under the lock (that never blocks): when the connection is over, its link
            # may be carrying another one.
            if self._over:
                self.stream.given_up = self.stream.given_up or force  # what was sent is still being waited for
                if isinstance(self.link, Stream):
                    self.link.given_up = self.link.given_up or force
                return
            self._halted = True
            self.stream.abort(force)
            if isinstance(self.link, Stream):
                self.link.abort(force)
            elif close_link:
                self.link.wake()

    def _note(self, reason: str) -> None:
        """Remember why it failed.  The direction that is not concerned goes on to its own end, which will come."""
        with self._lock:
            if not self.reason and not self._over:
                self._broken_at = time.monotonic()
                self.reason = reason

    def lose(self, leg: Leg, now: float) -> None:
        """A leg's connection was seen to be reset, at this moment and maybe before; for one thread.

        A stream's peer that had ended its direction may merely have closed: see `_hear_out`.
        """
        if leg is self.stream and self._stream_has_ended() and isinstance(self.link, Link):
            self._lost_at = self._lost_at or now
            if now - self._lost_at < max(HEAR_OUT_TIME, 2 * round_trip(self.link.sock)):
                return
        self.break_off(f"{leg.name}: connection lost", close_link=leg is self.link)

    def check_time(self, now: float, idle_timeout: float, half_close_timeout: float, dead_path: float) -> None:
        """Break off what has carried no byte for too long, or is broken and does not leave; for one thread."""
        if self.reason:
            if now - self._broken_at > FLUSH_TIMEOUT:
                self.break_off(self.reason, force=True, close_link=True)
            return
        half_closed = self.to_link_ended != self.from_link_ended
        # In one number: millions of lists would have the collector of garbage look at all there is (measured:
        # 5,000 connections stood still for 100 ms every six seconds).
        state = (self.to_link + self.from_link) << 2 | self.to_link_ended << 1 | self.from_link_ended
        if idle_timeout or half_closed:
            # A slow reader takes bytes from the kernel's buffers long before a pump can add some.
            state = (state << 32 | unsent_bytes(self.stream.sock)) << 32 | unsent_bytes(self.link.sock)
        if state != self._seen:
            self._seen, self._quiet_since = state, now
        quiet = now - self._quiet_since
        if idle_timeout and quiet >= idle_timeout:
            self.break_off(f"idle for {idle_timeout:g} s", force=True)
        elif half_closed and half_close_timeout and quiet >= half_close_timeout:
            self.break_off(f"half closed and idle for {half_close_timeout:g} s", force=True)
        elif 0 < dead_path <= quiet and any(path_is_dead(leg.sock, dead_path) for leg in (self.stream, self.link)):
            # By RST: otherwise this kernel would go on sending, and its answers would keep the other side in the dark.
            carrier(self.link).reset_on_close()
            self.break_off("sent bytes are no longer acknowledged", force=True, close_link=True)

    def _converse(self) -> None:
        """The opening exchange: carry both directions in this thread, while the connection is young and small.

        Nothing here waits, except for the one ``poll``.  It is over when one direction has come to its plain end.
        What it leaves of the others, an error or what a socket did not take, their pumps find in the `Flow`.
        """
        flows = {flow.source.fd: flow for flow in (self._flow_from_link, self._flow_to_link)}
        poller = select.poll()
        for fd in flows:
            poller.register(fd, select.POLLIN)
        view, greeting = memoryview(bytearray(OPENING_BUFFER)), self._flow_to_link.out
        soon, until = time.monotonic() + GREETING_DELAY, time.monotonic() + OPENING_TIME
        ready = [fd for fd, flow in flows.items() if flow.source.holds_bytes()]
        try:
            while not (self.to_link_ended or self.from_link_ended):
                for fd in ready:
                    if not self._pass_on(flows[fd], view):
                        return
                now = time.monotonic()
                if now >= until or self._halted:
                    return
                ready = [fd for fd, _ in poller.poll(1000 * max(0.0, (soon if greeting else until) - now))]
                if greeting and self.stream.fd not in ready and time.monotonic() >= soon:
                    ready.append(self.stream.fd)
        except BaseException:
            self.break_off("unexpected error", force=True, close_link=True)
            raise

    def _pass_on(self, flow: Flow, view: memoryview) -> bool:
        """Pass on what is here in one direction, and its end; False where the rest is for a pump."""
        try:
            while flow.count < OPENING_BYTES and (count := flow.source.recv_now(view)) is not None:
                if self._halted:
                    return False
                if count == 0:
                    flow.ended = True
                    break
                flow.out += flow.sink.pack(view[:count])
                flow.count += count
                # A service's end often is right behind its bytes; END, sent with them, has come with them.
                if isinstance(flow.source, Link) and not flow.source.holds_bytes():
                    break
        except OSError as error:
            flow.error = LegError(flow.source, error)
        if flow.ended:
            with self._lock:
                if self.reason:
                    return False
                self.said_end = self.said_end or flow is self._flow_to_link
            flow.out += flow.sink.pack_end(self._passed())
        stream = carrier(flow.sink)
        try:
            if not stream.send_now(flow.out, end_follows=flow.ended and stream is flow.sink):
                return False
        except OSError as error:
            flow.out.clear()
            flow.error = LegError(flow.sink, error)
        if flow.error is not None:
            return False
        little = self._count(flow, flow.count) < OPENING_BYTES
        flow.count = 0
        if not flow.ended:
            return little
        try:
            if not flow.sink.end_now():
                return False
        except OSError as error:
            flow.error = error
            return False
        if flow is self._flow_to_link:
            self.to_link_ended = True
        else:
            self.from_link_ended = True
        return True

    def _count(self, flow: Flow, count: int) -> int:
        """Count bytes that were carried; returns how many it has been in this direction."""
        if flow is self._flow_to_link:
            self.to_link += count
            return self.to_link
        self.from_link += count
        return self.from_link

    def _carry_to_link(self, left: threading.Lock) -> None:
        try:
            try:
                self._pump(self._flow_to_link)
                with self._lock:
                    self.said_end = self.said_end or not self.reason
                if self.said_end:
                    self.link.end(self._passed())
            except OSError as error:
                # Where the stream failed, ABORT tells the other side, or on the raw wire an RST.  Where the link did,
                # it may be in the midst of a frame, which nothing can follow; the other pump still reads what it holds.
                stream_failed = isinstance(error, LegError) and error.leg is self.stream
                if stream_failed and isinstance(self.link, Stream):
                    self.break_off(say_error(error))
                else:
                    self._note(say_error(error))
                if not stream_failed and isinstance(self.link, Link):
                    self.link.wake()
            except BaseException:
                self.break_off("unexpected error", force=True, close_link=True)
                raise
            if self.reason and isinstance(self.link, Link):
                ignore_oserror(self.link.abort, self.reason)
        finally:
            self.to_link_ended = True
            left.release()

    def _carry_from_link(self) -> None:
        try:
            self._pump(self._flow_from_link)
            if not self.reason:
                self.stream.end()
        except LegError as error:
            if error.leg is self.link:
                # What ends the link's side ends the connection; an ABORT leaves the link itself whole.
                lost = not isinstance(error.cause, ConnectionAbortedError)
                self.break_off(say_error(error), close_link=lost)
            elif not self._hear_out(error.held):
                # The stream was reset: the other pump still reads what had come before the RST, then its error.
                self._note(say_error(error))
        except OSError as error:
            if not self._stream_has_ended():
                self._note(f"{self.stream.name}: {say_error(error)}")
        except BaseException:
            self.break_off("unexpected error", force=True, close_link=True)
            raise
        self.from_link_ended = True
        if self.reason and isinstance(self.link, Link):
            self._give_link_up(self.link)

    def _passed(self) -> int:
        """How many bytes for the stream will not hold up what comes next on the link: see `Leg.end`.

        With TLS none of them, before the end of that direction: ending it takes a message, which may have to wait.
        """
        return 0 if isinstance(self.stream, TLSStream) and not self.from_link_ended else self.from_link

    def _stream_has_ended(self) -> bool:
        """Whether the link was told that the stream has ended: what then takes no more has been closed by its peer."""
        with self._lock:
            return self.said_end

    def _hear_out(self, held: int) -> bool:
        """Whether the link's direction ends soon, where the stream's peer has closed and takes no more of it.

        Both peers have ended by themselves then, and both relays call the connection complete; `held` and what is
        dropped here count as carried, as they do at the other relay.
        """
        if not (self._stream_has_ended() and isinstance(self.link, Link)):
            return False
        try:
            patience = Deadline(max(HEAR_OUT_TIME, 2 * round_trip(self.link.sock)))
            self._count(self._flow_from_link, held + self.link.discard(patience))
        except OSError:
            return False
        return not self.reason

    def _give_link_up(self, link: Link) -> None:
        """After a broken connection: drop what still comes on the link, up to its end, or else have it closed."""
        if link.machine.has_ended(link.machine.peer):
            return  # whoever is behind the link has said all: it is whole, and maybe idle already
        try:
            if self._stream_has_ended():
                raise ConnectionResetError("after END only the link's own end says that something went wrong")
            link.discard(Deadline(FLUSH_TIMEOUT))
        except ConnectionAbortedError:
            pass  # the end that was waited for
        except OSError:
            link.wake()

    def _pump(self, flow: Flow) -> None:
        """Pass bytes on until the source ends or the connection is broken off.  Raises `LegError`."""
        self._finish_opening(flow)
        if not flow.ended:
            self._pump_all(flow)

    def _pump_all(self, flow: Flow) -> None:
        source, sink = flow.source, flow.sink
        size, small = SMALL_BUFFER, 0
        view = memoryview(bytearray(HEADER + size))
        data = view[HEADER:]
        while True:
            try:
                count = source.recv_into(data)
            except OSError as error:
                raise LegError(source, error) from error
            if count == 0 or self._halted:
                return
            try:
                sink.send_buffer(view, count)
            except OSError as error:
                raise LegError(sink, error, count) from error
            self._count(flow, count)
            small = small + 1 if count <= size // 8 else 0
            if count == size < LARGE_BUFFER:
                size *= 8
            elif size == LARGE_BUFFER and count >= BULK:
                if self._pump_bulk(flow):
                    return
                size, small = SMALL_BUFFER, 0
            elif size > SMALL_BUFFER and small >= SPARSE_READS:
                size, small = SMALL_BUFFER, 0
            else:
                continue
            view = memoryview(bytearray(HEADER + size))
            data = view[HEADER:]

    def _finish_opening(self, flow: Flow) -> None:
        """Send what the opening exchange could not, and raise the error that ended it."""
        try:
            try:
                carrier(flow.sink).send(flow.out)
            except OSError as error:
                raise LegError(flow.sink, error, flow.count) from error
            self._count(flow, flow.count)
            flow.out.clear()
            if flow.error is not None:
                raise flow.error
        finally:
            flow.error = None  # kept, its traceback would make a ring

    def _pump_bulk(self, flow: Flow) -> bool:
        """Pass bytes on while reads are large, on any processor; True at the source's end."""
        source, sink = flow.source, flow.sink
        queue = Queue(carrier(source).sock, carrier(sink).sock)
        roam()
        try:
            if source.spliceable and sink.spliceable and (pipe := _open_pipe()):
                return self._pump_in_kernel(flow, *pipe, queue)
            return self._pump_large(flow, queue)
        finally:
            queue.release()
            go_home()

    def _pump_large(self, flow: Flow, queue: Queue) -> bool:
        """The same through a large buffer; now and then False where a pipe would do, since there may be one again."""
        source, sink = flow.source, flow.sink
        view, small = memoryview(bytearray(HEADER + LARGE_TLS_BUFFER)), 0
        for _ in range(PIPE_AGAIN) if source.spliceable and sink.spliceable else itertools.count():
            if small == SPARSE_READS:
                return False
            try:
                count = source.recv_into(view[HEADER : HEADER + queue.bound])
            except OSError as error:
                raise LegError(source, error) from error
            if count == 0 or self._halted:
                return True
            try:
                sink.send_buffer(view, count)
            except OSError as error:
                raise LegError(sink, error, count) from error
            queue.sent(count)
            self._count(flow, count)
            small = small + 1 if count < BULK else 0
        return False

    def _pump_in_kernel(self, flow: Flow, reader: int, writer: int, queue: Queue) -> bool:
        """The same through a pipe, so that no byte comes into this process."""
        source, sink = flow.source, flow.sink
        small = 0
        try:
            while small < SMALL_READS:
                try:
                    ahead = source.bulk_ahead()
                    if not ahead:
                        return False
                    count = os.splice(source.fd, writer, min(ahead, queue.bound))
                    source.took_bulk(count)
                except OSError as error:
                    raise LegError(source, error) from error
                if self._halted:
                    return True
                if count == 0:
                    return False  # the end, or urgent data (splice stops there): `recv_into` can tell
                try:
                    sink.announce_bulk(count)
                    rest = count
                    while rest:
                        try:
                            rest -= os.splice(reader, sink.fd, rest)
                        except BlockingIOError:
                            sink.keep_trying()
                except OSError as error:
                    raise LegError(sink, error, count) from error
                queue.sent(count)
                self._count(flow, count)
                small = small + 1 if count < BULK else 0
            return False
        finally:
            os.close(reader)
            os.close(writer)


class Queue:
    """Bounds what waits for a sink: to about as much as passes in `HELD_TIME`.

    A relay would be a long queue otherwise: the system lets each of its sockets hold some megabytes, and the more,
    the more is taken from it at once (measured at 10 Mbit/s and 50 ms: 7.2 MB still came after a service client had
    said stop, 0.6 directly).  Whatever else that service client says waits behind them, and so does its end.

    What the system holds of a far source stays its affair, since such a path needs a large window.  So it is with a
    near one from when that turns out to be the slower side, or much passes: see `hold_little`.
    """

    HELD_TIME = 0.1
    """Seconds; how often the rate is looked at, too."""
    LEAST, MOST = UNSENT, PIPE_SIZE
    """Bytes: how little it bounds, since less would cost processor time, and where it bounds no longer."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self._source = source
        self._sink = sink
        self.bound = self.LEAST
        """Bytes: so many are taken from the source at once (and by TLS some more), and by the sink's socket before it
        has sent some.  It is one figure for both: a piece that is larger than what the socket takes would wait for
        0.2 s behind its own header, which is held back for it."""
        self._count, self._since = 0, time.monotonic()
        self._held = True
        """Nothing has told yet that the source needs a large window."""

    def sent(self, count: int) -> None:
        self._count += count
        now = time.monotonic()
        if (past := now - self._since) < self.HELD_TIME and self._count < self.MOST:
            return
        bound = int(min(max(self.LEAST, self.HELD_TIME * self._count / max(past, 1e-6)), self.MOST))
        self._count, self._since = 0, now
        if bound == self.MOST != self.bound or not self.bound / 2 <= bound <= 2 * self.bound:
            self.bound = bound
            limit_unsent(self._sink, bound if bound < self.MOST else 0)
        if self._held and (bound == self.MOST or not waiting_bytes(self._sink)):
            self._held = False
            hold_much(self._source)

    def release(self) -> None:
        """Have the sink take as little as before."""
        if self.bound != self.LEAST:
            limit_unsent(self._sink)


def _open_pipe() -> tuple[int, int] | None:
    """A pipe for bulk traffic; ``None`` where there is none to be had, and copying is better."""
    try:
        reader, writer = os.pipe()
    except OSError:
        return None  # out of descriptors
    if _widen_pipe(writer) < BULK:
        os.close(reader)
        os.close(writer)
        return None  # the user has many pipes, and gets only small ones now
    return reader, writer


def _widen_pipe(pipe: int) -> int:
    """Give a pipe `PIPE_SIZE` bytes, if the system allows; returns how many it has."""
    try:
        return fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    except OSError:
        return fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)


BATCH = 256
"""Connections or links that are looked at without a pause, for about a millisecond."""


def in_batches(items: list[ItemT]) -> Iterator[list[ItemT]]:
    """Cut a long list into pieces, with a pause between them: threads that have bytes to carry wait for the
    interpreter lock."""
    for first in range(0, len(items), BATCH):
        if first:
            time.sleep(0.0001)
        yield items[first : first + BATCH]


ItemT = TypeVar("ItemT")


class Splices:
    """The connections of one role: how many there may be, and the watch over them."""

    def __init__(self, most: int, idle_timeout: float, half_close_timeout: float, dead_path: float = 0.0) -> None:
        """Times in seconds; 0 is never."""
        self.most = most
        self._idle_timeout = idle_timeout
        self._half_close_timeout = half_close_timeout
        self._dead_path = dead_path
        self._condition = threading.Condition()  # over the two below
        self._admitted = 0
        self._all: set[Splice] = set()
        self.show: Callable[[int], object] = lambda count: None
        """Called with the number of those that are admitted, whenever it changes, under the lock."""

    def __len__(self) -> int:
        return len(self._all)

    def admit(self) -> bool:
        """Count in what has or may get a connection: on the server a service client, on the client a link.

        False where there are as many as there may be.  Each one counted in calls `leave`.
        """
        with self._condition:
            if self._admitted >= self.most:
                return False
            self._admitted += 1
            self.show(self._admitted)
            return True

    def leave(self) -> None:
        with self._condition:
            self._admitted -= 1
            self.show(self._admitted)
            self._condition.notify_all()

    def add(self, splice: Splice) -> None:
        """Watch a connection from now on."""
        with self._condition:
            self._all.add(splice)

    def remove(self, splice: Splice) -> None:
        with self._condition:
            self._all.discard(splice)
            self._condition.notify_all()

    def snapshot(self) -> list[Splice]:
        with self._condition:
            return list(self._all)

    def drain(self, deadline: Deadline) -> None:
        """Wait until all that was admitted has left, or for the deadline; `hurry` makes it look again."""
        with self._condition:
            while self._admitted and deadline.remaining() != 0:
                self._condition.wait(deadline.remaining())

    def hurry(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def break_off_all(self, reason: str, deadline: Deadline) -> None:
        """Break off all connections and wait for their end, waking them again until it has come."""
        me = threading.get_ident()
        while (splices := self.snapshot()) and deadline.remaining() != 0:
            for splice in splices:
                splice.break_off(reason, force=True, close_link=True)
            with self._condition:
                if all(splice.thread == me for splice in self._all):
                    return
                self._condition.wait(0.05)

    @property
    def interval(self) -> float:
        """Seconds between two sweeps, short enough for the shortest time-out."""
        timeouts = [t for t in (self._idle_timeout, self._half_close_timeout) if t > 0]
        return min([1.0] + [t / 4 for t in timeouts])

    def sweep(self) -> None:
        """Break off what has been idle or half closed for too long, and what is dead without a pump noticing.

        A pump that is blocked in a send does not see that the connection it reads from was reset, and one
        that has done its direction no longer sees that the link is lost: so look at all of them in one poll.
        """
        for batch in in_batches(self.snapshot()):
            self._sweep(batch)

    def _sweep(self, splices: list[Splice]) -> None:
        now = time.monotonic()
        poller = select.poll()
        by_fd: dict[int, Splice] = {}
        for splice in splices:
            splice.check_time(now, self._idle_timeout, self._half_close_timeout, self._dead_path)
            # A link that has ended after END is lost; on the raw wire that is what its end looks like.
            watched = _RDHUP if splice.from_link_ended and isinstance(splice.link, Link) else 0
            poller.register(splice.stream.fd, 0)
            poller.register(splice.link.fd, watched)
            by_fd[splice.stream.fd] = by_fd[splice.link.fd] = splice
        for fd, events in poller.poll(0):
            if events & (select.POLLERR | _RDHUP):
                splice = by_fd[fd]
                splice.lose(splice.link if fd == splice.link.fd else splice.stream, now)


_RDHUP: int = getattr(select, "POLLRDHUP", 0)


def path_is_dead(sock: socket.socket, seconds: float) -> bool:
    """Whether sent bytes have gone without any acknowledgement for so many seconds; 0 is never.

    A living peer that does not read acknowledges the probes of its closed window, so it does not count.
    Reads `struct tcp_info` of Linux: tcpi_unacked at byte 24, tcpi_last_ack_recv (ms) at byte 56.
    """
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60)
        unacked, last_ack = struct.unpack_from("I", info, 24)[0], struct.unpack_from("I", info, 56)[0]
    except (OSError, AttributeError, struct.error):
        return False
    return bool(seconds and unacked and last_ack > 1000 * seconds)


FEW_SEGMENTS = 20
"""A slow-start threshold at which a connection is always held back: twice the window with which a new one begins
(RFC 6928), which has no threshold.  Losses of 1 % lead to 8 or so, of 0.1 % to 27 (half of the window at which a
packet is lost, 1.22 divided by the square root of the share: Mathis and others, 1997)."""


def is_resent(sock: socket.socket) -> bool:
    """Whether what was sent has been sent again twice without an acknowledgement, at the times of this path itself.

    Reads `struct tcp_info` of Linux: tcpi_retransmits at byte 2, tcpi_unacked at byte 24.
    """
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)
        return bool(struct.unpack_from("I", info, 24)[0] and info[2] >= 2)
    except (OSError, AttributeError, struct.error):
        return False


def round_trip(sock: socket.socket) -> float:
    """Seconds of a connection's round trip; 0 where nobody can tell.  Reads Linux's tcpi_rtt (µs), at byte 68."""
    try:
        return float(struct.unpack_from("I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 72), 68)[0]) / 1e6
    except (OSError, AttributeError, struct.error):
        return 0.0


def is_near(sock: socket.socket) -> bool:
    """Whether a connection's shortest round trip, of the last five minutes, is below `NEAR`.

    Reads tcpi_min_rtt (µs), at byte 148 of Linux's tcp_info; the mean has delayed acknowledgements in it, some 40 ms
    even on loopback.  True where nobody can tell, False before the first sample.
    """
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 152)
        return bool(struct.unpack_from("I", info, 148)[0] < NEAR * 1e6)
    except (OSError, AttributeError, struct.error):
        return True


def say_path(sock: socket.socket) -> str:
    """A remark for the log where a connection's path is slow; "" where it is not, or nobody can tell."""
    seconds = round_trip(sock)
    return f"; the path is slow: a round trip takes {seconds:.1f} s" if seconds >= SLOW_PATH else ""


SLOW_PATH = 1.0
"""Seconds of a round trip that are worth a remark: a queue that fills up before a saturated uplink."""


def is_held_back(sock: socket.socket, sent: int) -> bool:
    """Whether a connection that has lost packets would now take longer than a new one for as many bytes as it has just
    sent: its threshold is below a quarter of them (measured over 40 ms and 100 Mbit/s: 2 MB take 0.21 s on a new
    one, and 1.6 s at a threshold of 30 segments).

    Reads `struct tcp_info` of Linux: tcpi_snd_mss at byte 16, tcpi_snd_ssthresh at 76, tcpi_total_retrans at 100.
    """
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        size, threshold, lost = (struct.unpack_from("I", info, offset)[0] for offset in (16, 76, 100))
    except (OSError, AttributeError, struct.error):
        return False
    return bool(lost) and threshold <= max(FEW_SEGMENTS, sent // (4 * max(size, 1)))


# --- Threads --------------------------------------------------------------------------------------------------


class Threads:
    """Runs functions in threads, and parks each thread for the next one: starting one for every connection
    would halve the connection rate.

    The thread that was parked last is used first, so that those a burst has left behind can go.  These are
    plain threads, not `threading.Thread` objects: those cost 2.6 KiB more each (measured), and `Thread.start`
    waits for the new thread, which may never come where memory is short.
    """

    PARKED = 2.0
    """Seconds that a thread waits for a function before it goes."""
    LOOK, LOOKS = 0.1, 12
    """Seconds of a look at who has not left at the end, and how many such looks: more than `Stream.linger` takes.  A
    process that was stopped meanwhile has slept through one of them."""

    def __init__(self) -> None:
        self._condition = threading.Condition()  # over the three below
        self._parked: list[_Worker] = []
        self._workers: set[_Worker] = set()
        self._ended = False

    def __len__(self) -> int:
        return len(self._workers)

    def start(self, function: Callable[..., object], *args: Any) -> None:
        """Run `function` in a thread.  Raises `RuntimeError` where none can be had."""
        with self._condition:
            if self._ended:
                raise RuntimeError("ending")
            worker = self._parked.pop() if self._parked else None
            if worker is None:
                worker = _Worker(self)
                self._workers.add(worker)
                fresh = True
            else:
                fresh = False
            worker.task = (function, args)
        if not fresh:
            worker.wake.release()
            return
        try:
            with _stack_size_lock:
                before = threading.stack_size(STACK_SIZE)
                try:
                    _thread.start_new_thread(worker.run, ())
                finally:
                    threading.stack_size(before)
        except (RuntimeError, MemoryError) as error:
            self.leave(worker)
            raise RuntimeError("cannot start a thread") from error

    def park(self, worker: _Worker) -> bool:
        """Keep a thread that has done its work; False where it is to go."""
        with self._condition:
            if not self._ended:
                self._parked.append(worker)
            return not self._ended

    def unpark(self, worker: _Worker) -> bool:
        """Let a parked thread go; False where it has just been given a function."""
        with self._condition:
            if worker not in self._parked:
                return False
            self._parked.remove(worker)
            return True

    def is_mine(self) -> bool:
        """Whether the caller runs in one of these threads."""
        me = threading.get_ident()
        with self._condition:
            return any(worker.ident == me for worker in self._workers)

    def leave(self, worker: _Worker) -> None:
        with self._condition:
            self._workers.discard(worker)
            self._condition.notify_all()

    def end(self, deadline: Deadline) -> list[str]:
        """Start nothing more, wait for all threads but the caller's own, and name those that did not leave.

        It does not wait for the deadline where `LOOKS` times in a row nobody has left: in a look-up of a name, say,
        nobody can be woken.
        """
        with self._condition:
            self._ended = True
            parked, self._parked = self._parked, []
        for worker in parked:
            worker.wake.release()
        me = threading.get_ident()

        def others() -> list[_Worker]:
            return [worker for worker in self._workers if worker.ident != me]

        looks = 0
        with self._condition:
            while others() and looks < self.LOOKS and deadline.remaining() != 0:
                looks = 0 if self._condition.wait(self.LOOK) else looks + 1
            tasks = [worker.task for worker in others()]  # a task is taken away without the lock
            return [task[0].__name__ for task in tasks if task]


STACK_SIZE = 256 * 1024
_stack_size_lock = threading.Lock()  # the size is one for the whole process


class _Worker:
    """One thread of `Threads`: what it runs, and the lock it waits for while it is parked."""

    __slots__ = ("ident", "owner", "task", "wake")

    def __init__(self, owner: Threads) -> None:
        self.owner = owner
        self.wake = threading.Lock()
        self.wake.acquire()
        self.task: tuple[Callable[..., object], tuple[Any, ...]] | None = None
        self.ident = 0

    def run(self) -> None:
        self.ident = threading.get_ident()
        try:
            while self.task is not None:
                function, args = self.task
                try:
                    function(*args)
                except Exception:
                    logging.getLogger("tcprelay").exception("unexpected error in %s", function.__name__)
                self.task = function = args = None  # type: ignore[assignment]
                if not self.owner.park(self):
                    return
                if not self.wake.acquire(timeout=Threads.PARKED) and not self.owner.unpark(self):
                    self.wake.acquire()
        finally:
            self.owner.leave(self)


def choose_processor(number: int) -> None:
    """Have all threads of this process run on one processor, the `number`-th of those that it may use.

    Only one of them can run Python at a time, and waking the next one on another processor costs more than what it
    then does (measured on two processors: 1,750 new connections a second, and 4,200 this way; 13,000 and 28,000
    requests over 64 connections).  For the commands; a program that embeds a relay has threads of its own.
    """
    if hasattr(os, "sched_setaffinity") and has_interpreter_lock():
        processors = sorted(os.sched_getaffinity(0))
        _home.processors = {processors[number % len(processors)]}
        _home.all = set(processors)
        ignore_oserror(os.sched_setaffinity, 0, _home.processors)


def roam() -> None:
    """Let this thread run on any processor: it carries bulk traffic, which does not need the interpreter."""
    if _home.processors and not getattr(_roaming, "now", False):
        _roaming.now = True
        ignore_oserror(os.sched_setaffinity, 0, _home.all)


def go_home() -> None:
    """Have this thread run with the others again."""
    if getattr(_roaming, "now", False):
        _roaming.now = False
        ignore_oserror(os.sched_setaffinity, 0, _home.processors)


class _Home:
    processors: set[int] = set()
    """The one where the threads of this process run; none where they may run on all."""
    all: set[int] = set()


_home = _Home()
_roaming = threading.local()


# --- Events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened, told once: the log, the counters and ``on_event`` all get the same object.

    A class says its line in the log, with its fields in it, and the level of that line.
    """

    level = logging.INFO
    says = ""
    floods = False
    """Strangers can bring it about as often as they like: see `Events`."""
    of_all = False
    """It is about the role as a whole: of several workers the parent tells it, once for all of them."""

    def __str__(self) -> str:
        return self.says.format_map({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkUp(Event):
    """A link is ready for a connection."""

    level = logging.DEBUG
    says = "service {service}: link with {peer} is up"
    service: str
    peer: str
    client: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkDown(Event):
    """A link is gone."""

    level = logging.DEBUG
    says = "service {service}: link with {peer} is down: {reason}"
    service: str
    peer: str
    client: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionOpened(Event):
    """A service client and its service are connected; `via` is the relay client, or the service that was dialled."""

    id: str
    service: str
    peer: str
    via: str

    def __str__(self) -> str:
        return f"[{self.id}] service {self.service}: connection from {self.peer} opened via {self.via}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionClosed(Event):
    """The closing record of a connection.  `bytes_in` went to the service; `reason` is empty if all is whole."""

    id: str
    service: str
    peer: str
    bytes_in: int
    bytes_out: int
    seconds: float
    reason: str

    def __str__(self) -> str:
        outcome = f"broken off ({self.reason})" if self.reason else "complete"
        return (
            f"[{self.id}] service {self.service}: connection from {self.peer} {outcome}"
            f" after {self.seconds:.3f} s, {self.bytes_in} bytes in, {self.bytes_out} bytes out"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionFailed(Event):
    """The closing record of a connection that was never opened: the service client gets an RST."""

    level = logging.WARNING
    says = "[{id}] service {service}: connection from {peer} refused: {reason}"
    floods = True
    id: str
    service: str
    peer: str
    seconds: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Draining(Event):
    """`end` has begun; open connections have until the drain time-out."""

    says = "ending: waiting up to {seconds:g} s for open connections: {connections}"
    connections: int
    seconds: float


class Events:
    """Tells events to the log, to the counters and to ``on_event``.

    Of events that strangers can bring about at will, the log gets `MOST_LINES` of a kind in a second, and one line
    that counts the others; the counters and ``on_event`` get them all.
    """

    MOST_LINES = 10

    def __init__(self, logger: logging.Logger, on_event: Callable[[Event], object] | None) -> None:
        self._logger = logger
        self._on_event = on_event
        self.pass_on: Callable[[Event], object] | None = None
        """In a worker: tells the parent what is `of_all`."""
        self._lock = threading.Lock()  # over the two below
        self.counts = {"connections": 0, "failed": 0, "broken": 0, "bytes_in": 0, "bytes_out": 0}
        self._floods: dict[type[Event], tuple[float, int]] = {}  # since when, how many

    def __call__(self, event: Event) -> None:
        if event.of_all and self.pass_on is not None:
            self.pass_on(event)
            return
        with self._lock:
            if isinstance(event, ConnectionClosed):
                self.counts["connections"] += 1
                self.counts["broken"] += bool(event.reason)
                self.counts["bytes_in"] += event.bytes_in
                self.counts["bytes_out"] += event.bytes_out
            elif isinstance(event, ConnectionFailed):
                self.counts["failed"] += 1
        if self._logger.isEnabledFor(event.level) and (not event.floods or self._may_log(type(event))):
            self._logger.log(event.level, "%s", event, extra={"event": event})
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception:
                self._logger.exception("on_event failed for %s", type(event).__name__)

    def _may_log(self, kind: type[Event]) -> bool:
        self.tell_floods()
        with self._lock:
            since, count = self._floods.get(kind, (time.monotonic(), 0))
            self._floods[kind] = since, count + 1
            return count < self.MOST_LINES

    def tell_floods(self) -> None:
        """Count, in a line for each kind, what was left out in a second that is over.  To be called now and then."""
        if not self._floods:
            return
        now = time.monotonic()
        with self._lock:
            over = [kind for kind, (since, _) in self._floods.items() if now - since >= 1.0]
            told = [(kind, self._floods.pop(kind)[1] - self.MOST_LINES) for kind in over]
        for kind, more in told:
            if more > 0:
                self._logger.log(kind.level, "%d more lines like that (%s) are left out", more, kind.__name__)


# --- Options --------------------------------------------------------------------------------------------------
#
# An option is a field of an options class; its metadata say the rest.  The command line, the environment, the
# configuration file, --help, the README's table (a test compares it) and the constructors all come from there.


@dataclass(frozen=True)
class Option:
    """What a field of an options class says about its option."""

    parse: Callable[[str], Any]
    """From text; raises `ValueError` that says what is accepted."""
    help: str
    group: str
    metavar: str
    spelling: str
    """node-tcp-relay's name for it, where it has one."""
    many: bool
    secret: bool
    secures: bool
    """It keeps somebody out.  A variable that is there and empty is then a mistake: whoever set it does not rely on the
    default.  Other empty variables count as not given (Compose passes on what is not set as empty)."""
    default: str
    """The default in words."""


LONGEST_SECRET = 65536
"""Bytes of the line that holds a secret, at most."""
EMPTY = " "
"""Stands for an empty value, of which ConfigArgParse makes none at all where an option can stand alone."""
OPTION_GROUPS = ("Addresses", "Trust", "TLS", "Links", "Connections", "Running")


def option(
    default: Any,
    parse: Callable[[str], Any],
    help: str,
    *,
    group: str,
    metavar: str = "",
    spelling: str = "",
    many: bool = False,
    secret: bool = False,
    secures: bool = False,
    shown_default: str | None = None,
) -> Any:
    """A field of an options class; those of the groups Trust and TLS all secure."""
    if shown_default is None:
        shown_default = "" if default in (None, (), "") else str(default).lower().removesuffix(".0")
    secures = secures or group in ("Trust", "TLS")
    info = Option(parse, help, group, metavar, spelling, many, secret, secures, shown_default)
    return field(default=default, repr=not secret, metadata={"option": info})


def trim(text: str) -> str:
    """A value without what does not belong to it: blanks and line ends around it, and the byte order mark that some
    editors and shells put first.  The same for every option from every source, and for what a secret's file holds:
    else one side takes for a part of the token what the other leaves out."""
    return text.strip(" \t\r\n\v\f\ufeff")


def has_controls(text: str) -> bool:
    return any(c < " " or c == "\x7f" for c in text)


def parse_flag(text: str) -> bool:
    if text.lower() not in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        raise ValueError("true or false")
    return text.lower() in ("true", "yes", "on", "1")


def parse_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 2e6:  # poll takes no more milliseconds than that
        raise ValueError("a number of seconds, 0 or more")
    return seconds


def parse_heartbeat(text: str) -> float:
    try:
        seconds = parse_seconds(text)
    except ValueError:
        seconds = 0.0
    if not 0.05 <= seconds <= 3600:
        raise ValueError("a number of seconds from 0.05 to 3600")
    return seconds


def parse_keepalive(text: str) -> float:
    try:
        seconds = parse_seconds(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 20_000:  # Linux takes up to 32,767
        raise ValueError("a number of seconds from 1 to 20000")
    return seconds


def parse_count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise ValueError("a whole number, 0 or more")
    return int(text)


def parse_positive(text: str) -> int:
    if not parse_count(text):
        raise ValueError("a whole number, 1 or more")
    return int(text)


def parse_workers(text: str) -> int:
    if parse_count(text) > 64:
        raise ValueError("a whole number from 0 to 64")
    return int(text)


def parse_host(text: str) -> str:
    """A host name or address; brackets around an IPv6 one are taken off.  Or ``unix:PATH``."""
    if text.startswith("unix:"):
        return str(parse_endpoint(text))
    if not text or not text.isprintable() or set(text) & set(" \"'/"):
        raise ValueError("a host name or an address")
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def parse_secret(text: str) -> str:
    if not text:
        raise ValueError("something that is not empty")
    if "\n" in text or "\r" in text:
        raise ValueError("one line of text")
    return text


def parse_path(text: str) -> str:
    if not text or has_controls(text):
        raise ValueError("the path of a file")
    return text


def parse_tls(text: str) -> str:
    """``--tls`` alone secures the links ("relay"), ``--tls both`` everything, as in node-tcp-relay."""
    if text in ("both", "relay", "service"):
        return text
    try:
        return "relay" if parse_flag(text) else ""
    except ValueError:
        raise ValueError("true, both, service or false") from None


def parse_name(text: str) -> str:
    """The name of a service: letters, digits and ``._-``."""
    if not 0 < len(text) <= 64 or not all(c.isascii() and (c.isalnum() or c in "._-") for c in text):
        raise ValueError("a name of 1 to 64 letters, digits, dots, dashes and underscores")
    return text


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(" or ".join(choices))
        return text.lower()

    return parse


def from_descriptor_limit() -> int:
    """How many connections the limit on open descriptors allows: each may need two sockets and a pipe."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except ImportError:
        limit = 1024
    return 100_000 if limit < 0 or limit > 400_000 else max(16, (limit - 64) // 4)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of both roles."""

    idle_timeout: float = option(
        0.0, parse_seconds, "seconds without a byte either way that end a connection; 0 is never",
        group="Connections", metavar="SECONDS")  # fmt: skip
    half_close_timeout: float = option(
        3600.0, parse_seconds,
        "seconds without a byte that end a connection of which one direction has ended; 0 is never",
        group="Connections", metavar="SECONDS")  # fmt: skip
    dead_path: float = option(
        900.0, parse_seconds,
        "seconds for which nothing that was sent is acknowledged, and keepalive goes unanswered, that end a "
        "connection; 0 is never", group="Connections", metavar="SECONDS")  # fmt: skip
    keepalive: float = option(
        20.0, parse_keepalive, "seconds of silence after which TCP asks whether the other side is there, and up to "
        "half as many more: less than what a NAT on the way remembers", group="Links", metavar="SECONDS")  # fmt: skip
    wire: str = option(
        "v1", one_of("v1", "raw"),
        "what is spoken on the links: v1, or raw to work with node-tcp-relay; the same on both sides",
        group="Links", metavar="v1|raw")  # fmt: skip
    token: str = option(
        "", parse_secret, "secret that server and client prove to each other; better given by file or environment",
        group="Trust", metavar="SECRET", secret=True)  # fmt: skip
    secret: str = option(
        "", parse_secret, "node-tcp-relay 0.0.13's shared key; --wire raw only, crosses the wire readable",
        group="Trust", metavar="KEY", secret=True)  # fmt: skip
    token_file: str = option(
        "", parse_path, "file whose first line is the token", group="Trust", metavar="FILE")  # fmt: skip
    tls: str = option(
        "", parse_tls, "TLS on the links; both: on the service ports (server), or to the service (client), as well; "
        "service: there alone", group="TLS", metavar="both|service")  # fmt: skip
    cert: str = option(
        "", parse_path, "this side's certificate and its chain, PEM", group="TLS", metavar="FILE")  # fmt: skip
    key: str = option(
        "", parse_path, "its private key, PEM; without it, the one in --cert", group="TLS", metavar="FILE")  # fmt: skip
    pfx: str = option(
        "", parse_path, "certificate, chain and key in one PFX (PKCS #12) file, instead of --cert and --key",
        group="TLS", metavar="FILE", spelling="pfx")  # fmt: skip
    passphrase: str = option(
        "", parse_secret, "passphrase of --pfx or --key; better given by file or environment",
        group="TLS", metavar="SECRET", spelling="passphrase", secret=True)  # fmt: skip
    passphrase_file: str = option(
        "", parse_path, "file whose first line is the passphrase", group="TLS", metavar="FILE")  # fmt: skip
    ca_file: str = option(
        "", parse_path, "CA certificates, PEM, that the other side's certificate is verified against",
        group="TLS", metavar="FILE", spelling="caFile")  # fmt: skip
    tls_min: str = option(
        "1.2", one_of("1.2", "1.3"), "oldest version of TLS that is spoken",
        group="TLS", metavar="1.2|1.3")  # fmt: skip
    drain_timeout: float = option(
        10.0, parse_seconds, "seconds that open connections have to finish at SIGTERM or SIGINT",
        group="Running", metavar="SECONDS")  # fmt: skip
    workers: int | None = option(
        None, parse_workers, "processes to spread over; 0 is this one alone, as always in programs that embed it",
        group="Running", metavar="N", shown_default="half as many as processors, at most 4; 0 for 1")  # fmt: skip
    log_level: str = option(
        "info", one_of("debug", "info", "warning", "error"), "least weight of what is logged to standard error",
        group="Running", metavar="debug|info|warning|error")  # fmt: skip
    log_format: str = option(
        "text", one_of("text", "json"), "a line of text or a JSON object for each log record",
        group="Running", metavar="text|json")  # fmt: skip

    def __post_init__(self) -> None:
        self._check_values()
        if self.token and self.token_file:
            raise ValueError("give --token or --token-file, not both")
        if self.passphrase and self.passphrase_file:
            raise ValueError("give --passphrase or --passphrase-file, not both")
        if self.cert and self.pfx:
            raise ValueError("give --cert or --pfx, not both")
        if self.key and not self.cert:
            raise ValueError("--key is of no use without --cert")
        if self.wire == "raw" and (self.token or self.token_file):
            raise ValueError("--wire raw cannot check a token: leave it out, or use --wire v1 on both sides")
        if self.secret and self.wire != "raw":
            raise ValueError("--secret is for --wire raw; otherwise use --token")

    def _check_values(self) -> None:
        """Have values that come from a program judged like those of the command line; ``None`` is the default."""
        for item in dataclasses.fields(self):
            info, value = item.metadata["option"], getattr(self, item.name)
            if value is None:
                value = item.default
            elif not info.many and value != item.default:
                try:
                    value = info.parse(trim(str(value)))
                except ValueError as error:
                    said = "" if info.secret else f" {shown(value)!r}"
                    raise ValueError(f"{item.name}{said}: expected {error}") from None
            object.__setattr__(self, item.name, value)

    def read_token(self) -> bytes:
        """The token, from wherever it is; empty where there is none.  Raises `OSError` and `ValueError`."""
        if self.token_file:
            return read_secret("--token-file", self.token_file)
        return self.token.encode("utf-8", "surrogateescape")

    def read_passphrase(self) -> str:
        """The passphrase, likewise."""
        if self.passphrase_file:
            return read_secret("--passphrase-file", self.passphrase_file).decode("utf-8", "surrogateescape")
        return self.passphrase


def read_secret(name: str, path: str) -> bytes:
    """The first line of a file, trimmed.  Raises `OSError`, and `ValueError` where it is not a line of text."""
    try:
        with open(path, "rb") as file:
            line = file.readline(LONGEST_SECRET + 1)
    except OSError as error:
        raise OSError(error.errno, f"{name} {path}: {say_error(error)}") from error
    # PowerShell writes UTF-16 with a mark, others without: then every other byte of ASCII is 0.
    halves_are_zero = b"\0" in line and not (any(line[::2]) and any(line[1::2]))
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or halves_are_zero:
        raise ValueError(f"{name} {path}: it is UTF-16; save it as UTF-8 or ASCII")
    secret = trim(line.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
    if not secret:
        raise ValueError(f"{name} {path}: its first line is empty")
    if len(line) > LONGEST_SECRET:
        raise ValueError(f"{name} {path}: its first line is longer than {LONGEST_SECRET:,} bytes")
    return secret


OptionsT = TypeVar("OptionsT", bound=Options)


def options_of(cls: type[Options]) -> list[tuple[str, Option]]:
    """The options of an options class as pairs of field name and `Option`."""
    return [(f.name, f.metadata["option"]) for f in dataclasses.fields(cls)]


def parse_options(
    prog: str, description: str, cls: type[OptionsT], argv: Sequence[str] | None
) -> tuple[OptionsT, bool, list[str]]:
    """Options from the command line, the environment and the configuration file; whether to check alone; and warnings
    for the log.

    Ends the process for ``--help`` and ``--version``, with status 2 for a wrong option (one line that names the
    option, the value, where it came from and what is accepted), and 1 for a file that cannot be read.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    environment, warnings = read_environment(cls)
    parser = _make_parser(prog, description, cls, argv, warnings)
    given, unknown = parser.parse_known_args(argv, env_vars=environment)
    if unknown:
        names = [word.partition("=")[0] for word in unknown if word.startswith("-")] or ["a word without an option"]
        fail(prog, 2, f"unknown option: {shown(' '.join(names))}")
    origins = _find_origins(parser)
    values: dict[str, Any] = {}

    def wrong(name: str, value: str, expected: object) -> NoReturn:
        origin = origins.get(name, "command line")
        fail(prog, 2, f"--{name.replace('_', '-')}{value} (from {origin}): expected {expected}")

    if given.config == "":
        wrong("config", " ''", "the path of a file")
    for name, info in options_of(cls):
        text = getattr(given, name)
        if text is None:
            continue
        words = [trim(text)] if not info.many else [trim(word) for item in text for word in item.split(",")]
        words = [word for word in words if word] or [""]
        try:
            parsed = [info.parse(word) for word in words]
        except ValueError as error:
            wrong(name, "" if info.secret else f" {shown(','.join(words))!r}", error)
        values[name] = tuple(parsed) if info.many else parsed[0]
    try:
        return cls(**values), given.check, warnings
    except ValueError as error:
        fail(prog, 2, "; ".join([str(error), *warnings]))  # what is missing may stand where it was not taken from


def read_environment(cls: type[Options]) -> tuple[dict[str, str], list[str]]:
    """The environment as far as it is meant for options, and warnings about the rest of it."""
    known = known_variables()
    infos = {f"TCPRELAY_{name.upper()}": info for name, info in options_of(cls)}
    foreign = service_variables(os.environ)
    environment, warnings = {}, []
    for name in sorted(name for name in os.environ if name.startswith("TCPRELAY_") and name not in foreign):
        info, value = infos.get(name), trim(os.environ[name])
        if known and name not in known:
            warnings.append(f"there is no option for the environment variable {shown(name)}")
        if info and info.secret and len(value) > 1 and value[0] in "\"'" and value[-1] == value[0]:
            warnings.append(
                f"the quotes around the value of {name} count as a part of it (docker --env-file keeps them)"
            )
        if value or name == "TCPRELAY_CONFIG":  # which may name all that secures: empty, it is refused, too
            environment[name] = value
        elif info and info.secures:
            environment[name] = EMPTY
    if ignored := sorted(foreign & (known | set(infos))):
        warnings.append(
            f"{', '.join(ignored)}: ignored, as made by Kubernetes (or docker --link) for a Service; "
            "enableServiceLinks: false in the pod's spec keeps them away"
        )
    return environment, warnings


def known_variables() -> set[str]:
    """The variables that are options of either role; none where one of them is not here."""
    known = {"TCPRELAY_CONFIG"}
    for module, name in (("tcprelay_server", "ServerOptions"), ("tcprelay_client", "ClientOptions")):
        try:
            cls = getattr(importlib.import_module(module), name)
        except ImportError:
            return set()  # a single file holds one role; the variables may be meant for the other
        known |= {f"TCPRELAY_{option_name.upper()}" for option_name, _ in options_of(cls)}
    return known


def service_variables(environ: Mapping[str, str]) -> set[str]:
    """The variables that Kubernetes, or ``docker --link``, has made for a Service named tcprelay, or tcprelay-relay and
    the like: some have the names of options.

    What nobody sets by hand tells that they are there: ``TCPRELAY_PORT=tcp://10.0.0.1:1080``, or the same address in
    ``TCPRELAY_PORT_1080_TCP``.  A variable of the pod's own replaces a made one of that name.  It can be told from it
    unless both have the same value: ``TCPRELAY_PORT=22`` is no address, and in ``TCPRELAY_SERVICE_PORT`` Kubernetes
    puts the port that is in the address of ``TCPRELAY_PORT``, the Service's first.
    """
    address = re.compile(r"(?:tcp|udp|sctp)://.+:(\d+)")
    ports: dict[str, set[str]] = {}
    """The ports of each Service, by what its variables begin with."""
    for name, value in environ.items():
        begun = re.fullmatch(r"(TCPRELAY(?:_\w+?)?)_PORT(?:_\d+_(?:TCP|UDP|SCTP))?", name)
        if begun and (found := address.fullmatch(value)):
            ports.setdefault(begun[1], set()).add(found[1])
    made = set()
    for service, all_ports in ports.items():
        first = address.fullmatch(environ.get(f"{service}_PORT", ""))
        forms = [
            ("PORT", address.pattern),
            ("SERVICE_PORT", first[1] if first else "|".join(all_ports)),
            ("NAME", "/.*"),  # docker's, as in /web/tcprelay
            (r"PORT_\d+_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?|SERVICE_(HOST|PORT_\w+)|ENV_\w+", "(?s:.*)"),
        ]
        made |= {
            name
            for name, value in environ.items()
            for ending, content in forms
            if re.fullmatch(f"{service}_({ending})", name) and re.fullmatch(content, value)
        }
    return made


def fail(prog: str, status: int, message: str) -> NoReturn:
    """End the process with one line.  Raises `SystemExit`."""
    log_writer.put(f"{prog}: {message}\n")
    log_writer.end()
    raise SystemExit(status)


def _make_parser(prog: str, description: str, cls: type[Options], argv: list[str], warnings: list[str]) -> Any:
    import argparse

    import configargparse  # here alone: what embeds the relay needs the standard library only

    class Parser(configargparse.ArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            fail(prog, 2, message.replace("\n", " ").removeprefix("argument "))

    class HelpFormatter(argparse.HelpFormatter):
        def _format_action_invocation(self, action: argparse.Action) -> str:
            names = [n for n in action.option_strings if n.islower() or len(n) == 2]
            return ", ".join(names) + (f" {action.metavar}" if action.metavar else "")

    class ConfigFile(configargparse.DefaultConfigFileParser):  # type: ignore[misc]
        """The one of ConfigArgParse cuts a value off where a comment might begin, and takes one in brackets for a
        list: secrets, too."""

        def parse(self, stream: IO[str]) -> dict[str, Any]:
            items: dict[str, Any] = {}
            for number, line in enumerate(map(trim, stream), 1):
                if not line or line[0] in "#;[" or line.startswith("---"):
                    continue
                try:
                    key, value = read_setting(line, known)
                    if key in items and not known[key].many:
                        raise ValueError(f"{key} stands there twice")
                except ValueError as error:
                    fail(prog, 2, f"{stream.name}, line {number}: {error}")
                items[key] = items.get(key, []) + value if isinstance(value, list) else value or EMPTY
                lines[stream.name, key] = number
            return items

    def open_file(path: str, mode: str = "r") -> IO[str]:
        try:
            with open(path, mode, encoding="utf-8-sig") as file:
                stream = io.StringIO(file.read())
        except OSError as error:
            fail(prog, 1, f"cannot read {path}: {say_error(error)}")
        except UnicodeDecodeError:
            fail(prog, 1, f"cannot read {path}: it is not UTF-8")
        stream.name = path
        return stream

    role = prog.removeprefix("tcprelay")
    file = {"s": "server.conf", "c": "client.conf"}.get(role, "tcprelay.conf")
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    # Without HOME and a passwd entry "~" stays as it is, and would be a directory here.
    places = [path for path in (f"/etc/tcprelay/{file}", os.path.join(home, "tcprelay", file)) if os.path.isabs(path)]
    chosen = "TCPRELAY_CONFIG" in os.environ or any(w.partition("=")[0] == "--config" for w in argv)
    parser = Parser(
        prog=prog, usage=f"{prog} [options]", description=description, allow_abbrev=False, add_help=False,
        default_config_files=[] if chosen else list(find_files(places, warnings)), config_file_parser_class=ConfigFile,
        config_file_open_func=open_file, add_config_file_help=False, add_env_var_help=False,
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=30),
        epilog="Every option can also stand in the environment (--relay-port as TCPRELAY_RELAY_PORT) and in a "
        f"configuration file (relay-port = 10080): the one named by --config, or {' and '.join(places)}. "
        "The command line goes before the environment, and that before the file.",
    )  # fmt: skip
    groups = {name: parser.add_argument_group(name) for name in OPTION_GROUPS}
    known: dict[str, Option] = {}
    lines = parser.lines = {}
    for name, info in options_of(cls):
        dashed = name.replace("_", "-")
        names = [f"--{dashed}"] + ([f"--{info.spelling}"] if info.spelling and info.spelling != dashed else [])
        known |= {n[2:]: info for n in names}
        extra: dict[str, Any] = {"action": "append"} if info.many else {}
        if info.parse in (parse_flag, parse_tls):
            extra = {"nargs": "?", "const": "true"}
        default = f" (default: {info.default})" if info.default else ""
        groups[info.group].add_argument(
            *names, dest=name, default=None, env_var=f"TCPRELAY_{name.upper()}",
            metavar=info.metavar or None, help=(info.help + default).replace("%", "%%"), **extra,
        )  # fmt: skip
    running = groups["Running"]
    running.add_argument("--config", metavar="FILE", is_config_file_arg=True, env_var="TCPRELAY_CONFIG",
                         help="configuration file, instead of the ones in the default places")  # fmt: skip
    running.add_argument("--check", action="store_true", help="check the configuration and exit")
    running.add_argument(
        "--version", action="version", version=f"{prog} {__version__}", help="say the version and exit"
    )
    running.add_argument("-h", "--help", action="help", help="say this and exit")
    return parser


def read_setting(line: str, known: Mapping[str, Option]) -> tuple[str, str | list[str]]:
    """The key of a line ``key = value`` of a configuration file, and its value; a list where it may be repeated.

    The value goes to the end of the line: where a comment might be meant the line is refused, and a secret is never cut
    short.  Quotes around the value are taken off, and what stands in them is taken as it is.  Raises `ValueError` that
    shows nothing of the value.
    """
    found = re.fullmatch(r"(?:--)?([^\s:=]+)(\s*[:=])?(.*)", line)
    if not found:
        raise ValueError("not a line of the form key = value")
    written, equals, rest = found.groups()
    key, value = written.strip("-").replace("_", "-"), trim(rest)
    if key not in known:
        # Anything but "name = value" may be a secret: a token file taken for the configuration.
        named = "=" in line and key.replace("-", "").isalpha()
        raise ValueError(f"unknown option {shown(written)}" if named else "unknown option")
    if value[:1] in ("'", '"'):
        if len(value) < 2 or value[-1] != value[0]:
            raise ValueError(f"the value of {key} begins with a quote and does not end with the same one")
        value = value[1:-1]
    elif re.search(r"\s[#;]", rest):
        raise ValueError("a comment needs a line of its own, and a value with # or ; behind a blank needs quotes")
    elif not value and not equals:
        if known[key].parse not in (parse_flag, parse_tls):
            raise ValueError(f"{key} needs a value")
        value = "true"
    if not known[key].many:
        return key, value
    if value[:1] + value[-1:] == "[]":
        return key, [trim(word).strip("'\"") for word in value[1:-1].split(",")]
    return key, [value]


def find_files(places: list[str], warnings: list[str]) -> Iterator[str]:
    """The configuration files in default places, as patterns for `glob`.

    One that this user may not read, or look for, is another's: that is a warning.  Whatever else is wrong with one, it
    is meant for us, and reading it tells.
    """
    for path in places:
        try:
            os.lstat(path)  # a link to nowhere is there
            try:
                open(path, "rb").close()
            except PermissionError:
                raise
            except OSError:
                pass
            yield glob.escape(path)
        except PermissionError as error:
            warnings.append(f"the configuration file {path} is left out: {say_error(error)}")
        except OSError:
            pass


def _find_origins(parser: Any) -> dict[str, str]:
    """Where each value that is not from the command line came from, by field name."""
    origins = {}
    for source, settings in parser.get_source_to_settings_dict().items():
        kind, _, path = source.partition("|")
        for key, (action, _) in settings.items():
            if kind == "environment_variables":
                origins[action.dest] = f"environment variable {key}"
            elif kind == "config_file":
                origins[action.dest] = f"{path}, line {parser.lines[path, key]}"
    return origins


# --- Certificates ---------------------------------------------------------------------------------------------


def new_context(server_side: bool) -> ssl.SSLContext:
    """An empty TLS context: the only place where one is made, for what Pythons differ in must hold in all of them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.options |= ssl.OP_NO_RENEGOTIATION
    # Pythons before 3.10.11 and 3.11.3, Debian 12's among them, set it where OpenSSL has it: a connection that is cut
    # off without close_notify would look like one that has ended.
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    return context


def make_context(
    options: Options, server_side: bool, cert: str = "", key: str = "", pfx: str = "", prefix: str = "--"
) -> ssl.SSLContext:
    """A TLS context with the certificate from PEM files or a PFX file, if there is one; `options` say the rest.

    `prefix` is what the options that name the files begin with.  Raises `OSError` for files that cannot be read,
    `ValueError` for ones that do not hold what they should.
    """
    context = new_context(server_side)
    wanted = ssl.TLSVersion.TLSv1_3 if options.tls_min == "1.3" else ssl.TLSVersion.TLSv1_2
    context.minimum_version = max(context.minimum_version, wanted)  # the system's policy may ask for more
    passphrase = options.read_passphrase()
    if pfx:
        load_pfx(context, pfx, passphrase)
    elif cert:
        load_pair(context, cert, key, passphrase, prefix)
    return context


def load_pair(context: ssl.SSLContext, cert: str, key: str, passphrase: str, prefix: str = "--") -> None:
    """Load a certificate, its chain and its key from PEM files.  Raises `OSError` and `ValueError`."""
    for path in (cert, key):
        if path:
            with open(path, "rb"):
                pass  # OpenSSL's own error does not name the file
    # Always a password: without one OpenSSL would ask on the terminal.
    password = passphrase.encode("utf-8", "surrogateescape")
    try:
        context.load_cert_chain(cert, key or None, password=password)
    except ssl.SSLError as error:
        raise ValueError(explain_pair(cert, key, password, prefix, error)) from error


def trust(context: ssl.SSLContext, ca_file: str) -> None:
    """Have the peer's certificate verified against a file of CA certificates, or those of the system.

    Raises `OSError` and `ValueError`.
    """
    if not ca_file:
        context.load_default_certs()
        return
    with open(ca_file, "rb"):
        pass
    try:
        context.load_verify_locations(ca_file)
    except ssl.SSLError as error:
        found = look_into(ca_file)
        raise ValueError(f"{ca_file} is damaged" if CERT in found else say_wrong(ca_file, found, CA)) from error


def load_pfx(context: ssl.SSLContext, path: str, passphrase: str) -> None:
    """Load certificate, key and chain from a PFX (PKCS #12) file, through the ``openssl`` command.

    The key leaves that command encrypted under a random password, and passphrases go through a pipe: neither
    is on the disk or in an argument list.  Raises `OSError` and `ValueError` that say what to do.
    """
    with open(path, "rb"):
        pass
    if len(passphrase) > 1024 or "\n" in passphrase:
        raise ValueError("a passphrase has one line of at most 1024 characters")
    password = random_id(32)
    pem = b""
    for what in (["-clcerts"], ["-cacerts", "-nokeys"]):
        pem += _openssl_pkcs12(path, what, passphrase, password)
    if b"PRIVATE KEY-----" not in pem:
        raise ValueError(f"{path} holds no private key: export it together with its key")
    if b"BEGIN CERTIFICATE" not in pem:
        raise ValueError(f"{path} holds no certificate")
    with _private_file(pem) as pem_path:
        try:
            context.load_cert_chain(pem_path, password=password)
        except ssl.SSLError as error:
            raise ValueError(f"cannot use the certificate in {path}: {say_error(error)}") from error


def _openssl_pkcs12(path: str, what: list[str], passphrase: str, password: str) -> bytes:
    command = ["pkcs12", "-in", path, *what]
    answer = _run_openssl(command, passphrase, password)
    if answer.returncode and b"unsupported" in answer.stderr.lower():
        # RC2 and 3DES, as older OpenSSL and Windows write them, are in a provider of their own since OpenSSL 3.
        answer = _run_openssl([*command, "-legacy"], passphrase, password)
    said = answer.stderr.lower()
    if answer.returncode and (b"mac verify" in said or b"invalid password" in said or b"bad decrypt" in said):
        raise ValueError(f"the passphrase of {path} is wrong: give it with --passphrase-file or --passphrase")
    if answer.returncode:
        found = look_into(path)
        raise ValueError(f"{path} cannot be read by openssl" if found == [PFX] else say_wrong(path, found, PFX))
    return answer.stdout


CERT, KEY, LOCKED, CSR = "a certificate", "a private key", "an encrypted private key", "a certificate request (CSR)"
PFX, BUNDLE, SSH_KEY, PUBLIC_KEY = "a PFX file", "a PKCS #7 bundle", "a private key in OpenSSH's form", "a public key"
CA, DER_CERT, DER_KEY = "CA certificates", "a certificate in DER form", "a private key in DER form"
UTF16, MISPLACED, NOTHING, OTHER = "UTF-16 text", "-----BEGIN within a line", "nothing", "neither PEM nor DER"
PEM_LABELS = {
    "CERTIFICATE": CERT, "X509 CERTIFICATE": CERT, "TRUSTED CERTIFICATE": CERT, "CERTIFICATE REQUEST": CSR,
    "NEW CERTIFICATE REQUEST": CSR, "PRIVATE KEY": KEY, "RSA PRIVATE KEY": KEY, "EC PRIVATE KEY": KEY,
    "ENCRYPTED PRIVATE KEY": LOCKED, "OPENSSH PRIVATE KEY": SSH_KEY, "PUBLIC KEY": PUBLIC_KEY, "PKCS7": BUNDLE,
}  # fmt: skip
"""What PEM calls the blocks of a file, and we."""
REMEDIES = {
    (CERT, CSR): "a CA makes the certificate of it",
    (CERT, PFX): "give it with {prefix}pfx",
    (CERT, DER_CERT): "openssl x509 -inform DER -in FILE -out FILE.pem",
    (CERT, BUNDLE): "openssl pkcs7 -print_certs -in FILE -out FILE.pem",
    (CA, DER_CERT): "openssl x509 -inform DER -in FILE -out FILE.pem",
    (CA, BUNDLE): "openssl pkcs7 -print_certs -in FILE -out FILE.pem",
    (KEY, DER_KEY): "openssl pkey -inform DER -in FILE -out FILE.pem",
    (KEY, SSH_KEY): "make a copy and change it by ssh-keygen -p -m PEM -f COPY",
    (PFX, CERT): "give PEM files with {prefix}cert and {prefix}key",
    (PFX, KEY): "give PEM files with {prefix}cert and {prefix}key",
}
"""What helps whoever has given the second where the first belongs."""


def explain_pair(cert: str, key: str, password: bytes, prefix: str, error: ssl.SSLError) -> str:
    """Why a certificate and its key could not be loaded, in one line, from what the files hold."""
    key_file = key or cert
    found, held = look_into(cert), look_into(key_file)
    if CERT not in found:
        if CERT in held and (KEY in found or LOCKED in found):
            return f"{cert} holds the private key and {key} the certificate: {prefix}cert and {prefix}key are exchanged"
        return say_wrong(cert, found, CERT, prefix)
    if KEY not in held and LOCKED not in held:
        if key:
            return say_wrong(key, held, KEY, prefix)
        return f"{cert} holds a certificate without its private key: give that with {prefix}key"
    # The second is said where they are of different kinds, RSA and EC.
    if (error.reason or str(error)).endswith(("VALUES_MISMATCH", "TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")):
        if place := _place_of_own(cert, key_file, password):
            return f"{cert} is in the wrong order: the certificate of the key, number {place} in it, must be the first"
        return f"the private key in {key_file} is another one than that of the certificate in {cert}"
    if LOCKED in held and not password:
        return f"the private key in {key_file} is encrypted: give its passphrase with --passphrase-file"
    if (error.reason or "").endswith(("TOO_SMALL", "TOO_WEAK")):
        return f"{cert} is too weak for this system's openssl: {say_error(error)}"
    try:
        new_context(False).load_verify_locations(cert)
    except ssl.SSLError:
        return f"the certificate in {cert} is damaged"
    if LOCKED in held:
        return f"the passphrase of {key_file} is wrong: give it with --passphrase-file or --passphrase"
    return f"the private key in {key_file} is damaged"


def say_wrong(path: str, found: list[str], wanted: str, prefix: str = "--") -> str:
    """One line about a file in which something else stands than what is wanted."""
    remedies = [REMEDIES[wanted, kind] for kind in found if (wanted, kind) in REMEDIES]
    if UTF16 in found:
        remedies = ["save it as UTF-8"]
    elif MISPLACED in found:
        remedies = ["take away what stands before it"]
    remedy = f" ({remedies[0].format(prefix=prefix)})" if remedies else ""
    form = "" if wanted == PFX else " in PEM form"
    return f"{path} holds {' and '.join(dict.fromkeys(found))}, not {wanted}{form}{remedy}"


def look_into(path: str) -> list[str]:
    """What a file of certificates or keys holds: the PEM blocks in it, or the one thing that it is otherwise."""
    if not os.path.isfile(path):
        return ["what openssl cannot use"]  # a pipe, which is empty by now
    with open(path, "rb") as file:
        content = file.read(1 << 20)
    if not content.strip():
        return [NOTHING]
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"-\0-\0" in content:
        return [UTF16]
    labels = re.findall(r"^-----BEGIN ([A-Z0-9 ]+)-----", content.decode("latin-1"), re.MULTILINE)
    if labels:
        locked = b"\nProc-Type: 4,ENCRYPTED" in content
        kinds = [PEM_LABELS.get(label, f"a PEM block named {label}") for label in labels if "PARAMETERS" not in label]
        return [LOCKED if kind == KEY and locked else kind for kind in kinds] or [OTHER]
    return [MISPLACED if b"-----BEGIN " in content else _look_into_der(content)]


def _look_into_der(content: bytes) -> str:
    """Told by how its first elements begin: each is a tag, a length of one or more bytes, and what it holds."""
    first = content[_header_size(content) :]
    second = first[_header_size(first) :]
    if content[0] != 0x30 or first[:1] not in (b"\x02", b"\x30"):
        return OTHER
    if first[0] == 0x02:  # a version
        return PFX if first[:3] == b"\x02\x01\x03" else DER_KEY
    if second[:1] == b"\x06":  # the name of a cipher
        return DER_KEY
    return CSR if second[:3] == b"\x02\x01\x00" else DER_CERT


def _header_size(element: bytes) -> int:
    return 2 + (element[1] & 0x7F if element[1:2] > b"\x80" else 0)


def _place_of_own(cert: str, key_file: str, password: bytes) -> int:
    """Which certificate of a file the key belongs to; 0 is none."""
    with open(cert, "rb") as file:
        blocks = re.findall(rb"^-----BEGIN CERTIFICATE-----.*?^-----END CERTIFICATE-----", file.read(), re.M | re.S)
    for number, block in enumerate(blocks, 1):
        with _private_file(block + b"\n") as path, contextlib.suppress(ssl.SSLError):
            new_context(True).load_cert_chain(path, key_file, password=password)
            return number
    return 0


def _run_openssl(words: list[str], *passwords: str) -> subprocess.CompletedProcess[bytes]:
    """Run the openssl command; it reads the passwords (-passin, -passout), one a line, from a pipe."""
    reader, writer = os.pipe()
    try:
        try:
            os.write(writer, "".join(f"{password}\n" for password in passwords).encode("utf-8", "surrogateescape"))
        finally:
            os.close(writer)
        asked = [f"fd:{reader}"] if passwords else []
        places = [word for flag, fd in zip(("-passin", "-passout"), asked * 2, strict=False) for word in (flag, fd)]
        return subprocess.run(
            ["openssl", *words, *places], stdin=subprocess.DEVNULL, capture_output=True, pass_fds=[reader],
            timeout=60, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise OSError(errno.ETIMEDOUT, "the openssl command does not come to an end") from error
    except FileNotFoundError as error:
        raise OSError(
            errno.ENOENT, "the openssl command, which reads PFX files and makes certificates, is not here: "
            "make PEM files where it is (openssl pkcs12 -in FILE -out FILE.pem) and give them with --cert and --key",
        ) from error  # fmt: skip
    finally:
        os.close(reader)


@contextlib.contextmanager
def _private_file(content: bytes) -> Iterator[str]:
    """A path that holds `content` for a moment: in memory on Linux, elsewhere a file that others cannot read."""
    if hasattr(os, "memfd_create"):
        with open(os.memfd_create("tcprelay"), "wb") as file:
            file.write(content)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"
        return
    descriptor, path = tempfile.mkstemp()
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        yield path
    finally:
        os.unlink(path)


def make_self_signed(directory: str) -> str:
    """The path of a self-signed certificate with its key in `directory`, made there if it is not yet.

    Raises `OSError` and `ValueError`, as `private_file` does.
    """

    def make() -> bytes:
        made = _run_openssl([
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "36500",
            "-subj", "/CN=tcprelay", "-addext", "subjectAltName=DNS:tcprelay", "-keyout", "-", "-out", "-",
        ])  # fmt: skip
        if made.returncode:
            raise ValueError(f"openssl cannot make a certificate: {shown(made.stderr.decode(errors='replace'))}")
        return made.stdout

    return private_file(os.path.join(directory, "identity.pem"), make)


def private_file(path: str, make: Callable[[], bytes]) -> str:
    """The path of a file that this user alone can read, with what `make` returns if it is not there yet.

    Several that start together end up with one file.  Raises `OSError`, with the path and what to do, for what
    cannot be made, and for what others could have put there or read.
    """
    content = None if os.path.lexists(path) else make()
    try:
        if content is not None:
            _make_private(path, content)
        _check_directory(os.path.dirname(path))
        _check_file(path)
    except OSError as error:
        place = error.filename if isinstance(error.filename, str) else path
        raise OSError(error.errno, f"{say_error(error)} (--state-dir names another place)", place) from error
    return path


def _make_private(path: str, content: bytes) -> None:
    """Write a new file, all of it at once; one that is there already stays.  Raises `OSError`."""
    directory, new = os.path.dirname(path), f"{path}.{random_id(8)}"
    with contextlib.suppress(FileExistsError):  # something else than a directory, which the check names
        os.makedirs(directory, mode=0o700, exist_ok=True)
    _check_directory(directory)
    with _locked(directory):
        if os.path.lexists(path):
            return
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                if _who_else(os.fstat(file.fileno()), 0o077):
                    raise PermissionError(errno.EPERM, "the file system here cannot keep a file from others")
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        except OSError as error:
            ignore_oserror(os.unlink, new)
            raise OSError(error.errno, say_error(error), path) from error


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[None]:
    """Alone among the processes of this host.  Not by a hard link: some file systems have none, but all have this,
    as the kernel keeps the locks of directories itself."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # nobody holds it for longer than it takes to write a small file
        yield
    finally:
        os.close(descriptor)


def _check_directory(path: str) -> None:
    """Raises `OSError` where others could put files there."""
    found = os.stat(path)  # follows links: systemd's state directory may be one
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "this is not a directory", path)
    if who := _who_else(found, 0o022):
        raise PermissionError(
            errno.EPERM, f"{who} can put files there: have it owned and written by this user alone", path
        )


def _check_file(path: str) -> None:
    """Raises `OSError` where others could know or have changed what is in it."""
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "this is not a regular file: remove it", path)
    if who := _who_else(found, 0o077):
        raise PermissionError(errno.EPERM, f"{who} may know or have changed it: remove it, a new one is made", path)


def _who_else(found: os.stat_result, forbidden: int) -> str:
    """Who beside this user and root may do to a file what the bits of its mode in `forbidden` allow; "" is nobody."""
    if not hasattr(os, "geteuid"):
        return ""
    if found.st_uid not in (os.geteuid(), 0):
        return f"user {found.st_uid}, its owner,"
    if found.st_uid != os.geteuid():
        forbidden &= ~0o040  # what root has put there for a service is read by its group
    mode = stat.S_IMODE(found.st_mode)
    return f"others (its mode is {mode:04o})" if mode & forbidden else ""


def state_directory() -> str:
    """Where things are kept by default: systemd's state directory, or the user's (XDG).  Raises `OSError`."""
    systemd = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    home = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(home):
        home = os.path.expanduser("~/.local/state")
    if not (systemd or os.path.isabs(home)):
        raise OSError(
            errno.ENOENT, "this user has no home directory to keep a certificate in: name one with --state-dir"
        )
    return systemd or os.path.join(home, "tcprelay")


def pin_of(certificate: bytes) -> str:
    """The pin of a certificate in DER form: sha256: and the hexadecimal digest of all of it."""
    return "sha256:" + hashlib.sha256(certificate).hexdigest()


def certificate_name(stream: Stream) -> str:
    """The common name, or the first other name, in the verified certificate of a TLS peer; "" without one."""
    certificate = stream.tls.getpeercert() if isinstance(stream, TLSStream) else None
    if not certificate:
        return ""
    subject: Any = certificate.get("subject", ())
    names = [value for part in subject for key, value in part if key == "commonName"]
    others: Any = certificate.get("subjectAltName", ())
    return shown((names + [value for _, value in others] or ["unnamed"])[0], 64)


# --- Running --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Credentials:
    """What a role read from its files: replaced as a whole when they are read again."""

    token: bytes = field(repr=False)
    links: ssl.SSLContext | None
    """For TLS on the links; ``None`` for plain ones."""
    services: ssl.SSLContext | None
    """For TLS on the service ports, or to the service."""
    pin: str = ""
    """Of the certificate that was made here."""


class Relay(abc.ABC):
    """What the two roles have in common: how they begin and end, and what their connections stand on."""

    def __init__(self, logger: str, options: Options, most: int, on_event: Callable[[Event], object] | None) -> None:
        self.options = options
        self._log = logging.getLogger(logger)
        self._emit = Events(self._log, on_event)
        self._credentials = self._load_credentials()
        if self._credentials.token or options.secret:
            prove(b"", "", "", "", "", "")  # imports what it needs now
        self.signals: _Signals | None = None
        """In a command: those that come while `prepare` waits end it."""
        self._threads = Threads()
        self._probing = Probing(options.keepalive, options.dead_path)
        self._splices = Splices(
            most or from_descriptor_limit(), options.idle_timeout, options.half_close_timeout, options.dead_path
        )
        self._stop: Stop
        """Requested when `end` begins: nothing new is begun, and handshakes are cut short."""
        self._cut: Stop
        """Requested at the drain deadline: whatever still waits for something is cut short."""
        self._own_threads: list[threading.Thread] = []
        """The threads that live as long as the role."""
        self._channel: socket.socket | None = None
        """In a worker process, to its parent; see `Workers`."""
        self._intake: socket.socket
        """There, what the connections that the parent has accepted come from."""
        self._lock = threading.Lock()  # over the three below
        self._started = False
        self._closed = False
        self._drain: Deadline | None = None
        self._ended = threading.Event()

    def start(self: RelayT) -> RelayT:
        """Begin to serve; returns when that is so.  Raises `OSError`, with nothing left behind, and
        `RuntimeError` where it was started or ended before."""
        with self._lock:
            if self._started or self._drain is not None:
                raise RuntimeError("this relay was started or ended before")
            self._started = True
            self._stop, self._cut = Stop(), Stop()
        try:
            self._open()
        except BaseException:
            self.end(0)
            raise
        return self

    def end(self, drain_timeout: float | None = None) -> list[str]:
        """Stop: nothing new, then up to `drain_timeout` seconds (the option's, if ``None``) for open connections.

        Any thread, any number of times, also before `start`; a later call with a shorter time-out shortens it.
        Returns within a second or so of the deadline; what it returns names the threads that did not leave.
        """
        timeout = self.options.drain_timeout if drain_timeout is None else drain_timeout
        with self._lock:
            first = self._drain is None
            if self._drain is None:
                self._drain = Deadline(timeout)
            else:
                self._drain.shorten(timeout)
            drain = self._drain
        if not self._started:
            return []
        if first:
            try:
                self._end(drain)
            finally:
                self._ended.set()
        elif not self._is_own_thread():
            self._splices.hurry()
            self._ended.wait(timeout + 2 * JOIN_TIMEOUT)
        else:
            self._splices.hurry()
            return []
        return self._finish()

    def _end(self, drain: Deadline) -> None:
        self._stop.request()
        self._stop_intake()
        if len(self._splices):
            self._emit(Draining(connections=len(self._splices), seconds=drain.remaining() or 0.0))
        self._splices.drain(drain)
        self._cut.request()
        self._splices.break_off_all("this relay is ending", Deadline(JOIN_TIMEOUT))
        self._wake_all()

    def _finish(self) -> list[str]:
        """Wait for the threads, and give back what they were waiting on; not from one of them."""
        stragglers = self._threads.end(Deadline(JOIN_TIMEOUT))
        if not self._is_own_thread():
            for thread in self._own_threads:
                join(thread, JOIN_TIMEOUT)
            stragglers += [thread.name for thread in self._own_threads if thread.is_alive()]
        if stragglers:
            self._log.error("still running at the end: %s", ", ".join(stragglers))
        elif not self._is_own_thread():
            with self._lock:
                first, self._closed = not self._closed, True
            if first:
                self._close()
        return stragglers

    def _is_own_thread(self) -> bool:
        return self._threads.is_mine() or threading.current_thread() in self._own_threads

    def reload(self) -> bool:
        """Read certificates, CA files and the token again, for what connects from now on; living connections
        are not touched.  Where they cannot be read the old ones stay in force: False, and the log says why."""
        try:
            self._credentials = self._load_credentials()
        except (OSError, ValueError) as error:
            name = f"{error.filename}: " if isinstance(error, OSError) and isinstance(error.filename, str) else ""
            self._log.error("cannot reload, the old certificates and token stay in force: %s%s", name, say_error(error))
            return False
        except Exception:
            self._log.exception("unexpected error in a reload, the old certificates and token stay in force")
            return False
        if self._channel is None:  # else the parent has told it
            self._log.info("certificates and token are reloaded")
        return True

    def invitation(self, with_secrets: bool) -> str:
        """What to say at the start for the other side; "" for nothing."""
        return ""

    @abc.abstractmethod
    def _load_credentials(self) -> Credentials:
        """Read what `options` name.  Raises `OSError` and `ValueError`."""

    @abc.abstractmethod
    def prepare(self) -> None:
        """What comes before anything is served and needs no thread; with workers their parent does it for all.

        Raises `OSError`.
        """

    @abc.abstractmethod
    def _open(self) -> None:
        """Begin, with `prepare` first unless this is a worker; `end` is called where this raises `OSError`."""

    @abc.abstractmethod
    def make_workers(self, count: int) -> Workers | None:
        """The parent of so many workers that do what this object would do alone; ``None`` where it should."""

    def become_worker(self, channel: socket.socket, intake: socket.socket) -> None:
        """Be one of several from now on; called in the new process, before `start`."""
        self._channel, self._intake = channel, intake
        self._emit.pass_on = self.tell_parent

    def obey(self, order: dict[str, Any]) -> None:  # noqa: B027 (not every role has orders of its own)
        """In a worker: the parent asks for something."""

    def tell_parent(self, event: Event) -> None:
        """Have the parent hear of an event."""
        fields = {f.name: getattr(event, f.name) for f in dataclasses.fields(event)}
        self.send_to_parent({"event": type(event).__name__, "fields": fields})

    FIRST_PROCESSOR, NEXT_PROCESSOR = 0, 1
    """Which processors the role's processes run on, of those that there are; -1 is the last."""

    def choose_processor(self, number: int) -> None:
        """Have the threads of this process, one of several, run on one processor."""
        choose_processor(self.FIRST_PROCESSOR + number * self.NEXT_PROCESSOR)

    def send_to_parent(self, message: dict[str, Any], payload: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        """Any thread.  Where the parent is gone, so is this process soon."""
        assert self._channel is not None
        with contextlib.suppress(OSError):
            send_message(self._channel, encode_message(message, payload), descriptors)

    @abc.abstractmethod
    def _stop_intake(self) -> None:
        """Begin nothing new, and give up what is idle; `_stop` has been requested."""

    def _wake_all(self) -> None:  # noqa: B027 (a role may have nobody left to wake)
        """Wake whoever may still wait for a peer, when all connections are broken off."""

    def _close(self) -> None:
        """Give back what threads were waiting on, when there are none any more."""
        self._stop.close()
        self._cut.close()

    def _count(self, inbound_is_to_link: bool) -> dict[str, int]:
        """The counts so far, those of open connections included."""
        counts = dict(self._emit.counts)
        for splice in self._splices.snapshot():
            inbound, outbound = splice.to_link, splice.from_link
            if not inbound_is_to_link:
                inbound, outbound = outbound, inbound
            counts["bytes_in"] += inbound
            counts["bytes_out"] += outbound
        counts["connections"] += len(self._splices)
        return {**counts, "open": len(self._splices)}

    def __enter__(self: RelayT) -> RelayT:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.end()


RelayT = TypeVar("RelayT", bound=Relay)
ResultT = TypeVar("ResultT")


def join(thread: threading.Thread, timeout: float) -> None:
    """Wait for a thread's end, unless it has not begun, or is this one."""
    if thread.ident is not None and thread is not threading.current_thread():
        thread.join(timeout)


def run_command(
    prog: str,
    description: str,
    cls: type[OptionsT],
    make: Callable[[OptionsT], Relay],
    argv: Sequence[str] | None,
) -> int:
    """The life of a command: options, log, start, signals, end.  Returns its exit status."""
    open_standard_files()
    options, check, remarks = parse_options(prog, description, cls, argv)
    set_up_logging(options.log_level, options.log_format)
    for remark in remarks:
        logging.getLogger("tcprelay").warning("%s", remark)
    try:
        return _run_role(prog, options, make, check)
    except Stopping:
        return 0  # a signal came before anything was served
    except OSError as error:
        name = f"{error.filename}: " if isinstance(error.filename, str) else ""
        fail(prog, 1, f"{name}{say_error(error)}")
    except ValueError as error:
        fail(prog, 2, str(error))
    except KeyboardInterrupt:
        return 130
    finally:
        log_writer.end()


def _run_role(prog: str, options: OptionsT, make: Callable[[OptionsT], Relay], check: bool) -> int:
    """The same with options and log; raises `OSError`, `ValueError`, and `Stopping` where it is ended as it starts."""
    raise_descriptor_limit()
    sys.setswitchinterval(SWITCH_INTERVAL)
    role = make(options)
    if check:
        print(f"{prog}: the configuration is valid")
        return 0
    count = default_workers() if options.workers is None else options.workers
    with _Signals() as role.signals:
        signals = role.signals
        if count and can_fork_workers() and (workers := role.make_workers(count)) is not None:
            log_writer.begin()
            return workers.run(signals)
        role.choose_processor(0)
        log_writer.begin()  # behind that line, for it stays where it is started
        role.start()
        invite(role)
        signals.begin()
        return _run(role, signals)


def open_standard_files() -> None:
    """Open what whoever started us has left closed of descriptors 0 to 2: else connections would get these numbers,
    and what is said on standard error would go to one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the first free number


def invite(role: Relay) -> None:
    """Say what the other side is to do, with secrets on a terminal only."""
    if invitation := role.invitation(with_secrets=os.isatty(2)):
        log_writer.put(f"{invitation}\n")


def _run(role: Relay, signals: _Signals | _Orders) -> int:
    """The life of a role in this process, from its start to the exit status."""
    stragglers: list[str] = []
    ending = threading.Event()

    def end() -> None:
        ending.wait()
        try:
            stragglers.extend(role.end())
        finally:
            signals.done()

    ender = threading.Thread(target=end, name="end", daemon=True)
    ender.start()  # while there are threads to be had
    notify_systemd("READY=1")
    while (number := signals.wait()) in (signal.SIGHUP, signal.SIGCHLD):
        if number == signal.SIGHUP:
            notify_systemd(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            role.reload()
            notify_systemd("READY=1")
        else:
            reap()
    notify_systemd("STOPPING=1")
    ending.set()
    while number := signals.wait():
        if number == signal.SIGCHLD:
            reap()
        elif number != signal.SIGHUP:  # a further SIGTERM or SIGINT: at once
            role.end(0.0)
    ender.join()
    if stragglers:
        log_writer.end()
        os._exit(0)  # their stacks may hold locks that the interpreter's own end would wait for
    return 0


class _Signals:
    """SIGINT, SIGTERM and SIGHUP, and later SIGCHLD, as bytes on a socket: the handlers themselves do nothing.

    SIGHUP says two things.  Where the terminal that this process was started from has gone, it says so, and is an end;
    from ``kill`` or a service manager it asks for a reload.  Under ``nohup``, which ignores it, it never is an end.
    """

    HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __enter__(self) -> _Signals:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._ends_with_terminal = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN and not is_terminal_gone()
        self._before = {number: signal.signal(number, lambda *_: None) for number in self.HANDLED}
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until `begin`: there is nothing to reload yet
        return self

    def fileno(self) -> int:
        return self._reader.fileno()

    def leave_to_parent(self) -> None:
        """In a worker: a Ctrl-C or a service manager may reach all processes; the parent passes on what counts."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in self.HANDLED:
            signal.signal(number, signal.SIG_IGN)
        self._reader.close()
        self._writer.close()

    def wait(self) -> int:
        """Wait for a signal: SIGINT or SIGTERM to end, SIGHUP to reload, SIGCHLD; 0 when `done` was called first."""
        while True:
            number = self._reader.recv(1)[0]
            if number == signal.SIGHUP and self._ends_with_terminal and is_terminal_gone():
                self._ends_with_terminal = False  # it may be told twice, by the kernel and by a shell
                return signal.SIGTERM
            if number in (*self.HANDLED, signal.SIGCHLD, 0):
                return number

    def begin(self) -> None:
        """Tell of SIGHUP and of children that have ended, too: until serving begins any signal is an end."""
        signal.signal(signal.SIGHUP, lambda *_: None)
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        self._writer.send(bytes([signal.SIGCHLD]))  # some may have ended before
        if self._ends_with_terminal and is_terminal_gone():
            self._writer.send(bytes([signal.SIGHUP]))

    def done(self) -> None:
        self._writer.send(b"\0")

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._reader.close()
        self._writer.close()


def is_terminal_gone() -> bool:
    """Whether this process has no controlling terminal: none from the start, or not any more."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK))
    except OSError as error:
        return error.errno in (errno.ENXIO, errno.EIO, errno.ENOENT)
    return False


def reap(own: Collection[int] = ()) -> None:
    """Collect the children that have ended, but for `own`, which somebody else waits for.

    Whoever runs as process 1 of a container inherits orphans; others, what the shell that they replaced had started.
    """
    if not hasattr(os, "waitid"):
        return  # on macOS, where nobody is process 1
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in own:
            os.waitpid(ended.si_pid, 0)


def raise_descriptor_limit() -> None:
    """Raise the soft limit on open descriptors to the hard one, as servers do: a connection needs several."""
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ImportError, OSError, ValueError):
        pass


def notify_systemd(state: str) -> None:
    """Tell the service manager, if one started us (sd_notify(3)); no news to it is no reason to fail."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
    except OSError as error:
        logging.getLogger("tcprelay").warning("cannot notify systemd: %s", say_error(error))


class LogWriter(logging.Handler):
    """Writes the log to standard error in a thread of its own, the only one that ever waits for whoever reads it.

    Everybody else leaves a record here, in about a microsecond, and goes on.  Where `MOST` of them wait, further ones
    are dropped and counted, and the count is told when lines can be written again.
    """

    MOST = 8192
    """Records that wait: some 8 MiB (measured: 0.5 to 1 KiB each), the lines of a busy relay for two seconds."""
    PIECE = 4096
    """Bytes that are written at once: so many a pipe takes whole, whoever else writes to it."""
    LAST_LINES = 1.0
    """Seconds that the last lines have to be written when a process ends."""

    def __init__(self) -> None:
        super().__init__()
        self.stream: IO[str] | None = None
        """Where to write; ``None`` is standard error, whatever that is at the moment."""
        self._torn = False
        """A line could be written in part only."""
        self.forget()

    def forget(self) -> None:
        """Begin anew, with no thread and nothing to write; also in a process that has just been forked."""
        self._queue: queue.SimpleQueue[logging.LogRecord | str | threading.Event] = queue.SimpleQueue()
        self._begun = False
        self._lock = threading.Lock()  # over the next
        self._dropped = 0

    def begin(self) -> None:
        """Start to write; what came before has waited.  Raises `OSError` where no thread can be had."""
        if self._begun:
            return
        try:
            _thread.start_new_thread(self._write_all, ())
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, "cannot start a thread for the log") from error
        self._begun = True

    def end(self) -> None:
        """Have everything written and the thread leave, or do without both after `LAST_LINES` seconds."""
        written = threading.Event()
        self._queue.put(written)
        with contextlib.suppress(OSError):
            self.begin()
            written.wait(self.LAST_LINES)
        self.forget()

    def handle(self, record: logging.LogRecord) -> Any:
        if record.exc_info:  # as text: it keeps alive whatever its functions had in hand, sockets too
            record.exc_text = (self.formatter or TextFormatter()).formatException(record.exc_info)
            record.exc_info = None
        self.put(record)
        return True

    def put(self, line: logging.LogRecord | str) -> None:
        """Have a record, or lines that are none, written some time."""
        if self._queue.qsize() < self.MOST:
            self._queue.put(line)
        else:
            with self._lock:
                self._dropped += 1

    def _write_all(self) -> None:
        """The thread's life: what has gathered meanwhile is written in one call, as far as a piece goes."""
        lines, piece, count, written = self._queue, b"", 0, None
        while written is None:
            item = lines.get()
            if isinstance(item, threading.Event):
                written = item
            else:
                line = self._encode(item)
                if len(piece) + len(line) > self.PIECE:
                    self._write(piece, count)
                    piece, count = b"", 0
                piece, count = piece + line, count + 1
            if written or lines.empty():
                self._write(piece, count)
                piece, count = b"", 0
                self._tell_dropped()
        written.set()

    def _encode(self, item: logging.LogRecord | str) -> bytes:
        try:
            return (item if isinstance(item, str) else self.format(item) + "\n").encode(errors="backslashreplace")
        except Exception:
            if isinstance(item, logging.LogRecord):
                self.handleError(item)
            return b""

    def _tell_dropped(self) -> None:
        if count := self._dropped:
            text = "%d log lines were dropped: standard error did not take them"
            record = logging.LogRecord("tcprelay", logging.WARNING, "", 0, text, (count,), None)
            if self._write(self._encode(record), 0):
                with self._lock:
                    self._dropped -= count

    def _write(self, piece: bytes, count: int) -> bool:
        """Write so many lines, however long that takes; False where they are dropped because it cannot be done."""
        left = memoryview(b"\n" + piece if self._torn and piece else piece)
        whole = len(left)
        try:
            while left:
                left = left[self._write_some(left) :]
        except (OSError, ValueError, AttributeError):  # full or broken; or there is no standard error
            with self._lock:
                self._dropped += count
        self._torn = (self._torn and len(left) == whole) or 0 < len(left) < whole
        return not left

    def _write_some(self, piece: memoryview) -> int:
        stream = self.stream or sys.stderr
        try:
            fd = stream.fileno()
        except (OSError, ValueError):  # it is no file
            stream.write(piece.tobytes().decode())
            return len(piece)
        try:
            return os.write(fd, piece)
        except BlockingIOError:  # a program that shares it has asked for that
            wait_for(fd, select.POLLOUT, Deadline(None))
            return 0


log_writer = LogWriter()
"""Of the commands, for the log and for whatever else they say on standard error."""


class TextFormatter(logging.Formatter):
    """A log record as a line of text."""

    milliseconds = ",%03d"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._second = 0, ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """Makes the text of a second once: that takes longer than all the rest of the line."""
        second, text = self._second
        if second != int(record.created):
            second = int(record.created)
            text = time.strftime(self.default_time_format, self.converter(second))
            self._second = second, text
        return text + self.milliseconds % record.msecs


class JsonFormatter(TextFormatter):
    """A log record as a JSON object in one line; of an event, with its fields."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    milliseconds = ".%03dZ"

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        event = getattr(record, "event", None)
        if isinstance(event, Event):
            entry["event"] = type(event).__name__
            entry |= {f.name: getattr(event, f.name) for f in dataclasses.fields(event)}
        if record.exc_text:
            entry["exception"] = record.exc_text
        return json.dumps(entry)


def set_up_logging(level: str, format: str) -> None:
    """Log to standard error; only the commands do this, a program that embeds the relay has its own way."""
    log_writer.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    # Nothing that the formats do not show: a record costs half as much without (logging HOWTO, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    logger = logging.getLogger("tcprelay")
    logger.handlers[:] = [log_writer]
    logger.propagate = False
    logger.setLevel(level.upper())


# --- Workers --------------------------------------------------------------------------------------------------
#
# Python's interpreter lock lets one thread of a process run at a time; several processes use several processors.
# The parent has no threads but the log's (see `fork`), so that it may fork a worker at any time; the workers are roles
# as they would be alone, except that they hear of signals, and a relay server's of new connections, from their parent.

MOST_WORKERS = 4
"""Workers by default, where there are twice as many processors: the others are for the kernel, and for services."""
MESSAGE_SIZE = 1 << 17
"""Bytes of the longest message between a parent and a worker."""
MESSAGE_ROOM = 4096
"""Bytes that a worker leaves free in it for what the parent adds when it passes it on."""


def default_workers() -> int:
    """One for every two processors that this process may use, up to `MOST_WORKERS`; none where that is one, or where
    Python has no interpreter lock.

    Measured on two processors that both roles, the load and the service shared: two workers carried twice as many
    requests over 512 connections, but a third fewer new connections, and as many requests over 64.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(processors // 2, MOST_WORKERS)
    return count if count > 1 and has_interpreter_lock() else 0


def has_interpreter_lock() -> bool:
    """False in free-threaded builds of Python, where one process can use all processors."""
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def can_fork_workers() -> bool:
    """Whether this system has processes that fork and can pass descriptors to each other in whole messages."""
    return sys.platform != "darwin" and all(
        hasattr(module, name) for module, name in ((os, "fork"), (socket, "SCM_RIGHTS"), (socket, "SOCK_SEQPACKET"))
    )


def fork() -> int:
    """`os.fork`, without Python's warning of other threads (3.12 and later): there is the log's alone, and whenever the
    parent's first thread runs Python, that one waits: for a line, or in a write."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def encode_message(fields: dict[str, Any], payload: bytes = b"") -> bytes:
    """A message between parent and worker: JSON, and bytes behind a line feed."""
    return json.dumps(fields).encode() + b"\n" + payload


def adopt_socket(descriptor: int, address: Any) -> socket.socket:
    """The TCP socket of a descriptor that came with a message, from the address of its peer."""
    return socket.socket(socket.AF_INET6 if len(address) == 4 else socket.AF_INET, socket.SOCK_STREAM, 0, descriptor)


def decode_message(message: bytes) -> tuple[dict[str, Any], bytes]:
    head, _, payload = message.partition(b"\n")
    return json.loads(head), payload


def send_message(channel: socket.socket, message: bytes, descriptors: Sequence[int] = (), flags: int = 0) -> None:
    """`socket.send_fds` with its flags, which that takes and forgets: a parent would wait for its worker.  Raises
    `OSError`."""
    if len(message) > MESSAGE_SIZE:
        raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(descriptors)}i", *descriptors))]
    channel.sendmsg([message], rights if descriptors else [], flags)


def receive_message(channel: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """A message and its descriptor, or none where the kernel had no number for it; `socket.recv_fds` forgets its
    flags, too.  Raises `OSError`, and `ValueError` for a message that did not come whole."""
    message, ancillary, told, _ = channel.recvmsg(MESSAGE_SIZE, socket.CMSG_SPACE(4), flags)
    numbers = [number for *_, data in ancillary for (number,) in struct.iter_unpack("i", data[: len(data) & ~3])]
    if told & socket.MSG_TRUNC:
        for number in numbers:
            os.close(number)
        raise ValueError(f"a message of more than {MESSAGE_SIZE} bytes")
    return message, numbers


class WorkerProcess:
    """A worker as its parent sees it."""

    REST = 1.0
    """Seconds from one start to the next, where it dies at once each time."""

    def __init__(self, number: int) -> None:
        self.number = number
        """From 0; its successors have the same."""
        self.pid = 0
        """0 while there is none."""
        self.channel: socket.socket
        self.intake: socket.socket
        """Where connections are sent to it."""
        self.up = False
        self.born = 0.0
        self.orders = b""
        """Signals that are still to be passed on."""

    def order(self, message: bytes) -> bool:
        """Send it a signal's number or a message, unless it has died or its channel is full: False."""
        try:
            self.channel.send(message, socket.MSG_DONTWAIT)
            return True
        except OSError:
            return False

    def hand(self, message: bytes, descriptor: int) -> bool:
        """Send it a connection, unless it has died or does not take them fast enough: False."""
        try:
            send_message(self.intake, message, [descriptor], socket.MSG_DONTWAIT)
            return True
        except OSError:
            return False


class Workers:
    """The parent of worker processes: starts them, replaces those that die, and passes on what signals ask for.

    Roles derive from it what their parent does besides.  Everything here runs in one thread, in `run`.
    """

    FIRST_PAUSE = 0.005

    def __init__(self, role: Relay, count: int) -> None:
        self.role = role
        self.log = role._log
        self.emit = role._emit
        self.workers = [WorkerProcess(number) for number in range(count)]
        self.selector = selectors.DefaultSelector()
        """Its keys' data are what to call when they turn readable."""
        self._begun = False
        self._status = 0
        self._failed = 0
        """How many unexpected errors there were."""
        self._pause = self.FIRST_PAUSE
        """Seconds to wait after the next one."""
        self._kill: Deadline | None = None
        """When `run` ends: for workers that have not ended by themselves."""
        self._signals: _Signals

    def run(self, signals: _Signals) -> int:
        """The life of the parent; returns the exit status.  Raises `OSError` where the role cannot begin."""
        self._signals = signals
        self.role.prepare()
        signals.begin()  # without that, whoever started us may have made it impossible to wait for one
        self.selector.register(signals, selectors.EVENT_READ, lambda: self._obey(signals.wait()))
        self.open()
        gc.collect()
        gc.freeze()  # what the collector does not touch stays shared memory
        while self._kill is None or any(worker.pid for worker in self.workers):
            failed = self._failed
            self._guard(self._turn)
            if self._failed == failed:
                self._pause = self.FIRST_PAUSE
            else:  # whatever it was, it may be so again
                time.sleep(self._pause)
                self._pause = min(2 * self._pause, 1.0)
        self.selector.close()
        return self._status

    def _turn(self) -> None:
        for key, _ in self.selector.select(self._look_at_time()):
            self._guard(key.data)

    def _guard(self, function: Callable[[], ResultT]) -> ResultT | None:
        """Have an unexpected error in one matter be the end of none: nobody else looks after the workers."""
        try:
            return function()
        except Exception:
            self._failed += 1
            self.log.exception("unexpected error in the workers' parent")
            return None

    def open(self) -> None:
        """Begin, before the first worker is there."""

    def stop_intake(self) -> None:
        """Begin nothing new: the workers are about to be told to end."""

    def lost(self, worker: WorkerProcess) -> None:
        """A worker has died."""

    def hear(self, worker: WorkerProcess, message: dict[str, Any], payload: bytes, descriptors: list[int]) -> None:
        """A message from a worker.  Who takes a descriptor removes it from the list; the others are closed."""

    def become(self, worker: WorkerProcess) -> None:
        """In the new process: be this worker."""

    def look_at_time(self) -> float:
        """Do what is due; returns the seconds until something else will be."""
        return 60.0

    def tell(self, event: str, fields: dict[str, Any], worker: WorkerProcess) -> None:
        """An event that is about the role as a whole has happened in a worker."""

    def _look_at_time(self) -> float:
        now, wait = time.monotonic(), self._guard(self.look_at_time)
        wait = 1.0 if wait is None else wait
        if not self._send_orders():
            wait = min(wait, 0.05)
        if self._kill is not None:
            if self._kill.remaining() == 0:
                for worker in self.workers:
                    if worker.pid:
                        self.log.error("worker %d does not end, and is killed", worker.number)
                        os.kill(worker.pid, signal.SIGKILL)
                self._kill = Deadline(60.0)
            return min(wait, self._kill.remaining() or 0.0)
        for worker in self.workers:
            if not worker.pid:
                rest = worker.born + WorkerProcess.REST - now
                if rest > 0:
                    wait = min(wait, rest)
                else:
                    self._guard(functools.partial(self._fork, worker))
        return max(wait, 0.0)

    def _obey(self, number: int) -> None:
        if number == signal.SIGCHLD:
            self._reap()
            return
        if number == signal.SIGHUP:
            notify_systemd(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            if self.role.reload():
                self._order(signal.SIGHUP)
            notify_systemd("READY=1")
            return
        if self._kill is None:
            notify_systemd("STOPPING=1")
            self._end()
        else:
            self._kill.shorten(3 * JOIN_TIMEOUT)
        self._order(signal.SIGTERM)

    def _end(self) -> None:
        self._kill = Deadline(self.role.options.drain_timeout + 3 * JOIN_TIMEOUT)
        self._guard(self.stop_intake)

    def _reap(self) -> None:
        reap([worker.pid for worker in self.workers])

    def _order(self, number: int) -> None:
        for worker in self.workers:
            if worker.pid:
                worker.orders += bytes([number])
        self._send_orders()

    def _send_orders(self) -> bool:
        """Pass signals on; False where one has to wait, because a worker's channel is full."""
        for worker in self.workers:
            while worker.orders and worker.order(worker.orders[:1]):
                worker.orders = worker.orders[1:]
        return not any(worker.orders for worker in self.workers)

    def _fork(self, worker: WorkerProcess) -> None:
        worker.born, worker.up = time.monotonic(), False
        pairs: list[socket.socket] = []
        try:
            for _ in range(2):
                pairs += socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            for sock in pairs:
                sock.close()
            self.log.error("cannot start worker %d: %s", worker.number, say_error(error))
            return
        ours, theirs, our_end, intake = pairs
        signal.pthread_sigmask(signal.SIG_BLOCK, _Signals.HANDLED)  # a signal is for one of the two processes
        try:
            pid = fork()
            if not pid:
                ours.close()
                our_end.close()
                self._live(worker, theirs, intake)
        except OSError as error:  # too many processes, say
            ours.close()
            our_end.close()
            self.log.error("cannot start worker %d: %s", worker.number, say_error(error))
            return
        finally:
            theirs.close()
            intake.close()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _Signals.HANDLED)
        worker.pid, worker.channel, worker.intake = pid, ours, our_end
        self.selector.register(ours, selectors.EVENT_READ, lambda: self._receive(worker))

    def _live(self, worker: WorkerProcess, channel: socket.socket, intake: socket.socket) -> NoReturn:
        """The life of the new process."""
        status = 1
        log_writer.forget()
        try:
            self._signals.leave_to_parent()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _Signals.HANDLED)
            os.environ.pop("NOTIFY_SOCKET", None)
            self.selector.close()
            for other in self.workers:
                if other.pid:
                    other.channel.close()
                    other.intake.close()
            self.role.choose_processor(worker.number)
            log_writer.begin()
            self.role.become_worker(channel, intake)
            self.become(worker)
            self.role.start()
            self.role.send_to_parent({"up": True})
            status = _run(self.role, _Orders(self.role, channel))
        except (OSError, RuntimeError) as error:
            self.log.error("worker %d: %s", worker.number, say_error(error))
        except BaseException:
            self.log.exception("worker %d: unexpected error", worker.number)
        finally:
            log_writer.end()
            os._exit(status)

    def _receive(self, worker: WorkerProcess) -> None:
        try:
            message, descriptors = receive_message(worker.channel, socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionResetError):
            return  # the latter once, where it died before it had read all; what it has said is still to be heard
        except OSError:
            message, descriptors = b"", []
        if not message:
            self._bury(worker)
            return
        try:
            self._hear(worker, message, descriptors)
        finally:
            for number in descriptors:  # nobody has taken it
                os.close(number)

    def _hear(self, worker: WorkerProcess, message: bytes, descriptors: list[int]) -> None:
        fields, payload = decode_message(message)
        if "up" in fields:
            worker.up = True
            if not self._begun and self._kill is None and all(other.up for other in self.workers):
                self._begun = True
                invite(self.role)
                notify_systemd("READY=1")
        elif "event" in fields:
            self.tell(fields["event"], fields["fields"], worker)
        else:
            self.hear(worker, fields, payload, descriptors)

    def _bury(self, worker: WorkerProcess) -> None:
        self.selector.unregister(worker.channel)
        worker.channel.close()
        worker.intake.close()
        try:
            _, status = os.waitpid(worker.pid, 0)
        except ChildProcessError:  # somebody else has collected it; its number may be another process's by now
            status = 0
        pid, worker.pid, was_up, worker.up, worker.orders = worker.pid, 0, worker.up, False, b""
        self._reap()  # what it may have stood before
        self._guard(functools.partial(self.lost, worker))
        if self._kill is not None:
            return
        code = os.waitstatus_to_exitcode(status)
        how = f"by signal {-code}" if code < 0 else f"with status {code}"
        if not (was_up or self._begun):
            self.log.error("worker %d (process %d) has ended %s before it could serve", worker.number, pid, how)
            self._status = 1
            self._obey(signal.SIGTERM)
        else:
            self.log.error("worker %d (process %d) has ended %s, with its connections; another takes its place",
                           worker.number, pid, how)  # fmt: skip


class _Orders:
    """What a worker hears from its parent: signals that are passed on, and orders for the role."""

    def __init__(self, role: Relay, channel: socket.socket) -> None:
        self._role = role
        self._channel = channel
        self._over = False

    def wait(self) -> int:
        """Wait for a signal; 0 when `done` was called first."""
        while True:
            try:
                message = self._channel.recv(MESSAGE_SIZE)
            except ConnectionResetError:  # the parent was killed before it had heard all
                message = b""
            if self._over:
                return 0
            if not message:
                log_writer.end()
                os._exit(1)  # the parent was killed: what is open is reset, as if it had been this process
            if len(message) == 1:
                return message[0]
            try:
                self._role.obey(decode_message(message)[0])
            except Exception:
                logging.getLogger("tcprelay").exception("unexpected error in what the parent asks for")

    def done(self) -> None:
        self._over = True
        self._channel.shutdown(socket.SHUT_RD)


# --- The command ----------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """``python3 -m tcprelay server …`` and ``… client …``: the commands tcprelays and tcprelayc."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["server"]:
        import tcprelay_server

        return tcprelay_server.main(words[1:])
    if words[:1] == ["client"]:
        import tcprelay_client

        return tcprelay_client.main(words[1:])
    if words[:1] in (["-h"], ["--help"]):
        print("python3 -m tcprelay server|client [options]: the commands tcprelays and tcprelayc; each has --help")
        return 0
    fail("tcprelay", 2, "say server or client: python3 -m tcprelay server --help")


def __getattr__(name: str) -> Any:
    """The two roles, from their own files, when they are asked for."""
    if name in ("RelayServer", "create_relay_server"):
        import tcprelay_server

        return getattr(tcprelay_server, name)
    if name in ("RelayClient", "create_relay_client"):
        import tcprelay_client

        return getattr(tcprelay_client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    import tcprelay  # the roles import this module by its name, so run that one and not a second copy

    sys.exit(tcprelay.main())
