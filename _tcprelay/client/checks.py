"""Whether services can be reached: each is tried every so often, and is withdrawn from the relay while it is down.

    checker    one thread, where there are checks; waits until one is due, and has it made in a thread of its own
    a check    connects as for a service client, with TLS and a PROXY protocol header where the service gets them; with
               a path it sends an HTTP request, and reads the answer; then it closes normally

There is never more than one check of a service at a time.  The second one in a row that fails, shortly after the first,
withdraws the service; the first that succeeds brings it back.  With workers the first of them checks for all.
"""

from __future__ import annotations

import select
import threading
import time
from typing import Any

from ..client_options import ClientOptions
from ..events import ServiceBack, ServiceDown
from ..runtime import Runtime
from ..streams import Stream
from ..system import random_fraction
from ..text import say_error, shown
from ..values import Publication
from ..waiting import Deadline, Stop, Stopping, wait_for
from .branches import Branches
from .links import Links
from .stock import Service

CHECK_TIMEOUT = 5.0
"""Seconds that a service has to answer an HTTP request, once there is a connection."""
DOWN_INTERVAL = 0.5
"""Seconds between two checks of a service whose last one has failed, at most: when it is back that is known within a
second, its links included."""
FAILURES = 2
"""Checks in a row that have to fail: a service that is started anew may refuse one."""
JITTER = 0.2
"""The share of an interval that is cut off by chance, so that checks of many services do not come together."""
MOST_ANSWER = 65536
"""Bytes of an HTTP answer that are read, so that the connection can be closed normally; the rest is not waited for."""
MOST_STATUS = 4096
"""Bytes of it within which the first line must end."""


class Check:
    """What is known of one service's checks; under the lock of `Checks`."""

    def __init__(self, service: Service, was_down: str) -> None:
        is_down = bool(was_down)
        self.service = service
        """One that has no links."""
        self.reason = was_down
        """Why it is withdrawn."""
        self.due = 0.0
        self.is_running = False
        self.failures = FAILURES * is_down
        self.down_since = time.monotonic() * is_down
        """When it was withdrawn; 0 where it is not."""


class Checks:
    """Checks all services of a relay client, or has another worker of it do so; made before these are forked."""

    def __init__(self, runtime: Runtime[ClientOptions]) -> None:
        self._runtime = runtime
        self._branches: Branches | None = None
        """Where links are: none in the parent of workers."""
        self._withdrawn: dict[str, str] = {}
        """Why services are withdrawn that another worker checks, by their publications: in the parent, and in those
        that it forks."""
        self._is_own = False
        """They are checked in this process."""
        self._order = threading.RLock()
        """Held from what is decided of a service to its withdrawal or return, so that the last word counts; the next
        one, and those of the links, are taken under it."""
        self._changed = threading.Condition()  # over all that follows
        self._checks: dict[Publication, Check] = {}
        self._is_running = False
        self._ended = False

    def begin(self, branches: Branches, is_own: bool) -> None:
        """Withdraw services from these relay servers while they are down; they are checked here where that `is_own`,
        and otherwise in another worker."""
        self._branches, self._is_own = branches, is_own
        branches.told_of = self._join
        for links in branches.links():
            self._join(links)
        self.renew()

    def _join(self, links: Links) -> None:
        """Links to a further relay server are about to be opened."""
        links.told_unreachable = self.suspect
        with self._order:
            with self._changed:
                down = {str(one): check.reason for one, check in self._checks.items() if check.down_since}
            for key, reason in {**self._withdrawn, **down}.items():
                links.withdraw(key, reason)

    def obey(self, order: dict[str, Any]) -> None:
        """Another worker has withdrawn a service, or has it back."""
        with self._order:
            self._withdrawn[order["withdrawn"]] = order["reason"]
            self._withdraw(order["withdrawn"], order["reason"])

    def renew(self) -> None:
        """Check the services that there are now, by the options that are in force."""
        if not self._is_own:
            return
        with self._order:
            with self._changed:
                options = self._runtime.options
                publications = options.services if options.check_service else []
                gone = [self._checks.pop(one) for one in list(self._checks) if one not in publications]
                for publication in publications:
                    # A worker that has died may have found it down, and the others wait for it to be back.
                    was_down = self._withdrawn.pop(str(publication), "")
                    self._checks.setdefault(publication, Check(Service(publication, 1), was_down))
                left = [key for key, reason in self._withdrawn.items() if reason]  # by that worker, and unchecked now
                begin = bool(self._checks) and not self._is_running and not self._ended
                self._changed.notify_all()
            for key in [*(str(check.service.publication) for check in gone if check.down_since), *left]:
                self._withdrawn.pop(key, None)
                self._apply(key, "")
        if begin:
            self._runtime.threads.start(self._run)  # looks for itself whether it is alone

    def end(self) -> None:
        """Begin no further check."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def suspect(self, service: Service) -> None:
        """A connection to a service could not be made: check it now, not when it is due."""
        with self._changed:
            check = self._checks.get(service.publication)
            if check is not None and not check.failures and not check.is_running:
                check.due = 0.0
                self._changed.notify_all()

    def _run(self) -> None:
        """Have checks made when they are due, as long as there are any."""
        with self._changed:
            if self._is_running:
                return
            self._is_running = True
        while due := self._wait():
            for check in due:
                try:
                    self._runtime.threads.start(self._check, check)
                except (RuntimeError, MemoryError):  # for want of a thread nothing is wrong with the service
                    self._note(check, None)

    def _wait(self) -> list[Check]:
        """The checks that are to be made now, waited for; none at the end."""
        with self._changed:
            while self._checks and not self._ended:
                now = time.monotonic()
                idle = [check for check in self._checks.values() if not check.is_running]
                if due := [check for check in idle if check.due <= now]:
                    for check in due:
                        check.is_running = True
                    return due
                self._changed.wait(min((check.due for check in idle), default=now + 60.0) - now)
            self._is_running = False
            return []

    def _check(self, check: Check) -> None:
        """Make one check; the top of its thread."""
        problem: str | None = "unexpected error"
        try:
            problem = self._try(check.service)
        except Stopping:
            problem = None
        except (OSError, EOFError) as error:
            problem = say_error(error)
        finally:
            self._note(check, problem)

    def _try(self, service: Service) -> str:
        """What is wrong with a service, "" for nothing.  Raises `OSError`, `EOFError`, `Stopping`."""
        options = self._runtime.options
        path = options.check_path(service.name)
        if not (links := self._links()):
            raise Stopping("ending")  # there is none yet
        stream = links[0].reach(service)
        try:
            problem = self._ask(stream, service, path) if path else ""
            stream.close_normally()
            return problem
        finally:
            stream.close()

    def _ask(self, stream: Stream, service: Service, path: str) -> str:
        """The same by an HTTP request, once connected."""
        stop, deadline = self._runtime.stop, Deadline(CHECK_TIMEOUT)
        host, port = service.target.host, service.target.port
        host = f"[{host}]" if ":" in host else host or "localhost"
        if port and port != (443 if stream.secure else 80):
            host = f"{host}:{port}"
        stream.send(
            f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: tcprelay\r\nConnection: close\r\n\r\n".encode()
        )
        head, piece = b"", memoryview(bytearray(4096))
        try:
            while b"\n" not in head and len(head) < MOST_STATUS and (count := receive(stream, piece, deadline, stop)):
                head += piece[:count]
        except TimeoutError:
            return f"no answer to GET {path} within {CHECK_TIMEOUT:g} s"
        problem = judge(head, path)
        total, rest = len(head), deadline.within(1.0)
        try:
            while total < MOST_ANSWER and (count := receive(stream, piece, rest, stop)):
                total += count
        except (OSError, EOFError):
            pass  # it has said what was to be known
        return problem

    def _note(self, check: Check, problem: str | None) -> None:
        """A check is over, with this problem, "" for none; ``None`` where it came to nothing."""
        publication = check.service.publication
        what = {"service": publication.name, "target": str(publication.target)}
        with self._order:
            goes, seconds = self._judge(check, problem)
            if goes:
                self._apply(str(publication), problem or "")
            elif seconds:
                self._apply(str(publication), "")
        if goes:
            self._runtime.emit(ServiceDown(reason=problem or "", **what))
        elif seconds:
            self._runtime.emit(ServiceBack(seconds=seconds, **what))

    def _judge(self, check: Check, problem: str | None) -> tuple[bool, float]:
        """Whether a service is to be withdrawn after this check, or else how long it was down that is back; 0 where
        neither."""
        publication, interval = check.service.publication, self._runtime.options.check_service
        with self._changed:
            check.is_running = False
            if problem is not None:
                check.failures = check.failures + 1 if problem else 0
            if check.failures:
                interval = min(interval, DOWN_INTERVAL)
            check.due = time.monotonic() + interval * (1 - JITTER * random_fraction())
            self._changed.notify_all()
            if problem is None or self._ended or self._checks.get(publication) is not check:
                return False, 0.0
            goes, since = check.failures == FAILURES, check.down_since
            back = bool(since) and not problem
            if goes or back:
                check.down_since, check.reason = (time.monotonic(), problem) if goes else (0.0, "")
            return goes, time.monotonic() - since if back else 0.0

    def _apply(self, key: str, reason: str) -> None:
        """Withdraw the service of this publication, or have it back, here and in all other workers."""
        self._withdraw(key, reason)
        if self._runtime.is_worker:
            self._runtime.tell_parent({"withdrawn": key, "reason": reason})

    def _withdraw(self, key: str, reason: str) -> None:
        for links in self._links():
            links.withdraw(key, reason)

    def _links(self) -> list[Links]:
        return self._branches.links() if self._branches is not None else []


def receive(stream: Stream, view: memoryview, deadline: Deadline, stop: Stop) -> int:
    """Receive some bytes, waited for; 0 at the end.  Raises `OSError`, `TimeoutError`, `Stopping`."""
    while (count := stream.recv_now(view)) is None:
        wait_for(stream.fd, select.POLLIN, deadline, stop)
    return count


def judge(head: bytes, path: str) -> str:
    """What is wrong with the beginning of an HTTP answer, "" for nothing: 2xx and 3xx are well (RFC 9110, 15)."""
    line = head.split(b"\n", 1)[0].decode("latin-1").strip()
    version, _, status = line.partition(" ")
    if not version.startswith("HTTP/") or not status[:3].isdigit():
        return f"no HTTP answer to GET {path}"
    return "" if status[:1] in "23" else f"GET {path} is answered by {shown(status, 60)}"
