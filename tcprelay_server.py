"""The relay server: accepts links and service clients, and pairs them.

    tcprelays --relay-port 10080 --service-port 10081

What it is made of, and the life of a link and of a service client:

    PortIntake ─▶ Links.serve: HELLO … WELCOME ─▶ Pool.put ─▶ its thread is parked again
                                                    │   ▲
    PortIntake ─▶ Pairing.serve: Pool.take ◀────────┘   │      the service client's thread now owns the link:
                    START, first bytes … READY          │      it sends and receives alone until READY,
                    Splice.run                          │      then carries the opening exchange, and is
                    └── idle again ─────────────────────┘      one of the two pumps of what lasts

Threads, beside one for each link in its handshake and one or two for each connection: the acceptor (`PortIntake`) and
the keeper (`Links`), which watches all idle links.  With --workers, `ServerWorkers` accepts in a process of its own,
and each worker is a `RelayServer` with a `ParentIntake`.

Ending: stop the intake, turn waiting service clients away, say BYE on idle links, let connections finish until the
drain deadline, wake the rest, join everything.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from _tcprelay.command import run_command
from _tcprelay.events import Event
from _tcprelay.options import make_options
from _tcprelay.server_options import ServerOptions
from _tcprelay.role import Relay, warn_about_secrets
from _tcprelay.runtime import Credentials, Runtime
from _tcprelay.server.access import load_access
from _tcprelay.server.account import WorkerAccount
from _tcprelay.server.enrolling import add_client
from _tcprelay.server.intake import Intake, ParentIntake, PortIntake
from _tcprelay.server.leases import Leases
from _tcprelay.server.limits import Handshakes, Quotas, bounds_of_handshakes
from _tcprelay.server.links import Links
from _tcprelay.server.listeners import Listeners
from _tcprelay.server.nonces import Nonces
from _tcprelay.server.pairing import Pairing
from _tcprelay.server.pool import Pool
from _tcprelay.server.survey import survey_pool, survey_ports
from _tcprelay.server.trust import invitation, load_credentials, warn_about_trust
from _tcprelay.server.workers import ServerWorkers
from _tcprelay.status.report import Status
from _tcprelay.system import from_descriptor_limit
from _tcprelay.values import ServicePort

__all__ = ["RelayServer", "ServerOptions", "ServicePort", "create_relay_server", "main"]


USAGE = """tcprelays RELAY_PORT SERVICE... [options]

The relay server, for a host that everybody can reach: relay clients connect to
the relay port, service clients to a service port, and it connects them. A
service is its PORT, or with its name NAME=PORT. For example:

  tcprelays 10080 2222 --tls
      and run on the other side what it says
  tcprelays --relay-port 10080 --service-port 2222 --tls
      the same in full; each option can stand in the environment or a file, too
  tcprelays --config FILE --check
      what the configuration comes to
  tcprelays status
      what one that runs is doing, with options of its own: tcprelays status --help"""


class RelayServer(Relay[ServerOptions]):
    """A relay server.

    Parameters: the relay port, the port of the service named ``default`` (or ``None``), ``on_event``, which is
    called with each `tcprelay.Event` in the thread where it happens and must not block; and every option of
    ``tcprelays`` by its name with underscores (``pair_timeout=5``, ``token="…"``), times in seconds.
    ``service=`` takes strings (``"web=8080"``) or `ServicePort` objects.

    Raises `ValueError` for options that do not fit, and `OSError` where the token file cannot be read.
    """

    def __init__(
        self,
        relay_port: int,
        service_port: int | None = None,
        *,
        on_event: Callable[[Event], object] | None = None,
        **options: Any,
    ) -> None:
        checked = make_options(ServerOptions, relay_port=relay_port, service_port=service_port, **options)
        runtime = Runtime("tcprelay.server", checked, checked.max_connections, on_event)
        self._listeners = Listeners(runtime)
        super().__init__(runtime)
        self._nonces = Nonces()
        self._quotas = Quotas(), Quotas()
        """Of links and of connections."""
        self._leases: Leases | None = None
        """Where ports are listened on: here, or in the parent of workers."""
        self._account: WorkerAccount | None = None
        """In a worker, as is the next."""
        self._count_waiting: Callable[[], dict[str, int]] = dict
        """In the parent of workers: how many service clients wait there for each service."""
        self._source: socket.socket
        self._is_made = False
        """The three that follow are there."""
        self._pool: Pool
        self._intake: Intake
        self._links: Links

    # What it tells

    @property
    def relay_address(self) -> tuple[str, int]:
        """The bound host and port for relay clients; the first of several (see `Listening`).  Raises `RuntimeError`
        before `start`, as does the next."""
        return self._bound()[""]

    @property
    def service_addresses(self) -> dict[str, tuple[str, int]]:
        """The bound host and port of each service; the first of several."""
        return {name: address for name, address in self._bound().items() if name}

    def _bound(self) -> dict[str, tuple[str, int]]:
        if not self._listeners.addresses:
            raise RuntimeError("this relay server has not been started")
        return self._listeners.addresses

    @property
    def counters(self) -> dict[str, int]:
        """What has been counted since the start: ``connections``, ``failed``, ``broken``, ``bytes_in`` and
        ``bytes_out``; and how many there are now: ``open`` connections, ``links_idle``, and service clients that are
        ``waiting``."""
        idle, waiting = (self._pool.count_idle(), self._pool.count_waiting()) if self._is_made else (0, 0)
        return {**self._count(), "links_idle": idle, "waiting": waiting}

    ROLE, INBOUND_IS_TO_LINK = "server", True

    def _survey(self) -> tuple[Status, dict[str, str]]:
        known = survey_ports(self._listeners.addresses, self._count_waiting())
        return survey_pool(self._pool, known) if self._is_made else (known, {})

    def invitation(self, with_secrets: bool) -> str:
        """After a start with ``--tls`` alone: the command for the other side; with the token, or where that is."""
        port = self._listeners.addresses.get("", ("", self.options.relay_port))[1]
        return invitation(self.options, self.runtime.credentials, port or 0, with_secrets)

    # How it begins and ends

    def _load_credentials(self, options: ServerOptions) -> Credentials:
        access, credentials = load_access(options), load_credentials(options)
        self._listeners.access = access  # only now that all could be read
        return credentials

    def _prepare(self) -> None:
        """Bind all ports.  Raises `OSError` that names the address, and `Stopping` at a signal."""
        self._listeners.bind(self.signals)
        services = self._listeners.services
        warn_about_secrets(self.runtime)
        warn_about_trust(self.runtime, (sock.getsockname() for sock, name in services.items() if not name))

    def _open(self) -> None:
        """Make the parts, and begin to take connections."""
        runtime, account = self.runtime, self._account
        names, most = [service.name for service in self.options.services], runtime.places.most
        # One link for each connection, and as many idle ones, which take half as many descriptors.
        self._pool = pool = Pool(names, self.options.max_pending, 2 * most)
        intake: Intake
        if account is None:
            intake = PortIntake(runtime, pool, self._listeners)
            self._leases = intake.leases
        else:
            intake = ParentIntake(runtime, pool, self._listeners, self._source, account)
        self._intake = intake
        bounds = bounds_of_handshakes(most, account.workers if account else 1)
        of_links, of_clients = map(Handshakes, bounds)
        self._links = Links(runtime, pool, intake, of_links, self._nonces, *self._quotas)
        pairing = Pairing(runtime, pool, intake, of_clients, self._links)
        intake.serve_link, intake.serve_client = self._links.serve, pairing.serve
        intake.drop_links = self._links.drop_all
        self._is_made = True
        if account is None:
            self.prepare()
        self._own_threads += [*intake.threads, self._links.keeper]
        if not runtime.stop.requested:  # a listener of the first events may have ended it
            intake.start()
            self._links.start()

    def _stop_intake(self) -> None:
        if self._is_made:
            self._intake.stop()
            self._links.retire_all()

    def _close(self) -> None:
        super()._close()
        if self._is_made:
            self._pool.selector.close()

    def _apply(self, options: ServerOptions, credentials: Credentials) -> None:
        super()._apply(options, credentials)
        self._listeners.set_shares()
        self.runtime.places.most = options.max_connections or from_descriptor_limit()
        if self._is_made:
            self._pool.max_pending, self._pool.most = options.max_pending, 2 * self.runtime.places.most
            self._links.revoke()
        if self._leases is not None:
            self._leases.revoke()

    # With workers

    def make_workers(self, count: int) -> ServerWorkers:
        self._nonces, self._quotas = Nonces(count), (Quotas(count), Quotas(count))
        workers = ServerWorkers(self, count, self._listeners, self._become_one_of, self._quotas)
        self._leases, self._count_waiting = workers.leases, workers.count_waiting
        return workers

    def _become_one_of(self, account: WorkerAccount, source: socket.socket) -> None:
        """Be one worker: what is accepted, bounded and counted over all of them is its parent's business."""
        self._account, self._source, self._leases, self._count_waiting = account, source, None, dict
        for shared in (self._nonces, *self._quotas):
            shared.process = account.number

    def obey(self, order: dict[str, Any]) -> None:
        if self._intake.obey(order):
            return
        if "suspect" in order:
            self._links.suspect(order["suspect"], order["why"])
        else:
            self._links.give_up_one(order["give_up"])


def create_relay_server(relay_port: int, service_port: int, **options: Any) -> RelayServer:
    """A `RelayServer` that has been started, as node-tcp-relay's ``createRelayServer``.  Raises `OSError`."""
    return RelayServer(relay_port, service_port, **options).start()


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``tcprelays``.  Returns its exit status."""
    words = sys.argv[1:] if argv is None else argv
    if list(words[:1]) == ["status"]:
        from _tcprelay.status.looking import main as look  # which no relay needs

        return look("tcprelays", ["server"], words[1:])
    return run_command(
        "tcprelays", USAGE, ServerOptions, lambda options: RelayServer(**options.as_arguments()), argv, add_client
    )


if __name__ == "__main__":
    sys.exit(main())
