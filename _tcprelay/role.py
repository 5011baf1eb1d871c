"""What both roles share: how they begin and end, and how they take new options.

Ending goes in this order: `Runtime.stop` is requested, so that nothing new begins and handshakes are cut short; open
connections have until the drain deadline; then `Runtime.cut` is requested, what is left is broken off, and all threads
are waited for.  `Relay.end` may be called by any thread, also from ``on_event``.
"""

from __future__ import annotations

import abc
import logging
import selectors
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

from .events import Draining
from .options import OptionsT, make_options
from .protocol import prove
from .runtime import SHORTEST_TOKEN, Credentials, Runtime
from .signals import Signals
from .state import say_open
from .status.desk import Desk
from .status.report import Status
from .status.survey import Surveyor, concluded, last_slot
from .system import choose_processor
from .text import say_error
from .threads import JOIN_TIMEOUT, join
from .waiting import Deadline


class Parent(Protocol):
    """What forks the worker processes of a role, and lives in their place: see `_tcprelay.processes`."""

    def run(self, signals: Signals) -> int:
        """Live, and return the exit status."""


def warn_about_secrets(runtime: Runtime[Any]) -> None:
    """Say at the start which secrets are weak, or open to others on this host."""
    options, log = runtime.options, runtime.log
    token = runtime.credentials.token or options.secret.encode(errors="replace")
    if 0 < len(token) < SHORTEST_TOKEN:
        log.warning(
            "the token has %d characters: it can be guessed; take %d or more random ones", len(token), SHORTEST_TOKEN
        )
    for name, identity in (runtime.credentials.rights or {}).items():
        if 0 < len(identity.token) < SHORTEST_TOKEN:
            log.warning("the token of %s has %d characters: it can be guessed", name, len(identity.token))
        if identity.token_file and (may := say_open(identity.token_file)):
            log.warning("token-file %s: %s", identity.token_file, may)
    for name in PRIVATE_FILES:
        given = getattr(options, name, "")
        has_key_elsewhere = name.endswith("cert") and bool(getattr(options, name.replace("cert", "key"), ""))
        for path in given if isinstance(given, tuple) else [given]:
            if path and not has_key_elsewhere and (may := say_open(path)):
                log.warning("--%s %s: %s", name.replace("_", "-"), path, may)


PRIVATE_FILES = (
    "token_file",
    "clients",
    "passphrase_file",
    "cert",
    "key",
    "pfx",
    "service_cert",
    "service_key",
    "service_pfx",
    "status_token_file",
)
"""The options that name files with secrets; a certificate's, where its key is in it."""


def say_options(names: list[str]) -> str:
    """Options as they are called on the command line."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def say_changes(before: Credentials, now: Credentials) -> Iterator[str]:
    """What is another one in the files, although the options that name them may be the same."""
    if before.token != now.token:
        yield "the token"
    old, new = before.rights or {}, now.rights or {}
    if names := sorted(name for name in {*old, *new} if old.get(name) != new.get(name)):
        yield f"rights of {', '.join(names[:8])}" + (" and others" if len(names) > 8 else "")
    if before.certificate != now.certificate:
        yield "the certificate"
    if before.service_certificates != now.service_certificates:
        yield "certificates of the service ports"


class Relay(abc.ABC, Generic[OptionsT]):
    """What the two roles have in common: how they begin and end, as a context manager too."""

    def __init__(self, runtime: Runtime[OptionsT]) -> None:
        self.runtime = runtime
        runtime.credentials = self._load_all(runtime.options)
        if runtime.credentials.token or runtime.options.secret:
            prove(b"", "", "", "", "", "")  # imports what it needs now
        self.signals: Signals | None = None
        """In a command: those that come while `prepare` waits end it."""
        self.surveyor = Surveyor(runtime, self.INBOUND_IS_TO_LINK)
        self.desk = Desk(runtime.log, lambda: runtime.credentials.status_token, self._tell_status)
        """Where the status is asked for."""
        self._own_threads: list[threading.Thread] = []
        """The threads that live as long as the role, from before they start."""
        self._lock = threading.Lock()  # over the three below
        self._started = False
        self._closed = False
        self._drain: Deadline | None = None
        self._ended = threading.Event()
        self.reread: Callable[[], OptionsT] | None = None
        """In a command: reads the options once more, for a reload.  Raises `ValueError`."""
        self._reloading = threading.Lock()  # one at a time

    @property
    def options(self) -> OptionsT:
        """All options, as they are in force."""
        return self.runtime.options

    @property
    def status_address(self) -> tuple[str, int]:
        """The bound host and port of the status page.  Raises `RuntimeError` before `start`, and without ``status``."""
        if self.desk.address is None:
            raise RuntimeError("this relay has no status page")
        return self.desk.address

    def status(self) -> Status:
        """What this relay is doing, at this moment: see `Status`.  Any thread, at any time."""
        return concluded(self.survey(last_slot()))

    def _tell_status(self, callback: Callable[[Status], None]) -> None:
        callback(self.status())

    def survey(self, last: int) -> Status:
        """The status of this process, with histories that end with the moment `last`; to be `concluded`."""
        known, vias = self._survey()
        return self.surveyor.survey(known, last, vias)

    @abc.abstractmethod
    def _survey(self) -> tuple[Status, dict[str, str]]:
        """What this role knows of its services and peers, and what carries each connection, by its id."""

    ROLE = ""
    """"server" or "client"."""
    INBOUND_IS_TO_LINK = False
    """Whether what goes to services goes to links."""

    def start(self: RelayT) -> RelayT:
        """Begin to serve; returns when that is so.  Raises `OSError`, with nothing left behind, and
        `RuntimeError` where it was started or ended before."""
        with self._lock:
            if self._started or self._drain is not None:
                raise RuntimeError("this relay was started or ended before")
            self.runtime.begin()
            self._started = True
        try:
            self._open()
            if self.desk.is_open:
                self._own_threads.append(self.runtime.own_thread(self._serve_status, "status", self.runtime.cut))
                self._own_threads[-1].start()
        except BaseException:
            self.end(0)
            raise
        return self

    def prepare(self) -> None:
        """For the commands: what comes before anything is served and needs no thread; with workers their parent does it
        for all of them.

        Raises `OSError`.
        """
        self.surveyor.started = time.time()
        self._prepare()
        self.desk.bind(self.options.status, self.ROLE, self.signals)

    def _serve_status(self) -> None:
        """Answer those who ask for the status, until `Runtime.cut` is requested."""
        runtime = self.runtime
        with selectors.DefaultSelector() as selector:
            selector.register(runtime.cut.fileno(), selectors.EVENT_READ, lambda: None)
            self.desk.watch(selector)
            while not runtime.cut.requested:
                for key, _ in selector.select(min(self.desk.look(), runtime.pulse.EVERY)):
                    key.data()
                runtime.pulse.beat("status")

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
            self.runtime.places.hurry()
            self._ended.wait(timeout + 2 * JOIN_TIMEOUT)
        else:
            self.runtime.places.hurry()
            return []
        return self._finish()

    def _end(self, drain: Deadline) -> None:
        runtime, splices = self.runtime, self.runtime.splices
        runtime.is_ending = True
        runtime.stop.request()
        self._stop_intake()
        if len(splices):
            runtime.emit(Draining(connections=len(splices), seconds=drain.remaining() or 0.0))
        runtime.places.wait_until_empty(drain)
        runtime.cut.request()
        splices.break_off_all("this relay is ending", Deadline(JOIN_TIMEOUT))
        self._wake_all()

    def _finish(self) -> list[str]:
        """Wait for the threads, and give back what they were waiting on; not from one of them."""
        stragglers = self.runtime.threads.end(Deadline(JOIN_TIMEOUT))
        if not self._is_own_thread():
            for thread in self._own_threads:
                join(thread, JOIN_TIMEOUT)
            stragglers += [thread.name for thread in self._own_threads if thread.is_alive()]
        if stragglers:
            self.runtime.log.error("still running at the end: %s", ", ".join(stragglers))
        elif not self._is_own_thread():
            with self._lock:
                first, self._closed = not self._closed, True
            if first:
                self._close()
        return stragglers

    def _is_own_thread(self) -> bool:
        return self.runtime.threads.is_mine() or threading.current_thread() in self._own_threads

    def reload(self, **changes: Any) -> bool:
        """Take new options and read their files again.

        A command reads its configuration again, as far as its environment and its command line let it: the file.  A
        program names the options that change, as for the constructor (``reload(max_pending=10)``).  Certificates, CA
        files and tokens are read in any case, and count for what connects from now on.  What cannot change while it
        runs stays as it is, which the log says in one line.  Where something is wrong all stays as it was: False, and
        the log says why.
        """
        said = self.renew(**changes)
        if self.runtime.is_worker:
            self.runtime.tell_parent({"reloaded": bool(said)})  # which says it when all have done it
        elif said:
            self.runtime.log.info("%s", said)
        return bool(said)

    def renew(self, **changes: Any) -> str:
        """For `reload`, and the parent of workers: the same; returns what is to be said when all have done it, "" where
        something is wrong."""
        runtime = self.runtime
        with self._reloading:
            try:
                known = runtime.credentials
                before, wanted = self.options, self.reread() if self.reread else self.options
                if changes:
                    wanted = make_options(type(wanted), **{**wanted.as_arguments(), **changes})
                options = wanted.with_fixed_of(before)
                credentials = self._load_all(options)
                kept = wanted.differences(options)
                changed = options.differences(before)
                self._apply(options, credentials)
            except (OSError, ValueError) as error:
                name = f"{error.filename}: " if isinstance(error, OSError) and isinstance(error.filename, str) else ""
                runtime.log.error("cannot reload, all stays as it was: %s%s", name, say_error(error))
                return ""
            except Exception:
                runtime.log.exception("unexpected error in a reload")
                return ""
        if kept and not runtime.is_worker:
            runtime.log.warning("only a restart can change %s", say_options(kept))
        what = ", ".join(filter(None, [say_options(changed), *say_changes(known, credentials)]))
        return "the configuration is reloaded" + (f"; changed: {what}" if what else "")

    def _apply(self, options: OptionsT, credentials: Credentials) -> None:
        """Have these be in force from now on.  Raises nothing that the caller could have known of."""
        runtime = self.runtime
        runtime.options, runtime.credentials = options, credentials
        runtime.splices.set_timeouts(options.idle_timeout, options.half_close_timeout)
        if self.reread is not None:
            logging.getLogger("tcprelay").setLevel(options.log_level.upper())

    def invitation(self, with_secrets: bool) -> str:
        """For the commands: what to say at the start for the other side; "" for nothing."""
        return ""

    def _load_all(self, options: OptionsT) -> Credentials:
        credentials, token = self._load_credentials(options), options.read_status_token()
        if token and token == credentials.token:
            raise ValueError("the status token is the relay's token, too, and crosses networks readable: take another")
        return replace(credentials, status_token=token)

    @abc.abstractmethod
    def _load_credentials(self, options: OptionsT) -> Credentials:
        """Read what these options name.  Raises `OSError` and `ValueError`."""

    @abc.abstractmethod
    def _prepare(self) -> None:
        """What `prepare` is for, of this role.  Raises `OSError`."""

    @abc.abstractmethod
    def _open(self) -> None:
        """Begin, with `prepare` first unless this is a worker; `end` is called where this raises `OSError`."""

    @abc.abstractmethod
    def make_workers(self, count: int) -> Parent | None:
        """For the commands: the parent of so many workers that do what this object would do alone; ``None`` where it
        should."""

    def obey(self, order: dict[str, Any]) -> None:
        """For the commands, in a worker: the parent asks for something."""

    FIRST_PROCESSOR, NEXT_PROCESSOR = 0, 1
    """Which processors the role's processes run on, of those that there are; -1 is the last."""

    def choose_processor(self, number: int) -> None:
        """For the commands: have the threads of this process, one of several, run on one processor."""
        choose_processor(self.FIRST_PROCESSOR + number * self.NEXT_PROCESSOR)

    @abc.abstractmethod
    def _stop_intake(self) -> None:
        """Begin nothing new, and give up what is idle; `Runtime.stop` has been requested."""

    def _wake_all(self) -> None:
        """Wake the threads that may still wait for a peer, when all connections are broken off."""

    def _close(self) -> None:
        """Give back what threads were waiting on, when there are none any more."""
        self.desk.close()
        self.runtime.close()

    def _count(self) -> dict[str, int]:
        """The counts so far, those of open connections included."""
        carried = self.runtime.splices.carried().values()
        ways = sum(one.to_link for one in carried), sum(one.from_link for one in carried)
        bytes_in, bytes_out = ways if self.INBOUND_IS_TO_LINK else reversed(ways)
        return {
            "connections": sum(one.opened for one in carried),
            "failed": self.runtime.emit.tally.failed,
            "broken": sum(one.broken for one in carried),
            "bytes_in": bytes_in,
            "bytes_out": bytes_out,
            "open": sum(one.open for one in carried),
        }

    def __enter__(self: RelayT) -> RelayT:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.end()


RelayT = TypeVar("RelayT", bound="Relay[Any]")
