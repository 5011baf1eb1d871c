"""The parent of a relay server's worker processes: it accepts, and they serve.

A link goes to the worker with the fewest idle ones, before its handshake, and stays there.  A service client goes to a
worker that has an idle link for its service, and where none has it waits here, so that there is one queue.  How many
links are idle where is read from the `Account`: no message is needed for that, and two for a connection in all.

Everything here runs in the one thread of `Workers.run`.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ..addresses import show_address
from ..events import ClientDown, ClientUp, ConnectionFailed, ServiceUnserved
from ..messages import adopt_socket, encode_message
from ..server_options import ServerOptions
from ..processes import WorkerProcess, Workers
from ..role import Relay
from ..text import connection_id
from .account import HANDED, LINKS, RETURNED, WAITING, Account, WorkerAccount
from .clients import ENDING, GONE, TOO_MANY_CONNECTIONS, TOO_MANY_WAIT, Refusal, no_link, unreachable
from .limits import Quotas
from .leases import MOST_LEASES, Ask, Leases
from .listeners import Listeners
from .pool import are_links_given
from .proxies import glance
from .withdrawals import Withdrawals, has_other


class Visitor:
    """A service client in the parent."""

    __slots__ = ("address", "deadline", "early", "queued", "service", "since", "sock", "state", "visited")

    def __init__(self, service: str, sock: socket.socket, address: Any, since: float, patience: float) -> None:
        self.service = service
        self.sock = sock
        self.address = address
        self.since = since
        self.deadline = since + patience
        self.queued = False
        self.state: dict[str, Any] = {}
        """What a worker that has sent it back knows of it."""
        self.early = b""
        self.visited: set[int] = set()
        """The workers none of whose relay clients could reach the service."""


class ServerWorkers(Workers):
    """The parent of a relay server's workers.

    Parameters: the server; how many workers; its listeners; what has the server in a new process be one of them, with
    its part of the account and the socket over which connections come; and what counts by name what its relay clients
    have.
    """

    LOOK_AGAIN = 0.25
    """Seconds after which the queues are looked at even if no worker has sent a message."""

    def __init__(
        self,
        server: Relay[ServerOptions],
        count: int,
        listeners: Listeners,
        become_one_of: Callable[[WorkerAccount, socket.socket], None],
        quotas: Sequence[Quotas] = (),
    ) -> None:
        super().__init__(server, count)
        self._server = server
        self._quotas = quotas
        self._listeners = listeners
        self._become_one_of = become_one_of
        services = [service.name for service in server.options.services]
        self._account = Account(count, services, MOST_LEASES)
        runtime = server.runtime
        self.leases = Leases(runtime, listeners, self._account.has_members, self._begin_service, self._end_service)
        self._queues: dict[str, deque[Visitor]] = {name: deque() for name in services}
        self._present: dict[tuple[str, str], tuple[ClientUp, set[int]]] = {}
        """The relay clients, and which workers have links of them."""
        self._clients_of: dict[str, set[str]] = {}
        """The same by service."""
        self._told: set[str] = set()
        """Services of which it has been told that no relay client is connected."""
        self._given_at = dict.fromkeys(services, 0.0)
        """When a service client was last sent to a worker that has a link for it."""
        self._next_give_up = 0.0
        self._next_retry = 0.0
        """When those who wait after a failure may go again where there was nothing for them."""
        self._withdrawals = Withdrawals()
        listeners.hand_on, listeners.is_full = self._receive_connection, self._is_full

    @property
    def _options(self) -> ServerOptions:
        return self._server.options

    def open(self) -> None:
        self._listeners.watch(self.selector)

    def become(self, worker: WorkerProcess, intake: socket.socket) -> None:
        for queue in self._queues.values():
            for visitor in queue:
                visitor.sock.close()
        self._listeners.forget()
        self._become_one_of(WorkerAccount(self._account, worker.number), intake)

    def stop_intake(self) -> None:
        self._listeners.ignore()
        self._listeners.close()
        for service in self._queues:
            while visitor := self._next(service):
                self._refuse(visitor, Refusal(ENDING, "draining"))

    # Accepting

    def _is_full(self, service: str) -> bool:
        """As `Pool.is_full`."""
        queue, most = self._queues.get(service, ()), self._options.max_pending
        if not service or len(queue) < most or not self._has_client(service):
            return False
        return are_links_given(most, self._given_at[service], queue[0].since if queue else math.inf)

    def _receive_connection(self, service: str, sock: socket.socket, address: Any) -> None:
        """A connection was accepted.  Raises `RuntimeError` where it cannot be taken."""
        if service:
            self._receive_client(Visitor(service, sock, address, time.monotonic(), self._options.pair_timeout))
            return

        def load(worker: WorkerProcess) -> tuple[int, int]:
            number, account = worker.number, self._account
            balance = account.under_way(number, LINKS)
            for name in self._queues:
                balance += account.idle(number, name) - account.read(number, name, WAITING)
            return balance, account.clients(number)

        fields = {"service": "", "address": address}
        if not any(self._hand(worker, fields, sock) for worker in sorted(self._living(), key=load)):
            raise RuntimeError("no worker takes it")

    def _hand(self, worker: WorkerProcess, fields: dict[str, Any], sock: socket.socket, early: bytes = b"") -> bool:
        """Send a worker a connection, which this process then has no more; False where it does not take it."""
        kind, address, message = fields["service"], fields["address"], encode_message(fields, early)
        self._account.add(worker.number, kind, HANDED)
        taken = False
        try:
            taken = worker.hand(message, sock.fileno())
        finally:
            if not taken:
                self._account.add(worker.number, kind, HANDED, -1)
        if not taken:
            return False
        self._account.hold(worker.number, self._listeners.share(kind), address, 1)
        sock.close()
        return True

    def _living(self) -> list[WorkerProcess]:
        return [worker for worker in self.workers if worker.pid]

    # Service clients

    def _receive_client(self, visitor: Visitor) -> None:
        queue, options = self._queues[visitor.service], self._options
        if options.max_connections and self._count_clients() >= options.max_connections:
            self._refuse(visitor, TOO_MANY_CONNECTIONS)
        elif queue or not self._send(visitor):
            if why := self._account.withdrawn.get(visitor.service):
                self._refuse(visitor, unreachable(why))
                return
            self._note_unserved(visitor)
            if len(queue) >= options.max_pending:
                self._refuse(visitor, TOO_MANY_WAIT)
                return
            visitor.queued = True
            queue.append(visitor)
            self._guard(functools.partial(self._serve_queue, visitor.service))  # from here on it is not the acceptor's

    def _note_unserved(self, visitor: Visitor) -> None:
        """Tell, once until one comes, that a service client waits where no relay client is connected."""
        service = visitor.service
        if service not in self._told and not self._has_client(service):
            self._told.add(service)
            self.emit(ServiceUnserved(service=service, peer=show_address(self._origin(visitor))))

    def _origin(self, visitor: Visitor) -> Any:
        """Where a service client comes from really, as far as that is known: as a worker has found, or as it stands at
        the beginning of what it has sent."""
        if "origin" in visitor.state:
            return tuple(visitor.state["origin"])
        return glance(visitor.sock, visitor.address, self._options.accept_proxy_protocol)

    def _has_client(self, service: str) -> bool:
        return any(name == service for name, _ in self._present)

    def count_waiting(self) -> dict[str, int]:
        """How many service clients wait here for each service."""
        return {service: len(queue) for service, queue in self._queues.items()}

    def _count_clients(self) -> int:
        waiting = sum(map(len, self._queues.values()))
        return waiting + sum(self._account.clients(worker.number) for worker in self.workers)

    def _send(self, visitor: Visitor) -> bool:
        """Send a service client to a worker that has a link for it; False where there is none."""
        service, best, most = visitor.service, None, (0, 0)
        for worker in self._living():
            if worker.number not in visitor.visited:
                idle = self._account.idle(worker.number, service)
                rank = idle, -self._account.clients(worker.number)
                if idle > 0 and (best is None or rank > most):
                    best, most = worker, rank
        if best is None:
            return False
        fields = {**visitor.state, "service": service, "address": visitor.address, "since": visitor.since,
                  "waited": time.monotonic() - visitor.since, "queued": visitor.queued}  # fmt: skip
        if not self._hand(best, fields, visitor.sock, visitor.early):
            return False
        self._given_at[service] = time.monotonic()
        return True

    def _serve_queue(self, service: str) -> None:
        """Pair waiting service clients with idle links; the queue's length is shown before the account is read."""
        queue, at = self._queues[service], 0
        self._account.show_queue(service, len(queue))
        while at < len(queue):
            if self._send(queue[at]):
                del queue[at]
                self._account.show_queue(service, len(queue))
            elif queue[at].visited:
                at += 1  # others may go where there is nothing for this one
            else:
                return

    # Services that relay clients have withdrawn

    def _note_withdrawn(self, service: str) -> None:
        """Tell the workers where a service is withdrawn by all, or not any more, and turn away those who wait for it
        here."""
        said, withdrawn = service in self._queues and self._withdrawals.is_said(service), self._account.withdrawn
        present = ((service, client) for client in self._clients_of.get(service, ()))
        why = self._withdrawals.why(service, present) if said else None
        if why == withdrawn.get(service):
            return
        if why is None:
            del withdrawn[service]
        else:
            withdrawn[service] = why
        for worker in self._living():
            worker.send(encode_message({"withdrawn": service, "why": why}))
        while why and (visitor := self._next(service)):
            self._refuse(visitor, unreachable(why))

    def _next(self, service: str) -> Visitor | None:
        queue = self._queues[service]
        visitor = queue.popleft() if queue else None
        self._account.show_queue(service, len(queue))
        return visitor

    def _refuse(self, visitor: Visitor, refusal: Refusal) -> None:
        state = {"service": visitor.service, "since": visitor.since, **visitor.state, "origin": self._origin(visitor)}
        visitor.sock.close()
        self._note_refused(state, visitor.address, refusal)

    def _note_refused(self, state: dict[str, Any], address: Any, refusal: Refusal) -> None:
        self._listeners.of_clients.leave(address)
        record = {"id": state.get("id") or connection_id(), "service": state["service"]}
        seconds = time.monotonic() - state["since"]
        peer = show_address(tuple(state.get("origin") or address))
        why = {"code": refusal.code, "reason": str(refusal)}
        self.emit(ConnectionFailed(peer=peer, seconds=seconds, **why, **record))

    def _balance(self, service: str) -> None:
        """Where service clients wait in one worker, and links are idle in another: have one opened anew."""
        now, account = time.monotonic(), self._account
        if now < self._next_give_up:
            return
        waiting = {worker.number: account.read(worker.number, service, WAITING) for worker in self._living()}
        if not any(waiting.values()):
            return  # a service client on its way to a link that was lost comes back
        spare = {number: account.idle(number, service) - count for number, count in waiting.items()}
        if min(spare.values()) < 0 < max(spare.values()):
            richest = max(spare, key=lambda number: spare[number])
            self.workers[richest].order(encode_message({"give_up": service}))
            self._next_give_up = now + self.LOOK_AGAIN

    # Ports on demand

    def _begin_service(self, key: str, address: tuple[str, int]) -> None:
        self._account.open(key)
        self._queues[key], self._given_at[key] = deque(), 0.0

    def _end_service(self, key: str) -> None:
        while visitor := self._next(key):
            self._refuse(visitor, Refusal(GONE, "port"))
        for table in (self._queues, self._given_at):
            table.pop(key, None)
        self._told.discard(key)
        self._withdrawals.forget(key)
        self._note_withdrawn(key)
        self._account.close(key)
        for worker in self._living():
            worker.send(encode_message({"given_back": key}))

    def _answer(self, worker: WorkerProcess, number: int, ask: dict[str, Any]) -> None:
        """A relay client has asked one of the workers for a port."""
        answer: dict[str, Any] = {"asked": number}
        try:
            key = self.leases.ask(Ask(**ask))
            answer |= {"key": key, "row": self._account.open(key), "address": self._listeners.addresses[key]}
        except Refusal as refusal:
            answer |= {"refused": str(refusal), "code": refusal.code}
        worker.send(encode_message(answer))

    # Workers

    def hear(self, worker: WorkerProcess, message: dict[str, Any], payload: bytes, descriptors: list[int]) -> None:
        if "look" in message:
            if message["look"] in self._queues:
                self._serve_queue(message["look"])
                self._balance(message["look"])
        elif "suspect" in message:
            for other in self._living():
                if other is not worker:
                    other.order(encode_message(message))
        elif "withdraw" in message:
            if message["withdraw"] in self._queues:  # its port may have been given back
                self._withdrawals.note(message["withdraw"], message["client"], message["seconds"], message["reason"])
                self._note_withdrawn(message["withdraw"])
        elif "back" in message:
            self._withdrawals.forget(message["back"], message["client"])
            self._note_withdrawn(message["back"])
        elif "ask" in message:
            self._answer(worker, message["ask"], message["for"])
        elif "left" in message:
            share, address = self._listeners.share(message["left"]), tuple(message["address"])
            self._account.hold(worker.number, share, address, -1)
            share.leave(address)
        else:
            self._account.hold(worker.number, self._listeners.of_clients, tuple(message["address"]), -1)
            if message["service"] not in self._queues:
                self._note_refused(message, tuple(message["address"]), Refusal(GONE, "port"))
                return
            self._account.add(worker.number, message["service"], RETURNED)
            if descriptors:
                self._take_back(worker, message, payload, descriptors)
            else:  # the kernel had no number for it here, and has reset it
                no_number = Refusal(os.strerror(errno.EMFILE).lower(), "system")
                self._note_refused(message, tuple(message["address"]), no_number)

    def _take_back(self, worker: WorkerProcess, state: dict[str, Any], early: bytes, descriptors: list[int]) -> None:
        address = tuple(state["address"])
        try:
            sock, patience = adopt_socket(descriptors[0], address), self._options.pair_timeout
            descriptors.clear()
            visitor = Visitor(state["service"], sock, address, state["since"], patience)
            visitor.state, visitor.early, visitor.visited = state, early, set(state["visited"])
        except BaseException:
            self._note_refused(state, address, Refusal("unexpected error", "system"))
            raise
        if self._kill is not None:
            self._refuse(visitor, Refusal(ENDING, "draining"))
            return
        if state["failed"]:
            visitor.visited.add(worker.number)
            state["visited"] = list(visitor.visited)
            if self._send(visitor):
                return
            if not has_other(visitor.service, state["failed"], self._present):
                self._refuse(visitor, unreachable(state["reason"]))
                return
        if why := self._account.withdrawn.get(visitor.service):
            self._refuse(visitor, unreachable(why))
            return
        self._note_unserved(visitor)
        queue = self._queues[visitor.service]  # where it has its place by the moment at which it came
        queue.insert(sum(other.since < visitor.since for other in queue), visitor)
        self._serve_queue(visitor.service)

    def tell(self, event: str, fields: dict[str, Any], worker: WorkerProcess) -> None:
        """A relay client is connected while one of the workers has links of it."""
        key = fields["service"], fields["client"]
        if event == "ClientUp":
            if key not in self._present:
                self._present[key] = ClientUp(**fields), set()
                self._clients_of.setdefault(key[0], set()).add(key[1])
                self._told.discard(key[0])
                self.emit(self._present[key][0])
            self._present[key][1].add(worker.number)
            self._withdrawals.forget(*key)
            self._note_withdrawn(key[0])
        elif key in self._present:
            self._absent(key, worker, fields["reason"])

    def _absent(self, key: tuple[str, str], worker: WorkerProcess, reason: str) -> None:
        up, numbers = self._present[key]
        numbers.discard(worker.number)
        if not numbers:
            del self._present[key]
            clients = self._clients_of[key[0]]
            clients.discard(key[1])
            if not clients:
                del self._clients_of[key[0]]
            self._withdrawals.leave(*key)
            self._note_withdrawn(up.service)
            self.emit(ClientDown(service=up.service, client=up.client, name=up.name, peer=up.peer, reason=reason))

    def lost(self, worker: WorkerProcess) -> None:
        self._account.strike(worker.number)
        for quota in self._quotas:
            quota.strike(worker.number)
        for key in [key for key, (_, numbers) in self._present.items() if worker.number in numbers]:
            self._absent(key, worker, "its worker has died")

    def look_at_time(self) -> float:
        self.leases.look()
        wait, now = min(1.0, self._listeners.look()), time.monotonic()
        self.emit.tell_floods()
        retry = now >= self._next_retry
        for service in {*self._withdrawals.services(), *self._account.withdrawn} if retry else ():
            self._note_withdrawn(service)  # what was said holds for a while alone
        self._next_retry = now + self.LOOK_AGAIN if retry else self._next_retry
        for service, queue in list(self._queues.items()):
            for visitor in queue if retry else ():
                visitor.visited, visitor.state = set(), visitor.state | ({"visited": []} if visitor.state else {})
            while queue and queue[0].deadline <= now:  # first of all: they leave whatever goes wrong with the queue
                self._refuse(queue.popleft(), no_link(self._has_client(service)))
            self._serve_queue(service)
            if self._account.count_waiting(service):
                self._balance(service)
                wait = min(wait, self.LOOK_AGAIN)
            if queue:
                wait = min(wait, queue[0].deadline - now)
        return wait
