"""Where a relay server's connections come from, and where it is told what becomes of them.

`PortIntake` accepts them in this process:

    acceptor   one thread; blocks in a selector over all listeners and `Runtime.stop`; hands every socket to a thread of
               its own, and does nothing that could wait

`ParentIntake`, in a worker process, gets them from the parent, which accepts for all (see `_tcprelay.server.workers`):

    takers     one of them always waits for the next connection: the last one that waits starts another before it
               serves what it has taken.  So each connection wakes the thread that serves it, and no other

The parent chooses a worker by figures that may be out of date when the service client arrives there.  Then it is sent
back, and so is one whose relay client cannot reach the service, with the bytes that it has sent: another worker may
have a link of another relay client.  Only where the service port speaks TLS, a service client stays where its handshake
was: it waits in the worker, new links go there first, and if idle links are elsewhere, one of them is closed to be
opened anew.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import itertools
import math
import os
import queue
import selectors
import socket
import threading
import time
from dataclasses import asdict
from collections.abc import Callable
from typing import Any

from ..addresses import is_among, show_address
from ..events import ConnectionFailed, ServiceUnserved
from ..messages import MESSAGE_ROOM, MESSAGE_SIZE, adopt_socket, decode_message, encode_message, receive_message
from ..server_options import ServerOptions
from ..runtime import Runtime
from ..system import ignore_oserror
from ..tcp import set_timeout
from ..text import connection_id, say_error
from ..threads import JOIN_TIMEOUT, Threads, join
from ..waiting import Bell, Deadline
from .account import LINKS, WorkerAccount
from .leases import Ask, Leases, name_in
from .clients import ENDING, NoLinkHere, Refusal, ServiceClient, unreachable
from .listeners import Listeners
from .pool import Pool
from .pooled import PooledLink

ANSWER_TIMEOUT = 5.0
"""Seconds that a worker waits for its parent's word on a port: less than what a relay client has for an answer."""
SPARE_TAKERS = 8
"""Threads of a worker that wait for connections, at most."""


class Intake(abc.ABC):
    """What the parts of a relay server know of where connections come from."""

    serve_client: Callable[[ServiceClient], None]
    serve_link: Callable[[socket.socket, Any], None]
    """What serves a connection, up to its end, in a thread of its own."""
    drop_links: Callable[[list[PooledLink]], None]
    """What closes links whose service is no more."""

    def __init__(self, runtime: Runtime[ServerOptions], pool: Pool, listeners: Listeners) -> None:
        self._runtime = runtime
        self._pool = pool
        self._listeners = listeners
        self.addresses = listeners.addresses
        """Where each service is: its name, host and port."""
        self.threads: list[threading.Thread] = []
        """Those that live as long as the server."""

    @abc.abstractmethod
    def start(self) -> None:
        """Begin to take connections."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Take no more; `Runtime.stop` has been requested."""

    @abc.abstractmethod
    def settle(self, client: ServiceClient) -> None:
        """A service client has found a link, or is gone; any number of times."""

    @abc.abstractmethod
    def leave(self, service: str, address: Any) -> None:
        """A connection from this address is gone: a service client's, or to the relay port under ""."""

    def arrive(self, client: ServiceClient) -> None:
        """A service client is ready to be served, which may be some time after its connection was accepted."""

    def refuses(self, service: str, address: Any) -> str:
        """As `Access.refuses`, by the lists that are in force."""
        return self._listeners.access.refuses(service, address)

    def is_ready(self, client: ServiceClient) -> bool:
        """Whether a service client can be served at once: a TLS handshake, and the header of a proxy, come before that,
        and silent ones would seem to take all the links, and keep others out."""
        awaits_header = not client.introduced and is_among(client.address, self._runtime.options.accept_proxy_protocol)
        return not (client.stream.secure or awaits_header)

    def count_waiting(self, service: str) -> int:
        """How many service clients wait for a link, in all processes."""
        return self._pool.count_waiting(service) + self._pool.count_waiting_elsewhere(service)

    def own_share(self, idle: int) -> int:
        """How many idle links there should be here, of so many that a relay client keeps."""
        return idle

    @abc.abstractmethod
    def ask(self, ask: Ask) -> str:
        """Have a relay client be given the port that it asks for; returns the key of its service.  Raises `Refusal`."""

    def obey(self, order: dict[str, Any]) -> bool:
        """Whether what the parent asks for is for this part; then it is done."""
        return False

    def offer(self, service: str) -> None:
        """A link is idle here."""

    def pass_on(self, client: ServiceClient) -> None:
        """There is no link for a service client here.  Raises `NoLinkHere` where another process has it now, and
        `Refusal` where it cannot be passed on."""

    def note_unserved(self, client: ServiceClient) -> None:
        """A service client is about to wait: tell where no relay client is connected.  In a worker the parent has done
        so: who comes here has had a link."""

    def suspect(self, client: str, why: str) -> None:
        """A relay client seems to be out of reach."""

    def withdraw(self, service: str, client: str, seconds: float, reason: str) -> None:
        """A relay client has withdrawn its service, which holds for so many seconds."""
        self._pool.withdraw(service, client, seconds, reason)

    def note_back(self, service: str, client: str) -> None:
        """A relay client has a new link for a service."""


class PortIntake(Intake):
    """Accepts connections on the server's ports."""

    def __init__(self, runtime: Runtime[ServerOptions], pool: Pool, listeners: Listeners) -> None:
        super().__init__(runtime, pool, listeners)
        listeners.is_full, listeners.hand_on = pool.is_full, self._hand_on
        self._left: list[PooledLink] = []
        """Links of services that are no more, which are to be closed; for the acceptor."""
        self.leases = Leases(runtime, listeners, pool.has_client, self._begin_service, self._end_service)
        self._acceptor = runtime.own_thread(self._accept, "acceptor", runtime.stop)
        self.threads.append(self._acceptor)

    def start(self) -> None:
        self._acceptor.start()

    def stop(self) -> None:
        join(self._acceptor, JOIN_TIMEOUT)
        self._listeners.close()

    def settle(self, client: ServiceClient) -> None:
        if client.unsettled:
            client.unsettled = False
            self._pool.expect(client.service, -1)

    def leave(self, service: str, address: Any) -> None:
        self._listeners.share(service).leave(address)

    def arrive(self, client: ServiceClient) -> None:
        if not client.unsettled:
            client.unsettled = True
            self._pool.expect(client.service, 1)

    def count_waiting(self, service: str) -> int:
        return self._pool.count_unserved(service)

    def ask(self, ask: Ask) -> str:
        return self.leases.ask(ask)

    def note_unserved(self, client: ServiceClient) -> None:
        if self._pool.is_unserved(client.service):
            self._runtime.emit(ServiceUnserved(service=client.service, peer=client.peer))

    def _accept(self) -> None:
        """Accept until `Runtime.stop` is requested."""
        stop, listeners = self._runtime.stop, self._listeners
        bell = Bell()
        with contextlib.closing(bell), selectors.DefaultSelector() as selector:
            selector.register(stop.fileno(), selectors.EVENT_READ, lambda: None)
            selector.register(bell, selectors.EVENT_READ, bell.hush)
            listeners.bell = bell
            listeners.watch(selector)
            while not stop.requested:
                wait = min(self.leases.look() if self.leases.may_be_given else math.inf, listeners.look())
                if self._left:
                    links, self._left = self._left, []
                    self.drop_links(links)
                for key, _ in selector.select(min(wait, self._runtime.pulse.EVERY)):
                    key.data()
                self._runtime.pulse.beat("acceptor")
            listeners.bell = None

    def _begin_service(self, key: str, address: tuple[str, int]) -> None:
        self._pool.add(key)

    def _end_service(self, key: str) -> None:
        self._left += self._pool.remove(key)

    def _hand_on(self, service: str, sock: socket.socket, address: Any) -> None:
        """Serve a connection in a thread of its own.  Raises `RuntimeError` where there is none."""
        threads = self._runtime.threads
        if not service:
            threads.start(self.serve_link, sock, address)
            return
        client = ServiceClient(service, sock, address, self._runtime.credentials.faces_of(name_in(service)))
        if self.is_ready(client):
            self.arrive(client)
        try:
            threads.start(self.serve_client, client)
        except BaseException:
            self.settle(client)
            raise


class ParentIntake(Intake):
    """In a worker: takes the connections that the parent sends over a socket."""

    def __init__(
        self, runtime: Runtime[ServerOptions], pool: Pool, listeners: Listeners, source: socket.socket,
        account: WorkerAccount,
    ) -> None:  # fmt: skip
        super().__init__(runtime, pool, listeners)
        self._source = source
        self._account = account
        self._lock = threading.Lock()  # over the next
        self._takers = 0
        """The threads that wait for a connection."""
        self._tell_at = 0.0
        """When the next connection that cannot be taken is to be told."""
        self._asked: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        """Where the answers go to what the parent was asked."""
        self._questions = itertools.count(1)
        self._withdrawn = account.withdrawn
        """Of services that a relay client has withdrawn: why all have, or "" where not all have."""
        pool.why_withdrawn = lambda service: self._withdrawn.get(service, "")
        pool.show, pool.count_waiting_elsewhere = account.show, account.count_waiting_elsewhere
        pool.show_members = account.show_members

    def start(self) -> None:
        self._takers = 1
        set_timeout(self._source, socket.SO_RCVTIMEO, Threads.PARKED)
        self._runtime.threads.start(self._take)

    def stop(self) -> None:
        ignore_oserror(self._source.shutdown, socket.SHUT_RD)  # wakes the takers

    def settle(self, client: ServiceClient) -> None:
        if client.unsettled:
            client.unsettled = False
            self._account.settle(client.service)
            self.offer(client.service)

    def leave(self, service: str, address: Any) -> None:
        self._account.leave(service)
        if self._listeners.share(service).counts:
            self._runtime.tell_parent({"left": service, "address": address})

    def own_share(self, idle: int) -> int:
        return math.ceil(idle / self._account.workers)

    def offer(self, service: str) -> None:
        if self._account.count_waiting_elsewhere(service):
            self._runtime.tell_parent({"look": service})

    def pass_on(self, client: ServiceClient) -> None:
        if client.stream.secure:
            self._runtime.tell_parent({"look": client.service})
            return
        message = encode_message(client.state, bytes(client.early))
        if len(message) > MESSAGE_SIZE - MESSAGE_ROOM:  # with the ids of hundreds of relay clients
            raise unreachable(client.reason)
        try:
            self._runtime.send_to_parent(message, [client.stream.fd])
        except OSError as error:  # too many descriptors under way, say
            raise Refusal(f"it cannot be passed on to another worker: {say_error(error)}", "system") from error
        client.passed_on = True
        raise NoLinkHere

    def suspect(self, client: str, why: str) -> None:
        self._runtime.tell_parent({"suspect": client, "why": why})

    def withdraw(self, service: str, client: str, seconds: float, reason: str) -> None:
        self._runtime.tell_parent({"withdraw": service, "client": client, "seconds": seconds, "reason": reason})

    def note_back(self, service: str, client: str) -> None:
        if service in self._withdrawn:
            self._runtime.tell_parent({"back": service, "client": client})

    def ask(self, ask: Ask) -> str:
        number, answers = next(self._questions), queue.SimpleQueue[dict[str, Any]]()
        self._asked[number] = answers
        try:
            self._runtime.tell_parent({"ask": number, "for": asdict(ask)})
            deadline, answer = Deadline(ANSWER_TIMEOUT), dict[str, Any]()
            while not answer and deadline.remaining() and not self._runtime.stop.requested:
                with contextlib.suppress(queue.Empty):
                    answer = answers.get(timeout=0.25)
        finally:
            del self._asked[number]
        if not answer:
            raise Refusal("the relay server is too busy to give it a port", "limit")
        if reason := answer.get("refused"):
            raise Refusal(reason, answer["code"])
        return str(answer["key"])

    def obey(self, order: dict[str, Any]) -> bool:
        if "asked" in order:
            self._note_answer(order)
        elif "given_back" in order:
            self._give_back(order["given_back"])
        elif "withdrawn" in order:
            service, why = order["withdrawn"], order["why"]
            if why is None:
                self._withdrawn.pop(service, None)
            else:
                self._withdrawn[service] = why
                self._pool.withdraw(service)
        else:
            return False
        return True

    def _note_answer(self, answer: dict[str, Any]) -> None:
        """The parent has answered what it was asked."""
        if key := answer.get("key"):
            self._account.open(key, answer["row"])
            if key not in self.addresses:
                self._pool.add(key)
            host, port = answer["address"]
            self.addresses[key] = host, port
        if answers := self._asked.get(answer["asked"]):
            answers.put(answer)

    def _give_back(self, key: str) -> None:
        """The parent has given back the port of a service: nobody has links of it."""
        if self.addresses.pop(key, None) is not None:
            self.drop_links(self._pool.remove(key))
            self._account.close(key)

    def _take(self) -> None:
        """Serve what the parent sends, one connection after another; the top of its thread."""
        while True:
            try:
                message, descriptors = receive_message(self._source)
            except BlockingIOError:
                with self._lock:
                    if self._takers > 1:  # what a burst has left behind goes
                        self._takers -= 1
                        return
                continue
            except ConnectionResetError:
                return  # the parent was killed
            except Exception:  # out of memory, most likely; there is no other taker
                self._runtime.log.exception("unexpected error in the intake")
                self._runtime.stop.wait(1.0)
                if self._runtime.stop.requested:
                    return
                continue
            if not message:
                return  # the end: the parent is gone, or `stop` was called
            if not descriptors:  # the kernel had no number for it here
                self._adopt(message, descriptors, Refusal(os.strerror(errno.EMFILE).lower(), "system"))
                continue
            with self._lock:
                self._takers -= 1
                alone = not self._takers
                self._takers += alone
            try:
                if alone:
                    self._runtime.threads.start(self._take)
            except RuntimeError as error:
                ending = self._runtime.stop.requested
                problem = Refusal(ENDING, "draining") if ending else Refusal(str(error), "system")
                self._adopt(message, descriptors, problem)
                continue
            self._adopt(message, descriptors)
            with self._lock:
                if self._takers == SPARE_TAKERS:
                    return
                self._takers += 1

    def _adopt(self, message: bytes, descriptors: list[int], problem: Refusal | None = None) -> None:
        """Serve a connection that the parent has accepted; or refuse it, where there is a problem."""
        fields, early = decode_message(message)
        service, address = fields["service"], tuple(fields["address"])
        sock, served, why = None, False, problem or Refusal("unexpected error", "system")
        try:
            if problem is not None:
                self._tell_refused(str(problem))
                return
            sock = adopt_socket(descriptors[0], address)
            if not service:
                served = True
                self.serve_link(sock, address)
                return
            client = ServiceClient(service, sock, address, self._runtime.credentials.faces_of(name_in(service)))
            client.resume(fields, early)
            client.unsettled = served = True
            if not self.is_ready(client):
                self.settle(client)
            self.serve_client(client)
        finally:
            if not served:  # it is reset
                if sock is not None:
                    sock.close()
                elif descriptors:
                    os.close(descriptors[0])
                if service:
                    self._account.settle(service)
                self.leave(service, address)
                if service:
                    record = {"id": fields.get("id") or connection_id(), "service": service}
                    seconds = time.monotonic() - fields["since"]
                    peer = show_address(tuple(fields.get("origin") or address))
                    record |= {"peer": peer, "code": why.code, "reason": str(why)}
                    self._runtime.emit(ConnectionFailed(seconds=seconds, **record))
            if not service:
                self._account.settle(LINKS)  # while its handshake lasts it counts as under way, for the balance

    def _tell_refused(self, reason: str) -> None:
        """Tell that a connection is reset for want of something, once a second at most."""
        if time.monotonic() >= self._tell_at:
            self._tell_at = time.monotonic() + 1.0
            self._runtime.log.warning("cannot take a connection: %s", reason)
