"""Looking host names up in a thread beside, so that no wait for a name server is longer than it should be."""

from __future__ import annotations

import _thread
import select
import socket
import threading
import time
from typing import Any

from .text import say_error, shown
from .waiting import Deadline, Stop, Wakes, wait_for

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
    """The addresses of a host for which no name server has to be asked: numeric ones, and those of localhost (RFC
    6761). None for other hosts."""
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
    interrupted.  No wait for this thread is longer than it should be, not even the interpreter's at its end, and there
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
        """What wakes those that wait for it; each is owned by one of them."""

    def addresses(self, deadline: Deadline, patience: float, stop: Wakes | None = None) -> Addresses:
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

    def _wait(self, deadline: Deadline, patience: float, stop: Wakes | None) -> Addresses:
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

    def _wait_for_answer(self, deadline: Deadline, patience: float, stop: Wakes | None) -> None:
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
