"""What both roles share: how they begin and end."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from .events import Draining, Event, Events
from .messages import encode_message, send_message
from .options import Options
from .protocol import prove
from .signals import Signals
from .system import ssl
from .tcp import Probing
from .text import say_error
from .threads import JOIN_TIMEOUT, Threads, join
from .tuning import choose_processor, from_descriptor_limit
from .waiting import Deadline, Stop
from .watch import Splices


class Parent(Protocol):
    """What forks the worker processes of a role, and lives in their place: see `_tcprelay.processes`."""

    def run(self, signals: Signals) -> int:
        """Live, and return the exit status."""


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
        self.signals: Signals | None = None
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
    def make_workers(self, count: int) -> Parent | None:
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
