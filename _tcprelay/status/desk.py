"""Where the status is asked for: a Unix socket for the commands, and a TCP port where there is to be one.

Like the acceptor it never waits for a peer: it watches its listeners and visitors with a selector, in a thread of its
own, or with workers in their parent, beside all else that goes on there.  A visitor is answered once, and has to take
the answer in `PATIENCE`.  Whoever asks within `FRESH` of another gets the same status: a hundred pages that are left
open cost no more than one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import selectors
import socket
import struct
import time
from collections.abc import Callable

from ..addresses import Endpoint, is_own_host, show_address
from ..sockets import listen
from ..system import ignore_oserror
from ..text import say_error
from ..waiting import Wakes
from .places import bind_socket, own_directory, remove_socket
from .report import Status
from .web import FAILED, TOO_LONG, MOST_HEAD, Request, Wrong, admit, answer, parse

MOST_VISITORS = 16
"""Who may be there at once, over TCP and over the Unix socket apart: those who come by the one do not keep others from
the other.  Then those go first who have not asked yet, and of them those that have been there longest."""
TLS = 0x16
"""What a TLS ClientHello begins with (RFC 8446, 5.1): whoever tries https hears at once that there is none."""
PATIENCE = 10.0
"""Seconds that a visitor has to ask, and then to take the answer."""
PAUSE = 0.1
"""Seconds for which none is accepted after an error."""
FRESH = 0.5
"""Seconds for which a status is given out again."""
STALE = 5.0
"""The same to those who have not proven that they know the token, and hear no more than whether all is well."""


class Visitor:
    """A connection on which the status is asked for."""

    def __init__(self, sock: socket.socket, is_local: bool) -> None:
        self.sock = sock
        self.is_local = is_local
        self.asked = bytearray()
        self.has_asked = False
        """It has asked for something that it may have."""
        self.answer = memoryview(b"")
        """What it has not taken yet."""
        self.until = time.monotonic() + PATIENCE


class Desk:
    """Answers those who ask for the status.

    Parameters: the log; what returns the token that is asked for over TCP, or nothing; and what is to make a status and
    call back with it, at once or later.
    """

    def __init__(
        self, log: logging.Logger, token: Callable[[], bytes], ask: Callable[[Callable[[Status], None]], None]
    ) -> None:
        self._log = log
        self._token = token
        self.ask = ask
        self.address: tuple[str, int] | None = None
        """The bound host and port, where there is one; the first of several."""
        self._listeners: dict[socket.socket, bool] = {}  # whether each is the Unix socket
        self._visitors: set[Visitor] = set()
        self._selector: selectors.BaseSelector | None = None
        self._waiting: list[tuple[Visitor, Request, bool]] = []
        """Those who wait for the status that is being made."""
        self._status: Status | None = None
        self._made_at = -math.inf
        self._resume_at = math.inf
        """When to accept again, after an error."""

    def bind(self, place: Endpoint | None, role: str, signals: Wakes | None) -> None:
        """Listen there, and in a command, which has `signals`, at the Unix socket.  Raises `OSError` that names the
        address, and `Stopping` at a signal."""
        if place is not None:
            try:
                listeners = listen(place.host, place.port, signals)
            except OSError as error:
                raise OSError(error.errno, f"cannot listen on {place} (--status): {say_error(error)}") from error
            self._listeners.update(dict.fromkeys(listeners, False))
            host, port, *_ = listeners[0].getsockname()
            self.address = host, port
            self._log.info("the status is at http://%s/", show_address((host, port)))
            if not is_own_host(place.host):
                self._log.warning("the status token crosses the network readable: have a proxy speak TLS before it")
        if signals is not None:
            try:
                listener = bind_socket(role)
                listener.setblocking(False)
                self._listeners[listener] = True
            except OSError as error:
                path = f"{error.filename}: " if isinstance(error.filename, str) else ""
                level = logging.WARNING if own_directory() else logging.INFO  # a user without one may not miss it
                self._log.log(level, "tcprelay status cannot ask this process: %s%s", path, say_error(error))

    @property
    def is_open(self) -> bool:
        return bool(self._listeners)

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Answer when this selector says so: the data of its keys are what to call then.  See `look`, too."""
        self._selector = selector
        self._accept_all()

    def _accept_all(self) -> None:
        assert self._selector is not None
        self._resume_at = math.inf
        for listener in self._listeners:
            self._selector.register(listener, selectors.EVENT_READ, functools.partial(self._accept, listener))

    def look(self) -> float:
        """Send away who has taken too long; returns the seconds until that is due again."""
        now = time.monotonic()
        if self._resume_at <= now:
            self._accept_all()
        for visitor in [visitor for visitor in self._visitors if visitor.until <= now]:
            self._leave(visitor)
        return min([self._resume_at - now, *(visitor.until - now for visitor in self._visitors)])

    def forget(self) -> None:
        """In a worker: all of it is its parent's."""
        for sock in (*self._listeners, *(visitor.sock for visitor in self._visitors)):
            sock.close()
        self._listeners, self._visitors, self._waiting = {}, set(), []

    def close(self) -> None:
        """Give it all back."""
        for visitor in list(self._visitors):
            self._leave(visitor)
        for listener, is_local in self._listeners.items():
            if is_local:
                remove_socket(listener)
            listener.close()
        self._listeners.clear()

    def _accept(self, listener: socket.socket) -> None:
        assert self._selector is not None
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:  # out of descriptors, say: it stays in the queue
            if self._resume_at < math.inf:
                return  # another listener has met it in this round
            self._resume_at = time.monotonic() + PAUSE
            for each in self._listeners:
                self._selector.unregister(each)
            return
        sock.setblocking(False)
        if not self._listeners[listener]:  # what relays accept is reset when it is closed
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        visitor = Visitor(sock, self._listeners[listener])
        alike = [other for other in self._visitors if other.is_local == visitor.is_local]
        if len(alike) >= MOST_VISITORS:
            self._leave(min(alike, key=lambda other: (other.has_asked, other.until)))
        self._visitors.add(visitor)
        self._selector.register(sock, selectors.EVENT_READ, functools.partial(self._hear, visitor))

    def _hear(self, visitor: Visitor) -> None:
        """A visitor has said something."""
        try:
            piece = visitor.sock.recv(MOST_HEAD)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        visitor.asked += piece
        if not piece or visitor not in self._visitors:
            self._leave(visitor)
            return
        end = visitor.asked.find(b"\r\n\r\n")
        is_tls = visitor.asked[0] == TLS
        if end < 0 and len(visitor.asked) < MOST_HEAD and not is_tls:
            return
        # Never judged by a part of it: what it says of itself may be missing.
        is_long = (end < 0 and not is_tls) or end + 4 > MOST_HEAD
        assert self._selector is not None
        self._selector.unregister(visitor.sock)
        try:
            if is_long:
                raise TOO_LONG
            request = parse(bytes(visitor.asked[: end + 4]))
            sees_all = admit(request, self._token(), visitor.is_local)
        except Wrong as wrong:
            self._say(visitor, wrong.answer())
            return
        visitor.has_asked = True
        self._waiting.append((visitor, request, sees_all))
        if self._status is not None and time.monotonic() - self._made_at < (FRESH if sees_all else STALE):
            self._tell(self._status)
        elif len(self._waiting) == 1:
            try:
                self.ask(self._note)
            except Exception:
                self._log.exception("unexpected error in the status")
                self._fail()

    def _note(self, status: Status) -> None:
        """The status has been made."""
        self._status, self._made_at = status, time.monotonic()
        self._tell(status)

    def _tell(self, status: Status) -> None:
        waiting, self._waiting = self._waiting, []
        for visitor, request, sees_all in waiting:
            try:
                words = answer(request, status, sees_all)
            except Exception:  # the others have their answers
                self._log.exception("unexpected error in the status")
                words = FAILED.answer()
            if visitor in self._visitors:
                self._say(visitor, words)

    def _fail(self) -> None:
        """No status could be made."""
        waiting, self._waiting = self._waiting, []
        for visitor, *_ in waiting:
            if visitor in self._visitors:
                self._say(visitor, FAILED.answer())

    def _say(self, visitor: Visitor, words: bytes) -> None:
        visitor.answer, visitor.until = memoryview(words), time.monotonic() + PATIENCE
        assert self._selector is not None
        self._selector.register(visitor.sock, selectors.EVENT_WRITE, functools.partial(self._send, visitor))
        self._send(visitor)

    def _send(self, visitor: Visitor) -> None:
        try:
            visitor.answer = visitor.answer[visitor.sock.send(visitor.answer) :]
        except BlockingIOError:
            return
        except OSError:
            visitor.answer = memoryview(b"")
        if not visitor.answer:
            self._leave(visitor)

    def _leave(self, visitor: Visitor) -> None:
        if visitor not in self._visitors:
            return
        self._visitors.discard(visitor)
        self._waiting = [one for one in self._waiting if one[0] is not visitor]
        if self._selector is not None:
            with contextlib.suppress(KeyError):
                self._selector.unregister(visitor.sock)
        ignore_oserror(visitor.sock.shutdown, socket.SHUT_WR)
        visitor.sock.close()
