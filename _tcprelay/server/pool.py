"""Idle links and waiting service clients: the queue that pairs them."""

from __future__ import annotations

import math
import selectors
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence

from ..waiting import Deadline
from .clients import ENDING, GONE, TOO_MANY_WAIT, NoLinkHere, Refusal, no_link, unreachable
from .pooled import Member, Origin, PooledLink
from .withdrawals import Withdrawals, has_other

MOST_GONE = 256
"""Relay clients that are remembered when they have no links here any more."""
STANDSTILL = 5.0
"""Seconds without a link for anybody after which a service counts as not served, where service clients wait."""


class Pool:
    """Idle links and waiting service clients of all services: the queue that pairs them.

    Service clients are served in the order in which they came, each waiting on a condition of its own, so that
    a link goes to the first and nobody can overtake.  Links are handed out from each relay client's processes in
    turn, and of those of one the most recently proven alive.  Nothing here does I/O or calls back.
    """

    def __init__(self, services: Sequence[str], max_pending: int, most: int) -> None:
        """For so many service clients that may wait, of each service, and so many links, idle or not."""
        self.selector = selectors.DefaultSelector()
        """Watches the idle links, for the keeper; links are entered and removed under the lock."""
        self.max_pending = max_pending
        self.most = most
        self.show: Callable[[str, int, int], object] = lambda service, idle, waiting: None
        """Called, under the lock, with how many links are idle and service clients wait, whenever that changes."""
        self.show_members: Callable[[str, int], object] = lambda service, count: None
        """Likewise, with how many links there are, idle or not."""
        self.count_waiting_elsewhere: Callable[[str], int] = lambda service: 0
        """How many service clients wait in other processes."""
        self.why_withdrawn: Callable[[str], str] = lambda service: self._withdrawals.why(service, self._members)
        """Why a service is withdrawn by all relay clients, "" where it is not; called under the lock."""
        self._lock = threading.Lock()  # over all that follows
        self._withdrawals = Withdrawals()
        self._waiting: dict[str, deque[_Waiter]] = {name: deque() for name in services}
        self._idle: dict[str, OrderedDict[Origin, OrderedDict[PooledLink, None]]] = {n: OrderedDict() for n in services}
        self._idle_counts = dict.fromkeys(services, 0)
        self._expected = dict.fromkeys(services, 0)
        """Service clients that have come and have no link yet, those included that wait for one."""
        self._given_at = dict.fromkeys(services, 0.0)
        """When a service client was last given a link."""
        self._aside: set[PooledLink] = set()
        """Idle links that are not to be given out now."""
        self._members: dict[tuple[str, str], Member] = {}  # of (service, client)
        self._gone: OrderedDict[tuple[str, str], Member] = OrderedDict()
        """Those that have no links here any more, the last `MOST_GONE`: they may have some in other processes."""
        self._member_counts: dict[str, int] = {}
        """How many of them each service has."""
        self._left = threading.Condition(self._lock)
        """Told of each link that leaves, where somebody waits for that."""
        self._is_watched = False
        self._told: set[str] = set()
        """Services of which it has been told that no relay client is connected."""
        self._closed = False

    def add(self, service: str) -> None:
        """A service that there was not before."""
        with self._lock:
            self._waiting[service], self._idle[service] = deque(), OrderedDict()
            self._idle_counts[service] = self._expected[service] = 0
            self._given_at[service] = 0.0

    def remove(self, service: str) -> list[PooledLink]:
        """A service that is no more: who waits for it is refused.  It should have no links; those that are idle all the
        same are returned, to be closed."""
        with self._lock:
            if service not in self._idle:
                return []
            left = [pooled for links in self._idle[service].values() for pooled in links]
            for pooled in left:
                self._remove(pooled)
            for waiter in self._waiting.pop(service):
                waiter.is_gone = True
                waiter.condition.notify()
            self.show(service, 0, 0)
            for table in (self._idle, self._idle_counts, self._expected, self._given_at):
                del table[service]
            self._told.discard(service)
            self._withdrawals.forget(service)
            return left

    def join(self, pooled: PooledLink) -> bool:
        """Count a link in; True for the first one of its relay client.  Raises `Refusal` at the limit, and where its
        service is no more."""
        with self._lock:
            if pooled.service not in self._idle:
                raise Refusal("the port was given back meanwhile", "port")
            if sum(self._member_counts.values()) >= self.most:
                raise Refusal("there are too many links", "limit")
            key = pooled.service, pooled.client
            first = key not in self._members
            if first:
                self._members[key] = pooled.member
                if (before := self._gone.pop(key, None)) is not None:
                    pooled.member.unlinked = before.unlinked
            pooled.member = self._members[key]
            pooled.moved = not first and all(other.host != pooled.host for other in pooled.member.links)
            self._withdrawals.forget(*key)
            pooled.member.links.add(pooled)
            pooled.member.linked = time.monotonic()
            self._count_members(pooled.service, 1)
            self._told.discard(pooled.service)
            return first

    def leave(self, pooled: PooledLink) -> bool:
        """Count a link out; True for the last one of its relay client."""
        with self._lock:
            key = pooled.service, pooled.client
            member = pooled.member
            member.links.discard(pooled)
            member.unlinked = time.monotonic()
            member.carried.add_all(pooled.carried)
            self._count_members(pooled.service, -1)
            if self._is_watched:
                self._left.notify_all()
            if member.links:
                return False
            self._gone[key] = self._members.pop(key)
            if len(self._gone) > MOST_GONE:
                self._gone.popitem(last=False)
            self._withdrawals.leave(*key)
            return True

    def withdraw(self, service: str, client: str = "", seconds: float = 0.0, reason: str = "") -> None:
        """A relay client says that its service is down, which holds for so many seconds; where all have said so those
        who wait are turned away.  Without a client the latter alone."""
        with self._lock:
            if client and service in self._idle:
                self._withdrawals.note(service, client, seconds, reason)
            if self.why_withdrawn(service):
                for waiter in self._waiting.get(service, ()):
                    waiter.condition.notify()

    def say_withdrawn(self, service: str) -> str:
        """As `why_withdrawn`, without the lock."""
        with self._lock:
            return self.why_withdrawn(service)

    def members(self) -> list[PooledLink]:
        """All links, idle or not."""
        with self._lock:
            return [pooled for member in self._members.values() for pooled in member.links]

    def note_answer(self, pooled: PooledLink, problem: str) -> bool:
        """The relay client of a link could not reach its service for this reason, or "" could; whether that is to be
        told, as it could before."""
        with self._lock:
            tell = bool(problem) and not pooled.member.problem
            pooled.member.note(problem)
            return tell

    def survey(self) -> tuple[list[tuple[str, str, Member, list[PooledLink]]], set[PooledLink], dict[str, int]]:
        """All relay clients, by service and id, with their links, those that have none any more included; which links
        are idle; and how many service clients wait for each service."""
        with self._lock:
            known = (*self._members.items(), *self._gone.items())
            members = [(*key, member, list(member.links)) for key, member in known]
            idle = {pooled for origins in self._idle.values() for links in origins.values() for pooled in links}
            return members, idle | self._aside, {service: len(queue) for service, queue in self._waiting.items()}

    def wait_until_gone(self, links: Collection[PooledLink], deadline: Deadline) -> bool:
        """Wait until these have left; False where some have not by the deadline."""
        with self._lock:
            self._is_watched = True
            while left := any(pooled in pooled.member.links for pooled in links):
                if deadline.remaining() == 0:
                    break
                self._left.wait(deadline.remaining())
            self._is_watched = False
            return not left

    def put(self, pooled: PooledLink) -> bool:
        """Hand an idle link to the first service client that waits for one, or keep it; False where it is to be
        closed."""
        with self._lock:
            link = pooled.link
            if self._closed or pooled.revoked or link.leaving or (link.spent and not pooled.unproven):
                return False
            if pooled.unproven or pooled.blocked:
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if pooled.blocked else 0)
                self.selector.register(pooled.link.fd, events, pooled)
                self._aside.add(pooled)
                return True
            pooled.member.linked = time.monotonic()
            for waiter in self._waiting[pooled.service]:
                if pooled.client not in waiter.failed:
                    self._waiting[pooled.service].remove(waiter)
                    self._given_at[pooled.service] = time.monotonic()
                    waiter.pooled = pooled
                    waiter.condition.notify()
                    return True
            self.selector.register(pooled.link.fd, selectors.EVENT_READ, pooled)
            links = self._idle[pooled.service].setdefault(pooled.origin, OrderedDict())
            links[pooled] = None
            if pooled.pongs_due:  # the last one is taken first: let it be one that is known to be alive
                links.move_to_end(pooled, last=False)
            self._count(pooled.service, 1)
            return True

    def take(
        self,
        service: str,
        failed: frozenset[str],
        deadline: Deadline,
        reason: str = "",
        *,
        wait: bool = True,
        first: bool = False,
    ) -> tuple[PooledLink, bool]:
        """An idle link of a relay client that is not in `failed`, waited for until the deadline; and whether it was.

        After a failure, of which `reason` says why, only relay clients that are there are waited for.  A service client
        that had a link before, in vain, is `first` in the queue.  Raises `Refusal`, and without `wait` `NoLinkHere`.
        """
        with self._lock:
            if self._closed:
                raise Refusal(ENDING, "draining")
            if service not in self._idle:
                raise Refusal(GONE, "port")
            if (pooled := self._pick(service, failed)) is not None:
                return pooled, False
            if not wait:
                raise NoLinkHere
            if failed and not has_other(service, failed, self._members):
                raise unreachable(reason)
            if why := self.why_withdrawn(service):
                raise unreachable(why)
            waiting = len(self._waiting[service]) + self.count_waiting_elsewhere(service)
            if waiting >= self.max_pending and not (first or self._is_served(service)):
                raise TOO_MANY_WAIT.apart()
            waiter = _Waiter(threading.Condition(self._lock), failed)
            if first:
                waiter.since = 0.0  # it says nothing about how long others have waited
            self._waiting[service].insert(0 if first else len(self._waiting[service]), waiter)
            self._count(service, 0)
            try:
                waiter.condition.wait_for(
                    lambda: waiter.pooled or self._closed or waiter.is_gone or self.why_withdrawn(service),
                    deadline.remaining(),
                )
                if waiter.pooled is not None:
                    return waiter.pooled, True
                if waiter.is_gone:
                    raise Refusal(GONE, "port")
                self._waiting[service].remove(waiter)
            finally:
                if not waiter.is_gone:
                    self._count(service, 0)
            if self._closed:
                raise Refusal(ENDING, "draining")
            if why := self.why_withdrawn(service):
                raise unreachable(why)
            raise no_link(self._has_client(service))

    def is_unserved(self, service: str) -> bool:
        """Whether it is to be told that no relay client is connected for a service: once, until one is."""
        with self._lock:
            tell = service not in self._told and not self._closed and not self._has_client(service)
            if tell := tell and not self.why_withdrawn(service):
                self._told.add(service)
            return tell

    def has_client(self, service: str) -> bool:
        """Whether there are links of a service, idle or not."""
        with self._lock:
            return self._has_client(service)

    def _has_client(self, service: str) -> bool:
        return self._member_counts.get(service, 0) > 0

    def _count_members(self, service: str, more: int) -> None:
        """So many more links of this service are there; under the lock."""
        count = self._member_counts.pop(service, 0) + more
        if count:
            self._member_counts[service] = count
        self.show_members(service, count)

    def expect(self, service: str, more: int) -> None:
        """So many more service clients have no link yet, which has been found out before they ask for one."""
        with self._lock:
            if service in self._expected:
                self._expected[service] += more

    def count_unserved(self, service: str) -> int:
        """How many service clients have come for whom there is no idle link: those that will wait for one when their
        threads ask, and those that do, some of them once more."""
        with self._lock:
            if service not in self._idle:
                return 0
            return max(self._expected[service] - self._idle_counts[service], len(self._waiting[service]))

    def is_full(self, service: str) -> bool:
        """Whether as many service clients have no link as may wait for one, while others still get theirs: then the
        kernel holds the next ones.  Where none is served they are refused instead (see `take`)."""
        if not service or self._expected.get(service, 0) < self.max_pending:
            return False
        with self._lock:
            return not self._closed and self._is_served(service)

    def _is_served(self, service: str) -> bool:
        """Whether there is a relay client, and links are given out; under the lock."""
        has_client = self._has_client(service)
        waiting = self._waiting[service]
        oldest = waiting[0].since if waiting else math.inf
        return has_client and are_links_given(self.max_pending, self._given_at[service], oldest)

    def hold(self, pooled: PooledLink) -> bool:
        """Take one certain link out of the pool; False where it is not in it."""
        with self._lock:
            if pooled in self._aside:
                self._aside.discard(pooled)
                self.selector.unregister(pooled.link.fd)
                return True
            origins = self._idle.get(pooled.service)  # the service may be no more
            if origins is None or pooled not in origins.get(pooled.origin, ()):
                return False
            self._remove(pooled)
            pooled.member.linked = time.monotonic()
            return True

    def hold_all(self, client: str) -> list[PooledLink]:
        """Take all idle links of a relay client out of the pool, except those that are not given out anyway."""
        with self._lock:
            held = [
                pooled
                for origins in self._idle.values()
                for origin, links in origins.items()
                if origin[0] == client
                for pooled in links
            ]
            for pooled in held:
                self._remove(pooled)
            return held

    def idle_links(self) -> list[PooledLink]:
        """All idle links, settling ones included."""
        with self._lock:
            return self._all_idle()

    def has_surplus(self, pooled: PooledLink) -> bool:
        """Whether the relay client of this link has more idle ones than it wants."""
        with self._lock:
            origins = self._idle.get(pooled.service)
            return origins is not None and len(origins.get(pooled.origin, ())) > pooled.wanted

    def count_idle(self) -> int:
        with self._lock:
            return sum(self._idle_counts.values())

    def has_waiting(self, service: str) -> bool:
        """Whether a service client waits for a link of this service."""
        return bool(self._waiting.get(service))

    def count_waiting(self, service: str | None = None) -> int:
        """How many service clients wait, for one service or for all."""
        with self._lock:
            return sum(len(queue) for name, queue in self._waiting.items() if service in (None, name))

    def close(self) -> list[PooledLink]:
        """Turn everybody away from now on; returns the links that were idle."""
        with self._lock:
            self._closed = True
            for waiters in self._waiting.values():
                for waiter in waiters:
                    waiter.condition.notify()
            idle = self._all_idle()
            for pooled in idle:
                if pooled not in self._aside:
                    self._remove(pooled)
            self._aside.clear()
            return idle

    def _all_idle(self) -> list[PooledLink]:
        idle = [p for clients in self._idle.values() for links in clients.values() for p in links]
        return idle + list(self._aside)

    def _pick(self, service: str, failed: frozenset[str]) -> PooledLink | None:
        """The best link of the next origin in turn; one that owes a PONG, or has just failed, only as the last one."""
        origins, last_resort = self._idle[service], None
        for origin, links in origins.items():
            if origin[0] not in failed:
                pooled = next(reversed(links))
                if not (pooled.pongs_due or pooled.member.is_shunned):
                    break
                last_resort = last_resort or pooled
        else:
            if last_resort is None:
                return None
            pooled = last_resort
        self._remove(pooled)
        self._given_at[service] = pooled.member.linked = time.monotonic()
        if pooled.origin in origins:
            origins.move_to_end(pooled.origin)
        return pooled

    def _remove(self, pooled: PooledLink) -> None:
        origins = self._idle[pooled.service]
        links = origins[pooled.origin]
        del links[pooled]
        if not links:
            del origins[pooled.origin]
        self._count(pooled.service, -1)
        self.selector.unregister(pooled.link.fd)

    def _count(self, service: str, more: int) -> None:
        """So many more links of this service are idle; under the lock."""
        self._idle_counts[service] += more
        self.show(service, self._idle_counts[service], len(self._waiting[service]))


def are_links_given(max_pending: int, last: float, oldest: float) -> bool:
    """Whether waiting for a link of a service makes sense: one was given out of late, or none has been waited for long.
    Where `max_pending` is 0 it makes none."""
    return max_pending > 0 and time.monotonic() - max(last, oldest) < STANDSTILL


class _Waiter:
    """A service client that waits in the pool's queue."""

    __slots__ = ("condition", "failed", "is_gone", "pooled", "since")

    def __init__(self, condition: threading.Condition, failed: frozenset[str]) -> None:
        self.since = time.monotonic()
        self.condition = condition
        self.failed = failed
        self.pooled: PooledLink | None = None
        self.is_gone = False
        """Its service is no more."""
